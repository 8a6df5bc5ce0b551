//! What should be registered with the node's Consul agent, and what to change for it. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use crate::{
    catalog::model::{Health, Instance, InstanceId, META_ADDRESS, NodeName, ServiceName, Weights},
    consul::answers::{AgentServices, ServiceEntry},
};

/// What the ids of our registrations begin with.
const ID_PREFIX: &str = "sidestep-";

/// `Meta` of our registrations: the agent's version. Who knows it may tunnel in other ways than Connect's.
pub const META_VERSION: &str = "sidestep";

/// `Meta` of our registrations: the agent's node, so that two agents at one Consul agent leave each other's alone.
pub const META_NODE: &str = "sidestep-node";

/// `Meta` of our registrations: the instance behind it. In Consul's own field for it, the tools that start a sidecar by the
/// instance's id (`consul connect proxy -sidecar-for`, `consul connect envoy -sidecar-for`) would find two, and refuse.
pub const META_INSTANCE: &str = "sidestep-instance";

const KIND: &str = "connect-proxy";

/// How often Consul tries the port of a registration, and how long it waits.
const CHECK_INTERVAL: &str = "10s";
const CHECK_TIMEOUT: &str = "5s";

/// An instance that somebody registered with this node's Consul agent and that has no TLS of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalService {
    /// Its id.
    pub instance: InstanceId,
    /// Its service.
    pub service: ServiceName,
    /// The address it is registered with, if it is an IP address; the node's else.
    pub address: Option<IpAddr>,
    /// The port it is registered with.
    pub port: u16,
    /// As registered.
    pub tags: Vec<String>,
    /// As registered.
    pub meta: BTreeMap<String, String>,
    /// As registered.
    pub weights: Weights,
}

/// The instances among `present` that can be reached through this node.
///
/// Not proxies and gateways, nor what speaks Connect itself. What has no port, or a name that makes no identity, cannot
/// be reached; the names come second.
pub fn local_services(present: &AgentServices) -> (Vec<LocalService>, Vec<String>) {
    let mut services = Vec::new();
    let mut unusable = Vec::new();
    for (id, entry) in &present.0 {
        if !entry.kind.is_empty() || entry.connect.native || entry.port == 0 {
            continue;
        }
        match (id.parse(), entry.service.parse()) {
            (Ok(instance), Ok(service)) => services.push(local_service(instance, service, entry)),
            _no_name => unusable.push(id.clone()),
        }
    }
    (services, unusable)
}

fn local_service(instance: InstanceId, service: ServiceName, entry: &ServiceEntry) -> LocalService {
    let weight = |weight: i64| u32::try_from(weight).unwrap_or(0);
    let address: Option<IpAddr> = entry.address.parse().ok();
    let weights = entry.weights.map(|weights| Weights {
        passing: weight(weights.passing),
        warning: weight(weights.warning),
    });
    LocalService {
        instance,
        service,
        address: address.filter(|address| !address.is_unspecified()),
        port: entry.port,
        tags: entry.tags.clone(),
        meta: entry.meta.clone(),
        weights: weights.unwrap_or_default(),
    }
}

/// Whose registrations these are, and where its tunnels end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnNode {
    /// The agent's node.
    pub name: NodeName,
    /// Where other nodes reach it.
    pub address: IpAddr,
    /// The agent's version.
    pub version: String,
}

impl OwnNode {
    /// The instance as the model has it: tunnels come in at `port`, the application is at `local`.
    pub fn instance(&self, service: &LocalService, port: u16, local: SocketAddr) -> Instance {
        let mut meta = service.meta.clone();
        let registered = SocketAddr::new(service.address.unwrap_or(self.address), service.port);
        // Others know the port of the application by `local` alone, and its address by that of the tunnel.
        if registered != SocketAddr::new(self.address, local.port()) {
            meta.insert(META_ADDRESS.to_owned(), registered.to_string());
        }
        Instance {
            id: service.instance.clone(),
            node: self.name.clone(),
            tunnel: SocketAddr::new(self.address, port),
            local,
            port: service.port,
            tags: service.tags.clone(),
            meta,
            health: Health::Passing,
            weights: service.weights,
            target: None,
        }
    }

    /// What to register so that `instance` is reached through this node.
    pub fn registration(&self, service: &ServiceName, instance: &Instance) -> Registration {
        let mut meta = instance.meta.clone();
        meta.insert(META_VERSION.to_owned(), self.version.clone());
        meta.insert(META_NODE.to_owned(), self.name.to_string());
        meta.insert(META_INSTANCE.to_owned(), instance.id.to_string());
        let weight = |weight: u32| i64::from(weight);
        Registration {
            id: format!("{ID_PREFIX}{}", instance.id),
            name: format!("{service}-sidestep-proxy"),
            kind: KIND,
            address: instance.tunnel.ip().to_string(),
            port: instance.tunnel.port(),
            tags: instance.tags.clone(),
            meta,
            weights: RegisteredWeights {
                passing: weight(instance.weights.passing),
                warning: weight(instance.weights.warning),
            },
            proxy: RegisteredProxy {
                destination_service_name: service.to_string(),
                local_service_address: instance.local.ip().to_string(),
                local_service_port: instance.local.port(),
            },
            checks: [
                Check {
                    name: "Sidestep takes tunnels",
                    tcp: Some(instance.tunnel.to_string()),
                    interval: Some(CHECK_INTERVAL),
                    timeout: Some(CHECK_TIMEOUT),
                    // It is open when it is registered.
                    status: Some("passing"),
                    alias_service: None,
                },
                Check {
                    name: "The instance behind it",
                    tcp: None,
                    interval: None,
                    timeout: None,
                    status: None,
                    alias_service: Some(instance.id.to_string()),
                },
            ],
        }
    }

    fn owns(&self, id: &str, entry: &ServiceEntry) -> bool {
        entry.kind == KIND
            && id.starts_with(ID_PREFIX)
            && entry.meta.get(META_NODE).map(String::as_str) == Some(self.name.as_str())
    }
}

/// The body of `PUT /v1/agent/service/register`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Registration {
    /// Unique on the node.
    #[serde(rename = "ID")]
    pub id: String,
    name: String,
    kind: &'static str,
    address: String,
    /// Where tunnels come in.
    pub port: u16,
    tags: Vec<String>,
    meta: BTreeMap<String, String>,
    weights: RegisteredWeights,
    proxy: RegisteredProxy,
    checks: [Check; 2],
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RegisteredWeights {
    passing: i64,
    warning: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RegisteredProxy {
    destination_service_name: String,
    local_service_address: String,
    local_service_port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    name: &'static str,
    #[serde(rename = "TCP", skip_serializing_if = "Option::is_none")]
    tcp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias_service: Option<String>,
}

impl Registration {
    /// Whether `entry` is what Consul shows of it. Its checks follow from the rest.
    fn is(&self, entry: &ServiceEntry) -> bool {
        let proxy = &entry.proxy;
        let weights = entry.weights.map(|weights| RegisteredWeights {
            passing: weights.passing,
            warning: weights.warning,
        });
        entry.kind == self.kind
            && entry.service == self.name
            && entry.address == self.address
            && entry.port == self.port
            && entry.tags == self.tags
            && entry.meta == self.meta
            && weights.as_ref() == Some(&self.weights)
            && proxy.destination_service_name == self.proxy.destination_service_name
            && proxy.destination_service_id.is_empty()
            && proxy.local_service_address == self.proxy.local_service_address
            && proxy.local_service_port == self.proxy.local_service_port
    }
}

/// What to do so that Consul's agent has what is wanted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To register, anew or again.
    pub register: Vec<Registration>,
    /// Ids to deregister: ours, of before.
    pub deregister: Vec<String>,
    /// Ids that we want and somebody else has. Left alone.
    pub taken: BTreeSet<String>,
}

/// Compares. What is not ours is never touched.
///
/// Only what is reached at one of the ports `listening` is registered. What an earlier life registered and is wanted
/// stays until then: the listener may be that of an agent which is being replaced.
pub fn plan(
    node: &OwnNode,
    wanted: Vec<Registration>,
    listening: &BTreeSet<u16>,
    present: &AgentServices,
) -> Plan {
    let ours = present.0.iter().filter(|(id, entry)| node.owns(id, entry));
    let is_wanted = |id: &String| wanted.iter().any(|wanted| wanted.id == *id);
    let stale = ours.map(|(id, _)| id).filter(|id| !is_wanted(id)).cloned();
    let mut plan = Plan {
        deregister: stale.collect(),
        ..Plan::default()
    };
    for registration in wanted {
        match present.0.get(&registration.id) {
            Some(entry) if !node.owns(&registration.id, entry) => {
                plan.taken.insert(registration.id);
            }
            Some(entry) if registration.is(entry) => {}
            Some(_) | None if listening.contains(&registration.port) => {
                plan.register.push(registration);
            }
            Some(_) | None => {}
        }
    }
    plan
}

#[cfg(test)]
mod tests;
