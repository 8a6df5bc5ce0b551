//! Whose a TCP socket is: its cgroup and its user, asked of the kernel by `sock_diag(7)`.
//!
//! For what can be known of a socket only from outside: the other end of a connection that came over loopback, and
//! who listens. A [`SockDiag`] sees one network namespace, the one in which it was opened; for another one use
//! [`Netns::run`](crate::datapath::netns::Netns::run) with [`SockDiag::open`].
//!
//! Calls block, but wait for nobody: the kernel has answered when the request is sent.

pub(crate) mod wire;

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    time::Duration,
};

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
pub use wire::Malformed;
use wire::{Answer, Described, Family};

use crate::datapath::CgroupId;

/// The kernel's answer should be there at once; a runtime thread must not wait longer for one that got lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// The kernel puts a dump into pieces of at most this many bytes (`netlink_dump` in `net/netlink/af_netlink.c`).
const DATAGRAM: usize = 32 * 1024;

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
    /// The request could not be sent, was refused, or the answer did not come.
    #[error("ask sock_diag(7) for {asked}")]
    Ask {
        /// What was asked for.
        asked: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The answer does not have the form that the kernel's headers give it.
    #[error("read what sock_diag(7) answered for {asked}")]
    Answer {
        /// What was asked for.
        asked: &'static str,
        /// What is wrong with it.
        #[source]
        source: Malformed,
    },
    /// The kernel does not name cgroups of sockets: it is older than 5.9, or built without them.
    #[error(
        "sock_diag(7) does not tell the cgroup of a socket: use kernel 5.9 or later with CONFIG_SOCK_CGROUP_DATA"
    )]
    NoCgroup,
}

/// Asks about the sockets of one network namespace.
#[derive(Debug)]
pub struct SockDiag(Mutex<Exchange>);

/// One request at a time: answers carry its number.
#[derive(Debug)]
struct Exchange {
    socket: Socket,
    sequence: u32,
}

impl SockDiag {
    /// For the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the process may have no such socket, or the kernel was built without `CONFIG_INET_DIAG`.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW.cloexec(),
            Some(Protocol::from(libc::NETLINK_SOCK_DIAG)),
        )?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let exchange = Exchange {
            socket,
            sequence: 0,
        };
        Ok(Self(Mutex::new(exchange)))
    }

    /// Who holds the TCP socket whose own address is `local` and whose peer is `remote`.
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
        const ASKED: &str = "a socket";
        let mut exchange = self.0.lock();
        let sequence = exchange.send(&|n| wire::exact(n, local, remote), ASKED)?;
        loop {
            // None: an answer to an earlier request, which came too late.
            let Some(answer) = exchange.receive(sequence, ASKED)?.into_iter().next() else {
                continue;
            };
            return match answer {
                // Where there is no such connection, the kernel looks for who would take one.
                Answer::Socket(socket) if socket.state == wire::LISTEN => Ok(None),
                Answer::Socket(socket) => owner(&socket),
                Answer::Failed(libc::ENOENT) | Answer::Done => Ok(None),
                Answer::Failed(errno) => Err(refused(ASKED, errno)),
                Answer::Other => continue,
            };
        }
    }

    /// All TCP sockets that listen, each with its address and who holds it.
    ///
    /// # Errors
    /// [`SockDiagError`].
    pub fn listeners(&self) -> Result<Vec<(SocketAddr, SocketOwner)>, SockDiagError> {
        let mut listeners = Vec::new();
        for family in [Family::V4, Family::V6] {
            for socket in self.0.lock().listening(family)? {
                if let Some(owner) = owner(&socket)? {
                    listeners.push((socket.local, owner));
                }
            }
        }
        Ok(listeners)
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

impl Exchange {
    fn listening(&mut self, family: Family) -> Result<Vec<Described>, SockDiagError> {
        const ASKED: &str = "listening sockets";
        let sequence = self.send(&|n| wire::all_listening(n, family), ASKED)?;
        let mut sockets = Vec::new();
        loop {
            for answer in self.receive(sequence, ASKED)? {
                match answer {
                    Answer::Socket(socket) => sockets.push(socket),
                    Answer::Done => return Ok(sockets),
                    Answer::Failed(errno) => return Err(refused(ASKED, errno)),
                    Answer::Other => {}
                }
            }
        }
    }

    fn send(
        &mut self,
        request: &dyn Fn(u32) -> Vec<u8>,
        asked: &'static str,
    ) -> Result<u32, SockDiagError> {
        self.sequence = self.sequence.wrapping_add(1);
        // Without an address it goes to the kernel.
        (&self.socket)
            .write_all(&request(self.sequence))
            .map_err(asking(asked))?;
        Ok(self.sequence)
    }

    /// What the next datagram holds of answers to request `sequence`.
    fn receive(&self, sequence: u32, asked: &'static str) -> Result<Vec<Answer>, SockDiagError> {
        let mut buffer = vec![0; DATAGRAM];
        let read = (&self.socket).read(&mut buffer).map_err(asking(asked))?;
        buffer.truncate(read);
        wire::answers(&buffer, sequence).map_err(|source| SockDiagError::Answer { asked, source })
    }
}

fn asking(asked: &'static str) -> impl Fn(io::Error) -> SockDiagError {
    move |source| SockDiagError::Ask { asked, source }
}

fn refused(asked: &'static str, errno: i32) -> SockDiagError {
    asking(asked)(io::Error::from_raw_os_error(errno))
}

#[cfg(test)]
mod tests;
