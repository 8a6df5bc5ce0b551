//! Steps 8 and 9 for tunnels of the kind `hbone`: one handshake, then many application connections.
//!
//! A connection is shown the certificate of one service, and its streams reach that service's instances here and
//! nothing else. Each stream goes the way of [`super`] on its own: registered, decided, delivered, with a line in
//! the access log.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use hyper::StatusCode;
use tokio::{net::TcpStream, time::Instant};

use super::{Inbound, Target, Targets, handshake_failed};
use crate::{
    accept::{Acceptor, accept_all},
    catalog::model::ServiceName,
    connections::Unproven,
    identity::{LocalDomain, spiffe::SpiffeId},
    outbound::{DRAINED, refuse_at_limit},
    relay::{self, Counts, Endpoint as _},
    telemetry::{
        log::chain,
        record::{ConnectionRecord, Direction, Outcome, Side, Stage},
    },
    tunnel::{
        connect::{Incoming, TunnelError},
        hbone::server::{Accepted, Requested},
    },
};

/// Why a tunnel or a stream is for nobody here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum TargetError {
    /// The peer sent no name, and the node has several services or none.
    #[error("{services} services on this node and the peer sent no server name")]
    NoName { services: usize },
    /// The name is that of no service here.
    #[error("server name {0:?} is that of no service of this node")]
    UnknownName(String),
    /// The service has no such instance here.
    #[error("{service} has no instance at {destination} on this node")]
    NoInstance {
        service: ServiceName,
        destination: SocketAddr,
    },
    /// The catalog has several there.
    #[error("{service} has several instances at {destination} on this node")]
    Ambiguous {
        service: ServiceName,
        destination: SocketAddr,
    },
}

/// The service that a connection is for: the one named, or the only one, for ztunnel names none.
fn service(
    targets: &Targets,
    local: &LocalDomain,
    name: Option<&str>,
) -> Result<ServiceName, TargetError> {
    let mut services: Vec<_> = targets.all().map(|target| &target.service).collect();
    services.sort_unstable();
    services.dedup();
    let Some(name) = name else {
        return match services.as_slice() {
            [only] => Ok((*only).clone()),
            several => Err(TargetError::NoName {
                services: several.len(),
            }),
        };
    };
    let is_named = |service: &&&ServiceName| local.service_sni(service).eq_ignore_ascii_case(name);
    let named = services.iter().find(is_named);
    named
        .map(|service| (*service).clone())
        .ok_or_else(|| TargetError::UnknownName(name.to_owned()))
}

/// The instance that a stream is for, by the address and port it is registered with.
fn instance(
    targets: &Targets,
    service: &ServiceName,
    destination: SocketAddr,
) -> Result<Arc<Target>, TargetError> {
    let mut found = targets.all().filter(|target| {
        let instance = &target.instance;
        target.service == *service
            && instance.port == destination.port()
            && instance.tunnel.ip() == destination.ip()
    });
    let service = || service.clone();
    match (found.next(), found.next()) {
        (Some(target), None) => Ok(Arc::clone(target)),
        (None, _) => Err(TargetError::NoInstance {
            service: service(),
            destination,
        }),
        (Some(_), Some(_)) => Err(TargetError::Ambiguous {
            service: service(),
            destination,
        }),
    }
}

/// What the streams of one connection have in common.
#[derive(Debug)]
struct Peer {
    identity: SpiffeId,
    address: SocketAddr,
    /// Whose certificate it was shown.
    service: ServiceName,
}

impl Inbound {
    /// Serves the HBONE listener until draining starts.
    pub async fn serve_hbone(self: Arc<Self>, acceptor: Acceptor<TcpListener>) {
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
                        Box::pin(inbound.carry_tunnel(stream, peer, unproven)).await;
                    }
                    drop(slot);
                };
                // Its streams stay with it.
                shutdown.spawn_on(&shutdown.workers().in_turn(), "inbound tunnel", carrying);
            },
        )
        .await;
    }

    /// Takes one connection and its streams. Leaves an access-log line of its own only if its handshake fails.
    async fn carry_tunnel(
        self: Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        unproven: Unproven,
    ) {
        let mut record = ConnectionRecord::begin(&self.telemetry, Direction::Inbound);
        record.peer(address);
        // Boxed: what a handshake needs is not kept for the life of the connection.
        let handshake = Box::pin(self.tunnel_handshake(stream, &mut record));
        let done = tokio::select! {
            biased;
            () = self.shutdown.forced() => Err(Some(Outcome::Cut(DRAINED.to_owned()))),
            done = handshake => done,
        };
        let (service, accepted) = match done {
            Ok(done) => done,
            Err(Some(outcome)) => return record.finish(outcome),
            Err(None) => return record.discard(),
        };
        record.discard();
        drop(unproven);
        let peer = Arc::new(Peer {
            identity: accepted.peer.clone(),
            address,
            service,
        });
        let take = |requested| self.take(requested, &peer);
        Box::pin(accepted.serve(&self.shutdown, take)).await;
    }

    /// `None` is a health check, as in [`Self::carry_recorded`].
    async fn tunnel_handshake(
        &self,
        stream: TcpStream,
        record: &mut ConnectionRecord,
    ) -> Result<(ServiceName, Accepted), Option<Outcome>> {
        let settings = **self.settings.load();
        let deadline = Instant::now() + settings.handshake_timeout;
        record.enter(Stage::Handshake);
        let incoming = match Incoming::read_hello(stream, deadline).await {
            Ok(incoming) => incoming,
            Err(TunnelError::Silent) => return Err(None),
            Err(error) => return Err(Some(handshake_failed(error))),
        };
        record.enter(Stage::Route);
        let name = incoming.server_name();
        let service = match service(&self.targets.load(), &self.local, name.as_deref()) {
            Ok(service) => service,
            Err(error) => {
                incoming.refuse();
                return Err(Some(misrouted(&error)));
            }
        };
        record.service(&service);
        record.enter(Stage::Identity);
        let identity = self.local.identity_of(&service);
        let tls = tokio::time::timeout_at(deadline, self.certificates.for_identity(&identity))
            .await
            .map_err(|_elapsed| handshake_failed(TunnelError::HandshakeTimeout))?
            .map_err(|error| Outcome::failed(Stage::Identity, Side::Internal, &error))?;
        record.enter(Stage::Handshake);
        let accepted = Accepted::handshake(incoming, &tls, &self.certificates, deadline)
            .await
            .map_err(handshake_failed)?;
        record.handshaken();
        Ok((service, accepted))
    }

    fn take(self: &Arc<Self>, requested: Requested, peer: &Arc<Peer>) {
        let mut record = ConnectionRecord::begin(&self.telemetry, Direction::Inbound);
        record.peer(peer.address);
        record.source(&peer.identity, &peer.identity.service);
        let Some(slot) = self.connections.admit(Direction::Inbound) else {
            requested.refuse(StatusCode::SERVICE_UNAVAILABLE);
            return record.finish(Outcome::Failed {
                stage: Stage::Capture,
                side: Side::Internal,
                error: "limits.max_connections reached".to_owned(),
            });
        };
        let (inbound, peer) = (Arc::clone(self), Arc::clone(peer));
        self.shutdown.spawn("inbound stream", async move {
            let outcome = tokio::select! {
                biased;
                () = inbound.shutdown.forced() => Outcome::Cut(DRAINED.to_owned()),
                outcome = inbound.carry_stream(requested, &peer, &mut record) => outcome,
            };
            record.finish(outcome);
            drop(slot);
        });
    }

    /// Carries one stream to its end.
    async fn carry_stream(
        &self,
        mut requested: Requested,
        peer: &Peer,
        record: &mut ConnectionRecord,
    ) -> Outcome {
        let settings = **self.settings.load();
        record.enter(Stage::Route);
        let destination = match requested.destination() {
            Ok(destination) => destination,
            Err(error) => {
                requested.refuse(StatusCode::BAD_REQUEST);
                return misrouted(&error);
            }
        };
        let target = match instance(&self.targets.load(), &peer.service, destination) {
            Ok(target) => target,
            Err(error) => {
                requested.refuse(StatusCode::SERVICE_UNAVAILABLE);
                return misrouted(&error);
            }
        };
        record.service(&target.service);
        record.instance(&target.instance.id);

        // Registered before the decision: see `connections`.
        let counts = Arc::<Counts>::default();
        record.counts(Arc::clone(&counts));
        let live = self.connections.register(
            Direction::Inbound,
            peer.identity.clone(),
            target.service.clone(),
            counts,
        );
        let live = &live.connection;
        live.carried_by(&target.instance.id);
        record.enter(Stage::Policy);
        let permit = match self.authorise(&peer.identity, &target, record) {
            Ok(permit) => permit,
            Err(outcome) => {
                requested.refuse(StatusCode::FORBIDDEN);
                return outcome;
            }
        };
        let delivered = tokio::select! {
            biased;
            () = requested.given_up() => return Outcome::Failed {
                stage: Stage::Deliver,
                side: Side::Downstream,
                error: "given up by the peer before the application answered".to_owned(),
            },
            delivered = self.deliver(permit, live, settings, record) => delivered,
        };
        let mut upstream = match delivered {
            Ok(upstream) => upstream,
            Err(outcome) => {
                requested.refuse(StatusCode::SERVICE_UNAVAILABLE);
                return outcome;
            }
        };
        let mut downstream = match requested.accept() {
            Ok(downstream) => downstream,
            Err(error) => {
                upstream.abort();
                return Outcome::failed(Stage::Relay, Side::Downstream, &error);
            }
        };
        let idle = settings.idle_timeout;
        let relay = relay::relay(
            &mut downstream,
            &mut upstream,
            &live.counts,
            idle,
            live.cut(),
        );
        Outcome::of_relay(&relay.await, || live.cut_reason().unwrap_or_default())
    }
}

fn misrouted(error: &dyn std::error::Error) -> Outcome {
    Outcome::Failed {
        stage: Stage::Route,
        side: Side::Downstream,
        error: chain(error).to_string(),
    }
}
