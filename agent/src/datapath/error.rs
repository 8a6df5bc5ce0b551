//! What can go wrong between the agent and the kernel, said so that a person can act on it.

use std::{fmt, io, path::PathBuf};

/// An error of [`super::Datapath`].
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The binary has no programs in it.
    #[error("built without eBPF programs: run `cargo xtask build-ebpf` and build again")]
    NoObject,
    /// The object could not be read, or its maps could not be created.
    #[error("the eBPF object could not be set up{}", Advice(advice))]
    Object {
        /// What to do, if it is known.
        advice: &'static str,
        /// What the loader said.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// The object lacks a part or has one of another kind: it was built from other sources.
    #[error("the eBPF object has no {kind} `{name}`: run `cargo xtask build-ebpf` and build again")]
    Incomplete {
        /// Program or map.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// The kernel refused a program.
    #[error(
        "the kernel refused the program {program}{}{}",
        Advice(advice),
        Log(log)
    )]
    Load {
        /// The program's name.
        program: &'static str,
        /// What to do, if it is known.
        advice: &'static str,
        /// The end of what the verifier said.
        log: String,
        /// What the loader said.
        #[source]
        source: io::Error,
    },
    /// As [`Self::Load`], before the kernel was asked.
    #[error("the program {program} could not be loaded")]
    Prepare {
        /// The program's name.
        program: &'static str,
        /// What the loader said.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// The kernel did not attach a program.
    #[error("the program {program} could not be attached to {}{}", cgroup.display(), Advice(advice))]
    Attach {
        /// The program's name.
        program: &'static str,
        /// Where to.
        cgroup: PathBuf,
        /// What to do, if it is known.
        advice: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A cgroup could not be opened.
    #[error("the cgroup {} could not be opened", path.display())]
    Cgroup {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pins could not be used.
    #[error(transparent)]
    Pins(#[from] super::pins::PinError),
    /// Capture by iptables failed.
    #[error(transparent)]
    Iptables(#[from] super::iptables::IptablesError),
    /// Queries in datagrams cannot be captured without harm.
    #[error("capture.dns needs to know which interface a datagram leaves by: set it to false")]
    Interfaces(#[from] super::btf::BtfError),
    /// No version 2 control groups.
    #[error(transparent)]
    NoCgroup2(#[from] super::cgroup::CgroupError),
    /// The agent would have to exclude everything to exclude itself.
    #[error(
        "the agent runs in the root cgroup, so its own connections cannot be told from others: \
         start it in a cgroup of its own, or set agent.cgroup"
    )]
    AgentInRootCgroup,
    /// A map could not be read or written.
    #[error("{operation} the eBPF map {map} failed")]
    Map {
        /// The map's name.
        map: &'static str,
        /// What was tried.
        operation: MapOperation,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// More destinations than the maps were made for.
    #[error("{wanted} destinations, but capture.max_vips is {limit}: raise it and restart")]
    TooManyVips {
        /// How many there are.
        wanted: usize,
        /// How many there may be.
        limit: u32,
    },
    /// [`super::Datapath::events`] was called twice.
    #[error("the events of the datapath were taken before")]
    EventsTaken,
    /// The programs that run have no logging.
    #[error("capture.debug was off when the programs were loaded: switching it on takes a restart")]
    CannotLog,
    /// The ring buffer cannot be watched.
    #[error("the events of the datapath cannot be watched")]
    Events {
        /// What the runtime said.
        #[source]
        source: io::Error,
    },
}

impl DatapathError {
    /// Whether it says something of a caller, and not of the agent or the kernel.
    pub fn is_of_caller(&self) -> bool {
        matches!(self, Self::Iptables(error) if error.is_of_caller())
    }

    pub(super) fn map(map: &'static str, operation: MapOperation, source: io::Error) -> Self {
        Self::Map {
            map,
            operation,
            source,
        }
    }
}

/// What was tried with a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapOperation {
    /// Looking up or listing.
    Read,
    /// Adding or changing.
    Write,
    /// Removing.
    Delete,
}

impl fmt::Display for MapOperation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing to",
            Self::Delete => "deleting from",
        })
    }
}

/// What to do about an error of `bpf(2)` that is not about one particular argument.
pub(super) fn advice_for_load(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN; \
             a container's seccomp profile or kernel lockdown may forbid bpf(2) too"
        }
        Some(libc::EINVAL) => {
            "a kernel of 6.1 or later is needed; `sidestep check` shows what is missing"
        }
        Some(libc::E2BIG) => "the verifier ran out of budget: please report the kernel's release",
        Some(libc::ENOMEM) => "memory is short: lower capture.max_vips or capture.max_flows",
        Some(libc::ENOSYS) => "the kernel was built without bpf(2) (CONFIG_BPF_SYSCALL)",
        _ => "",
    }
}

/// What to do when a link cannot be created.
pub(super) fn advice_for_attach(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "either CAP_NET_ADMIN and CAP_BPF are missing, or another program holds this cgroup or \
             one above it exclusively (attached without BPF_F_ALLOW_MULTI); `sidestep check` names it"
        }
        Some(libc::EINVAL) => "the kernel does not know this hook; 6.1 or later is needed",
        Some(libc::E2BIG) => "64 programs are attached here already",
        Some(libc::ENOENT | libc::ENODEV) => "the cgroup was removed meanwhile",
        Some(libc::EBADF) => "this is no version 2 cgroup",
        _ => "",
    }
}

struct Advice<'a>(&'a str);

impl fmt::Display for Advice<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(formatter, " ({})", self.0)
        }
    }
}

struct Log<'a>(&'a str);

impl fmt::Display for Log<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(formatter, "; the verifier's last words:\n{}", self.0)
        }
    }
}
