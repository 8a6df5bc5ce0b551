//! Who is at the other end of a Unix socket, told for sure or not at all.
//!
//! The kernel keeps with a connection who called `connect()`: the user, and the process (`SO_PEERCRED`). The number of
//! a process is given to another one after its end, so a number alone proves nothing. `SO_PEERPIDFD` gives the process
//! itself. While it lives its number is nobody else's: what is read of `/proc/NUMBER`, and only then the process is
//! found alive, was read of it. One that has ended is refused, also if another process holds its socket.

#![expect(unsafe_code, reason = "SO_PEERPIDFD has no safe binding")]

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::{Component, Path, PathBuf},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;

use crate::datapath::{
    CgroupId, Maker, NetnsCookie,
    cgroup::{Cgroup2, CgroupError, own_path},
    netns::{Netns, NetnsError},
};

/// Why it is not told who a client is.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnixClientError {
    /// The kernel is older than 6.5.
    #[error(
        "this kernel does not tell which process is at the other end of a Unix socket (SO_PEERPIDFD): use 6.5 or later"
    )]
    Kernel,
    /// The process has ended.
    #[error("the process that connected has ended: nobody can tell whose it was")]
    Gone,
    /// It is in a pid namespace that is not below the agent's.
    #[error("the process that connected is not visible in the agent's pid namespace")]
    Invisible,
    /// It is in no version 2 cgroup that can be seen from here.
    #[error("process {process} is in no version 2 cgroup that the agent can see")]
    NoCgroup {
        /// Its id.
        process: u32,
    },
    /// The socket could not be asked.
    #[error("ask who is at the other end of a Unix socket")]
    Ask(#[source] io::Error),
    /// What /proc has of it could not be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its cgroup could not be looked at.
    #[error("find the cgroup of a client")]
    Cgroup(#[source] CgroupError),
    /// Its network namespace could not be looked at.
    #[error("find the network namespace of a client")]
    Netns(#[source] NetnsError),
}

/// Asks about clients of Unix sockets.
#[derive(Debug)]
pub(super) struct UnixClients {
    cgroups: Cgroup2,
    /// The agent's network namespace: its device and inode, and its cookie.
    own: ((u64, u64), NetnsCookie),
}

impl UnixClients {
    /// # Errors
    /// [`UnixClientError::Kernel`], or if cgroups or namespaces cannot be looked at.
    pub(super) fn new() -> Result<Self, UnixClientError> {
        let (one, _other) = StdStream::pair().map_err(UnixClientError::Ask)?;
        peer_process(&one)?;
        let netns = Netns::current().map_err(UnixClientError::Netns)?;
        let identity = netns.identity().map_err(UnixClientError::Netns)?;
        let cookie = netns.cookie().map_err(UnixClientError::Netns)?;
        Ok(Self {
            cgroups: Cgroup2::find().map_err(UnixClientError::Cgroup)?,
            own: (identity, cookie),
        })
    }

    /// Who called `connect()`. `by_namespace` says whether it matters in which network namespace that process is; if
    /// not, the agent's is told.
    ///
    /// # Errors
    /// [`UnixClientError`]; nobody knows then who it is.
    pub(super) fn maker_of(
        &self,
        stream: &UnixStream,
        by_namespace: bool,
    ) -> Result<Maker, UnixClientError> {
        let process = peer_process(stream)?;
        let credentials = stream.peer_cred().map_err(UnixClientError::Ask)?;
        let number = credentials.pid().and_then(|pid| u32::try_from(pid).ok());
        let number = number.filter(|pid| *pid != 0);
        let number = number.ok_or(UnixClientError::Invisible)?;
        let found = self.cgroup_of(number).and_then(|cgroup| {
            let netns = if by_namespace {
                self.netns_of(number)?
            } else {
                self.own.1
            };
            Ok((cgroup, netns))
        });
        // After all is read, and also if that failed: then because it ended.
        if !is_alive(&process)? {
            return Err(UnixClientError::Gone);
        }
        let (cgroup, netns) = found?;
        Ok(Maker {
            cgroup,
            netns,
            uid: credentials.uid(),
            process: number,
        })
    }

    fn cgroup_of(&self, process: u32) -> Result<CgroupId, UnixClientError> {
        let file = PathBuf::from(format!("/proc/{process}/cgroup"));
        let text =
            fs::read(&file).map_err(|source| UnixClientError::Read { path: file, source })?;
        let path = own_path(&text).filter(|path| is_below(path));
        let path = path.ok_or(UnixClientError::NoCgroup { process })?;
        self.cgroups.id_of(&path).map_err(UnixClientError::Cgroup)
    }

    fn netns_of(&self, process: u32) -> Result<NetnsCookie, UnixClientError> {
        let file = PathBuf::from(format!("/proc/{process}/ns/net"));
        let netns = Netns::open(&file).map_err(UnixClientError::Netns)?;
        if netns.identity().map_err(UnixClientError::Netns)? == self.own.0 {
            return Ok(self.own.1);
        }
        netns.cookie().map_err(UnixClientError::Netns)
    }
}

/// Whether the agent can see it: what is outside its cgroup namespace begins with `/..` (`cgroup_namespaces(7)`).
fn is_below(path: &Path) -> bool {
    !path.components().any(|c| matches!(c, Component::ParentDir))
}

/// The process that called `connect()`, or made the pair (`SO_PEERPIDFD`). Kernel 6.5.
fn peer_process(socket: impl AsFd) -> Result<OwnedFd, UnixClientError> {
    let mut descriptor: libc::c_int = -1;
    let mut length: libc::socklen_t = 4;
    // SAFETY: the option writes one int, as announced, into `descriptor`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut descriptor).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        // SAFETY: the kernel has just made this descriptor for us alone.
        return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        Some(libc::ENOPROTOOPT) => UnixClientError::Kernel,
        // Kernels before 6.16 have none of a process that ended and was waited for.
        Some(libc::ESRCH | libc::EINVAL) => UnixClientError::Gone,
        _ => UnixClientError::Ask(error),
    })
}

/// A process that has ended makes its descriptor readable, before its number is free (`pidfd_open(2)`).
fn is_alive(process: &OwnedFd) -> Result<bool, UnixClientError> {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    let at_once = Timespec::default();
    let ended = poll(&mut polled, Some(&at_once)).map_err(|e| UnixClientError::Ask(e.into()))?;
    Ok(ended == 0)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Child, Command, Stdio},
    };

    use tokio::net::UnixListener;

    use super::*;

    /// `None` on a kernel that is too old, of which just that must be said.
    fn clients() -> Option<UnixClients> {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        let mut numbers = release.split('.').map(str::parse::<u32>);
        let version = (
            numbers.next().unwrap().unwrap(),
            numbers.next().unwrap().unwrap(),
        );
        match UnixClients::new() {
            Err(UnixClientError::Kernel) => {
                assert!(version < (6, 5), "{release}");
                println!("skipped: kernel {release} has no SO_PEERPIDFD");
                None
            }
            clients => Some(clients.unwrap()),
        }
    }

    /// A process that connects to `path` and stays until its input ends.
    fn client(path: &Path) -> Child {
        let program = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                       print('connected', flush=True)\nsys.stdin.read()";
        let mut child = Command::new("python3")
            .args(["-c", program])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "connected\n");
        child
    }

    #[tokio::test]
    async fn a_client_is_its_process_while_that_lives() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("upstream.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let Some(clients) = clients() else { return };
        let mut child = client(&path);
        let (stream, _) = listener.accept().await.unwrap();
        let cgroups = Cgroup2::find().unwrap();
        let expected = Maker {
            cgroup: cgroups.id_of(&cgroups.own().unwrap()).unwrap(),
            netns: Netns::current().unwrap().cookie().unwrap(),
            uid: rustix::process::getuid().as_raw(),
            process: child.id(),
        };
        for by_namespace in [true, false] {
            assert_eq!(clients.maker_of(&stream, by_namespace).unwrap(), expected);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = clients.maker_of(&stream, false);
        assert!(matches!(gone, Err(UnixClientError::Gone)), "{gone:?}");
    }

    #[tokio::test]
    async fn one_that_has_ended_is_refused_while_its_parent_has_not_looked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("upstream.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let Some(clients) = clients() else { return };
        let mut child = client(&path);
        let (stream, _) = listener.accept().await.unwrap();
        let process = peer_process(&stream).unwrap();
        drop(child.stdin.take());
        let mut polled = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut polled, None).unwrap();
        // A zombie still has a line in /proc.
        let gone = clients.maker_of(&stream, false);
        assert!(matches!(gone, Err(UnixClientError::Gone)), "{gone:?}");
        child.wait().unwrap();
    }

    #[test]
    fn a_cgroup_outside_the_own_namespace_is_not_guessed() {
        assert!(is_below(Path::new("/system.slice/web.service")));
        assert!(!is_below(Path::new("/../web.service")));
    }
}
