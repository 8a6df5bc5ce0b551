//! Sockets to ask servers with: in the network namespace of who was captured, where its server is.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::mpsc,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpSocket, UdpSocket},
    sync::oneshot,
};

use super::Original;
use crate::datapath::netns::{Netns, NetnsError};

/// A thread that lives in a namespace and makes sockets there: setns(2) changes a whole thread.
#[derive(Debug)]
pub struct NamespaceSockets {
    orders: mpsc::Sender<Order>,
}

type Order = (Domain, Type, oneshot::Sender<io::Result<Socket>>);

impl NamespaceSockets {
    /// Starts the thread in `netns`. It ends when this is dropped.
    ///
    /// # Errors
    /// If no thread can be made.
    pub(super) fn start(netns: &Netns) -> Result<Self, NetnsError> {
        let (orders, queue) = mpsc::channel::<Order>();
        netns.spawn_thread("netns queries", move || {
            for (domain, kind, reply) in queue {
                // Nobody waits any more: the socket is closed by being dropped.
                drop(reply.send(make(domain, kind)));
            }
        })?;
        Ok(Self { orders })
    }

    async fn make(&self, domain: Domain, kind: Type) -> io::Result<Socket> {
        let ended = || io::Error::other("the thread in that namespace ended");
        let (reply, answer) = oneshot::channel();
        let order = (domain, kind, reply);
        self.orders.send(order).map_err(|_closed| ended())?;
        answer.await.map_err(|_closed| ended())?
    }
}

/// A socket for datagrams to `server`, at a port that the kernel picks.
pub(super) async fn datagrams(
    original: Option<&Original>,
    server: SocketAddr,
) -> io::Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = socket(original, server, Type::DGRAM).await?;
    socket.bind(&SocketAddr::new(any, 0).into())?;
    UdpSocket::from_std(socket.into())
}

/// A socket for a connection to `server`.
pub(super) async fn stream(
    original: Option<&Original>,
    server: SocketAddr,
) -> io::Result<TcpSocket> {
    let socket = socket(original, server, Type::STREAM).await?;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

async fn socket(original: Option<&Original>, server: SocketAddr, kind: Type) -> io::Result<Socket> {
    let domain = Domain::for_address(server);
    match original.and_then(|original| original.namespace.sockets.as_ref()) {
        Some(sockets) => sockets.make(domain, kind).await,
        None => make(domain, kind),
    }
}

fn make(domain: Domain, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM {
        Protocol::UDP
    } else {
        Protocol::TCP
    };
    Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol))
}
