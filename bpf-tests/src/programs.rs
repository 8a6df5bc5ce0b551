//! Where the programs under test are: the agent and the peer, as cargo built them.

use std::{
    env,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail};

/// The agent to use instead of the one beside the running program.
static AGENT: OnceLock<PathBuf> = OnceLock::new();

/// Makes this process use the agent at `path`. Only the first call counts.
pub fn use_agent(path: PathBuf) {
    // Whoever calls twice gets what the first call said, as promised.
    let _first = AGENT.set(path);
}

/// The agent, `sidestep`.
///
/// # Errors
/// If it is not built.
pub fn agent() -> Result<PathBuf> {
    if let Some(path) = AGENT.get() {
        return Ok(path.clone());
    }
    beside_us(
        "sidestep",
        "`cargo xtask build-ebpf` and `cargo build -p sidestep`",
    )
}

/// The load and echo programs of this crate, `sidestep-peer`.
///
/// # Errors
/// If it is not built.
pub fn peer() -> Result<PathBuf> {
    beside_us("sidestep-peer", "`cargo build -p bpf-tests`")
}

/// Cargo puts binaries into `target/<profile>` and tests into `deps` below it.
fn beside_us(name: &str, how: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("finding the running program")?;
    let candidates = own.ancestors().skip(1).take(2);
    for candidate in candidates.map(|directory| directory.join(name)) {
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "there is no program {name} beside {}: build it with {how}",
        own.parent().unwrap_or(Path::new("/")).display()
    );
}

/// Where `cargo xtask` keeps programs that it fetched: `target/fetched`.
///
/// # Errors
/// If the running program is in no target directory.
pub fn fetched() -> Result<PathBuf> {
    let own = env::current_exe().context("finding the running program")?;
    // target/debug/xtask or target/debug/deps/TEST
    let target = own.ancestors().skip(2).take(2).find(|directory| {
        // What cargo puts into every target directory.
        directory.join("CACHEDIR.TAG").is_file()
    });
    let target = target.with_context(|| format!("{} is not below target/", own.display()))?;
    Ok(target.join("fetched"))
}

/// Finds a program by name: fetched for this project, in `PATH`, or in the places where Debian puts daemons.
pub fn find(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(name.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    fetched()
        .ok()
        .into_iter()
        .chain(env::split_paths(&path))
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}
