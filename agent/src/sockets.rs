//! The agent's listening sockets: one owner for all, so that the next agent can have them.
//!
//! A socket is known by what it is, its namespace and its address, and not by a name that somebody gave it. What
//! is here is also in the descriptor store of systemd, which holds it while a killed agent is away: connections
//! wait in its queue then, and the next agent accepts them.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use parking_lot::Mutex;
use sd_notify::NotifyState;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{
    datapath::{NetnsCookie, netns},
    telemetry::log::chain,
};

/// Which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketKey {
    /// The network namespace that it was made in.
    pub netns: NetnsCookie,
    /// Where it listens.
    pub address: SocketAddr,
}

impl SocketKey {
    /// Of a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the namespace has no cookie: kernel 5.14.
    pub fn here(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        let netns = netns::cookie_of(&socket)?;
        Ok(Self { netns, address })
    }
}

/// Every listening TCP socket of the agent.
#[derive(Debug, Clone, Default)]
pub struct ListeningSockets(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// From the agent before, and not asked for yet.
    inherited: BTreeMap<SocketKey, TcpListener>,
    open: BTreeMap<SocketKey, TcpListener>,
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
    /// Begins with what another agent listened with. What is no listening TCP socket is closed.
    pub fn inheriting(descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        let sockets = Self::default();
        for descriptor in descriptors {
            match key_of(&descriptor) {
                Ok(key) => {
                    let socket = Socket::from(descriptor).into();
                    sockets.0.lock().inherited.insert(key, socket);
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
    pub fn listen(
        &self,
        key: SocketKey,
        bind: impl FnOnce() -> io::Result<TcpListener>,
    ) -> io::Result<(TcpListener, Kept)> {
        let inherited = self.0.lock().inherited.remove(&key);
        let socket = match inherited {
            Some(socket) => socket,
            None => bind()?,
        };
        let held = socket.try_clone()?;
        store(&key, &held);
        self.0.lock().open.insert(key, held);
        let kept = Kept {
            sockets: self.clone(),
            key,
        };
        Ok((socket, kept))
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
        let duplicate = |socket: &TcpListener| socket.as_fd().try_clone_to_owned();
        state.open.values().map(duplicate).collect()
    }

    /// From now on they are the next agent's.
    pub fn give(&self) {
        self.0.lock().is_given = true;
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

    /// Puts all into the descriptor store, which takes them from the service's main process only.
    pub fn store(&self) {
        for (key, socket) in &self.0.lock().open {
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
    let address = socket.local_addr()?.as_socket();
    match address {
        Some(address) if socket.is_listener()? && socket.r#type()? == Type::STREAM => {
            Ok(SocketKey {
                netns: netns::cookie_of(&socket)?,
                address,
            })
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no listening TCP socket",
        )),
    }
}

/// A name in the store: neither longer than 255 characters nor with a colon (`sd_pid_notify_with_fds(3)`).
fn name(key: &SocketKey) -> String {
    format!("listen-{}-{}", key.netns, key.address).replace(':', "_")
}

fn store(key: &SocketKey, socket: &TcpListener) {
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
