//! The way between two nodes: mutual TLS, as Consul's proxies speak it or as Istio's do.
//!
//! [`connect`] opens and takes tunnels of one connection each, [`stream`] is one that is open, `session` its TLS, [`tls`]
//! holds the names in the handshake. [`hbone`] has many connections share one. Who the peer is has been verified when a
//! tunnel is handed out; what it may do is decided by the callers, [`crate::outbound`] and [`crate::inbound`].

pub mod connect;
pub mod stream;
pub mod tls;
pub mod hbone;
mod open;
mod session;

pub use open::OpenTunnel;
pub use stream::TunnelStream;

#[cfg(test)]
mod tests;
