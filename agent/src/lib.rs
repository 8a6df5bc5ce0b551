//! Sidestep's agent: everything that runs in user space on a node.
//!
//! A connection passes the modules in this order: [`datapath`] captures it, [`outbound`] finds out who
//! calls what, decides, picks an instance and opens a [`tunnel`]; on the other node [`inbound`] verifies,
//! decides again and delivers. [`node`] builds the parts and runs them. `ARCHITECTURE.md` has the map.

pub mod node;
pub mod outbound;
pub mod inbound;
pub mod tunnel;
pub mod relay;
pub mod connections;
pub mod identity;
pub mod policy;
pub mod catalog;
pub mod consul;
pub mod dns;
pub mod datapath;
pub mod config;
pub mod telemetry;
pub mod admin;
pub mod accept;
pub mod sockets;
pub mod netlink;
pub mod sock_diag;
mod state_file;
pub mod socket_file;
pub mod handover;
pub mod health;
pub mod lifecycle;
pub mod workers;
pub mod privileges;
pub mod stable_hash;
mod whole_number;
pub mod cli;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
