//! All automation of the project; `cargo xtask --help` lists it.

mod test;
mod demo;
mod prove;
mod bench;
mod kernels;
mod fuzz;
mod build;
mod dist;
mod vm;
mod ebpf;
mod host;
mod apt;
mod fetched;
mod interrupt;
mod progress;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::progress::say;

/// Sidestep's automation.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows Sidestep at work: two nodes in network namespaces, real programs as services.
    Demo(demo::Arguments),
    /// Runs everything that a change must pass; with filters only the tests whose names contain one.
    Test(test::Arguments),
    /// Re-runs the project's claims; without a topic lists the topics.
    Prove(prove::Arguments),
    /// Tries the eBPF programs and the kernel tests on other kernels, in emulated machines.
    Kernels(kernels::Arguments),
    /// Measures.
    Bench(bench::Arguments),
    /// Feeds every parser of outside bytes with what a fuzzer invents.
    Fuzz(fuzz::Arguments),
    /// Builds the eBPF programs; finds or installs the toolchain for them.
    BuildEbpf,
    /// Builds the eBPF programs and the agent for production: target/release/sidestep.
    Build,
    /// Makes the agent a package for Debian, with its unit for systemd: target/dist/*.deb.
    Dist(dist::Arguments),
    /// Tries that package on Debian with systemd, in emulated machines.
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = interrupt::clean_up_when_interrupted().and_then(|()| run(&arguments.command));
    match done {
        Ok(code) => code,
        Err(error) => {
            say(format_args!("\nerror: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Demo(arguments) => demo::run(arguments),
        Command::Test(arguments) => Ok(test::run(arguments)),
        Command::Prove(arguments) => prove::run(arguments),
        Command::Kernels(arguments) => kernels::run(arguments),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Fuzz(arguments) => fuzz::run(arguments),
        Command::BuildEbpf => {
            let objects = build::ebpf_programs()?;
            say(objects.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Build => {
            build::ebpf_programs()?;
            let agent = build::release_agent()?;
            say(agent.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Dist(arguments) => dist::run(arguments),
        Command::Vm(arguments) => vm::run(arguments),
    }
}
