//! Unix sockets in the file system: made under another name, moved into place, removed by who made them.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::telemetry::log::chain;

/// A socket in the file system. Dropping removes it, if it is still the same.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Lets `bind` make a socket, and puts it at `path` with this mode, in the place of one that is there. Nobody
    /// connects before its mode is right, and whoever connects to the old one meanwhile gets the old one.
    ///
    /// # Errors
    /// If the directory, the socket or its mode cannot be made.
    pub fn put<T>(
        path: &Path,
        mode: u32,
        bind: impl FnOnce(&Path) -> io::Result<T>,
    ) -> io::Result<(T, Self)> {
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            fs::create_dir_all(directory)?;
        }
        let unfinished = unfinished_name(path);
        remove_if_present(&unfinished)?;
        let socket = bind(&unfinished)?;
        let finished = fs::set_permissions(&unfinished, fs::Permissions::from_mode(mode))
            .and_then(|()| fs::rename(&unfinished, path))
            .and_then(|()| identity_of(path));
        match finished {
            Ok(identity) => {
                let path = path.to_owned();
                Ok((socket, Self { path, identity }))
            }
            Err(error) => {
                // The first error is the one to report.
                let _left = remove_if_present(&unfinished);
                Err(error)
            }
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A newer agent may have put its own socket here.
        if identity_of(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(error = %chain(&error), path = %self.path.display(), "socket was not removed");
        }
    }
}

fn unfinished_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
