//! `sidestep log`

use std::process::ExitCode;

use clap::Args;

use super::{block_on, output, status::AgentArgs};
use crate::admin::client;

#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// A level, or a filter like `info,sidestep::outbound=debug`.
    level: String,
    #[command(flatten)]
    agent: AgentArgs,
}

/// Changes what the agent logs.
pub(super) fn log(args: &LogArgs) -> ExitCode {
    let plain = |c: char| c.is_ascii_alphanumeric() || ",=:_-".contains(c);
    if !args.level.chars().all(plain) {
        output::complain(&format!("{:?}: expected a level or a filter", args.level));
        return ExitCode::from(super::USAGE);
    }
    let path = format!("/log?level={}", args.level);
    let socket = match args.agent.socket() {
        Ok(socket) => socket,
        Err(code) => return code,
    };
    match block_on(client::put(&socket, &path)) {
        Ok(Ok(_)) => ExitCode::SUCCESS,
        Ok(Err(error)) => output::failed(&error),
        Err(code) => code,
    }
}
