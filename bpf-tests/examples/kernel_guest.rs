//! The first and only program of a virtual machine that `cargo xtask kernels` boots: loads every eBPF program
//! into the kernel that it finds, asks the agent whether it could run here, runs the kernel tests, tells all that on
//! a serial line, and switches off.
//!
//! An example and not a program of this crate: it needs the agent's library, which only tests may depend on.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{
    EbpfLoader, VerifierLogLevel,
    programs::{Program, ProgramError},
};
use bpf_tests::{
    cgroup::Cgroup,
    program::Program as Command,
    wait::{SOON, Stopwatch},
};
use rustix::{
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
    system::{RebootCommand, finit_module, reboot, uname},
};
use serde_json::{Value, json};
use sidestep::datapath::btf;

/// Where `cargo xtask kernels` packs what is for this program.
const HERE: &str = "/guest";

/// The second serial line; the first is the kernel's.
const REPORT: &str = "/dev/ttyS1";

/// An emulated machine is ten times slower than the one that emulates it.
const ONE_TEST: Duration = Duration::from_secs(60);

fn main() {
    if let Err(error) = run() {
        complain(&error);
    }
    // The kernel panics if this program ends, and the machine with it: an end, too.
    let _off = reboot(RebootCommand::PowerOff);
}

fn run() -> Result<()> {
    prepare()?;
    let mut report = Report::open()?;
    report.tell(&json!({
        "kernel": uname().release().to_string_lossy(),
        "lacks": missing_features(),
    }))?;
    let mut all_load = true;
    for object in files("objects")? {
        all_load &= load(&object, &mut report)?;
    }
    ask_agent(&mut report)?;
    // Without its programs, everything that the datapath is to do fails.
    if all_load {
        let wanted = Path::new(HERE).join("wanted");
        let wanted = fs::read_to_string(wanted).context("reading which tests are wanted")?;
        for tests in files("tests")? {
            run_tests(&tests, &wanted, &mut report)?;
        }
    }
    report.tell(&json!({"done": true}))
}

/// What an init system does.
fn prepare() -> Result<()> {
    let mounts = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ];
    for (kind, directory) in mounts {
        fs::create_dir_all(directory).with_context(|| format!("creating {directory}"))?;
        mount(kind, directory, kind, MountFlags::empty(), None)
            .with_context(|| format!("mounting {kind} at {directory}"))?;
    }
    for module in files("modules")? {
        let file = File::open(&module)?;
        finit_module(&file, c"", 0).with_context(|| format!("loading {}", module.display()))?;
    }
    Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .run(SOON)?;
    // Kernels before 5.11 count maps and programs as locked memory.
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Memlock, unlimited).context("lifting the limit of locked memory")
}

/// The files of one of our directories, in the order of their names.
fn files(directory: &str) -> Result<Vec<PathBuf>> {
    let directory = Path::new(HERE).join(directory);
    let entries =
        fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

/// Kinds of type information that the kernel does not know and that aya therefore takes out before it loads.
fn missing_features() -> Vec<&'static str> {
    let Some(btf) = aya::features().btf() else {
        return vec!["btf"];
    };
    let known = [
        ("func", btf.btf_func()),
        ("global func", btf.btf_func_global()),
        ("datasec", btf.btf_datasec()),
        ("float", btf.btf_float()),
        ("decl_tag", btf.btf_decl_tag()),
        ("type_tag", btf.btf_type_tag()),
        ("enum64", btf.btf_enum64()),
    ];
    let missing = known.into_iter().filter(|(_name, is_known)| !is_known);
    missing.map(|(name, _)| name).collect()
}

/// Loads the programs of an object, each by itself, and tells what the verifier said. Whether it took all.
fn load(path: &Path, report: &mut Report) -> Result<bool> {
    let object = path.file_name().unwrap_or_default().to_string_lossy();
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    // With all that they can do: without, the verifier has less to look at.
    let interfaces = btf::interfaces().unwrap_or_default();
    let opened = EbpfLoader::new()
        .override_global("INTERFACES", &interfaces, true)
        .verifier_log_level(VerifierLogLevel::STATS)
        .map_max_entries("VIPS", 64)
        .map_max_entries("ADDRESSES", 64)
        .map_max_entries("FLOWS", 64)
        .load(&bytes);
    let mut programs = match opened {
        Ok(programs) => programs,
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            report.tell(&json!({"object": object, "program": "maps", "error": error}))?;
            return Ok(false);
        }
    };
    let mut all_load = true;
    let mut by_name: BTreeMap<&str, &mut Program> = programs.programs_mut().collect();
    for (name, program) in &mut by_name {
        let outcome = match load_program(program) {
            Ok(verified) => json!({"object": object, "program": name, "verified": verified}),
            Err((error, log)) => {
                all_load = false;
                json!({"object": object, "program": name, "error": error, "log": log})
            }
        };
        report.tell(&outcome)?;
    }
    Ok(all_load)
}

/// How many instructions the verifier looked at, if the kernel tells; or what it said, and the end of its log.
fn load_program(program: &mut Program) -> Result<Option<u32>, (String, String)> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "aya knows 30 kinds, the object has three"
    )]
    let info = match program {
        Program::CgroupSockAddr(program) => program.load().and_then(|()| program.info()),
        Program::SockOps(program) => program.load().and_then(|()| program.info()),
        Program::CgroupSockopt(program) => program.load().and_then(|()| program.info()),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    match info {
        Ok(info) => Ok(info.verified_instruction_count()),
        Err(error) => Err(
            if let ProgramError::LoadError {
                io_error,
                verifier_log,
            } = &error
            {
                (io_error.to_string(), end_of(&verifier_log.to_string(), 12))
            } else {
                (format!("{:#}", anyhow::Error::from(error)), String::new())
            },
        ),
    }
}

/// What the agent says of this kernel.
fn ask_agent(report: &mut Report) -> Result<()> {
    let said = Command::new(format!("{HERE}/sidestep"))
        .args(["check", "--json"])
        .in_cgroup(&Cgroup::create("/agent")?)
        .output(ONE_TEST)?;
    let findings: Value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("reading what sidestep check says: {}", said.stderr))?;
    report.tell(&json!({"check": findings, "can_run": said.succeeded()}))
}

/// Runs each test of a test program by itself, so that one that hangs or crashes is one that fails.
/// Only tests whose name contains `wanted`.
fn run_tests(tests: &Path, wanted: &str, report: &mut Report) -> Result<()> {
    let list = Command::new(tests)
        .args(["--list", "--format", "terse"])
        .run(ONE_TEST)?;
    let file = tests.file_name().unwrap_or_default().to_string_lossy();
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    for name in names.filter(|name| name.contains(wanted)) {
        let clock = Stopwatch::start();
        let ran = Command::new(tests)
            .args(["--exact", name, "--nocapture"])
            .output(ONE_TEST);
        let error = match ran {
            Ok(output) if output.succeeded() => None,
            Ok(output) => {
                let said = format!("{}\n{}", output.stdout, output.stderr);
                Some(format!("{}\n{}", output.code_text(), end_of(&said, 30)))
            }
            Err(error) => Some(format!("{error:#}")),
        };
        let seconds = clock.elapsed().as_secs_f64();
        report.tell(&json!({"file": file, "test": name, "error": error, "seconds": seconds}))?;
    }
    Ok(())
}

/// The last `count` lines that say something.
fn end_of(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let start = lines.len().saturating_sub(count);
    lines.get(start..).unwrap_or_default().join("\n")
}

/// One line of JSON for each finding.
struct Report(File);

impl Report {
    fn open() -> Result<Self> {
        let file = File::options().write(true).open(REPORT);
        file.map(Self).with_context(|| format!("opening {REPORT}"))
    }

    fn tell(&mut self, finding: &Value) -> Result<()> {
        writeln!(self.0, "{finding}").context("telling what was found")
    }
}

/// Tells why nothing more comes, wherever it can be heard.
fn complain(error: &anyhow::Error) {
    let line = json!({"broken": format!("{error:#}")});
    let told = Report::open().and_then(|mut report| report.tell(&line));
    if told.is_err() {
        // Before there is a second serial line there is the kernel's console, which is standard error.
        let _written = writeln!(std::io::stderr(), "{line}");
    }
}
