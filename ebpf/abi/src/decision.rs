//! What happens to a `connect()`, decided from what was looked up.

use crate::{
    address::{Address, PortBe},
    maps::{Away, Fallback, Heartbeat, KnownAddress, Target, VipValue, digest_of, mix},
    verdict::Verdict,
};

/// Where virtual addresses come from; what lies in here is never passed on to the network.
///
/// 240.0.0.0/4 belongs to it whatever is configured: nothing else answers there.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ranges {
    /// Network of the IPv4 range, network byte order.
    pub v4_network: u32,
    /// Its mask, network byte order. 0 with a network of 0 is no range.
    pub v4_mask: u32,
    /// Network of the IPv6 range.
    pub v6_network: Address,
    /// Its mask. All zeros is no range.
    pub v6_mask: Address,
}

/// What an address is before anything was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The host itself: never looked up, never captured.
    Loopback,
    /// In a virtual range: never passed.
    VipRange,
    /// Anything else; only a look-up tells whether it is a virtual address.
    Other,
}

/// What a look-up gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<T> {
    /// There is no such key.
    Absent,
    /// The value, verified.
    Value(T),
    /// The element was recycled under the reader, twice: nothing is known.
    Torn,
}

/// Everything that [`decide`] looks at.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// The destination's class.
    pub class: Class,
    /// Whether the map `CONFIG` was filled by an agent with our ABI.
    pub configured: bool,
    /// Whether the caller runs in the agent's cgroup or below.
    pub agent: bool,
    /// `VIPS` at the destination.
    pub vip: Found<VipValue>,
    /// `ADDRESSES` at the destination; need not be looked up if `vip` was found.
    pub address: Found<KnownAddress>,
    /// The port of the agent's listener in the socket's network namespace, from `LISTENERS`, or 0; need not
    /// be looked up if there is no [`Self::target`].
    pub listener: PortBe,
    /// From `HEARTBEAT`; need not be looked up if there is no `listener`.
    pub heartbeat: Heartbeat,
    /// `CLOCK_MONOTONIC` in nanoseconds, for `heartbeat`.
    pub now_ns: u64,
}

impl Facts {
    /// Which service answers at the destination: that of its port, else that of every port of its address.
    #[inline(always)]
    pub const fn target(&self) -> Option<Target> {
        match (&self.vip, &self.address) {
            (Found::Value(vip), _) => Some(vip.target),
            (Found::Absent, Found::Value(known)) if known.any_port != 0 => Some(known.target),
            _ => None,
        }
    }

    /// Why no agent takes a connect from here: none listens in the namespace, or the one that does is hung.
    #[inline(always)]
    pub const fn away(&self) -> Option<Verdict> {
        if self.listener.0 == 0 {
            Some(Verdict::RefusedNetns)
        } else if self.heartbeat.is_late(self.now_ns) {
            Some(Verdict::RefusedHung)
        } else {
            None
        }
    }
}

/// Classifies a destination.
#[inline(always)]
pub const fn classify(address: &Address, ranges: &Ranges) -> Class {
    if address.is_loopback() {
        return Class::Loopback;
    }
    let in_range = match address.v4_word() {
        Some(word) => in_v4_range(word, ranges),
        None => in_v6_range(address, ranges),
    };
    if in_range {
        Class::VipRange
    } else {
        Class::Other
    }
}

#[inline(always)]
const fn in_v4_range(word: u32, ranges: &Ranges) -> bool {
    // The broadcast address lies in 240/4 and belongs to the kernel.
    if word == u32::MAX {
        return false;
    }
    let class_e = u32::from_be(word) >> 28 == 0xf;
    class_e || (ranges.v4_mask != 0 && word & ranges.v4_mask == ranges.v4_network)
}

#[inline(always)]
const fn in_v6_range(address: &Address, ranges: &Ranges) -> bool {
    let [first, second, third, fourth] = address.words;
    let [mask1, mask2, mask3, mask4] = ranges.v6_mask.words;
    let [network1, network2, network3, network4] = ranges.v6_network.words;
    mask1 != 0
        && first & mask1 == network1
        && second & mask2 == network2
        && third & mask3 == network3
        && fourth & mask4 == network4
}

/// Decides about a TCP connect. Other protocols pass before this is asked.
///
/// [`Verdict::Captured`] and [`Verdict::Fallback`] come only with a [`Facts::target`], the first with a `listener`, the
/// second with a reason in [`Facts::away`], which is the verdict if [`may_fall_back`] says no.
#[inline(always)]
pub const fn decide(facts: &Facts) -> Verdict {
    let in_range = match facts.class {
        Class::Loopback => return Verdict::PassedLoopback,
        Class::VipRange => true,
        Class::Other => false,
    };
    if !facts.configured {
        return if in_range {
            Verdict::RefusedUnconfigured
        } else {
            Verdict::PassedOther
        };
    }
    match (&facts.vip, &facts.address) {
        (Found::Torn, _) | (Found::Absent, Found::Torn) => return Verdict::RefusedTorn,
        (Found::Absent, Found::Absent) if !in_range => return Verdict::PassedOther,
        _ => {}
    }
    if facts.agent {
        // The agent has no business with a virtual address: it would call itself.
        return if in_range {
            Verdict::RefusedAgent
        } else {
            Verdict::PassedAgent
        };
    }
    let Some(target) = facts.target() else {
        return match facts.address {
            Found::Value(_) => Verdict::RefusedUnknownPort,
            Found::Absent | Found::Torn => Verdict::RefusedUnknownVip,
        };
    };
    match (facts.away(), target.away) {
        // Whatever the map says: nothing but the mesh answers at an address of a virtual range.
        (Some(_), Away::OPEN) if !in_range => Verdict::PassedOpen,
        (Some(_), Away::FALLBACK) => Verdict::Fallback,
        (Some(refusal), _) => refusal,
        // The agent is there, and what it knows of the service is no excuse to go around it.
        (None, _) if target.reachable == 0 => Verdict::RefusedNoEndpoint,
        (None, _) => Verdict::Captured,
    }
}

/// Whether a connect to `destination` may go to a fallback: not one of a virtual range, and an IPv4 socket can only
/// go to an IPv4 address.
#[inline(always)]
pub const fn may_fall_back(destination: &Address, to: &Fallback, ranges: &Ranges) -> bool {
    let fits = to.endpoint.v4_word().is_some() || destination.v4_word().is_none();
    fits && to.port.0 != 0 && !matches!(classify(&to.endpoint, ranges), Class::VipRange)
}

/// The loopback address that stands for an IPv4 destination: 127.a.b.c with a and c in 1..=254,
/// in network byte order.
///
/// Different destinations get different addresses, so that one source is not held to a single range
/// of ephemeral ports towards all services together. 127.0.0.0/16, where programs listen, stays free.
#[inline(always)]
pub const fn loopback_spread(destination: &Address, port: PortBe) -> u32 {
    let hash = mix(digest_of(destination), port.0 as u64);
    let a = 1 + ((hash >> 40) & 0xffff) * 254 / 0x1_0000;
    let b = (hash >> 32) & 0xff;
    let c = 1 + ((hash >> 16) & 0xffff) * 254 / 0x1_0000;
    #[expect(clippy::cast_possible_truncation, reason = "every part is below 256")]
    let word = ((127 << 24) | (a << 16) | (b << 8) | c) as u32;
    word.to_be()
}
