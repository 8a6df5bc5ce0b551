//! Version 2 control groups: where they are mounted, which id is which path, and which one is ours.

#![expect(unsafe_code, reason = "open_by_handle_at(2) has no safe binding")]

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::MetadataExt as _,
        },
    },
    path::{Path, PathBuf},
};

use super::CgroupId;

/// The cgroup2 hierarchy of this host.
#[derive(Debug)]
pub struct Cgroup2 {
    mount: PathBuf,
    handle: OwnedFd,
}

/// A cgroup could not be found, read or entered.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 file system is mounted.
    #[error(
        "no cgroup2 file system in /proc/self/mountinfo: mount one, or boot with \
         systemd.unified_cgroup_hierarchy=1"
    )]
    NotMounted,
    /// A file that tells about cgroups could not be used.
    #[error("{action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process is in no version 2 cgroup.
    #[error("/proc/self/cgroup names no version 2 cgroup")]
    NoneOwn,
}

impl CgroupError {
    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

/// `FILEID_KERNFS` of `include/linux/exportfs.h`: the handle is the 64-bit id. Kernel 5.5.
const FILEID_KERNFS: i32 = 0xfe;

#[repr(C)]
struct KernfsHandle {
    bytes: u32,
    kind: i32,
    id: u64,
}

impl Cgroup2 {
    /// Finds the mount: `/sys/fs/cgroup`, or beside version 1 `/sys/fs/cgroup/unified`, or wherever it is.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`], or if it cannot be read.
    pub fn find() -> Result<Self, CgroupError> {
        let mountinfo = Path::new("/proc/self/mountinfo");
        let text = fs::read(mountinfo).map_err(CgroupError::file("read", mountinfo))?;
        let mount = mount_point(&text).ok_or(CgroupError::NotMounted)?;
        let directory = fs::File::open(&mount).map_err(CgroupError::file("open", &mount))?;
        Ok(Self {
            mount,
            handle: directory.into(),
        })
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The directory of a cgroup that is given by its path below the mount, like `/system.slice`.
    pub fn directory(&self, path: &Path) -> PathBuf {
        self.mount.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The id of a cgroup that is given by its path below the mount.
    ///
    /// # Errors
    /// If there is no such cgroup.
    pub fn id_of(&self, path: &Path) -> Result<CgroupId, CgroupError> {
        id_of_directory(&self.directory(path))
    }

    /// The path below the mount of the cgroup with this id; `None` if it is gone. Needs `CAP_DAC_READ_SEARCH`.
    pub fn path_of(&self, id: CgroupId) -> Option<PathBuf> {
        let mut handle = KernfsHandle {
            bytes: 8,
            kind: FILEID_KERNFS,
            id: id.0,
        };
        // SAFETY: `handle` has the layout of struct file_handle with the 8 bytes that it announces.
        let raw = unsafe {
            libc::open_by_handle_at(
                self.handle.as_raw_fd(),
                (&raw mut handle).cast(),
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        if raw < 0 {
            return None;
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        let opened = unsafe { OwnedFd::from_raw_fd(raw) };
        let path = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).ok()?;
        Some(Path::new("/").join(path.strip_prefix(&self.mount).ok()?))
    }

    /// The path below the mount of the cgroup that this process is in.
    ///
    /// # Errors
    /// [`CgroupError::NoneOwn`], or if /proc cannot be read.
    pub fn own(&self) -> Result<PathBuf, CgroupError> {
        let file = Path::new("/proc/self/cgroup");
        let text = fs::read(file).map_err(CgroupError::file("read", file))?;
        own_path(&text).ok_or(CgroupError::NoneOwn)
    }

    /// The path below the mount of the cgroup that the first process is in, if that can be seen.
    pub fn of_first_process(&self) -> Option<PathBuf> {
        own_path(&fs::read("/proc/1/cgroup").ok()?)
    }

    /// Moves this process into a cgroup, which is made if it is missing.
    ///
    /// # Errors
    /// If it cannot be made or entered.
    pub fn enter(&self, path: &Path) -> Result<(), CgroupError> {
        let directory = self.directory(path);
        fs::create_dir_all(&directory).map_err(CgroupError::file("create", &directory))?;
        let procs = directory.join("cgroup.procs");
        fs::write(&procs, "0").map_err(CgroupError::file("move this process by", &procs))
    }
}

/// The id of a cgroup that is given by its directory.
///
/// # Errors
/// If it cannot be read.
pub fn id_of_directory(directory: &Path) -> Result<CgroupId, CgroupError> {
    let metadata = fs::metadata(directory).map_err(CgroupError::file("read", directory))?;
    Ok(CgroupId(metadata.ino()))
}

/// Where cgroup2 is mounted, by the text of `/proc/self/mountinfo`: bytes, since the paths of others are in it.
pub(crate) fn mount_point(mountinfo: &[u8]) -> Option<PathBuf> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .find_map(cgroup2_mount)
}

/// The version 2 cgroup by the text of `/proc/self/cgroup`.
pub(crate) fn own_path(text: &[u8]) -> Option<PathBuf> {
    let own = text
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"0::"))?;
    Some(PathBuf::from(OsStr::from_bytes(own)))
}

/// The mount point, if this line of mountinfo is about cgroup2.
///
/// Source: proc(5). Id, parent, device, root, mount point, options, then optional fields up to a `-`, then the
/// file system's type. A mount that shows only a part is of no use.
fn cgroup2_mount(line: &[u8]) -> Option<PathBuf> {
    let mut fields = line.split(|byte| *byte == b' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    fields.find(|field| *field == b"-")?;
    let is_whole = fields.next()? == b"cgroup2" && root == b"/";
    is_whole.then(|| PathBuf::from(OsString::from_vec(unescape(point))))
}

/// Undoes the kernel's `mangle()`: blank, tab, newline and backslash stand as a backslash and three octal digits.
fn unescape(mangled: &[u8]) -> Vec<u8> {
    let mut rest = mangled;
    let mut plain = Vec::with_capacity(mangled.len());
    while let [first, after @ ..] = rest {
        let (byte, after) = match rest {
            [b'\\', b'0', b'4', b'0', after @ ..] => (b' ', after),
            [b'\\', b'0', b'1', b'1', after @ ..] => (b'\t', after),
            [b'\\', b'0', b'1', b'2', after @ ..] => (b'\n', after),
            [b'\\', b'1', b'3', b'4', after @ ..] => (b'\\', after),
            _ => (*first, after),
        };
        plain.push(byte);
        rest = after;
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_among_others() {
        let v1 = "30 23 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
        let v2 = "31 23 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw";
        let part = "32 23 0:27 /docker/x /mnt rw - cgroup2 cgroup2 rw";
        let mount = |lines: &[&str]| mount_point(lines.join("\n").as_bytes());
        let expected = Some(PathBuf::from("/sys/fs/cgroup/unified"));
        assert_eq!(mount(&[v1, part, "nonsense", v2, ""]), expected);
        assert_eq!(mount(&[v1, part, "nonsense", ""]), None);
    }

    #[test]
    fn paths_of_other_mounts_are_any_bytes() {
        let mounts = b"30 23 0:26 / /mnt/caf\xe9\\040-\\040cgroup2 rw - ext4 /dev/sda rw\n\
            31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup".into()));
        let own = b"12:memory:/caf\xe9\n0::/a\xe9\n";
        assert_eq!(own_path(own), Some(OsStr::from_bytes(b"/a\xe9").into()));
        assert_eq!(own_path(b"12:memory:/x\n"), None);
    }

    #[test]
    fn escaped_mount_points_are_read_back() {
        let mounts = br"31 23 0:27 / /a\040b\011c\012d\134040e rw - cgroup2 none rw";
        assert_eq!(mount_point(mounts), Some("/a b\tc\nd\\040e".into()));
    }
}
