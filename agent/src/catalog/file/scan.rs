//! Listing and reading the directory. Follows links to files, as Kubernetes mounts them; not to directories.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::format::Format;

/// A catalog of 100,000 services is smaller; more is a mistake that should not take the memory.
const MOST_BYTES: u64 = 64 << 20;

/// Deeper is a mistake as well.
const MOST_LEVELS: usize = 8;

/// What is there.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Each catalog file with its text, or why there is none.
    pub(super) files: BTreeMap<PathBuf, Result<String, String>>,
    /// The directories that were listed.
    pub(super) directories: Vec<PathBuf>,
    /// The directories that could not be, and why.
    pub(super) failed: Vec<(PathBuf, String)>,
}

/// Reads everything below `root`.
pub(super) fn scan(root: &Path) -> Scan {
    let mut scan = Scan::default();
    scan_directory(root, MOST_LEVELS, &mut scan);
    scan
}

fn scan_directory(directory: &Path, levels: usize, scan: &mut Scan) {
    if levels == 0 {
        let message = format!("is more than {MOST_LEVELS} directories deep");
        scan.failed.push((directory.to_owned(), message));
        return;
    }
    let listed = fs::read_dir(directory).and_then(|entries| {
        entries
            .map(|entry| Ok((entry.as_ref().map_err(copy)?.path(), entry?.file_type()?)))
            .collect::<io::Result<Vec<_>>>()
    });
    let entries = match listed {
        Ok(entries) => entries,
        Err(error) => {
            scan.failed
                .push((directory.to_owned(), format!("cannot be listed: {error}")));
            return;
        }
    };
    scan.directories.push(directory.to_owned());
    for (path, kind) in entries {
        let hidden = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if kind.is_dir() && !hidden {
            scan_directory(&path, levels - 1, scan);
        } else if !kind.is_dir()
            && Format::of(&path).is_some()
            && let Some(text) = read(&path)
        {
            scan.files.insert(path, text);
        }
    }
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// `None` if the file went away since it was listed, or is a link to a directory.
fn read(path: &Path) -> Option<Result<String, String>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => return Some(Err(format!("cannot be read: {error}"))),
    };
    if !metadata.is_file() {
        return None;
    }
    if metadata.len() > MOST_BYTES {
        return Some(Err(format!(
            "has {} bytes: expected at most {MOST_BYTES}",
            metadata.len()
        )));
    }
    match fs::read_to_string(path) {
        Ok(text) => Some(Ok(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(format!("cannot be read: {error}"))),
    }
}

/// The directories below `root` and itself, without reading any file.
pub(super) fn directories(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        let depth = directory
            .components()
            .count()
            .saturating_sub(root.components().count());
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        if depth + 1 >= MOST_LEVELS {
            continue;
        }
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
            }
        }
    }
    found
}
