//! apt for other releases of Debian than this machine's, from the mirror that this machine uses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::progress::Step;

/// Signs the lists of packages of every release. Not where apt looks by itself on all machines.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with a state of its own, for one release.
pub(crate) struct Apt {
    directory: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// Makes its lists and its cache below `directory`.
    ///
    /// # Errors
    /// If this machine's own packages come from no mirror of Debian.
    pub(crate) fn new(suite: &str, directory: &Path, step: &Step) -> Result<Self> {
        for below in ["state/lists/partial", "cache/archives/partial"] {
            let below = directory.join(below);
            fs::create_dir_all(&below).with_context(|| format!("creating {}", below.display()))?;
        }
        let keyring = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let sources = directory.join("sources.list");
        fs::write(
            &sources,
            format!("deb {keyring}{} {suite} main\n", mirror(step)?),
        )
        .with_context(|| format!("writing {}", sources.display()))?;
        let options = [
            format!("Dir::State={}", directory.join("state").display()),
            format!("Dir::Cache={}", directory.join("cache").display()),
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            // Nothing is installed, as far as this apt knows.
            "Dir::State::Status=/dev/null".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // What software centres show; fetched where one is installed.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // It writes below target/, where apt's own user may not.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Self {
            directory: directory.to_owned(),
            options: options.to_vec(),
        })
    }

    /// Runs `apt-get` or `apt-cache`, which leave what they download in the directory.
    ///
    /// # Errors
    /// If it fails; with the end of what it said.
    pub(crate) fn run(
        &self,
        step: &Step,
        program: &str,
        arguments: &[&str],
    ) -> Result<Vec<String>> {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command.args(arguments).current_dir(&self.directory);
        step.run(&mut command)
    }
}

/// Where this machine's own packages come from. apt knows whose they are once it has fetched its lists.
///
/// # Errors
/// If they come from no mirror of Debian.
pub(crate) fn mirror(step: &Step) -> Result<String> {
    if let Some(mirror) = known_mirror()? {
        return Ok(mirror);
    }
    step.run(Command::new("apt-get").arg("update"))?;
    known_mirror()?.context("this machine's own packages come from no mirror of Debian")
}

fn known_mirror() -> Result<Option<String>> {
    let format = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)";
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", format])
        .output()
        .context("asking apt-get for this machine's mirror")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let mirror = said
        .lines()
        .find_map(|line| line.strip_prefix("Debian|Debian|main|"));
    Ok(mirror.map(str::to_owned))
}
