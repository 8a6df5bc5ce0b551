//! Whose a TCP socket is: its cgroup and its user, asked of the kernel by `sock_diag(7)`.
//!
//! For what can be known of a socket only from outside: the other end of a connection that came over loopback, who
//! listens, and where UDP sockets are connected to. A [`SockDiag`] sees one network namespace, the one in which it was
//! opened; for another one use [`Netns::run`](crate::datapath::netns::Netns::run) with [`SockDiag::open`].
//!
//! Calls block, but wait for nobody: the kernel has answered when the request is sent.

pub(crate) mod wire;

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use parking_lot::Mutex;
use wire::{Described, Family, SOCK_DIAG_BY_FAMILY};

use crate::{
    datapath::CgroupId,
    netlink::{self, Answer, Requests},
};

/// Who made a socket, as the kernel recorded it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    /// The user id of its maker, in the user namespace of the agent.
    pub uid: u32,
    /// The version 2 cgroup of its maker.
    pub cgroup: CgroupId,
    /// The number by which `/proc/PID/fd` shows it, never 0.
    pub inode: u32,
    /// The kernel's id of the socket, never used twice.
    pub cookie: u64,
}

/// The kernel did not tell whose a socket is.
#[derive(Debug, thiserror::Error)]
pub enum SockDiagError {
    /// The request was refused, or the answer did not come or cannot be read.
    #[error("ask sock_diag(7) for {asked}")]
    Ask {
        /// What was asked for.
        asked: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel does not name cgroups of sockets: it is older than 5.9, or built without them.
    #[error(
        "sock_diag(7) does not tell the cgroup of a socket: use kernel 5.9 or later with CONFIG_SOCK_CGROUP_DATA"
    )]
    NoCgroup,
}

/// Asks about the sockets of one network namespace.
#[derive(Debug)]
pub struct SockDiag(Mutex<Requests>);

impl SockDiag {
    /// For the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the process may have no such socket, or the kernel was built without `CONFIG_INET_DIAG`.
    pub fn open() -> io::Result<Self> {
        Requests::open(libc::NETLINK_SOCK_DIAG)
            .map(Mutex::new)
            .map(Self)
    }

    /// Who holds the connected TCP socket whose own address is `local` and whose peer is `remote`.
    ///
    /// `None` if there is none, or only what is left of one that was closed: then nobody can tell whose it was.
    ///
    /// # Errors
    /// [`SockDiagError`].
    pub fn socket_of(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<Option<SocketOwner>, SockDiagError> {
        let found = exact(&mut self.0.lock(), local, remote).map_err(asking("a socket"))?;
        match found {
            // Where there is no such connection, the kernel looks for who would take one. And who only tries to
            // connect has the ports of somebody else's connection that has ended here and not there.
            Some(socket) if socket.is_connected() => owner(&socket),
            _ => Ok(None),
        }
    }

    /// All TCP sockets that listen, each with its address and who holds it.
    ///
    /// # Errors
    /// [`SockDiagError`].
    pub fn listeners(&self) -> Result<Vec<(SocketAddr, SocketOwner)>, SockDiagError> {
        let mut listeners = Vec::new();
        for family in [Family::V4, Family::V6] {
            let request = wire::all_listening(family);
            let sockets = dump(&mut self.0.lock(), &request);
            for socket in sockets.map_err(asking("listening sockets"))? {
                if let Some(owner) = owner(&socket)? {
                    listeners.push((socket.local, owner));
                }
            }
        }
        Ok(listeners)
    }

    /// Where all UDP sockets are connected to that are connected to this port.
    ///
    /// # Errors
    /// [`SockDiagError`].
    pub fn udp_peers(&self, port: u16) -> Result<Vec<IpAddr>, SockDiagError> {
        let mut peers = Vec::new();
        for family in [Family::V4, Family::V6] {
            let request = wire::all_connected(family, port);
            let sockets = dump(&mut self.0.lock(), &request);
            let sockets = sockets.map_err(asking("UDP sockets"))?.into_iter();
            peers.extend(sockets.map(|socket| socket.remote.ip()));
        }
        Ok(peers)
    }
}

fn owner(socket: &Described) -> Result<Option<SocketOwner>, SockDiagError> {
    if !socket.has_owner() {
        return Ok(None);
    }
    let cgroup = socket.cgroup.ok_or(SockDiagError::NoCgroup)?;
    Ok(Some(SocketOwner {
        uid: socket.uid,
        cgroup: CgroupId(cgroup),
        inode: socket.inode,
        cookie: socket.cookie,
    }))
}

fn exact(
    requests: &mut Requests,
    local: SocketAddr,
    remote: SocketAddr,
) -> io::Result<Option<Described>> {
    requests.send(SOCK_DIAG_BY_FAMILY, 0, &wire::exact(local, remote))?;
    match requests.receive()?.first() {
        Some(Answer::Message { body, .. }) => Ok(Some(wire::described(body)?)),
        Some(Answer::Error(errno)) if *errno != libc::ENOENT => {
            Err(io::Error::from_raw_os_error(*errno))
        }
        _ => Ok(None),
    }
}

fn dump(requests: &mut Requests, request: &[u8]) -> io::Result<Vec<Described>> {
    requests.send(SOCK_DIAG_BY_FAMILY, netlink::DUMP, request)?;
    let mut sockets = Vec::new();
    loop {
        for answer in requests.receive()? {
            match answer {
                Answer::Message { body, .. } => sockets.push(wire::described(body)?),
                Answer::Done => return Ok(sockets),
                Answer::Error(errno) => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

fn asking(asked: &'static str) -> impl Fn(io::Error) -> SockDiagError {
    move |source| SockDiagError::Ask { asked, source }
}

#[cfg(test)]
mod tests;
