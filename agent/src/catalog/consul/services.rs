//! What `/v1/health/connect/<service>` says, as instances of the model. Pure.
//!
//! The answer lists what speaks mutual TLS for a service: proxies of every make, Connect-native applications, and
//! Sidestep's own registrations, which are proxies to Consul.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use serde::Deserialize;

use crate::{
    catalog::model::{Health, Instance, InstanceId, NodeName, Weights},
    consul::{
        answers::{HealthEntry, List, TaggedAddress},
        judge::Content,
        registration::plan::META_INSTANCE,
    },
};

/// The largest share of traffic, as Envoy has it from Consul. Source: consul `agent/xds/endpoints.go`.
const WEIGHT_MAX: u32 = 128;

/// All that can be called for one service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "List<HealthEntry>")]
pub(super) struct Endpoints {
    /// In the order of their ids and nodes.
    pub(super) list: Vec<Endpoint>,
    /// `consul-virtual` and `virtual`.
    pub(super) explicit_addresses: BTreeSet<IpAddr>,
    /// What is registered and cannot be used.
    pub(super) problems: Vec<String>,
    /// How many the answer lists.
    listed: usize,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) instance: Arc<Instance>,
    /// The name under which it is registered: the proxy's own, if it is one.
    pub(super) registered_as: Arc<str>,
    /// Where it is reached from other datacenters, if not where it is reached from its own.
    pub(super) wan: Option<SocketAddr>,
}

impl Endpoints {
    /// Whether there are instances and none takes calls, so that the kernel refuses them.
    pub(super) fn is_refused(&self) -> bool {
        let mut instances = self.list.iter().map(|endpoint| &endpoint.instance);
        !self.list.is_empty() && instances.all(|instance| instance.weight() == 0)
    }
}

impl Content for Endpoints {
    fn is_empty(&self) -> bool {
        self.listed == 0
    }
}

impl From<List<HealthEntry>> for Endpoints {
    fn from(List(entries): List<HealthEntry>) -> Self {
        let mut all = Self {
            listed: entries.len(),
            ..Self::default()
        };
        let mut ids: HashSet<(NodeName, InstanceId)> = HashSet::new();
        for entry in &entries {
            match endpoint(entry, &mut ids) {
                Ok(endpoint) => all.list.push(endpoint),
                Err(problem) => {
                    let (id, node) = (&entry.service.id, &entry.node.node);
                    all.problems
                        .push(format!("instance {id} on node {node}: {problem}"));
                }
            }
            all.explicit_addresses
                .extend(explicit_addresses(&entry.service.tagged_addresses));
        }
        all.list
            .sort_by(|a, b| key(&a.instance).cmp(&key(&b.instance)));
        all
    }
}

fn key(instance: &Instance) -> (&InstanceId, &NodeName) {
    (&instance.id, &instance.node)
}

fn endpoint(
    entry: &HealthEntry,
    ids: &mut HashSet<(NodeName, InstanceId)>,
) -> Result<Endpoint, String> {
    let service = &entry.service;
    let is_proxy = service.kind == "connect-proxy";
    if !is_proxy && !service.connect.native {
        let kind = &service.kind;
        return Err(format!(
            "kind {kind:?} is neither a proxy nor Connect-native"
        ));
    }
    let node: NodeName = entry
        .node
        .node
        .parse()
        .map_err(|error| format!("{error}"))?;
    let host = if service.address.is_empty() {
        &entry.node.address
    } else {
        &service.address
    };
    let host = address(host)?;
    if service.port == 0 {
        return Err("it has no port".to_owned());
    }
    let weights = service.weights.unwrap_or(crate::consul::answers::Weights {
        passing: 1,
        warning: 1,
    });
    let (local, port) = if is_proxy {
        let proxy = &service.proxy;
        let host = match proxy.local_service_address.as_str() {
            "" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            text => address(text)?,
        };
        let local = SocketAddr::new(host, proxy.local_service_port);
        (local, Some(local.port()).filter(|port| *port != 0))
    } else {
        (SocketAddr::new(host, service.port), None)
    };
    let instance = Instance {
        id: id(entry, &node, ids)?,
        node,
        tunnel: SocketAddr::new(host, service.port),
        local,
        port: port.unwrap_or(service.port),
        tags: service.tags.clone(),
        meta: service.meta.clone(),
        health: health(entry),
        weights: Weights {
            passing: weight(weights.passing),
            warning: weight(weights.warning),
        },
        target: None,
    };
    Ok(Endpoint {
        wan: wan(entry, service.port).filter(|wan| *wan != instance.tunnel),
        registered_as: service.service.as_str().into(),
        instance: Arc::new(instance),
    })
}

/// The instance that a proxy is in front of; the proxy itself if it does not say, or if another proxy is in front of
/// the same one.
fn id(
    entry: &HealthEntry,
    node: &NodeName,
    ids: &mut HashSet<(NodeName, InstanceId)>,
) -> Result<InstanceId, String> {
    let service = &entry.service;
    let destination = service.proxy.destination_service_id.as_str();
    let ours = service.meta.get(META_INSTANCE).map_or("", String::as_str);
    for candidate in [destination, ours, service.id.as_str()] {
        if candidate.is_empty() {
            continue;
        }
        let id: InstanceId = candidate.parse().map_err(|error| format!("{error}"))?;
        if ids.insert((node.clone(), id.clone())) {
            return Ok(id);
        }
    }
    Err("its id is taken by another one on the node".to_owned())
}

fn address(text: &str) -> Result<IpAddr, String> {
    let parsed: IpAddr = text.parse().map_err(|_invalid| {
        format!("address {text:?}: expected an IP address; host names are not resolved")
    })?;
    Ok(parsed.to_canonical())
}

/// Tagged `wan`, as Consul has it from `advertise_addr_wan` and from registrations.
fn wan(entry: &HealthEntry, port: u16) -> Option<SocketAddr> {
    let of_service = entry.service.tagged_addresses.get("wan").and_then(|wan| {
        let port = if wan.port == 0 { port } else { wan.port };
        address(&wan.address)
            .ok()
            .map(|host| SocketAddr::new(host, port))
    });
    let of_node = || {
        let host = entry.node.tagged_addresses.get("wan")?;
        let own = &entry.service.address;
        // A service with an address of its own is not where its node is.
        (own.is_empty() || *own == entry.node.address)
            .then(|| address(host).ok())
            .flatten()
            .map(|host| SocketAddr::new(host, port))
    };
    of_service.or_else(of_node)
}

/// Only `critical` keeps traffic away, `warning` changes the weight; what a later Consul may call otherwise does
/// neither. Source: consul `agent/xds/endpoints.go`, `calculateEndpointHealthAndWeight`.
fn health(entry: &HealthEntry) -> Health {
    let statuses = entry
        .checks
        .iter()
        .map(|check| match check.status.as_str() {
            "critical" | "maintenance" => Health::Critical,
            "warning" => Health::Warning,
            _ => Health::Passing,
        });
    statuses.max().unwrap_or_default()
}

fn weight(registered: i64) -> u32 {
    u32::try_from(registered).map_or_else(
        |_outside| if registered < 0 { 0 } else { WEIGHT_MAX },
        |weight| weight.min(WEIGHT_MAX),
    )
}

/// What the servers allocate and what users set. Others are not virtual, or of other services behind a gateway.
fn explicit_addresses(tagged: &BTreeMap<String, TaggedAddress>) -> impl Iterator<Item = IpAddr> {
    ["consul-virtual", "virtual"]
        .into_iter()
        .filter_map(|tag| address(&tagged.get(tag)?.address).ok())
        .filter(|ip| !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(entries: Value) -> Endpoints {
        serde_json::from_value(entries).unwrap()
    }

    fn proxy() -> Value {
        json!({
            "Node": {"Node": "n1", "Address": "192.0.2.7", "Datacenter": "dc1",
                "TaggedAddresses": {"wan": "198.51.100.7"}},
            "Service": {"Kind": "connect-proxy", "ID": "db-1-sidecar-proxy", "Service": "db-sidecar-proxy",
                "Address": "", "Port": 21000, "Tags": ["v1"], "Meta": {"version": "1"},
                "TaggedAddresses": {
                    "lan_ipv4": {"Address": "192.0.2.7", "Port": 21000},
                    "consul-virtual": {"Address": "240.0.0.1", "Port": 0},
                    "consul-virtual:other": {"Address": "240.0.0.2", "Port": 0},
                    "virtual": {"Address": "127.0.0.1", "Port": 5432}},
                "Weights": {"Passing": 10, "Warning": 1},
                "Proxy": {"DestinationServiceName": "db", "DestinationServiceID": "db-1",
                    "LocalServiceAddress": "127.0.0.1", "LocalServicePort": 5432, "Mode": "transparent"}},
            "Checks": [{"Status": "passing"}, {"Status": "warning"}],
        })
    }

    #[test]
    fn a_proxy_is_the_instance_that_it_is_in_front_of() {
        let endpoints = read(json!([proxy()]));
        let [endpoint] = &endpoints.list[..] else {
            panic!("{endpoints:?}")
        };
        let expected = Instance {
            id: "db-1".parse().unwrap(),
            node: "n1".parse().unwrap(),
            tunnel: ([192, 0, 2, 7], 21000).into(),
            local: ([127, 0, 0, 1], 5432).into(),
            port: 5432,
            tags: vec!["v1".to_owned()],
            meta: BTreeMap::from([("version".to_owned(), "1".to_owned())]),
            health: Health::Warning,
            weights: Weights {
                passing: 10,
                warning: 1,
            },
            target: None,
        };
        assert_eq!(*endpoint.instance, expected);
        assert_eq!(endpoint.wan, Some(([198, 51, 100, 7], 21000).into()));
        assert_eq!(
            endpoints.explicit_addresses,
            BTreeSet::from([IpAddr::from([240, 0, 0, 1])])
        );
        assert!(endpoints.problems.is_empty());
    }

    #[test]
    fn registrations_of_every_make_are_read() {
        let with = |pointer: &str, value: Value| {
            let mut entry = proxy();
            *entry.pointer_mut(pointer).unwrap() = value;
            entry
        };
        let one = |entry: Value| {
            let all = read(json!([entry]));
            let instance = all.list.first().map(|e| Arc::clone(&e.instance));
            instance.ok_or(all.problems)
        };
        let native = json!({"Node": {"Node": "n1", "Address": "192.0.2.7"},
            "Service": {"ID": "api-1", "Service": "api", "Port": 8443, "Connect": {"Native": true}}, "Checks": []});
        let native = one(native).unwrap();
        assert_eq!(
            (native.id.as_str(), native.tunnel, native.port),
            ("api-1", ([192, 0, 2, 7], 8443).into(), 8443)
        );
        let own = one(with("/Service/Address", json!("192.0.2.9"))).unwrap();
        assert_eq!(own.tunnel, ([192, 0, 2, 9], 21000).into());
        let unnamed = one(with("/Service/Proxy/DestinationServiceID", json!(""))).unwrap();
        assert_eq!(unnamed.id.as_str(), "db-1-sidecar-proxy");
        let nomad = json!("_nomad-task-1-group-api-db-5432");
        one(with("/Service/Proxy/DestinationServiceID", nomad)).unwrap();
        for (pointer, value) in [
            ("/Service/Address", json!("db.example")),
            ("/Service/Port", json!(0)),
            ("/Service/Port", json!(70_000)),
            ("/Service/Kind", json!("mesh-gateway")),
            ("/Node/Node", json!("")),
        ] {
            let problems = one(with(pointer, value)).unwrap_err();
            assert_eq!(problems.len(), 1, "{problems:?}");
        }
    }

    #[test]
    fn health_and_weights_count_as_with_consul() {
        let table = [
            (json!([]), json!(null), 1),
            (json!([{"Status": "passing"}]), json!(null), 1),
            (
                json!([{"Status": "warning"}]),
                json!({"Passing": 10, "Warning": 3}),
                3,
            ),
            (
                json!([{"Status": "passing"}, {"Status": "critical"}]),
                json!(null),
                0,
            ),
            (json!([{"Status": "maintenance"}]), json!(null), 0),
            (json!([{"Status": "resting"}]), json!({"Passing": 7}), 7),
            (json!(null), json!({"Passing": 0, "Warning": 1}), 0),
            (json!(null), json!({"Passing": -4, "Warning": 1}), 0),
            (
                json!(null),
                json!({"Passing": 9_999_999_999_i64, "Warning": 1}),
                128,
            ),
        ];
        for (checks, weights, expected) in table {
            let mut entry = proxy();
            entry["Checks"] = checks.clone();
            entry["Service"]["Weights"] = weights.clone();
            let endpoints = read(json!([entry]));
            let weight = endpoints.list[0].instance.weight();
            assert_eq!(weight, expected, "{checks} {weights}");
        }
    }

    #[test]
    fn two_proxies_of_one_instance_are_two() {
        let mut second = proxy();
        second["Service"]["ID"] = json!("db-1-other-proxy");
        let endpoints = read(json!([proxy(), second, proxy()]));
        let ids: Vec<_> = endpoints
            .list
            .iter()
            .map(|e| e.instance.id.as_str())
            .collect();
        assert_eq!(ids, ["db-1", "db-1-other-proxy", "db-1-sidecar-proxy"]);
        assert!(!endpoints.is_empty() && read(json!(null)).is_empty());
    }
}
