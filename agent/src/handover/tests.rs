//! Two agents in one process: what goes over the socket, and what becomes of a handover that fails.

use std::{
    io::Read as _,
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::sockets::SocketKey;

fn listening(sockets: &ListeningSockets) -> (TcpListener, crate::sockets::Kept) {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let key = SocketKey::here(free.local_addr().unwrap()).unwrap();
    sockets.listen(key, || Ok(free)).unwrap()
}

#[tokio::test]
async fn sockets_and_lock_go_over_and_the_queue_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock.handover");
    let server = HandoverServer::bind(&path).unwrap();
    let old = ListeningSockets::default();
    // More than one message holds.
    let held: Vec<_> = (0..300).map(|_| listening(&old)).collect();
    let address = held[0].0.local_addr().unwrap();
    let waiting = TcpStream::connect(address).unwrap();
    let lock = std::fs::File::open(directory.path()).unwrap();

    let next = async {
        let (predecessor, inheritance) = Predecessor::ask(&path).await.unwrap().unwrap();
        assert_eq!(predecessor.process, std::process::id());
        assert_eq!(inheritance.sockets.len(), 300);
        assert!(inheritance.pin_lock.is_some() && inheritance.takes_over);
        let new = ListeningSockets::inheriting(inheritance.sockets);
        let key = SocketKey::here(address).unwrap();
        let inherited = new
            .listen::<TcpListener>(key, || panic!("it was inherited"))
            .unwrap();
        predecessor.retire().await.unwrap();
        assert_eq!(predecessor.draining().await, Some(7));
        assert_eq!(predecessor.draining().await, None);
        inherited
    };
    let running = async {
        let successor = server.next_agent(&old, Some(lock.as_fd())).await;
        assert_eq!(successor.process, std::process::id());
        successor.confirm().await;
        successor.report(7).await;
    };
    let (inherited, ()) = tokio::join!(next, running);
    drop(held);
    // What waited in the queue is accepted by the next agent.
    let (mut accepted, peer) = inherited.0.accept().unwrap();
    assert_eq!(peer, waiting.local_addr().unwrap());
    drop(waiting);
    assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn nobody_to_take_over_from_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none");
    assert!(Predecessor::ask(&path).await.unwrap().is_none());
}

#[tokio::test]
async fn a_next_agent_that_fails_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = HandoverServer::bind(&path).unwrap();
    let sockets = ListeningSockets::default();
    let held = listening(&sockets);
    let address = held.0.local_addr().unwrap();
    let agents = async {
        // One that dies during its start, and one that speaks gibberish.
        let (dies, inheritance) = Predecessor::ask(&path).await.unwrap().unwrap();
        drop((dies, inheritance));
        let gibberish = Channel::connect(&path).unwrap();
        gibberish.send(b"{}", &[]).await.unwrap();
        let (good, _inheritance) = Predecessor::ask(&path).await.unwrap().unwrap();
        send(&good.channel, &Message::Ready, &[]).await.unwrap();
        good
    };
    let (successor, good) = tokio::join!(server.next_agent(&sockets, None), agents);
    assert_eq!(successor.process, good.process);
    drop(TcpStream::connect(address).unwrap());
    held.0.accept().unwrap();
}

#[tokio::test]
async fn a_socket_is_asked_for_by_what_it_is() {
    let sockets = ListeningSockets::default();
    let (listener, kept) = listening(&sockets);
    let address = listener.local_addr().unwrap();
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let inherited = sockets.descriptors().unwrap();
    let next = ListeningSockets::inheriting(inherited.into_iter().chain([datagrams.into()]));
    drop((listener, kept));
    assert!(sockets.descriptors().unwrap().is_empty());
    // Still open: the next agent has it.
    drop(TcpStream::connect(address).unwrap());
    next.close_unused();
    TcpStream::connect(address).unwrap_err();
}
