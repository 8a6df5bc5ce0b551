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
pub mod fair;
pub mod query_log;
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
    time::{Instant, timeout},
};

use self::{
    fair::Share,
    forward::{ForwardError, Forwarder},
    message::{Envelope, Received},
    query_log::{Ended, QueryLog},
    sockets::NamespaceSockets,
    zone::{Answer, Zone, ZoneSettings},
};
use crate::{
    catalog::{
        consul::{ConsulHandle, LookUp},
        store::Catalog,
    },
    datapath::{Maker, NetnsCookie},
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
    /// When it came, if it was drawn to have a line in the query log.
    pub drawn: Option<Instant>,
}

/// Where a captured query was going.
#[derive(Debug, Clone)]
pub struct Original {
    /// The server.
    pub server: SocketAddr,
    /// Where it was captured.
    pub namespace: Arc<CapturedNamespace>,
    /// Who made the connection that it came by; of a datagram that is not known.
    pub maker: Option<Maker>,
}

/// A network namespace in which queries are captured.
#[derive(Debug)]
pub struct CapturedNamespace {
    /// The kernel's name for it.
    pub cookie: NetnsCookie,
    /// `host`, or the file that leads to it.
    pub name: String,
    /// What makes sockets there; `None` if it is the agent's own.
    pub(crate) sockets: Option<NamespaceSockets>,
    /// How many queries from there may wait for servers.
    pub(crate) in_flight: Arc<Share>,
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
    log: QueryLog,
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
            log: QueryLog::off(),
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

    /// Says in `log` what becomes of queries.
    #[must_use]
    pub fn with_log(mut self, log: QueryLog) -> Self {
        self.log = log;
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
            Received::Nothing => return self.ignore(query, DnsOutcome::Malformed),
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
        let ended = Ended {
            outcome: outcome(&answer),
            code: Some(answer.code),
            upstream: None,
        };
        match envelope.seal(answer, limit, self.is_recursive(query)) {
            Some(answer) => {
                self.end(query, &ended);
                Step::Answer(answer)
            }
            None => self.ignore(query, DnsOutcome::Malformed),
        }
    }

    fn is_recursive(&self, query: &Query<'_>) -> bool {
        query.original.is_some() || self.forwarder.has_upstreams()
    }

    /// Draws a query that has just come in: [`Query::drawn`].
    pub(crate) fn draw(&self) -> Option<Instant> {
        self.log.draw()
    }

    /// Counts a query that gets no answer.
    pub(crate) fn ignore(&self, query: &Query<'_>, outcome: DnsOutcome) -> Step {
        let ended = Ended {
            outcome,
            code: None,
            upstream: None,
        };
        self.end(query, &ended);
        Step::Ignore
    }

    /// The one place that every query comes to.
    fn end(&self, query: &Query<'_>, ended: &Ended) {
        self.metrics.dns_query(query.transport, ended.outcome);
        self.log.write(query, ended);
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
        let begun = Instant::now();
        let error = match self.forwarder.exchange(query, replies).await {
            Ok(brought) => {
                self.metrics.dns_forwarded(begun.elapsed());
                let ended = Ended {
                    outcome: DnsOutcome::Forwarded,
                    code: Some(brought.code),
                    upstream: Some(brought.server),
                };
                return self.end(query, &ended);
            }
            Err(error) => error,
        };
        let namespace = query.original.map(|o| o.namespace.name.as_str());
        let key = format!("{error} {}", namespace.unwrap_or_default());
        if let Some(suppressed) = ONCE.pass(&key) {
            tracing::warn!(error = %chain(&error), namespace, suppressed, "query not forwarded");
        }
        let (code, outcome, upstream) = match error {
            ForwardError::NoUpstream => (ResponseCode::Refused, DnsOutcome::Refused, None),
            ForwardError::TooMany => (ResponseCode::ServFail, DnsOutcome::Overloaded, None),
            ForwardError::NoAnswer { server, .. } | ForwardError::Exchange { server, .. } => (
                ResponseCode::ServFail,
                DnsOutcome::UpstreamFailed,
                Some(server),
            ),
        };
        // Who was captured asked that server, and hears from it what it says: nothing.
        let silent = query.original.is_some() && matches!(error, ForwardError::NoAnswer { .. });
        let code = (!silent).then_some(code);
        self.end(
            query,
            &Ended {
                outcome,
                code,
                upstream,
            },
        );
        if let Some(code) = code {
            self.say(query, code, replies).await;
        }
    }

    /// Answers with nothing but a code.
    async fn say(&self, query: &Query<'_>, code: ResponseCode, replies: &mpsc::Sender<Vec<u8>>) {
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
        let code = ResponseCode::ServFail;
        let ended = Ended {
            outcome: DnsOutcome::NotKnown,
            code: Some(code),
            upstream: None,
        };
        self.end(query, &ended);
        self.say(query, code, replies).await;
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
