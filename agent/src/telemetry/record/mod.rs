//! The record of one connection: exactly one access-log line and one outcome count, whatever happens.
//!
//! A stage tells the record what it has learned; [`ConnectionRecord::finish`] or, if the task is dropped
//! or panics, the drop writes it. The line's fields are documented in `docs/access-log.md`.

use std::{fmt::Display, net::SocketAddr, sync::Arc};

use serde::Serialize;
use tokio::time::Instant;

use super::{
    Telemetry,
    access_log::Line,
    series::{Live, OutcomeLabels, PairLabels},
    timestamp::Timestamp,
};
use crate::{
    catalog::model::{InstanceId, ServiceName},
    relay::{Counts, End},
};

/// Which way a connection crosses the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From a workload of this node into the mesh.
    Outbound,
    /// From the mesh to a workload of this node.
    Inbound,
}

impl Direction {
    /// The word used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// The step at which a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Learning where the application wanted to go.
    Capture,
    /// Learning who calls.
    Identity,
    /// Deciding the intention.
    Policy,
    /// Choosing an instance.
    Route,
    /// Reaching the instance's node.
    Dial,
    /// The TLS handshake.
    Handshake,
    /// Reaching the application.
    Deliver,
    /// Carrying bytes.
    Relay,
}

impl Stage {
    /// The word used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Capture => "capture",
            Self::Identity => "identity",
            Self::Policy => "policy",
            Self::Route => "route",
            Self::Dial => "dial",
            Self::Handshake => "handshake",
            Self::Deliver => "deliver",
            Self::Relay => "relay",
        }
    }
}

/// Who made a connection fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Who called us.
    Downstream,
    /// Whom we called.
    Upstream,
    /// The agent itself.
    Internal,
}

impl Side {
    /// The word used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Downstream => "downstream",
            Self::Upstream => "upstream",
            Self::Internal => "internal",
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Both sides ended it in order.
    Completed,
    /// An intention forbids it; the reason is the record's [decision](ConnectionRecord::decision).
    Denied,
    /// It could not be made or was broken.
    Failed {
        /// At which step.
        stage: Stage,
        /// By whom.
        side: Side,
        /// The error with its sources, as [`super::log::chain`] prints it.
        error: String,
    },
    /// The agent ended it: an intention changed, the agent shut down.
    Cut(String),
    /// Nothing moved for the idle timeout.
    Idle,
}

impl Outcome {
    /// A failure, with the error's sources.
    pub fn failed(stage: Stage, side: Side, error: &dyn std::error::Error) -> Self {
        Self::Failed {
            stage,
            side,
            error: super::log::chain(error).to_string(),
        }
    }

    /// What the end of a relay means; `cut_reason` is asked only if it was cut.
    pub fn of_relay(end: &End, cut_reason: impl FnOnce() -> String) -> Self {
        match end {
            End::Finished => Self::Completed,
            End::DownstreamReset(error) => Self::failed(Stage::Relay, Side::Downstream, error),
            End::UpstreamReset(error) => Self::failed(Stage::Relay, Side::Upstream, error),
            End::Idle => Self::Idle,
            End::Cut => Self::Cut(cut_reason()),
        }
    }

    /// The word used in metrics and logs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Denied => "denied",
            Self::Failed { .. } => "failed",
            Self::Cut(_) => "cut",
            Self::Idle => "idle",
        }
    }

    pub(super) fn labels(&self) -> OutcomeLabels {
        let (stage, side) = match self {
            Self::Failed { stage, side, .. } => (Some(*stage), Some(*side)),
            Self::Completed | Self::Denied | Self::Cut(_) | Self::Idle => (None, None),
        };
        OutcomeLabels {
            outcome: self.as_str(),
            stage,
            side,
        }
    }

    fn into_reason(self) -> Option<String> {
        match self {
            Self::Failed { error, .. } => Some(error),
            Self::Cut(reason) => Some(reason),
            Self::Completed | Self::Denied | Self::Idle => None,
        }
    }
}

/// One connection's record. Written once, at the latest when dropped.
#[derive(Debug)]
pub struct ConnectionRecord {
    // On the heap: a record lives in every connection's future.
    inner: Option<Box<Inner>>,
}

#[derive(Debug)]
struct Inner {
    telemetry: Telemetry,
    direction: Direction,
    started: Instant,
    stage: Stage,
    entered: Instant,
    identity: Option<String>,
    source: Option<ServiceName>,
    service: Option<ServiceName>,
    instance: Option<InstanceId>,
    original_destination: Option<SocketAddr>,
    peer: Option<SocketAddr>,
    decision: Option<String>,
    live: Option<Live>,
}

impl ConnectionRecord {
    /// Starts the record, and the connection's clock.
    pub fn begin(telemetry: &Telemetry, direction: Direction) -> Self {
        let now = Instant::now();
        Self {
            inner: Some(Box::new(Inner {
                telemetry: telemetry.clone(),
                direction,
                started: now,
                stage: Stage::Capture,
                entered: now,
                identity: None,
                source: None,
                service: None,
                instance: None,
                original_destination: None,
                peer: None,
                decision: None,
                live: None,
            })),
        }
    }

    /// The step that begins now; named if the connection's task is dropped in it.
    pub fn enter(&mut self, stage: Stage) {
        self.set(|inner| {
            inner.stage = stage;
            inner.entered = Instant::now();
        });
    }

    /// The connect of the step entered last succeeded: to the other node, or to the application.
    pub fn connected(&mut self) {
        self.set(|inner| {
            let metrics = inner.telemetry.metrics();
            metrics.connected(inner.direction, inner.entered.elapsed());
        });
    }

    /// The TLS handshake of the step entered last succeeded.
    pub fn handshaken(&mut self) {
        self.set(|inner| {
            let metrics = inner.telemetry.metrics();
            metrics.handshaken(inner.direction, inner.entered.elapsed());
        });
    }

    /// Who calls: the full identity for the access log, its service for the metrics.
    pub fn source(&mut self, identity: impl Display, service: &ServiceName) {
        self.set(|inner| {
            inner.identity = Some(identity.to_string());
            inner.source = Some(service.clone());
        });
    }

    /// The service that is called.
    pub fn service(&mut self, service: &ServiceName) {
        self.set(|inner| inner.service = Some(service.clone()));
    }

    /// The instance that was chosen.
    pub fn instance(&mut self, instance: &InstanceId) {
        self.set(|inner| inner.instance = Some(instance.clone()));
    }

    /// Where the application wanted to go.
    pub fn original_destination(&mut self, destination: SocketAddr) {
        self.set(|inner| inner.original_destination = Some(destination));
    }

    /// The other end in the mesh: the tunnel's address outbound, the caller's inbound.
    pub fn peer(&mut self, peer: SocketAddr) {
        self.set(|inner| inner.peer = Some(peer));
    }

    /// What the intentions said and why.
    pub fn decision(&mut self, decision: impl Into<String>) {
        self.set(|inner| inner.decision = Some(decision.into()));
    }

    /// The bytes carried from now on. Call it once source and service are known: from here the connection
    /// is live in the metrics, under these two.
    pub fn counts(&mut self, counts: Arc<Counts>) {
        self.set(|inner| {
            let labels = inner.labels();
            let live = inner
                .telemetry
                .metrics()
                .connections()
                .begin(labels, counts);
            inner.live = Some(live);
        });
    }

    /// Forgets it: this was no connection of anybody's.
    pub fn discard(mut self) {
        self.inner = None;
    }

    /// Writes the record.
    pub fn finish(mut self, outcome: Outcome) {
        if let Some(inner) = self.inner.take() {
            inner.write(outcome);
        }
    }

    fn set(&mut self, change: impl FnOnce(&mut Inner)) {
        if let Some(inner) = &mut self.inner {
            change(inner);
        }
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            let error = if std::thread::panicking() {
                "panicked"
            } else {
                "cancelled"
            };
            let outcome = Outcome::Failed {
                stage: inner.stage,
                side: Side::Internal,
                error: error.to_owned(),
            };
            inner.write(outcome);
        }
    }
}

impl Inner {
    fn labels(&self) -> PairLabels {
        PairLabels {
            direction: self.direction,
            source: self.source.clone(),
            destination: self.service.clone(),
        }
    }

    fn write(mut self, outcome: Outcome) {
        let labels = outcome.labels();
        let (bytes_sent, bytes_received) = self.live.as_ref().map(Live::bytes).unwrap_or_default();
        let connections = self.telemetry.metrics().connections();
        match self.live.take() {
            Some(live) => live.finish(labels),
            None => connections.count(self.labels(), labels),
        }
        let telemetry = self.telemetry.clone();
        telemetry.access_log().write(|| Line {
            time: Timestamp::now(),
            direction: self.direction,
            source: self.identity,
            service: self.service,
            instance: self.instance,
            original_destination: self.original_destination,
            peer: self.peer,
            outcome: labels.outcome,
            stage: labels.stage,
            side: labels.side,
            reason: outcome.into_reason().or(self.decision),
            bytes_sent,
            bytes_received,
            duration: self.started.elapsed(),
        });
    }
}

#[cfg(test)]
mod tests;
