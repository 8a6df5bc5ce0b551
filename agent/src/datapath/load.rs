//! Loading the object, configuring it, attaching its programs.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Map, RingBuf},
    programs::{Program, ProgramError},
};
use parking_lot::Mutex;
use sidestep_abi::{ABI_VERSION, Config};

use super::{
    Datapath, DatapathError, DatapathSettings, Link, Maps,
    bpf::{self, CgroupHook},
    cgroup::id_of_directory,
    error::{MapOperation, advice_for_attach, advice_for_load},
    events::{Ring, Rings},
    kernel_log::KernelLog,
};

/// The programs, aligned as the ELF reader wants them; empty if they were not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sidestep.bpf.o"));

/// The same with logging of every decision, which costs time on each connect even when it is off.
static LOGGING_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sidestep-log.bpf.o"));

/// A program and where it belongs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hooked {
    pub(super) program: &'static str,
    pub(super) hook: CgroupHook,
}

/// What every attach point gets. `sock_ops` first: a connect that is captured must find who hands it over.
pub(super) const WORKLOAD_PROGRAMS: [Hooked; 5] = [
    Hooked {
        program: "sidestep_flows",
        hook: CgroupHook::SockOps,
    },
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

/// What the agent's own cgroup gets, for the sockets that it accepts.
const HAND_OVER: Hooked = WORKLOAD_PROGRAMS[0];

/// What it gets beside if other proxies are to ask.
pub(super) const ORIGINAL_DST: Hooked = Hooked {
    program: "sidestep_origd",
    hook: CgroupHook::GetSockOpt,
};

pub(super) fn load(settings: &DatapathSettings) -> Result<Datapath, DatapathError> {
    let bytes = if settings.debug {
        LOGGING_OBJECT
    } else {
        OBJECT
    };
    // Room for two catalogs: the new one is written before the old one is deleted.
    let room = settings.max_vips.saturating_mul(2);
    let mut object = open(bytes, room, settings.max_flows)?;
    let log = KernelLog::take(&mut object);
    let maps = take_maps(&mut object)?;
    let ring = object
        .take_map("REFUSALS")
        .and_then(|map| RingBuf::try_from(map).ok())
        .ok_or(DatapathError::Incomplete {
            kind: "map",
            name: "REFUSALS",
        })?;
    configure(&maps, settings)?;
    let mut links = Vec::new();
    for Hooked { program, .. } in WORKLOAD_PROGRAMS {
        load_program(&mut object, program)?;
    }
    let covered = settings
        .cgroups
        .iter()
        .any(|above| settings.agent_cgroup.starts_with(above));
    if !covered {
        links.push(attach(&object, HAND_OVER, &settings.agent_cgroup)?);
    }
    if settings.so_original_dst {
        load_program(&mut object, ORIGINAL_DST.program)?;
        links.push(attach(&object, ORIGINAL_DST, &settings.agent_cgroup)?);
    }
    for cgroup in outermost(&settings.cgroups) {
        for hooked in WORKLOAD_PROGRAMS {
            links.push(attach(&object, hooked, &cgroup)?);
        }
    }
    Ok(Datapath {
        maps,
        links,
        reconciling: Mutex::new(()),
        max_vips: settings.max_vips,
        can_log: log.is_some(),
        rings: Mutex::new(Some(Rings {
            refusals: Ring(ring),
            log,
        })),
    })
}

/// Creates the maps; no program is in the kernel yet.
///
/// # Errors
/// [`DatapathError::NoObject`] or [`DatapathError::Object`].
pub fn open_object(max_vips: u32, max_flows: u32) -> Result<Ebpf, DatapathError> {
    open(OBJECT, max_vips, max_flows)
}

fn open(object: &[u8], max_vips: u32, max_flows: u32) -> Result<Ebpf, DatapathError> {
    if object.is_empty() {
        return Err(DatapathError::NoObject);
    }
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(VerifierLogLevel::STATS)
        .map_max_entries("VIPS", max_vips)
        .map_max_entries("ADDRESSES", max_vips)
        .map_max_entries("FLOWS", max_flows);
    loader.load(object).map_err(|source| DatapathError::Object {
        advice: "root or CAP_BPF is needed; `sidestep check` shows what else is missing",
        source: Box::new(source),
    })
}

/// Loads one program, with the end of the verifier's log if it is refused.
pub(super) fn load_program(object: &mut Ebpf, name: &'static str) -> Result<(), DatapathError> {
    let incomplete = DatapathError::Incomplete {
        kind: "program",
        name,
    };
    let result = match object.program_mut(name) {
        Some(Program::CgroupSockAddr(program)) => program.load(),
        Some(Program::SockOps(program)) => program.load(),
        Some(Program::CgroupSockopt(program)) => program.load(),
        _ => return Err(incomplete),
    };
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(ProgramError::LoadError {
            io_error,
            verifier_log,
        }) => Err(DatapathError::Load {
            program: name,
            advice: advice_for_load(&io_error),
            log: last_lines(&verifier_log.to_string()),
            source: io_error,
        }),
        Err(source) => Err(DatapathError::Prepare {
            program: name,
            source: Box::new(source),
        }),
    }
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    lines
        .get(lines.len().saturating_sub(12)..)
        .unwrap_or_default()
        .join("\n")
}

fn take_maps(object: &mut Ebpf) -> Result<Maps, DatapathError> {
    let take = |name| {
        object
            .map(name)
            .and_then(map_fd)
            .and_then(|fd| fd.try_clone_to_owned().ok())
            .ok_or(DatapathError::Incomplete { kind: "map", name })
    };
    Ok(Maps {
        config: take("CONFIG")?,
        vips: take("VIPS")?,
        addresses: take("ADDRESSES")?,
        listeners: take("LISTENERS")?,
        origins: take("ORIGINS")?,
        flows: take("FLOWS")?,
        counts: take("COUNTS")?,
    })
}

/// `None` for kinds of maps that the object does not have.
fn map_fd(map: &Map) -> Option<BorrowedFd<'_>> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "aya knows 30 kinds, the object has five"
    )]
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::PerCpuArray(data)
        | Map::SkStorage(data)
        | Map::SockHash(data) => Some(data.fd().as_fd()),
        _ => None,
    }
}

fn configure(maps: &Maps, settings: &DatapathSettings) -> Result<(), DatapathError> {
    let level = level_of(&settings.agent_cgroup)?;
    let config = Config {
        abi_version: ABI_VERSION,
        agent_cgroup_level: level,
        agent_cgroup: id_of_directory(&settings.agent_cgroup)?.0,
        ranges: settings.vip_ranges.into(),
        debug: u32::from(settings.debug),
        zero: 0,
    };
    bpf::map_update(maps.config.as_fd(), &0_u32, &config)
        .map_err(|source| DatapathError::map("CONFIG", MapOperation::Write, source))
}

/// How deep a cgroup is below the root of its hierarchy, which is 0.
fn level_of(cgroup: &Path) -> Result<u32, DatapathError> {
    // Only cgroups below the root have this file.
    let below_root = |directory: &Path| directory.join("cgroup.type").exists();
    let level = cgroup
        .ancestors()
        .take_while(|directory| below_root(directory))
        .count();
    match u32::try_from(level) {
        Ok(0) | Err(_) => Err(DatapathError::AgentInRootCgroup),
        Ok(level) => Ok(level),
    }
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

fn attach(object: &Ebpf, hooked: Hooked, cgroup: &Path) -> Result<Link, DatapathError> {
    let Hooked { program, hook } = hooked;
    let incomplete = || DatapathError::Incomplete {
        kind: "program",
        name: program,
    };
    let directory = open_cgroup(cgroup)?;
    let loaded = match object.program(program) {
        Some(Program::CgroupSockAddr(program)) => program.fd(),
        Some(Program::SockOps(program)) => program.fd(),
        Some(Program::CgroupSockopt(program)) => program.fd(),
        _ => return Err(incomplete()),
    };
    let loaded = loaded.map_err(|_not_loaded| incomplete())?;
    let fd = bpf::link_create(loaded.as_fd(), directory.as_fd(), hook).map_err(|source| {
        DatapathError::Attach {
            program,
            cgroup: cgroup.to_owned(),
            advice: advice_for_attach(&source),
            source,
        }
    })?;
    Ok(Link {
        program,
        target: cgroup.to_owned(),
        fd,
    })
}

pub(super) fn open_cgroup(cgroup: &Path) -> Result<OwnedFd, DatapathError> {
    let opened = std::fs::File::open(cgroup);
    opened
        .map(OwnedFd::from)
        .map_err(|source| DatapathError::Cgroup {
            path: cgroup.to_owned(),
            source,
        })
}
