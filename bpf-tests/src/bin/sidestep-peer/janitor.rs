//! Cleans up after a run whose process ended without doing it, be it by SIGKILL.

use std::io::{self, Read as _};

use anyhow::{Context as _, Result};
use bpf_tests::{program::Program, scratch, wait::SOON};

/// Waits for the end of standard input, which is the end of the run's process, and removes the run's
/// traces; not if it said `done` before.
pub(crate) fn wait_and_clean(run: &str) -> Result<()> {
    // A session of its own: what ends the run by a signal to its process group or terminal spares us.
    rustix::process::setsid().context("leaving the session")?;
    let mut said = String::new();
    io::stdin()
        .read_to_string(&mut said)
        .context("watching the run")?;
    if said.trim() == "done" {
        return Ok(());
    }
    scratch::remove(run).with_context(|| format!("cleaning up after {run}"))
}

/// Makes a run that has a process, to be killed with it: what the janitor is tested with.
pub(crate) fn make_run() -> Result<()> {
    let run = scratch::Scratch::new("killed")?;
    let sleeper = Program::new("sleep").arg("600").in_cgroup(run.cgroup());
    sleeper.run(SOON).map(|_output| ())
}
