//! `cargo xtask bench`: measurements, and the record of them in docs/performance.md.

mod relay;
mod compare;
mod summary;
mod report;
mod plot;

use std::process::ExitCode;

use anyhow::{Result, bail};
use bpf_tests::programs;
use clap::Subcommand;

use crate::{build, host};

/// See [`crate::Command::Bench`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The way of bytes and of new connections through two agents: rows for a quick look.
    Relay(relay::Arguments),
    /// What capture costs: eBPF beside iptables, nftables and nothing, with few services and many.
    Capture(compare::CaptureArguments),
    /// What the whole way costs: Sidestep beside a direct connection, Envoy and HAProxy.
    Mesh(compare::MeshArguments),
    /// Takes what was measured last into docs/bench, and writes the record anew.
    Publish(report::PublishArguments),
}

/// Measures, or writes down what was measured.
///
/// # Errors
/// If something does not start or fails under load.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Relay(arguments) => {
            prepare(&["ip"])?;
            relay::run(arguments)?;
        }
        Command::Capture(arguments) => compare::capture(arguments)?,
        Command::Mesh(arguments) => compare::mesh(arguments)?,
        Command::Publish(arguments) => report::publish(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything that measuring takes, with the agent that users run.
fn prepare(programs: &[&'static str]) -> Result<()> {
    if !host::is_root() {
        bail!("needs root: it makes network namespaces and loads eBPF programs");
    }
    host::require(programs)?;
    build::ebpf_programs()?;
    build::agent_and_peer()?;
    programs::use_agent(build::release_agent()?);
    Ok(())
}
