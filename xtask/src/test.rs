//! `cargo xtask test`: everything that a change must pass.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use bpf_tests::{claims::TOPICS, programs};

use crate::{
    build, fuzz, host, kernels,
    progress::{Step, say, table},
};

/// See [`crate::Command::Test`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run only tests whose name contains one of these, and no other check.
    filters: Vec<String>,
}

/// What became of one check.
enum Outcome {
    Passed { detail: String },
    Failed { error: anyhow::Error },
    Skipped { reason: String },
}

/// The checks so far.
struct Report {
    rows: Vec<(String, Outcome, Duration)>,
}

/// Exits with 0 only if every check passed; in CI only if none was skipped either.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let filters: Vec<&str> = arguments.filters.iter().map(String::as_str).collect();
    let mut report = Report { rows: vec![] };
    if filters.is_empty() {
        report.cargo("format", &["fmt", "--all", "--check"]);
        report.check("format of the other workspaces", other_formats);
        report.check("lock file of the fuzz targets", fuzz::check_lock);
    }
    report.check("eBPF programs", |_step| {
        build::ebpf_programs().map(|_object| String::new())
    });
    if filters.is_empty() {
        report.cargo(
            "lints",
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "--deny",
                "warnings",
            ],
        );
    }
    report.check("unit and property tests", |step| {
        // Some ask a real Consul, and pass by where there is none: not in CI.
        if host::is_ci() {
            host::require(&["consul"])?;
        }
        tests(step, &["--workspace", "--exclude", "bpf-tests"], &filters)
    });
    if filters.is_empty() {
        report.check("documentation's tests", |step| {
            let said = step.run(&mut build::cargo(&["test", "--workspace", "--doc"]))?;
            Ok(tally(&said))
        });
        report.check("documentation", |step| {
            let mut command = build::cargo(&[
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
            ]);
            step.run(command.env("RUSTDOCFLAGS", "--deny warnings"))?;
            Ok(String::new())
        });
    }
    if filters.is_empty() && host::is_ci() {
        report.check("fuzz targets", fuzz::check);
    }
    if host::is_root() {
        report.check("kernel and two-node tests", |step| {
            kernel_tests(step, &filters)
        });
    } else {
        report.skip("kernel and two-node tests", "needs root");
    }
    if filters.is_empty() {
        report.other_kernels();
    }
    report.finish()
}

fn other_formats(step: &Step) -> Result<String> {
    for workspace in ["ebpf/Cargo.toml", "fuzz/Cargo.toml"] {
        step.run(&mut build::cargo(&[
            "fmt",
            "--manifest-path",
            workspace,
            "--",
            "--check",
        ]))?;
    }
    Ok(String::new())
}

/// Everything in `bpf-tests`: one at a time, as they wait for real programs.
fn kernel_tests(step: &Step, filters: &[&str]) -> Result<String> {
    for topic in TOPICS {
        host::require(topic.programs)?;
    }
    build::agent_and_peer()?;
    tests(step, &["--package", "bpf-tests"], filters)
}

/// Runs tests with nextest, which has deadlines, or else with what cargo has.
fn tests(step: &Step, packages: &[&str], filters: &[&str]) -> Result<String> {
    let mut command = if programs::find("cargo-nextest").is_some() {
        let profile = if host::is_ci() { "ci" } else { "default" };
        let mut command =
            build::cargo(&["nextest", "run", "--profile", profile, "--no-tests", "pass"]);
        command.args(packages).args(filters);
        command
    } else {
        let mut command = build::cargo(&["test", "--no-fail-fast", "--lib", "--bins", "--tests"]);
        command.args(packages).arg("--").args(filters);
        if packages.contains(&"bpf-tests") && !packages.contains(&"--exclude") {
            command.arg("--test-threads=1");
        }
        command
    };
    step.run(&mut command).map(|said| tally(&said))
}

/// The runner's own closing lines.
fn tally(said: &[String]) -> String {
    if let Some(line) = said.iter().find(|line| line.contains("Summary [")) {
        return line.split(']').nth(1).unwrap_or_default().trim().to_owned();
    }
    let passed: u32 = said
        .iter()
        .filter_map(|line| line.strip_prefix("test result: ok. "))
        .filter_map(|rest| rest.split(' ').next()?.parse::<u32>().ok())
        .sum();
    format!("{passed} tests passed")
}

impl Report {
    fn cargo(&mut self, what: &str, arguments: &[&str]) {
        self.check(what, |step| {
            step.run(&mut build::cargo(arguments))
                .map(|_said| String::new())
        });
    }

    /// The kernel tests once more, in emulated machines with other kernels.
    fn other_kernels(&mut self) {
        let what = "kernel tests on other kernels";
        if let Some(obstacle) = kernels::obstacle() {
            self.skip(what, obstacle);
        } else {
            self.check(what, |_step| kernels::check(&kernels::Arguments::default()));
        }
    }

    fn check(&mut self, what: &str, check: impl FnOnce(&Step) -> Result<String>) {
        let step = Step::begin(what);
        let outcome = match check(&step) {
            Ok(detail) => Outcome::Passed { detail },
            Err(error) => Outcome::Failed { error },
        };
        let time = step.elapsed();
        match &outcome {
            Outcome::Failed { error } => {
                drop(step);
                say(format_args!("FAIL  {what}\n{error:#}\n"));
            }
            Outcome::Passed { .. } | Outcome::Skipped { .. } => step.done(),
        }
        self.rows.push((what.to_owned(), outcome, time));
    }

    fn skip(&mut self, what: &str, reason: &str) {
        say(format_args!("skip  {what}: {reason}"));
        let outcome = Outcome::Skipped {
            reason: reason.to_owned(),
        };
        self.rows.push((what.to_owned(), outcome, Duration::ZERO));
    }

    fn finish(self) -> ExitCode {
        let (mut failed, mut skipped) = (0, 0);
        let mut rows = vec![];
        for (what, outcome, time) in self.rows {
            let (word, detail) = match outcome {
                Outcome::Passed { detail } => ("ok", detail),
                Outcome::Failed { .. } => {
                    failed += 1;
                    ("FAILED", "see above".to_owned())
                }
                Outcome::Skipped { reason } => {
                    skipped += 1;
                    ("skipped", reason)
                }
            };
            let seconds = format!("{:>7.1} s", time.as_secs_f64());
            rows.push(vec![word.to_owned(), what, seconds, detail]);
        }
        say(format_args!("\n{}", table(&rows)));
        if failed > 0 {
            say(format_args!("\n{failed} failed"));
            return ExitCode::FAILURE;
        }
        if skipped > 0 && host::is_ci() {
            say("\nin CI nothing may be skipped");
            return ExitCode::FAILURE;
        }
        say("\nall passed");
        ExitCode::SUCCESS
    }
}
