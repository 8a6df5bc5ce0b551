//! `sidestep probe`: a process of the agent's own, see [`crate::health`].

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Args;

use super::output;
use crate::health;

#[derive(Debug, Args)]
pub(super) struct ProbeArgs {
    /// The cgroup's directory to enter; made if it is missing.
    cgroup: PathBuf,
    /// Where to connect.
    #[arg(required = true)]
    addresses: Vec<SocketAddr>,
}

/// Connects from a cgroup and says what came of it.
pub(super) fn probe(args: &ProbeArgs) -> ExitCode {
    match health::look(&args.cgroup, &args.addresses) {
        Ok(lines) => output::print(&lines),
        Err(error) => output::failed(&error),
    }
}
