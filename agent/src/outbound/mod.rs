//! From a workload's `connect()` on this node to a tunnel: steps 3 to 7 of the way of a connection.
//!
//! [`Outbound::carry`] is the way itself; each step takes what the step before returned:
//! capture -> identify -> destination -> authorise -> open -> relay.
//!
//! What is called outside the mesh ([`destinations`]) takes the same steps, and a plain connection for the tunnel.

pub mod balance;
pub mod destinations;
pub mod listeners;
mod steps;
pub mod upstreams;
mod unix_client;
mod unix_socket;

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use tokio::net::TcpStream;

use self::{
    balance::{Balancer, Ejection},
    destinations::Destinations,
    steps::Upstream,
};
use crate::{
    accept::{Accepted, Acceptor, Listener, accept_all},
    catalog::{
        consul::{ConsulHandle, found::Found},
        model::ServiceName,
        store::CatalogStore,
    },
    connections::Connections,
    datapath::{Backend, Captured, Maker},
    dns::captured::CapturedQueries,
    health,
    identity::{certificates::Certificates, workload::WorkloadResolver},
    lifecycle::Shutdown,
    policy::PolicyStore,
    relay::{self, Counts, Endpoint},
    telemetry::{
        Telemetry,
        record::{ConnectionRecord, Direction, Outcome, Side, Stage},
    },
    tunnel::hbone,
};

/// What outbound connections need; one per agent.
#[derive(Debug)]
pub struct Outbound {
    /// Knows what the eBPF programs recorded.
    pub datapath: Arc<Backend>,
    /// Services and their virtual addresses.
    pub catalog: Arc<CatalogStore>,
    /// Which process belongs to which service.
    pub workloads: Arc<WorkloadResolver>,
    /// Reads anew what is known of a service before it is called, where the catalog's source does not follow it.
    pub freshness: Option<ConsulHandle>,
    /// Intentions.
    pub policy: Arc<PolicyStore>,
    /// One certificate per workload identity.
    pub certificates: Certificates,
    /// Live connections and ejections per instance.
    pub balancer: Balancer,
    /// Where services are that are outside the mesh.
    pub destinations: Destinations,
    /// Open connections to nodes that take tunnels of the kind `hbone`.
    pub hbone: hbone::Pool,
    /// Serves captured DNS queries, if they are captured.
    pub queries: Option<Arc<CapturedQueries>>,
    /// The table of live connections.
    pub connections: Arc<Connections>,
    /// Logs and metrics.
    pub telemetry: Telemetry,
    /// Time limits and the like.
    pub settings: arc_swap::ArcSwap<OutboundSettings>,
    /// Trust domain and datacenter of this node's workloads.
    pub local: crate::identity::LocalDomain,
    /// The agent's tasks.
    pub shutdown: Shutdown,
}

/// Limits of outbound connections.
#[derive(Debug, Clone, Copy)]
pub struct OutboundSettings {
    /// TCP connect to the instance's node.
    pub connect_timeout: Duration,
    /// TLS handshake with it.
    pub handshake_timeout: Duration,
    /// Where nodes take tunnels of the kind `hbone`, unless the instance says otherwise.
    pub hbone_port: u16,
    /// End a connection on which nothing moves for this long.
    pub idle_timeout: Option<Duration>,
    /// When failing instances are left out.
    pub ejection: Ejection,
}

/// Who connected, and for what.
#[derive(Debug)]
struct Asked<'a> {
    maker: Maker,
    /// Where the maker connected to, if not to a Unix socket.
    address: Option<SocketAddr>,
    wanted: Wanted<'a>,
}

/// What says which service is called.
#[derive(Debug, Clone, Copy)]
enum Wanted<'a> {
    /// The virtual address that was connected to.
    Captured(Captured),
    /// The explicit upstream whose listener took the connection: it stands for this service.
    Service(&'a ServiceName),
    /// The same, for what is not in the catalog.
    Found(&'a Found),
}

/// Says of the connections of one listener who made them, and for what: step 3.
trait Door<L: Listener>: Send + Sync + 'static {
    /// An outcome if it cannot be told, or is nobody who may connect.
    fn asked(
        &self,
        outbound: &Outbound,
        downstream: &L::Stream,
        peer: &L::Peer,
    ) -> Result<Asked<'_>, Outcome>;

    /// Takes over a connection to a DNS server, which only a capture listener gets.
    fn serve_queries(
        &self,
        _outbound: &Outbound,
        _downstream: L::Stream,
        _client: &L::Peer,
        _asked: &Asked<'_>,
    ) {
    }
}

/// The door of capture listeners.
#[derive(Debug)]
struct Capture;

impl Door<TcpListener> for Capture {
    fn asked(
        &self,
        outbound: &Outbound,
        downstream: &TcpStream,
        peer: &SocketAddr,
    ) -> Result<Asked<'_>, Outcome> {
        outbound.capture(downstream, *peer)
    }

    fn serve_queries(
        &self,
        outbound: &Outbound,
        downstream: TcpStream,
        client: &SocketAddr,
        asked: &Asked<'_>,
    ) {
        if let (Some(queries), Wanted::Captured(captured)) = (&outbound.queries, &asked.wanted) {
            queries.serve_connection(downstream, *client, captured);
        }
    }
}

impl Asked<'_> {
    /// Whether it is a connection to a DNS server.
    fn is_dns(&self) -> bool {
        matches!(&self.wanted, Wanted::Captured(captured) if captured.is_dns())
    }

    /// Whether it is the agent itself, who looks if connects are captured.
    fn is_probe(&self) -> bool {
        matches!(&self.wanted, Wanted::Captured(captured) if health::is_probe(captured))
    }
}

/// Why a connection was cut that outlived `limits.drain_timeout`.
pub(crate) const DRAINED: &str = "drain deadline";

impl Outbound {
    /// Serves one capture listener, or that of an explicit upstream, until draining starts.
    async fn serve<L>(self: Arc<Self>, acceptor: Acceptor<L>, door: impl Door<L>)
    where
        L: Listener,
        L::Stream: Endpoint,
    {
        let door = Arc::new(door);
        let shutdown = self.shutdown.clone();
        accept_all(
            acceptor,
            Direction::Outbound,
            &self.telemetry,
            &shutdown,
            |accepted| {
                let Some(slot) = self.connections.admit(Direction::Outbound) else {
                    refuse_at_limit(&self.telemetry, Direction::Outbound, accepted, None);
                    return;
                };
                let (outbound, door) = (Arc::clone(&self), Arc::clone(&door));
                let carrying = async move {
                    let stream = accepted.stream(Direction::Outbound, &outbound.telemetry);
                    if let Some((stream, peer)) = stream {
                        outbound.carry(stream, &peer, &*door).await;
                    }
                    drop(slot);
                };
                shutdown.spawn_connection("outbound connection", carrying);
            },
        )
        .await;
    }

    /// Carries one accepted connection to its end. Always leaves one access-log line, but for the agent's own probes.
    async fn carry<L>(&self, mut downstream: L::Stream, peer: &L::Peer, door: &impl Door<L>)
    where
        L: Listener,
        L::Stream: Endpoint,
    {
        let mut record = ConnectionRecord::begin(&self.telemetry, Direction::Outbound);
        let asked = door.asked(self, &downstream, peer);
        let outcome = match asked {
            Ok(asked) if asked.is_probe() => {
                record.discard();
                return health::answer(&mut downstream).await;
            }
            Ok(asked) if asked.is_dns() => {
                record.discard();
                door.serve_queries(self, downstream, peer, &asked);
                return;
            }
            Ok(asked) => tokio::select! {
                biased;
                () = self.shutdown.forced() => Outcome::Cut(DRAINED.to_owned()),
                outcome = self.carry_asked(&mut downstream, &asked, &mut record) => outcome,
            },
            Err(outcome) => outcome,
        };
        if !matches!(outcome, Outcome::Completed) {
            downstream.abort();
        }
        record.finish(outcome);
    }

    async fn carry_asked(
        &self,
        downstream: &mut impl Endpoint,
        asked: &Asked<'_>,
        record: &mut ConnectionRecord,
    ) -> Outcome {
        // Killed from here on, the agent leaves the application a reset and not an answer that seems empty.
        downstream.reset_on_close(true);
        let settings = **self.settings.load();
        if let Some(address) = asked.address {
            record.original_destination(address);
        }
        record.enter(Stage::Identity);
        let caller = match self.identify(&asked.maker).await {
            Ok(caller) => caller,
            Err(outcome) => return outcome,
        };
        record.source(&caller.identity, &caller.identity.service);
        record.enter(Stage::Route);
        let wanted = &asked.wanted;
        let callee = match self.destination(wanted).await {
            Ok(callee) => callee,
            Err(outcome) => return self.denied(&caller, wanted, record).unwrap_or(outcome),
        };
        record.service(&callee.service.name);

        // Registered before the decision: see `connections`.
        let counts = Arc::<Counts>::default();
        record.counts(Arc::clone(&counts));
        let live = self.connections.register(
            Direction::Outbound,
            caller.identity.clone(),
            callee.service.name.clone(),
            Arc::clone(&counts),
        );
        if let Wanted::Captured(captured) = wanted {
            live.connection.called_at(captured.destination);
            // Whoever moves the address from now on finds the connection; one who did so just now did not.
            if let Some(reason) = live.connection.lost_address(&self.catalog.current()) {
                return Outcome::Cut(reason);
            }
        }
        record.enter(Stage::Policy);
        let permit = match self.authorise(&caller, &callee, record) {
            Ok(permit) => permit,
            Err(outcome) => return outcome,
        };
        record.enter(Stage::Route);
        // Boxed: what opening needs is not kept for the life of the connection.
        let opening = Box::pin(self.open(permit, wanted, settings, record));
        let opened = tokio::select! {
            biased;
            () = live.connection.cut() => return cut_outcome(&live.connection),
            opened = opening => opened,
        };
        let (choice, mut upstream) = match opened {
            Ok(opened) => opened,
            Err(outcome) => return outcome,
        };
        live.connection.carried_by(&choice.instance.id);

        record.enter(Stage::Relay);
        let cut = live.connection.cut();
        let idle = settings.idle_timeout;
        let end = match &mut upstream {
            Upstream::Tunnel(tunnel) => relay::relay(downstream, tunnel, &counts, idle, cut).await,
            Upstream::Plain(stream) => relay::relay(downstream, stream, &counts, idle, cut).await,
        };
        Outcome::of_relay(&end, || live.connection.cut_reason().unwrap_or_default())
    }
}

/// What a connection ends with that somebody cut.
pub(crate) fn cut_outcome(connection: &crate::connections::Connection) -> Outcome {
    Outcome::Cut(connection.cut_reason().unwrap_or_default())
}

/// Ends a connection above `limits.max_connections`: a reset, not an empty answer.
pub(crate) fn refuse_at_limit<L>(
    telemetry: &Telemetry,
    direction: Direction,
    accepted: Accepted<L>,
    peer: Option<SocketAddr>,
) where
    L: Listener,
    L::Stream: Endpoint,
{
    let mut record = ConnectionRecord::begin(telemetry, direction);
    if let Some(peer) = peer {
        record.peer(peer);
    }
    if let Some((mut stream, _peer)) = accepted.stream(direction, telemetry) {
        stream.abort();
    }
    record.finish(Outcome::Failed {
        stage: Stage::Capture,
        side: Side::Internal,
        error: "limits.max_connections reached".to_owned(),
    });
}
