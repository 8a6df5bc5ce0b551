//! The tunnel `hbone`: application connections as streams of HTTP/2 connections over mutual TLS 1.3.
//!
//! What Istio calls HBONE: `CONNECT`, the instance's address as the authority, and nothing else that a peer must
//! understand. [`Pool`] keeps a few connections per pair of services and node and opens streams on them, [`server`]
//! takes them; [`stream`] is what both hand to the relay. Handshakes are those of [`super::connect`], with `h2`
//! asked for.

mod link;
pub mod stream;
mod connection;
mod client;
pub mod server;
mod load;
pub mod pool;

pub use pool::{Call, Pool, PoolLimits};
pub use stream::HboneStream;

/// The port of HBONE, unless configured otherwise. Source: Istio.
pub const PORT: u16 = 15_008;

#[cfg(test)]
mod tests;
