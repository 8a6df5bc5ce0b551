//! The tunnel `hbone`: application connections as streams of HTTP/2 connections over mutual TLS 1.3.
//!
//! What Istio calls HBONE: `CONNECT`, the instance's address as the authority, and nothing else that a peer must
//! understand. [`Pool`] keeps a few connections per pair of services and node and opens streams on them, [`server`]
//! takes them; [`stream`] is what both hand to the relay. Handshakes are those of [`super::connect`], with `h2`
//! asked for.

use std::net::SocketAddr;

use crate::catalog::model::Instance;

mod link;
pub mod stream;
mod turns;
mod connection;
mod client;
pub mod server;
mod load;
pub mod pool;

pub use pool::{Call, Pool, PoolLimits};
pub use stream::HboneStream;

/// The port of HBONE, unless configured otherwise. Source: Istio.
pub const PORT: u16 = 15_008;

/// Where an instance's node takes this tunnel, if the instance is reached by it: `meta` says
/// `sidestep-tunnel: hbone`, and `sidestep-hbone-port` where that is not `port`. One that stands in for another
/// service or datacenter is not: the way there may be a gateway, which reads server names.
pub fn address_of(instance: &Instance, port: u16) -> Option<SocketAddr> {
    let meta = |key| instance.meta.get(key).map(String::as_str);
    if meta("sidestep-tunnel") != Some("hbone") || instance.target.is_some() {
        return None;
    }
    let declared = meta("sidestep-hbone-port").and_then(|port| port.parse().ok());
    Some(SocketAddr::new(
        instance.tunnel.ip(),
        declared.unwrap_or(port),
    ))
}

#[cfg(test)]
mod tests;
