//! The bytes of `sock_diag(7)`: requests as the kernel reads them, and what it answers. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::netlink::{Fields, Malformed, find, host32};

/// `SOCK_DIAG_BY_FAMILY` of `include/uapi/linux/sock_diag.h`.
pub(super) const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `INET_DIAG_CGROUP_ID` of `include/uapi/linux/inet_diag.h`. Kernel 5.9; it is always sent.
const CGROUP_ID: u16 = 21;
/// `enum` of `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const TIME_WAIT: u8 = 6;
pub(super) const LISTEN: u8 = 10;

/// The two families that TCP and UDP are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    fn number(self) -> u8 {
        // AF_INET and AF_INET6 of socket(2).
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }
}

/// One socket as the kernel describes it. IPv4-mapped addresses are IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) state: u8,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) uid: u32,
    /// 0 if no process holds it any more.
    pub(super) inode: u32,
    pub(super) cookie: u64,
    pub(super) cgroup: Option<u64>,
}

impl Described {
    /// Whether it is a whole socket that a process holds. Of others the kernel tells no owner, and says user 0.
    pub(super) fn has_owner(&self) -> bool {
        self.inode != 0 && self.state != TIME_WAIT
    }

    /// Whether it is the end of a connection, and not of the attempt at one.
    pub(super) fn is_connected(&self) -> bool {
        !matches!(self.state, SYN_SENT | LISTEN)
    }
}

/// Asks for the one TCP socket with these ends.
pub(super) fn exact(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let (local, remote) = (canonical(local), canonical(remote));
    let family = match local {
        SocketAddr::V4(_) => Family::V4,
        SocketAddr::V6(_) => Family::V6,
    };
    request(family, TCP, u32::MAX, local, remote)
}

/// Asks for all TCP sockets of a family that listen.
pub(super) fn all_listening(family: Family) -> Vec<u8> {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    request(family, TCP, 1 << LISTEN, any, any)
}

/// Asks for all UDP sockets of a family that are connected to this port.
pub(super) fn all_connected(family: Family, port: u16) -> Vec<u8> {
    let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    request(family, UDP, 1 << ESTABLISHED, any(0), any(port))
}

/// `IPPROTO_TCP` and `IPPROTO_UDP`
const TCP: u8 = 6;
const UDP: u8 = 17;

/// `struct inet_diag_req_v2`
fn request(
    family: Family,
    protocol: u8,
    states: u32,
    local: SocketAddr,
    remote: SocketAddr,
) -> Vec<u8> {
    /// `INET_DIAG_NOCOOKIE`: any socket with these ends.
    const NO_COOKIE: [u8; 8] = [0xff; 8];
    let interface = match remote {
        // Addresses of a link are told apart by it.
        SocketAddr::V6(v6) => v6.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    [
        &[family.number(), protocol, 0, 0][..],
        &host32(states),
        &local.port().to_be_bytes(),
        &remote.port().to_be_bytes(),
        &sixteen(local.ip()),
        &sixteen(remote.ip()),
        &host32(interface),
        &NO_COOKIE,
    ]
    .concat()
}

/// `struct inet_diag_msg` and the attributes behind it.
pub(super) fn described(body: &[u8]) -> Result<Described, Malformed> {
    let mut fields = Fields(body);
    let [family, state, _timer, _retransmits] = fields.take()?;
    let (local_port, remote_port) = (fields.network16()?, fields.network16()?);
    let (local, remote): ([u8; 16], [u8; 16]) = (fields.take()?, fields.take()?);
    let interface = fields.host32()?;
    let (cookie_low, cookie_high) = (fields.host32()?, fields.host32()?);
    let [_expires, _received, _sending, uid, inode] = [
        fields.host32()?,
        fields.host32()?,
        fields.host32()?,
        fields.host32()?,
        fields.host32()?,
    ];
    let family = if family == Family::V4.number() {
        Family::V4
    } else if family == Family::V6.number() {
        Family::V6
    } else {
        return Err(Malformed);
    };
    Ok(Described {
        state,
        local: socket_address(family, local, local_port, interface),
        remote: socket_address(family, remote, remote_port, interface),
        uid,
        inode,
        cookie: u64::from(cookie_high) << 32 | u64::from(cookie_low),
        cgroup: find(fields.0, CGROUP_ID)?
            .map(|value| Fields(value).host64())
            .transpose()?,
    })
}

fn socket_address(family: Family, ip: [u8; 16], port: u16, interface: u32) -> SocketAddr {
    match family {
        Family::V4 => {
            let [a, b, c, d, ..] = ip;
            (Ipv4Addr::new(a, b, c, d), port).into()
        }
        Family::V6 => {
            let ip = Ipv6Addr::from(ip);
            let scope = if ip.is_unicast_link_local() {
                interface
            } else {
                0
            };
            canonical(std::net::SocketAddrV6::new(ip, port, 0, scope).into())
        }
    }
}

/// IPv4-mapped becomes IPv4: the kernel finds such a socket under both.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => (v4, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// Room for either family, IPv4 at its beginning.
fn sixteen(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Any bytes as an answer of the kernel: read or refused. For the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_any(bytes: &[u8]) {
    use crate::netlink::{Answer, answers};
    for answer in answers(bytes, 1).unwrap_or_default() {
        if let Answer::Message { body, .. } = answer
            && let Ok(socket) = described(body)
        {
            assert_eq!(socket.local.ip(), socket.local.ip().to_canonical());
        }
    }
}
