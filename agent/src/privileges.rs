//! What the process may do: as many descriptors as it can get, and no capability that it no longer needs.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::CaptureMode;

/// What a running agent still does with privilege, and nothing else:
/// map updates and program replacement, or rules and routes (`NET_ADMIN`), entering workloads' network namespaces
/// (`SYS_ADMIN`), reading cgroup ids by handle (`DAC_READ_SEARCH`), opening namespace files of other users
/// (`SYS_PTRACE`), and tunnel ports below 1024 that a catalog may declare (`NET_BIND_SERVICE`).
const KEPT: [Capability; 5] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_NET_BIND_SERVICE,
];

/// And this: `bpf(2)`, or the raw socket by which iptables asks the kernel for its extensions.
fn kept(mode: CaptureMode) -> CapsHashSet {
    let of_mode = match mode {
        CaptureMode::Ebpf => Capability::CAP_BPF,
        CaptureMode::Iptables | CaptureMode::IptablesNft | CaptureMode::IptablesLegacy => {
            Capability::CAP_NET_RAW
        }
    };
    KEPT.into_iter().chain([of_mode]).collect()
}

/// Privileges could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Raising the limit of open files failed.
    #[error("raise the limit of open files from {from} to {to}")]
    OpenFiles {
        /// The limit so far.
        from: u64,
        /// The limit wanted.
        to: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Giving up capabilities failed.
    #[error("drop capabilities from the {set:?} set")]
    Capabilities {
        /// Which set.
        set: CapSet,
        /// The kernel's answer.
        #[source]
        source: caps::errors::CapsError,
    },
}

/// Raises the soft limit of open files to the hard one and returns it. A connection takes two.
///
/// # Errors
/// If the kernel refuses.
pub fn raise_open_files() -> Result<u64, PrivilegeError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let (from, to) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
    if from < to {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        )
        .map_err(|errno| PrivilegeError::OpenFiles {
            from,
            to,
            source: errno.into(),
        })?;
    }
    Ok(to)
}

/// Gives up every capability that `mode` does not need, for good: also from the bounding set.
///
/// Capabilities belong to a thread; call this before other threads exist.
///
/// # Errors
/// If the kernel refuses.
pub fn drop_unneeded(mode: CaptureMode) -> Result<(), PrivilegeError> {
    let failed = |set| move |source| PrivilegeError::Capabilities { set, source };
    let kept = kept(mode);
    for capability in caps::all() {
        if !kept.contains(&capability)
            && caps::has_cap(None, CapSet::Bounding, capability)
                .map_err(failed(CapSet::Bounding))?
        {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed(CapSet::Bounding))?;
        }
    }
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed(CapSet::Permitted))?;
    let left: CapsHashSet = permitted.intersection(&kept).copied().collect();
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).map_err(failed(set))?;
    }
    caps::set(None, CapSet::Effective, &left).map_err(failed(CapSet::Effective))?;
    caps::set(None, CapSet::Permitted, &left).map_err(failed(CapSet::Permitted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let raised = raise_open_files().unwrap();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        assert_eq!(raised, maximum.unwrap_or(u64::MAX));
    }

    #[test]
    fn only_needed_capabilities_are_left() {
        if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap() {
            return; // Without privilege there is nothing to give up.
        }
        for (mode, other) in [
            (CaptureMode::Ebpf, Capability::CAP_NET_RAW),
            (CaptureMode::Iptables, Capability::CAP_BPF),
        ] {
            // On a thread of its own: capabilities are per thread, and other tests need theirs.
            let after = std::thread::spawn(move || {
                drop_unneeded(mode).map(|()| caps::read(None, CapSet::Permitted))
            });
            let left = after.join().unwrap().unwrap().unwrap();
            assert!(left.is_subset(&kept(mode)), "{left:?}");
            assert!(!left.contains(&other), "{left:?}");
        }
    }
}
