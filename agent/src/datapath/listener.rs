//! The sockets that captured connections arrive at: on loopback, inside the workload's network namespace.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::netns::Netns;
use crate::sockets::{Kept, ListeningSockets, SocketKey};

/// Bursts of connects must not overflow it; the kernel cuts it to `net.core.somaxconn` of the namespace.
const BACKLOG: i32 = 4096;

/// The listeners of one namespace. Non-blocking.
#[derive(Debug)]
pub struct CaptureListeners {
    /// All of 127.0.0.0/8: the programs spread destinations over it.
    pub v4: TcpListener,
    /// `::1`; `None` where the namespace has no IPv6.
    pub v6: Option<TcpListener>,
    /// As long as they are to be handed over.
    pub kept: Vec<Kept>,
}

/// Opens the listeners in `netns`, or takes those that an agent before opened there.
///
/// The IPv4 one is bound to the device `lo` and not to an address: it answers on every loopback address, and
/// nothing that comes by another device reaches it.
///
/// # Errors
/// If the port is taken, or the namespace cannot be entered.
pub fn listen(
    netns: &Netns,
    port: u16,
    sockets: &ListeningSockets,
) -> io::Result<CaptureListeners> {
    netns
        .run(|| {
            let listen = |address: SocketAddr| {
                sockets.listen(SocketKey::here(address)?, || listen_on(address))
            };
            let (v4, kept) = listen((Ipv4Addr::UNSPECIFIED, port).into())?;
            let mut kept = vec![kept];
            let v6 = match listen((Ipv6Addr::LOCALHOST, port).into()) {
                Ok((listener, also_kept)) => {
                    kept.push(also_kept);
                    Some(listener)
                }
                Err(error) if has_no_ipv6(&error) => None,
                Err(error) => return Err(error),
            };
            Ok(CaptureListeners { v4, v6, kept })
        })
        .map_err(io::Error::other)?
}

fn has_no_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    // Connections of an earlier agent in TIME_WAIT hold the port otherwise.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    } else {
        socket.bind_device(Some(b"lo"))?;
    }
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
