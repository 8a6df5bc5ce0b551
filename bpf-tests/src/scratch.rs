//! One run's traces on the machine: a directory, a cgroup, mounts; all of them go when the run ends.
//!
//! A run has a name of its own and everything that it makes is found by that name, so that
//! [`remove`] needs nothing else. It is called by [`Scratch`]'s drop; by a janitor process if the run
//! dies of a signal; and by the next run for what a power cut left.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;
use rustix::{
    fs::{FlockOperation, flock},
    mount::{MountFlags, UnmountFlags, mount},
};

use crate::{cgroup, programs};

/// Where runs keep their directories. Short, since paths of Unix sockets are at most 107 bytes.
const ROOT: &str = "/run/sidestep-lab";

/// A run's directory and cgroup, removed with all processes in it when dropped.
#[derive(Debug)]
pub struct Scratch {
    name: String,
    directory: PathBuf,
    cgroup: cgroup::Cgroup,
    janitor: Option<Janitor>,
    /// Held as long as the run lives: what nobody holds is left over.
    _lock: File,
}

impl Scratch {
    /// Makes an empty run; `purpose` (a few letters) becomes part of its name.
    ///
    /// # Errors
    /// Without root, without cgroup2, or if the janitor's program is not built.
    pub fn new(purpose: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        ensure!(
            rustix::process::geteuid().is_root(),
            "needs root: it makes cgroups and network namespaces"
        );
        remove_abandoned()?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("sidestep-{purpose}-{}-{number}", std::process::id());
        let directory = Path::new(ROOT).join(&name);
        let lock = lock(&name)?;
        fs::create_dir_all(&directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let janitor = Janitor::start(&name)?;
        let cgroup = cgroup::Cgroup::create(&format!("/{name}"))?;
        Ok(Self {
            name,
            directory,
            cgroup,
            janitor: Some(janitor),
            _lock: lock,
        })
    }

    /// The run's name: unique on this machine.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The run's directory, readable by every user.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The run's cgroup; everything it starts is below.
    pub fn cgroup(&self) -> &cgroup::Cgroup {
        &self.cgroup
    }

    /// Makes a directory below the run's.
    ///
    /// # Errors
    /// As `mkdir -p`.
    pub fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(path)
    }

    /// Mounts a bpffs of its own below the run's directory.
    ///
    /// # Errors
    /// If it cannot be mounted.
    pub fn bpffs(&self, name: &str) -> Result<PathBuf> {
        let path = self.subdirectory(name)?;
        mount("bpf", &path, "bpf", MountFlags::empty(), None)
            .with_context(|| format!("mounting bpffs at {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Whatever could not be removed, the janitor tries again, and says why if it fails too.
        if remove(&self.name).is_ok()
            && let Some(janitor) = self.janitor.take()
        {
            janitor.dismiss();
        }
    }
}

/// Ends all processes of the run `name` and removes its mounts, directory and cgroup.
///
/// # Errors
/// If something resists.
pub fn remove(name: &str) -> Result<()> {
    // A signal's handler and the end of the run may want it at once.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    cgroup::remove_tree(&format!("/{name}"))?;
    let directory = Path::new(ROOT).join(name);
    for mount in mounts_below(&directory)? {
        rustix::mount::unmount(&mount, UnmountFlags::DETACH)
            .with_context(|| format!("unmounting {}", mount.display()))?;
    }
    if directory.exists() {
        fs::remove_dir_all(&directory)
            .with_context(|| format!("removing {}", directory.display()))?;
    }
    match fs::remove_file(lock_path(name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the lock of {name}"))
        }
        _ => Ok(()),
    }
}

/// Removes the runs whose process has ended without cleaning up. Returns their names.
///
/// # Errors
/// If something resists.
pub fn remove_abandoned() -> Result<Vec<String>> {
    let mut removed = vec![];
    for name in runs()? {
        let lock = match File::open(lock_path(&name)) {
            Ok(lock) => lock,
            // Its janitor was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context("looking for abandoned runs"),
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            remove(&name)?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// The names of all runs on this machine.
///
/// # Errors
/// If the directory cannot be read.
pub fn runs() -> Result<Vec<String>> {
    let entries = match fs::read_dir(ROOT) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error).with_context(|| format!("reading {ROOT}")),
    };
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_suffix(".lock")?.to_owned())
        })
        .collect())
}

fn lock_path(name: &str) -> PathBuf {
    Path::new(ROOT).join(format!("{name}.lock"))
}

/// Takes the run's lock. It gets its name when it is held: one that nobody holds is taken for abandoned.
fn lock(name: &str) -> Result<File> {
    fs::create_dir_all(ROOT).with_context(|| format!("creating {ROOT}"))?;
    let path = lock_path(name);
    let unnamed = path.with_extension("new");
    let lock = File::create(&unnamed).with_context(|| format!("creating {}", unnamed.display()))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("locking {}", unnamed.display()))?;
    fs::rename(&unnamed, &path).with_context(|| format!("creating {}", path.display()))?;
    Ok(lock)
}

/// Mount points at or below `directory`, the innermost first.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    let mut below: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(directory))
        .collect();
    below.reverse();
    Ok(below)
}

/// A process in a session of its own that cleans up when ours ends in whatever way: it waits for the
/// end of its standard input.
#[derive(Debug)]
struct Janitor {
    process: Child,
    stdin: ChildStdin,
}

impl Janitor {
    fn start(run: &str) -> Result<Self> {
        let program = programs::peer()?;
        let mut process = Command::new(&program)
            .args(["janitor", run])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let stdin = process
            .stdin
            .take()
            .context("the janitor has no standard input")?;
        Ok(Self { process, stdin })
    }

    /// Ends it: there is nothing left to clean.
    fn dismiss(mut self) {
        let told = self.stdin.write_all(b"done\n");
        drop(self.stdin);
        if told.is_ok() {
            // An error here means that it has been reaped already.
            let _ended = self.process.wait();
        }
    }
}
