//! The way between two nodes: mutual TLS as Consul's proxies speak it, one connection per connection.
//!
//! [`connect`] opens and takes tunnels, [`stream`] is one that is open, [`tls`] holds the names in the
//! handshake. Who the peer is has been verified when a tunnel is handed out; what it may do is decided by
//! the callers, [`crate::outbound`] and [`crate::inbound`].

pub mod connect;
pub mod stream;
pub mod tls;
pub mod hbone;

pub use stream::TunnelStream;

#[cfg(test)]
mod tests;
