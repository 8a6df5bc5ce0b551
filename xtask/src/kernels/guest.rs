//! What runs in the virtual machine: our test programs and what they call, from this machine, in an initramfs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::programs;
use serde_json::Value;

use super::{archive::Archive, debian::Kernel};
use crate::{build, progress::Step};

/// The first program, an example of `bpf-tests`.
const INIT: &str = "kernel_guest";

/// The tests that are run, of `bpf-tests`.
const TESTS: [&str; 6] = [
    "away_policy",
    "bpf_syscalls",
    "client_behaviour",
    "datapath_limits",
    "dns_capture",
    "pinned_datapath",
];

/// Beside the test programs, who look for it there.
const PEER: &str = "sidestep-peer";

/// The agent.
const AGENT: &str = "sidestep";

/// Programs of this machine that the tests start.
const PROGRAMS: [&str; 3] = ["ip", "mount", "umount"];

/// What the tests' clients import, and what Python does by itself when they use it.
const PYTHON_MODULES: &str =
    "ctypes, encodings.idna, errno, json, os, select, signal, socket, struct, sys, time";

/// Everything but the kernel's modules. Only tests whose names contain `wanted` will run.
///
/// # Errors
/// If something is not built or not here.
pub(crate) fn pack(wanted: &str) -> Result<Archive> {
    let step = Step::begin("building the kernel tests for other kernels");
    let built = build_programs(&step)?;
    step.done();
    let step = Step::begin("packing them with what they need");
    let mut archive = Archive::default();
    archive.console()?;
    for directory in ["/guest/tests", "/guest/modules", "/guest/objects", "/root"] {
        archive.directory(directory)?;
    }
    for (name, file) in &built {
        let target = match name.as_str() {
            INIT => "/init".to_owned(),
            PEER | AGENT => format!("/guest/{name}"),
            test => format!("/guest/tests/{test}"),
        };
        // Nine tenths of it are for debuggers.
        let stripped = build::workspace().join(format!("target/kernels/{name}"));
        step.run(Command::new("strip").arg("-o").arg(&stripped).arg(file))?;
        add_program(&mut archive, &stripped, &target)?;
    }
    for object in fs::read_dir(build::workspace().join("target/bpf"))?.flatten() {
        let name = object.file_name().to_string_lossy().into_owned();
        if name.ends_with(".bpf.o") {
            archive.copy(&object.path(), &format!("/guest/objects/{name}"))?;
        }
    }
    archive.file("/guest/wanted", wanted.as_bytes())?;
    for name in PROGRAMS {
        let path = programs::find(name).with_context(|| format!("there is no program {name}"))?;
        add_program(&mut archive, &path, &format!("/usr/bin/{name}"))?;
    }
    add_python(&mut archive)?;
    step.done();
    Ok(archive)
}

/// The initramfs for one kernel.
///
/// # Errors
/// If a module cannot be read.
pub(crate) fn with_modules(archive: &Archive, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = archive.clone();
    for (index, module) in kernel.modules.iter().enumerate() {
        archive.copy(module, &format!("/guest/modules/{index}.ko"))?;
    }
    archive.finish()
}

/// Builds; names and files of programs.
fn build_programs(step: &Step) -> Result<Vec<(String, PathBuf)>> {
    let mut command = build::cargo(&["build", "--package", "sidestep", "--package", "bpf-tests"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    command.args(["--bin", AGENT, "--bin", PEER, "--example", INIT]);
    for test in TESTS {
        command.args(["--test", test]);
    }
    let said = step.run(&mut command)?;
    let built: Vec<(String, PathBuf)> = said.iter().filter_map(|line| artifact(line)).collect();
    for name in TESTS.iter().chain(&[AGENT, PEER, INIT]) {
        ensure!(
            built.iter().any(|(built, _)| built == name),
            "cargo did not say where {name} is"
        );
    }
    Ok(built)
}

/// A program's name and file, if this line of cargo's is about one.
fn artifact(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let name = message.get("target")?.get("name")?.as_str()?;
    let file = message.get("executable")?.as_str()?;
    Some((name.to_owned(), file.into()))
}

/// A program and the shared libraries that it names.
fn add_program(archive: &mut Archive, from: &Path, name: &str) -> Result<()> {
    archive.copy(from, name)?;
    for library in libraries(from)? {
        archive.copy(Path::new(&library), &library)?;
    }
    Ok(())
}

/// Paths, as the dynamic loader finds them; none for what is linked statically.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("starting ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    // "libc.so.6 => /lib/libc.so.6 (0x…)" or, for the loader, "/lib64/ld-linux-x86-64.so.2 (0x…)"
    let path = |line: &str| {
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        path.trim().split(" (").next().map(str::to_owned)
    };
    Ok(said
        .lines()
        .filter_map(path)
        .filter(|path| path.starts_with('/'))
        .collect())
}

/// Python with as much of its library as the clients need: it says itself what that is.
fn add_python(archive: &mut Archive) -> Result<()> {
    let script = format!(
        "import {PYTHON_MODULES}
print(os.path.realpath(sys.executable))
for module in list(sys.modules.values()):
    for file in [getattr(module, '__file__', None), getattr(module, '__cached__', None)]:
        if file and os.path.exists(file): print(file)"
    );
    let output = Command::new("python3")
        // Without packages that somebody has installed here.
        .args(["-I", "-S", "-c", &script])
        .output()
        .context("starting python3")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut files = said.lines();
    let python = files.next().context("python3 does not say where it is")?;
    add_program(archive, Path::new(python), python)?;
    archive.link("/usr/bin/python3", python)?;
    for file in files {
        add_program(archive, Path::new(file), file)?;
    }
    Ok(())
}
