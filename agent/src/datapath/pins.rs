//! What stays in the kernel when the agent is gone: links and maps, kept by name on bpffs.
//!
//! Below `capture.pin_directory`:
//!
//! ```text
//! links/<program>-<cgroup id>      one per attachment
//! maps-<layout>/<MAP>              one directory per layout of the maps, in practice one
//! ```
//!
//! Whoever holds the directory's lock is the agent of this node. The lock belongs to the open file: an agent
//! that takes over gets the descriptor from the one before it, and there is never a moment without owner.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock, statfs},
    mount::{MountFlags, mount},
};

use super::{bpf, types::CgroupId};

/// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Where bpffs belongs; systemd mounts it there.
const BPF_FS: &str = "/sys/fs/bpf";

/// The links and maps of this node's agent, and the right to change them.
#[derive(Debug)]
pub struct PinDirectory {
    path: PathBuf,
    lock: OwnedFd,
}

/// The pins could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Pins live on bpffs only.
    #[error("{} is not on bpffs: mount it (`mount -t bpf bpf {BPF_FS}`), or set capture.pin_directory to a directory of one, or to \"off\"", path.display())]
    NotBpffs {
        /// The configured directory.
        path: PathBuf,
    },
    /// Somebody holds the lock.
    #[error("an agent of this node runs, for it holds {}: stop it first", path.display())]
    Held {
        /// The configured directory.
        path: PathBuf,
    },
    /// A call failed.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl PinError {
    fn io<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source: source.into(),
        }
    }
}

impl PinDirectory {
    /// Opens the directory for an agent; makes it, and mounts bpffs at `/sys/fs/bpf`, if it is missing.
    ///
    /// # Errors
    /// [`PinError::Held`] while another agent of this node runs, [`PinError::NotBpffs`] if nothing can be pinned
    /// there.
    pub fn open(path: &Path) -> Result<Self, PinError> {
        if !is_on_bpffs(path)? && can_be_mounted(path) {
            mount(
                "bpf",
                BPF_FS,
                "bpf",
                MountFlags::empty(),
                Some(c"mode=0700"),
            )
            .map_err(PinError::io("mount bpffs at", Path::new(BPF_FS)))?;
        }
        if !is_on_bpffs(path)? {
            return Err(PinError::NotBpffs {
                path: path.to_owned(),
            });
        }
        make_directory(path)?;
        Self::lock(path)
    }

    /// Opens the directory if there is one.
    ///
    /// # Errors
    /// [`PinError::Held`] while an agent of this node runs.
    pub fn open_existing(path: &Path) -> Result<Option<Self>, PinError> {
        if !path.try_exists().map_err(PinError::io("look for", path))? {
            return Ok(None);
        }
        Self::lock(path).map(Some)
    }

    /// Opens the directory with the lock of the agent before; locks it anew if that is of another one.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn take_over(path: &Path, lock: OwnedFd) -> Result<Self, PinError> {
        let identity = |file: File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
        let locked = lock.try_clone().ok().and_then(|lock| identity(lock.into()));
        if locked.is_some() && locked == File::open(path).ok().and_then(identity) {
            let path = path.to_owned();
            return Ok(Self { path, lock });
        }
        Self::open(path)
    }

    /// What makes its holder the agent of this node.
    pub fn lock_descriptor(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    fn lock(path: &Path) -> Result<Self, PinError> {
        let directory = File::open(path).map_err(PinError::io("open", path))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                lock: directory.into(),
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(PinError::Held {
                path: path.to_owned(),
            }),
            Err(error) => Err(PinError::io("lock", path)(error)),
        }
    }

    /// The directory of the maps of this layout, which is made if it is missing.
    pub(super) fn maps(&self, layout: u64) -> Result<PathBuf, PinError> {
        let path = self.path.join(format!("maps-{layout:016x}"));
        make_directory(&path)?;
        Ok(path)
    }

    /// Forgets the maps of other layouts than that in `used`. Programs that use them keep them.
    pub(super) fn remove_other_maps(&self, used: &Path) -> Result<(), PinError> {
        for path in entries(&self.path)? {
            let is_maps = name(&path).starts_with("maps-");
            if is_maps && path != used {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Where the link of a program to a cgroup is kept.
    pub(super) fn link(&self, program: &str, cgroup: CgroupId) -> Result<PathBuf, PinError> {
        let links = self.path.join("links");
        make_directory(&links)?;
        // A name on bpffs has no dot.
        Ok(links.join(format!("{program}-{}", cgroup.0)))
    }

    /// What is kept of links.
    pub(super) fn links(&self) -> Result<Vec<PathBuf>, PinError> {
        entries(&self.path.join("links"))
    }

    /// Detaches every program that is kept here and forgets the maps. The directory, and with it the lock, stay.
    pub(super) fn remove_content(&self) -> Result<(), PinError> {
        for link in self.links()? {
            detach(&link)?;
        }
        for path in entries(&self.path)? {
            remove(&path)?;
        }
        Ok(())
    }

    /// Detaches every program that is kept here, and removes the directory with what is in it. Returns the
    /// names of what was detached.
    ///
    /// # Errors
    /// At the first link that cannot be detached, or file that cannot be removed.
    pub fn remove_all(self) -> Result<Vec<String>, PinError> {
        let mut detached = Vec::new();
        for link in self.links()? {
            detach(&link)?;
            detached.push(name(&link));
        }
        remove(&self.path)?;
        Ok(detached)
    }
}

/// Detaches what is kept at `path`, whoever else holds it, and forgets it.
pub(super) fn detach(path: &Path) -> Result<(), PinError> {
    let link = bpf::pinned(path).map_err(PinError::io("open the pinned link", path))?;
    bpf::link_detach(link.as_fd()).map_err(PinError::io("detach the link", path))?;
    fs::remove_file(path).map_err(PinError::io("remove", path))
}

/// Whether `path`, or what there is of it, is on bpffs.
pub(super) fn is_on_bpffs(path: &Path) -> Result<bool, PinError> {
    for path in path.ancestors() {
        match statfs(path) {
            Ok(statistics) => return Ok(statistics.f_type == BPF_FS_MAGIC),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(PinError::io("look at", path)(error)),
        }
    }
    Ok(false)
}

/// Whether bpffs is only not mounted yet where it belongs.
pub(super) fn can_be_mounted(path: &Path) -> bool {
    path.starts_with(BPF_FS) && Path::new(BPF_FS).is_dir()
}

/// Root's alone: who can open a map's pin can write it.
fn make_directory(path: &Path) -> Result<(), PinError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(path).map_err(PinError::io("create", path))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, PinError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(PinError::io("list", directory)(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(PinError::io("list", directory))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn remove(directory: &Path) -> Result<(), PinError> {
    fs::remove_dir_all(directory).map_err(PinError::io("remove", directory))
}

fn name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
