//! Workloads found by themselves: the cgroup that listens where a service is registered is that service. Pure.
//!
//! Weaker than every `[[workload]]` rule. Whoever may register a service with the node's Consul agent and bind its port
//! decides an identity by it; `docs/workloads.md` says what follows from that. What is not clear is refused, never
//! guessed: see [`Refusal`].

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use super::{CgroupPaths, rules::normal};
use crate::{
    catalog::model::{InstanceId, ServiceName},
    datapath::CgroupId,
    sock_diag::SocketOwner,
};

/// A service instance that should listen on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegisteredService {
    /// Its id, unique on the node.
    pub instance: InstanceId,
    /// Its service.
    pub service: ServiceName,
    /// Where it is registered: its own address or the node's, and its port.
    pub address: SocketAddr,
}

/// Where an instance listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// What to dial on this node to reach it.
    pub local: SocketAddr,
    /// Whose sockets these are; several if they share the port (`SO_REUSEPORT`).
    pub cgroups: BTreeSet<CgroupId>,
}

/// Finds the sockets of `services` among those that listen in the host's network namespace.
///
/// As the kernel chooses: a socket at the address itself, else one at every address. Where nothing is at the registered
/// address, loopback counts: what a sidecar serves often listens there only.
pub fn locate(
    services: &[RegisteredService],
    listeners: &[(SocketAddr, SocketOwner)],
) -> BTreeMap<InstanceId, Located> {
    let mut by_address: BTreeMap<SocketAddr, BTreeSet<CgroupId>> = BTreeMap::new();
    for (address, owner) in listeners {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        by_address.entry(address).or_default().insert(owner.cgroup);
    }
    let at = |dialled: SocketAddr| {
        let ip = dialled.ip().to_canonical();
        let any_v4 = ip.is_ipv4().then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let bound = [Some(ip), any_v4, Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED))];
        let mut bound = bound.into_iter().flatten();
        let cgroups = bound.find_map(|ip| by_address.get(&SocketAddr::new(ip, dialled.port())))?;
        Some(Located {
            local: SocketAddr::new(ip, dialled.port()),
            cgroups: cgroups.clone(),
        })
    };
    let located = services.iter().filter_map(|registered| {
        let port = registered.address.port();
        let loopback = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
        ];
        let found = at(registered.address).or_else(|| loopback.into_iter().find_map(at))?;
        Some((registered.instance.clone(), found))
    });
    located.collect()
}

/// Which cgroups belong to nobody, whoever listens in them. Paths below the mount of cgroup2.
#[derive(Debug, Clone)]
pub struct Bounds {
    attach_points: Vec<PathBuf>,
    agent: PathBuf,
    init: Option<PathBuf>,
}

impl Bounds {
    /// Workloads are strictly below one of `attach_points` (`capture.cgroups`), and neither in the cgroup of the
    /// `agent` nor in that of the first process (`init`), which makes the sockets of socket units before it starts a
    /// service.
    pub fn new(attach_points: &[PathBuf], agent: &Path, init: Option<&Path>) -> Self {
        Self {
            attach_points: attach_points.iter().map(|path| normal(path)).collect(),
            agent: normal(agent),
            init: init.map(normal),
        }
    }
}

/// One cgroup that was found to be a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Its path below the mount of cgroup2.
    pub path: PathBuf,
    /// What it and the cgroups below it are.
    pub service: ServiceName,
}

/// Services by the cgroups that were found for them.
pub type Assignments = BTreeMap<CgroupId, Assignment>;

/// A cgroup that is not taken for a service although one listens in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// Two services in one cgroup: neither user nor kernel tells them apart.
    #[error(
        "{} listens for several services ({}): give each a cgroup of its own, or write a [[workload]] rule",
        path.display(), names(services)
    )]
    SeveralServices {
        /// The cgroup.
        path: PathBuf,
        /// The services that listen in it.
        services: BTreeSet<ServiceName>,
    },
    /// The cgroup is not strictly below an attach point, or one is below it: it may hold what is of nobody.
    #[error(
        "{service} listens in {}, which is not below one of capture.cgroups, or holds one: give it a cgroup of its own there",
        path.display()
    )]
    Outside {
        /// The cgroup.
        path: PathBuf,
        /// The service that listens in it.
        service: ServiceName,
    },
    /// The cgroup is a slice of systemd's, below which are units of their own.
    #[error(
        "{service} listens in {}, a slice: give it a unit of its own, or write a [[workload]] rule",
        path.display()
    )]
    Slice {
        /// The cgroup.
        path: PathBuf,
        /// The service that listens in it.
        service: ServiceName,
    },
    /// The agent's own cgroup, or one above it.
    #[error("{service} listens in {}, where the agent itself runs", path.display())]
    Agent {
        /// The cgroup.
        path: PathBuf,
        /// The service that listens in it.
        service: ServiceName,
    },
    /// The first process listens for the service until it is started, so the socket does not tell the service's cgroup.
    #[error(
        "the socket of {service} was made by the first process in {}, as for a socket unit: write a [[workload]] rule",
        path.display()
    )]
    Init {
        /// The cgroup.
        path: PathBuf,
        /// The service that listens in it.
        service: ServiceName,
    },
    /// The cgroup is outside what the agent sees.
    #[error("{service} listens in cgroup {cgroup}, which this agent cannot see")]
    NotVisible {
        /// The cgroup.
        cgroup: CgroupId,
        /// The service that listens in it.
        service: ServiceName,
    },
}

impl Refusal {
    /// The services that are not told by it.
    pub fn services(&self) -> Vec<&ServiceName> {
        match self {
            Self::SeveralServices { services, .. } => services.iter().collect(),
            Self::Outside { service, .. }
            | Self::Slice { service, .. }
            | Self::Agent { service, .. }
            | Self::Init { service, .. }
            | Self::NotVisible { service, .. } => vec![service],
        }
    }
}

fn names(services: &BTreeSet<ServiceName>) -> String {
    let names: Vec<_> = services.iter().map(ServiceName::as_str).collect();
    names.join(", ")
}

/// Says which cgroups are which services, from where `services` were found to listen and what held `before`.
///
/// A cgroup whose service stopped listening keeps it while the cgroup lives, the service is registered and no other one
/// is found in it: a process that drains closes its listener first.
pub fn assign(
    services: &[RegisteredService],
    located: &BTreeMap<InstanceId, Located>,
    cgroups: &dyn CgroupPaths,
    bounds: &Bounds,
    before: &Assignments,
) -> (Assignments, BTreeSet<Refusal>) {
    let mut found: BTreeMap<CgroupId, BTreeSet<ServiceName>> = BTreeMap::new();
    for registered in services {
        let here = located.get(&registered.instance);
        for cgroup in here.into_iter().flat_map(|here| &here.cgroups) {
            let services = found.entry(*cgroup).or_default();
            services.insert(registered.service.clone());
        }
    }
    let registered: BTreeSet<_> = services.iter().map(|s| &s.service).collect();
    let mut assigned = Assignments::new();
    for (cgroup, held) in before {
        let lives = || cgroups.path_of(*cgroup).is_some_and(|p| p == held.path);
        if !found.contains_key(cgroup) && registered.contains(&held.service) && lives() {
            assigned.insert(*cgroup, held.clone());
        }
    }
    let mut refused = BTreeSet::new();
    for (cgroup, services) in found {
        match claim(cgroup, services, cgroups, bounds) {
            Ok(assignment) => {
                assigned.insert(cgroup, assignment);
            }
            Err(refusals) => refused.extend(refusals),
        }
    }
    (assigned, refused)
}

fn claim(
    cgroup: CgroupId,
    services: BTreeSet<ServiceName>,
    cgroups: &dyn CgroupPaths,
    bounds: &Bounds,
) -> Result<Assignment, Vec<Refusal>> {
    let Some(path) = cgroups.path_of(cgroup) else {
        let of = |service| Refusal::NotVisible { cgroup, service };
        return Err(services.into_iter().map(of).collect());
    };
    let each = |refusal: fn(PathBuf, ServiceName) -> Refusal| {
        let of = |service: &ServiceName| refusal(path.clone(), service.clone());
        services.iter().map(of).collect()
    };
    if bounds.agent.starts_with(&path) {
        return Err(each(|path, service| Refusal::Agent { path, service }));
    }
    if bounds.init.as_ref() == Some(&path) {
        return Err(each(|path, service| Refusal::Init { path, service }));
    }
    // Above an attach point everything below it would belong to the one service.
    let is_below = |attach: &PathBuf| path != *attach && path.starts_with(attach);
    let holds_one = bounds.attach_points.iter().any(|a| a.starts_with(&path));
    if holds_one || !bounds.attach_points.iter().any(is_below) {
        return Err(each(|path, service| Refusal::Outside { path, service }));
    }
    if path.extension() == Some(OsStr::new("slice")) {
        return Err(each(|path, service| Refusal::Slice { path, service }));
    }
    let mut names = services.iter();
    match (names.next().cloned(), names.next()) {
        (Some(service), None) => Ok(Assignment { path, service }),
        _several => Err(vec![Refusal::SeveralServices { path, services }]),
    }
}

/// [`Assignments`] by path, for looking up a cgroup or one below it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Discovered {
    by_path: BTreeMap<PathBuf, (CgroupId, ServiceName)>,
}

impl Discovered {
    pub(super) fn new(assignments: &Assignments) -> Self {
        let by_path = assignments.iter().map(|(cgroup, assignment)| {
            let of = (*cgroup, assignment.service.clone());
            (assignment.path.clone(), of)
        });
        Self {
            by_path: by_path.collect(),
        }
    }

    /// The service of the nearest cgroup at or above `cgroup`, whose path is `path`.
    ///
    /// A cgroup that was removed and made anew under its name is another one and no service's until it is found.
    pub(super) fn service_of(
        &self,
        cgroup: CgroupId,
        path: &Path,
        cgroups: &dyn CgroupPaths,
    ) -> Option<&ServiceName> {
        let (ancestor, (found, service)) = path
            .ancestors()
            .find_map(|ancestor| self.by_path.get_key_value(ancestor))?;
        let is_it = *found == cgroup || cgroups.path_of(*found).as_ref() == Some(ancestor);
        is_it.then_some(service)
    }
}

#[cfg(test)]
mod tests;
