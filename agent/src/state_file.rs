//! Small files that remember something across restarts.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

/// Reads a state file; `None` if there is none yet.
///
/// # Errors
/// What the file system says.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes whole or not at all: a crash leaves the old file or the new one. Makes the directory if it is missing.
///
/// # Errors
/// What the file system says; the old file is still there.
pub(crate) fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(directory)?.sync_all()
}

/// Moves a file that cannot be used out of the way, and says where to.
pub(crate) fn move_aside(path: &Path) -> PathBuf {
    let aside = path.with_extension("damaged");
    // Best effort: if this fails too, writing the next state replaces it.
    drop(fs::rename(path, &aside));
    aside
}
