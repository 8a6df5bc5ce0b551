//! `[consul]`: Consul as the source of the catalog and of identities.

use std::{ops::RangeInclusive, path::PathBuf};

use serde::Deserialize;

use super::{check::Checker, raw};
use crate::{
    consul::{ClientCertificate, ClientSettings, ConsulAddress, TlsSettings},
    whole_number::Whole,
};

/// `[consul]`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsulConfig {
    /// `address`, `token_file`, `ca_file`, `certificate_file`, `key_file`, `server_name`, `namespace`, `partition`
    pub client: ClientSettings,
    /// `register`: register a proxy for each local service, by which sidecars of other nodes reach it.
    pub register: bool,
    /// `inbound_ports` for those proxies, one each.
    pub inbound_ports: RangeInclusive<u16>,
    /// `discover_workloads`: who listens at a registered service's port is that service.
    pub discover_workloads: bool,
    /// `max_watches`: how many services are watched by a blocking query each.
    pub max_watches: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConsul {
    #[serde(deserialize_with = "address")]
    address: ConsulAddress,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    server_name: Option<String>,
    namespace: Option<String>,
    partition: Option<String>,
    register: bool,
    #[serde(deserialize_with = "ports")]
    inbound_ports: (u16, u16),
    discover_workloads: bool,
    max_watches: Whole<u32>,
}

impl Default for RawConsul {
    fn default() -> Self {
        Self {
            address: ConsulAddress::Http {
                host: "127.0.0.1".to_owned(),
                port: 8500,
            },
            token_file: None,
            ca_file: None,
            certificate_file: None,
            key_file: None,
            server_name: None,
            namespace: None,
            partition: None,
            register: true,
            // Beside 21000 to 21255, which Consul gives to sidecars.
            inbound_ports: (21_500, 21_755),
            discover_workloads: true,
            // Consul takes 200 connections of one client (`limits.http_max_conns_per_client`).
            max_watches: Whole(128),
        }
    }
}

fn address<'de, D: serde::Deserializer<'de>>(from: D) -> Result<ConsulAddress, D::Error> {
    from.deserialize_str(raw::Text {
        expected: "\"http://host:port\", \"https://host:port\" or \"unix:///path\"",
        parse: parse_address,
    })
}

fn parse_address(text: &str) -> Option<ConsulAddress> {
    if let Some(path) = text.strip_prefix("unix://") {
        return path
            .starts_with('/')
            .then(|| ConsulAddress::Unix(path.into()));
    }
    // As Consul's own tools take it.
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match authority.strip_prefix('[') {
        Some(bracketed) => {
            let (host, rest) = bracketed.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (host, rest.strip_prefix(':'))
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if host.is_empty() || !host.chars().all(plain) {
        return None;
    }
    let host = host.to_owned();
    let port = |default: u16| port.map_or(Some(default), |port| port.parse().ok());
    match scheme {
        "http" => Some(ConsulAddress::Http {
            host,
            port: port(8500)?,
        }),
        "https" => Some(ConsulAddress::Https {
            host,
            port: port(8501)?,
        }),
        _ => None,
    }
}

fn ports<'de, D: serde::Deserializer<'de>>(from: D) -> Result<(u16, u16), D::Error> {
    from.deserialize_str(raw::Text {
        expected: "two ports in quotes, like \"21500-21755\"",
        parse: |text| {
            let (first, last) = text.split_once('-')?;
            Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
        },
    })
}

pub(super) fn check(c: &mut Checker<'_>, raw: RawConsul) -> ConsulConfig {
    let files = [
        ("consul.token_file", &raw.token_file),
        ("consul.ca_file", &raw.ca_file),
        ("consul.certificate_file", &raw.certificate_file),
        ("consul.key_file", &raw.key_file),
    ];
    for (key, path) in files {
        if let Some(path) = path {
            c.absolute(key, path);
        }
    }
    let tls = tls(c, &raw);
    let (first, last) = raw.inbound_ports;
    c.expect(0 < first && first <= last, "consul.inbound_ports", || {
        format!("{first}-{last}: expected a first port from 1 on, and a last that is not below it")
    });
    let Whole(max_watches) = raw.max_watches;
    c.expect(
        (1..=4096).contains(&max_watches),
        "consul.max_watches",
        || format!("{max_watches}: expected 1 to 4096"),
    );
    ConsulConfig {
        client: ClientSettings {
            address: raw.address,
            token_file: raw.token_file,
            tls,
            namespace: raw.namespace,
            partition: raw.partition,
            datacenter: None,
        },
        register: raw.register,
        inbound_ports: first..=last,
        discover_workloads: raw.discover_workloads,
        max_watches: max_watches as usize,
    }
}

fn tls(c: &mut Checker<'_>, raw: &RawConsul) -> Option<TlsSettings> {
    let given = [
        ("consul.ca_file", raw.ca_file.is_some()),
        ("consul.certificate_file", raw.certificate_file.is_some()),
        ("consul.key_file", raw.key_file.is_some()),
        ("consul.server_name", raw.server_name.is_some()),
    ];
    if !matches!(raw.address, ConsulAddress::Https { .. }) {
        for (key, is_given) in given {
            c.expect(!is_given, key, || {
                "expected only with an https address in consul.address".to_owned()
            });
        }
        return None;
    }
    let Some(ca_file) = raw.ca_file.clone() else {
        c.problem(
            "consul.ca_file",
            "missing: expected the CA's certificate, since consul.address is https",
        );
        return None;
    };
    let client_certificate = match (raw.certificate_file.clone(), raw.key_file.clone()) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (Some(_), None) => {
            c.problem("consul.key_file", "missing: expected the certificate's key");
            None
        }
        (None, Some(_)) => {
            c.problem(
                "consul.certificate_file",
                "missing: expected the key's certificate",
            );
            None
        }
    };
    Some(TlsSettings {
        ca_file,
        client_certificate,
        server_name: raw.server_name.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_that_consuls_tools_take() {
        let http = |host: &str, port| ConsulAddress::Http {
            host: host.to_owned(),
            port,
        };
        let https = |host: &str, port| ConsulAddress::Https {
            host: host.to_owned(),
            port,
        };
        let table = [
            ("http://127.0.0.1:8500", Some(http("127.0.0.1", 8500))),
            (
                "http://consul.internal",
                Some(http("consul.internal", 8500)),
            ),
            ("http://[::1]:85/", Some(http("::1", 85))),
            ("https://consul", Some(https("consul", 8501))),
            ("https://[fd00::1]", Some(https("fd00::1", 8501))),
            (
                "unix:///run/consul.sock",
                Some(ConsulAddress::Unix("/run/consul.sock".into())),
            ),
            ("127.0.0.1:85", Some(http("127.0.0.1", 85))),
            ("ftp://127.0.0.1", None),
            ("http://", None),
            ("http://[::1", None),
            ("http://host:99999", None),
            ("http://host/path", None),
            ("http://user@host", None),
            ("unix://run/consul.sock", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_address(text), expected, "{text}");
        }
    }
}
