//! The command line: what `sidestep` can be told, one file per subcommand.
//!
//! Exit status: 0 done; 1 it failed, or what was checked is not well; 64 (`EX_USAGE` of sysexits.h) the command
//! line or the configuration is wrong.

mod ca;
mod check;
mod connections;
mod detach;
mod intention;
mod log;
mod output;
mod probe;
mod run;
mod status;
mod upgrade;
mod validate;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::config::{self, Config, DEFAULT_PATH};

/// `EX_USAGE` of sysexits.h.
const USAGE: u8 = 64;

/// One agent per node that gives every process a service mesh, captured at `connect()` by eBPF.
#[derive(Debug, Parser)]
#[command(name = "sidestep", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground until SIGTERM; SIGHUP reloads the configuration.
    Run(run::RunArgs),
    /// Replace the running agent by one of the program file as it is now, without losing a connection.
    Upgrade(upgrade::UpgradeArgs),
    /// Check the configuration and the catalog without running anything.
    Validate(ConfigArgs),
    /// Say whether this host can run the agent, and what to do if not.
    Check(check::CheckArgs),
    /// Show what the running agent does.
    Status(status::StatusArgs),
    /// Show the live connections of the running agent.
    Connections(status::StatusArgs),
    /// Ask the running agent about its intentions.
    #[command(subcommand)]
    Intention(intention::IntentionCommand),
    /// Take out of the kernel what an agent left there when it ended. Not while it runs.
    Detach(detach::DetachArgs),
    /// Change what the running agent logs, until it ends or is reloaded.
    Log(log::LogArgs),
    /// Connect from a cgroup: how the agent finds out whether it captures.
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
    /// Make and show certificate authorities.
    #[command(subcommand)]
    Ca(ca::CaCommand),
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// The configuration file; its drop-ins are in the directory beside it, `.d` in place of `.toml`.
    #[arg(long, short, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

/// The command line as clap has it, for pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
            // If nobody reads it, there is nobody to tell.
            drop(error.print());
            return code;
        }
    };
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Upgrade(args) => upgrade::upgrade(&args),
        Command::Validate(args) => validate::validate(&args.config),
        Command::Check(args) => check::check(&args),
        Command::Status(args) => status::status(&args),
        Command::Connections(args) => connections::connections(&args),
        Command::Intention(command) => intention::intention(&command),
        Command::Detach(args) => detach::detach(&args),
        Command::Probe(args) => probe::probe(&args),
        Command::Log(args) => log::log(&args),
        Command::Ca(command) => ca::ca(command),
    }
}

/// Loads the configuration or says everything that is wrong with it.
fn load_config(path: &Path) -> Result<Config, ExitCode> {
    config::load(path).map_err(|error| {
        output::complain(&error.to_string());
        ExitCode::from(USAGE)
    })
}

/// Runs a future that talks to the agent.
fn block_on<T>(work: impl Future<Output = T>) -> Result<T, ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => Ok(runtime.block_on(work)),
        Err(error) => Err(output::failed(&error)),
    }
}
