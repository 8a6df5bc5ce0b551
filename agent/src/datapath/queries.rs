//! DNS queries in datagrams: the socket in a namespace that they are sent to, and which server one was meant for.
//!
//! A captured query comes to a loopback address that stands for its server, so the address that a datagram was sent to
//! must be known, and its answer must leave from there (`IP_PKTINFO`).

#![expect(
    unsafe_code,
    reason = "no safe binding for the address that a datagram was sent to"
)]

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    ptr::{from_mut, from_ref},
};

use sidestep_abi::{ListenerKey, Server};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Datapath, DatapathError, MapOperation, NetnsCookie, bpf, netns::Netns, types::socket_address,
};

/// Where the captured queries of one namespace arrive. Non-blocking.
#[derive(Debug)]
pub struct QuerySocket(Socket);

/// A datagram as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// How many bytes.
    pub length: usize,
    /// Who sent it.
    pub client: SocketAddrV4,
    /// The address that it was sent to, which stands for the server.
    pub stand_in: Ipv4Addr,
}

impl QuerySocket {
    /// Opens it in `netns`, on all loopback addresses. Another agent may have one at the same port (`SO_REUSEPORT`);
    /// the programs send to that which was enrolled last.
    ///
    /// # Errors
    /// If the port is taken, or the namespace cannot be entered.
    pub fn open(netns: &Netns, port: u16) -> io::Result<Self> {
        netns
            .run(|| Self::open_here(port))
            .map_err(io::Error::other)?
    }

    fn open_here(port: u16) -> io::Result<Self> {
        let kind = Type::DGRAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::IPV4, kind, Some(Protocol::UDP))?;
        socket.set_reuse_port(true)?;
        set_packet_info(&socket)?;
        socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
        Ok(Self(socket))
    }

    /// The next datagram that was sent to a loopback address; its bytes are written to `buffer`.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none; else what the kernel says.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        loop {
            let received = receive(self.as_raw_fd(), buffer)?;
            // Whoever is not on this host sent it to another address.
            if received.stand_in.is_loopback() {
                return Ok(received);
            }
        }
    }

    /// Sends `message` to `client`, from the address that it asked.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn send(&self, message: &[u8], client: SocketAddrV4, stand_in: Ipv4Addr) -> io::Result<()> {
        send(self.as_raw_fd(), message, client, stand_in)
    }

    /// From now on takes nothing that is sent to it, but answers still leave.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn retire(&self) -> io::Result<()> {
        // Connected, it takes only what its peer sends, which is itself.
        self.0.connect(&self.0.local_addr()?)
    }
}

impl std::os::fd::AsRawFd for QuerySocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl std::os::fd::AsFd for QuerySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Datapath {
    /// Lets queries in datagrams be captured in this namespace, as long as `socket` is open.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel refuses.
    pub fn enrol_queries(
        &self,
        netns: NetnsCookie,
        socket: &QuerySocket,
    ) -> Result<(), DatapathError> {
        let map = self.maps.listeners.as_fd();
        bpf::map_update(map, &ListenerKey::datagrams(netns.0), &socket.as_raw_fd())
            .map_err(|source| DatapathError::map("LISTENERS", MapOperation::Write, source))
    }

    /// From now on leaves queries in datagrams of this namespace alone.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel refuses.
    pub fn dismiss_queries(&self, netns: NetnsCookie) -> Result<(), DatapathError> {
        let map = self.maps.listeners.as_fd();
        bpf::map_delete(map, &ListenerKey::datagrams(netns.0))
            .map(drop)
            .map_err(|source| DatapathError::map("LISTENERS", MapOperation::Delete, source))
    }

    /// The server that a loopback address stands for. It never stands for another.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel refuses to answer.
    pub fn server(&self, stand_in: Ipv4Addr) -> Result<Option<SocketAddr>, DatapathError> {
        let key = stand_in.to_bits().to_be();
        let server = bpf::map_lookup::<u32, Server>(self.maps.servers.as_fd(), &key)
            .map_err(|source| DatapathError::map("SERVERS", MapOperation::Read, source))?;
        Ok(server.map(|server| socket_address(&server.address, server.port)))
    }
}

fn set_packet_info(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option reads an int, which the length says.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_PKTINFO,
            from_ref(&on).cast(),
            length_of::<libc::c_int>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn receive(socket: RawFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut client = address_of(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    let mut control = Control::new(Ipv4Addr::UNSPECIFIED);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut header = header(&mut client, &mut part, &mut control);
    // SAFETY: every pointer in the header is to memory of the length beside it, which outlives the call.
    let length = unsafe { libc::recvmsg(socket, &raw mut header, 0) };
    let length = usize::try_from(length).map_err(|_negative| io::Error::last_os_error())?;
    let kind = (control.header.cmsg_level, control.header.cmsg_type);
    if header.msg_controllen < Control::LENGTH || kind != (libc::IPPROTO_IP, libc::IP_PKTINFO) {
        return Err(io::Error::other("no address with the datagram"));
    }
    Ok(Received {
        length,
        client: SocketAddrV4::new(ip(client.sin_addr), u16::from_be(client.sin_port)),
        stand_in: ip(control.info.ipi_addr),
    })
}

fn send(socket: RawFd, message: &[u8], client: SocketAddrV4, stand_in: Ipv4Addr) -> io::Result<()> {
    let mut to = address_of(client);
    let mut control = Control::new(stand_in);
    let mut part = libc::iovec {
        // Only read.
        iov_base: message.as_ptr().cast_mut().cast(),
        iov_len: message.len(),
    };
    let header = header(&mut to, &mut part, &mut control);
    // SAFETY: every pointer in the header is to memory of the length beside it, which outlives the call.
    let sent = unsafe { libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL) };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A control message with an address, as cmsg(3) lays it out where `size_t` has 8 bytes.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    info: libc::in_pktinfo,
}

impl Control {
    const LENGTH: usize = size_of::<libc::cmsghdr>() + size_of::<libc::in_pktinfo>();

    /// With `source` as the address to send from.
    const fn new(source: Ipv4Addr) -> Self {
        Self {
            header: libc::cmsghdr {
                cmsg_len: Self::LENGTH,
                cmsg_level: libc::IPPROTO_IP,
                cmsg_type: libc::IP_PKTINFO,
            },
            info: libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: word(source),
                ipi_addr: word(Ipv4Addr::UNSPECIFIED),
            },
        }
    }
}

/// The rest of the layout that [`Control`] relies on.
const _: () =
    assert!(size_of::<usize>() == 8 && Control::LENGTH == 28 && size_of::<Control>() == 32);

fn header(
    name: &mut libc::sockaddr_in,
    part: &mut libc::iovec,
    control: &mut Control,
) -> libc::msghdr {
    libc::msghdr {
        msg_name: from_mut(name).cast(),
        msg_namelen: length_of::<libc::sockaddr_in>(),
        msg_iov: part,
        msg_iovlen: 1,
        msg_control: from_mut(control).cast(),
        msg_controllen: size_of::<Control>(),
        msg_flags: 0,
    }
}

fn address_of(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: AF_INET,
        sin_port: address.port().to_be(),
        sin_addr: word(*address.ip()),
        sin_zero: [0; 8],
    }
}

const fn word(address: Ipv4Addr) -> libc::in_addr {
    libc::in_addr {
        s_addr: address.to_bits().to_be(),
    }
}

fn ip(address: libc::in_addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from_be(address.s_addr))
}

#[expect(clippy::cast_possible_truncation, reason = "a small number")]
const AF_INET: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;

#[expect(clippy::cast_possible_truncation, reason = "a few bytes")]
const fn length_of<T>() -> u32 {
    size_of::<T>() as u32
}
