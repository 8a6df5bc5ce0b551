//! Listeners for DNS, over UDP and TCP, for those who send their queries here.
//!
//! Loops of our own and not hickory-server's: that one takes a message apart and puts it together again, and what
//! is not ours must go on and come back byte for byte; and it knows neither our limits nor our shutdown.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::{
    io::AsyncWriteExt as _,
    net::{
        TcpStream, UdpSocket,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Handle,
    sync::{Semaphore, mpsc},
    time::{Instant, timeout},
};

use super::{
    Original, Query, Resolver, Step, Transport,
    forward::{framed, read_message},
    limit::RateLimit,
};
use crate::{
    accept::{Accepted, Acceptor, accept_all},
    lifecycle::Shutdown,
    sockets::{Kept, ListeningSockets, SocketKey},
    telemetry::{Telemetry, metrics::DnsOutcome, record::Direction},
};

/// TCP connections at once.
pub(super) const CONNECTIONS_MAX: usize = 256;

/// How long a TCP connection may be silent, and how long its client may not read. Source: RFC 7766, section 6.2.3.
const IDLE: Duration = Duration::from_secs(10);

/// How long after draining has begun the first query of a connection is waited for.
const FIRST: Duration = Duration::from_secs(1);

/// Queries of one TCP connection that are not answered yet.
const PIPELINED_MAX: usize = 32;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// After a failed receive, which is for want of memory.
pub(super) const PAUSE: Duration = Duration::from_millis(5);

/// The largest datagram.
pub(super) const DATAGRAM_MAX: usize = 65_535;

/// It cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address} over {}", .transport.as_str())]
pub struct DnsListenError {
    address: SocketAddr,
    transport: Transport,
    #[source]
    source: io::Error,
}

/// Who may ask, and how much.
#[derive(Debug)]
pub struct Gate {
    /// Networks whose queries are answered.
    pub allowed: Vec<IpNet>,
    /// How much each source may ask.
    pub limit: RateLimit,
}

impl Gate {
    fn allows(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        self.allowed.iter().any(|network| network.contains(&source))
    }
}

/// What answers those who pass a gate, however their queries come.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) resolver: Arc<Resolver>,
    pub(super) gate: Arc<Gate>,
    pub(super) telemetry: Telemetry,
    pub(super) shutdown: Shutdown,
}

/// Brings an answer to who asked in a datagram.
pub(super) trait Reply: Send + 'static {
    /// What cannot be sent is as good as lost, which clients of UDP expect.
    fn send(self, answer: Vec<u8>) -> impl Future<Output = ()> + Send;
}

/// What is known of a query besides its bytes.
struct Asker {
    transport: Transport,
    client: SocketAddr,
    original: Option<Arc<Original>>,
    drawn: Option<Instant>,
}

impl Asker {
    fn query<'a>(&'a self, message: &'a [u8]) -> Query<'a> {
        Query {
            message,
            transport: self.transport,
            client: self.client,
            original: self.original.as_deref(),
            drawn: self.drawn,
        }
    }
}

/// What serves one address.
#[derive(Debug)]
struct DnsServer {
    service: Arc<Service>,
    datagrams: UdpSocket,
}

/// An answer's way out of a [`DnsServer`].
struct FromServer {
    server: Arc<DnsServer>,
    client: SocketAddr,
}

impl Reply for FromServer {
    async fn send(self, answer: Vec<u8>) {
        let client = self.client;
        if let Err(error) = self.server.datagrams.send_to(&answer, client).await {
            tracing::debug!(%client, %error, "answer not sent");
        }
    }
}

/// An address that is listened on.
#[derive(Debug)]
pub struct DnsListener {
    server: Arc<DnsServer>,
    acceptor: Acceptor<TcpListener>,
    kept: Kept,
}

impl DnsListener {
    /// Listens on `address` over UDP and TCP.
    ///
    /// # Errors
    /// If it cannot be listened on.
    pub fn bind(
        address: SocketAddr,
        resolver: Arc<Resolver>,
        gate: Arc<Gate>,
        telemetry: Telemetry,
        shutdown: Shutdown,
        sockets: &ListeningSockets,
    ) -> Result<Self, DnsListenError> {
        let failed = |transport| {
            move |source| DnsListenError {
                address,
                transport,
                source,
            }
        };
        let key = SocketKey::here(address).map_err(failed(Transport::Tcp))?;
        let listened = sockets.listen(key, || listen(address));
        let (listener, kept) = listened.map_err(failed(Transport::Tcp))?;
        // Beside the other names: no worker carries them.
        let acceptor =
            Acceptor::new(listener, Handle::current()).map_err(failed(Transport::Tcp))?;
        let datagrams = datagrams(address).map_err(failed(Transport::Udp))?;
        Ok(Self {
            acceptor,
            server: Arc::new(DnsServer {
                service: Arc::new(Service {
                    resolver,
                    gate,
                    telemetry,
                    shutdown,
                }),
                datagrams,
            }),
            kept,
        })
    }

    /// Serves until draining starts.
    pub fn start(self) {
        let server = self.server;
        let shutdown = server.service.shutdown.clone();
        shutdown.spawn("dns over udp", Arc::clone(&server).serve_datagrams());
        shutdown.spawn("dns over tcp", async move {
            Arc::clone(&server.service)
                .serve_connections(self.acceptor)
                .await;
            drop(self.kept);
        });
    }
}

impl DnsServer {
    async fn serve_datagrams(self: Arc<Self>) {
        let shutdown = self.service.shutdown.clone();
        let mut draining = pin!(shutdown.draining());
        let mut buffer = vec![0; DATAGRAM_MAX];
        loop {
            let received = tokio::select! {
                biased;
                () = &mut draining => break,
                received = self.datagrams.recv_from(&mut buffer) => received,
            };
            match received {
                Ok((length, client)) => self.take_datagram(&buffer, length, client).await,
                Err(error) => {
                    tracing::debug!(%error, "no datagram received");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        // Answers that are under way still leave by this socket, but the next agent has all that comes from now on: a
        // connected socket takes only what its peer sends, which here is itself.
        let own = self.datagrams.local_addr();
        let left = own.and_then(|own| SockRef::from(&self.datagrams).connect(&own.into()));
        if let Err(error) = left {
            tracing::warn!(%error, "queries may be lost until this agent ends");
        }
        // What came before that, nobody else can read.
        while let Ok((length, client)) = self.datagrams.try_recv_from(&mut buffer) {
            self.take_datagram(&buffer, length, client).await;
        }
    }

    async fn take_datagram(self: &Arc<Self>, buffer: &[u8], length: usize, client: SocketAddr) {
        let message = buffer.get(..length).unwrap_or_default();
        let reply = FromServer {
            server: Arc::clone(self),
            client,
        };
        self.service
            .serve_datagram(message, client, None, reply)
            .await;
    }
}

impl Service {
    /// Answers one datagram, at once or, if it is forwarded, from a task.
    pub(super) async fn serve_datagram(
        self: &Arc<Self>,
        message: &[u8],
        client: SocketAddr,
        original: Option<Arc<Original>>,
        reply: impl Reply,
    ) {
        let asker = self.asker(Transport::Udp, client, original);
        let query = asker.query(message);
        if !self.may_ask(&query) {
            return;
        }
        match self.resolver.decide(&query) {
            Step::Ignore => {}
            Step::Answer(answer) => reply.send(answer).await,
            Step::Forward => {
                let (resolver, message) = (Arc::clone(&self.resolver), message.to_vec());
                self.shutdown.spawn("dns query", async move {
                    let (replies, mut answers) = mpsc::channel(1);
                    resolver.forward(&asker.query(&message), &replies).await;
                    if let Ok(answer) = answers.try_recv() {
                        reply.send(answer).await;
                    }
                });
            }
        }
    }

    /// Who sends a query that has just come in.
    fn asker(
        &self,
        transport: Transport,
        client: SocketAddr,
        original: Option<Arc<Original>>,
    ) -> Asker {
        Asker {
            transport,
            client,
            original,
            drawn: self.resolver.draw(),
        }
    }

    fn may_ask(&self, query: &Query<'_>) -> bool {
        let source = query.client.ip();
        let outcome = if !self.gate.allows(source) {
            DnsOutcome::NotAllowed
        } else if !self.gate.limit.pass(source) {
            DnsOutcome::RateLimited
        } else {
            return true;
        };
        self.resolver.ignore(query, outcome);
        false
    }

    async fn serve_connections(self: Arc<Self>, acceptor: Acceptor<TcpListener>) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let service = Arc::clone(&self);
        let handle = move |accepted: Accepted<TcpListener>| {
            let metrics = service.telemetry.metrics();
            // Dropped, the connection closes.
            if !service.gate.allows(accepted.peer().ip()) {
                metrics.dns_query(Transport::Tcp, DnsOutcome::NotAllowed);
                return;
            }
            match Arc::clone(&connections).try_acquire_owned() {
                Ok(permit) => {
                    let stream = accepted.stream(Direction::Outbound, &service.telemetry);
                    let Some((stream, client)) = stream else {
                        return;
                    };
                    let task = Arc::clone(&service).serve_connection(stream, client, None, permit);
                    service.shutdown.spawn("dns connection", task);
                }
                Err(_full) => metrics.dns_query(Transport::Tcp, DnsOutcome::Overloaded),
            }
        };
        accept_all(
            acceptor,
            Direction::Outbound,
            &self.telemetry,
            &self.shutdown,
            handle,
        )
        .await;
    }

    /// Answers the queries of one connection until its client is done, silent for too long, or the agent drains.
    pub(super) async fn serve_connection(
        self: Arc<Self>,
        stream: TcpStream,
        client: SocketAddr,
        original: Option<Arc<Original>>,
        permit: impl Send + 'static,
    ) {
        // Answers are small, and the client waits for each.
        let _undelayed = stream.set_nodelay(true);
        let (mut from, to) = stream.into_split();
        let (replies, answers) = mpsc::channel(PIPELINED_MAX);
        self.shutdown
            .spawn("dns answers", write_answers(to, answers, permit));
        let pipelined = Arc::new(Semaphore::new(PIPELINED_MAX));
        let mut is_first = true;
        while let Some(message) = self.next_query(&mut from, is_first).await {
            is_first = false;
            let asker = self.asker(Transport::Tcp, client, original.clone());
            let query = asker.query(&message);
            if !self.may_ask(&query) {
                return;
            }
            match self.resolver.decide(&query) {
                Step::Ignore => return,
                Step::Answer(answer) => {
                    if replies.send(answer).await.is_err() {
                        return;
                    }
                }
                Step::Forward => {
                    let Ok(turn) = Arc::clone(&pipelined).acquire_owned().await else {
                        return;
                    };
                    let (resolver, replies) = (Arc::clone(&self.resolver), replies.clone());
                    self.shutdown.spawn("dns query", async move {
                        resolver.forward(&asker.query(&message), &replies).await;
                        drop(turn);
                    });
                }
            }
        }
    }

    /// `None` when the client is done, silent for too long, or we are: then who has only just connected may still ask.
    async fn next_query(&self, from: &mut OwnedReadHalf, is_first: bool) -> Option<Vec<u8>> {
        let over = async {
            self.shutdown.draining().await;
            if is_first {
                tokio::time::sleep(FIRST).await;
            }
        };
        tokio::select! {
            biased;
            () = over => None,
            read = timeout(IDLE, read_message(from)) => read.ok()?.ok(),
        }
    }
}

/// Writes answers until nobody has one more.
async fn write_answers(
    mut to: OwnedWriteHalf,
    mut answers: mpsc::Receiver<Vec<u8>>,
    permit: impl Send,
) {
    while let Some(answer) = answers.recv().await {
        // Longer than TCP's length can say, it could not have been made.
        let Ok(framed) = framed(&answer) else { break };
        let Ok(Ok(())) = timeout(IDLE, to.write_all(&framed)).await else {
            break;
        };
    }
    drop(permit);
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// With `SO_REUSEPORT`: the next agent listens before this one has let go. Its TCP socket keeps all others away.
fn datagrams(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SockAddr::from(address))?;
    UdpSocket::from_std(socket.into())
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let kind = kind.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    Ok(socket)
}
