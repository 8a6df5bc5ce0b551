//! `cargo xtask kernels`: the eBPF programs and the kernel tests on kernels other than this machine's.
//!
//! Debian's kernels, from the oldest to the newest, each booted in an emulated machine.

mod archive;
mod debian;
mod guest;
mod machine;

use std::{fs, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{
    build, host,
    progress::{Step, say, table},
};
use machine::Findings;

/// Releases of Debian whose kernels are tried if none is named.
const SUITES: [&str; 4] = ["bullseye", "bookworm", "trixie", "sid"];

/// See [`crate::Command::Kernels`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Debian releases whose kernel is tried; bullseye, bookworm, trixie and sid if none is given.
    suites: Vec<String>,
    /// Fetch the newest kernel of each, even if one is kept below target/.
    #[arg(long)]
    update: bool,
}

/// Exits with 0 only if on every kernel all programs load and all tests pass.
///
/// # Errors
/// If that cannot even be tried.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    host::require(&["qemu-system-x86_64", "ip", "python3", "strip", "xz"])?;
    build::ebpf_programs()?;
    let named = arguments.suites.iter().map(String::as_str);
    let mut suites: Vec<&str> = named.collect();
    if suites.is_empty() {
        suites.extend(SUITES);
    }
    let root = build::workspace().join("target/kernels");
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    let archive = guest::pack(&[])?;
    let mut failed = false;
    for suite in suites {
        let directory = root.join(suite);
        let kernel = debian::kernel(suite, &directory, arguments.update)?;
        let initramfs = guest::with_modules(&archive, &kernel)?;
        let step = Step::begin(format!("booting the kernel of Debian {suite}"));
        let found = machine::boot(&kernel, &initramfs, &directory);
        let found = found.with_context(|| format!("on the kernel of Debian {suite}"))?;
        step.done();
        failed |= !show(&found);
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Prints what was found; whether it is as it must be.
fn show(found: &Findings) -> bool {
    let mut rows = vec![];
    for loaded in &found.programs {
        let verified = loaded.verified.map(|count| count.to_string());
        rows.push(vec![
            found.release.clone(),
            loaded.object.clone(),
            loaded.program.clone(),
            if loaded.error.is_none() {
                "loaded"
            } else {
                "REFUSED"
            }
            .to_owned(),
            verified.unwrap_or_else(|| "-".to_owned()),
            found.lacks.join(", "),
        ]);
    }
    say(format_args!("\n{}\n", table(&rows)));
    let mut good = !found.programs.is_empty() && !found.tests.is_empty();
    for loaded in &found.programs {
        if let Some(error) = &loaded.error {
            good = false;
            say(format_args!(
                "{} {}: {error}\n",
                found.release, loaded.program
            ));
        }
    }
    for test in &found.tests {
        if let Some(error) = &test.error {
            good = false;
            say(format_args!(
                "{} FAILED {}: {error}\n",
                found.release, test.name
            ));
        }
    }
    let failed = found.tests.iter().filter(|test| test.error.is_some());
    let seconds: f64 = found.tests.iter().map(|test| test.seconds).sum();
    say(format_args!(
        "{}: {} of {} tests failed, {seconds:.0} s\n",
        found.release,
        failed.count(),
        found.tests.len()
    ));
    good
}
