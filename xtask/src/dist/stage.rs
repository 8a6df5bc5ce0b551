//! The package's file tree, as dpkg-deb takes it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{Contents, first_line, licences};
use crate::{build, progress::Step};

const MAINTAINER: &str = "Sidestep maintainers <maintainers@sidestep.example>";

/// Where Debian wants each shell's completions, by the names that clap gives them.
const COMPLETIONS: [(&str, &str); 3] = [
    (
        "sidestep.bash",
        "usr/share/bash-completion/completions/sidestep",
    ),
    ("_sidestep", "usr/share/zsh/vendor-completions/_sidestep"),
    (
        "sidestep.fish",
        "usr/share/fish/vendor_completions.d/sidestep.fish",
    ),
];

/// Made empty for who configures the agent.
const DIRECTORIES: [&str; 2] = ["etc/sidestep/sidestep.d", "etc/sidestep/catalog"];

const DOC: &str = "usr/share/doc/sidestep";

/// A tree that is being filled.
pub(super) struct Stage<'a> {
    pub(super) root: &'a Path,
    /// Of the package.
    pub(super) version: &'a str,
    pub(super) architecture: &'a str,
    /// Seconds since 1970 that stand in its files.
    pub(super) epoch: &'a str,
    pub(super) step: &'a Step,
}

impl Stage<'_> {
    /// Puts everything where it belongs.
    pub(super) fn fill(&self, contents: &Contents) -> Result<()> {
        for directory in DIRECTORIES {
            self.directory(directory)?;
        }
        let agent = self.copy(&contents.agent, "usr/bin/sidestep", 0o755)?;
        self.step.run(
            Command::new("strip")
                .args(["--strip-unneeded", "--remove-section=.comment"])
                .arg(&agent),
        )?;
        let manifests = build::workspace().join("manifests");
        self.copy(
            &manifests.join("systemd/sidestep.service"),
            "usr/lib/systemd/system/sidestep.service",
            0o644,
        )?;
        self.copy_all(
            &contents.command_line.join("man"),
            "usr/share/man/man1",
            true,
        )?;
        for (name, target) in COMPLETIONS {
            let from = contents.command_line.join("completions").join(name);
            self.copy(&from, target, 0o644)?;
        }
        self.documents(&manifests)?;
        for script in ["postinst", "prerm", "postrm"] {
            let from = manifests.join("debian").join(script);
            self.copy(&from, &format!("DEBIAN/{script}"), 0o755)?;
        }
        self.checksums()?;
        self.control(&agent)
    }

    fn documents(&self, manifests: &Path) -> Result<()> {
        let workspace = build::workspace();
        self.copy(
            &manifests.join("debian/copyright"),
            &format!("{DOC}/copyright"),
            0o644,
        )?;
        self.copy(
            &manifests.join("sidestep.toml"),
            &format!("{DOC}/examples/sidestep.toml"),
            0o644,
        )?;
        self.copy_all(&workspace.join("docs"), DOC, false)?;
        let news = self.copy(
            &workspace.join("CHANGELOG.md"),
            &format!("{DOC}/changelog"),
            0o644,
        )?;
        self.gzip(&news)?;
        let date = format!("@{}", self.epoch);
        let date = first_line(
            self.step,
            Command::new("date")
                .env("LC_ALL", "C")
                .args(["-uRd", &date]),
        )?;
        let version = self.version;
        let packaged = format!(
            "sidestep ({version}) stable; urgency=medium\n\n  * What is new is in changelog.gz.\n\n \
             -- {MAINTAINER}  {date}\n"
        );
        let packaged = self.write(&format!("{DOC}/changelog.Debian"), &packaged)?;
        self.gzip(&packaged)?;
        let third = self.write(
            &format!("{DOC}/third-party-licences"),
            &licences::of_the_agent(self.step)?,
        )?;
        self.gzip(&third)
    }

    /// `DEBIAN/control`, with the libraries that the program needs as dpkg-shlibdeps finds them.
    fn control(&self, agent: &Path) -> Result<()> {
        // It wants to run in a source package.
        let source = self.root.with_file_name("source");
        super::empty(&source.join("debian"))?;
        let text = "Source: sidestep\n\nPackage: sidestep\nArchitecture: any\n";
        fs::write(source.join("debian/control"), text).context("writing a control file")?;
        let said = self.step.run(
            Command::new("dpkg-shlibdeps")
                .args(["-O", "-e"])
                .arg(agent)
                .current_dir(&source),
        )?;
        let libraries = said
            .iter()
            .find_map(|line| line.strip_prefix("shlibs:Depends="))
            .context("dpkg-shlibdeps names no library")?;
        let kibibytes = size(self.root)?.div_ceil(1024);
        let Self {
            version,
            architecture,
            ..
        } = self;
        let control = format!(
            "Package: sidestep\n\
             Version: {version}\n\
             Architecture: {architecture}\n\
             Maintainer: {MAINTAINER}\n\
             Installed-Size: {kibibytes}\n\
             Depends: {libraries}, init-system-helpers (>= 1.65)\n\
             Recommends: systemd (>= 252)\n\
             Section: net\n\
             Priority: optional\n\
             Description: service mesh with one agent per node, captured by eBPF\n \
             Every process of a node gets mutual TLS, an identity and intentions for its\n \
             TCP connections to services. eBPF programs take connections to virtual\n \
             addresses at connect(); the agent carries them to the right node.\n \
             .\n \
             There are no sidecars, iptables rules or changes to the applications.\n"
        );
        self.write("DEBIAN/control", &control).map(drop)
    }

    fn checksums(&self) -> Result<()> {
        let mut files = vec![];
        walk(self.root, &mut |path| files.push(path.to_owned()))?;
        files.sort();
        let names = files
            .iter()
            .filter_map(|path| path.strip_prefix(self.root).ok())
            .filter(|name| !name.starts_with("DEBIAN"));
        let lines = self
            .step
            .run(Command::new("md5sum").args(names).current_dir(self.root))?;
        self.write("DEBIAN/md5sums", &(lines.join("\n") + "\n"))
            .map(drop)
    }

    fn directory(&self, name: &str) -> Result<PathBuf> {
        let mut path = self.root.to_owned();
        for part in Path::new(name) {
            path.push(part);
            fs::create_dir_all(&path)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                .with_context(|| format!("creating {}", path.display()))?;
        }
        Ok(path)
    }

    /// Where a file of this name goes; its directory is there.
    fn place(&self, name: &str) -> Result<PathBuf> {
        if let Some((above, _)) = name.rsplit_once('/') {
            self.directory(above)?;
        }
        Ok(self.root.join(name))
    }

    fn copy(&self, from: &Path, name: &str, mode: u32) -> Result<PathBuf> {
        let target = self.place(name)?;
        fs::copy(from, &target)
            .and_then(|_bytes| fs::set_permissions(&target, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("copying {}", from.display()))?;
        Ok(target)
    }

    /// The files of a directory, not those below.
    fn copy_all(&self, from: &Path, name: &str, packed: bool) -> Result<()> {
        for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let file = entry.file_name();
                let target = format!("{name}/{}", file.to_string_lossy());
                let copy = self.copy(&entry.path(), &target, 0o644)?;
                if packed {
                    self.gzip(&copy)?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let target = self.place(name)?;
        fs::write(&target, text)
            .and_then(|()| fs::set_permissions(&target, fs::Permissions::from_mode(0o644)))
            .with_context(|| format!("writing {}", target.display()))?;
        Ok(target)
    }

    /// In place, without name and time.
    fn gzip(&self, file: &Path) -> Result<()> {
        let packed = self.step.run(Command::new("gzip").arg("-9n").arg(file));
        packed.map(drop)
    }
}

/// Bytes of all files below.
fn size(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    walk(directory, &mut |path| {
        bytes += path.metadata().map_or(0, |metadata| metadata.len());
    })?;
    Ok(bytes)
}

/// Each file below.
fn walk(directory: &Path, each: &mut dyn FnMut(&Path)) -> Result<()> {
    let fails = || format!("reading {}", directory.display());
    for entry in fs::read_dir(directory).with_context(fails)? {
        let path = entry.with_context(fails)?.path();
        if path.is_dir() {
            walk(&path, each)?;
        } else {
            each(&path);
        }
    }
    Ok(())
}
