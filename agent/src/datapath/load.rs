//! Loading the object: its maps, found again if an agent before left them, and its programs.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Map, RingBuf},
    programs::{Program, ProgramError},
};
use parking_lot::Mutex;
use sidestep_abi::{ABI_VERSION, Config, Interfaces};

use super::{
    Datapath, DatapathError, DatapathSettings, Maps,
    bpf::{self, MapShape},
    btf,
    cgroup::id_of_directory,
    error::{MapOperation, advice_for_load},
    events::{Ring, Rings},
    kernel_log::KernelLog,
    links::{ORIGINAL_DST, QUERIES, WORKLOAD_PROGRAMS},
    pins::{PinDirectory, PinError},
};
use crate::stable_hash::fnv1a;

/// The programs, aligned as the ELF reader wants them; empty if they were not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sidestep.bpf.o"));

/// The same with logging of every decision, which costs time on each connect even when it is off.
static LOGGING_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sidestep-log.bpf.o"));

/// The maps that outlive the agent. The others, for what it reads as long as it lives, go with it.
const KEPT_MAPS: [&str; 10] = [
    "CONFIG",
    "VIPS",
    "ADDRESSES",
    "FALLBACKS",
    "HEARTBEAT",
    "LISTENERS",
    "SERVERS",
    "ORIGINS",
    "FLOWS",
    "COUNTS",
];

/// File descriptors of the loaded programs, by name.
#[derive(Debug)]
pub(super) struct Programs(BTreeMap<&'static str, OwnedFd>);

impl Programs {
    pub(super) fn get(&self, name: &'static str) -> Result<BorrowedFd<'_>, DatapathError> {
        let found = self.0.get(name).map(|fd| fd.as_fd());
        found.ok_or(DatapathError::Incomplete {
            kind: "program",
            name,
        })
    }
}

pub(super) fn load(
    settings: DatapathSettings,
    pins: Option<PinDirectory>,
) -> Result<Datapath, DatapathError> {
    let bytes = if settings.debug {
        LOGGING_OBJECT
    } else {
        OBJECT
    };
    let sizes = Sizes::of(&settings);
    let kept = match &pins {
        Some(pins) => Some(maps_directory(pins, bytes, sizes)?),
        None => None,
    };
    let interfaces = settings.dns_port.map(|_port| btf::interfaces());
    let interfaces = interfaces.transpose()?.unwrap_or_default();
    let mut object = open(bytes, sizes, &interfaces, kept.as_deref())?;
    let log = KernelLog::take(&mut object);
    let maps = take_maps(&mut object)?;
    let ring = object
        .take_map("REFUSALS")
        .and_then(|map| RingBuf::try_from(map).ok())
        .ok_or(DatapathError::Incomplete {
            kind: "map",
            name: "REFUSALS",
        })?;
    let mut names: Vec<&'static str> = WORKLOAD_PROGRAMS.map(|hooked| hooked.program).into();
    if settings.so_original_dst {
        names.push(ORIGINAL_DST.program);
    }
    if settings.dns_port.is_some() {
        names.extend(QUERIES.map(|hooked| hooked.program));
    }
    let mut programs = BTreeMap::new();
    for name in names {
        programs.insert(name, load_program(&mut object, name)?);
    }
    Ok(Datapath {
        maps,
        programs: Programs(programs),
        pins,
        maps_directory: kept,
        links: Mutex::default(),
        reconciling: Mutex::new(()),
        can_log: log.is_some(),
        rings: Mutex::new(Some(Rings {
            refusals: Ring(ring),
            log,
        })),
        settings,
    })
}

/// How many elements the maps have room for.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    vips: u32,
    flows: u32,
}

impl Sizes {
    /// Room for two catalogs: the new one is written before the old one is deleted.
    fn of(settings: &DatapathSettings) -> Self {
        Self {
            vips: settings.max_vips.saturating_mul(2),
            flows: settings.max_flows,
        }
    }

    fn each(self) -> [(&'static str, u32); 3] {
        [
            ("VIPS", self.vips),
            ("ADDRESSES", self.vips),
            ("FLOWS", self.flows),
        ]
    }
}

/// Where the maps of this object are kept. Another layout has another directory; a map that is there and has
/// not the shape that its programs expect is forgotten, for they would read garbage.
fn maps_directory(
    pins: &PinDirectory,
    object: &[u8],
    sizes: Sizes,
) -> Result<PathBuf, DatapathError> {
    let shapes = kept_shapes(object, sizes)?;
    let layout = fnv1a(format!("{ABI_VERSION} {shapes:?}").as_bytes());
    let directory = pins.maps(layout)?;
    for (name, shape) in shapes {
        let path = directory.join(name);
        let Ok(map) = bpf::pinned(&path) else {
            continue;
        };
        if let Err(error) = bpf::check_map_shape(map.as_fd(), shape) {
            tracing::warn!(pin = %path.display(), %error, "pinned map not taken over: made anew");
            std::fs::remove_file(&path).map_err(|source| PinError::Io {
                doing: "remove",
                path,
                source,
            })?;
        }
    }
    Ok(directory)
}

fn kept_shapes(
    object: &[u8],
    sizes: Sizes,
) -> Result<Vec<(&'static str, MapShape)>, DatapathError> {
    let object = aya_obj::Object::parse(object).map_err(|source| DatapathError::Object {
        advice: "it was built by other tools: run `cargo xtask build-ebpf` and build again",
        source: Box::new(source.into()),
    })?;
    let shape = |name: &'static str| {
        let map = object.maps.get(name);
        let map = map.ok_or(DatapathError::Incomplete { kind: "map", name })?;
        let sized = sizes.each().into_iter().find(|(sized, _)| *sized == name);
        let shape = MapShape {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: sized.map_or(map.max_entries(), |(_, entries)| entries),
            flags: map.map_flags(),
        };
        Ok((name, shape))
    };
    KEPT_MAPS.into_iter().map(shape).collect()
}

/// Creates the maps; no program is in the kernel yet. With [`btf::interfaces`] the programs capture queries in
/// datagrams.
///
/// # Errors
/// [`DatapathError::NoObject`] or [`DatapathError::Object`].
pub fn open_object(vips: u32, flows: u32, interfaces: &Interfaces) -> Result<Ebpf, DatapathError> {
    open(OBJECT, Sizes { vips, flows }, interfaces, None)
}

/// `kept` is the directory whose maps are taken, and where those that it lacks are pinned.
fn open(
    object: &[u8],
    sizes: Sizes,
    interfaces: &Interfaces,
    kept: Option<&Path>,
) -> Result<Ebpf, DatapathError> {
    if object.is_empty() {
        return Err(DatapathError::NoObject);
    }
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(VerifierLogLevel::STATS);
    loader.override_global("INTERFACES", interfaces, true);
    for (map, entries) in sizes.each() {
        loader.map_max_entries(map, entries);
    }
    for name in KEPT_MAPS {
        if let Some(directory) = kept {
            loader.map_pin_path(name, directory.join(name));
        }
    }
    loader.load(object).map_err(|source| DatapathError::Object {
        advice: "root or CAP_BPF is needed; `sidestep check` shows what else is missing",
        source: Box::new(source),
    })
}

/// Loads one program, with the end of the verifier's log if it is refused.
pub(super) fn load_program(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<OwnedFd, DatapathError> {
    let incomplete = DatapathError::Incomplete {
        kind: "program",
        name,
    };
    let loaded = match object.program_mut(name) {
        Some(Program::CgroupSockAddr(program)) => program.load().and_then(|()| program.fd()),
        Some(Program::SockOps(program)) => program.load().and_then(|()| program.fd()),
        Some(Program::CgroupSockopt(program)) => program.load().and_then(|()| program.fd()),
        _ => return Err(incomplete),
    };
    match loaded.map(|program| program.as_fd().try_clone_to_owned()) {
        Ok(Ok(program)) => Ok(program),
        Ok(Err(source)) => Err(DatapathError::Prepare {
            program: name,
            source: Box::new(source.into()),
        }),
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
        fallbacks: take("FALLBACKS")?,
        heartbeat: take("HEARTBEAT")?,
        listeners: take("LISTENERS")?,
        servers: take("SERVERS")?,
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

pub(super) fn configure(maps: &Maps, settings: &DatapathSettings) -> Result<(), DatapathError> {
    let level = level_of(&settings.agent_cgroup)?;
    let config = Config {
        abi_version: ABI_VERSION,
        agent_cgroup_level: level,
        agent_cgroup: id_of_directory(&settings.agent_cgroup)?.0,
        ranges: settings.vip_ranges.into(),
        debug: u32::from(settings.debug),
        dns_port: settings.dns_port.map_or(0, u32::from),
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
