//! The bytes of `sock_diag(7)`: requests as the kernel reads them, and what it answers. Pure.
//!
//! Netlink messages are in the byte order of the host, ports and addresses in that of the network. An answer grows
//! at its end from kernel to kernel, so what is not known is skipped and only what is used must be there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// `SOCK_DIAG_BY_FAMILY` of `include/uapi/linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `struct nlmsghdr` and `struct inet_diag_req_v2` in bytes.
const HEADER: usize = 16;
const REQUEST: usize = 56;
/// `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// `INET_DIAG_CGROUP_ID` of `include/uapi/linux/inet_diag.h`. Kernel 5.9; it is always sent.
const CGROUP_ID: u16 = 21;
/// The bits of an attribute's type that say how it is written (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;
/// `enum` of `include/net/tcp_states.h`.
const TIME_WAIT: u8 = 6;
pub(super) const LISTEN: u8 = 10;

/// The two families that TCP is over.
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
}

/// A message of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Socket(Described),
    /// The last of a dump.
    Done,
    /// The request failed with this `errno`.
    Failed(i32),
    /// Of a kind that was not asked for.
    Other,
}

/// An answer breaks off or contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an answer of sock_diag(7) that is not whole")]
pub struct Malformed;

/// Asks for the one TCP socket with these ends.
pub(super) fn exact(sequence: u32, local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let (local, remote) = (canonical(local), canonical(remote));
    let family = match local {
        SocketAddr::V4(_) => Family::V4,
        SocketAddr::V6(_) => Family::V6,
    };
    request(family, sequence, 0, u32::MAX, local, remote)
}

/// Asks for all TCP sockets of a family that listen.
pub(super) fn all_listening(sequence: u32, family: Family) -> Vec<u8> {
    /// `NLM_F_DUMP` of `netlink(7)`.
    const DUMP: u16 = 0x300;
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    request(family, sequence, DUMP, 1 << LISTEN, any, any)
}

fn request(
    family: Family,
    sequence: u32,
    flags: u16,
    states: u32,
    local: SocketAddr,
    remote: SocketAddr,
) -> Vec<u8> {
    /// `NLM_F_REQUEST` of `netlink(7)`.
    const IS_REQUEST: u16 = 1;
    /// `IPPROTO_TCP`.
    const TCP: u8 = 6;
    /// `INET_DIAG_NOCOOKIE`: any socket with these ends.
    const NO_COOKIE: [u8; 8] = [0xff; 8];
    let interface = match remote {
        // Addresses of a link are told apart by it.
        SocketAddr::V6(v6) => v6.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    let length = u32::try_from(HEADER + REQUEST).unwrap_or(u32::MAX);
    [
        &host32(length)[..],
        &host16(SOCK_DIAG_BY_FAMILY),
        &host16(IS_REQUEST | flags),
        &host32(sequence),
        &host32(0),
        &[family.number(), TCP, 0, 0],
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

/// The messages of one datagram that answer request `sequence`.
pub(super) fn answers(datagram: &[u8], sequence: u32) -> Result<Vec<Answer>, Malformed> {
    let mut rest = datagram;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let mut header = Fields(rest);
        let length = usize::try_from(header.host32()?).unwrap_or(usize::MAX);
        let kind = header.host16()?;
        let _flags = header.host16()?;
        let answers_to = header.host32()?;
        let body = rest.get(HEADER..length).ok_or(Malformed)?;
        if answers_to == sequence {
            found.push(answer(kind, body)?);
        }
        rest = rest.get(aligned(length)..).unwrap_or_default();
    }
    Ok(found)
}

fn answer(kind: u16, body: &[u8]) -> Result<Answer, Malformed> {
    /// `NLMSG_ERROR` and `NLMSG_DONE` of `netlink(7)`.
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    match kind {
        SOCK_DIAG_BY_FAMILY => described(body).map(Answer::Socket),
        // Both begin with a negative error number, or 0.
        ERROR | DONE => {
            let errno = Fields(body).host32()?.cast_signed().saturating_neg();
            match (kind, errno) {
                (DONE, 0) => Ok(Answer::Done),
                (_, errno) => Ok(Answer::Failed(errno)),
            }
        }
        _ => Ok(Answer::Other),
    }
}

/// `struct inet_diag_msg` and the attributes behind it.
fn described(body: &[u8]) -> Result<Described, Malformed> {
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
        cgroup: attribute(fields.0, CGROUP_ID)?
            .map(|value| Fields(value).host64())
            .transpose()?,
    })
}

fn attribute(attributes: &[u8], wanted: u16) -> Result<Option<&[u8]>, Malformed> {
    let mut rest = attributes;
    while !rest.is_empty() {
        let mut header = Fields(rest);
        let (length, kind) = (usize::from(header.host16()?), header.host16()?);
        let value = rest.get(ATTRIBUTE..length).ok_or(Malformed)?;
        if kind & TYPE_MASK == wanted {
            return Ok(Some(value));
        }
        rest = rest.get(aligned(length)..).unwrap_or_default();
    }
    Ok(None)
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

/// Messages and attributes begin at multiples of 4 (`NLMSG_ALIGN`, `NLA_ALIGN`).
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Reads from the beginning, and gets shorter.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn network16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_be_bytes)
    }

    fn host16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_ne_bytes)
    }

    fn host32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    fn host64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }
}

#[expect(clippy::host_endian_bytes, reason = "netlink(7): host byte order")]
fn host16(value: u16) -> [u8; 2] {
    value.to_ne_bytes()
}

#[expect(clippy::host_endian_bytes, reason = "netlink(7): host byte order")]
fn host32(value: u32) -> [u8; 4] {
    value.to_ne_bytes()
}

/// Any bytes as an answer of the kernel: read or refused. For the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_any(bytes: &[u8]) {
    if let Ok(found) = answers(bytes, 1) {
        // A message is no shorter than its header.
        assert!(found.len() <= bytes.len().div_ceil(HEADER));
        for answer in found {
            if let Answer::Socket(socket) = answer {
                assert_eq!(socket.local.ip(), socket.local.ip().to_canonical());
            }
        }
    }
}
