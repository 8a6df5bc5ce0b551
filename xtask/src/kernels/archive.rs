//! Writes an initramfs: a cpio archive in the format that the kernel unpacks into memory at its start.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel, "newc".

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The archive so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

/// One entry's header, beside its name and what follows it.
#[derive(Debug, Clone, Copy, Default)]
struct Header {
    mode: u32,
    modified: u32,
    /// Of a device: its numbers.
    device: (u32, u32),
}

impl Archive {
    /// A copy of the file `from`, with its permissions and its time: Python compares that with what it compiled.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn copy(&mut self, from: &Path, name: &str) -> Result<()> {
        let fails = || format!("packing {}", from.display());
        let contents = fs::read(from).with_context(fails)?;
        let metadata = fs::metadata(from).with_context(fails)?;
        let header = Header {
            mode: FILE | (metadata.permissions().mode() & 0o777),
            modified: u32::try_from(metadata.mtime()).unwrap_or_default(),
            ..Header::default()
        };
        self.add(header, name, &contents)
    }

    /// A file that only its owner may write.
    ///
    /// # Errors
    /// If it is too large for the format.
    pub(crate) fn file(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        let header = Header {
            mode: FILE | 0o644,
            ..Header::default()
        };
        self.add(header, name, contents)
    }

    /// A program.
    ///
    /// # Errors
    /// As [`Self::file`].
    pub(crate) fn program(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        let header = Header {
            mode: FILE | 0o755,
            ..Header::default()
        };
        self.add(header, name, contents)
    }

    /// Directories, files and symbolic links below `root`, by their names there; all belong to root.
    ///
    /// # Errors
    /// If something cannot be read, or has no name in UTF-8.
    pub(crate) fn tree(&mut self, root: &Path) -> Result<()> {
        self.below(root, root)
    }

    fn below(&mut self, root: &Path, directory: &Path) -> Result<()> {
        let fails = || format!("packing {}", directory.display());
        for entry in fs::read_dir(directory).with_context(fails)? {
            let path = entry.with_context(fails)?.path();
            let name = path.strip_prefix(root).unwrap_or(&path);
            let name = name.to_str().with_context(fails)?.to_owned();
            let kind = fs::symlink_metadata(&path).with_context(fails)?.file_type();
            if kind.is_dir() {
                self.directory(&name)?;
                self.below(root, &path)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).with_context(fails)?;
                self.link(&name, target.to_str().with_context(fails)?)?;
            } else if kind.is_file() {
                self.copy(&path, &name)?;
            }
        }
        Ok(())
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// If the target's name is too long for the format.
    pub(crate) fn link(&mut self, name: &str, target: &str) -> Result<()> {
        let header = Header {
            mode: LINK | 0o777,
            ..Header::default()
        };
        self.add(header, name, target.as_bytes())
    }

    /// A directory, with those above it.
    ///
    /// # Errors
    /// As [`Self::file`].
    pub(crate) fn directory(&mut self, name: &str) -> Result<()> {
        let header = Header {
            mode: DIRECTORY | 0o755,
            ..Header::default()
        };
        self.add(header, name, &[])
    }

    /// `/dev/console`, which the kernel gives to the first program as its standard files.
    ///
    /// # Errors
    /// As [`Self::file`].
    pub(crate) fn console(&mut self) -> Result<()> {
        let header = Header {
            mode: CHARACTER_DEVICE | 0o600,
            device: (5, 1),
            ..Header::default()
        };
        self.add(header, "/dev/console", &[])
    }

    /// The whole archive.
    ///
    /// # Errors
    /// As [`Self::file`].
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.write(Header::default(), "TRAILER!!!", &[])?;
        Ok(self.bytes)
    }

    /// An entry once, after the directories above it.
    fn add(&mut self, header: Header, name: &str, contents: &[u8]) -> Result<()> {
        let name = name.trim_matches('/');
        if let Some((above, _)) = name.rsplit_once('/') {
            self.directory(above)?;
        }
        if self.names.insert(name.to_owned()) {
            self.write(header, name, contents)?;
        }
        Ok(())
    }

    fn write(&mut self, header: Header, name: &str, contents: &[u8]) -> Result<()> {
        let Ok(size) = u32::try_from(contents.len()) else {
            bail!("{name} is too large for an initramfs");
        };
        let number = u32::try_from(self.names.len()).unwrap_or_default();
        let name_size = u32::try_from(name.len() + 1).unwrap_or_default();
        let fields = [
            number,
            header.mode,
            0, // user
            0, // group
            1, // links
            header.modified,
            size,
            0, // device that it is on
            0,
            header.device.0,
            header.device.1,
            name_size,
            0, // checksum, which this format does not have
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names with mode and contents, as the kernel would read them.
    fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let field = |at: usize, index: usize| {
            let start = at + 6 + index * 8;
            let text = std::str::from_utf8(&archive[start..start + 8]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        let (mut at, mut found) = (0, vec![]);
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701");
            let (size, name_size) = (field(at, 6) as usize, field(at, 11) as usize);
            let name = &archive[at + 110..at + 110 + name_size - 1];
            let data = (at + 110 + name_size).next_multiple_of(4);
            found.push((
                String::from_utf8(name.to_vec()).unwrap(),
                field(at, 1),
                archive[data..data + size].to_vec(),
            ));
            at = (data + size).next_multiple_of(4);
        }
        found
    }

    #[test]
    fn directories_come_once_and_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file("/a/b/one", b"1").unwrap();
        archive.file("/a/b/two", b"22222").unwrap();
        archive.link("/a/link", "b/one").unwrap();
        let read = entries(&archive.finish().unwrap());
        let names: Vec<&str> = read.iter().map(|(name, ..)| name.as_str()).collect();
        let expected = ["a", "a/b", "a/b/one", "a/b/two", "a/link", "TRAILER!!!"];
        assert_eq!(names, expected);
        assert_eq!(read[0].1, DIRECTORY | 0o755);
        assert_eq!(read[3].2, b"22222");
        assert_eq!(
            read[4],
            ("a/link".to_owned(), LINK | 0o777, b"b/one".to_vec())
        );
    }
}
