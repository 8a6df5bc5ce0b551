use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    os::{fd::AsRawFd, unix::fs::MetadataExt as _},
};

use socket2::{Domain, Socket, Type};

use super::*;
use crate::datapath::cgroup::Cgroup2;

const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

fn connection(to: SocketAddr) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind(to).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    (listener, client, server)
}

fn inode(socket: &impl AsRawFd) -> u32 {
    let link = format!("/proc/self/fd/{}", socket.as_raw_fd());
    u32::try_from(std::fs::metadata(link).unwrap().ino()).unwrap()
}

fn own_cgroup() -> CgroupId {
    let cgroups = Cgroup2::find().unwrap();
    cgroups.id_of(&cgroups.own().unwrap()).unwrap()
}

#[test]
fn either_end_of_a_connection_has_its_owner() {
    let sockets = SockDiag::open().unwrap();
    let expected = own_cgroup();
    for address in LOOPBACK {
        let (_listener, client, server) = connection((address, 0).into());
        for end in [&client, &server] {
            let (local, remote) = (end.local_addr().unwrap(), end.peer_addr().unwrap());
            let owner = sockets.socket_of(local, remote).unwrap().unwrap();
            assert_eq!(owner.inode, inode(end));
            assert_eq!(owner.uid, rustix::process::getuid().as_raw());
            assert_eq!(owner.cgroup, expected);
        }
    }
}

#[test]
fn an_ipv6_socket_that_speaks_ipv4_is_found_under_both() {
    let sockets = SockDiag::open().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
    let client = TcpStream::connect((mapped, port)).unwrap();
    let local = client.local_addr().unwrap();
    assert!(local.is_ipv6(), "{local}");
    let as_ipv4 = SocketAddr::from((Ipv4Addr::LOCALHOST, local.port()));
    for (local, remote) in [
        (local, (mapped, port).into()),
        (as_ipv4, (Ipv4Addr::LOCALHOST, port).into()),
    ] {
        let owner = sockets.socket_of(local, remote).unwrap().unwrap();
        assert_eq!(owner.inode, inode(&client));
    }
}

#[test]
fn a_connection_that_is_not_there_is_nobodys_also_if_somebody_listens() {
    let sockets = SockDiag::open().unwrap();
    for address in LOOPBACK {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let local = listener.local_addr().unwrap();
        let found = sockets.socket_of(local, (address, 1).into()).unwrap();
        assert_eq!(found, None);
        let found = sockets.socket_of((address, 1).into(), local).unwrap();
        assert_eq!(found, None);
    }
}

#[test]
fn what_is_left_of_a_closed_socket_is_nobodys() {
    let sockets = SockDiag::open().unwrap();
    let (_listener, client, server) = connection((Ipv4Addr::LOCALHOST, 0).into());
    let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    assert!(sockets.socket_of(local, remote).unwrap().is_some());
    // FIN_WAIT2, which becomes TIME_WAIT as the other end closes too: the kernel says user 0 of both.
    drop(client);
    assert_eq!(sockets.socket_of(local, remote).unwrap(), None);
    drop(server);
    assert_eq!(sockets.socket_of(local, remote).unwrap(), None);
}

#[test]
fn who_listens_is_listed_with_the_address() {
    let sockets = SockDiag::open().unwrap();
    let bound = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv6Addr::UNSPECIFIED.into(),
    ]
    .map(|address| TcpListener::bind((address, 0)).unwrap());
    let (_other, client, _server) = connection((Ipv4Addr::LOCALHOST, 0).into());
    let listed = sockets.listeners().unwrap();
    for listener in &bound {
        let address = listener.local_addr().unwrap();
        let owner = listed.iter().find(|(at, _)| *at == address).unwrap().1;
        assert_eq!((owner.inode, owner.cgroup), (inode(listener), own_cgroup()));
    }
    let connected = client.local_addr().unwrap();
    assert!(listed.iter().all(|(address, _)| *address != connected));
}

#[test]
fn more_listeners_than_fit_into_one_answer_are_all_listed() {
    let sockets = SockDiag::open().unwrap();
    // About 130 bytes each.
    let bound: Vec<TcpListener> = (0..500)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
        .collect();
    let listed = sockets.listeners().unwrap();
    for listener in &bound {
        assert!(
            listed
                .iter()
                .any(|(_, owner)| owner.inode == inode(listener))
        );
    }
}

#[expect(unsafe_code, reason = "rustix cannot know what the flags do")]
fn leave_namespace() {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: a new network namespace for this thread; nothing that is shared with others is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
}

#[test]
fn one_namespace_sees_only_its_own_sockets() {
    let here = SockDiag::open().unwrap();
    let (listener, there) = std::thread::spawn(|| {
        leave_namespace();
        (
            TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap(),
            SockDiag::open().unwrap(),
        )
    })
    .join()
    .unwrap();
    // From a thread of another namespace: what counts is where it was opened.
    let listed = there.listeners().unwrap();
    let inodes: Vec<u32> = listed.iter().map(|(_, owner)| owner.inode).collect();
    assert_eq!(inodes, [inode(&listener)]);
    let listed = here.listeners().unwrap();
    assert!(
        listed
            .iter()
            .all(|(_, owner)| owner.inode != inode(&listener))
    );
}

#[test]
fn a_description_that_breaks_off_is_refused() {
    // A request is as long as the beginning of an answer.
    let short = wire::exact(([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
    for length in 0..=short.len() {
        wire::described(&short[..length]).unwrap_err();
    }
}

#[test]
fn who_only_tries_to_connect_is_not_taken_for_who_did() {
    let sockets = SockDiag::open().unwrap();
    // With a queue for one that nobody takes from, nobody answers the second.
    let kind = (Domain::IPV4, Type::STREAM.nonblocking(), None);
    let listener = Socket::new(kind.0, kind.1, kind.2).unwrap();
    listener
        .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .unwrap();
    listener.listen(0).unwrap();
    let remote = listener.local_addr().unwrap();
    let [(first, _first), (second, _second)] = [(); 2].map(|()| {
        let client = Socket::new(kind.0, kind.1, kind.2).unwrap();
        let begun = client.connect(&remote);
        (
            client.local_addr().unwrap().as_socket().unwrap(),
            (client, begun),
        )
    });
    let remote = remote.as_socket().unwrap();
    assert!(sockets.socket_of(first, remote).unwrap().is_some());
    let found = exact(&mut sockets.0.lock(), second, remote).unwrap();
    assert!(!found.unwrap().is_connected());
    assert_eq!(sockets.socket_of(second, remote).unwrap(), None);
}

#[test]
fn udp_sockets_are_found_by_the_port_they_are_connected_to() {
    let sockets = SockDiag::open().unwrap();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    assert_eq!(sockets.udp_peers(port).unwrap(), Vec::<IpAddr>::new());
    let (one, other) = (Ipv4Addr::new(127, 9, 8, 7), Ipv4Addr::new(127, 9, 8, 6));
    let plain = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    plain.connect((one, port)).unwrap();
    let mapped = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    mapped.connect((other.to_ipv6_mapped(), port)).unwrap();
    let found = sockets.udp_peers(port).unwrap();
    assert_eq!(found, [IpAddr::from(one), IpAddr::from(other)]);
    drop(plain);
    assert_eq!(sockets.udp_peers(port).unwrap(), [IpAddr::from(other)]);
}
