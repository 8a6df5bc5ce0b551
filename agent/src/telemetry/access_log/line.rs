//! Lines and their two formats, and the line of a connection: `docs/access-log.md` explains its fields.

use std::{
    fmt::{Display, Write as _},
    net::SocketAddr,
    time::Duration,
};

use serde::{Serialize, Serializer};

use crate::{
    catalog::model::{InstanceId, ServiceName},
    telemetry::{
        record::{Direction, Side, Stage},
        timestamp::Timestamp,
    },
};

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LineFormat {
    /// `key=value`, separated by spaces; values with anything unusual in double quotes.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// What can be a line: fields in a fixed order, of which those that are not known are left out.
pub trait Entry: Serialize {
    /// Writes the fields as `key=value`, the same and in the same order as they are serialised.
    fn write_pairs(&self, pairs: &mut Pairs);

    /// The line, with its newline.
    fn format(&self, format: LineFormat) -> String {
        let text = || {
            let mut pairs = Pairs(String::with_capacity(384));
            self.write_pairs(&mut pairs);
            pairs.0
        };
        let mut text = match format {
            LineFormat::Text => text(),
            // Nothing in a line can fail to serialise; if it could, the text still tells the story.
            LineFormat::Json => serde_json::to_string(self).unwrap_or_else(|_| text()),
        };
        text.push('\n');
        text
    }
}

/// What a connection's line says, in this order.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// When the connection ended.
    pub time: Timestamp,
    /// Which way it crossed the agent.
    pub direction: Direction,
    /// The caller's SPIFFE id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The called service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// The chosen instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// Where the application wanted to go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_destination: Option<SocketAddr>,
    /// The other end in the mesh.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    /// How it ended.
    pub outcome: &'static str,
    /// Where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// Who failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<Side>,
    /// The error, the reason for the cut, or else the intention that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes towards the upstream.
    pub bytes_sent: u64,
    /// Bytes from the upstream.
    pub bytes_received: u64,
    /// From the accept to the end.
    #[serde(rename = "duration_ms", serialize_with = "milliseconds")]
    pub duration: Duration,
}

impl Entry for Line {
    fn write_pairs(&self, pairs: &mut Pairs) {
        pairs.plain("time", self.time);
        pairs.plain("direction", self.direction.as_str());
        pairs.quoted("source", self.source.as_deref());
        pairs.quoted("service", self.service.as_ref().map(ServiceName::as_str));
        pairs.quoted("instance", self.instance.as_ref().map(InstanceId::as_str));
        pairs.optional("original_destination", self.original_destination);
        pairs.optional("peer", self.peer);
        pairs.plain("outcome", self.outcome);
        pairs.quoted("stage", self.stage.map(Stage::as_str));
        pairs.quoted("side", self.side.map(Side::as_str));
        pairs.quoted("reason", self.reason.as_deref());
        pairs.plain("bytes_sent", self.bytes_sent);
        pairs.plain("bytes_received", self.bytes_received);
        pairs.duration("duration_ms", self.duration);
    }
}

/// A line of `key=value`, as far as it is written.
#[derive(Debug)]
pub struct Pairs(String);

impl Pairs {
    /// A value that has nothing unusual in it.
    pub(crate) fn plain(&mut self, key: &str, value: impl Display) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        // Writing to a String cannot fail.
        let _infallible = write!(self.0, "{key}={value}");
    }

    /// The same, if there is one.
    pub(crate) fn optional(&mut self, key: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.plain(key, value);
        }
    }

    /// In milliseconds, to the microsecond.
    pub(crate) fn duration(&mut self, key: &str, value: Duration) {
        self.plain(key, format_args!("{:.3}", value.as_secs_f64() * 1000.0));
    }

    /// Quotes what would not survive a split at spaces and `=`, as JSON would: a peer can choose parts of
    /// a reason, and must not be able to add fields or lines.
    pub(crate) fn quoted(&mut self, key: &str, value: Option<&str>) {
        let Some(value) = value else { return };
        let bare = !value.is_empty()
            && value
                .chars()
                .all(|c| !c.is_control() && !c.is_whitespace() && !matches!(c, '"' | '=' | '\\'));
        if bare {
            self.plain(key, value);
        } else {
            self.plain(key, serde_json::Value::from(value));
        }
    }
}

/// As [`Pairs::duration`] has it.
pub(crate) fn milliseconds<S: Serializer>(duration: &Duration, into: S) -> Result<S::Ok, S::Error> {
    let microseconds =
        u32::try_from(duration.as_micros()).map_or(duration.as_secs_f64() * 1e6, f64::from);
    into.serialize_f64(microseconds / 1000.0)
}
