//! The agent's metrics: a registry, what feeds it, and the page that Prometheus scrapes.
//!
//! Connections are in [`super::series`], names in [`super::names`]. What other parts know by themselves
//! (catalog, certificates, capture counters) is asked at scrape through one [observer](Metrics::observe).

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder},
    metrics::{counter::Counter, family::Family, histogram::Histogram, info::Info},
    registry::{Metric as RegisteredMetric, Registry},
};

use super::{
    names::{self, Metric, Samples},
    process::ProcessCollector,
    record::Direction,
    series::{ConnectionSeries, SeriesLimits},
    timestamp::Timestamp,
};
use crate::catalog::model::ServiceName;

/// Bounds of the histograms in seconds: a connect on a LAN is tenths of a millisecond, one that waits
/// for a lost SYN is a second, and the timeouts are 5 and 10.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// All metrics of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    connections: Arc<ConnectionSeries>,
    connect: Durations,
    handshake: Durations,
    uncaptured: Counter,
    accept_errors: Family<DirectionLabel, Counter>,
    dropped: DroppedLines,
    dns_queries: Family<DnsLabels, Counter>,
    dns_forward: Histogram,
    observer: Arc<ObserverCell>,
}

type Durations = Family<DirectionLabel, Histogram, fn() -> Histogram>;

impl Metrics {
    /// Metrics that are all zero.
    pub fn new(limits: SeriesLimits, version: &str) -> Self {
        let mut registry = Registry::default();
        let connections = Arc::new(ConnectionSeries::new(limits));
        let observer = Arc::<ObserverCell>::default();
        let connect = Durations::new_with_constructor(seconds);
        let handshake = Durations::new_with_constructor(seconds);
        let uncaptured = Counter::default();
        let accept_errors = Family::default();
        let dropped = DroppedLines::default();
        let dns_queries = Family::default();
        let dns_forward = seconds();
        let build = Info::new(vec![("version", version.to_owned())]);

        registry.register_collector(Box::new(Arc::clone(&connections)));
        register(&mut registry, &names::CONNECT_DURATION, connect.clone());
        register(&mut registry, &names::HANDSHAKE_DURATION, handshake.clone());
        register(&mut registry, &names::UNCAPTURED, uncaptured.clone());
        register(&mut registry, &names::ACCEPT_ERRORS, accept_errors.clone());
        register(&mut registry, &names::ACCESS_LOG_DROPPED, dropped.family());
        register(&mut registry, &names::DNS_QUERIES, dns_queries.clone());
        register(
            &mut registry,
            &names::DNS_FORWARD_DURATION,
            dns_forward.clone(),
        );
        register(&mut registry, &names::BUILD, build);
        registry.register_collector(Box::new(Arc::clone(&observer)));
        registry.register_collector(Box::new(ProcessCollector::new(SystemTime::now())));
        Self {
            registry,
            connections,
            connect,
            handshake,
            uncaptured,
            accept_errors,
            dropped,
            dns_queries,
            dns_forward,
            observer,
        }
    }

    /// The metrics of connections; [`super::record::ConnectionRecord`] feeds them.
    pub fn connections(&self) -> &Arc<ConnectionSeries> {
        &self.connections
    }

    /// A dial took this long.
    pub fn connected(&self, direction: Direction, took: Duration) {
        self.connect
            .get_or_create(&DirectionLabel(direction))
            .observe(took.as_secs_f64());
    }

    /// A handshake took this long.
    pub fn handshaken(&self, direction: Direction, took: Duration) {
        self.handshake
            .get_or_create(&DirectionLabel(direction))
            .observe(took.as_secs_f64());
    }

    /// Somebody connected to a capture listener directly.
    pub fn uncaptured(&self) {
        self.uncaptured.inc();
    }

    /// An accept failed.
    pub fn accept_failed(&self, direction: Direction) {
        self.accept_errors
            .get_or_create(&DirectionLabel(direction))
            .inc();
    }

    /// A DNS query came to this.
    pub fn dns_query(&self, transport: DnsTransport, outcome: DnsOutcome) {
        self.dns_queries
            .get_or_create(&DnsLabels { transport, outcome })
            .inc();
    }

    /// An upstream answered after so long.
    pub fn dns_forwarded(&self, took: Duration) {
        self.dns_forward.observe(took.as_secs_f64());
    }

    /// Where [`super::access_log::AccessLog`] counts what it could not write.
    pub fn dropped_lines(&self) -> DroppedLines {
        self.dropped.clone()
    }

    /// Asks `observer` at each scrape from now on. It must not block.
    pub fn observe(&self, observer: impl Fn() -> Observations + Send + Sync + 'static) {
        *self.observer.ask.write() = Some(Box::new(observer));
    }

    /// The page in `OpenMetrics` text.
    pub fn render(&self) -> String {
        let mut page = String::new();
        if let Err(fmt::Error) =
            prometheus_client::encoding::text::encode(&mut page, &self.registry)
        {
            tracing::error!("metrics could not be encoded");
        }
        page
    }
}

/// What other parts of the agent know when a scrape asks.
#[derive(Debug, Clone, Default)]
pub struct Observations {
    /// Capture verdicts by name, since the programs were loaded.
    pub capture: Vec<(&'static str, u64)>,
    /// What became of captured connections on their way to the agent, by name.
    pub hand_over: Vec<(&'static str, u64)>,
    /// The longest time between two heartbeats.
    pub longest_gap: Duration,
    /// How often that was above the limit.
    pub hangs: u64,
    /// Whether connects are captured, as far as is known.
    pub effective: bool,
    /// How many programs are attached.
    pub attached_programs: u64,
    /// Open connections of the tunnel `hbone` to other nodes, and the streams on them.
    pub hbone: (usize, usize),
    /// The catalog in use.
    pub catalog: Option<CatalogObservation>,
    /// What signs certificates.
    pub authority: Option<AuthorityObservation>,
    /// A certificate per workload.
    pub certificates: Vec<CertificateObservation>,
}

/// The catalog in use.
#[derive(Debug, Clone, Copy)]
pub struct CatalogObservation {
    /// Its number.
    pub version: u64,
    /// When it was read.
    pub loaded_at: SystemTime,
    /// How many services it has.
    pub services: usize,
    /// How many instances it has.
    pub instances: usize,
    /// How many problems its sources have.
    pub problems: usize,
}

/// The certificate authority.
#[derive(Debug, Clone, Copy)]
pub struct AuthorityObservation {
    /// Until when its certificate is good.
    pub not_after: SystemTime,
    /// Whether the last reload did not take over its files.
    pub reload_failing: bool,
}

/// One workload's certificate.
#[derive(Debug, Clone)]
pub struct CertificateObservation {
    /// The workload's service. One observation per service: a second one would be a duplicate series.
    pub service: ServiceName,
    /// Until when it is good; `None` if there is none yet.
    pub not_after: Option<SystemTime>,
    /// Whether the last attempt to issue it failed.
    pub failing: bool,
}

/// Counters of access-log lines that were lost.
#[derive(Debug, Clone, Default)]
pub struct DroppedLines(Family<CauseLabel, Counter>);

impl DroppedLines {
    pub(super) fn queue_full(&self) {
        self.count(Cause::QueueFull, 1);
    }

    pub(super) fn write_failed(&self, lines: u64) {
        self.count(Cause::WriteFailed, lines);
    }

    /// Lines lost so far, for both causes.
    pub fn total(&self) -> u64 {
        [Cause::QueueFull, Cause::WriteFailed]
            .iter()
            .map(|cause| self.0.get_or_create_owned(&CauseLabel(*cause)).get())
            .sum()
    }

    fn count(&self, cause: Cause, lines: u64) {
        self.0.get_or_create(&CauseLabel(cause)).inc_by(lines);
    }

    /// The family, with both causes there from the start, so that a rate sees the first loss.
    fn family(&self) -> Family<CauseLabel, Counter> {
        self.count(Cause::QueueFull, 0);
        self.count(Cause::WriteFailed, 0);
        self.0.clone()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Cause {
    QueueFull,
    WriteFailed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct CauseLabel(Cause);

impl EncodeLabelSet for CauseLabel {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let cause = match self.0 {
            Cause::QueueFull => "queue_full",
            Cause::WriteFailed => "write_failed",
        };
        [("cause", cause)].encode(encoder)
    }
}

/// How a DNS query came, and its answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DnsTransport {
    /// One datagram each way.
    Udp,
    /// A stream of messages, each behind its length.
    Tcp,
}

impl DnsTransport {
    /// The value of the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// What became of a DNS query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DnsOutcome {
    /// One of our names, with records.
    Answered,
    /// One of our names, without records of that type.
    NoData,
    /// Below our domain, but no name.
    NoName,
    /// Below our domain, but what it leads to is not known now, or not here.
    NotKnown,
    /// An upstream answered it.
    Forwarded,
    /// No upstream answered it.
    UpstreamFailed,
    /// It asks for what is not done here, or there is no upstream to ask.
    Refused,
    /// It cannot be read.
    Malformed,
    /// Whoever sent it may not ask.
    NotAllowed,
    /// Whoever sent it asks too much.
    RateLimited,
    /// Too many at once.
    Overloaded,
}

impl DnsOutcome {
    /// The value of the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NoData => "no_data",
            Self::NoName => "no_name",
            Self::NotKnown => "not_known",
            Self::Forwarded => "forwarded",
            Self::UpstreamFailed => "upstream_failed",
            Self::Refused => "refused",
            Self::Malformed => "malformed",
            Self::NotAllowed => "not_allowed",
            Self::RateLimited => "rate_limited",
            Self::Overloaded => "overloaded",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct DnsLabels {
    transport: DnsTransport,
    outcome: DnsOutcome,
}

impl EncodeLabelSet for DnsLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        [
            ("transport", self.transport.as_str()),
            ("outcome", self.outcome.as_str()),
        ]
        .encode(encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct DirectionLabel(Direction);

impl EncodeLabelSet for DirectionLabel {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        [("direction", self.0.as_str())].encode(encoder)
    }
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

fn register(registry: &mut Registry, metric: &Metric, with: impl RegisteredMetric) {
    registry.register(metric.family(), metric.help, with);
}

type Observer = Box<dyn Fn() -> Observations + Send + Sync>;

/// Holds the observer, which is made after the metrics are.
#[derive(Default)]
struct ObserverCell {
    ask: RwLock<Option<Observer>>,
}

impl fmt::Debug for ObserverCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ObserverCell")
    }
}

impl Collector for ObserverCell {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let seen = match &*self.ask.read() {
            Some(ask) => ask(),
            None => return Ok(()),
        };
        let mut verdicts = Samples::begin(&mut encoder, &names::CAPTURE_VERDICTS)?;
        for (verdict, count) in &seen.capture {
            verdicts.counter(&[("verdict", verdict)], *count)?;
        }
        let mut events = Samples::begin(&mut encoder, &names::HAND_OVER_EVENTS)?;
        for (event, count) in &seen.hand_over {
            events.counter(&[("event", event)], *count)?;
        }
        Samples::begin(&mut encoder, &names::HEARTBEAT_GAP)?
            .gauge_f64(&[], seen.longest_gap.as_secs_f64())?;
        Samples::begin(&mut encoder, &names::HANGS)?.counter(&[], seen.hangs)?;
        Samples::begin(&mut encoder, &names::ATTACHED_PROGRAMS)?
            .gauge(&[], seen.attached_programs)?;
        let (connections, streams) = seen.hbone;
        Samples::begin(&mut encoder, &names::HBONE_CONNECTIONS)?
            .gauge(&[], u64::try_from(connections).unwrap_or(u64::MAX))?;
        Samples::begin(&mut encoder, &names::HBONE_STREAMS)?
            .gauge(&[], u64::try_from(streams).unwrap_or(u64::MAX))?;
        Samples::begin(&mut encoder, &names::CAPTURE_EFFECTIVE)?
            .gauge(&[], u64::from(seen.effective))?;
        if let Some(catalog) = &seen.catalog {
            encode_catalog(&mut encoder, catalog)?;
        }
        if let Some(authority) = &seen.authority {
            encode_authority(&mut encoder, authority)?;
        }
        encode_certificates(&mut encoder, &seen.certificates)
    }
}

fn encode_catalog(encoder: &mut DescriptorEncoder<'_>, seen: &CatalogObservation) -> fmt::Result {
    let age = Timestamp(seen.loaded_at).until(Timestamp::now());
    Samples::begin(encoder, &names::CATALOG_VERSION)?.gauge(&[], seen.version)?;
    Samples::begin(encoder, &names::CATALOG_AGE)?.gauge_f64(&[], age.as_secs_f64())?;
    for (metric, number) in [
        (&names::CATALOG_SERVICES, seen.services),
        (&names::CATALOG_INSTANCES, seen.instances),
        (&names::CATALOG_PROBLEMS, seen.problems),
    ] {
        Samples::begin(encoder, metric)?.gauge(&[], u64::try_from(number).unwrap_or(u64::MAX))?;
    }
    Ok(())
}

fn encode_authority(
    encoder: &mut DescriptorEncoder<'_>,
    seen: &AuthorityObservation,
) -> fmt::Result {
    Samples::begin(encoder, &names::AUTHORITY_EXPIRY)?
        .gauge_f64(&[], Timestamp(seen.not_after).unix_seconds())?;
    Samples::begin(encoder, &names::AUTHORITY_RELOAD_FAILING)?
        .gauge(&[], u64::from(seen.reload_failing))
}

fn encode_certificates(
    encoder: &mut DescriptorEncoder<'_>,
    seen: &[CertificateObservation],
) -> fmt::Result {
    let mut expiry = Samples::begin(encoder, &names::CERTIFICATE_EXPIRY)?;
    for certificate in seen {
        if let Some(not_after) = certificate.not_after {
            let labels = [("service", certificate.service.as_str())];
            expiry.gauge_f64(&labels, Timestamp(not_after).unix_seconds())?;
        }
    }
    let mut failing = Samples::begin(encoder, &names::CERTIFICATE_FAILING)?;
    for certificate in seen {
        let labels = [("service", certificate.service.as_str())];
        failing.gauge(&labels, u64::from(certificate.failing))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
