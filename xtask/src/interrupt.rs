//! Ctrl-C and its relatives: clean up, say so, and end as the signal wants.

use std::{
    fs,
    path::{Path, PathBuf},
    process, thread,
};

use anyhow::{Context as _, Result};
use bpf_tests::scratch;
use parking_lot::Mutex;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
    low_level::emulate_default_handler,
};

use crate::progress::say;

/// Files outside of the workspace that must not stay.
static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// From now on a signal that ends this process removes what its runs have left on the machine first.
///
/// # Errors
/// If signals cannot be caught.
pub(crate) fn clean_up_when_interrupted() -> Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).context("catching signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            clean_up();
            // It only fails for signals that cannot be emulated.
            let _ended = emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// Lets `path` be removed if a signal comes.
pub(crate) fn remove_when_interrupted(path: &Path) {
    FILES.lock().push(path.to_owned());
}

/// Takes that back.
pub(crate) fn keep_when_interrupted(path: &Path) {
    FILES.lock().retain(|file| file != path);
}

fn clean_up() {
    for file in FILES.lock().iter() {
        // It may be gone already.
        let _removed = fs::remove_file(file);
    }
    let own = format!("-{}-", process::id());
    let runs = scratch::runs().unwrap_or_default();
    for run in runs.iter().filter(|run| run.contains(&own)) {
        say(format_args!("\ninterrupted: removing {run}"));
        if let Err(error) = scratch::remove(run) {
            say(format_args!(
                "it resists: {error:#}; the janitor tries again"
            ));
        }
    }
}
