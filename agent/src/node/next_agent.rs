//! Starting the next agent, as a child of the first process and not of this one.
//!
//! systemd learns at once of the end of its own children only. Were the next agent this one's, its end would stay
//! unseen while this one drains, and nobody would be started in its place.

#![expect(unsafe_code, reason = "a child that has a child and ends at once")]

use std::{
    io::{self, PipeWriter, Read as _},
    os::unix::process::CommandExt as _,
    process::Command,
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::{Interest, unix::AsyncFd};

/// Starts `command` and returns its process id.
///
/// # Errors
/// If there can be no process, or there is no such program.
pub(super) fn start(mut command: Command) -> io::Result<Pid> {
    let (mut said, writer) = io::pipe()?;
    // SAFETY: between fork and exec the closure makes system calls and nothing else.
    unsafe { command.pre_exec(move || leave_parent(&writer)) };
    // Returns when the child's child runs the program, or could not.
    let mut child = command.spawn()?;
    child.wait()?;
    // The pipe's other end is in it.
    drop(command);
    let mut number = [0; size_of::<i32>()];
    said.read_exact(&mut number)?;
    Pid::from_raw(i32::from_be_bytes(number)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Goes on in a child, whose process id it writes, and ends this process.
fn leave_parent(writer: &PipeWriter) -> io::Result<()> {
    // Not fork(3): that takes locks, which a thread may have held that is not in this process.
    // SAFETY: without CLONE_VM the child has a copy of everything, as of fork(2); it goes on below.
    let process = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    match i32::try_from(process) {
        Ok(0) => Ok(()),
        Ok(child) if child > 0 => {
            let written = rustix::io::write(writer, &child.to_be_bytes());
            // SAFETY: ends this process, and runs nothing that belongs to its parent.
            unsafe { libc::_exit(i32::from(written.is_err())) }
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Resolves when the process has ended.
///
/// # Errors
/// If that cannot be watched.
pub(super) async fn ended(process: Pid) -> io::Result<()> {
    let handle = match pidfd_open(process, PidfdFlags::NONBLOCK) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other?,
    };
    // SAFETY: an owned descriptor stays the same, and open, for as long as it is there.
    let watched = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
    watched.readable().await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use rustix::process::{Signal, kill_process};

    use super::*;

    #[tokio::test]
    async fn it_is_no_child_of_this_process_and_its_end_is_seen() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let process = start(command).unwrap();
        let number = process.as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{number}/status")).unwrap();
        let name = status.lines().find_map(|line| line.strip_prefix("Name:"));
        assert_eq!(name.unwrap().trim(), "sleep");
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        assert_ne!(parent.unwrap().trim(), std::process::id().to_string());
        kill_process(process, Signal::KILL).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(30), ended(process));
        ended.await.unwrap().unwrap();
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = start(Command::new("/nowhere/sidestep")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
