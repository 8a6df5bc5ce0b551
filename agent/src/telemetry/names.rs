//! Every metric's name, type, labels and meaning: one table, which `docs/metrics.md` repeats.
//!
//! Names are API: dashboards and alerts hold on to them. Labels are bounded: never an address, a
//! process or an instance.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

/// What kind of number a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
    /// Always 1; the labels tell.
    Info,
}

impl Kind {
    /// The word in `OpenMetrics`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
        }
    }
}

/// A metric's entry in the table.
#[derive(Debug)]
pub struct Metric {
    /// The name as it is scraped.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Its labels; some may be absent from a sample.
    pub labels: &'static [&'static str],
    /// What it counts.
    pub help: &'static str,
}

impl Metric {
    /// The name without the suffix that the encoder adds for the type.
    pub fn family(&self) -> &'static str {
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        self.name.strip_suffix(suffix).unwrap_or(self.name)
    }
}

macro_rules! metrics {
    ($($constant:ident: $name:literal, $kind:ident, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                labels: &[$($label),*],
                help: $help,
            };
        )*

        /// All of them, in the order of the documentation.
        pub const ALL: &[&Metric] = &[$(&$constant),*];
    };
}

metrics! {
    CONNECTIONS: "sidestep_connections_total", Counter,
        ["direction", "source", "destination", "outcome", "stage", "side"],
        "Connections that have ended, by how they ended";
    CONNECTION_BYTES: "sidestep_connection_bytes_total", Counter,
        ["direction", "source", "destination", "way"],
        "Bytes carried, live connections included";
    CONNECTIONS_LIVE: "sidestep_connections_live", Gauge,
        ["direction", "source", "destination"],
        "Connections that carry bytes now";
    SERIES_OVERFLOWED: "sidestep_series_overflowed_total", Counter, [],
        "Connections counted under source and destination `other` because the cap on series was reached";
    CONNECT_DURATION: "sidestep_connect_duration_seconds", Histogram, ["direction"],
        "Time to reach the other node (outbound) or the application (inbound)";
    HANDSHAKE_DURATION: "sidestep_handshake_duration_seconds", Histogram, ["direction"],
        "Time of the TLS handshake, failed ones left out";
    CAPTURE_VERDICTS: "sidestep_capture_verdicts_total", Counter, ["verdict"],
        "What the eBPF programs decided about connects";
    HAND_OVER_EVENTS: "sidestep_hand_over_events_total", Counter, ["event"],
        "What became of captured connections on their way to the agent, and of questions about them";
    HEARTBEAT_GAP: "sidestep_heartbeat_longest_gap_seconds", Gauge, [],
        "The longest time between two heartbeats since the agent started";
    HANGS: "sidestep_hangs_total", Counter, [],
        "Times that a heartbeat came later than `capture.hung_after`";
    UNCAPTURED: "sidestep_uncaptured_connections_total", Counter, [],
        "Connections made to a capture listener directly, and reset";
    ACCEPT_ERRORS: "sidestep_accept_errors_total", Counter, ["direction"],
        "Failed accepts, mostly for want of file descriptors";
    DNS_QUERIES: "sidestep_dns_queries_total", Counter, ["transport", "outcome"],
        "DNS queries that came in, by what became of them";
    DNS_FORWARD_DURATION: "sidestep_dns_forward_duration_seconds", Histogram, [],
        "Time until an upstream answered a query that was forwarded, failures left out";
    ATTACHED_PROGRAMS: "sidestep_attached_programs", Gauge, [],
        "eBPF programs that the agent holds attached";
    HBONE_CONNECTIONS: "sidestep_hbone_connections", Gauge, [],
        "Connections of the tunnel hbone that are open to other nodes";
    HBONE_STREAMS: "sidestep_hbone_streams", Gauge, [],
        "Connections of workloads that these carry now";
    CAPTURE_EFFECTIVE: "sidestep_capture_effective", Gauge, [],
        "1 if the agent's own connects below every attach point are captured, 0 if one is not";
    CATALOG_VERSION: "sidestep_catalog_version", Gauge, [],
        "The number of the catalog in use; rises with every change";
    CATALOG_AGE: "sidestep_catalog_age_seconds", Gauge, [],
        "Time since the catalog in use was read";
    CATALOG_SERVICES: "sidestep_catalog_services", Gauge, [],
        "Services in the catalog";
    CATALOG_INSTANCES: "sidestep_catalog_instances", Gauge, [],
        "Instances in the catalog";
    CATALOG_PROBLEMS: "sidestep_catalog_problems", Gauge, [],
        "Problems of the catalog's sources that are not resolved";
    AUTHORITY_EXPIRY: "sidestep_authority_expiry_timestamp_seconds", Gauge, [],
        "When the certificate that signs on this node expires, in seconds since 1970";
    AUTHORITY_RELOAD_FAILING: "sidestep_authority_reload_failing", Gauge, [],
        "1 while the last reload has not taken over the certificate authority's files";
    CERTIFICATE_EXPIRY: "sidestep_certificate_expiry_timestamp_seconds", Gauge, ["service"],
        "When the workload's certificate expires, in seconds since 1970";
    CERTIFICATE_FAILING: "sidestep_certificate_renewal_failing", Gauge, ["service"],
        "1 while the last attempt to issue or renew the workload's certificate has failed";
    ACCESS_LOG_DROPPED: "sidestep_access_log_dropped_total", Counter, ["cause"],
        "Access-log lines that were not written: queue full, or the write failed";
    BUILD: "sidestep_build_info", Info, ["version"],
        "The version that runs";
    PROCESS_START: "process_start_time_seconds", Gauge, [],
        "When the agent started, in seconds since 1970";
    PROCESS_CPU: "process_cpu_seconds_total", Counter, [],
        "CPU time of the agent, user and system";
    PROCESS_RESIDENT: "process_resident_memory_bytes", Gauge, [],
        "Memory of the agent that is resident";
    PROCESS_FDS: "process_open_fds", Gauge, [],
        "File descriptors the agent has open";
    PROCESS_FDS_MAX: "process_max_fds", Gauge, [],
        "File descriptors the agent may have open";
}

/// The samples of one metric, on their way into a scrape.
pub(super) struct Samples<'a> {
    encoder: MetricEncoder<'a>,
}

impl<'a> Samples<'a> {
    pub(super) fn begin(
        encoder: &'a mut DescriptorEncoder<'_>,
        metric: &'a Metric,
    ) -> Result<Self, fmt::Error> {
        let kind = match metric.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
            Kind::Info => MetricType::Info,
        };
        let help = format!("{}.", metric.help);
        Ok(Self {
            encoder: encoder.encode_descriptor(metric.family(), &help, None, kind)?,
        })
    }

    pub(super) fn counter(&mut self, labels: &[(&str, &str)], value: u64) -> fmt::Result {
        self.with(labels, |encoder| {
            encoder.encode_counter::<NoLabelSet, u64, f64>(&value, None)
        })
    }

    pub(super) fn seconds(&mut self, value: f64) -> fmt::Result {
        self.with(&[], |encoder| {
            encoder.encode_counter::<NoLabelSet, f64, f64>(&value, None)
        })
    }

    pub(super) fn gauge(&mut self, labels: &[(&str, &str)], value: u64) -> fmt::Result {
        self.with(labels, |encoder| encoder.encode_gauge(&value))
    }

    pub(super) fn gauge_f64(&mut self, labels: &[(&str, &str)], value: f64) -> fmt::Result {
        self.with(labels, |encoder| encoder.encode_gauge(&value))
    }

    /// Without labels the sample has no braces either.
    fn with(
        &mut self,
        labels: &[(&str, &str)],
        encode: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        if labels.is_empty() {
            return encode(&mut self.encoder);
        }
        encode(&mut self.encoder.encode_family(&labels)?)
    }
}
