//! The composition root: builds the parts of the agent in order, runs them, drains them.
//!
//! [`run`] reads in the order in which things must exist: privileges and cgroup, catalog, certificates,
//! datapath, listeners. What [`start`] builds, [`follow`] keeps up to date and [`status`] describes.

mod authority;
mod away;
mod consul;
mod follow;
mod heartbeat;
mod names;
mod next_agent;
mod source;
mod start;
mod status;
mod supervisor;
mod well;

pub(crate) use authority::builtin_ca;
pub(crate) use away::problems as away_problems;
pub(crate) use source::file_context;
pub(crate) use start::{catalog_store, enter_own_cgroup, iptables_choice, vip_pools, vip_ranges};

use std::{
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use self::{
    authority::Authority,
    consul::{ConsulParts, OpenUpstreams},
};
use crate::{
    admin::status::PredecessorStatus,
    catalog::{
        model::{IntentionAction, NodeName, Snapshot},
        store::{Catalog, CatalogStore},
    },
    config::Config,
    connections::Connections,
    datapath::Backend,
    handover::{self, HandoverServer, Inheritance, Predecessor, Successor},
    health::Health,
    identity::{LocalDomain, certificates::Certificates},
    inbound::Inbound,
    lifecycle::Shutdown,
    outbound::{Outbound, listeners::CaptureNamespaces},
    policy::{Intentions, PolicyStore},
    sockets::ListeningSockets,
    telemetry::{
        Telemetry,
        log::{LogHandle, chain},
    },
    workers::Workers,
};

/// The agent could not start, or not end in order.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct NodeError {
    doing: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl NodeError {
    fn when<E: std::error::Error + Send + Sync + 'static>(
        doing: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        move |source| Self {
            doing,
            source: Box::new(source),
        }
    }
}

/// The parts of a running agent.
#[derive(Debug)]
struct Node {
    config_path: PathBuf,
    config: ArcSwap<Config>,
    started_at: SystemTime,
    /// As the catalog names this node.
    name: NodeName,
    log: LogHandle,
    telemetry: Telemetry,
    catalog: Arc<CatalogStore>,
    /// What the catalog's source and its addresses complain about now.
    catalog_problems: Mutex<Vec<String>>,
    /// The catalog that was last brought to the kernel: names lead to addresses only once the kernel has them.
    in_kernel: watch::Sender<Arc<Catalog>>,
    /// Why the kernel does not have the catalog in force.
    kernel_problem: Mutex<Option<String>>,
    policy: Arc<PolicyStore>,
    authority: Authority,
    /// What it has of Consul, if that is the source.
    consul: Option<ConsulParts>,
    /// Explicit upstreams, as last followed.
    upstreams: Mutex<OpenUpstreams>,
    /// Whether another agent goes on in this one's place.
    replaced: Arc<AtomicBool>,
    certificates: Certificates,
    datapath: Arc<Backend>,
    connections: Arc<Connections>,
    outbound: Arc<Outbound>,
    inbound: Arc<Inbound>,
    captures: CaptureNamespaces,
    sockets: ListeningSockets,
    /// The agent that this one took over from, while it drains.
    predecessor: Mutex<Option<PredecessorStatus>>,
    health: Health,
    heartbeats: heartbeat::Heartbeats,
    /// Where tunnels are taken now.
    tunnel_addresses: Mutex<Vec<std::net::SocketAddr>>,
    local: LocalDomain,
    shutdown: Shutdown,
}

impl Node {
    /// Puts the intentions of `snapshot` in force, for connections to come.
    fn decide_by(&self, snapshot: &Snapshot) {
        let default = start::default_intention(&self.config.load(), snapshot);
        self.policy
            .replace(Intentions::new(&snapshot.intentions, default));
    }

    /// Cuts live connections that the intentions in force do not allow any more.
    fn cut_forbidden(&self) {
        let policy = self.policy.current();
        let cut = self.connections.cut_forbidden(|connection| {
            let decision = policy.decide(&connection.source, &connection.service);
            match decision.action {
                IntentionAction::Allow => None,
                IntentionAction::Deny => Some(decision.reason.to_string()),
            }
        });
        if cut > 0 {
            tracing::info!(cut, "connections cut that intentions do not allow any more");
        }
    }

    /// Cuts live connections whose virtual address went to another service.
    fn cut_lost(&self) {
        let catalog = self.catalog.current();
        let cut = self
            .connections
            .cut_forbidden(|connection| connection.lost_address(&catalog));
        if cut > 0 {
            tracing::info!(
                cut,
                "connections cut whose virtual address is another service's now"
            );
        }
    }

    /// Puts the intentions of `snapshot` in force, also for live connections.
    fn enforce(&self, snapshot: &Snapshot) {
        self.decide_by(snapshot);
        self.cut_forbidden();
    }
}

/// Why an agent ends.
enum End {
    /// A signal, by its name.
    Signal(&'static str),
    /// Another agent serves in its place.
    Replaced(Successor),
}

/// Runs the agent until SIGTERM or SIGINT, or until another one takes over; then drains it. Connections are carried by
/// `workers`, all else by the caller's runtime.
///
/// With `take_over`, the agent that runs hands over to this one, if there is one.
///
/// # Errors
/// If it cannot start; once it runs, it does not give up.
pub async fn run(
    path: PathBuf,
    config: Config,
    log: LogHandle,
    workers: Workers,
    take_over: bool,
) -> Result<(), NodeError> {
    // Registered first: a signal during a slow start must not kill without cleaning up.
    let mut terminate =
        signal(SignalKind::terminate()).map_err(NodeError::when("watch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeError::when("watch SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(NodeError::when("watch SIGHUP"))?;

    let handover_socket = handover::socket_path(&config.admin.socket);
    let (predecessor, inheritance) = inherit(&config, &handover_socket, take_over).await?;
    // What it needs may be away, and its coming be waited for.
    let mut follower = tokio::select! {
        started = start::start(path, config, log, workers, inheritance) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let node = Arc::clone(follower.node());
    let handover = HandoverServer::bind(&handover_socket)
        .map_err(NodeError::when("wait for the next agent"))?;
    if let Some(predecessor) = predecessor {
        follow_predecessor(&node, predecessor).await;
        // Until now both brought their catalog to the kernel, and the other may have been the last.
        follower.apply_catalog();
    }
    node.sockets.store();
    let status = format!("serving as node {}", node.name);
    supervisor::ready(&status);
    tracing::info!(node = %node.name, "ready");

    let mut next_agent = pin!(handover.next_agent(&node.sockets, node.datapath.pin_lock()));
    let end = loop {
        tokio::select! {
            _ = terminate.recv() => break End::Signal("SIGTERM"),
            _ = interrupt.recv() => break End::Signal("SIGINT"),
            successor = &mut next_agent => break End::Replaced(successor),
            _ = hangup.recv() => {
                supervisor::reloading();
                follower.reload();
                supervisor::ready(&status);
            }
            () = follower.next_change() => {}
        }
    };
    let cut = tokio::select! {
        cut = drain(&node, &end) => cut,
        // The second time is meant.
        _ = terminate.recv() => node.shutdown.run("second signal", Duration::ZERO).await,
        _ = interrupt.recv() => node.shutdown.run("second signal", Duration::ZERO).await,
    };
    if matches!(end, End::Signal(_)) {
        node.stop_beating();
        if let Err(error) = node.datapath.leave() {
            tracing::warn!(error = %chain(&error), "capture not removed");
        }
    }
    tracing::info!(cut, "stopped");
    node.telemetry.flush_logs(Duration::from_secs(1));
    Ok(())
}

/// What the agent before left: what a running one hands over, or what systemd kept of one that was killed.
async fn inherit(
    config: &Config,
    handover_socket: &Path,
    take_over: bool,
) -> Result<(Option<Predecessor>, Inheritance), NodeError> {
    if take_over && config.capture.pin_directory.is_some() {
        let asked = Predecessor::ask(handover_socket)
            .await
            .map_err(NodeError::when("take over from the running agent"))?;
        if let Some((predecessor, inheritance)) = asked {
            let sockets = inheritance.sockets.len();
            tracing::info!(process = predecessor.process, sockets, "taking over");
            return Ok((Some(predecessor), inheritance));
        }
    }
    let sockets = supervisor::inherited();
    Ok((
        None,
        Inheritance {
            sockets,
            ..Inheritance::default()
        },
    ))
}

/// Lets the agent before go, and shows how far it has drained.
async fn follow_predecessor(node: &Arc<Node>, predecessor: Predecessor) {
    if let Err(error) = predecessor.retire().await {
        tracing::warn!(error = %chain(&error), "the agent before did not confirm that it retires");
        return;
    }
    let inner = Arc::clone(node);
    node.shutdown.spawn_service("predecessor", async move {
        let process = predecessor.process;
        let draining = async {
            while let Some(connections) = predecessor.draining().await {
                *inner.predecessor.lock() = Some(PredecessorStatus {
                    process,
                    connections,
                });
            }
            tracing::info!(process, "the agent before has ended");
        };
        tokio::select! {
            () = draining => *inner.predecessor.lock() = None,
            () = inner.shutdown.stopped() => {}
        }
    });
}

/// Takes nothing new and lets live connections end. Returns how many did not in time.
async fn drain(node: &Node, end: &End) -> usize {
    let deadline = node.config.load().limits.drain_timeout;
    match end {
        End::Signal(name) => {
            if let Err(error) = node.datapath.close() {
                tracing::warn!(error = %chain(&error), "capture not closed");
            }
            node.sockets.close();
            supervisor::stopping("draining");
            node.shutdown.run(name, deadline).await
        }
        End::Replaced(successor) => {
            node.replaced.store(true, Ordering::Release);
            node.sockets.give();
            supervisor::replaced_by(successor.process);
            node.shutdown.release_operators();
            let reason = format!("replaced by process {}", successor.process);
            let reports = async {
                successor.confirm().await;
                loop {
                    successor.report(node.connections.count()).await;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            };
            tokio::select! {
                // First: what is confirmed has happened.
                biased;
                cut = node.shutdown.run(reason, deadline) => cut,
                cut = reports => cut,
            }
        }
    }
}
