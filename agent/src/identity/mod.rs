//! Who a process is, and how it proves it: workloads, SPIFFE ids, certificates.
//!
//! Who made a connection comes in as a [`crate::datapath::Maker`]; [`workload`] says which service
//! made it, [`spiffe`] names that service, [`certificates`] holds the certificate that proves the name
//! (issued by a [`provider`], today the built-in [`ca`]) and [`workload_tls`] is that certificate ready for
//! use by [`crate::tunnel`]. [`verify`] checks the other side. Nothing here opens a connection.

pub mod workload;
pub mod local;
pub mod spiffe;
mod suites;
pub mod certificates;
pub mod workload_tls;
mod sessions;
pub mod verify;
pub mod provider;
pub mod pem;
pub mod ca;
pub mod consul_ca;
pub mod clock;

#[cfg(test)]
pub(crate) mod testing;

pub use local::LocalDomain;
