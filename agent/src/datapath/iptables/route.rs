//! A route to virtual addresses by `rtnetlink(7)`, in the network namespace of the calling thread.
//!
//! A packet must be on its way before a rule can redirect it, so there must be one. It leads to `lo`, where nobody
//! takes a packet that no rule redirected: also without rules, nothing gets out by a default route.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use crate::netlink::{ACKNOWLEDGE, Answer, CREATE, Malformed, Requests, attribute, host32};

/// Marks a route as ours (`rtm_protocol`); iproute2 shows the number. Nobody else has it in
/// `/etc/iproute2/rt_protos`.
const PROTOCOL: u8 = 83;

/// `RTM_NEWROUTE` and `RTM_DELROUTE` of `include/uapi/linux/rtnetlink.h`.
const NEW: u16 = 24;
const DELETE: u16 = 25;

/// Leads a range to `lo`. If there is a route to exactly this range already, that one stays.
///
/// # Errors
/// What the kernel says, for instance that `lo` is down.
pub(super) fn add(range: IpNet) -> io::Result<()> {
    match change(NEW, CREATE, range) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Takes back what [`add`] did; returns whether there was something to do.
///
/// # Errors
/// What the kernel says.
pub(super) fn remove(range: IpNet) -> io::Result<bool> {
    match change(DELETE, 0, range) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}

fn change(kind: u16, flags: u16, range: IpNet) -> io::Result<()> {
    let mut requests = Requests::open(libc::NETLINK_ROUTE)?;
    requests.send(kind, ACKNOWLEDGE | flags, &message(range))?;
    match requests.receive()?.first() {
        Some(Answer::Error(0)) => Ok(()),
        Some(Answer::Error(errno)) => Err(io::Error::from_raw_os_error(*errno)),
        _ => Err(Malformed.into()),
    }
}

/// `struct rtmsg` and its attributes.
fn message(range: IpNet) -> Vec<u8> {
    /// `RT_TABLE_MAIN`, `RT_SCOPE_LINK` and `RTN_UNICAST`.
    const MAIN: u8 = 254;
    const LINK: u8 = 253;
    const UNICAST: u8 = 1;
    /// `lo` is the first device of every namespace (`LOOPBACK_IFINDEX`).
    const LO: u32 = 1;
    /// `RTA_DST`, `RTA_OIF`, `RTA_PREFSRC`
    const TO: u16 = 1;
    const DEVICE: u16 = 4;
    const SOURCE: u16 = 7;
    let (family, source) = match range {
        // AF_INET and AF_INET6 of socket(2).
        IpNet::V4(_) => (2, IpAddr::from(Ipv4Addr::LOCALHOST)),
        IpNet::V6(_) => (10, Ipv6Addr::LOCALHOST.into()),
    };
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    [
        &[
            family,
            range.prefix_len(),
            0,
            0,
            MAIN,
            PROTOCOL,
            LINK,
            UNICAST,
        ][..],
        &host32(0),
        &attribute(TO, &octets(range.network())),
        &attribute(DEVICE, &host32(LO)),
        &attribute(SOURCE, &octets(source)),
    ]
    .concat()
}
