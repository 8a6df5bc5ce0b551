//! A line for a share of the queries: who asked what, and what became of it.
//!
//! Which queries have one is drawn as they come in, so that the others cost no more than a number.

#[cfg(test)]
mod tests;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RecordType},
};
use serde::Serialize;
use tokio::time::Instant;

use super::{Original, Query, message};
use crate::{
    identity::workload::WorkloadResolver,
    telemetry::{
        access_log::{AccessLog, Entry, Pairs, milliseconds},
        metrics::DnsOutcome,
        timestamp::Timestamp,
    },
};

/// A share of all queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sampling {
    per_million: u32,
}

impl Sampling {
    /// `share` from 0 to 1, in steps of a millionth; what is above 0 is at least that. `None` beyond.
    pub fn new(share: f64) -> Option<Self> {
        let is_share = (0.0..=1.0).contains(&share);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "of a share, 0 to a million"
        )]
        let per_million = (share * 1e6).ceil() as u32;
        is_share.then_some(Self { per_million })
    }

    /// Whether it is of none.
    pub fn is_none(self) -> bool {
        self.per_million == 0
    }

    /// Whether query number `number` is one of them. Always the same ones, but in no pattern that queries may have,
    /// such as that every second one is for an IPv6 address.
    fn has(self, number: u64) -> bool {
        let drawn = (u128::from(mixed(number)) * 1_000_000) >> 64;
        drawn < self.per_million.into()
    }
}

/// A number that says nothing of `number`. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators" (splitmix64).
fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Draws queries, and writes their lines.
#[derive(Debug)]
pub struct QueryLog {
    sampling: Sampling,
    asked: AtomicU64,
    lines: Arc<AccessLog>,
    /// Tells the services of those who were captured.
    workloads: Option<Arc<WorkloadResolver>>,
}

/// What became of a query.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) outcome: DnsOutcome,
    /// What the answer says; `None` if there was none.
    pub(super) code: Option<ResponseCode>,
    /// Who was asked for it, at last.
    pub(super) upstream: Option<SocketAddr>,
}

impl QueryLog {
    /// Writes a line to `lines` for each query of `sampling`.
    pub fn new(sampling: Sampling, lines: Arc<AccessLog>) -> Self {
        Self {
            sampling,
            asked: AtomicU64::new(0),
            lines,
            workloads: None,
        }
    }

    /// Names the services of those who were captured.
    #[must_use]
    pub fn with_workloads(mut self, workloads: Arc<WorkloadResolver>) -> Self {
        self.workloads = Some(workloads);
        self
    }

    /// Writes nothing.
    pub fn off() -> Self {
        Self::new(Sampling::default(), Arc::new(AccessLog::off()))
    }

    /// Draws a query that has just come in: when that was, if it is to have a line.
    pub(super) fn draw(&self) -> Option<Instant> {
        if self.sampling.is_none() {
            return None;
        }
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        self.sampling.has(number).then(Instant::now)
    }

    /// Writes the line of a query, if it was drawn.
    pub(super) fn write(&self, query: &Query<'_>, ended: &Ended) {
        if let Some(begun) = query.drawn {
            self.lines.write(|| self.line(query, begun, ended));
        }
    }

    fn line(&self, query: &Query<'_>, begun: Instant, ended: &Ended) -> QueryLine {
        let question = message::question(query.message);
        let question = question.as_ref();
        QueryLine {
            time: Timestamp::now(),
            transport: query.transport.as_str(),
            client: query.client,
            namespace: query.original.map(|o| o.namespace.name.clone()),
            workload: query.original.and_then(|o| self.workload(o)),
            name: question.map(|question| presented(&question.name)),
            query_type: question.map(|question| type_name(question.query_type)),
            original_destination: query.original.map(|original| original.server),
            upstream: ended.upstream,
            outcome: ended.outcome.as_str(),
            rcode: ended.code.map(code_name),
            duration: begun.elapsed(),
        }
    }

    fn workload(&self, original: &Original) -> Option<String> {
        let workloads = self.workloads.as_ref()?;
        let service = match &original.maker {
            Some(maker) => workloads.resolve(maker).ok(),
            None => workloads.of_namespace(original.namespace.cookie),
        };
        service.map(|service| service.to_string())
    }
}

/// What a line says, in this order. `docs/dns.md` explains the fields.
#[derive(Debug, Serialize)]
struct QueryLine {
    time: Timestamp,
    transport: &'static str,
    client: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    query_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    original_destination: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<SocketAddr>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rcode: Option<String>,
    #[serde(rename = "duration_ms", serialize_with = "milliseconds")]
    duration: Duration,
}

impl Entry for QueryLine {
    fn write_pairs(&self, pairs: &mut Pairs) {
        pairs.plain("time", self.time);
        pairs.plain("transport", self.transport);
        pairs.plain("client", self.client);
        pairs.quoted("namespace", self.namespace.as_deref());
        pairs.quoted("workload", self.workload.as_deref());
        pairs.quoted("name", self.name.as_deref());
        pairs.quoted("type", self.query_type.as_deref());
        pairs.optional("original_destination", self.original_destination);
        pairs.optional("upstream", self.upstream);
        pairs.plain("outcome", self.outcome);
        pairs.quoted("rcode", self.rcode.as_deref());
        pairs.duration("duration_ms", self.duration);
    }
}

/// A name as zone files have it: what is not plain ASCII becomes `\DDD`, and a dot within a label `\.`.
/// Source: RFC 1035, section 5.1; RFC 4343, section 2.1.
fn presented(name: &Name) -> String {
    let mut text = String::with_capacity(64);
    for label in name {
        for byte in label {
            match byte {
                b'.' | b'\\' => {
                    text.push('\\');
                    text.push(char::from(*byte));
                }
                0..=b' ' | 0x7f.. => text.push_str(&format!("\\{byte:03}")),
                _ => text.push(char::from(*byte)),
            }
        }
        text.push('.');
    }
    if text.is_empty() {
        text.push('.');
    }
    text
}

/// Source: RFC 3597, section 5, for those without a name.
fn type_name(query_type: RecordType) -> String {
    if let RecordType::Unknown(number) = query_type {
        return format!("TYPE{number}");
    }
    query_type.to_string()
}

/// As `dig` has it. Source: the IANA registry "DNS RCODEs".
fn code_name(code: ResponseCode) -> String {
    let names = [
        (ResponseCode::NoError, "NOERROR"),
        (ResponseCode::FormErr, "FORMERR"),
        (ResponseCode::ServFail, "SERVFAIL"),
        (ResponseCode::NXDomain, "NXDOMAIN"),
        (ResponseCode::NotImp, "NOTIMP"),
        (ResponseCode::Refused, "REFUSED"),
        (ResponseCode::NotAuth, "NOTAUTH"),
        (ResponseCode::BADVERS, "BADVERS"),
    ];
    let known = names.into_iter().find(|(named, _)| *named == code);
    known.map_or_else(
        || format!("RCODE{}", u16::from(code)),
        |(_, name)| name.to_owned(),
    )
}

/// The line of any bytes: it is one, of plain ASCII.
#[cfg(any(test, fuzzing))]
pub(crate) fn bear(query: &Query<'_>) {
    use crate::telemetry::access_log::LineFormat;

    let ended = Ended {
        outcome: DnsOutcome::Malformed,
        code: Some(message::code(query.message)),
        upstream: None,
    };
    let line = QueryLog::off().line(query, Instant::now(), &ended);
    for format in [LineFormat::Text, LineFormat::Json] {
        let line = line.format(format);
        let text = line.trim_end_matches('\n');
        assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
    }
}
