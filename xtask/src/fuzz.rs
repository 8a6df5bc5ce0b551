//! `cargo xtask fuzz`: every parser of outside bytes under libFuzzer, each for a bounded time.
//!
//! Built without a sanitizer: the instrumentation for coverage is all that the stable compiler has, and what is
//! fuzzed is safe code that must not panic.

use std::{
    fs,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build,
    progress::{Step, say, table},
};

/// The release of cargo-fuzz that is known to work.
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// An input that takes longer is a finding, in seconds: parsers take milliseconds.
const TIMEOUT: u64 = 10;

/// See [`crate::Command::Fuzz`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these targets, by their names in fuzz/seeds.
    targets: Vec<String>,
    /// For how long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// What a target's run without a finding said of itself.
struct Stats {
    executions: u64,
    per_second: u64,
    coverage: u64,
}

/// cargo-fuzz, with all targets built.
struct Fuzzer {
    program: PathBuf,
}

/// Runs the targets in turn. Fails if one has a finding.
///
/// # Errors
/// If cargo-fuzz cannot be installed, the targets do not compile, or one is not there.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let targets = wanted(&arguments.targets)?;
    let step = Step::begin("building the fuzz targets");
    let fuzzer = Fuzzer::build(&step)?;
    step.done();
    let (mut rows, mut findings) = (vec![], 0);
    for target in &targets {
        let step = Step::begin(format!("fuzzing {target}"));
        match fuzzer.run(&step, target, arguments.seconds) {
            Ok(stats) => {
                rows.push(stats.row(target));
                step.done();
            }
            Err(error) => {
                findings += 1;
                drop(step);
                say(format_args!("FAIL  {target}\n{error:#}\n"));
            }
        }
    }
    say(format_args!("\n{}", table(&rows)));
    if findings > 0 {
        say(format_args!("\n{findings} failed"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether the targets compile, as a check of `cargo xtask test`. Building them for a fuzzer takes as long as half of
/// the other checks; the tests of the agent run their functions on the seeds and on what is near these.
///
/// # Errors
/// If they do not.
pub(crate) fn check(step: &Step) -> Result<String> {
    let mut command = build::cargo(&["check", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
    command
        .args(["--target-dir", "target/fuzz-check"])
        .env("RUSTFLAGS", "--cfg fuzzing --deny warnings");
    step.run(&mut command)?;
    Ok(String::new())
}

/// Whether the targets' lock file knows what the agent depends on.
///
/// # Errors
/// If it does not: with how to renew it.
pub(crate) fn check_lock(step: &Step) -> Result<String> {
    step.run(&mut build::cargo(&[
        "fetch",
        "--locked",
        "--manifest-path",
        "fuzz/Cargo.toml",
    ]))
    .context(
        "if the agent's dependencies have changed: cp Cargo.lock fuzz/Cargo.lock, then \
         cargo fetch --manifest-path fuzz/Cargo.toml",
    )?;
    Ok(String::new())
}

/// The names of all targets, or those asked for.
fn wanted(names: &[String]) -> Result<Vec<String>> {
    let seeds = build::workspace().join("fuzz/seeds");
    let entries = fs::read_dir(&seeds).with_context(|| format!("listing {}", seeds.display()))?;
    let mut all = vec![];
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", seeds.display()))?;
        all.push(entry.file_name().to_string_lossy().into_owned());
    }
    all.sort();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        bail!("no target {unknown}; there are {}", all.join(", "));
    }
    if !names.is_empty() {
        all.retain(|target| names.contains(target));
    }
    Ok(all)
}

impl Fuzzer {
    fn build(step: &Step) -> Result<Self> {
        let workspace = build::workspace();
        let root = workspace.join(format!("target/tools/cargo-fuzz-{CARGO_FUZZ_VERSION}"));
        let fuzzer = Self {
            program: root.join("bin/cargo-fuzz"),
        };
        if !fuzzer.program.exists() {
            let mut install = build::cargo(&["install", "cargo-fuzz", "--locked"]);
            install
                .args(["--version", CARGO_FUZZ_VERSION, "--root"])
                .arg(&root)
                .arg("--target-dir")
                .arg(workspace.join("target/tools/build"));
            step.run(&mut install)?;
        }
        // cargo-fuzz cannot be told to leave the lock file alone.
        check_lock(step)?;
        step.run(&mut fuzzer.command("build", &[]))?;
        Ok(fuzzer)
    }

    /// Runs one target from its seeds and what earlier runs found interesting, which stays in `fuzz/corpus`.
    ///
    /// # Errors
    /// If it has a finding: with what was wrong and the file that holds the input.
    fn run(&self, step: &Step, target: &str, seconds: u64) -> Result<Stats> {
        let corpus = format!("fuzz/corpus/{target}");
        let path = build::workspace().join(&corpus);
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        let mut command = self.command("run", &[target, &corpus, &format!("fuzz/seeds/{target}")]);
        command
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={TIMEOUT}"))
            .arg("-print_final_stats=1");
        let said = step
            .run(&mut command)
            .map_err(|error| finding(target, error))?;
        Ok(Stats::of(&said))
    }

    /// cargo-fuzz with a subcommand, its own arguments first.
    fn command(&self, subcommand: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(subcommand)
            .args(["--sanitizer", "none", "--target-dir", "target/fuzz"])
            // One, its default, takes far longer to build than it gains in a bounded run.
            .args(["--codegen-units", "16"])
            .args(arguments)
            .current_dir(build::workspace())
            // Set for us by `cargo run`; what is built must not see another crate's.
            .env_remove("CARGO_MANIFEST_DIR");
        command
    }
}

/// Puts the file with the input before everything that the fuzzer said.
fn finding(target: &str, error: anyhow::Error) -> anyhow::Error {
    let said = format!("{error:#}");
    let input = said
        .lines()
        .find_map(|line| line.split_once("Test unit written to "));
    match input {
        Some((_before, input)) => error.context(format!(
            "{target} fails on {input}: copy it to fuzz/seeds/{target}, then cargo test -p sidestep fuzzing"
        )),
        None => error,
    }
}

impl Stats {
    /// From what libFuzzer prints with `-print_final_stats=1`; 0 for what it did not say.
    fn of(said: &[String]) -> Self {
        let last = |name: &str| {
            said.iter().rev().find_map(|line| {
                let (_before, after) = line.split_once(name)?;
                after.split_whitespace().next()?.parse().ok()
            })
        };
        Self {
            executions: last("stat::number_of_executed_units:").unwrap_or(0),
            per_second: last("stat::average_exec_per_sec:").unwrap_or(0),
            coverage: last(" cov: ").unwrap_or(0),
        }
    }

    fn row(&self, target: &str) -> Vec<String> {
        vec![
            target.to_owned(),
            format!("{:>10} inputs", self.executions),
            format!("{:>8}/s", self.per_second),
            format!("{:>6} edges", self.coverage),
        ]
    }
}
