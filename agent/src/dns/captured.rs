//! Queries that workloads sent to their servers, and that the programs sent here.
//!
//! What is ours is answered as everywhere; the rest goes to the very server that it was sent to, from the network
//! namespace of who asked. The programs let the client see that server as the one who answers.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};
use parking_lot::Mutex;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use super::{
    CapturedNamespace, Original, Resolver, Transport,
    fair::{Share, Slots},
    forward::IN_FLIGHT_MAX,
    limit::RateLimit,
    server::{CONNECTIONS_MAX, DATAGRAM_MAX, Gate, PAUSE, Reply, Service},
    sockets::NamespaceSockets,
};
use crate::{
    datapath::{
        Backend, Captured, DatapathError, NetnsCookie,
        netns::{Netns, NetnsError},
        queries::{QuerySocket, Received, SweepLimits},
    },
    lifecycle::Shutdown,
    sock_diag::{SockDiag, SockDiagError},
    telemetry::{Telemetry, log::chain, metrics::DnsOutcome},
};

/// How often servers are looked through that nobody asks any more. An address that is retired in one round is free in
/// the next: long enough for what a program has decided meanwhile to be seen.
const SWEEP: Duration = Duration::from_secs(60);

/// TCP connections at once, of all namespaces; see [`super::fair`].
const CAPTURED_CONNECTIONS_MAX: usize = 2 * CONNECTIONS_MAX;

/// Serves captured queries in every network namespace that is captured in.
#[derive(Debug)]
pub struct CapturedQueries {
    resolver: Arc<Resolver>,
    queries_per_second: u32,
    datapath: Arc<Backend>,
    telemetry: Telemetry,
    shutdown: Shutdown,
    /// Whether another agent has taken over: the programs send queries to that one then.
    replaced: Arc<AtomicBool>,
    in_flight: Arc<Slots>,
    connections: Arc<Slots>,
    namespaces: Mutex<HashMap<NetnsCookie, Arc<Namespace>>>,
}

/// What serves one namespace.
#[derive(Debug)]
struct Namespace {
    service: Arc<Service>,
    captured: Arc<CapturedNamespace>,
    connections: Arc<Share>,
    /// Tells which of its sockets are connected to loopback addresses that stand for servers.
    clients: SockDiag,
    /// Whether queries in datagrams are captured too.
    datagrams: AtomicBool,
}

/// The datagrams of one namespace.
#[derive(Debug)]
struct Datagrams {
    cookie: NetnsCookie,
    namespace: Arc<Namespace>,
    datapath: Arc<Backend>,
    replaced: Arc<AtomicBool>,
    closed: CancellationToken,
    socket: AsyncFd<QuerySocket>,
}

/// Queries in datagrams cannot be captured in a namespace.
#[derive(Debug, thiserror::Error)]
pub enum CaptureQueriesError {
    /// Its port cannot be opened.
    #[error("open port {port} for datagrams on loopback")]
    Listen {
        /// `capture.port`.
        port: u16,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// Its sockets cannot be asked for.
    #[error("open a socket for sock_diag(7)")]
    Clients(#[source] io::Error),
    /// The datapath did not take it.
    #[error("enrol the namespace for queries")]
    Enrol(#[source] DatapathError),
}

/// Servers that nobody asks any more keep their loopback addresses.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Clients(#[from] SockDiagError),
}

/// How captured queries are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Namespaces in which queries over TCP are captured.
    pub namespaces: usize,
    /// Those of them in which queries over UDP are captured too.
    pub datagrams: usize,
}

impl CapturedQueries {
    /// Serves nowhere yet; see [`Self::open`].
    pub fn new(
        resolver: Arc<Resolver>,
        queries_per_second: u32,
        datapath: Arc<Backend>,
        telemetry: Telemetry,
        shutdown: Shutdown,
        replaced: Arc<AtomicBool>,
    ) -> Self {
        Self {
            resolver,
            queries_per_second,
            datapath,
            telemetry,
            shutdown,
            replaced,
            in_flight: Slots::new(IN_FLIGHT_MAX),
            connections: Slots::new(CAPTURED_CONNECTIONS_MAX),
            namespaces: Mutex::default(),
        }
    }

    /// Of queries that wait for servers: for others on this node who forward some.
    pub fn in_flight(&self) -> &Arc<Slots> {
        &self.in_flight
    }

    /// Serves in a namespace until `closed`, or until draining starts.
    ///
    /// # Errors
    /// If datagrams cannot be captured there; queries over TCP are served all the same.
    pub fn open(
        &self,
        netns: &Netns,
        cookie: NetnsCookie,
        port: u16,
        closed: CancellationToken,
    ) -> Result<(), CaptureQueriesError> {
        let is_own = Netns::current()?.identity()? == netns.identity()?;
        let sockets = (!is_own).then(|| NamespaceSockets::start(netns));
        let name = if is_own {
            "host".to_owned()
        } else {
            netns.path().display().to_string()
        };
        let namespace = Arc::new(Namespace {
            service: Arc::new(Service {
                resolver: Arc::clone(&self.resolver),
                gate: Arc::new(Gate {
                    // Whoever comes here is in the namespace.
                    allowed: vec![Ipv4Net::default().into(), Ipv6Net::default().into()],
                    limit: RateLimit::new(self.queries_per_second),
                }),
                telemetry: self.telemetry.clone(),
                shutdown: self.shutdown.clone(),
            }),
            captured: Arc::new(CapturedNamespace {
                cookie,
                name,
                sockets: sockets.transpose()?,
                in_flight: self.in_flight.share(),
            }),
            connections: self.connections.share(),
            clients: netns
                .run(SockDiag::open)?
                .map_err(CaptureQueriesError::Clients)?,
            datagrams: AtomicBool::new(false),
        });
        self.namespaces
            .lock()
            .insert(cookie, Arc::clone(&namespace));
        let failed = |source| CaptureQueriesError::Listen { port, source };
        let socket = QuerySocket::open(netns, port).map_err(failed)?;
        #[expect(
            deprecated,
            reason = "a QuerySocket keeps its descriptor as long as it lives, which is what its successor asks for"
        )]
        let socket = AsyncFd::with_interest(socket, Interest::READABLE).map_err(failed)?;
        let datagrams = Arc::new(Datagrams {
            cookie,
            namespace,
            datapath: Arc::clone(&self.datapath),
            replaced: Arc::clone(&self.replaced),
            closed,
            socket,
        });
        self.datapath
            .enrol_queries(cookie, datagrams.socket.get_ref())
            .map_err(CaptureQueriesError::Enrol)?;
        let namespace = &datagrams.namespace;
        namespace.datagrams.store(true, Ordering::Relaxed);
        self.shutdown.spawn("captured queries", datagrams.serve());
        Ok(())
    }

    /// Takes their loopback addresses away from servers that nobody asks any more, until draining starts.
    pub fn sweep(self: &Arc<Self>, port: u16) {
        let (queries, shutdown) = (Arc::clone(self), self.shutdown.clone());
        self.shutdown.spawn("dns servers", async move {
            loop {
                tokio::select! {
                    biased;
                    () = shutdown.draining() => return,
                    () = tokio::time::sleep(SWEEP) => {}
                }
                match queries.sweep_once(port) {
                    Ok(0) => {}
                    Ok(freed) => tracing::info!(freed, "forgot DNS servers that nobody asks"),
                    Err(error) => {
                        tracing::warn!(error = %chain(&error), "DNS servers not looked through");
                    }
                }
            }
        });
    }

    fn sweep_once(&self, port: u16) -> Result<usize, SweepError> {
        self.datapath.sweep_servers(SweepLimits::default(), || {
            let namespaces: Vec<_> = self.namespaces.lock().values().map(Arc::clone).collect();
            let mut connected = HashSet::new();
            for namespace in namespaces {
                let peers = namespace.clients.udp_peers(port)?.into_iter();
                connected.extend(peers.filter_map(|peer| match peer {
                    IpAddr::V4(stand_in) => Some(stand_in),
                    IpAddr::V6(_) => None,
                }));
            }
            Ok(connected)
        })
    }

    /// Where queries are captured.
    pub fn served(&self) -> Served {
        let namespaces = self.namespaces.lock();
        let datagrams = namespaces.values();
        let datagrams = datagrams.filter(|namespace| namespace.datagrams.load(Ordering::Relaxed));
        Served {
            namespaces: namespaces.len(),
            datagrams: datagrams.count(),
        }
    }

    /// A namespace is not captured in any more.
    pub fn close(&self, cookie: NetnsCookie) {
        self.namespaces.lock().remove(&cookie);
    }

    /// Serves a captured connection.
    pub fn serve_connection(&self, stream: TcpStream, client: SocketAddr, captured: &Captured) {
        let namespace = self
            .namespaces
            .lock()
            .get(&captured.maker.netns)
            .map(Arc::clone);
        let slot = namespace.as_ref().and_then(|n| n.connections.take());
        // Dropped, the connection closes.
        let (Some(namespace), Some(slot)) = (namespace, slot) else {
            let metrics = self.telemetry.metrics();
            return metrics.dns_query(Transport::Tcp, DnsOutcome::Overloaded);
        };
        let original = Original {
            maker: Some(captured.maker),
            ..namespace.original(captured.destination)
        };
        let service = Arc::clone(&namespace.service);
        let task = service.serve_connection(stream, client, Some(Arc::new(original)), slot);
        self.shutdown.spawn("dns connection", task);
    }
}

impl Namespace {
    fn original(&self, server: SocketAddr) -> Original {
        Original {
            server,
            namespace: Arc::clone(&self.captured),
            maker: None,
        }
    }
}

impl Datagrams {
    async fn serve(self: Arc<Self>) {
        let mut buffer = vec![0; DATAGRAM_MAX];
        let shutdown = self.namespace.service.shutdown.clone();
        loop {
            let received = tokio::select! {
                biased;
                () = shutdown.draining() => break,
                () = self.closed.cancelled() => return,
                received = self.receive(&mut buffer) => received,
            };
            match received {
                Ok(received) => self.take(&buffer, received).await,
                Err(error) => {
                    tracing::debug!(%error, "no captured query received");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        // From now on the programs send queries to the next agent, if there is one, or leave them alone.
        if !self.replaced.load(Ordering::Acquire)
            && let Err(error) = self.datapath.dismiss_queries(self.cookie)
        {
            tracing::warn!(error = %chain(&error), "queries are captured until this agent ends");
        }
        if let Err(error) = self.socket.get_ref().retire() {
            tracing::warn!(%error, "queries may be lost until this agent ends");
        }
        // What came before that, nobody else can read.
        while let Ok(received) = self.socket.get_ref().receive(&mut buffer) {
            self.take(&buffer, received).await;
        }
    }

    async fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        loop {
            let mut ready = self.socket.readable().await?;
            if let Ok(received) = ready.try_io(|socket| socket.get_ref().receive(buffer)) {
                return received;
            }
        }
    }

    async fn take(self: &Arc<Self>, buffer: &[u8], received: Received) {
        let Some(original) = self.original_of(received.stand_in) else {
            // Nobody was captured: somebody sent it here.
            return;
        };
        let message = buffer.get(..received.length).unwrap_or_default();
        let reply = FromServer {
            datagrams: Arc::clone(self),
            received,
        };
        let client = received.client.into();
        self.namespace
            .service
            .serve_datagram(message, client, Some(original), reply)
            .await;
    }

    fn original_of(&self, stand_in: Ipv4Addr) -> Option<Arc<Original>> {
        match self.datapath.server(stand_in) {
            Ok(server) => server.map(|server| Arc::new(self.namespace.original(server))),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "captured query lost");
                None
            }
        }
    }
}

/// An answer's way to a captured client.
struct FromServer {
    datagrams: Arc<Datagrams>,
    received: Received,
}

impl Reply for FromServer {
    async fn send(self, answer: Vec<u8>) {
        let Received {
            client, stand_in, ..
        } = self.received;
        let socket = self.datagrams.socket.get_ref();
        if let Err(error) = socket.send(&answer, client, stand_in) {
            tracing::debug!(%client, %error, "answer not sent");
        }
    }
}
