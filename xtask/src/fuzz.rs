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

/// What libFuzzer asks of the compiler: counters per edge, and the operands of comparisons.
/// Source: LLVM's `SanitizerCoverage`; cargo-fuzz passes the same.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

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

/// The program that holds all targets.
struct Fuzzer {
    program: PathBuf,
}

/// Runs the targets in turn. Fails if one has a finding.
///
/// # Errors
/// If the targets do not compile, or one is not there.
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

/// Whether the program compiles, as a check of `cargo xtask test`. Building it for a fuzzer takes as long as half of the
/// other checks; a test of the agent runs the targets on the seeds and on what is near these.
///
/// # Errors
/// If it does not.
pub(crate) fn check(step: &Step) -> Result<String> {
    let mut command = build::cargo(&["check", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
    command
        .args(["--target-dir", "target/fuzz"])
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
        let host = host_triple()?;
        let mut command = build::cargo(&["build", "--locked", "--release"]);
        command
            .args(["--manifest-path", "fuzz/Cargo.toml"])
            .args(["--target-dir", "target/fuzz"])
            // Named, or the flags would be those of build scripts as well, which link no fuzzer.
            .args(["--target", &host])
            .env("RUSTFLAGS", RUSTFLAGS);
        step.run(&mut command)?;
        let program = format!("target/fuzz/{host}/release/sidestep-fuzz");
        Ok(Self {
            program: build::workspace().join(program),
        })
    }

    /// Runs one target from its seeds and what earlier runs found interesting, which stays in `fuzz/corpus`.
    ///
    /// # Errors
    /// If it has a finding: with what was wrong and the file that holds the input.
    fn run(&self, step: &Step, target: &str, seconds: u64) -> Result<Stats> {
        let fuzz = build::workspace().join("fuzz");
        let [corpus, artifacts] = ["corpus", "artifacts"].map(|name| fuzz.join(name).join(target));
        for directory in [&corpus, &artifacts] {
            fs::create_dir_all(directory)
                .with_context(|| format!("creating {}", directory.display()))?;
        }
        let mut command = Command::new(&self.program);
        command
            .env("SIDESTEP_FUZZ_TARGET", target)
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={TIMEOUT}"))
            .arg("-print_final_stats=1")
            .arg(corpus)
            .arg(fuzz.join("seeds").join(target));
        let said = step
            .run(&mut command)
            .map_err(|error| finding(target, error))?;
        Ok(Stats::of(&said))
    }
}

/// What the compiler builds for unless told otherwise.
fn host_triple() -> Result<String> {
    let said = Command::new("rustc")
        .arg("-vV")
        .output()
        .context("running rustc -vV")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let triple = said.lines().find_map(|line| line.strip_prefix("host: "));
    triple.map(str::to_owned).context("rustc -vV names no host")
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
