//! Building: the eBPF programs, the agent, the programs of the tests.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};

use crate::{ebpf, host, progress::Step};

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// `cargo` with `arguments`, in the workspace, with the toolchain that runs us.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(arguments)
        .current_dir(workspace())
        // Set for us by `cargo run`; what is built must not see another crate's.
        .env_remove("CARGO_MANIFEST_DIR");
    command
}

/// Builds the eBPF programs, with everything that this takes. Returns the folder of the objects.
///
/// # Errors
/// If there is no toolchain for them and none can be installed, or if they do not compile.
pub(crate) fn ebpf_programs() -> Result<PathBuf> {
    let step = Step::begin("building the eBPF programs");
    let target = workspace().join("target/bpf");
    fs::create_dir_all(&target).with_context(|| format!("creating {}", target.display()))?;
    let lock_path = target.join("xtask.lock");
    let lock =
        File::create(&lock_path).with_context(|| format!("creating {}", lock_path.display()))?;
    flock(&lock, FlockOperation::LockExclusive)
        .with_context(|| format!("locking {}", lock_path.display()))?;
    let objects = ebpf::build(workspace(), host::is_root(), &mut |detail| {
        step.note(detail);
    })?;
    step.done();
    Ok(objects)
}

/// Builds the agent and the programs of the tests, beside the running xtask.
///
/// # Errors
/// If they do not compile.
pub(crate) fn agent_and_peer() -> Result<()> {
    let step = Step::begin("building the agent");
    step.run(&mut cargo(&[
        "build",
        "--package",
        "sidestep",
        "--package",
        "bpf-tests",
        "--bins",
    ]))?;
    step.done();
    Ok(())
}

/// Builds the agent for production. Returns its path.
///
/// # Errors
/// If it does not compile.
pub(crate) fn release_agent() -> Result<PathBuf> {
    let step = Step::begin("building the agent for production");
    step.run(&mut cargo(&[
        "build",
        "--release",
        "--package",
        "sidestep",
        "--bins",
    ]))?;
    step.done();
    let own = env::current_exe().context("finding the running program")?;
    // target/debug/xtask
    let target = own
        .ancestors()
        .nth(2)
        .context("xtask is in no target directory")?;
    Ok(target.join("release/sidestep"))
}
