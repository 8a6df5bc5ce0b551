//! Programs of somebody else, at the hooks that Sidestep uses: for what happens beside them.

#![expect(unsafe_code, reason = "bpf(2) has no safe binding")]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use crate::cgroup::Cgroup;

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const CGROUP_SOCK_ADDR: u32 = 18;
const CONNECT4: u32 = 10;

/// How a program shares a cgroup with others (`BPF_F_ALLOW_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Sharing {
    /// With nobody, here and below.
    Exclusive = 0,
    /// Below, others may run in its place.
    Override = 1,
    /// Others run too.
    Multi = 2,
}

/// What a program says to every connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// `EPERM`
    Refuse = 0,
    /// As you like.
    Pass = 1,
}

/// A program at `connect()` of IPv4 sockets. It stays until it is detached or its cgroup goes.
#[derive(Debug)]
pub struct ForeignProgram(OwnedFd);

#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

impl ForeignProgram {
    /// Loads it under a name of at most 15 characters.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn load(name: &str, verdict: Verdict) -> io::Result<Self> {
        // mov64 r0, VERDICT; exit
        let code: [u64; 2] = [u64::from(verdict as u32) << 32 | 0xb7, 0x95];
        let mut padded = [0; 16];
        for (to, from) in padded.iter_mut().zip(name.bytes().take(15)) {
            *to = from;
        }
        let attributes = Load {
            kind: CGROUP_SOCK_ADDR,
            instructions: 2,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: padded,
            interface: 0,
            attach_type: CONNECT4,
        };
        let fd = call(PROG_LOAD, &attributes)?;
        // SAFETY: the kernel has just made it, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Attaches it without a link, as systemd and older tools do.
    ///
    /// # Errors
    /// `EPERM` if what is there shares with nobody.
    pub fn attach(&self, cgroup: &Cgroup, sharing: Sharing) -> io::Result<()> {
        self.at(cgroup, PROG_ATTACH, sharing as u32)
    }

    /// Takes it off a cgroup.
    ///
    /// # Errors
    /// If it is not there.
    pub fn detach(&self, cgroup: &Cgroup) -> io::Result<()> {
        self.at(cgroup, PROG_DETACH, 0)
    }

    fn at(&self, cgroup: &Cgroup, command: libc::c_long, flags: u32) -> io::Result<()> {
        let directory = File::open(cgroup.directory())?;
        let word = |fd: i32| fd.cast_unsigned();
        let attributes = [
            word(directory.as_raw_fd()),
            word(self.0.as_raw_fd()),
            CONNECT4,
            flags,
        ];
        call(command, &attributes).map(drop)
    }
}

fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads the attributes, whose length it is told, and what they point to, which lives.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
