//! Tests of HBONE among ourselves, over loopback: `streams` are what an application sees, `life` is that of
//! connections, `strangers` do not keep to the protocol; `cost` compares with the tunnel `connect`.
//!
//! The called end answers by the port that is asked for.

mod cost;
mod life;
mod streams;
mod strangers;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hyper::StatusCode;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::Instant,
};

use super::{
    Call, HboneStream, Pool, PoolLimits,
    server::{Accepted, Requested},
};
use crate::{
    identity::{
        certificates::{Certificates, Jitter},
        clock::SystemClock,
        provider::{BoxFuture, CertificateProvider, IssueError, Leaf, Trust},
        spiffe::SpiffeId,
        testing::{TestCa, bundle, id},
    },
    lifecycle::Shutdown,
    relay::Endpoint as _,
    tunnel::connect::{Incoming, TunnelError},
};

/// For whatever should not take long.
const SOON: Duration = Duration::from_secs(20);

/// Answers with what it gets.
const ECHO: u16 = 1;
const DENIED: u16 = 2;
const UNREACHABLE: u16 = 3;
/// Takes the stream and never reads.
const SLEEPS: u16 = 4;
/// Says something and resets.
const RESETS: u16 = 5;
/// Reads a request to its end, then answers at length.
const ANSWERS_LAST: u16 = 6;
/// Asks for nothing, says something, ends, and then reads to the end.
const SPEAKS_FIRST: u16 = 7;
/// Never answers the request.
const SILENT: u16 = 8;

/// An authority whose root can be replaced.
#[derive(Debug)]
struct Authority {
    issuing: Mutex<Arc<TestCa>>,
    trust: watch::Sender<Trust>,
}

impl std::fmt::Debug for TestCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestCa").finish_non_exhaustive()
    }
}

impl Authority {
    fn new(root: &Arc<TestCa>) -> Arc<Self> {
        let roots = bundle(&[root]);
        Arc::new(Self {
            issuing: Mutex::new(Arc::clone(root)),
            trust: watch::channel(Trust { roots, issuer: 0 }).0,
        })
    }

    /// From now on `roots` are trusted, and the first of them issues.
    fn trust_in(&self, roots: &[&Arc<TestCa>]) {
        *self.issuing.lock() = Arc::clone(roots[0]);
        let all: Vec<&TestCa> = roots.iter().map(|root| &***root).collect();
        let roots = bundle(&all);
        self.trust.send_replace(Trust { roots, issuer: 0 });
    }
}

impl CertificateProvider for Authority {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Leaf, IssueError>> {
        Box::pin(async move { Ok(self.issuing.lock().good_leaf(identity)) })
    }

    fn trust(&self) -> watch::Receiver<Trust> {
        self.trust.subscribe()
    }
}

/// One node.
struct Node {
    authority: Arc<Authority>,
    certificates: Certificates,
    shutdown: Shutdown,
}

impl Node {
    fn new(root: &Arc<TestCa>) -> Self {
        let (authority, shutdown) = (Authority::new(root), Shutdown::default());
        let provider = Arc::<Authority>::clone(&authority);
        let clock = Arc::new(SystemClock);
        Self {
            authority,
            certificates: Certificates::new(provider, clock, Jitter::seeded(1), shutdown.clone()),
            shutdown,
        }
    }

    fn pool(&self, connections: usize) -> Pool {
        let limits = PoolLimits {
            connections,
            ..PoolLimits::default()
        };
        Pool::new(self.certificates.clone(), self.shutdown.clone(), limits)
    }

    /// Takes tunnels for `db` until the node drains.
    async fn serve(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (certificates, shutdown) = (self.certificates.clone(), self.shutdown.clone());
        let serving = async move {
            loop {
                let tcp = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap().0,
                    () = shutdown.draining() => return,
                };
                let carried = take_tunnel(tcp, certificates.clone(), shutdown.clone());
                shutdown.spawn("connection", carried);
            }
        };
        self.shutdown.spawn("listener", serving);
        address
    }

    /// A call from `web` to `db` there.
    async fn call(&self, address: SocketAddr, port: u16) -> Call {
        Call {
            tls: self.certificates.for_identity(&id("web")).await.unwrap(),
            expected: id("db"),
            address,
            server_name: "db.default.dc1.internal.example.org".to_owned(),
            instance: ([192, 0, 2, 1], port).into(),
            connect_timeout: SOON,
            handshake_timeout: SOON,
        }
    }
}

/// Two nodes, and a pool of the calling one.
struct Pair {
    caller: Node,
    called: Node,
    root: Arc<TestCa>,
    address: SocketAddr,
    pool: Pool,
}

impl Pair {
    async fn new(connections: usize) -> Self {
        let root = Arc::new(TestCa::root("root"));
        let (caller, called) = (Node::new(&root), Node::new(&root));
        let address = called.serve().await;
        let pool = caller.pool(connections);
        Self {
            caller,
            called,
            root,
            address,
            pool,
        }
    }

    async fn open(&self, port: u16) -> Result<HboneStream, TunnelError> {
        let call = self.caller.call(self.address, port).await;
        soon(self.pool.open(&call)).await
    }

    /// Whether a new stream carries bytes both ways.
    async fn echoes(&self) -> bool {
        let mut stream = self.open(ECHO).await.unwrap();
        exchange(&mut stream, b"hello").await;
        stream.shutdown().await.unwrap();
        soon(stream.read(&mut [0; 1])).await.unwrap() == 0
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("in time")
}

/// Until `condition` holds.
async fn until(mut condition: impl FnMut() -> bool) {
    soon(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Sends `bytes` to an echo and reads them back.
async fn exchange(stream: &mut HboneStream, bytes: &[u8]) {
    let mut back = vec![0; bytes.len()];
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (sent, received) =
        soon(async { tokio::join!(writer.write_all(bytes), reader.read_exact(&mut back)) }).await;
    sent.unwrap();
    received.unwrap();
    assert!(back == bytes, "not what was sent");
}

async fn take_tunnel(tcp: TcpStream, certificates: Certificates, shutdown: Shutdown) {
    let deadline = Instant::now() + SOON;
    let tls = certificates.for_identity(&id("db")).await.unwrap();
    let Ok(incoming) = Incoming::read_hello(tcp, deadline).await else {
        return;
    };
    let accepted = Accepted::handshake(incoming, &tls, &certificates, deadline);
    if let Ok(accepted) = Box::pin(accepted).await {
        let take = |requested| {
            shutdown.spawn("stream", answer(requested));
        };
        Box::pin(accepted.serve(&shutdown, take)).await;
    }
}

async fn answer(mut requested: Requested) {
    let port = requested.destination().unwrap().port();
    match port {
        DENIED => return requested.refuse(StatusCode::FORBIDDEN),
        UNREACHABLE => return requested.refuse(StatusCode::SERVICE_UNAVAILABLE),
        SILENT => return requested.given_up().await,
        _ => {}
    }
    let Ok(mut stream) = requested.accept() else {
        return;
    };
    match port {
        ECHO => echo(stream).await,
        SLEEPS => std::future::pending().await,
        RESETS => {
            stream.write_all(b"last words").await.unwrap();
            stream.abort();
        }
        ANSWERS_LAST => {
            let mut request = vec![];
            stream.read_to_end(&mut request).await.unwrap();
            stream.write_all(&vec![7; 3 << 20]).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        SPEAKS_FIRST => {
            stream.write_all(b"banner").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut rest = vec![];
            stream.read_to_end(&mut rest).await.unwrap();
            assert_eq!(rest, b"after the end");
        }
        _ => panic!("port {port}"),
    }
}

async fn echo(stream: impl AsyncRead + AsyncWrite) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    // A reset by the test ends it as well.
    if tokio::io::copy(&mut reader, &mut writer).await.is_ok() {
        drop(writer.shutdown().await);
    }
}
