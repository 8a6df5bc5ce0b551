//! `cargo xtask dist`: the agent as a package for Debian, `target/dist/sidestep_VERSION_ARCHITECTURE.deb`.

mod licences;
mod stage;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build, host,
    progress::{Step, say},
};

/// Programs that make a package, and the one that looks at it.
const NEEDED: [&str; 5] = ["dpkg-deb", "dpkg-shlibdeps", "gzip", "strip", "lintian"];

/// What lintian says and does not hold here: no bug of the Debian project asks for this package.
const TOLERATED: &str = "initial-upload-closes-no-bugs";

/// See [`crate::Command::Dist`].
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// The part of the package's version behind the agent's: a higher one upgrades.
    #[arg(long, default_value_t = 1)]
    revision: u32,
}

/// Makes the package and says where it is.
///
/// # Errors
/// If something does not build, or lintian finds an error.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    host::require(&NEEDED)?;
    let contents = contents()?;
    let package = package(&contents, arguments.revision)?;
    look_at(&package)?;
    say(package.display());
    Ok(ExitCode::SUCCESS)
}

/// What goes into a package, built.
#[derive(Debug)]
pub(crate) struct Contents {
    /// The agent, for production.
    agent: PathBuf,
    /// `man/` and `completions/`.
    command_line: PathBuf,
}

/// Builds all that goes into a package.
///
/// # Errors
/// If it does not compile.
pub(crate) fn contents() -> Result<Contents> {
    build::ebpf_programs()?;
    let agent = build::release_agent()?;
    let command_line = directory().join("command-line");
    let step = Step::begin("writing manual pages and completions");
    // Pages of subcommands that are gone would stay.
    empty(&command_line)?;
    let example = ["run", "--package", "sidestep", "--example", "command_line"];
    step.run(build::cargo(&example).arg(&command_line))?;
    step.done();
    Ok(Contents {
        agent,
        command_line,
    })
}

/// Packs it. Returns the package.
///
/// # Errors
/// If a file is missing or a program of Debian's fails.
pub(crate) fn package(contents: &Contents, revision: u32) -> Result<PathBuf> {
    let step = Step::begin("packing for Debian");
    let root = directory().join("root");
    empty(&root)?;
    let version = format!("{}-{revision}", env!("CARGO_PKG_VERSION"));
    let architecture = first_line(&step, Command::new("dpkg").arg("--print-architecture"))?;
    // The time of everything in the package: the same sources make the same bytes.
    let epoch = first_line(&step, &mut git(&["log", "-1", "--format=%ct"]))?;
    let stage = stage::Stage {
        root: &root,
        version: &version,
        architecture: &architecture,
        epoch: &epoch,
        step: &step,
    };
    stage.fill(contents)?;
    let package = directory().join(format!("sidestep_{version}_{architecture}.deb"));
    step.run(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zxz", "--build"])
            .arg(&root)
            .arg(&package)
            .env("SOURCE_DATE_EPOCH", &epoch),
    )?;
    step.done();
    Ok(package)
}

/// Debian's checker. Its errors and warnings end the run.
fn look_at(package: &Path) -> Result<()> {
    let step = Step::begin("checking the package with lintian");
    step.run(
        Command::new("lintian")
            .args(["--fail-on", "error,warning", "--allow-root"])
            .args(["--suppress-tags", TOLERATED])
            .arg(package),
    )?;
    step.done();
    Ok(())
}

/// Where packages are made.
fn directory() -> PathBuf {
    build::workspace().join("target/dist")
}

fn git(arguments: &[&str]) -> Command {
    let mut command = Command::new("git");
    command.args(arguments).current_dir(build::workspace());
    command
}

fn first_line(step: &Step, command: &mut Command) -> Result<String> {
    match step.run(command)?.into_iter().next() {
        Some(line) => Ok(line),
        None => bail!("{} said nothing", command.get_program().to_string_lossy()),
    }
}

fn empty(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("removing {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))
}
