//! Can this host run the datapath? Asked of the kernel by doing, not by its version.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::AsFd as _,
    path::Path,
};

use sidestep_abi::Interfaces;

use super::{
    DatapathError, bpf,
    bpf::CgroupHook,
    btf,
    cgroup::Cgroup2,
    iptables::{self, Choice},
    links::{self, ORIGINAL_DST, QUERIES, WORKLOAD_PROGRAMS},
    load,
    netns::Netns,
    pins,
};
use crate::telemetry::log::chain;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was seen.
    pub detail: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it must be.
    Ok,
    /// Works, with a limitation.
    Warn,
    /// The agent cannot run.
    Fail,
}

/// What to look at.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// Whether to look at iptables in place of eBPF, and at which one.
    pub iptables: Option<Choice>,
    /// Cgroups to be attached to, below the mount; those of others' programs are looked for there.
    pub cgroups: Vec<std::path::PathBuf>,
    /// The agent's cgroup, if configured.
    pub agent_cgroup: Option<std::path::PathBuf>,
    /// Where links and maps are to be kept, if configured.
    pub pin_directory: Option<std::path::PathBuf>,
    /// Addresses that must be free.
    pub addresses: Vec<SocketAddr>,
}

/// Looks at everything. Leaves nothing behind: programs are loaded, not attached.
pub fn run(scope: &Scope) -> Vec<Finding> {
    let mut findings = Vec::new();
    match scope.iptables {
        None => {
            findings.push(kernel());
            findings.extend(programs());
        }
        Some(choice) => findings.extend(iptables::probe(choice)),
    }
    match Cgroup2::find() {
        Ok(cgroups) => {
            findings.push(ok("cgroup2", cgroups.mount().display().to_string()));
            findings.push(own_cgroup(&cgroups, scope.agent_cgroup.as_deref()));
            findings.extend(
                scope
                    .cgroups
                    .iter()
                    .flat_map(|path| attach_point(&cgroups, path)),
            );
        }
        Err(error) => findings.push(fail("cgroup2", chain(&error).to_string(), "")),
    }
    findings.extend(scope.pin_directory.as_deref().map(pin_directory));
    findings.push(netns());
    findings.extend(scope.addresses.iter().map(|address| port(*address)));
    findings
}

pub(super) fn ok(name: impl Into<String>, detail: impl Into<String>) -> Finding {
    finding(name, Status::Ok, detail, "")
}

pub(super) fn fail(name: impl Into<String>, detail: impl Into<String>, advice: &str) -> Finding {
    finding(name, Status::Fail, detail, advice)
}

fn finding(
    name: impl Into<String>,
    status: Status,
    detail: impl Into<String>,
    advice: &str,
) -> Finding {
    Finding {
        name: name.into(),
        status,
        detail: detail.into(),
        advice: advice.to_owned(),
    }
}

fn kernel() -> Finding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 1) => finding(
            "kernel",
            Status::Warn,
            release,
            "6.1 or later is what the programs are written for; whether they load is shown below",
        ),
        _ => ok("kernel", release),
    }
}

/// Loads each program: the one probe that cannot be wrong.
fn programs() -> Vec<Finding> {
    let mut object = match load::open_object(16, 16, &Interfaces::default()) {
        Ok(object) => object,
        Err(error) => return vec![fail("eBPF object", chain(&error).to_string(), "")],
    };
    let names = WORKLOAD_PROGRAMS.iter().chain([&ORIGINAL_DST]);
    let findings = names.map(|hooked| {
        let name = format!("eBPF program {}", hooked.program);
        match load::load_program(&mut object, hooked.program) {
            Ok(_program) => ok(name, "loads"),
            Err(error) if hooked.program == ORIGINAL_DST.program => finding(
                name,
                Status::Warn,
                chain(&error).to_string(),
                "capture.so_original_dst cannot be used",
            ),
            Err(error) => fail(name, chain(&error).to_string(), ""),
        }
    });
    findings.chain([queries()]).collect()
}

/// The same with what captures DNS queries.
fn queries() -> Finding {
    let load = |interfaces| {
        let mut object = load::open_object(16, 16, &interfaces)?;
        for hooked in QUERIES.iter().chain(&WORKLOAD_PROGRAMS) {
            let _program = load::load_program(&mut object, hooked.program)?;
        }
        Ok(())
    };
    let interfaces = btf::interfaces().map_err(DatapathError::from);
    match interfaces.and_then(load) {
        Ok(()) => ok("capture.dns", "its programs load"),
        Err(error) => {
            let said = chain(&error).to_string();
            finding("capture.dns", Status::Warn, said, "it cannot be used")
        }
    }
}

fn own_cgroup(cgroups: &Cgroup2, configured: Option<&Path>) -> Finding {
    if let Some(path) = configured {
        return ok(
            "agent's cgroup",
            format!("{} (agent.cgroup)", path.display()),
        );
    }
    match cgroups.own() {
        Ok(path) if path == Path::new("/") => fail(
            "agent's cgroup",
            "/",
            "start the agent in a cgroup of its own (systemd does), or set agent.cgroup",
        ),
        Ok(path) => ok("agent's cgroup", path.display().to_string()),
        Err(error) => fail("agent's cgroup", chain(&error).to_string(), ""),
    }
}

/// Programs of others here or above: they run as well, and one that is exclusive keeps ours out.
fn attach_point(cgroups: &Cgroup2, path: &Path) -> Vec<Finding> {
    let name = format!("attach point {}", path.display());
    let directory = cgroups.directory(path);
    if !directory.is_dir() {
        return vec![fail(
            name,
            "there is no such cgroup",
            "create it, or correct capture.cgroups",
        )];
    }
    let mut findings = Vec::new();
    let levels = directory
        .ancestors()
        .take_while(|level| level.starts_with(cgroups.mount()));
    for level in levels {
        let Ok(opened) = links::open_cgroup(level) else {
            continue;
        };
        for hook in &CgroupHook::ALL {
            let Ok(attached) = bpf::prog_query(opened.as_fd(), *hook, false) else {
                continue;
            };
            let is_above = level != directory;
            findings.extend(foreign(&name, level, is_above, *hook, &attached));
        }
    }
    if findings.is_empty() {
        findings.push(ok(name, "no program of others here or above"));
    }
    findings
}

fn foreign(
    name: &str,
    level: &Path,
    is_above: bool,
    hook: CgroupHook,
    attached: &bpf::Attached,
) -> Option<Finding> {
    /// `BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`
    const OVERRIDE: u32 = 1;
    const MULTI: u32 = 2;
    let names: Vec<String> = attached
        .programs
        .iter()
        .filter_map(|id| bpf::program_name(*id).ok())
        .filter(|program| !program.starts_with("sidestep_"))
        .collect();
    if names.is_empty() {
        return None;
    }
    let detail = format!("{} at {hook:?} of {}", names.join(", "), level.display());
    Some(if attached.flags & MULTI != 0 {
        let advice = "it runs beside Sidestep's, after it if it is attached above; if it rewrites \
                      the same addresses, one of them must be told to leave them";
        finding(name, Status::Warn, detail, advice)
    } else if is_above && attached.flags & OVERRIDE != 0 {
        let advice = "it lets others take its place: below the attach point Sidestep's runs, and \
                      it does not; attach it with BPF_F_ALLOW_MULTI to have both";
        finding(name, Status::Warn, detail, advice)
    } else {
        let advice =
            "it holds the hook exclusively: attach it with BPF_F_ALLOW_MULTI, or detach it";
        fail(name, detail, advice)
    })
}

fn pin_directory(path: &Path) -> Finding {
    let name = "pin directory";
    match pins::is_on_bpffs(path) {
        Ok(true) => ok(name, path.display().to_string()),
        Ok(false) if pins::can_be_mounted(path) => ok(
            name,
            format!("{}, where the agent mounts bpffs", path.display()),
        ),
        Ok(false) => fail(
            name,
            format!("{} is not on bpffs", path.display()),
            "mount one there (`mount -t bpf bpf DIRECTORY`), or set capture.pin_directory",
        ),
        Err(error) => fail(name, chain(&error).to_string(), ""),
    }
}

fn netns() -> Finding {
    match Netns::current().and_then(|netns| netns.cookie()) {
        Ok(cookie) => ok("network namespace", format!("cookie {cookie}")),
        Err(error) => fail(
            "network namespace",
            chain(&error).to_string(),
            "kernel 5.14 and CAP_SYS_ADMIN are needed",
        ),
    }
}

fn port(address: SocketAddr) -> Finding {
    let name = format!("address {address}");
    match TcpListener::bind(address) {
        Ok(_free) => ok(name, "free"),
        Err(error) => finding(
            name,
            Status::Warn,
            format!("cannot be bound: {error}"),
            "if an agent runs already, this is it; otherwise free the port or configure another",
        ),
    }
}
