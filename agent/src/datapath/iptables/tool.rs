//! Running `iptables-save` and `iptables-restore`, of the one kind or the other.
//!
//! The only programs that the agent runs. They act on the network namespace of the calling thread.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, memfd_create},
    process::{Pid, PidfdFlags, pidfd_open},
    time::Timespec,
};

use super::rules::Family;

/// They take milliseconds, unless another one holds their lock, for which they wait 2 seconds.
const LIMIT: Duration = Duration::from_secs(5);

/// The two programs that speak to the two implementations in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// `iptables-nft`: nftables.
    Nft,
    /// `iptables-legacy`: xtables.
    Legacy,
}

impl Variant {
    /// As the configuration calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

/// Which of them to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The one that this host uses: that has rules, or else nftables.
    OfHost,
    /// This one.
    Only(Variant),
}

impl Choice {
    /// Finds out which one that is.
    ///
    /// # Errors
    /// If neither is installed.
    pub(super) fn resolve(self) -> Result<Variant, ToolError> {
        match self {
            Self::OfHost => detect(),
            Self::Only(variant) => Ok(variant),
        }
    }
}

/// A program failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be run.
    #[error("run {program}{}", if source.kind() == io::ErrorKind::NotFound { " (install the package iptables)" } else { "" })]
    Run {
        /// Its name.
        program: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It ran and said no.
    #[error("{program} ended with {status}: {said}")]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// It did not end.
    #[error("{program} did not end within {} s", LIMIT.as_secs())]
    Endless {
        /// Its name.
        program: String,
    },
    /// Neither kind is there.
    #[error(
        "neither iptables-nft-restore nor iptables-legacy-restore is there: install the package iptables"
    )]
    Missing,
}

/// The one that has rules, nftables if both have, or none.
fn detect() -> Result<Variant, ToolError> {
    let rules = |variant| {
        let saved = save(variant, Family::V4).ok()?;
        Some(saved.lines().filter(|line| line.starts_with("-A ")).count())
    };
    let nft = rules(Variant::Nft);
    // Asking makes the tables, and tables that are there slow every packet down.
    let legacy = if nft.is_none() || has_legacy_tables() {
        rules(Variant::Legacy)
    } else {
        None
    };
    match (nft, legacy) {
        (None, None) => Err(ToolError::Missing),
        (None, Some(_)) | (Some(0), Some(1..)) => Ok(Variant::Legacy),
        (Some(_), _) => Ok(Variant::Nft),
    }
}

/// Whether somebody made tables of the legacy kind in the namespace of the calling thread.
pub(super) fn has_legacy_tables() -> bool {
    ["ip_tables_names", "ip6_tables_names"].iter().any(|file| {
        // What /proc/self says is of the process's first thread.
        let names = std::fs::read(format!("/proc/thread-self/net/{file}"));
        names.is_ok_and(|names| !names.is_empty())
    })
}

/// All tables that there are.
///
/// # Errors
/// [`ToolError`].
pub(super) fn save(variant: Variant, family: Family) -> Result<String, ToolError> {
    run(&program(variant, family, "save"), &[], "")
}

/// Changes what `rules` name, and nothing else.
///
/// # Errors
/// [`ToolError`]; then the tables before the one that failed are changed.
pub(super) fn restore(variant: Variant, family: Family, rules: &str) -> Result<(), ToolError> {
    // The one for nftables knows --wait, and has no lock.
    let arguments = ["--noflush", "--wait", "2"];
    run(&program(variant, family, "restore"), &arguments, rules).map(drop)
}

fn program(variant: Variant, family: Family, action: &str) -> String {
    let tool = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    format!("{tool}-{}-{action}", variant.as_str())
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, ToolError> {
    let fails = |source| ToolError::Run {
        program: program.to_owned(),
        source,
    };
    // Files, not pipes: nobody waits for somebody to read.
    let mut files = [(); 3].map(|()| memory(program));
    let [stdin, stdout, stderr] = &mut files;
    let (stdin, stdout, stderr) = match (stdin, stdout, stderr) {
        (Ok(stdin), Ok(stdout), Ok(stderr)) => (stdin, stdout, stderr),
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
            return Err(fails(io::Error::new(error.kind(), error.to_string())));
        }
    };
    stdin.write_all(input.as_bytes()).map_err(fails)?;
    stdin.rewind().map_err(fails)?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::from(stdin.try_clone().map_err(fails)?))
        .stdout(Stdio::from(stdout.try_clone().map_err(fails)?))
        .stderr(Stdio::from(stderr.try_clone().map_err(fails)?))
        .spawn()
        .map_err(fails)?;
    let Some(status) = wait(&mut child).map_err(fails)? else {
        return Err(ToolError::Endless {
            program: program.to_owned(),
        });
    };
    if status.success() {
        return read(stdout).map_err(fails);
    }
    Err(ToolError::Failed {
        program: program.to_owned(),
        status,
        said: read(stderr).map_err(fails)?.trim().to_owned(),
    })
}

fn memory(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

fn read(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `None` if it had to be killed.
fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let process = Pid::from_child(child);
    let ends = pidfd_open(process, PidfdFlags::empty())?;
    let limit = Timespec::try_from(LIMIT).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(&ends, PollFlags::IN)], Some(&limit))? == 0 {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_errors_are_told_apart_and_input_of_any_size_is_read() {
        let long = "x".repeat(1 << 20);
        assert_eq!(run("cat", &[], &long).unwrap(), long);
        let error = run("cat", &["/nowhere"], "").unwrap_err();
        assert!(
            matches!(&error, ToolError::Failed { said, .. } if said.contains("/nowhere")),
            "{error}"
        );
        let error = run("no-such-program", &[], "").unwrap_err();
        assert!(
            error.to_string().contains("install the package iptables"),
            "{error}"
        );
    }
}
