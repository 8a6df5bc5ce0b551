//! The local HTTP API: what `sidestep status` and its friends ask the running agent.
//!
//! It listens on a Unix socket that only root and its group reach; there is no other authentication.
//! [`status`] is what it says, [`server`] says it, [`client`] asks.

pub mod status;
pub mod server;
pub mod client;

pub use server::{AdminError, AdminServer, Existing, StatusSource};
