//! DNS queries in datagrams: the socket in a namespace that they are sent to, and which server one was meant for.
//!
//! A captured query comes to a loopback address that stands for its server, so the address that a datagram was sent to
//! must be known, and its answer must leave from there (`IP_PKTINFO`).

#![expect(
    unsafe_code,
    reason = "no safe binding for the address that a datagram was sent to"
)]

use std::{
    collections::HashSet,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    ptr::{from_mut, from_ref},
    time::Duration,
};

use sidestep_abi::{ListenerKey, MAX_SERVERS, Server};
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

    /// The server that a loopback address stands for.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel refuses to answer.
    pub fn server(&self, stand_in: Ipv4Addr) -> Result<Option<SocketAddr>, DatapathError> {
        let word = stand_in.to_bits().to_be();
        let read = || {
            bpf::map_lookup::<u32, Server>(self.maps.servers.as_fd(), &word)
                .map_err(|source| DatapathError::map("SERVERS", MapOperation::Read, source))
        };
        let mut found = read()?;
        if found.is_some_and(|server| !server.is_for(word)) {
            // It was taken away while it was read.
            found = read()?;
        }
        let whole = found.filter(|server| server.is_for(word));
        Ok(whole.map(|server| socket_address(&server.address, server.port)))
    }

    /// How many servers have a loopback address that stands for them.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel refuses to answer.
    pub fn servers(&self) -> Result<usize, DatapathError> {
        self.all_servers().map(|servers| servers.len())
    }

    /// Takes their loopback addresses away from servers that nobody asks any more, where `limits` say so: in one call
    /// an address is retired, in a later one it is free. `connected` gives the addresses to which sockets are
    /// connected now, and is only called if it matters. Returns how many are free now.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel refuses; what `connected` says, by its own error.
    pub fn sweep_servers<E: From<DatapathError>>(
        &self,
        limits: SweepLimits,
        connected: impl FnOnce() -> Result<HashSet<Ipv4Addr>, E>,
    ) -> Result<usize, E> {
        let servers = self.all_servers()?;
        let crowded = servers.len() > limits.room;
        if !crowded && servers.iter().all(|(_, server)| server.retired == 0) {
            return Ok(0);
        }
        let connected = connected()?;
        let now = bpf::monotonic_now();
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let map = self.maps.servers.as_fd();
        let mut freed = 0;
        for (word, server) in servers {
            let connected = connected.contains(&Ipv4Addr::from_bits(u32::from_be(word)));
            let retire =
                |retired| bpf::map_update(map, &word, &server.with_retired(word, retired, now_ns));
            let written = match fate(&server, connected, crowded, now, limits) {
                Fate::Stays => Ok(()),
                Fate::Retires => retire(true),
                Fate::Returns => retire(false),
                Fate::Goes => bpf::map_delete(map, &word).map(|gone| freed += usize::from(gone)),
            };
            written.map_err(|source| DatapathError::map("SERVERS", MapOperation::Write, source))?;
        }
        Ok(freed)
    }

    /// Those that are whole: what changes just now is seen the next time.
    fn all_servers(&self) -> Result<Vec<(u32, Server)>, DatapathError> {
        let mut servers = bpf::map_entries::<u32, Server>(self.maps.servers.as_fd())
            .map_err(|source| DatapathError::map("SERVERS", MapOperation::Read, source))?;
        servers.retain(|(word, server)| server.is_for(*word));
        Ok(servers)
    }
}

/// When servers lose their loopback addresses.
#[derive(Debug, Clone, Copy)]
pub struct SweepLimits {
    /// Not while there are no more servers than this.
    pub room: usize,
    /// Not before nobody was sent there for so long: an answer may be on its way to a socket that is not connected.
    pub idle: Duration,
    /// Retired for so long, until what a program has decided meanwhile is seen.
    pub grace: Duration,
}

impl Default for SweepLimits {
    /// Half of the room there is, an hour, and half a minute.
    fn default() -> Self {
        Self {
            room: usize::try_from(MAX_SERVERS / 2).unwrap_or(usize::MAX),
            idle: Duration::from_secs(3600),
            grace: Duration::from_secs(30),
        }
    }
}

/// What becomes of a server's loopback address in a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Stays,
    /// Programs send nobody there any more; what was sent still comes from its server.
    Retires,
    /// Somebody connected to it while it was being retired.
    Returns,
    /// It may come to stand for another.
    Goes,
}

/// `connected`: whether a socket is; `crowded`: whether there are more servers than `limits` leave alone.
fn fate(
    server: &Server,
    connected: bool,
    crowded: bool,
    now: Duration,
    limits: SweepLimits,
) -> Fate {
    let since = now.saturating_sub(Duration::from_nanos(server.used_ns));
    match (server.retired != 0, connected) {
        (true, true) => Fate::Returns,
        (true, false) if since >= limits.grace => Fate::Goes,
        (false, false) if crowded && since >= limits.idle => Fate::Retires,
        (true | false, false) | (false, true) => Fate::Stays,
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

#[cfg(test)]
mod tests {
    use sidestep_abi::{Address, DNS_PORT};

    use super::*;

    #[test]
    fn only_what_was_retired_and_is_not_in_use_goes() {
        let limits = SweepLimits {
            room: 0,
            idle: Duration::from_secs(100),
            grace: Duration::from_secs(10),
        };
        let now = Duration::from_secs(1000);
        for (retired, seconds, connected, crowded, expected) in [
            (false, 99, false, true, Fate::Stays),
            (false, 100, false, true, Fate::Retires),
            (false, 100, false, false, Fate::Stays),
            (false, 100, true, true, Fate::Stays),
            (true, 9, false, true, Fate::Stays),
            (true, 10, false, true, Fate::Goes),
            (true, 10, false, false, Fate::Goes),
            (true, 10, true, true, Fate::Returns),
            (true, 0, true, false, Fate::Returns),
        ] {
            let then = now.saturating_sub(Duration::from_secs(seconds));
            let then = u64::try_from(then.as_nanos()).unwrap();
            let server = Server::new(7, Address::LOOPBACK_V6, DNS_PORT, 0);
            let server = server.with_retired(7, retired, then);
            let found = fate(&server, connected, crowded, now, limits);
            assert_eq!(found, expected, "{server:?} {connected} {crowded}");
        }
    }
}
