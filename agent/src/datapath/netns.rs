//! Network namespaces: opening one, telling which it is, and making sockets inside.
//!
//! setns(2) changes a thread. Only threads made for it ever enter another namespace, so that no socket of the
//! agent is made in the wrong one.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};

use super::NetnsCookie;

/// A network namespace that is held open.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    file: File,
}

/// A namespace could not be opened, read or entered.
#[derive(Debug, thiserror::Error)]
#[error("{action} the network namespace {}", path.display())]
pub struct NetnsError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Netns {
    /// The namespace that a file refers to: `/run/netns/NAME`, `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// If the file is missing or is no network namespace.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let fails = |source| NetnsError {
            action: "open",
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(fails)?;
        let netns = Self {
            path: path.to_owned(),
            file,
        };
        // A file that is not mounted over yet (`ip netns add` makes it first) is an ordinary one.
        if rustix::fs::fstatfs(netns.file.as_fd())
            .map_err(|e| fails(e.into()))?
            .f_type
            != NSFS_MAGIC
        {
            return Err(fails(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the file is not a namespace",
            )));
        }
        Ok(netns)
    }

    /// The namespace that the agent itself is in.
    ///
    /// # Errors
    /// If /proc is not mounted.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new("/proc/self/ns/net"))
    }

    /// Holds it a second time.
    ///
    /// # Errors
    /// If the process may open no more files.
    pub fn try_clone(&self) -> Result<Self, NetnsError> {
        Ok(Self {
            path: self.path.clone(),
            file: self.file.try_clone().map_err(self.fails("hold"))?,
        })
    }

    /// The file by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode: tells whether two files mean one namespace.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn identity(&self) -> Result<(u64, u64), NetnsError> {
        let metadata = self.file.metadata().map_err(self.fails("read"))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// The cookie, which names the namespace in the eBPF programs too. Kernel 5.14.
    ///
    /// # Errors
    /// If it cannot be entered, or the kernel is older.
    pub fn cookie(&self) -> Result<NetnsCookie, NetnsError> {
        self.run(|| {
            let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
            cookie_of(&socket)
        })?
        .map_err(self.fails("read the cookie of"))
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it.
    ///
    /// # Errors
    /// If it cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| self.enter().map(|()| work()));
            inside.join().unwrap_or_else(|_panic| {
                Err(self.fails("work in")(io::Error::other(
                    "the thread panicked",
                )))
            })
        })
    }

    /// Starts a thread that stays inside the namespace.
    ///
    /// # Errors
    /// If no thread can be made. A namespace that cannot be entered ends the thread before `work`.
    pub fn spawn_thread(
        &self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), NetnsError> {
        let netns = self.try_clone()?;
        let inside = move || match netns.enter() {
            Ok(()) => work(),
            Err(error) => {
                tracing::warn!(error = %crate::telemetry::log::chain(&error), "thread ended");
            }
        };
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(inside)
            .map_err(self.fails("work in"))?;
        Ok(())
    }

    fn enter(&self) -> Result<(), NetnsError> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|errno| self.fails("enter")(errno.into()))
    }

    fn fails(&self, action: &'static str) -> impl Fn(io::Error) -> NetnsError {
        let path = self.path.clone();
        move |source| NetnsError {
            action,
            path: path.clone(),
            source,
        }
    }
}

/// `NSFS_MAGIC` of `include/uapi/linux/magic.h`.
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// The cookie of the namespace that a socket was made in (`SO_NETNS_COOKIE`). Kernel 5.14.
///
/// # Errors
/// If the kernel is older.
#[expect(unsafe_code, reason = "no safe binding for this option")]
pub fn cookie_of(socket: &Socket) -> io::Result<NetnsCookie> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the option writes 8 bytes, as announced, into `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(NetnsCookie(cookie))
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_namespace_has_a_cookie_and_an_identity() {
        let one = Netns::current().unwrap();
        let other = Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap();
        assert_eq!(one.identity().unwrap(), other.identity().unwrap());
    }

    #[test]
    fn an_ordinary_file_is_no_namespace() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Netns::open(file.path()).unwrap_err();
        assert!(
            error.to_string().starts_with("open the network namespace"),
            "{error}"
        );
    }
}
