//! What a redirected connection was before, by `nfnetlink` of conntrack: whose it was and where it was aimed.
//!
//! `SO_ORIGINAL_DST` tells the destination only. The source may be another one too: where the ports of two
//! connections meet behind a redirection, the kernel gives the second a port that its maker does not have, and
//! may give that one's number to somebody else's socket.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use crate::netlink::{Answer, Fields, Malformed, NESTED, Requests, attribute, find};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_GET`.
const GET: u16 = 0x101;

/// `enum ctattr_type` and below, of `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IPV4_SOURCE: u16 = 1;
const IPV4_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;

/// A connection as its maker sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Original {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

/// What the connection was that arrived at `own` and seems to come from `peer`; `None` if none is tracked.
///
/// # Errors
/// What the kernel says; `EPERM` without `CAP_NET_ADMIN`.
pub(super) fn original(
    requests: &mut Requests,
    own: SocketAddr,
    peer: SocketAddr,
) -> io::Result<Option<Original>> {
    requests.send(GET, 0, &question(own, peer))?;
    match requests.receive()?.first() {
        Some(Answer::Message { body, .. }) => Ok(Some(read(body)?)),
        Some(Answer::Error(libc::ENOENT)) => Ok(None),
        Some(Answer::Error(errno)) => Err(io::Error::from_raw_os_error(*errno)),
        _ => Err(Malformed.into()),
    }
}

/// `struct nfgenmsg`, and the tuple of what goes back: from `own` to `peer`.
fn question(own: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    /// `IPPROTO_TCP`
    const TCP: u8 = 6;
    // AF_INET and AF_INET6 of socket(2).
    let family = if own.is_ipv4() { 2 } else { 10 };
    let addresses = match (own.ip(), peer.ip()) {
        (IpAddr::V4(own), IpAddr::V4(peer)) => [
            attribute(IPV4_SOURCE, &own.octets()),
            attribute(IPV4_DESTINATION, &peer.octets()),
        ],
        (own, peer) => [
            attribute(IPV6_SOURCE, &sixteen(own)),
            attribute(IPV6_DESTINATION, &sixteen(peer)),
        ],
    };
    let protocol = [
        attribute(PROTOCOL_NUMBER, &[TCP]),
        attribute(SOURCE_PORT, &own.port().to_be_bytes()),
        attribute(DESTINATION_PORT, &peer.port().to_be_bytes()),
    ];
    let tuple = [
        attribute(TUPLE_IP | NESTED, &addresses.concat()),
        attribute(TUPLE_PROTOCOL | NESTED, &protocol.concat()),
    ];
    [
        vec![family, 0, 0, 0],
        attribute(TUPLE_REPLY | NESTED, &tuple.concat()),
    ]
    .concat()
}

fn sixteen(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The tuple of the first packet.
fn read(body: &[u8]) -> Result<Original, Malformed> {
    let attributes = body.get(4..).ok_or(Malformed)?;
    let within = |attributes, kind| find(attributes, kind)?.ok_or(Malformed);
    let tuple = within(attributes, TUPLE_ORIGINAL)?;
    let (ip, protocol) = (within(tuple, TUPLE_IP)?, within(tuple, TUPLE_PROTOCOL)?);
    let end = |v4, v6, port| -> Result<SocketAddr, Malformed> {
        let ip: IpAddr = match find(ip, v4)? {
            Some(v4) => Fields(v4).take::<4>()?.into(),
            None => Fields(within(ip, v6)?).take::<16>()?.into(),
        };
        Ok((ip, Fields(within(protocol, port)?).network16()?).into())
    };
    Ok(Original {
        source: end(IPV4_SOURCE, IPV6_SOURCE, SOURCE_PORT)?,
        destination: end(IPV4_DESTINATION, IPV6_DESTINATION, DESTINATION_PORT)?,
    })
}

/// Any bytes as an answer of the kernel: read or refused. For the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_any(bytes: &[u8]) {
    for answer in crate::netlink::answers(bytes, 1).unwrap_or_default() {
        if let Answer::Message { body, .. } = answer
            && let Ok(original) = read(body)
        {
            // What is asked about the other way round is the same.
            let mut asked = question(original.source, original.destination);
            if let Some(tuple) = asked.get_mut(6) {
                *tuple = 1;
            }
            let same_family = original.source.is_ipv4() == original.destination.is_ipv4();
            assert!(!same_family || read(&asked) == Ok(original));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tuple_is_read_as_it_is_written() {
        for (own, peer) in [
            ("127.1.2.3:15001", "127.0.0.1:40000"),
            ("[::1]:15001", "[fd00::1]:40000"),
        ] {
            let (own, peer): (SocketAddr, SocketAddr) =
                (own.parse().unwrap(), peer.parse().unwrap());
            let mut bytes = question(own, peer);
            // The one that is asked about is the other one.
            assert_eq!(read(&bytes), Err(Malformed));
            bytes[6] = 1;
            let original = Original {
                source: own,
                destination: peer,
            };
            assert_eq!(read(&bytes), Ok(original));
            for length in 0..bytes.len() {
                assert_eq!(read(&bytes[..length]), Err(Malformed));
            }
        }
    }
}
