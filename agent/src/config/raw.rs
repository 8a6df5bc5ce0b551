//! What the files may say: every key, its type and its default. No check beyond types.

use std::{
    fmt,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Unexpected, Visitor},
};

use crate::{
    catalog::model::{InstanceId, IntentionAction, NodeName, ServiceName},
    identity::spiffe::TrustDomain,
    whole_number::Whole,
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    #[serde(default)]
    pub(super) node: Node,
    #[serde(default)]
    pub(super) agent: Agent,
    pub(super) capture: Capture,
    #[serde(default)]
    pub(super) catalog: Catalog,
    pub(super) consul: Option<super::consul::RawConsul>,
    pub(super) identity: Option<Identity>,
    #[serde(default)]
    pub(super) policy: Policy,
    #[serde(default, deserialize_with = "workloads")]
    pub(super) workload: Vec<Workload>,
    #[serde(default, deserialize_with = "away")]
    pub(super) away: Vec<Away>,
    #[serde(default)]
    pub(super) tunnel: Tunnel,
    #[serde(default)]
    pub(super) dns: super::dns::RawDns,
    #[serde(default)]
    pub(super) limits: Limits,
    #[serde(default)]
    pub(super) telemetry: Telemetry,
    #[serde(default)]
    pub(super) admin: Admin,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Node {
    pub(super) name: Option<NodeName>,
    #[serde(deserialize_with = "address")]
    pub(super) address: Option<IpAddr>,
    pub(super) datacenter: Option<String>,
    pub(super) state_dir: PathBuf,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: None,
            address: None,
            datacenter: None,
            state_dir: "/var/lib/sidestep".into(),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Agent {
    pub(super) cgroup: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a key of its own, which operators switch"
)]
pub(super) struct Capture {
    #[serde(default)]
    pub(super) mode: super::CaptureMode,
    #[serde(deserialize_with = "paths")]
    pub(super) cgroups: Vec<PathBuf>,
    #[serde(default, deserialize_with = "some_port")]
    pub(super) port: Option<u16>,
    #[serde(default = "ipv4_range", deserialize_with = "ipv4_network")]
    pub(super) ipv4_range: Ipv4Net,
    #[serde(default = "ipv6_range", deserialize_with = "ipv6_network")]
    pub(super) ipv6_range: Ipv6Net,
    #[serde(default = "max_vips", deserialize_with = "count")]
    pub(super) max_vips: u32,
    #[serde(default = "max_flows", deserialize_with = "count")]
    pub(super) max_flows: u32,
    #[serde(default = "pin_directory")]
    pub(super) pin_directory: PathBuf,
    #[serde(default)]
    pub(super) so_original_dst: bool,
    #[serde(default)]
    pub(super) dns: bool,
    #[serde(default)]
    pub(super) instances: bool,
    #[serde(default = "hung_after")]
    pub(super) hung_after: Limit,
    #[serde(default)]
    pub(super) debug: bool,
}

/// The port that Istio and Consul chose for the same purpose; to rules, which know the listener by its port alone, one
/// that only root may take, and nobody has (IANA's list).
pub(super) fn capture_port(mode: super::CaptureMode) -> u16 {
    match mode {
        super::CaptureMode::Ebpf => 15_001,
        super::CaptureMode::Iptables
        | super::CaptureMode::IptablesNft
        | super::CaptureMode::IptablesLegacy => 301,
    }
}

/// Class E: routed by Linux, used by nobody, and what Consul takes its virtual addresses from.
pub(super) fn ipv4_range() -> Ipv4Net {
    Ipv4Net::new_assert(std::net::Ipv4Addr::new(240, 0, 0, 0), 4)
}

/// A unique local prefix (RFC 4193) with a random global id.
pub(super) fn ipv6_range() -> Ipv6Net {
    Ipv6Net::new_assert(
        std::net::Ipv6Addr::new(0xfd6b, 0x9c41, 0x7e52, 0, 0, 0, 0, 0),
        64,
    )
}

fn max_vips() -> u32 {
    131_072
}

fn max_flows() -> u32 {
    65_536
}

fn pin_directory() -> PathBuf {
    super::DEFAULT_PIN_DIRECTORY.into()
}

/// Fifteen heartbeats: an agent that has to wait for a processor is not hung.
fn hung_after() -> Limit {
    Limit(Some(Duration::from_secs(3)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Catalog {
    pub(super) directory: Option<PathBuf>,
    pub(super) vip_quarantine: Span,
}

impl Default for Catalog {
    fn default() -> Self {
        Self {
            directory: None,
            vip_quarantine: Span(Duration::from_secs(24 * 3600)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    #[serde(deserialize_with = "trust_domain")]
    pub(super) trust_domain: TrustDomain,
    pub(super) ca: Ca,
    #[serde(default = "leaf_ttl")]
    pub(super) leaf_ttl: Span,
}

fn trust_domain<'de, D: Deserializer<'de>>(from: D) -> Result<TrustDomain, D::Error> {
    let text = String::deserialize(from)?;
    text.parse()
        .map_err(|error| D::Error::custom(crate::telemetry::log::chain(&error)))
}

fn leaf_ttl() -> Span {
    Span(Duration::from_secs(24 * 3600))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ca {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) passphrase_file: Option<PathBuf>,
    /// Empty: the CA certificate itself is the root.
    #[serde(default, deserialize_with = "paths")]
    pub(super) roots: Vec<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Policy {
    pub(super) default: Option<IntentionAction>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workload {
    pub(super) service: ServiceName,
    pub(super) instance: Option<InstanceId>,
    pub(super) cgroup: Option<PathBuf>,
    pub(super) unit: Option<String>,
    #[serde(default, deserialize_with = "some_count")]
    pub(super) user: Option<u32>,
    pub(super) netns: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Away {
    pub(super) service: ServiceName,
    pub(super) policy: AwayWord,
    #[serde(default, deserialize_with = "endpoint")]
    pub(super) endpoint: Option<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AwayWord {
    Closed,
    Open,
    Fallback,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Tunnel {
    #[serde(deserialize_with = "address")]
    pub(super) listen: Option<IpAddr>,
    #[serde(deserialize_with = "port")]
    pub(super) port: u16,
    pub(super) hbone_port: PortOrOff,
    pub(super) connect_timeout: Span,
    pub(super) handshake_timeout: Span,
}

impl Default for Tunnel {
    fn default() -> Self {
        Self {
            listen: None,
            port: 15_443,
            hbone_port: PortOrOff(None),
            connect_timeout: Span(Duration::from_secs(5)),
            handshake_timeout: Span(Duration::from_secs(10)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Limits {
    #[serde(deserialize_with = "some_count")]
    pub(super) workers: Option<u32>,
    #[serde(deserialize_with = "count")]
    pub(super) max_connections: u32,
    pub(super) idle_timeout: Option<Span>,
    pub(super) drain_timeout: Span,
    #[serde(deserialize_with = "count")]
    pub(super) eject_after: u32,
    pub(super) eject_for: Span,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: None,
            max_connections: 100_000,
            idle_timeout: None,
            drain_timeout: Span(Duration::from_secs(30)),
            eject_after: 3,
            eject_for: Span(Duration::from_secs(30)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Telemetry {
    pub(super) metrics: Metrics,
    pub(super) log: String,
    pub(super) log_format: LogFormat,
    pub(super) access_log: String,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            metrics: Metrics::At(SocketAddr::from(([127, 0, 0, 1], 15_020))),
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            access_log: "stdout".to_owned(),
        }
    }
}

/// A port, or `"off"`.
#[derive(Debug)]
pub(super) struct PortOrOff(pub(super) Option<u16>);

impl<'de> Deserialize<'de> for PortOrOff {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = PortOrOff;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"off\" or a port from 1 to 65535")
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<PortOrOff, E> {
                u16::try_from(number)
                    .ok()
                    .filter(|port| *port > 0)
                    .map(|port| PortOrOff(Some(port)))
                    .ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PortOrOff, E> {
                if text == "off" {
                    return Ok(PortOrOff(None));
                }
                Err(E::invalid_value(Unexpected::Str(text), &self))
            }
        }
        from.deserialize_any(Either)
    }
}

#[derive(Debug)]
pub(super) enum Metrics {
    Off,
    At(SocketAddr),
}

impl<'de> Deserialize<'de> for Metrics {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text {
            expected: "\"off\" or an address and port like \"127.0.0.1:15020\"",
            parse: |text| match text {
                "off" => Some(Self::Off),
                address => address.parse().map(Self::At).ok(),
            },
        })
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Admin {
    pub(super) socket: PathBuf,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            socket: "/run/sidestep/admin.sock".into(),
        }
    }
}

/// A duration as text: a whole number and one of `ms`, `s`, `m`, `h`, `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text {
            expected: "a duration in quotes, like \"30s\": a whole number and ms, s, m, h or d",
            parse: |text| parse_span(text).map(Self),
        })
    }
}

/// A [`Span`], or `off` for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit(pub(super) Option<Duration>);

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text {
            expected: "\"off\" or a duration in quotes, like \"3s\": a whole number and ms, s, m, h or d",
            parse: |text| match text {
                "off" => Some(Self(None)),
                span => parse_span(span).map(|span| Self(Some(span))),
            },
        })
    }
}

fn parse_span(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at_checked(digits)?;
    let number: u64 = number.parse().ok()?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 3600 * 1000,
        "d" => 24 * 3600 * 1000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

fn address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<IpAddr>, D::Error> {
    from.deserialize_str(Text {
        expected: "an IP address in quotes, like \"192.0.2.1\"",
        parse: |text| text.parse().ok().map(Some),
    })
}

fn endpoint<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    from.deserialize_str(Text {
        expected: "an address and port in quotes, like \"192.0.2.1:5432\"",
        parse: |text| text.parse().ok().map(Some),
    })
}

fn ipv4_network<'de, D: Deserializer<'de>>(from: D) -> Result<Ipv4Net, D::Error> {
    from.deserialize_str(Text {
        expected: "an IPv4 network in quotes, like \"240.0.0.0/4\"",
        parse: |text| text.parse().ok(),
    })
}

fn ipv6_network<'de, D: Deserializer<'de>>(from: D) -> Result<Ipv6Net, D::Error> {
    from.deserialize_str(Text {
        expected: "an IPv6 network in quotes, like \"fd00:1:2:3::/64\"",
        parse: |text| text.parse().ok(),
    })
}

/// Text with a meaning. Says what was expected in the operator's words; serde's are those of Rust.
pub(super) struct Text<T> {
    pub(super) expected: &'static str,
    pub(super) parse: fn(&str) -> Option<T>,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text)
            .ok_or_else(|| E::custom(format_args!("{text:?}: expected {}", self.expected)))
    }
}

fn paths<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    from.deserialize_seq(List::expected("a list of paths in brackets"))
}

fn workloads<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Workload>, D::Error> {
    from.deserialize_seq(List::expected("blocks that begin with [[workload]]"))
}

fn away<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Away>, D::Error> {
    from.deserialize_seq(List::expected("blocks that begin with [[away]]"))
}

struct List<T> {
    expected: &'static str,
    of: PhantomData<T>,
}

impl<T> List<T> {
    fn expected(expected: &'static str) -> Self {
        Self {
            expected,
            of: PhantomData,
        }
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = seq.next_element()? {
            list.push(element);
        }
        Ok(list)
    }
}

fn some_port<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u16>, D::Error> {
    port(from).map(Some)
}

fn port<'de, D: Deserializer<'de>>(from: D) -> Result<u16, D::Error> {
    Whole::deserialize(from).map(|Whole(port)| port)
}

pub(super) fn count<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    Whole::deserialize(from).map(|Whole(count)| count)
}

fn some_count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    count(from).map(Some)
}
