//! `cargo xtask vm`: the package on Debian as it is installed, with systemd as the first process and nothing but
//! cgroup v2, in an emulated machine: install, capture, kill, hang, upgrade, stop, remove, purge.
//!
//! What is done there is in `guest.sh`.

mod machine;
mod system;

use std::{fs, fs::File, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::scratch::Scratch;

use crate::{
    build, dist, host,
    kernels::{self, debian},
    progress::{Step, say},
};

/// Releases of Debian that are tried if none is named: what the package is for.
const SUITES: [&str; 2] = ["bookworm", "trixie"];

/// Programs of this machine that make a machine.
const NEEDED: [&str; 4] = ["qemu-system-x86_64", "mmdebstrap", "dpkg-deb", "xz"];

/// See [`crate::Command::Vm`].
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Debian releases that are tried; bookworm and trixie if none is given.
    suites: Vec<String>,
    /// Fetch Debian again, even if it is kept below target/.
    #[arg(long)]
    update: bool,
}

/// Exits with 0 only if every check passed everywhere.
///
/// # Errors
/// If that cannot be tried, or a check fails.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(obstacle) = kernels::obstacle() {
        bail!("{obstacle}");
    }
    host::require(&NEEDED)?;
    let root = build::workspace().join("target/vm");
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    // Another copy would write into the same files.
    let lock = File::create(root.join("lock")).context("creating the lock of vm")?;
    lock.lock().context("waiting for the lock of vm")?;
    let contents = dist::contents()?;
    let packages = [dist::package(&contents, 1)?, dist::package(&contents, 2)?];
    let mut suites: Vec<&str> = arguments.suites.iter().map(String::as_str).collect();
    if suites.is_empty() {
        suites.extend(SUITES);
    }
    let scratch = Scratch::new("vm")?;
    let mut wrong = vec![];
    for suite in suites {
        let directory = root.join(suite);
        fs::create_dir_all(&directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let kernel = debian::kernel(suite, &directory, arguments.update)?;
        let archive = system::pack(suite, &directory, arguments.update, &packages)?;
        let step = Step::begin(format!("trying the package on Debian {suite}"));
        let report = machine::boot(&kernel, &archive, &directory, scratch.cgroup())?;
        step.done();
        say(format_args!("\nDebian {suite}, kernel {}:", kernel.release));
        for line in &report {
            say(format_args!("  {line}"));
        }
        say("");
        wrong.extend(report.iter().filter_map(|line| {
            let failed = line.strip_prefix("FAIL ");
            failed.map(|what| format!("on {suite}: {what}"))
        }));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(ExitCode::SUCCESS)
}
