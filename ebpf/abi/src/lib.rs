//! What the kernel programs and the agent share: the layouts of the maps and the decision at `connect()`.
//!
//! Deciding is pure, so that the very code which runs in the kernel is tested on the host:
//! [`classify`] and [`decide`] take what was looked up and say what to do. The programs in
//! `ebpf/programs` do the looking up and the doing; `agent/src/datapath` fills the maps.
//! Nothing here may depend on a kernel, a socket or an allocator.

#![cfg_attr(not(test), no_std)]
#![expect(
    clippy::inline_always,
    reason = "the verifier sees one program: a call that is not inlined is one it may not follow"
)]

pub mod address;
pub mod maps;
pub mod decision;
pub mod query;
pub mod verdict;
#[cfg(feature = "user")]
mod user;

pub use address::{Address, PortBe};
pub use decision::{Class, Facts, Found, Ranges, classify, decide, loopback_spread, may_fall_back};
pub use maps::{
    Away, Config, Fallback, FlowKey, Heartbeat, Interfaces, KnownAddress, ListenerKey, Origin,
    Refusal, Role, Server, Target, VipKey, VipValue,
};
pub use query::{DNS_PORT, QueryFacts, decide_query, may_stand_in, stand_in};
pub use verdict::{FlowEvent, Verdict};

/// Raised with every change of a layout or of its meaning; programs refuse VIPs if it differs.
pub const ABI_VERSION: u32 = 5;

/// How many slots the per-CPU counter map has: verdicts first, then flow events.
pub const COUNTERS: u32 = 64;

/// How many servers queries in datagrams may be captured on their way to, on one node.
pub const MAX_SERVERS: u32 = 16_384;

/// How many services may have a fallback: room in the map is for two sets of them, the new one is written first.
pub const MAX_FALLBACKS: u32 = 1024;

#[cfg(test)]
mod tests;
