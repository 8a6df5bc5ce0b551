//! What the rest of the agent says to the datapath and hears from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::{Ipv4Net, Ipv6Net};
use sidestep_abi::{Address, Origin, PortBe, Ranges, Target};

use crate::config::AwayPolicy;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, formatter)
            }
        }
    };
}

number! {
    /// The kernel's id of a version 2 control group: the inode number of its folder.
    CgroupId(u64)
}
number! {
    /// The kernel's id of a network namespace, never used twice (`SO_NETNS_COOKIE`).
    NetnsCookie(u64)
}
number! {
    /// A number that follows from a service's name: the same in every agent, so that one may take over what
    /// another left in the kernel.
    ServiceId(u64)
}

/// A connection as it was before capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured {
    /// Where the application wanted to go.
    pub destination: SocketAddr,
    /// Whose address that was at the time.
    pub service: ServiceId,
    /// Who called `connect()`.
    pub maker: Maker,
    /// The kernel's id of the application's socket.
    pub socket_cookie: u64,
}

/// Who made a connection, as far as the kernel knows it of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maker {
    /// Cgroup of the process.
    pub cgroup: CgroupId,
    /// Network namespace of its socket.
    pub netns: NetnsCookie,
    /// Its user id, in the initial user namespace.
    pub uid: u32,
    /// Its process id, in the initial pid namespace; 0 where the kernel does not say.
    pub process: u32,
}

impl Captured {
    /// Whether it is for a DNS server and not for a service.
    pub fn is_dns(&self) -> bool {
        self.service.0 == Target::DNS.service
    }
}

impl From<Origin> for Captured {
    fn from(origin: Origin) -> Self {
        Self {
            destination: socket_address(&origin.destination, origin.destination_port),
            service: ServiceId(origin.service),
            maker: Maker {
                cgroup: CgroupId(origin.cgroup),
                netns: NetnsCookie(origin.netns),
                uid: origin.uid,
                process: origin.process,
            },
            socket_cookie: origin.socket_cookie,
        }
    }
}

/// Whose a virtual address and port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VipTarget {
    /// The service.
    pub service: ServiceId,
    /// Whether it has an instance that may be called; if not, connects are refused in the kernel.
    pub reachable: bool,
    /// What becomes of connects while no agent takes them.
    pub away: AwayPolicy,
}

/// What the kernel is to know of virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VipTargets {
    /// Who answers at one port of an address.
    pub ports: BTreeMap<SocketAddr, VipTarget>,
    /// Who answers at every port of an address that `ports` does not have.
    pub any_port: BTreeMap<IpAddr, VipTarget>,
    /// Addresses of hosts outside the mesh, and of instances: what is not in `ports` is not ours there, and passes.
    pub real: BTreeSet<IpAddr>,
}

impl VipTargets {
    /// Who answers there: who has the port, or else every port of the address.
    pub fn at(&self, destination: SocketAddr) -> Option<VipTarget> {
        let of_any_port = || self.any_port.get(&destination.ip());
        self.ports.get(&destination).or_else(of_any_port).copied()
    }
}

/// What to load, and where to attach it.
#[derive(Debug, Clone)]
pub struct DatapathSettings {
    /// Cgroups whose processes are captured, absolute paths; one below another is covered by that.
    pub cgroups: Vec<PathBuf>,
    /// The agent's own cgroup, absolute path; what runs in or below it is not captured.
    pub agent_cgroup: PathBuf,
    /// Where virtual addresses come from; an unknown one of these is unreachable.
    pub vip_ranges: VipRanges,
    /// How many virtual addresses and ports there may be.
    pub max_vips: u32,
    /// How many connections may be between their SYN and their acceptance.
    pub max_flows: u32,
    /// Whether to answer `SO_ORIGINAL_DST` on the agent's sockets.
    pub so_original_dst: bool,
    /// Where DNS queries in datagrams go, on loopback, if queries are captured.
    pub dns_port: Option<u16>,
    /// Whether to load the programs that can log every decision, and to let them.
    pub debug: bool,
}

/// The ranges that virtual addresses are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VipRanges {
    /// For IPv4. 240.0.0.0/4 belongs to it in any case.
    pub ipv4: Ipv4Net,
    /// For IPv6.
    pub ipv6: Ipv6Net,
}

impl From<VipRanges> for Ranges {
    fn from(ranges: VipRanges) -> Self {
        let v6 = |address| Address::from_ip(IpAddr::V6(address));
        Self {
            v4_network: ranges.ipv4.network().to_bits().to_be(),
            v4_mask: ranges.ipv4.netmask().to_bits().to_be(),
            v6_network: v6(ranges.ipv6.network()),
            v6_mask: v6(ranges.ipv6.netmask()),
        }
    }
}

/// What becomes of destinations in the kernel that are not desired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undesired {
    /// They go.
    Remove,
    /// They stay as they are: the catalog was not read whole, so they may be missing there by mistake.
    Keep,
}

/// What [`super::Datapath::reconcile`] changed, in destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// New ones.
    pub added: usize,
    /// Those with another service or reachability.
    pub changed: usize,
    /// Those gone.
    pub removed: usize,
}

/// A program attached to a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The program's name in the kernel.
    pub program: &'static str,
    /// The cgroup.
    pub target: PathBuf,
    /// The kernel's id of the link.
    pub link_id: u32,
    /// The kernel's id of the program.
    pub program_id: u32,
    /// Whether the cgroup still exists; a link outlives it without effect.
    pub is_live: bool,
}

/// From the form of the maps; IPv4-mapped becomes IPv4.
pub(super) fn socket_address(address: &Address, port: PortBe) -> SocketAddr {
    SocketAddr::new(address.to_ip(), port.to_host())
}
