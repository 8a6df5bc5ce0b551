//! Building the eBPF programs: finds a compiler that can, and its linker, or installs them.
//!
//! Wanted are a rustc with the source of `core` beside it, since none is shipped for the BPF machine, and a
//! `bpf-linker` that was built for the same major version of LLVM. rustup's stable has no stable way to
//! build `core`; `RUSTC_BOOTSTRAP` opens it, as distributions do for their own builds.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::host::{Wanted, apt_install};

/// The release of bpf-linker that is known to work with the LLVM majors below.
const LINKER_VERSION: &str = "0.13.0";

/// The majors of LLVM that it can be built for.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// What is built of the programs: the object's name and the features that make it.
const OBJECTS: [(&str, &[&str]); 2] = [("sidestep.bpf.o", &[]), ("sidestep-log.bpf.o", &["log"])];

/// A compiler that can build for the BPF machine.
#[derive(Debug)]
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    llvm: u32,
}

/// Builds `target/bpf/sidestep.bpf.o` and the same with logging, `target/bpf/sidestep-log.bpf.o`; returns their
/// folder. Writes them only if they changed. `install` says whether Debian's packages and bpf-linker may be
/// installed if nothing that is there fits.
///
/// # Errors
/// If nothing that is there can build it and nothing may or can be installed; says what to install.
pub(crate) fn build(
    workspace: &Path,
    install: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    let target = workspace.join("target/bpf");
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    // Another copy may be building in the same workspace.
    let lock = File::create(target.join("lock")).context("create the lock of the eBPF build")?;
    lock.lock().context("wait for the lock of the eBPF build")?;

    let toolchain = toolchain(install, progress)?;
    let linker = linker(workspace, &toolchain, install, progress)?;
    progress("compiling the eBPF programs");
    let built = workspace.join("target/bpf-build/bpfel-unknown-none/release/sidestep");
    for (object, features) in OBJECTS {
        compile(workspace, &toolchain, &linker, features)?;
        install_object(&built, &target.join(object))?;
    }
    Ok(target)
}

fn toolchain(install: bool, progress: &mut dyn FnMut(&str)) -> Result<Toolchain> {
    if let Some(found) = candidates().into_iter().find_map(usable) {
        return Ok(found);
    }
    let advice = "install Debian's rustc-web, cargo-web and rust-web-src, or a rustup toolchain with the \
                  component rust-src whose LLVM is 21 to 23";
    if !install || !is_root() {
        bail!("no rustc here can build the eBPF programs: {advice}");
    }
    progress("installing Debian's rustc-web, cargo-web and rust-web-src");
    apt_install(&["rustc-web", "cargo-web", "rust-web-src"], Wanted::Newest)?;
    candidates().into_iter().find_map(usable).with_context(|| {
        format!("Debian's rustc-web cannot build the eBPF programs either: {advice}")
    })
}

/// rustc and cargo of rustup's toolchains, then of the distribution.
fn candidates() -> Vec<(PathBuf, PathBuf)> {
    let home = env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")));
    let toolchains = home.and_then(|home| fs::read_dir(home.join("toolchains")).ok());
    let mut found: Vec<PathBuf> = toolchains
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    found.sort();
    found.push("/usr/bin".into());
    found
        .into_iter()
        .map(|bin| (bin.join("rustc"), bin.join("cargo")))
        .collect()
}

/// A toolchain that has the source of `core` and an LLVM that bpf-linker knows.
fn usable((rustc, cargo): (PathBuf, PathBuf)) -> Option<Toolchain> {
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"]))?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    let version = output(Command::new(&rustc).arg("-vV"))?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    let llvm = llvm.split('.').next()?.parse().ok()?;
    let fits = core.exists() && cargo.exists() && LINKER_LLVM.contains(&llvm);
    fits.then_some(Toolchain { rustc, cargo, llvm })
}

/// The linker for the toolchain's LLVM, built if need be. One per major of LLVM, under `target/tools`.
fn linker(
    workspace: &Path,
    toolchain: &Toolchain,
    install: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    let llvm = toolchain.llvm;
    let root = workspace.join(format!(
        "target/tools/bpf-linker-{LINKER_VERSION}-llvm-{llvm}"
    ));
    let linker = root.join("bin/bpf-linker");
    if linker.exists() {
        return Ok(linker);
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    // The programs of LLVM alone do not do: its headers and libraries are wanted.
    if !prefix.join("include/llvm").exists() {
        let package = format!("llvm-{llvm}-dev");
        if !install || !is_root() {
            bail!("bpf-linker is built with Debian's {package}, which is missing: install it");
        }
        progress(&format!("installing Debian's {package}"));
        apt_install(&[&package], Wanted::Any)?;
    }
    progress("building bpf-linker");
    let mut cargo = Command::new("cargo");
    cargo
        .args([
            "install",
            "bpf-linker",
            "--version",
            LINKER_VERSION,
            "--locked",
        ])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ])
        .arg("--root")
        .arg(&root)
        .arg("--target-dir")
        .arg(workspace.join("target/tools/build"))
        .env("LLVM_PREFIX", &prefix)
        .current_dir("/");
    run(&mut cargo, "build bpf-linker")?;
    Ok(linker)
}

fn compile(
    workspace: &Path,
    toolchain: &Toolchain,
    linker: &Path,
    features: &[&str],
) -> Result<()> {
    // No path of this machine in them: they are part of what names symbols, and with the names the order of functions
    // would change, and how much work the verifier has.
    let flags = [
        "-Clink-arg=--btf".to_owned(),
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
    ];
    let mut cargo = Command::new(&toolchain.cargo);
    cargo
        .args(["build", "--release", "--locked", "-Zbuild-std=core"])
        // Nor in debug information.
        .args(["-Ztrim-paths", "--config", "profile.release.trim-paths=\"all\""])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(workspace.join("target/bpf-build"))
        .current_dir(workspace.join("ebpf"))
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        // Set by the cargo that runs this; they mean another toolchain.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .env_remove("RUSTFLAGS");
    cargo.arg("--features").arg(features.join(","));
    run(&mut cargo, "compile the eBPF programs")
}

/// Replaces the object at once and only if it differs: the agent is built anew when it changes.
fn install_object(built: &Path, object: &Path) -> Result<()> {
    let bytes = fs::read(built).with_context(|| format!("read {}", built.display()))?;
    if fs::read(object).ok().as_ref() != Some(&bytes) {
        let temporary = object.with_extension("new");
        fs::write(&temporary, &bytes).with_context(|| format!("write {}", temporary.display()))?;
        fs::rename(&temporary, object).with_context(|| format!("write {}", object.display()))?;
    }
    Ok(())
}

/// Runs a command; shows what it said only if it fails.
fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{what}: start {}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(40)..)
        .unwrap_or_default()
        .join("\n");
    bail!("{what}: {}\n{last}", output.status);
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
