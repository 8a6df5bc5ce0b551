//! Attaching programs to cgroups, so that each runs there once: also after another agent left its own.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{
    DatapathError, DatapathSettings,
    bpf::{self, CgroupHook, CgroupLink},
    cgroup::id_of_directory,
    error::advice_for_attach,
    load::Programs,
    pins::{self, PinDirectory, PinError},
    types::CgroupId,
};

/// A program and where it belongs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hooked {
    pub(super) program: &'static str,
    pub(super) hook: CgroupHook,
}

/// What every attach point gets. `sock_ops` first: a connect that is captured must find who hands it over.
pub(super) const WORKLOAD_PROGRAMS: [Hooked; 5] = [
    HAND_OVER,
    Hooked {
        program: "sidestep_peer4",
        hook: CgroupHook::GetPeerName4,
    },
    Hooked {
        program: "sidestep_peer6",
        hook: CgroupHook::GetPeerName6,
    },
    Hooked {
        program: "sidestep_conn4",
        hook: CgroupHook::Connect4,
    },
    Hooked {
        program: "sidestep_conn6",
        hook: CgroupHook::Connect6,
    },
];

/// What the agent's own cgroup gets too, for the sockets that it accepts.
const HAND_OVER: Hooked = Hooked {
    program: "sidestep_flows",
    hook: CgroupHook::SockOps,
};

/// What it gets beside if other proxies are to ask.
pub(super) const ORIGINAL_DST: Hooked = Hooked {
    program: "sidestep_origd",
    hook: CgroupHook::GetSockOpt,
};

/// What every attach point gets beside if DNS queries are captured. Answers first: a query that is captured must find
/// who lets its answer come from its server.
pub(super) const QUERIES: [Hooked; 3] = [
    Hooked {
        program: "sidestep_recv4",
        hook: CgroupHook::RecvMsg4,
    },
    Hooked {
        program: "sidestep_recv6",
        hook: CgroupHook::RecvMsg6,
    },
    Hooked {
        program: "sidestep_send4",
        hook: CgroupHook::SendMsg4,
    },
];

/// A program that is to run in a cgroup and below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    program: &'static str,
    hook: CgroupHook,
    cgroup: PathBuf,
}

/// A program that runs in a cgroup as long as the descriptor is open, or the link pinned.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) program: &'static str,
    pub(super) target: PathBuf,
    pub(super) fd: OwnedFd,
}

/// What hands connections over: to run before the agent takes any.
pub(super) fn handing_over(settings: &DatapathSettings) -> Vec<Wanted> {
    let attach_points = outermost(&settings.cgroups);
    let agent = &settings.agent_cgroup;
    let mut wanted = everywhere(HAND_OVER, &attach_points);
    if !attach_points.iter().any(|above| agent.starts_with(above)) {
        wanted.push(HAND_OVER.at(agent));
    }
    if settings.so_original_dst {
        wanted.push(ORIGINAL_DST.at(agent));
    }
    wanted
}

/// What captures: to run once the agent takes connections.
pub(super) fn capturing(settings: &DatapathSettings) -> Vec<Wanted> {
    let attach_points = outermost(&settings.cgroups);
    let queries = settings.dns_port.map(|_port| QUERIES);
    // Connect hooks last: they send queries to the agent too.
    let capturing = queries.into_iter().flatten();
    let capturing = capturing.chain(WORKLOAD_PROGRAMS.into_iter().skip(1));
    capturing
        .flat_map(|hooked| everywhere(hooked, &attach_points))
        .collect()
}

impl Hooked {
    fn at(self, cgroup: &Path) -> Wanted {
        Wanted {
            program: self.program,
            hook: self.hook,
            cgroup: cgroup.to_owned(),
        }
    }
}

fn everywhere(hooked: Hooked, attach_points: &[PathBuf]) -> Vec<Wanted> {
    attach_points
        .iter()
        .map(|cgroup| hooked.at(cgroup))
        .collect()
}

/// Each cgroup once, and none that is below another of the list. Programs run for everything below, and to run
/// twice for one connect would be once too often: the second time it is aimed at the agent already.
fn outermost(cgroups: &[PathBuf]) -> Vec<PathBuf> {
    // A name that cannot be resolved is left for attaching to complain about.
    let resolved = |cgroup: &PathBuf| cgroup.canonicalize().unwrap_or_else(|_| cgroup.clone());
    let mut outermost: Vec<PathBuf> = Vec::new();
    // Sorted, a cgroup comes before those below it.
    for cgroup in cgroups.iter().map(resolved).collect::<BTreeSet<_>>() {
        if !outermost.iter().any(|above| cgroup.starts_with(above)) {
            outermost.push(cgroup);
        }
    }
    outermost
}

/// Makes every wanted program run where it is wanted. What does already is left alone.
pub(super) fn attach(
    wanted: &[Wanted],
    programs: &Programs,
    pins: Option<&PinDirectory>,
    held: &mut Vec<Link>,
) -> Result<(), DatapathError> {
    let mut others = None;
    for wanted in wanted {
        let cgroup = id_of_directory(&wanted.cgroup)?;
        let is_same = |link: &Link| link.program == wanted.program && link.target == wanted.cgroup;
        let runs =
            |link: &Link| bpf::link_info(link.fd.as_fd()).is_ok_and(|i| i.cgroup_id == cgroup.0);
        if held.iter().any(|link| is_same(link) && runs(link)) {
            continue;
        }
        let others = match &mut others {
            Some(others) => others,
            None => others.insert(bpf::cgroup_links().map_err(wanted.failed())?),
        };
        let program = programs.get(wanted.program)?;
        let link = match pins {
            None => {
                detach_duplicates(wanted, cgroup, None, others);
                create(wanted, program)?
            }
            Some(pins) => {
                let pin = pins.link(wanted.program, cgroup)?;
                adopt_or_create(wanted, cgroup, program, &pin, others)?
            }
        };
        held.retain(|link| !is_same(link));
        held.push(Link {
            program: wanted.program,
            target: wanted.cgroup.clone(),
            fd: link,
        });
    }
    Ok(())
}

/// Detaches what is pinned and not wanted any more.
pub(super) fn remove_others(wanted: &[Wanted], pins: &PinDirectory) -> Result<(), DatapathError> {
    let mut kept = BTreeSet::new();
    for wanted in wanted {
        let cgroup = id_of_directory(&wanted.cgroup)?;
        kept.insert(pins.link(wanted.program, cgroup)?);
    }
    for pin in pins.links()? {
        if !kept.contains(&pin) {
            pins::detach(&pin)?;
            tracing::info!(pin = %pin.display(), "detached: not configured any more, or its cgroup is gone");
        }
    }
    Ok(())
}

/// Puts the program behind the link that an agent before left here; makes a new one if there is none that works.
fn adopt_or_create(
    wanted: &Wanted,
    cgroup: CgroupId,
    program: BorrowedFd<'_>,
    pin: &Path,
    others: &[(OwnedFd, CgroupLink)],
) -> Result<OwnedFd, DatapathError> {
    match bpf::pinned(pin) {
        Ok(link) => match adopt(wanted, cgroup, program, &link) {
            Ok(info) => {
                detach_duplicates(wanted, cgroup, Some(info.id), others);
                return Ok(link);
            }
            Err(error) if is_denied(&error) => return Err(wanted.failed()(error)),
            Err(error) => {
                tracing::warn!(pin = %pin.display(), %error, "pinned link not taken over: made anew");
                fs::remove_file(pin).map_err(|source| PinError::Io {
                    doing: "remove",
                    path: pin.to_owned(),
                    source,
                })?;
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(wanted.failed()(error)),
    }
    // Both would run otherwise, and what the first did the second would undo.
    detach_duplicates(wanted, cgroup, None, others);
    let link = create(wanted, program)?;
    bpf::pin(link.as_fd(), pin).map_err(|source| PinError::Io {
        doing: "pin the link at",
        path: pin.to_owned(),
        source,
    })?;
    Ok(link)
}

/// Fails if the link is not what its name says, and with `ENOLINK` if its cgroup was removed.
fn adopt(
    wanted: &Wanted,
    cgroup: CgroupId,
    program: BorrowedFd<'_>,
    link: &OwnedFd,
) -> io::Result<CgroupLink> {
    let info = bpf::link_info(link.as_fd())?;
    if info.cgroup_id != cgroup.0 || info.hook != wanted.hook as u32 {
        let message = format!("it is at hook {} of cgroup {}", info.hook, info.cgroup_id);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    bpf::link_update(link.as_fd(), program)?;
    Ok(info)
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Detaches programs of our own name from the same hook of the same cgroup: those of an agent that was killed
/// with other pins, for it is ours to say what runs there. Those of others are left alone.
fn detach_duplicates(
    wanted: &Wanted,
    cgroup: CgroupId,
    ours: Option<u32>,
    links: &[(OwnedFd, CgroupLink)],
) {
    for (link, info) in links {
        let is_here = info.cgroup_id == cgroup.0 && info.hook == wanted.hook as u32;
        if !is_here || ours == Some(info.id) {
            continue;
        }
        if bpf::program_name(info.program_id).is_ok_and(|name| name == wanted.program) {
            let detached = bpf::link_detach(link.as_fd());
            tracing::warn!(
                program = wanted.program, cgroup = %wanted.cgroup.display(), link = info.id, ?detached,
                "a second program of the same name ran here"
            );
        }
    }
}

fn create(wanted: &Wanted, program: BorrowedFd<'_>) -> Result<OwnedFd, DatapathError> {
    let directory = open_cgroup(&wanted.cgroup)?;
    bpf::link_create(program, directory.as_fd(), wanted.hook).map_err(wanted.failed())
}

impl Wanted {
    fn failed(&self) -> impl FnOnce(io::Error) -> DatapathError {
        let (program, cgroup) = (self.program, self.cgroup.clone());
        move |source| DatapathError::Attach {
            program,
            cgroup,
            advice: advice_for_attach(&source),
            source,
        }
    }
}

pub(super) fn open_cgroup(cgroup: &Path) -> Result<OwnedFd, DatapathError> {
    let opened = fs::File::open(cgroup);
    opened
        .map(OwnedFd::from)
        .map_err(|source| DatapathError::Cgroup {
            path: cgroup.to_owned(),
            source,
        })
}
