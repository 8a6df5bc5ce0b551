//! `sidestep upgrade`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use tokio::time::Instant;

use super::{
    block_on, output,
    status::{AgentArgs, span},
};
use crate::admin::{
    client::{self, ClientError},
    status::{Status, Upgrading},
};

/// Between two looks at the agent.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct UpgradeArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// How long the next agent may take until it serves, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// Has the running agent replaced, and says by what.
pub(super) fn upgrade(args: &UpgradeArgs) -> ExitCode {
    let socket = match args.agent.socket() {
        Ok(socket) => socket,
        Err(code) => return code,
    };
    match block_on(replace(&socket, Duration::from_secs(args.timeout))) {
        Ok(Ok(line)) => output::print(&line),
        Ok(Err(error)) => output::failed(&error),
        Err(code) => code,
    }
}

/// The agent was not replaced; the one before goes on.
#[derive(Debug, thiserror::Error)]
enum UpgradeError {
    #[error(transparent)]
    Ask(#[from] ClientError),
    #[error("read the agent's answer")]
    Answer(#[from] serde_json::Error),
    #[error("the next agent (process {0}) ended: its log says why. The one before goes on")]
    Ended(u32),
    #[error("the next agent (process {process}) does not serve after {}", span(limit.as_secs()))]
    Slow { process: u32, limit: Duration },
}

async fn replace(socket: &Path, limit: Duration) -> Result<String, UpgradeError> {
    let before = status(socket).await?;
    let answer = client::post(socket, "/upgrade").await?;
    let Upgrading { process } = serde_json::from_slice(&answer)?;
    let start = Instant::now();
    loop {
        // Asked first: an agent that serves and ends at once has served.
        let runs = PathBuf::from(format!("/proc/{process}")).exists();
        match status(socket).await {
            Ok(now) if now.process == process => {
                return Ok(format!(
                    "process {} ({}) was replaced by {process} ({})\n",
                    before.process, before.version, now.version
                ));
            }
            // Between two agents nobody may answer.
            Ok(_) | Err(UpgradeError::Ask(_)) if runs => {}
            Ok(_) => return Err(UpgradeError::Ended(process)),
            Err(error) => return Err(error),
        }
        if start.elapsed() > limit {
            return Err(UpgradeError::Slow { process, limit });
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn status(socket: &Path) -> Result<Status, UpgradeError> {
    let bytes = client::get(socket, "/status").await?;
    Ok(serde_json::from_slice(&bytes)?)
}
