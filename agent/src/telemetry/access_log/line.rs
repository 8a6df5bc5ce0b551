//! One line of the access log and its two formats. `docs/access-log.md` explains the fields.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use serde::Serialize;

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

/// What a line says, in this order. What is not known is left out.
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

impl Line {
    /// The line, with its newline.
    pub fn format(&self, format: LineFormat) -> String {
        let mut text = match format {
            LineFormat::Text => self.text(),
            // Nothing in a line can fail to serialise; if it could, the text still tells the story.
            LineFormat::Json => serde_json::to_string(self).unwrap_or_else(|_| self.text()),
        };
        text.push('\n');
        text
    }

    fn text(&self) -> String {
        let mut pairs = Pairs(String::with_capacity(384));
        pairs.plain("time", self.time);
        pairs.plain("direction", self.direction.as_str());
        pairs.quoted("source", self.source.as_deref());
        pairs.quoted("service", self.service.as_ref().map(ServiceName::as_str));
        pairs.quoted("instance", self.instance.as_ref().map(InstanceId::as_str));
        if let Some(address) = self.original_destination {
            pairs.plain("original_destination", address);
        }
        if let Some(address) = self.peer {
            pairs.plain("peer", address);
        }
        pairs.plain("outcome", self.outcome);
        pairs.quoted("stage", self.stage.map(Stage::as_str));
        pairs.quoted("side", self.side.map(Side::as_str));
        pairs.quoted("reason", self.reason.as_deref());
        pairs.plain("bytes_sent", self.bytes_sent);
        pairs.plain("bytes_received", self.bytes_received);
        pairs.plain(
            "duration_ms",
            format_args!("{:.3}", self.duration.as_secs_f64() * 1000.0),
        );
        pairs.0
    }
}

struct Pairs(String);

impl Pairs {
    fn plain(&mut self, key: &str, value: impl std::fmt::Display) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        // Writing to a String cannot fail.
        let _infallible = write!(self.0, "{key}={value}");
    }

    /// Quotes what would not survive a split at spaces and `=`, as JSON would: a peer can choose parts of
    /// a reason, and must not be able to add fields or lines.
    fn quoted(&mut self, key: &str, value: Option<&str>) {
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

fn milliseconds<S: serde::Serializer>(duration: &Duration, into: S) -> Result<S::Ok, S::Error> {
    let microseconds =
        u32::try_from(duration.as_micros()).map_or(duration.as_secs_f64() * 1e6, f64::from);
    into.serialize_f64(microseconds / 1000.0)
}
