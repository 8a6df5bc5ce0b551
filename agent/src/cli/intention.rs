//! `sidestep intention`

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{
    output,
    status::{StatusArgs, ask},
};
use crate::{admin::status::IntentionStatus, catalog::model::ServiceName};

/// What `consul intention check` ends with for a call that is refused.
const DENIED: u8 = 2;

#[derive(Debug, Subcommand)]
pub(super) enum IntentionCommand {
    /// Say whether a service may call another, by which intention, and where that is written.
    ///
    /// Exit status: 0 it may, 2 it may not.
    Check(CheckArgs),
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The service that calls.
    source: ServiceName,
    /// The service that is called.
    destination: ServiceName,
    #[command(flatten)]
    agent: StatusArgs,
}

/// Asks the agent, whose intentions are those in force.
pub(super) fn intention(command: &IntentionCommand) -> ExitCode {
    let IntentionCommand::Check(args) = command;
    let path = format!(
        "/intention?source={}&destination={}",
        args.source, args.destination
    );
    let decided = match ask::<IntentionStatus>(&args.agent, &path) {
        Ok(decided) => decided,
        Err(code) => return code,
    };
    let printed = if args.agent.json {
        output::print_json(&decided)
    } else {
        output::print(&render(&decided))
    };
    if decided.allowed {
        printed
    } else {
        ExitCode::from(DENIED)
    }
}

fn render(decided: &IntentionStatus) -> String {
    let answer = if decided.allowed { "Allowed" } else { "Denied" };
    let entry = decided.entry.as_ref();
    let entry = entry.map(|entry| format!(", from {entry}"));
    format!(
        "{answer}: {}{}\n",
        decided.reason,
        entry.unwrap_or_default()
    )
}
