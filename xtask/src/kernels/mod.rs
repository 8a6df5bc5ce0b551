//! `cargo xtask kernels`: the eBPF programs and the kernel tests on kernels other than this machine's.
//!
//! Debian's kernels, from the oldest to the newest, each booted in an emulated machine. What they find is in
//! docs/kernels.md.

pub(crate) mod archive;
pub(crate) mod debian;
mod guest;
pub(crate) mod machine;
mod refusals;
mod verified;

use std::{
    env,
    fs::{self, File},
    iter,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bpf_tests::{cgroup::Cgroup, programs, scratch::Scratch};

use crate::{
    build, host,
    progress::{Step, say, table},
};
use archive::Archive;
use machine::{Findings, Loaded};
use verified::{Growth, Record};

/// Releases of Debian whose kernels are tried if none is named. The last is the newest that can be counted on: in
/// sid, which is a few days newer, packages that belong together do not always come together.
const SUITES: [&str; 4] = ["bullseye", "bookworm", "trixie", "testing"];

/// Programs of this machine that make a machine, and that are packed into it.
const NEEDED: [&str; 6] = [
    "qemu-system-x86_64",
    "dpkg-deb",
    "xz",
    "strip",
    "ip",
    "python3",
];

/// See [`crate::Command::Kernels`].
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Debian releases whose kernel is tried; bullseye, bookworm, trixie and testing if none is given.
    suites: Vec<String>,
    /// Run only the tests whose names contain this.
    #[arg(long, default_value_t)]
    only: String,
    /// Fetch the newest kernel of each, even if one is kept below target/.
    #[arg(long)]
    update: bool,
    /// Take the numbers of verified instructions for right, and write them down.
    #[arg(long)]
    record: bool,
}

/// Exits with 0 only if everything is as it must be on every kernel.
///
/// # Errors
/// If that cannot even be tried.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    match check(arguments) {
        Ok(summary) => {
            say(format_args!("\n{summary}"));
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error),
    }
}

/// Why this machine cannot try other kernels, if so.
pub(crate) fn obstacle() -> Option<&'static str> {
    if !host::is_root() {
        Some("needs root, whose cgroup holds the machines")
    } else if env::consts::ARCH != "x86_64" {
        Some("needs x86-64, since this machine's programs run in the emulated ones")
    } else if programs::find("apt-get").is_none() {
        Some("needs Debian's apt-get, which fetches the kernels")
    } else {
        None
    }
}

/// Tries everything and prints what it finds. Returns a summary.
///
/// # Errors
/// What is not as it must be.
pub(crate) fn check(arguments: &Arguments) -> Result<String> {
    if let Some(obstacle) = obstacle() {
        bail!("{obstacle}");
    }
    host::require(&NEEDED)?;
    let root = build::workspace().join("target/kernels");
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    // Another copy would write into the same files.
    let lock = File::create(root.join("lock")).context("creating the lock of kernels")?;
    lock.lock().context("waiting for the lock of kernels")?;
    build::ebpf_programs()?;
    let archive = guest::pack(&arguments.only)?;
    let mut record = Record::read()?;
    let named = arguments.suites.iter().map(String::as_str);
    let mut suites: Vec<&str> = named.collect();
    if suites.is_empty() {
        suites.extend(SUITES);
    }
    let scratch = Scratch::new("kernels")?;
    let boot = |suite: &str| {
        boot(suite, &archive, scratch.cgroup(), arguments.update)
            .with_context(|| format!("the kernel of Debian {suite}"))
    };
    let (mut found, mut wrong) = (vec![], vec![]);
    for outcome in each_in_parallel(&suites, boot) {
        match outcome {
            Ok(findings) => found.push(findings),
            Err(error) => wrong.push(format!("{error:#}")),
        }
    }
    if !found.is_empty() {
        show(&found, &record);
    }
    if arguments.record {
        for findings in &found {
            record.replace(findings);
        }
        record.write()?;
    }
    wrong.extend(found.iter().flat_map(|findings| judge(findings, &record)));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let tests: usize = found.iter().map(|findings| findings.tests.len()).sum();
    Ok(format!("{} kernels, {tests} tests passed", found.len()))
}

fn boot(suite: &str, archive: &Archive, cgroup: &Cgroup, update: bool) -> Result<Findings> {
    let directory = build::workspace().join("target/kernels").join(suite);
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let kernel = debian::kernel(suite, &directory, update)?;
    let initramfs = guest::with_modules(archive, &kernel)?;
    let step = Step::begin(format!("booting {}", kernel.release));
    let found = machine::boot(&kernel, &initramfs, &directory, cgroup)?;
    step.done();
    Ok(found)
}

/// `work` for each of `items`, as many at once as there are processors, the last ones first: the newest kernels take
/// longest. Results are in the order of the items.
fn each_in_parallel<T: Send>(
    items: &[&str],
    work: impl Fn(&str) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let next = AtomicUsize::new(0);
    let take = || {
        let index = next.fetch_add(1, Ordering::Relaxed);
        items.iter().rev().nth(index).copied()
    };
    let one_after_another = || -> Vec<(&str, Result<T>)> {
        iter::from_fn(take).map(|item| (item, work(item))).collect()
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut done: Vec<(&str, Result<T>)> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|_| scope.spawn(one_after_another))
            .collect();
        let ended = running.into_iter().map(thread::ScopedJoinHandle::join);
        ended
            .flat_map(|ended| {
                ended.unwrap_or_else(|_panic| vec![("", Err(anyhow!("a thread panicked")))])
            })
            .collect()
    });
    done.sort_by_key(|(item, _)| items.iter().position(|other| other == item));
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Prints what was found, as two tables.
fn show(found: &[Findings], record: &Record) {
    let heading = [
        "kernel",
        "object",
        "program",
        "",
        "verified",
        "recorded",
        "fallback, or why it is refused",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for findings in found {
        rows.extend(findings.programs.iter().map(|loaded| {
            let or_dash = |number: Option<u64>| number.map_or("-".to_owned(), |n| n.to_string());
            let (word, remark) = verdict(findings, loaded);
            vec![
                findings.release.clone(),
                loaded.object.clone(),
                loaded.program.clone(),
                word.to_owned(),
                or_dash(loaded.verified),
                or_dash(match record.growth(findings, loaded) {
                    Growth::Unknown => None,
                    Growth::Tolerated(then) | Growth::TooMuch(then) => Some(then),
                }),
                remark,
            ]
        }));
    }
    say(format_args!("\n{}\n", table(&rows)));
    let mut rows = vec![];
    for findings in found {
        let passed = findings.tests.iter().filter(|test| test.error.is_none());
        let seconds: f64 = findings.tests.iter().map(|test| test.seconds).sum();
        rows.push(vec![
            findings.release.clone(),
            match findings.tests.len() {
                0 => "no tests: not all programs load".to_owned(),
                all => format!("{} of {all} tests passed in {seconds:.0} s", passed.count()),
            },
        ]);
    }
    say(table(&rows));
    for findings in found {
        for complaint in &findings.complaints {
            say(format_args!(
                "{}: sidestep check: {complaint}",
                findings.release
            ));
        }
    }
}

/// What became of a program, and what there is to say about it.
fn verdict(findings: &Findings, loaded: &Loaded) -> (&'static str, String) {
    let known = refusals::known(&findings.series(), &loaded.program);
    match (&loaded.error, known) {
        (None, _) if findings.lacks.is_empty() => ("loads", String::new()),
        (None, _) => {
            let lacks = findings.lacks.join(", ");
            ("loads", format!("type information without {lacks}"))
        }
        (Some(error), Some(known)) if known.explains(error) => ("refused", known.reason.to_owned()),
        (Some(_), _) => ("REFUSED", "see below".to_owned()),
    }
}

/// Everything that is not as it must be.
fn judge(findings: &Findings, record: &Record) -> Vec<String> {
    let release = &findings.release;
    let mut wrong = vec![];
    for loaded in &findings.programs {
        let Loaded {
            object, program, ..
        } = loaded;
        let known = refusals::known(&findings.series(), program);
        match (&loaded.error, known) {
            (Some(error), Some(known)) if known.explains(error) => {}
            (Some(error), _) => {
                wrong.push(format!("{release} refuses {program} of {object}: {error}"));
            }
            (None, Some(_)) => wrong.push(format!(
                "{release} takes {program} of {object}, which it is known to refuse: \
                 correct xtask/src/kernels/refusals.rs"
            )),
            (None, None) => {}
        }
        if let (Some(now), Growth::TooMuch(then)) =
            (loaded.verified, record.growth(findings, loaded))
        {
            wrong.push(format!(
                "on {release} the verifier looks at {now} instructions for {program} of {object}, \
                 {then} before: find out why, or `cargo xtask kernels --record`"
            ));
        }
    }
    for test in &findings.tests {
        if let Some(error) = &test.error {
            wrong.push(format!("on {release} fails {}: {error}", test.name));
        }
    }
    let all_load = findings
        .programs
        .iter()
        .all(|loaded| loaded.error.is_none());
    if findings.can_run != all_load {
        let complaints = match findings.complaints.as_slice() {
            [] => "nothing".to_owned(),
            complaints => complaints.join("; "),
        };
        wrong.push(format!(
            "on {release} sidestep check does not say what is true, but complains of {complaints}"
        ));
    }
    if findings.programs.is_empty() || (all_load && findings.tests.is_empty()) {
        wrong.push(format!("on {release} nothing was tried"));
    }
    wrong
}
