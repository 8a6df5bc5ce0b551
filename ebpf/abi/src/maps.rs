//! Keys and values of the maps. `repr(C)`, fixed width, padding explicit and zero.
//!
//! An element of a kernel hash may be recycled for another key while a program reads it. Every value
//! of a hash therefore carries a check over its key and its content: programs copy the value to the
//! stack, verify, and look up once more if that fails.

use crate::address::{Address, PortBe};

/// Key of the map `VIPS`: a virtual address and a port.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VipKey {
    /// The virtual address.
    pub address: Address,
    /// The port.
    pub port: PortBe,
    /// Zero.
    pub zero: u16,
}

impl VipKey {
    /// The key for one destination.
    #[inline(always)]
    pub const fn new(address: Address, port: PortBe) -> Self {
        Self {
            address,
            port,
            zero: 0,
        }
    }

    #[inline(always)]
    const fn digest(&self) -> u64 {
        mix(digest_of(&self.address), self.port.0 as u64)
    }
}

/// What becomes of a connect to a service while no agent takes it.
///
/// Not an enum: it is read from memory which a program may find torn. What is none of these is closed.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Away(pub u32);

impl Away {
    /// It is refused.
    pub const CLOSED: Self = Self(0);
    /// It goes to its destination as if there were no mesh. Never for an address of a virtual range.
    pub const OPEN: Self = Self(1);
    /// It goes to the service's endpoint in the map `FALLBACKS`.
    pub const FALLBACK: Self = Self(2);
}

/// Which service answers at a virtual address. Part of the values of `VIPS` and `ADDRESSES`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Target {
    /// The service, by a number that follows from its name.
    pub service: u64,
    /// 1 if the service has an instance that may be called, 0 if not.
    pub reachable: u32,
    /// What becomes of connects while no agent takes them.
    pub away: Away,
}

impl Target {
    /// What DNS queries over TCP are captured for: no service, its number follows from no name.
    pub const DNS: Self = Self {
        service: u64::MAX - 1,
        reachable: 1,
        away: Away::OPEN,
    };

    /// The service with this number.
    #[inline(always)]
    pub const fn new(service: u64, reachable: bool, away: Away) -> Self {
        Self {
            service,
            reachable: reachable as u32,
            away,
        }
    }

    /// Seals the content, beginning from what seals the key.
    #[inline(always)]
    const fn seal(&self, state: u64) -> u64 {
        let rest = ((self.away.0 as u64) << 32) | self.reachable as u64;
        mix(mix(state, self.service), rest)
    }
}

/// Value of the map `VIPS`: whose address and port it is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VipValue {
    /// Which service answers.
    pub target: Target,
    /// Seals key and content.
    pub check: u64,
}

impl VipValue {
    /// A value sealed for `key`.
    #[inline(always)]
    pub const fn new(key: &VipKey, target: Target) -> Self {
        Self {
            target,
            check: target.seal(key.digest()),
        }
    }

    /// Whether this value was written for `key` and is whole.
    #[inline(always)]
    pub const fn is_for(&self, key: &VipKey) -> bool {
        self.check == self.target.seal(key.digest())
    }
}

/// Value of the map `ADDRESSES`: the address belongs to the mesh, on whatever port. Looked up only where `VIPS` has
/// no entry for address and port: an exact entry wins.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KnownAddress {
    /// Which service answers at every port; zeros if none does.
    pub target: Target,
    /// 1 if `target` answers at every port, 0 if only the ports in `VIPS` answer.
    pub any_port: u32,
    /// Zero.
    pub zero: u32,
    /// Seals key and content.
    pub check: u64,
}

impl KnownAddress {
    /// A value sealed for `address`, of which only the ports in `VIPS` answer.
    #[inline(always)]
    pub const fn listed_ports(address: &Address) -> Self {
        Self::sealed(address, Target::new(0, false, Away::CLOSED), 0)
    }

    /// A value sealed for `address`, of which every port answers.
    #[inline(always)]
    pub const fn any_port(address: &Address, target: Target) -> Self {
        Self::sealed(address, target, 1)
    }

    #[inline(always)]
    const fn sealed(address: &Address, target: Target, any_port: u32) -> Self {
        Self {
            target,
            any_port,
            zero: 0,
            check: Self::seal(address, &target, any_port),
        }
    }

    /// Whether this value was written for `address` and is whole.
    #[inline(always)]
    pub const fn is_for(&self, address: &Address) -> bool {
        self.check == Self::seal(address, &self.target, self.any_port)
    }

    #[inline(always)]
    const fn seal(address: &Address, target: &Target, any_port: u32) -> u64 {
        target.seal(mix(digest_of(address), any_port as u64))
    }
}

/// Value of the map `FALLBACKS`, whose keys are numbers of services: where connects go while no agent takes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fallback {
    /// The endpoint's address.
    pub endpoint: Address,
    /// Its port.
    pub port: PortBe,
    /// Zero.
    pub zero: [u16; 3],
    /// Seals key and content.
    pub check: u64,
}

impl Fallback {
    /// A value sealed for the service with this number.
    #[inline(always)]
    pub const fn new(service: u64, endpoint: Address, port: PortBe) -> Self {
        Self {
            endpoint,
            port,
            zero: [0; 3],
            check: Self::seal(service, &endpoint, port),
        }
    }

    /// Whether this value was written for this service and is whole.
    #[inline(always)]
    pub const fn is_for(&self, service: u64) -> bool {
        self.check == Self::seal(service, &self.endpoint, self.port)
    }

    #[inline(always)]
    const fn seal(service: u64, endpoint: &Address, port: PortBe) -> u64 {
        mix(mix(digest_of(endpoint), service), port.0 as u64)
    }
}

/// The only value of the map `HEARTBEAT`: when the agent last showed that it runs.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Heartbeat {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 if it never did or has stopped.
    pub beat_ns: u64,
    /// How old that may be before the agent counts as hung; 0 if it never does.
    pub hung_after_ns: u64,
}

impl Heartbeat {
    /// Whether the agent counts as hung at `now_ns`, of the same clock.
    #[inline(always)]
    pub const fn is_late(&self, now_ns: u64) -> bool {
        // A beat of another processor may be younger than `now_ns`.
        self.hung_after_ns != 0
            && now_ns > self.beat_ns
            && now_ns - self.beat_ns > self.hung_after_ns
    }
}

/// Key of the map `LISTENERS`, whose values are sockets: in which network namespace, for which family and protocol.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ListenerKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// 4 or 6.
    pub family: u32,
    /// [`TCP`] for connects, [`UDP`] for queries in datagrams.
    pub protocol: u32,
}

/// `IPPROTO_TCP`
pub const TCP: u32 = 6;

/// `IPPROTO_UDP`
pub const UDP: u32 = 17;

impl ListenerKey {
    /// Where queries in datagrams go in the namespace with this cookie.
    #[inline(always)]
    pub const fn datagrams(netns: u64) -> Self {
        Self {
            netns,
            family: 4,
            protocol: UDP,
        }
    }

    /// The listener for connects to `destination` in the namespace with this cookie.
    #[inline(always)]
    pub const fn new(netns: u64, destination: &Address) -> Self {
        let family = if destination.v4_word().is_some() {
            4
        } else {
            6
        };
        Self {
            netns,
            family,
            protocol: TCP,
        }
    }
}

/// Value of the map `SERVERS`, whose keys are words of loopback addresses: the DNS server that one stands for.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Server {
    /// Its address.
    pub address: Address,
    /// Its port.
    pub port: PortBe,
    /// Zero.
    pub zero: u16,
    /// 1 if nobody is sent there any more, and the agent is about to take the address away from it; else 0.
    pub retired: u32,
    /// `CLOCK_MONOTONIC` in nanoseconds when somebody was last sent there, not to the minute, or when it was retired.
    /// Programs write it in place, so it is not sealed: in an element that was recycled meanwhile, another server
    /// seems younger.
    pub used_ns: u64,
    /// Seals key and content.
    pub check: u64,
}

impl Server {
    /// How old [`Self::used_ns`] may become before it is written again.
    pub const STAMPED_EVERY_NS: u64 = 60_000_000_000;

    /// A server at `address` and `port`, sealed for the loopback address with this word.
    #[inline(always)]
    pub const fn new(stand_in: u32, address: Address, port: PortBe, used_ns: u64) -> Self {
        Self {
            address,
            port,
            zero: 0,
            retired: 0,
            used_ns,
            check: Self::seal(stand_in, &address, port, 0),
        }
    }

    /// The same, retired or not, from `now_ns` on.
    #[must_use]
    pub const fn with_retired(self, stand_in: u32, retired: bool, now_ns: u64) -> Self {
        let retired = retired as u32;
        Self {
            retired,
            used_ns: now_ns,
            check: Self::seal(stand_in, &self.address, self.port, retired),
            ..self
        }
    }

    /// Whether this value was written for the loopback address with this word, and is whole.
    #[inline(always)]
    pub const fn is_for(&self, stand_in: u32) -> bool {
        self.check == Self::seal(stand_in, &self.address, self.port, self.retired)
    }

    /// Whether it is at `address` and `port`.
    #[inline(always)]
    pub const fn is_at(&self, address: &Address, port: PortBe) -> bool {
        let [first, second, third, fourth] = self.address.words;
        let [first_, second_, third_, fourth_] = address.words;
        first == first_
            && second == second_
            && third == third_
            && fourth == fourth_
            && self.port.0 == port.0
    }

    #[inline(always)]
    const fn seal(stand_in: u32, address: &Address, port: PortBe, retired: u32) -> u64 {
        let rest = ((port.0 as u64) << 32) | retired as u64;
        mix(mix(digest_of(address), stand_in as u64), rest)
    }
}

/// Key of the map `FLOWS`: a connection as both of its ends know it before it exists.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The connecting side's address.
    pub source: Address,
    /// The listener's address.
    pub destination: Address,
    /// The connecting side's port, host byte order.
    pub source_port: u16,
    /// The listener's port, host byte order.
    pub destination_port: u16,
    /// Zero.
    pub zero: u32,
}

impl FlowKey {
    /// Seals an [`Origin`] that is published under this key.
    #[inline(always)]
    pub const fn digest(&self) -> u64 {
        let ports = ((self.source_port as u64) << 16) | self.destination_port as u64;
        let address = mix(digest_of(&self.source), digest_of(&self.destination));
        mix(mix(address, self.netns), ports)
    }
}

/// Which end of a captured connection a socket is.
///
/// Not an enum: it is read from memory which a program may find torn.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Role(pub u16);

impl Role {
    /// The application's socket.
    pub const CLIENT: Self = Self(1);
    /// The agent's socket.
    pub const ACCEPTED: Self = Self(2);
    /// The application's socket, connected to the service's fallback. No agent knows of it.
    pub const FALLBACK: Self = Self(3);
}

/// Set in [`Origin::flags`] if we switched the socket's state callback on, so that we switch it off.
pub const STATE_CALLBACK_ARMED: u16 = 1;

/// Value of the map `ORIGINS` (socket storage, both ends) and of `FLOWS`: what was sent elsewhere and whose it is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origin {
    /// Where the application wanted to go.
    pub destination: Address,
    /// Where it was sent instead.
    pub rewritten: Address,
    /// The port the application named.
    pub destination_port: PortBe,
    /// The listener's port.
    pub rewritten_port: PortBe,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// The service, by a number that follows from its name.
    pub service: u64,
    /// Cgroup of the process that called `connect()`.
    pub cgroup: u64,
    /// Cookie of the socket's network namespace.
    pub netns: u64,
    /// Cookie of the application's socket.
    pub socket_cookie: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds when this was written or published.
    pub stamped_ns: u64,
    /// In `FLOWS`: seals the key. Else 0.
    pub check: u64,
    /// Process id in the initial pid namespace.
    pub process: u32,
    /// Interface the application bound the socket to, if it had to be taken off it; else 0.
    pub bound_device: u32,
    /// Which end this is.
    pub role: Role,
    /// [`STATE_CALLBACK_ARMED`].
    pub flags: u16,
    /// Zero.
    pub zero: u32,
}

/// The only value of the map `CONFIG`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// [`crate::ABI_VERSION`]; 0 until the agent has written the rest.
    pub abi_version: u32,
    /// Depth of the agent's cgroup below the root, which is 0.
    pub agent_cgroup_level: u32,
    /// Id of the agent's cgroup; what runs in or below it is not captured.
    pub agent_cgroup: u64,
    /// Where virtual addresses come from.
    pub ranges: crate::Ranges,
    /// 1 to log every decision; only objects built with the feature `log` do.
    pub debug: u32,
    /// The agent's port for queries in datagrams, host byte order; 0 if queries are not captured.
    pub dns_port: u32,
}

/// Where the running kernel keeps, in its own structures, which interface a datagram is to leave by: no helper tells.
/// Constants of the programs, which the agent sets as it loads them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interfaces {
    /// `IP_UNICAST_IF` in a socket: `uc_index` of `struct inet_sock`. 0 if queries in datagrams are not captured.
    pub socket: u32,
    /// What is known of the datagram, in a program's context: `t_ctx` of `struct bpf_sock_addr_kern`, which points to
    /// the `addr` of a `struct ipcm_cookie`.
    pub context: u32,
    /// The interface, from there: `oif` of that structure. What the socket is bound to, or what came with the datagram
    /// (`IP_PKTINFO`).
    pub message: u32,
}

/// A record of the ring buffer `REFUSALS`: a connect that was refused.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Refusal {
    /// Where the application wanted to go.
    pub destination: Address,
    /// The port it named.
    pub destination_port: PortBe,
    /// Zero.
    pub zero: u16,
    /// Slot of the [`crate::Verdict`].
    pub verdict: u32,
    /// Cgroup of the process.
    pub cgroup: u64,
    /// Cookie of the socket's network namespace.
    pub netns: u64,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// Process id in the initial pid namespace.
    pub process: u32,
    /// The task's name, padded with zeros.
    pub command: [u8; 16],
}

const SEED: u64 = 0x51de_57e9_c0de_0001;

/// One step of a multiplicative hash; spreads and detects mix-ups, resists no adversary.
#[inline(always)]
pub(crate) const fn mix(state: u64, word: u64) -> u64 {
    let product = (state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 29)
}

/// A digest of an address. Never 0 in practice, so that zeroed memory does not pass as a value.
#[inline(always)]
pub(crate) const fn digest_of(address: &Address) -> u64 {
    let [first, second, third, fourth] = address.words;
    let upper = mix(SEED, ((first as u64) << 32) | second as u64);
    mix(upper, ((third as u64) << 32) | fourth as u64)
}

/// Fails the build if a layout differs from what the other side may have been built with.
macro_rules! assert_layout {
    ($($type:ty: $size:literal, $align:literal;)*) => {
        $(const _: () = assert!(size_of::<$type>() == $size && align_of::<$type>() == $align);)*
    };
}

assert_layout! {
    Address: 16, 4;
    VipKey: 20, 4;
    VipValue: 24, 8;
    Target: 16, 8;
    KnownAddress: 32, 8;
    Fallback: 32, 8;
    Heartbeat: 16, 8;
    ListenerKey: 16, 8;
    Server: 40, 8;
    FlowKey: 48, 8;
    Origin: 104, 8;
    crate::Ranges: 40, 4;
    Config: 64, 8;
    Interfaces: 12, 4;
    Refusal: 64, 8;
}
