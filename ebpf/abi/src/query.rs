//! What happens to a DNS query, decided from what was looked up.
//!
//! A query is what goes to port 53. One that is captured goes to the agent, and one that is not goes to its server as
//! if there were no agent: nothing here refuses.
//!
//! Over TCP the destination is remembered on the socket, as that of any captured connect. A datagram has no such
//! memory: one socket may ask several servers, and the agent hears of none of them before the datagram. So it goes to
//! a loopback address that stands for its server, the same for everyone on the node.

use crate::{
    address::{Address, PortBe},
    decision::{Class, loopback_spread},
    maps::Heartbeat,
    verdict::Verdict,
};

/// Where DNS servers answer.
pub const DNS_PORT: PortBe = PortBe::from_host(53);

/// Everything that [`decide_query`] looks at.
#[derive(Debug, Clone, Copy)]
pub struct QueryFacts {
    /// Whether an agent with our ABI captures queries.
    pub enabled: bool,
    /// Whether the caller runs in the agent's cgroup or below.
    pub agent: bool,
    /// Whether it can be captured at all: see [`may_stand_in`].
    pub can_capture: bool,
    /// The port of the agent's listener in the socket's network namespace, from `LISTENERS`, or 0.
    pub listener: PortBe,
    /// From `HEARTBEAT`.
    pub heartbeat: Heartbeat,
    /// `CLOCK_MONOTONIC` in nanoseconds, for `heartbeat`.
    pub now_ns: u64,
}

/// Decides about a query. `None` if it is nobody's concern, and not even counted.
#[inline(always)]
pub const fn decide_query(facts: &QueryFacts) -> Option<Verdict> {
    if !facts.enabled || facts.agent {
        return None;
    }
    let takes = facts.listener.0 != 0 && !facts.heartbeat.is_late(facts.now_ns);
    if takes && facts.can_capture {
        Some(Verdict::QueryCaptured)
    } else {
        Some(Verdict::QueryPassed)
    }
}

/// Whether a datagram to `server`, of this class, for which the caller has picked this device (0 for none), can go to a
/// loopback address instead: IPv6 has but one of those, and by another device none is reached.
#[inline(always)]
pub const fn may_stand_in(server: &Address, class: Class, device: u32) -> bool {
    /// The index of `lo` in every network namespace.
    const LOOPBACK_DEVICE: u32 = 1;
    let Some(word) = server.v4_word() else {
        return false;
    };
    // 0.0.0.0 means this host; from 224.0.0.0 on are multicast, class E and broadcast.
    let is_unicast = word != 0 && u32::from_be(word) >> 29 != 0b111;
    is_unicast && device <= LOOPBACK_DEVICE && !matches!(class, Class::VipRange)
}

/// The loopback address that stands for a server, in network byte order: the one of this attempt, since another server
/// may have it already.
#[inline(always)]
pub const fn stand_in(server: &Address, attempt: u16) -> u32 {
    loopback_spread(server, PortBe(attempt))
}
