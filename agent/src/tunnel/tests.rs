//! Tunnels between two ends on loopback, with certificates of a real CA.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::{
    TunnelStream,
    connect::{self, Incoming, TunnelError},
};
use crate::{
    identity::{
        ca::{self, BuiltinCa, CaFiles},
        certificates::{Certificates, Jitter},
        clock::SystemClock,
        spiffe::SpiffeId,
        workload_tls::WorkloadTls,
    },
    lifecycle::Shutdown,
    relay::Endpoint as _,
    telemetry::log::chain,
};

const LIMIT: Duration = Duration::from_secs(10);

/// A trust domain with its own root.
struct Authority {
    _directory: tempfile::TempDir,
    certificates: Certificates,
}

impl Authority {
    fn new(trust_domain: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let files = CaFiles {
            certificate: directory.path().join("root.pem"),
            key: directory.path().join("root-key.pem"),
            passphrase_file: None,
            roots: vec![directory.path().join("root.pem")],
        };
        let trust_domain = trust_domain.parse().unwrap();
        ca::init(&trust_domain, &files, &SystemClock).unwrap();
        let clock = Arc::new(SystemClock);
        let ca = BuiltinCa::load(&files, trust_domain, Duration::from_secs(3600), clock).unwrap();
        let certificates = Certificates::new(
            Arc::new(ca),
            Arc::new(SystemClock),
            Jitter::seeded(1),
            Shutdown::default(),
        );
        Self {
            _directory: directory,
            certificates,
        }
    }

    async fn tls(&self, identity: &SpiffeId) -> Arc<WorkloadTls> {
        self.certificates.for_identity(identity).await.unwrap()
    }
}

fn id(service: &str) -> SpiffeId {
    format!("spiffe://example.test/ns/default/dc/dc1/svc/{service}")
        .parse()
        .unwrap()
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn dial(
    address: SocketAddr,
    tls: &WorkloadTls,
    expected: &SpiffeId,
) -> Result<TunnelStream, TunnelError> {
    let sni = "db.example.test".to_owned();
    let dialled = connect::dial(address, LIMIT).await?;
    dialled.handshake(sni, expected, tls, LIMIT).await
}

async fn take(
    listener: &TcpListener,
    tls: &WorkloadTls,
) -> Result<(TunnelStream, SpiffeId, Option<String>), TunnelError> {
    let (stream, _peer) = listener.accept().await.unwrap();
    let deadline = Instant::now() + LIMIT;
    let incoming = Incoming::read_hello(stream, deadline).await?;
    let name = incoming.server_name();
    let (stream, peer) = incoming.handshake(tls, deadline).await?;
    Ok((stream, peer, name))
}

/// Both ends of a tunnel from web to db.
async fn tunnel() -> (TunnelStream, TunnelStream) {
    let authority = Authority::new("example.test");
    let (web, db) = (
        authority.tls(&id("web")).await,
        authority.tls(&id("db")).await,
    );
    let (listener, address) = listener().await;
    let expected = id("db");
    let (near, far) = tokio::join!(dial(address, &web, &expected), take(&listener, &db));
    let (far, peer, name) = far.unwrap();
    assert_eq!(peer, id("web"));
    assert_eq!(name.as_deref(), Some("db.example.test"));
    (near.unwrap(), far)
}

#[tokio::test]
async fn a_tunnel_proves_both_identities_and_carries_bytes_both_ways() {
    let (mut near, mut far) = Box::pin(tunnel()).await;
    near.write_all(b"question").await.unwrap();
    let mut buffer = [0; 8];
    far.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"question");
    far.write_all(b"answered").await.unwrap();
    near.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"answered");
}

#[tokio::test]
async fn half_a_close_leaves_the_other_direction_open() {
    let (mut near, mut far) = Box::pin(tunnel()).await;
    near.write_all(b"last words").await.unwrap();
    near.shutdown().await.unwrap();
    let mut heard = Vec::new();
    far.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"last words");
    far.write_all(b"reply").await.unwrap();
    far.shutdown().await.unwrap();
    let mut reply = Vec::new();
    near.read_to_end(&mut reply).await.unwrap();
    assert_eq!(reply, b"reply");
}

#[tokio::test]
async fn an_abort_is_a_reset_for_the_other_end() {
    let (mut near, mut far) = Box::pin(tunnel()).await;
    near.abort();
    drop(near);
    let error = far.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_end_without_close_notify_is_an_error() {
    let (near, mut far) = Box::pin(tunnel()).await;
    drop(near);
    let error = far.read(&mut [0; 1]).await.unwrap_err();
    let kind = error.kind();
    let cut = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
    assert!(cut.contains(&kind), "{error}");
}

#[tokio::test]
async fn another_service_than_expected_is_refused() {
    let authority = Authority::new("example.test");
    let (web, cache) = (
        authority.tls(&id("web")).await,
        authority.tls(&id("cache")).await,
    );
    let (listener, address) = listener().await;
    let expected = id("db");
    let (near, _far) = tokio::join!(dial(address, &web, &expected), take(&listener, &cache));
    assert_eq!(
        chain(&near.unwrap_err()).to_string(),
        format!(
            "peer not accepted: the peer is {}, expected {expected}",
            id("cache")
        )
    );
}

#[tokio::test]
async fn a_peer_of_another_root_is_refused_by_both_sides() {
    let (ours, theirs) = (
        Authority::new("example.test"),
        Authority::new("example.test"),
    );
    let (web, db) = (ours.tls(&id("web")).await, theirs.tls(&id("db")).await);
    let (listener, address) = listener().await;
    let expected = id("db");
    let (near, far) = tokio::join!(dial(address, &web, &expected), take(&listener, &db));
    assert!(matches!(near, Err(TunnelError::Handshake(_))), "{near:?}");
    assert!(matches!(far, Err(TunnelError::Handshake(_))), "{far:?}");
}

#[tokio::test]
async fn what_is_no_handshake_is_told_apart() {
    let db = Authority::new("example.test").tls(&id("db")).await;
    let (listener, address) = listener().await;
    let health_check = async { drop(TcpStream::connect(address).await.unwrap()) };
    let (far, ()) = tokio::join!(take(&listener, &db), health_check);
    assert!(matches!(far, Err(TunnelError::Silent)), "{far:?}");

    let garbage = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        // Stays open until the other side gives up on it.
        drop(stream.read_to_end(&mut Vec::new()).await);
    };
    let (far, ()) = tokio::join!(take(&listener, &db), garbage);
    assert!(matches!(far, Err(TunnelError::Handshake(_))), "{far:?}");
}

#[tokio::test]
async fn half_a_hello_ends_at_the_deadline() {
    let (listener, address) = listener().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[22, 3, 1]).await.unwrap();
    let (accepted, _peer) = listener.accept().await.unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let read = Incoming::read_hello(accepted, deadline).await;
    assert!(
        matches!(read, Err(TunnelError::HandshakeTimeout)),
        "{read:?}"
    );
}

#[tokio::test]
async fn a_port_that_nobody_listens_at_fails_at_the_dial() {
    let authority = Authority::new("example.test");
    let web = authority.tls(&id("web")).await;
    let (listener, address) = listener().await;
    drop(listener);
    let near = dial(address, &web, &id("db")).await;
    assert!(matches!(near, Err(TunnelError::Dial { .. })), "{near:?}");
}
