//! Messages with descriptors between two agents, over a Unix socket that keeps messages apart.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recvmsg, sendmsg, socket_with, sockopt::socket_peercred,
};
use tokio::io::unix::AsyncFd;

/// The most descriptors that Linux passes in one message (`SCM_MAX_FD`).
pub(super) const DESCRIPTORS_MAX: usize = 253;

/// The most bytes of one message.
const BYTES_MAX: usize = 4096;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

#[expect(
    deprecated,
    reason = "an OwnedFd keeps its descriptor as long as it lives, which is what its successor asks for"
)]
fn watched(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(socket)
}

/// One end of a connection between two agents.
#[derive(Debug)]
pub(super) struct Channel(AsyncFd<OwnedFd>);

/// What arrived: bytes, and the descriptors with them.
pub(super) type Packet = (Vec<u8>, Vec<OwnedFd>);

impl Channel {
    /// Connects to who listens at `path`.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        watched(socket).map(Self)
    }

    /// Process and user id of the other end, as the kernel saw them at its connect or listen.
    pub(super) fn peer(&self) -> io::Result<(u32, u32)> {
        let peer = socket_peercred(self.0.get_ref())?;
        let process = peer.pid.as_raw_nonzero().get().cast_unsigned();
        Ok((process, peer.uid.as_raw()))
    }

    /// Sends one message, at most [`DESCRIPTORS_MAX`] descriptors with it. Cancel-safe.
    pub(super) async fn send(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        loop {
            let mut ready = self.0.writable().await?;
            let sent = ready.try_io(|socket| {
                let mut space =
                    [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty()
                    && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
                {
                    return Err(io::ErrorKind::ArgumentListTooLong.into());
                }
                let sent = sendmsg(
                    socket.get_ref(),
                    &[IoSlice::new(bytes)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                );
                Ok(sent.map(drop)?)
            });
            if let Ok(sent) = sent {
                return sent;
            }
        }
    }

    /// The next message; `None` if the other end has closed. Cancel-safe.
    pub(super) async fn receive(&self) -> io::Result<Option<Packet>> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(received) = ready.try_io(|socket| receive(socket.get_ref())) {
                return received;
            }
        }
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        flags,
    )?;
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message of the other agent was cut: too long, or no room for its descriptors",
        ));
    }
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    bytes.truncate(received.bytes);
    // Messages are never empty.
    Ok((!bytes.is_empty()).then_some((bytes, descriptors)))
}

/// Where the next agent knocks.
#[derive(Debug)]
pub(super) struct ChannelListener(AsyncFd<OwnedFd>);

impl ChannelListener {
    /// Listens at `path`, which must be free.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 4)?;
        watched(socket).map(Self)
    }

    /// The next connection. Cancel-safe.
    pub(super) async fn accept(&self) -> io::Result<Channel> {
        loop {
            let mut ready = self.0.readable().await?;
            let accepted = ready.try_io(|socket| Ok(accept_with(socket.as_fd(), FLAGS)?));
            if let Ok(accepted) = accepted {
                return watched(accepted?).map(Channel);
            }
        }
    }
}
