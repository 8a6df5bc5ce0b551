//! From a tunnel to the application on this node: steps 8 and 9 of the way of a connection.
//!
//! [`Inbound::carry`] is the way itself: hello -> target -> handshake -> authorise -> deliver -> relay.
//! The application is dialled only after the intention allowed it: a denied peer of a server that speaks
//! first sees no byte, and the server sees no connection.

pub mod deliver;
pub mod hbone;
pub mod listeners;
pub mod targets;

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::net::TcpStream;

use self::{
    deliver::Deliverer,
    targets::{Target, Targets},
};
use crate::{
    accept::{Acceptor, accept_all},
    catalog::{model::IntentionAction, store::CatalogStore},
    connections::{Connection, Connections, Unproven},
    identity::{LocalDomain, certificates::Certificates, spiffe::SpiffeId},
    lifecycle::Shutdown,
    outbound::{DRAINED, cut_outcome, refuse_at_limit},
    policy::PolicyStore,
    relay::{self, Counts, Endpoint as _},
    telemetry::{
        Telemetry,
        log::chain,
        record::{ConnectionRecord, Direction, Outcome, Side, Stage},
    },
    tunnel::{
        TunnelStream,
        connect::{Incoming, TunnelError},
    },
};

/// What inbound connections need; one per agent.
#[derive(Debug)]
pub struct Inbound {
    /// Services, for the limits of the called one.
    pub catalog: Arc<CatalogStore>,
    /// The instances of this node.
    pub targets: arc_swap::ArcSwap<Targets>,
    /// Where instances live that have a network namespace of their own.
    pub namespaces: arc_swap::ArcSwap<Namespaces>,
    /// Intentions.
    pub policy: Arc<PolicyStore>,
    /// One certificate per service of this node.
    pub certificates: Certificates,
    /// Dials applications.
    pub deliverer: Deliverer,
    /// The table of live connections.
    pub connections: Arc<Connections>,
    /// Logs and metrics.
    pub telemetry: Telemetry,
    /// Time limits.
    pub settings: arc_swap::ArcSwap<InboundSettings>,
    /// Trust domain and datacenter.
    pub local: LocalDomain,
    /// The agent's tasks.
    pub shutdown: Shutdown,
}

/// Limits of inbound connections.
#[derive(Debug, Clone, Copy)]
pub struct InboundSettings {
    /// From accept to a finished TLS handshake.
    pub handshake_timeout: Duration,
    /// TCP connect to the application, unless `service-defaults` says otherwise.
    pub connect_timeout: Duration,
    /// End a connection on which nothing moves for this long.
    pub idle_timeout: Option<Duration>,
}

/// Which network namespace a local instance lives in, from the `[[workload]]` rules.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// Rules that name a namespace, or `None` for the host's, per service.
    pub rules: Vec<NamespaceRule>,
}

/// One `[[workload]]` rule, as far as delivery is concerned.
#[derive(Debug)]
pub struct NamespaceRule {
    /// The rule's service.
    pub service: crate::catalog::model::ServiceName,
    /// The rule's instance, if it names one.
    pub instance: Option<crate::catalog::model::InstanceId>,
    /// The rule's namespace; `None` for rules of processes in the host's.
    pub netns: Option<PathBuf>,
}

impl Namespaces {
    /// The namespace of an instance: that of the rule which names the instance, else that of its service's
    /// only rule, else the host's.
    pub fn of(&self, target: &Target) -> Option<&std::path::Path> {
        let of_service = || {
            self.rules
                .iter()
                .filter(|rule| rule.service == target.service)
        };
        let named = of_service().find(|rule| rule.instance.as_ref() == Some(&target.instance.id));
        let only = || {
            let mut unnamed = of_service().filter(|rule| rule.instance.is_none());
            unnamed.next().filter(|_| unnamed.next().is_none())
        };
        named.or_else(only)?.netns.as_deref()
    }
}

impl Inbound {
    /// Serves one tunnel listener until draining starts.
    pub async fn serve(self: Arc<Self>, acceptor: Acceptor<TcpListener>, port: u16) {
        let shutdown = self.shutdown.clone();
        accept_all(
            acceptor,
            Direction::Inbound,
            &self.telemetry,
            &shutdown,
            |accepted| {
                let peer = *accepted.peer();
                let slot = self.connections.admit(Direction::Inbound);
                let unproven = slot
                    .as_ref()
                    .and_then(|_slot| self.connections.admit_unproven(peer.ip()));
                let (Some(slot), Some(unproven)) = (slot, unproven) else {
                    refuse_at_limit(&self.telemetry, Direction::Inbound, accepted, Some(peer));
                    return;
                };
                let inbound = Arc::clone(&self);
                let carrying = async move {
                    let stream = accepted.stream(Direction::Inbound, &inbound.telemetry);
                    if let Some((stream, peer)) = stream {
                        inbound.carry(stream, peer, port, unproven).await;
                    }
                    drop(slot);
                };
                shutdown.spawn_connection("inbound connection", carrying);
            },
        )
        .await;
    }

    /// Carries one accepted tunnel to its end. Always leaves one access-log line.
    async fn carry(&self, stream: TcpStream, peer: SocketAddr, port: u16, unproven: Unproven) {
        let mut record = ConnectionRecord::begin(&self.telemetry, Direction::Inbound);
        record.peer(peer);
        let outcome = tokio::select! {
            biased;
            () = self.shutdown.forced() => Some(Outcome::Cut(DRAINED.to_owned())),
            outcome = self.carry_recorded(stream, port, unproven, &mut record) => outcome,
        };
        match outcome {
            Some(outcome) => record.finish(outcome),
            None => record.discard(),
        }
    }

    /// `None` if there is nothing to carry: a TCP health check connects and leaves, every few seconds and by intent.
    async fn carry_recorded(
        &self,
        stream: TcpStream,
        port: u16,
        unproven: Unproven,
        record: &mut ConnectionRecord,
    ) -> Option<Outcome> {
        let settings = **self.settings.load();
        let deadline = tokio::time::Instant::now() + settings.handshake_timeout;
        record.enter(Stage::Handshake);
        let incoming = match Incoming::read_hello(stream, deadline).await {
            Ok(incoming) => incoming,
            Err(TunnelError::Silent) => return None,
            Err(error) => return Some(handshake_failed(error)),
        };
        // Boxed: what a handshake needs is not kept for the life of the connection.
        let handshake = Box::pin(self.handshake(incoming, port, deadline, record));
        let (target, source, mut downstream) = match handshake.await {
            Ok(done) => done,
            Err(outcome) => return Some(outcome),
        };
        drop(unproven);
        record.source(&source, &source.service);

        // Registered before the decision: see `connections`.
        let counts = Arc::<Counts>::default();
        record.counts(Arc::clone(&counts));
        let live = self.connections.register(
            Direction::Inbound,
            source.clone(),
            target.service.clone(),
            Arc::clone(&counts),
        );
        live.connection.carried_by(&target.instance.id);
        record.enter(Stage::Policy);
        let outcome = match self.authorise(&source, &target, record) {
            Ok(permit) => {
                let live = &live.connection;
                match self.deliver(permit, live, settings, record).await {
                    Ok(mut upstream) => {
                        let (counts, idle) = (&live.counts, settings.idle_timeout);
                        let relay =
                            relay::relay(&mut downstream, &mut upstream, counts, idle, live.cut());
                        Outcome::of_relay(&relay.await, || live.cut_reason().unwrap_or_default())
                    }
                    Err(outcome) => outcome,
                }
            }
            Err(outcome) => outcome,
        };
        if !matches!(outcome, Outcome::Completed) {
            downstream.abort();
        }
        Some(outcome)
    }

    /// Step 8: who is there, proved by a certificate, and which instance is meant.
    async fn handshake(
        &self,
        incoming: Incoming,
        port: u16,
        deadline: tokio::time::Instant,
        record: &mut ConnectionRecord,
    ) -> Result<(Arc<Target>, SpiffeId, TunnelStream), Outcome> {
        record.enter(Stage::Route);
        let name = incoming.server_name();
        let target = match self.targets.load().choose(port, name.as_deref()) {
            Ok(target) => target,
            Err(error) => {
                incoming.refuse();
                return Err(Outcome::Failed {
                    stage: Stage::Route,
                    side: Side::Downstream,
                    error: error.to_string(),
                });
            }
        };
        record.service(&target.service);
        record.instance(&target.instance.id);
        record.enter(Stage::Identity);
        let identity = self.local.identity_of(&target.service);
        let tls = tokio::time::timeout_at(deadline, self.certificates.for_identity(&identity))
            .await
            .map_err(|_elapsed| handshake_failed(TunnelError::HandshakeTimeout))?
            .map_err(|error| Outcome::Failed {
                stage: Stage::Identity,
                side: Side::Internal,
                error: chain(&error).to_string(),
            })?;
        record.enter(Stage::Handshake);
        let (stream, source) = incoming
            .handshake(&tls, deadline)
            .await
            .map_err(handshake_failed)?;
        record.handshaken();
        Ok((target, source, stream))
    }

    /// Step 5 again, on the side of the called: nobody else's decision is trusted.
    fn authorise<'a>(
        &self,
        source: &SpiffeId,
        target: &'a Target,
        record: &mut ConnectionRecord,
    ) -> Result<Permit<'a>, Outcome> {
        let decision = self.policy.current().decide(source, &target.service);
        record.decision(decision.reason.to_string());
        match decision.action {
            IntentionAction::Deny => Err(Outcome::Denied),
            IntentionAction::Allow => Ok(Permit { target }),
        }
    }

    /// Step 9: dial the application. What is left is to carry bytes.
    async fn deliver(
        &self,
        Permit { target }: Permit<'_>,
        live: &Connection,
        settings: InboundSettings,
        record: &mut ConnectionRecord,
    ) -> Result<TcpStream, Outcome> {
        record.enter(Stage::Deliver);
        let catalog = self.catalog.current();
        let defaults = catalog.service(&target.service).map(|s| s.defaults.clone());
        let defaults = defaults.unwrap_or_default();
        if let Some(most) = defaults.max_inbound_connections
            && self.connections.inbound_to(&target.service) > most as usize
        {
            return Err(Outcome::Failed {
                stage: Stage::Deliver,
                side: Side::Internal,
                error: format!("{} takes at most {most} connections", target.service),
            });
        }
        let limit = defaults
            .local_connect_timeout
            .unwrap_or(settings.connect_timeout);
        let namespaces = self.namespaces.load();
        let dial = self
            .deliverer
            .dial(target.instance.local, namespaces.of(target), limit);
        let dialled = tokio::select! {
            biased;
            () = live.cut() => return Err(cut_outcome(live)),
            dialled = dial => dialled,
        };
        let upstream =
            dialled.map_err(|error| Outcome::failed(Stage::Deliver, Side::Upstream, &error))?;
        record.connected();
        record.enter(Stage::Relay);
        Ok(upstream)
    }
}

/// Proof that the peer may call the target: without it, nothing dials the application.
struct Permit<'a> {
    target: &'a Target,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn handshake_failed(error: TunnelError) -> Outcome {
    Outcome::Failed {
        stage: Stage::Handshake,
        side: Side::Downstream,
        error: chain(&error).to_string(),
    }
}

#[cfg(test)]
mod tests;
