//! A virtual machine that boots a kernel, and what its only program found out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bpf_tests::{cgroup::Cgroup, program::Program};
use serde_json::Value;

use super::debian::Kernel;

/// Whatever happens, a machine is switched off after this.
const DEADLINE: Duration = Duration::from_secs(900);

/// Of what the kernel says on its console, so many last lines are shown if it ends badly.
const TAIL: usize = 25;

/// Everything that is emulated, on every machine alike.
const QEMU: &str = "qemu-system-x86_64";

/// What the kernel is told.
///
/// - Little on the slow serial line; a panic resets, which is the end.
/// - Programs have the same addresses each time: QEMU translates them once.
/// - What it does not know it puts into the environment of the first program.
const KERNEL: &str = "console=ttyS0 loglevel=4 panic=-1 mitigations=off random.trust_cpu=on \
                      norandmaps PATH=/usr/bin";

/// What was found in one machine.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// The kernel's full version.
    pub(crate) release: String,
    /// Kinds of type information that it does not know.
    pub(crate) lacks: Vec<String>,
    /// Every program of every object.
    pub(crate) programs: Vec<Loaded>,
    /// Whether the agent's own check says that it can run.
    pub(crate) can_run: bool,
    /// What that check finds wrong.
    pub(crate) complaints: Vec<String>,
    /// Every test that ran.
    pub(crate) tests: Vec<Tested>,
}

impl Findings {
    /// The kernel's version without what is corrected within it: "6.1".
    pub(crate) fn series(&self) -> String {
        let numbers: Vec<&str> = self.release.split(['.', '-', '+']).take(2).collect();
        numbers.join(".")
    }
}

/// A program, and whether the kernel takes it.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// The object's file name.
    pub(crate) object: String,
    /// The program's name.
    pub(crate) program: String,
    /// How many instructions the verifier looked at; kernels before 5.16 do not tell.
    pub(crate) verified: Option<u64>,
    /// Why it does not load, with the end of the verifier's log.
    pub(crate) error: Option<String>,
}

/// A test, and how it ended.
#[derive(Debug)]
pub(crate) struct Tested {
    /// File and name.
    pub(crate) name: String,
    /// What it said, if it failed.
    pub(crate) error: Option<String>,
    /// How long it took, of the machine's time.
    pub(crate) seconds: f64,
}

/// A machine to be emulated.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) command_line: &'a str,
    pub(crate) memory_mib: u32,
    /// Whatever happens, it is switched off after this.
    pub(crate) deadline: Duration,
}

/// How it ended, and the files of its serial lines.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None` if it had to be switched off.
    pub(crate) status: Option<ExitStatus>,
    /// The first line.
    pub(crate) console: PathBuf,
    /// The second one.
    pub(crate) report: PathBuf,
}

impl Machine<'_> {
    /// Boots it with `initramfs` and waits for its end; files are made in `directory`. QEMU runs in `cgroup`, whose
    /// owner sees to it that nothing is left there.
    ///
    /// # Errors
    /// If it does not start.
    pub(crate) fn run(&self, initramfs: &[u8], directory: &Path, cgroup: &Cgroup) -> Result<Ended> {
        let file = |name: &str| directory.join(name);
        let (packed, console, report) = (file("initramfs"), file("console"), file("report"));
        fs::write(&packed, initramfs).with_context(|| format!("writing {}", packed.display()))?;
        for old in [&console, &report] {
            fs::write(old, "").with_context(|| format!("writing {}", old.display()))?;
        }
        let mut machine = Program::new(QEMU)
            .in_cgroup(cgroup)
            .args(["-accel", "tcg,tb-size=512"])
            .args(["-cpu", processor(&self.kernel.release)])
            .args(["-smp", "1", "-m"])
            .arg(self.memory_mib.to_string())
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-no-reboot")
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-serial")
            .arg(format!("file:{}", report.display()))
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&packed)
            .args(["-append", self.command_line])
            .log(&console)
            .spawn()?;
        // Killed when dropped, however this ends.
        let status = machine.wait(self.deadline)?;
        drop(machine);
        // Made anew each time, and large.
        fs::remove_file(&packed).with_context(|| format!("removing {}", packed.display()))?;
        Ok(Ended {
            status,
            console,
            report,
        })
    }
}

/// Boots `kernel` with `initramfs`; both serial lines are written to files in `directory`. QEMU runs in `cgroup`,
/// whose owner sees to it that nothing is left there.
///
/// # Errors
/// If the machine does not start, or does not come to its end; with the end of what it said.
pub(crate) fn boot(
    kernel: &Kernel,
    initramfs: &[u8],
    directory: &Path,
    cgroup: &Cgroup,
) -> Result<Findings> {
    let machine = Machine {
        kernel,
        command_line: KERNEL,
        memory_mib: 1024,
        deadline: DEADLINE,
    };
    let Ended {
        status: ended,
        console,
        report,
    } = machine.run(initramfs, directory, cgroup)?;
    let said = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let why = match ended {
        None => format!("the machine was not done after {DEADLINE:?}"),
        Some(status) => format!("the machine ended too early ({status})"),
    };
    read(&said(&report)).with_context(|| {
        let text = said(&console);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL)..);
        format!(
            "{why}; its console:\n{}",
            tail.unwrap_or_default().join("\n")
        )
    })
}

/// The processor to emulate. QEMU 7.2 spoils the flags when it emulates CMPXCHG16B: 6.12 crashes, in two boots of
/// three, as it allocates memory. 7.2 gives no storage to sockets without that instruction, and does not crash.
fn processor(release: &str) -> &'static str {
    let major = release
        .split('.')
        .next()
        .and_then(|major| major.parse().ok());
    if major.is_some_and(|major: u32| major < 7) {
        "qemu64,+rdrand,-cx16"
    } else {
        "qemu64,+rdrand,+cx16"
    }
}

/// Reads the report, which must have its end.
fn read(report: &str) -> Result<Findings> {
    let mut findings = Findings::default();
    for line in report.lines() {
        let line: Value =
            serde_json::from_str(line).with_context(|| format!("reading its report: {line}"))?;
        let text = |key: &str| line.get(key).and_then(Value::as_str).map(str::to_owned);
        if let Some(release) = text("kernel") {
            findings.release = release;
            let lacks = line.get("lacks").and_then(Value::as_array);
            let lacks = lacks.into_iter().flatten().filter_map(Value::as_str);
            findings.lacks = lacks.map(str::to_owned).collect();
        } else if let (Some(object), Some(program)) = (text("object"), text("program")) {
            let log = text("log").unwrap_or_default();
            findings.programs.push(Loaded {
                object,
                program,
                verified: line.get("verified").and_then(Value::as_u64),
                error: text("error").map(|error| format!("{error}\n{log}").trim().to_owned()),
            });
        } else if let (Some(file), Some(test)) = (text("file"), text("test")) {
            findings.tests.push(Tested {
                name: format!("{file}: {test}"),
                error: text("error"),
                seconds: line
                    .get("seconds")
                    .and_then(Value::as_f64)
                    .unwrap_or_default(),
            });
        } else if let Some(check) = line.get("check").and_then(Value::as_array) {
            findings.can_run = line.get("can_run") == Some(&Value::Bool(true));
            findings.complaints = check.iter().filter_map(complaint).collect();
        } else if let Some(error) = text("broken") {
            bail!("the machine's program fails: {error}");
        } else if line.get("done").is_some() {
            return Ok(findings);
        }
    }
    bail!("its report has no end")
}

/// One finding of the agent's check, if it fails.
fn complaint(finding: &Value) -> Option<String> {
    let text = |key: &str| finding.get(key).and_then(Value::as_str);
    (text("status") == Some("fail")).then(|| {
        let detail = text("detail").unwrap_or_default();
        // Its log is shown where the program is loaded by this test.
        let detail = detail.split("; the verifier's").next().unwrap_or(detail);
        format!("{}: {detail}", text("name").unwrap_or_default())
    })
}
