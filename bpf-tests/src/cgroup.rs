//! Scratch cgroups: made, joined and removed with everything inside.

use std::{
    fs::{self, OpenOptions},
    io::ErrorKind,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::wait::{SOON, wait_for};

/// A cgroup (v2), named by its path below the mount, as `/a/b`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: String,
    directory: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup `path` and those above it, as needed.
    ///
    /// # Errors
    /// Without cgroup2 or without permission.
    pub fn create(path: &str) -> Result<Self> {
        let directory = directory_of(path)?;
        fs::create_dir_all(&directory)
            .with_context(|| format!("creating the cgroup {}", directory.display()))?;
        Ok(Self {
            path: path.to_owned(),
            directory,
        })
    }

    /// Makes a cgroup below this one.
    ///
    /// # Errors
    /// Without permission.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::create(&format!("{}/{name}", self.path))
    }

    /// Its path below the mount, as configurations name it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file into which a process writes `0` to join.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn entrance(&self) -> Result<OwnedFd> {
        let file = self.directory.join("cgroup.procs");
        let file = OpenOptions::new()
            .write(true)
            .open(&file)
            .with_context(|| format!("opening {}", file.display()))?;
        Ok(file.into())
    }

    /// Moves the calling process in.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        fs::write(self.directory.join("cgroup.procs"), "0")
            .with_context(|| format!("entering the cgroup {}", self.path))
    }

    /// Processor time (user and kernel) that its processes have used, as far as the kernel attributes it.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn processor_time(&self) -> Result<Duration> {
        let file = self.directory.join("cpu.stat");
        let text =
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let micros = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("no usage_usec in {}", file.display()))?;
        Ok(Duration::from_micros(micros))
    }

    /// Ends every process in it and below, and waits until they are gone.
    ///
    /// # Errors
    /// If one resists.
    pub fn kill(&self) -> Result<()> {
        kill(&self.directory)
    }
}

/// Where cgroup2 is mounted: at `/sys/fs/cgroup`, or below on hosts that have v1 too.
///
/// # Errors
/// If it is not.
pub fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ');
            let (root, point) = (left.nth(3)?, left.next()?);
            (right.split(' ').next() == Some("cgroup2") && root == "/").then(|| point.into())
        })
        .context("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Ends everything in the cgroup `path` and removes it with those below. Nothing to do if it is not there.
///
/// # Errors
/// If a process resists.
pub fn remove_tree(path: &str) -> Result<()> {
    let directory = directory_of(path)?;
    if !directory.exists() {
        return Ok(());
    }
    kill(&directory)?;
    remove_directories(&directory)
        .with_context(|| format!("removing the cgroup {}", directory.display()))
}

fn directory_of(path: &str) -> Result<PathBuf> {
    Ok(mount()?.join(path.trim_start_matches('/')))
}

fn kill(directory: &Path) -> Result<()> {
    match fs::write(directory.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        killed => killed.with_context(|| format!("killing {}", directory.display()))?,
    }
    wait_for(
        &format!("the processes of {} to end", directory.display()),
        SOON,
        || {
            fs::read_to_string(directory.join("cgroup.events"))
                .map_or(true, |events| events.contains("populated 0"))
        },
    )
}

/// Only directories: the files of a cgroup cannot be removed and go with it.
fn remove_directories(directory: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(directory) {
        // Another process removes it too.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_directories(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
