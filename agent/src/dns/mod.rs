//! Names: services' names lead to their virtual addresses, everything else to whoever answered it before.
//!
//! A query comes as a [`Query`]: bytes, the transport, who asks, and the server that it was meant for if it was
//! captured on its way there. [`Resolver::decide`] answers names of the [`zone`] at once; the rest is
//! [forwarded](Resolver::forward) as it is, and the answer comes back as bytes. [`server`] brings queries from a
//! listener, [`captured`] those that workloads sent elsewhere.
//!
//! Nothing here decides who may call a service: that is the business of its connections.

pub mod zone;
pub mod server;
pub mod forward;
pub mod lookup;
pub mod limit;
pub mod captured;
pub mod sockets;
mod grammar;
mod message;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

pub use crate::telemetry::metrics::DnsTransport as Transport;

use arc_swap::ArcSwap;
use hickory_proto::{
    op::{OpCode, ResponseCode},
    rr::DNSClass,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::timeout,
};

use self::{
    forward::{ForwardError, Forwarder},
    message::{Envelope, Received},
    sockets::NamespaceSockets,
    zone::{Answer, Zone, ZoneSettings},
};
use crate::{
    catalog::{
        consul::{ConsulHandle, LookUp},
        store::Catalog,
    },
    lifecycle::Shutdown,
    telemetry::{
        log::chain,
        metrics::{DnsOutcome, Metrics},
        rate::OncePer,
    },
};

/// From when the source has published a service until the zone has it, at most.
const ZONE_WAIT: Duration = Duration::from_secs(1);

/// A query on its way.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// The message, without the length that TCP puts before it.
    pub message: &'a [u8],
    /// How it came.
    pub transport: Transport,
    /// Who asks.
    pub client: SocketAddr,
    /// Where it was going, if it was captured; what is not ours goes to exactly that server.
    pub original: Option<&'a Original>,
}

/// Where a captured query was going.
#[derive(Debug, Clone)]
pub struct Original {
    /// The server.
    pub server: SocketAddr,
    /// What makes sockets in the network namespace of who asks; `None` if that is the agent's own.
    pub sockets: Option<Arc<NamespaceSockets>>,
}

/// What becomes of a query.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// This is the answer.
    Answer(Vec<u8>),
    /// It is for [`Resolver::forward`].
    Forward,
    /// It gets none.
    Ignore,
}

/// Answers queries.
#[derive(Debug)]
pub struct Resolver {
    zone: ArcSwap<Zone>,
    forwarder: Forwarder,
    metrics: Arc<Metrics>,
    turn: AtomicUsize,
    /// Who knows what the catalog has not yet.
    source: Option<ConsulHandle>,
    /// Told whenever there is another zone.
    renewed: Notify,
}

impl Resolver {
    /// Answers by `catalog`, until [`Self::follow`] brings another.
    pub fn new(
        settings: ZoneSettings,
        catalog: Arc<Catalog>,
        forwarder: Forwarder,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            zone: ArcSwap::from_pointee(Zone::new(Arc::new(settings), catalog)),
            forwarder,
            metrics,
            turn: AtomicUsize::new(0),
            source: None,
            renewed: Notify::new(),
        }
    }

    /// Looks services up in Consul that the catalog has not, before their names are anybody else's.
    #[must_use]
    pub fn with_source(mut self, source: ConsulHandle) -> Self {
        self.source = Some(source);
        self
    }

    /// Follows the catalog as it comes into force, until everything has drained.
    pub fn follow(
        self: &Arc<Self>,
        mut in_force: watch::Receiver<Arc<Catalog>>,
        shutdown: &Shutdown,
    ) {
        let (resolver, stopped) = (Arc::clone(self), shutdown.clone());
        shutdown.spawn_service("dns names", async move {
            loop {
                let settings = Arc::clone(resolver.zone.load().settings());
                let catalog = Arc::clone(&in_force.borrow_and_update());
                resolver.zone.store(Arc::new(Zone::new(settings, catalog)));
                resolver.renewed.notify_waiters();
                tokio::select! {
                    biased;
                    () = stopped.stopped() => return,
                    changed = in_force.changed() => if changed.is_err() { return },
                }
            }
        });
    }

    /// Answers names that are ours. Does not wait for anything.
    pub fn decide(&self, query: &Query<'_>) -> Step {
        let asked = match message::receive(query.message) {
            Received::Nothing => return self.ignore(query.transport, DnsOutcome::Malformed),
            Received::Malformed(metadata) if metadata.op_code == OpCode::Query => {
                let envelope = Envelope::without_question(metadata);
                return self.seal(query, envelope, Answer::only(ResponseCode::FormErr));
            }
            Received::Malformed(_other_operation) => return Step::Forward,
            Received::Query(asked) => asked,
        };
        let zone = self.zone.load();
        let (op_code, question) = (asked.metadata.op_code, asked.question.clone());
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let Some(answer) = zone.answer(&question.name, question.query_type, turn) else {
            return Step::Forward;
        };
        let (envelope, answer) = match asked.open() {
            Err(unreadable) => (unreadable, Answer::only(ResponseCode::FormErr)),
            Ok(envelope) if !envelope.has_known_edns() => {
                (envelope, Answer::only(ResponseCode::BADVERS))
            }
            Ok(envelope) if op_code != OpCode::Query => {
                (envelope, Answer::only(ResponseCode::NotImp))
            }
            Ok(envelope) if question.query_class != DNSClass::IN => {
                (envelope, Answer::only(ResponseCode::Refused))
            }
            Ok(envelope) => (envelope, answer),
        };
        self.seal(query, envelope, answer)
    }

    fn seal(&self, query: &Query<'_>, envelope: Envelope, answer: Answer) -> Step {
        let limit = match query.transport {
            Transport::Udp => envelope.udp_size().min(message::UDP_SIZE),
            Transport::Tcp => u16::MAX,
        };
        let outcome = outcome(&answer);
        match envelope.seal(answer, limit, self.is_recursive(query)) {
            Some(answer) => {
                self.metrics.dns_query(query.transport, outcome);
                Step::Answer(answer)
            }
            None => self.ignore(query.transport, DnsOutcome::Malformed),
        }
    }

    fn is_recursive(&self, query: &Query<'_>) -> bool {
        query.original.is_some() || self.forwarder.has_upstreams()
    }

    /// Counts a query that gets no answer.
    fn ignore(&self, transport: Transport, outcome: DnsOutcome) -> Step {
        self.metrics.dns_query(transport, outcome);
        Step::Ignore
    }

    /// Brings a query to its server, or to the configured upstreams, and the answer to `replies`: one message, but
    /// for transfers of zones. Where there is no answer, SERVFAIL says so.
    pub async fn forward(&self, query: &Query<'_>, replies: &mpsc::Sender<Vec<u8>>) {
        static ONCE: OncePer = OncePer::new(Duration::from_secs(60));
        match self.look_up(query).await {
            LookUp::Outside => {}
            LookUp::InMesh => {
                if let Some(answer) = self.decided(query).await {
                    let _gone = replies.send(answer).await;
                    return;
                }
                return self.not_known(query, replies).await;
            }
            LookUp::NotKnown => return self.not_known(query, replies).await,
        }
        let begun = tokio::time::Instant::now();
        let error = match self.forwarder.exchange(query, replies).await {
            Ok(()) => {
                self.metrics.dns_forwarded(begun.elapsed());
                self.metrics
                    .dns_query(query.transport, DnsOutcome::Forwarded);
                return;
            }
            Err(error) => error,
        };
        let (code, outcome) = match &error {
            ForwardError::NoUpstream => (ResponseCode::Refused, DnsOutcome::Refused),
            ForwardError::TooMany => (ResponseCode::ServFail, DnsOutcome::Overloaded),
            ForwardError::NoAnswer { .. } | ForwardError::Exchange { .. } => {
                (ResponseCode::ServFail, DnsOutcome::UpstreamFailed)
            }
        };
        if let Some(suppressed) = ONCE.pass(&error.to_string()) {
            tracing::warn!(error = %chain(&error), suppressed, "query not forwarded");
        }
        self.metrics.dns_query(query.transport, outcome);
        if query.original.is_some() && matches!(error, ForwardError::NoAnswer { .. }) {
            // Who was captured asked that server, and hears from it what it says: nothing.
            return;
        }
        if let Some(answer) = message::only_code(query.message, code, self.is_recursive(query)) {
            // Nobody is left to take it: nobody waits for it.
            let _gone = replies.send(answer).await;
        }
    }
}

impl Resolver {
    /// Whether the name leads to a service of the mesh that the catalog has not yet.
    async fn look_up(&self, query: &Query<'_>) -> LookUp {
        let Some(source) = &self.source else {
            return LookUp::Outside;
        };
        let service = message::question(query.message).and_then(|question| {
            let zone = self.zone.load();
            zone.might_lead_to(&question.name, question.query_type)
        });
        match service {
            Some(service) => source.look_up(&service).await,
            None => LookUp::Outside,
        }
    }

    /// Our own answer, once the zone has it.
    async fn decided(&self, query: &Query<'_>) -> Option<Vec<u8>> {
        let answered = async {
            loop {
                let mut renewed = pin!(self.renewed.notified());
                renewed.as_mut().enable();
                if let Step::Answer(answer) = self.decide(query) {
                    return answer;
                }
                renewed.await;
            }
        };
        timeout(ZONE_WAIT, answered).await.ok()
    }

    /// What is not known is not denied.
    async fn not_known(&self, query: &Query<'_>, replies: &mpsc::Sender<Vec<u8>>) {
        let (code, outcome) = (ResponseCode::ServFail, DnsOutcome::NotKnown);
        self.metrics.dns_query(query.transport, outcome);
        if let Some(answer) = message::only_code(query.message, code, self.is_recursive(query)) {
            let _gone = replies.send(answer).await;
        }
    }
}

/// How an answer of our own is counted.
fn outcome(answer: &Answer) -> DnsOutcome {
    if answer.code == ResponseCode::NoError {
        return if answer.answers.is_empty() {
            DnsOutcome::NoData
        } else {
            DnsOutcome::Answered
        };
    }
    [
        (ResponseCode::NXDomain, DnsOutcome::NoName),
        (ResponseCode::FormErr, DnsOutcome::Malformed),
        (ResponseCode::ServFail, DnsOutcome::NotKnown),
    ]
    .into_iter()
    .find_map(|(code, outcome)| (code == answer.code).then_some(outcome))
    .unwrap_or(DnsOutcome::Refused)
}
