//! Tests of tunnels: among ourselves in `peers`, `resumption` and `ends`, with OpenSSL at the other end in `openssl`.
//!
//! Every test opens and takes tunnels through the functions here.

mod peers;
mod resumption;
mod ends;
mod openssl;
mod cost;
mod memory;
mod keys;

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::{
    TunnelStream,
    connect::{self, Incoming, TunnelError},
};
use crate::identity::{
    spiffe::SpiffeId,
    testing::{TestCa, id},
    workload_tls::WorkloadTls,
};

/// For each step of a handshake; only a test with a paused clock reaches it.
const LIMIT: Duration = Duration::from_secs(10);

/// What every client here asks for.
const SERVER_NAME: &str = "db.default.dc1.internal.example.org";

/// Of a node that is not called.
const NOWHERE: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9));

type Taken = Result<(TunnelStream, SpiffeId), TunnelError>;

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Opens a tunnel to `expected`, asking for `server_name`.
async fn open_by_name(
    address: SocketAddr,
    tls: &WorkloadTls,
    expected: &SpiffeId,
    server_name: &str,
) -> Result<TunnelStream, TunnelError> {
    let dialled = connect::dial(address, LIMIT).await?;
    // Boxed: the state of a handshake is large, and tests hold several.
    Box::pin(dialled.handshake(server_name.to_owned(), expected, tls, LIMIT)).await
}

async fn open(
    address: SocketAddr,
    tls: &WorkloadTls,
    expected: &SpiffeId,
) -> Result<TunnelStream, TunnelError> {
    open_by_name(address, tls, expected, SERVER_NAME).await
}

/// Reads the first message on a connection that was just accepted.
async fn greet(tcp: TcpStream) -> Result<Incoming, TunnelError> {
    Incoming::read_hello(tcp, Instant::now() + LIMIT).await
}

/// Finishes what [`greet`] began.
async fn finish(incoming: Incoming, tls: &WorkloadTls) -> Taken {
    Box::pin(incoming.handshake(tls, Instant::now() + LIMIT)).await
}

/// Takes one connection and does the whole handshake.
async fn take(listener: &TcpListener, tls: &WorkloadTls) -> Taken {
    let (tcp, _peer) = listener.accept().await.unwrap();
    finish(greet(tcp).await?, tls).await
}

/// A handshake between two services; each side's result.
async fn meet(
    client: &WorkloadTls,
    server: &WorkloadTls,
    expected: &SpiffeId,
) -> (Result<TunnelStream, TunnelError>, Taken) {
    let (listener, address) = listen().await;
    let opened = Box::pin(open(address, client, expected));
    tokio::join!(opened, take(&listener, server))
}

/// An open tunnel from `web` to `db`.
pub(super) async fn tunnel() -> (TunnelStream, TunnelStream) {
    let root = TestCa::root("root");
    let (web, db) = (id("web"), id("db"));
    let client = root.workload(&web, &[&root]);
    let server = root.workload(&db, &[&root]);
    let (client, server) = meet(&client, &server, &db).await;
    let (server, peer) = server.unwrap();
    assert_eq!(peer, web);
    (client.unwrap(), server)
}

/// The error of a connection's first read: with TLS 1.3 a client learns of a refusal only there.
async fn refusal(mut stream: TunnelStream) -> std::io::Error {
    use tokio::io::AsyncReadExt as _;
    stream.read(&mut [0; 16]).await.unwrap_err()
}

/// A bare TCP connection, the connecting end first.
async fn raw() -> (TcpStream, TcpStream) {
    let (listener, address) = listen().await;
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), accepted.unwrap().0)
}
