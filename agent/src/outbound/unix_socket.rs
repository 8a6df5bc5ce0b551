//! The file of a Unix socket at which an upstream is offered: made, taken over, removed.
//!
//! What another process listens at, and what is no socket, is never touched. A socket that nobody has bound any more is
//! what a process left that is gone.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::upstreams::BACKLOG;
use crate::{
    sockets::{Kept, ListeningSockets, SocketKey},
    telemetry::log::chain,
};

/// Who may connect where the registration does not say: everybody, as to a port.
const MODE: u32 = 0o666;

/// A socket's file. Dropping removes it, if it is still the same and no other agent listens there: neither the one
/// before, which goes on if this one fails to start, nor the next.
#[derive(Debug)]
pub(super) struct BoundFile {
    path: PathBuf,
    identity: (u64, u64),
    sockets: ListeningSockets,
}

impl BoundFile {
    /// Whether clients still find it: it may be removed or replaced by anybody who may write to the directory.
    pub(super) fn is_in_place(&self) -> bool {
        identity_of(&self.path).is_ok_and(|identity| identity == self.identity)
    }
}

impl Drop for BoundFile {
    fn drop(&mut self) {
        if self.sockets.are_own()
            && self.is_in_place()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(error = %chain(&error), path = %self.path.display(), "socket not removed");
        }
    }
}

/// Listens at `path`, with the socket of the agent before if there is one.
///
/// # Errors
/// If the path is somebody else's, or nothing can be made there.
pub(super) fn listen(
    sockets: &ListeningSockets,
    key: SocketKey,
    path: &Path,
    mode: Option<u32>,
) -> io::Result<(UnixListener, Kept, BoundFile)> {
    // One that was inherited without its file is reached by nobody.
    if is_free(path)? {
        sockets.disinherit(&key);
    }
    let (listener, kept) = sockets.listen(key, || bind(path))?;
    let file = BoundFile {
        identity: identity_of(path)?,
        path: path.to_owned(),
        sockets: sockets.clone(),
    };
    // Nobody connects before its mode is right: it listens after that.
    fs::set_permissions(path, fs::Permissions::from_mode(mode.unwrap_or(MODE)))?;
    SockRef::from(&listener).listen(BACKLOG)?;
    Ok((listener, kept, file))
}

/// Binds, and does not listen yet.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if !is_free(path)? {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process has this socket",
        ));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

/// Whether nothing is at `path`, or only what a process left that is gone.
///
/// # Errors
/// If there is something else than a socket, or it cannot be told.
fn is_free(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "there is something that is no socket",
            ));
        }
        Ok(_) => {}
    }
    // Of another type than a stream, so that nobody gets a connection: who has bound a stream there, the kernel says
    // with EPROTOTYPE, and nobody with ECONNREFUSED (unix(7)).
    let probe = Socket::new(Domain::UNIX, Type::DGRAM.cloexec(), None)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => Ok(false),
        Err(error) => Err(error),
        Ok(()) => Ok(false),
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    fn open(
        sockets: &ListeningSockets,
        path: &Path,
    ) -> io::Result<(UnixListener, Kept, BoundFile)> {
        let key = SocketKey::here(crate::sockets::ListenAddress::Unix(path.to_owned()))?;
        listen(sockets, key, path, Some(0o640))
    }

    #[test]
    fn what_a_gone_process_left_is_replaced_and_removed_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("upstream.sock");
        drop(UnixListener::bind(&path).unwrap());
        UnixStream::connect(&path).unwrap_err();
        let sockets = ListeningSockets::default();
        let open = open(&sockets, &path).unwrap();
        sockets.store();
        UnixStream::connect(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        assert!(open.2.is_in_place());
        drop(open);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_somebody_elses_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let (stream, datagram, file) = (path("stream"), path("datagram"), path("file"));
        let listener = UnixListener::bind(&stream).unwrap();
        listener.set_nonblocking(true).unwrap();
        let _other = UnixDatagram::bind(&datagram).unwrap();
        fs::write(&file, "text").unwrap();
        for path in [&stream, &datagram, &file] {
            let identity = identity_of(path).unwrap();
            open(&ListeningSockets::default(), path).unwrap_err();
            assert_eq!(identity_of(path).unwrap(), identity);
        }
        // Nobody got a connection by our looking.
        let accepted = listener.accept().unwrap_err();
        assert_eq!(accepted.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_next_agent_has_the_same_socket_with_its_queue() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("upstream.sock");
        let before = ListeningSockets::default();
        let old = open(&before, &path).unwrap();
        before.store();
        let waiting = UnixStream::connect(&path).unwrap();
        let passed: Vec<OwnedFd> = before.descriptors().unwrap();
        let after = ListeningSockets::inheriting(passed);
        let (listener, _kept, file) = open(&after, &path).unwrap();
        before.give();
        after.store();
        drop(old);
        assert!(path.exists(), "the agent before removes it no more");
        let (accepted, _) = listener.accept().unwrap();
        drop((waiting, accepted));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_next_agent_that_does_not_start_removes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("upstream.sock");
        let running = ListeningSockets::default();
        let (listener, _kept, file) = open(&running, &path).unwrap();
        running.store();
        let next = ListeningSockets::inheriting(running.descriptors().unwrap());
        drop(open(&next, &path).unwrap());
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        assert!(file.is_in_place());
    }

    #[test]
    fn an_inherited_socket_without_its_file_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("upstream.sock");
        let before = ListeningSockets::default();
        let (_listener, _kept, file) = open(&before, &path).unwrap();
        let after = ListeningSockets::inheriting(before.descriptors().unwrap());
        fs::remove_file(&path).unwrap();
        assert!(!file.is_in_place());
        let _new = open(&after, &path).unwrap();
        UnixStream::connect(&path).unwrap();
    }
}
