//! `cargo xtask bench capture` and `bench mesh`: measure by turns, keep every sample, show the medians.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    bench::{
        capture::{self, Variant},
        machine,
        mesh::{self, Load, Way},
        recording::{Progress, Recording},
    },
    program::Program,
    programs,
};
use serde_json::{Value, json};

use super::{prepare, report, summary::Summary};
use crate::{
    build,
    progress::{Step, say},
};

/// See [`super::Command::Capture`].
#[derive(Debug, clap::Args)]
pub(super) struct CaptureArguments {
    #[command(flatten)]
    common: Common,
    /// With how many services, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000, 10_000])]
    services: Vec<u32>,
    /// Also with 100,000 services.
    #[arg(long)]
    full: bool,
}

/// See [`super::Command::Mesh`].
#[derive(Debug, clap::Args)]
pub(super) struct MeshArguments {
    #[command(flatten)]
    common: Common,
    /// For how long idle agents and proxies are watched, in seconds; 0 leaves it and memory out.
    #[arg(long, default_value_t = 20)]
    idle_seconds: u64,
    /// Another build of the agent, to compare with: this one's binary is target/release/sidestep.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Only these loads, separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = ["calls", "turns", "requests", "bulk", "beside"])]
    loads: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// How often everything is measured.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// For how long each load, in seconds.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Only variants whose name contains one of these, separated by commas, and what they are compared with.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Of the order of each round; drawn if not given.
    #[arg(long)]
    seed: Option<u64>,
}

impl Common {
    fn wants(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        let named = |part: &String| name.contains(&part.to_lowercase());
        self.only.is_empty() || self.only.iter().any(named)
    }

    /// Not more digits than fit a JSON number everywhere.
    fn seed(&self) -> u64 {
        let drawn = || now().subsec_nanos().into();
        self.seed.unwrap_or_else(drawn)
    }
}

/// Measures what capture costs.
///
/// # Errors
/// If nothing can be measured.
pub(super) fn capture(arguments: &CaptureArguments) -> Result<()> {
    let common = &arguments.common;
    let wanted = |it: &Variant| *it == Variant::None || common.wants(it.name());
    let mut plan = capture::Plan {
        variants: Variant::ALL.into_iter().filter(wanted).collect(),
        services: arguments.services.clone(),
        rounds: common.rounds,
        time: Duration::from_secs(common.seconds),
        seed: common.seed(),
        established: true,
        changes: true,
    };
    if arguments.full {
        plan.services.push(100_000);
    }
    plan.services.sort_unstable();
    plan.services.dedup();
    if plan.services.first() == Some(&0) || plan.services.last() > Some(&100_000) {
        bail!("from 1 to 100,000 services can be measured");
    }
    let programs: Vec<_> = plan.variants.iter().flat_map(|it| it.programs()).collect();
    prepare(&unique(programs))?;
    let step = Step::begin("measuring capture");
    let files = Files::new("capture", common, plan.seed, common.only.is_empty())?;
    let recording = capture::run(&plan, &mut |progress| files.follow(&step, &progress))?;
    step.done();
    files.finish(&recording)
}

/// Measures what the whole way costs.
///
/// # Errors
/// If nothing can be measured.
pub(super) fn mesh(arguments: &MeshArguments) -> Result<()> {
    let common = &arguments.common;
    let wanted = |it: &Way| *it == Way::Direct || common.wants(it.name());
    let others = Way::OTHER
        .into_iter()
        .filter(|_| arguments.against.is_some());
    let load = |it: &Load| {
        let name = format!("{it:?}").to_lowercase();
        let named = |part: &String| name.starts_with(part);
        arguments.loads.is_empty() || arguments.loads.iter().any(named)
    };
    let plan = mesh::Plan {
        ways: Way::ALL.into_iter().chain(others).filter(wanted).collect(),
        against: arguments.against.clone(),
        loads: Load::ALL.into_iter().filter(load).collect(),
        rounds: common.rounds,
        time: Duration::from_secs(common.seconds),
        seed: common.seed(),
        idle_seconds: arguments.idle_seconds,
    };
    let programs: Vec<_> = plan.ways.iter().flat_map(|it| it.programs()).collect();
    prepare(&unique(programs))?;
    let step = Step::begin("measuring the mesh");
    let is_whole = common.only.is_empty() && arguments.loads.is_empty() && plan.against.is_none();
    let files = Files::new("mesh", common, plan.seed, is_whole)?;
    let recording = mesh::run(&plan, &mut |progress| files.follow(&step, &progress))?;
    step.done();
    files.finish(&recording)
}

fn unique(programs: Vec<&&'static str>) -> Vec<&'static str> {
    let unique: BTreeSet<&'static str> = programs.into_iter().copied().collect();
    unique.into_iter().collect()
}

/// Where what a whole run measured last is kept, with every sample.
///
/// # Errors
/// If the running program is in no target directory.
pub(super) fn kept(bench: &str) -> Result<PathBuf> {
    let fetched = programs::fetched()?;
    let target = fetched.parent().context("no target directory")?;
    Ok(target.join("bench").join(format!("{bench}.json")))
}

/// Where the samples of a run go: a file of its own, written after each round, and that of the last whole run.
struct Files {
    head: Value,
    own: PathBuf,
    last: Option<PathBuf>,
    planned: usize,
}

impl Files {
    fn new(bench: &str, common: &Common, seed: u64, is_whole: bool) -> Result<Self> {
        let time = now().as_secs();
        let machine: serde_json::Map<String, Value> = machine::description()
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.into()))
            .collect();
        let last = kept(bench)?;
        let directory = last.parent().context("no directory")?;
        fs::create_dir_all(directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        Ok(Self {
            own: directory.join(format!("{bench}-{time}.json")),
            head: json!({
                "bench": bench,
                "unix_time": time,
                "seed": seed,
                "seconds": common.seconds,
                "machine": machine,
                "versions": versions(),
            }),
            last: is_whole.then_some(last),
            planned: common.rounds,
        })
    }

    /// Shows what a run is at, and keeps what it has so far: a long one may be interrupted.
    fn follow(&self, step: &Step, progress: &Progress<'_>) -> Result<()> {
        match progress {
            Progress::At(what) => step.note(what),
            Progress::Rounds(rounds, so_far) => drop(self.write(&self.own, *rounds, so_far)?),
        }
        Ok(())
    }

    fn write(&self, file: &Path, rounds: usize, recording: &Recording) -> Result<Value> {
        let mut json = recording.to_json();
        if let (Some(json), Some(head)) = (json.as_object_mut(), self.head.as_object()) {
            json.extend(head.clone());
            json.insert("rounds".to_owned(), rounds.into());
        }
        let text = serde_json::to_string_pretty(&json).context("writing JSON")?;
        fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
        Ok(json)
    }

    /// Keeps all of it, and shows the medians.
    fn finish(&self, recording: &Recording) -> Result<()> {
        let json = self.write(&self.own, self.planned, recording)?;
        if let Some(last) = &self.last {
            self.write(last, self.planned, recording)?;
        }
        let summary = Summary::of(&json)?;
        say(format_args!("\n{}", report::section(&summary)));
        say(format_args!("every sample: {}", self.own.display()));
        ensure!(
            summary.gaps.is_empty(),
            "not everything could be measured: see the gaps above"
        );
        Ok(())
    }
}

fn now() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 is no reason not to measure.
    since.unwrap_or_default()
}

/// What each program says of its version; those that are not here are left out.
fn versions() -> Value {
    let ask = |program: &str, argument: &str| {
        let said = Program::new(program)
            .arg(argument)
            .output(Duration::from_secs(20));
        let said = said.ok()?;
        let all = said.stdout + &said.stderr;
        let line = all.lines().map(str::trim).find(|line| !line.is_empty())?;
        version(line)
    };
    let asked = [
        ("iptables", "iptables-nft", "--version"),
        ("nft", "nft", "--version"),
        ("envoy", "envoy", "--version"),
        ("haproxy", "haproxy", "-v"),
        ("nginx", "nginx", "-v"),
        ("wrk", "wrk", "--version"),
    ];
    let mut versions = serde_json::Map::new();
    for (name, program, argument) in asked {
        if let Some(version) = ask(program, argument) {
            versions.insert(name.to_owned(), version.into());
        }
    }
    if let Some(agent) = programs::agent()
        .ok()
        .and_then(|it| it.to_str().map(str::to_owned))
        && let Some(version) = ask(&agent, "--version")
    {
        versions.insert("sidestep".to_owned(), version.into());
    }
    let git = Program::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .in_directory(build::workspace())
        .run(Duration::from_secs(20));
    if let Ok(commit) = git {
        versions.insert("commit".to_owned(), commit.trim().into());
    }
    versions.into()
}

/// The version in what a program says of itself: the first part that is a number with points.
fn version(said: &str) -> Option<String> {
    let mut parts = said.split(|letter: char| letter.is_whitespace() || letter == '/');
    let is_version = |part: &&str| {
        let number = part.trim_start_matches('v');
        number.starts_with(|it: char| it.is_ascii_digit()) && number.contains('.')
    };
    parts.find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let cases = [
            ("iptables v1.8.9 (nf_tables)", "v1.8.9"),
            (
                "/some/where/envoy  version: 9e5580933739775e8bce696a57a2e1bc99368f23/1.40.0/Clean/RELEASE",
                "1.40.0",
            ),
            (
                "HAProxy version 2.6.12-1+deb12u4 2026/10/17",
                "2.6.12-1+deb12u4",
            ),
            ("nginx version: nginx/1.22.1", "1.22.1"),
            ("wrk debian/4.1.0-3+b2 [epoll]", "4.1.0-3+b2"),
            ("sidestep 0.1.0", "0.1.0"),
        ];
        for (said, expected) in cases {
            assert_eq!(version(said).as_deref(), Some(expected));
        }
        assert_eq!(version("nothing of it"), None);
    }
}
