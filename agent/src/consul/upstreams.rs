//! Explicit upstreams, out of the registrations of sidecars. Pure.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use super::answers::{ServiceEntry, Upstream};
use crate::{catalog::model::ServiceName, sockets::ListenAddress};

/// What an upstream leads to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Destination {
    /// A service of this datacenter.
    Service(ServiceName),
    /// What a prepared query of this name or id finds.
    Query(Arc<str>),
    /// A service of another datacenter.
    Elsewhere {
        /// The service.
        service: ServiceName,
        /// Where it is.
        datacenter: Arc<str>,
    },
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => name.fmt(f),
            Self::Query(name) => write!(f, "prepared query {name:?}"),
            Self::Elsewhere {
                service,
                datacenter,
            } => write!(f, "{service} of datacenter {datacenter}"),
        }
    }
}

/// What is reached at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// What it leads to.
    pub destination: Destination,
    /// The mode of a Unix socket's file, where one is set.
    pub mode: Option<u32>,
}

/// What is reached at which address of this node, and what cannot be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upstreams {
    /// By the address to listen at.
    pub offered: BTreeMap<ListenAddress, Offer>,
    /// What is registered and not offered, with the reason.
    pub problems: Vec<String>,
}

/// What the registrations of the node's Consul agent ask for. Of two at one address, the first by id has it.
pub fn upstreams<'a>(
    registered: impl IntoIterator<Item = &'a ServiceEntry>,
    datacenter: &str,
) -> Upstreams {
    let mut all = Upstreams::default();
    for entry in registered {
        for upstream in &entry.proxy.upstreams {
            // Reached by its virtual address alone.
            if upstream.local_bind_port == 0 && upstream.local_bind_socket_path.is_empty() {
                continue;
            }
            let problem = match read(upstream, datacenter) {
                Ok((address, offer)) => match all.offered.get(&address) {
                    Some(other) if *other == offer => continue,
                    Some(Offer { destination, .. }) => {
                        format!("{address} stands for {destination} already")
                    }
                    None => {
                        all.offered.insert(address, offer);
                        continue;
                    }
                },
                Err(problem) => problem,
            };
            let name = &upstream.destination_name;
            let text = format!("upstream {name:?} of {}: {problem}", entry.id);
            all.problems.push(text);
        }
    }
    all
}

fn read(upstream: &Upstream, datacenter: &str) -> Result<(ListenAddress, Offer), String> {
    if !upstream.destination_peer.is_empty() {
        return Err("other clusters are not supported".to_owned());
    }
    if !matches!(upstream.destination_namespace.as_str(), "" | "default") {
        let namespace = &upstream.destination_namespace;
        return Err(format!("namespace {namespace:?} is not supported"));
    }
    let name = &upstream.destination_name;
    let elsewhere = Some(upstream.datacenter.as_str())
        .filter(|elsewhere| !elsewhere.is_empty() && *elsewhere != datacenter);
    let destination = match upstream.destination_type.as_str() {
        "" | "service" => {
            let service = name.parse().map_err(|error| format!("{error}"))?;
            match elsewhere {
                Some(datacenter) => Destination::Elsewhere {
                    service,
                    datacenter: datacenter.into(),
                },
                None => Destination::Service(service),
            }
        }
        "prepared_query" if elsewhere.is_some() => {
            return Err("prepared queries of other datacenters are not supported".to_owned());
        }
        // Consul finds it by name and by id, and takes any text for a name.
        "prepared_query" if !name.is_empty() => Destination::Query(name.as_str().into()),
        kind => {
            return Err(format!("destinations of type {kind:?} are not supported"));
        }
    };
    let (address, mode) = address(upstream)?;
    Ok((address, Offer { destination, mode }))
}

/// Where to listen, and with which mode.
fn address(upstream: &Upstream) -> Result<(ListenAddress, Option<u32>), String> {
    let path = Path::new(&upstream.local_bind_socket_path);
    if path.as_os_str().is_empty() {
        let address = match upstream.local_bind_address.as_str() {
            "" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            text => text
                .parse()
                .map_err(|_not_one| format!("{text:?} is no IP address to listen at"))?,
        };
        return Ok((
            SocketAddr::new(address, upstream.local_bind_port).into(),
            None,
        ));
    }
    if !path.is_absolute() {
        return Err(format!(
            "{:?} is no absolute path",
            upstream.local_bind_socket_path
        ));
    }
    let mode = match upstream.local_bind_socket_mode.as_str() {
        "" => None,
        text => Some(
            u32::from_str_radix(text, 8)
                .ok()
                .filter(|mode| *mode <= 0o777)
                .ok_or_else(|| format!("{text:?} is no mode of a file, expected octal digits"))?,
        ),
    };
    Ok((ListenAddress::Unix(path.to_owned()), mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, upstreams: &str) -> ServiceEntry {
        let text = format!(
            r#"{{"ID":"{id}","Kind":"connect-proxy","Proxy":{{"Upstreams":{upstreams}}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_port_stands_for_the_service_that_is_registered_for_it() {
        let entries = [
            entry("app", "null"),
            entry(
                "web-proxy",
                r#"[{"DestinationName":"db","LocalBindPort":9191},
                    {"DestinationType":"prepared_query","DestinationName":"to db","LocalBindPort":9192},
                    {"DestinationType":"service","DestinationName":"cache","Datacenter":"dc1",
                     "LocalBindAddress":"127.0.0.2","LocalBindPort":9191},
                    {"DestinationName":"db","LocalBindSocketPath":"/run/db","LocalBindSocketMode":"0640"},
                    {"DestinationName":"db","Datacenter":"dc2","LocalBindPort":9193},
                    {"DestinationName":"implicit"}]"#,
            ),
            entry(
                "other-proxy",
                r#"[{"DestinationName":"db","LocalBindPort":9191}]"#,
            ),
        ];
        let all = upstreams(&entries, "dc1");
        let found: Vec<_> = all
            .offered
            .iter()
            .map(|(address, Offer { destination, mode })| {
                format!("{address} {destination} {mode:?}")
            })
            .collect();
        assert_eq!(
            found,
            [
                "127.0.0.1:9191 db None",
                "127.0.0.1:9192 prepared query \"to db\" None",
                "127.0.0.1:9193 db of datacenter dc2 None",
                "127.0.0.2:9191 cache None",
                "/run/db db Some(416)"
            ]
        );
        assert_eq!(all.problems, Vec::<String>::new());
    }

    #[test]
    fn what_is_not_offered_is_told() {
        let table = [
            (
                r#"{"DestinationName":"mail","LocalBindPort":9191}"#,
                "127.0.0.1:9191 stands for db already",
            ),
            (
                r#"{"DestinationType":"exported","DestinationName":"q","LocalBindPort":1}"#,
                "destinations of type \"exported\"",
            ),
            (
                r#"{"DestinationName":"db","LocalBindSocketPath":"run/db"}"#,
                "\"run/db\" is no absolute path",
            ),
            (
                r#"{"DestinationName":"db","LocalBindSocketPath":"/run/db","LocalBindSocketMode":"rw"}"#,
                "\"rw\" is no mode",
            ),
            (
                r#"{"DestinationType":"prepared_query","DestinationName":"q","Datacenter":"dc2","LocalBindPort":1}"#,
                "prepared queries of other",
            ),
            (
                r#"{"DestinationName":"db","DestinationPeer":"east","LocalBindPort":1}"#,
                "other clusters",
            ),
            (
                r#"{"DestinationName":"db","LocalBindAddress":"localhost","LocalBindPort":1}"#,
                "\"localhost\" is no IP",
            ),
            (
                r#"{"DestinationName":"d b","LocalBindPort":1}"#,
                "service name \"d b\"",
            ),
        ];
        for (upstream, expected) in table {
            let entries = [
                entry("a", r#"[{"DestinationName":"db","LocalBindPort":9191}]"#),
                entry("b", &format!("[{upstream}]")),
            ];
            let all = upstreams(&entries, "dc1");
            let [problem] = all.problems.as_slice() else {
                panic!("{upstream}: {:?}", all.problems);
            };
            assert!(problem.contains(expected), "{upstream}: {problem}");
            assert_eq!(all.offered.len(), 1, "{upstream}");
        }
    }
}
