//! The agent's listening sockets: one owner for all, so that the next agent can have them.
//!
//! A socket is known by what it is, its namespace and its address, and not by a name that somebody gave it. What
//! is here is also in the descriptor store of systemd, which holds it while a killed agent is away: connections
//! wait in its queue then, and the next agent accepts them.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use parking_lot::Mutex;
use sd_notify::NotifyState;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{
    datapath::{NetnsCookie, netns},
    telemetry::log::chain,
};

/// Where a socket listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ListenAddress {
    /// At a port.
    Tcp(SocketAddr),
    /// At a Unix socket in the file system.
    Unix(PathBuf),
}

impl From<SocketAddr> for ListenAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Which socket.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketKey {
    /// The network namespace that it was made in.
    pub netns: NetnsCookie,
    /// Where it listens.
    pub address: ListenAddress,
}

impl SocketKey {
    /// Of a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the namespace has no cookie: kernel 5.14.
    pub fn here(address: impl Into<ListenAddress>) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        let netns = netns::cookie_of(&socket)?;
        Ok(Self {
            netns,
            address: address.into(),
        })
    }
}

/// Every listening socket of the agent, but those of operators.
#[derive(Debug, Clone, Default)]
pub struct ListeningSockets(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// From the agent before, and not asked for yet.
    inherited: BTreeMap<SocketKey, OwnedFd>,
    open: BTreeMap<SocketKey, OwnedFd>,
    /// The agent serves, and the one before does not any more.
    is_serving: bool,
    /// They belong to the next agent: the store is its affair.
    is_given: bool,
}

/// Keeps a socket among those that are handed over; dropped, the socket closes with its last user.
#[derive(Debug)]
pub struct Kept {
    sockets: ListeningSockets,
    key: SocketKey,
}

impl ListeningSockets {
    /// Begins with what another agent listened with. What is no listening socket is closed.
    pub fn inheriting(descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        let sockets = Self::default();
        for descriptor in descriptors {
            match key_of(&descriptor) {
                Ok(key) => {
                    sockets.0.lock().inherited.insert(key, descriptor);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "inherited descriptor not taken over");
                }
            }
        }
        sockets
    }

    /// The inherited socket of this key, or the one that `bind` makes.
    ///
    /// # Errors
    /// Those of `bind`, and if there are no descriptors left.
    pub fn listen<L: From<OwnedFd> + Into<OwnedFd>>(
        &self,
        key: SocketKey,
        bind: impl FnOnce() -> io::Result<L>,
    ) -> io::Result<(L, Kept)> {
        let inherited = self.0.lock().inherited.remove(&key);
        let socket = match inherited {
            Some(socket) => socket,
            None => bind()?.into(),
        };
        let held = socket.try_clone()?;
        store(&key, &held);
        self.0.lock().open.insert(key.clone(), held);
        let kept = Kept {
            sockets: self.clone(),
            key,
        };
        Ok((socket.into(), kept))
    }

    /// Closes what was inherited for this key: it cannot be reached any more.
    pub fn disinherit(&self, key: &SocketKey) {
        if self.0.lock().inherited.remove(key).is_some() {
            forget(key);
        }
    }

    /// Closes what was inherited and nobody asked for: it is not configured any more.
    pub fn close_unused(&self) {
        for key in std::mem::take(&mut self.0.lock().inherited).keys() {
            tracing::info!(address = %key.address, netns = %key.netns, "inherited socket closed: not needed");
            forget(key);
        }
    }

    /// What to hand over.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn descriptors(&self) -> io::Result<Vec<OwnedFd>> {
        let state = self.0.lock();
        state.open.values().map(OwnedFd::try_clone).collect()
    }

    /// From now on they are the next agent's.
    pub fn give(&self) {
        self.0.lock().is_given = true;
    }

    /// Whether no other agent has them too, neither the one before nor the next.
    pub fn are_own(&self) -> bool {
        let state = self.0.lock();
        state.is_serving && !state.is_given
    }

    /// Lets go of all, for an agent that ends without a successor: connects are refused once their users have
    /// closed them too.
    pub fn close(&self) {
        let mut state = self.0.lock();
        for key in state.open.keys() {
            forget(key);
        }
        state.open.clear();
    }

    /// Puts all into the descriptor store, which takes them from the service's main process only: the agent serves.
    pub fn store(&self) {
        let mut state = self.0.lock();
        state.is_serving = true;
        for (key, socket) in &state.open {
            store(key, socket);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut state = self.sockets.0.lock();
        if state.open.remove(&self.key).is_some() && !state.is_given {
            forget(&self.key);
        }
    }
}

fn key_of(descriptor: &OwnedFd) -> io::Result<SocketKey> {
    let socket = SockRef::from(descriptor);
    let address = socket.local_addr()?;
    let unix = || {
        address
            .as_pathname()
            .map(|path| ListenAddress::Unix(path.to_owned()))
    };
    let address = address.as_socket().map(ListenAddress::Tcp).or_else(unix);
    match address {
        Some(address) if socket.is_listener()? && socket.r#type()? == Type::STREAM => {
            Ok(SocketKey {
                netns: netns::cookie_of(&socket)?,
                address,
            })
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no listening socket",
        )),
    }
}

/// A name in the store: neither longer than 255 characters nor with a colon (`sd_pid_notify_with_fds(3)`).
fn name(key: &SocketKey) -> String {
    format!("listen-{}-{}", key.netns, key.address)
        .replace(|c: char| c == ':' || !c.is_ascii_graphic(), "_")
}

fn store(key: &SocketKey, socket: &OwnedFd) {
    let name = name(key);
    let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
    if let Err(error) = sd_notify::notify_with_fds(&state, &[socket.as_fd()]) {
        tracing::warn!(%error, name, "socket not put into systemd's descriptor store");
    }
}

fn forget(key: &SocketKey) {
    let name = name(key);
    let state = [NotifyState::FdStoreRemove, NotifyState::FdName(&name)];
    if let Err(error) = sd_notify::notify(&state) {
        tracing::warn!(%error, name, "socket not removed from systemd's descriptor store");
    }
}
