//! `[dns]`: where names are answered, and how.

use std::{fmt, net::SocketAddr, time::Duration};

use hickory_proto::rr::Name;
use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};

use super::{
    check::Checker,
    raw::{self, Span},
};
use crate::dns::{query_log::Sampling, zone::ServiceAnswers};

/// `[dns]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// `listen`: where queries are taken over UDP and TCP; nowhere by default.
    pub listen: Vec<SocketAddr>,
    /// `domain` that the names are below.
    pub domain: Name,
    /// `ttl` of answers, also of negative ones.
    pub ttl: Duration,
    /// `service_answers`: what services' names lead to.
    pub service_answers: ServiceAnswers,
    /// `upstreams` for all other names; those of `/etc/resolv.conf` by default.
    pub upstreams: Option<Vec<SocketAddr>>,
    /// `allow`: networks whose queries are answered; loopback by default.
    pub allow: Vec<IpNet>,
    /// `queries_per_second` of one source; 0 is no limit.
    pub queries_per_second: u32,
    /// `query_log`: the share of queries that have a line where the access log is.
    pub query_log: Sampling,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawDns {
    #[serde(deserialize_with = "listen")]
    listen: Vec<SocketAddr>,
    domain: String,
    ttl: Span,
    service_answers: ServiceAnswers,
    #[serde(deserialize_with = "upstreams")]
    upstreams: Option<Vec<SocketAddr>>,
    #[serde(deserialize_with = "networks")]
    allow: Vec<IpNet>,
    #[serde(deserialize_with = "raw::count")]
    queries_per_second: u32,
    query_log: f64,
}

impl Default for RawDns {
    fn default() -> Self {
        Self {
            listen: vec![],
            domain: "consul.".to_owned(),
            ttl: Span(Duration::from_secs(5)),
            service_answers: ServiceAnswers::Virtual,
            upstreams: None,
            allow: vec![
                IpNet::new_assert([127, 0, 0, 0].into(), 8),
                IpNet::new_assert(std::net::Ipv6Addr::LOCALHOST.into(), 128),
            ],
            // Far above what one host asks, far below what makes the agent late with connections.
            queries_per_second: 20_000,
            query_log: 0.0,
        }
    }
}

/// The longest that an answer may be kept: services come and go.
const TTL_MAX: Duration = Duration::from_secs(3600);

pub(super) fn check(c: &mut Checker<'_>, raw: RawDns) -> DnsConfig {
    for (index, address) in raw.listen.iter().enumerate() {
        let ip = address.ip();
        let good = address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast();
        let repeated = raw.listen.iter().take(index).any(|other| other == address);
        c.expect(good && !repeated, "dns.listen", || {
            format!(
                "{address}: expected one address of this node and a port: answers must come from where queries went"
            )
        });
    }
    let domain = Name::from_ascii(&raw.domain).ok().map(|mut domain| {
        domain.set_fqdn(true);
        domain.to_lowercase()
    });
    let usable = |domain: &Name| !domain.is_root() && domain.len() <= 64;
    let domain = domain.filter(usable);
    c.expect(domain.is_some(), "dns.domain", || {
        format!(
            "{:?}: expected a domain of at most 64 characters, like \"consul\"",
            raw.domain
        )
    });
    let ttl = raw.ttl.0;
    c.expect(ttl <= TTL_MAX, "dns.ttl", || {
        format!("{} s: expected at most an hour", ttl.as_secs())
    });
    for server in raw.upstreams.iter().flatten() {
        let good = server.port() != 0 && !server.ip().is_unspecified();
        c.expect(
            good && !raw.listen.contains(server),
            "dns.upstreams",
            || format!("{server}: expected another name server, like 192.0.2.53"),
        );
    }
    let query_log = Sampling::new(raw.query_log);
    c.expect(query_log.is_some(), "dns.query_log", || {
        format!(
            "{}: expected a share of the queries from 0 to 1, like 0.01",
            raw.query_log
        )
    });
    DnsConfig {
        listen: raw.listen,
        domain: domain.unwrap_or_else(Name::root),
        ttl,
        service_answers: raw.service_answers,
        upstreams: raw.upstreams,
        allow: raw.allow,
        queries_per_second: raw.queries_per_second,
        query_log: query_log.unwrap_or_default(),
    }
}

fn listen<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SocketAddr>, D::Error> {
    from.deserialize_any(OneOrMore {
        expected: "\"off\", or an address and port like \"127.0.0.1:8600\", or a list of them",
        off: true,
        parse: |text| text.parse().ok(),
    })
}

fn upstreams<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<SocketAddr>>, D::Error> {
    let list = OneOrMore {
        expected: "a list of name servers like [\"192.0.2.53\", \"[2001:db8::53]:5353\"]",
        off: false,
        parse: |text| {
            let with_port = text.parse().ok();
            with_port.or_else(|| Some(SocketAddr::new(text.parse().ok()?, 53)))
        },
    };
    from.deserialize_any(list).map(Some)
}

fn networks<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpNet>, D::Error> {
    from.deserialize_any(OneOrMore {
        expected: "a list of networks like [\"127.0.0.0/8\"]",
        off: false,
        parse: |text| text.parse().ok().map(|network: IpNet| network.trunc()),
    })
}

/// One text or several, each with a meaning.
struct OneOrMore<T> {
    expected: &'static str,
    /// `"off"` is none.
    off: bool,
    parse: fn(&str) -> Option<T>,
}

impl<'de, T> Visitor<'de> for OneOrMore<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<T>, E> {
        if self.off && text == "off" {
            return Ok(vec![]);
        }
        let value = (self.parse)(text);
        let value =
            value.ok_or_else(|| E::custom(format_args!("{text:?}: expected {}", self.expected)))?;
        Ok(vec![value])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(text) = seq.next_element::<String>()? {
            let value = (self.parse)(&text);
            list.push(value.ok_or_else(|| {
                let expected = self.expected;
                serde::de::Error::custom(format_args!("{text:?}: expected {expected}"))
            })?);
        }
        Ok(list)
    }
}
