//! What is read of Consul's answers. Tolerant: of fields that are not named here, of missing ones, and of `null` where
//! a list or a map is meant, which Consul writes for an empty one in places.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, de::IgnoredAny};

use super::judge::Content;

/// `null` as nothing.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Option::deserialize(from).map(Option::unwrap_or_default)
}

/// Consul takes any number as a port; what is none, nobody can be reached at, as with 0.
fn port<'de, D: Deserializer<'de>>(from: D) -> Result<u16, D::Error> {
    let number = Option::<i64>::deserialize(from)?;
    Ok(number.and_then(|n| u16::try_from(n).ok()).unwrap_or(0))
}

/// How many there are, whatever they are.
fn length<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    Option::<Vec<IgnoredAny>>::deserialize(from).map(|list| list.map_or(0, |list| list.len()))
}

/// A list that may be `null`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct List<T: Default + for<'a> Deserialize<'a>>(
    /// The elements.
    #[serde(deserialize_with = "or_default")]
    pub Vec<T>,
);

impl<T: Default + for<'a> Deserialize<'a>> Content for List<T> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `/v1/catalog/services`: tags by service. Proxies are listed as well.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ServiceNames(
    /// By name.
    #[serde(deserialize_with = "or_default")]
    pub BTreeMap<String, Option<Vec<String>>>,
);

impl Content for ServiceNames {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An element of `/v1/health/service/:name` and `/v1/health/connect/:name`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HealthEntry {
    /// The node.
    #[serde(default, deserialize_with = "or_default")]
    pub node: Node,
    /// The instance.
    #[serde(default, deserialize_with = "or_default")]
    pub service: ServiceEntry,
    /// Of the node and of the instance.
    #[serde(default, deserialize_with = "or_default")]
    pub checks: Vec<Check>,
}

/// A node of Consul's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    /// Its name.
    #[serde(default, deserialize_with = "or_default")]
    pub node: String,
    /// Where its services are that name no address.
    #[serde(default, deserialize_with = "or_default")]
    pub address: String,
    /// Its datacenter.
    #[serde(default, deserialize_with = "or_default")]
    pub datacenter: String,
    /// Addresses for a purpose: `lan`, `wan`.
    #[serde(default, deserialize_with = "or_default")]
    pub tagged_addresses: BTreeMap<String, String>,
}

/// An instance of a service, or a proxy in front of one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ServiceEntry {
    /// Empty for an ordinary service, or `connect-proxy`, `mesh-gateway`, ...
    #[serde(default, deserialize_with = "or_default")]
    pub kind: String,
    /// Unique on the node.
    #[serde(rename = "ID", default, deserialize_with = "or_default")]
    pub id: String,
    /// Its service's name; of a proxy, the proxy's own.
    #[serde(default, deserialize_with = "or_default")]
    pub service: String,
    /// As registered.
    #[serde(default, deserialize_with = "or_default")]
    pub tags: Vec<String>,
    /// The node's if empty.
    #[serde(default, deserialize_with = "or_default")]
    pub address: String,
    /// Addresses for a purpose.
    #[serde(default, deserialize_with = "or_default")]
    pub tagged_addresses: BTreeMap<String, TaggedAddress>,
    /// As registered.
    #[serde(default, deserialize_with = "or_default")]
    pub meta: BTreeMap<String, String>,
    /// As registered; 0 if none was.
    #[serde(default, deserialize_with = "port")]
    pub port: u16,
    /// As registered.
    #[serde(default)]
    pub weights: Option<Weights>,
    /// Of a proxy: in front of what.
    #[serde(default, deserialize_with = "or_default")]
    pub proxy: Proxy,
    /// Whether it speaks mutual TLS itself.
    #[serde(default, deserialize_with = "or_default")]
    pub connect: Connect,
    /// Consul Enterprise's namespace.
    #[serde(default, deserialize_with = "or_default")]
    pub namespace: String,
    /// Consul Enterprise's partition.
    #[serde(default, deserialize_with = "or_default")]
    pub partition: String,
}

/// An address for a purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TaggedAddress {
    /// An IP address.
    #[serde(default, deserialize_with = "or_default")]
    pub address: String,
    /// 0 is any.
    #[serde(default, deserialize_with = "port")]
    pub port: u16,
}

/// Shares of traffic. Signed, as Consul's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Weights {
    /// While all checks pass.
    #[serde(default = "one")]
    pub passing: i64,
    /// While one warns.
    #[serde(default = "one")]
    pub warning: i64,
}

fn one() -> i64 {
    1
}

/// In front of what a proxy is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Proxy {
    /// The service.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_service_name: String,
    /// Its instance; empty if the proxy is not of a certain one.
    #[serde(
        rename = "DestinationServiceID",
        default,
        deserialize_with = "or_default"
    )]
    pub destination_service_id: String,
    /// Where it reaches the application, `127.0.0.1` if empty.
    #[serde(default, deserialize_with = "or_default")]
    pub local_service_address: String,
    /// And at which port; 0 if not set.
    #[serde(default, deserialize_with = "port")]
    pub local_service_port: u16,
    /// Local ports that stand for services.
    #[serde(default, deserialize_with = "or_default")]
    pub upstreams: Vec<Upstream>,
}

/// A local port that stands for a service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Upstream {
    /// `service`, also if empty, or `prepared_query`.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_type: String,
    /// The service's name, or the query's name or id.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_name: String,
    /// Of Consul Enterprise; empty for the proxy's own.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_namespace: String,
    /// Another cluster.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_peer: String,
    /// Another datacenter; empty for the own one.
    #[serde(default, deserialize_with = "or_default")]
    pub datacenter: String,
    /// `127.0.0.1` if empty.
    #[serde(default, deserialize_with = "or_default")]
    pub local_bind_address: String,
    /// 0 with a path, and where a transparent proxy needs no port.
    #[serde(default, deserialize_with = "port")]
    pub local_bind_port: u16,
    /// A Unix socket in place of a port.
    #[serde(default, deserialize_with = "or_default")]
    pub local_bind_socket_path: String,
    /// The mode of that socket's file, in octal; empty if not set.
    #[serde(default, deserialize_with = "or_default")]
    pub local_bind_socket_mode: String,
}

/// Whether an instance speaks mutual TLS itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Connect {
    /// It does.
    #[serde(default, deserialize_with = "or_default")]
    pub native: bool,
}

/// A check. Its output is not read: it changes all the time and decides nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Check {
    /// `passing`, `warning`, `critical`, or what a later Consul calls it.
    #[serde(default, deserialize_with = "or_default")]
    pub status: String,
}

/// An element of `/v1/connect/intentions`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Intention {
    /// Unique; empty if it comes from a config entry.
    #[serde(rename = "ID", default, deserialize_with = "or_default")]
    pub id: String,
    /// Free text.
    #[serde(default, deserialize_with = "or_default")]
    pub description: String,
    /// The caller's namespace, `*` for every one.
    #[serde(rename = "SourceNS", default, deserialize_with = "or_default")]
    pub source_ns: String,
    /// The caller, `*` for every one.
    #[serde(default, deserialize_with = "or_default")]
    pub source_name: String,
    /// Set if the caller is of another cluster.
    #[serde(default, deserialize_with = "or_default")]
    pub source_peer: String,
    /// The caller's partition.
    #[serde(default, deserialize_with = "or_default")]
    pub source_partition: String,
    /// Set if the caller is any of a group (Consul Enterprise).
    #[serde(default, deserialize_with = "or_default")]
    pub source_sameness_group: String,
    /// `consul`, and nothing else so far.
    #[serde(default, deserialize_with = "or_default")]
    pub source_type: String,
    /// The callee's namespace, `*` for every one.
    #[serde(rename = "DestinationNS", default, deserialize_with = "or_default")]
    pub destination_ns: String,
    /// The callee, `*` for every one.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_name: String,
    /// The callee's partition.
    #[serde(default, deserialize_with = "or_default")]
    pub destination_partition: String,
    /// `allow` or `deny`; empty if there are permissions.
    #[serde(default, deserialize_with = "or_default")]
    pub action: String,
    /// Whether callers must show a token in each HTTP request.
    #[serde(rename = "JWT", default)]
    pub jwt: Option<IgnoredAny>,
    /// How many rules about HTTP requests there are. They are not read.
    #[serde(default, deserialize_with = "length")]
    pub permissions: usize,
}

/// `/v1/connect/intentions/check`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IntentionCheck {
    /// Whether the call may be made.
    pub allowed: bool,
}

/// `/v1/agent/services`: what is registered with the agent itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct AgentServices(
    /// By id.
    #[serde(deserialize_with = "or_default")]
    pub BTreeMap<String, ServiceEntry>,
);

impl Content for AgentServices {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `/v1/agent/self`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AgentSelf {
    /// What the agent runs with.
    pub config: AgentConfig,
    /// What it is to its cluster.
    #[serde(default)]
    pub member: AgentMember,
    /// What it says of itself for finding faults.
    #[serde(default, rename = "DebugConfig")]
    pub debug: AgentDebug,
}

/// The part of what an agent says for finding faults that has been there in every version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct AgentDebug {
    /// Where it answers DNS, as `udp://127.0.0.1:8600`; nowhere, if it does not.
    #[serde(default, rename = "DNSAddrs", deserialize_with = "or_default")]
    pub dns_addresses: Vec<String>,
    /// The domain that it answers for.
    #[serde(default, rename = "DNSDomain", deserialize_with = "or_default")]
    pub dns_domain: String,
}

/// An agent as the members of its cluster know it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AgentMember {
    /// The address that it advertises.
    #[serde(default, deserialize_with = "or_default")]
    pub addr: String,
}

/// The part of an agent's configuration that every version shows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AgentConfig {
    /// Its datacenter.
    pub datacenter: String,
    /// The name of its node.
    pub node_name: String,
    /// Consul's version.
    #[serde(default, deserialize_with = "or_default")]
    pub version: String,
}

/// `/v1/agent/connect/ca/roots`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Roots {
    /// The one that signs now. Nothing depends on it: all roots are trusted.
    #[serde(rename = "ActiveRootID", default, deserialize_with = "or_default")]
    pub active_root_id: String,
    /// Of every identity in the cluster.
    #[serde(default, deserialize_with = "or_default")]
    pub trust_domain: String,
    /// All that are trusted.
    #[serde(default, deserialize_with = "or_default")]
    pub roots: Vec<Root>,
}

/// One root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Root {
    /// Made of its key.
    #[serde(rename = "ID", default, deserialize_with = "or_default")]
    pub id: String,
    /// In PEM.
    #[serde(default, deserialize_with = "or_default")]
    pub root_cert: String,
}

impl Content for Roots {
    fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }
}

/// `/v1/agent/connect/ca/leaf/:service`, without the key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct LeafCertificate {
    /// The chain in PEM, the leaf first.
    #[serde(rename = "CertPEM", default, deserialize_with = "or_default")]
    pub certificate: String,
}

impl Content for LeafCertificate {
    fn is_empty(&self) -> bool {
        self.certificate.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_nothing() {
        for text in ["null", "[]"] {
            let list: List<HealthEntry> = serde_json::from_str(text).unwrap();
            assert!(list.is_empty());
        }
        let names: ServiceNames = serde_json::from_str("null").unwrap();
        assert!(names.is_empty());
        let entry = r#"{"Node":null,"Service":{"ID":"a","Tags":null,"Meta":null,"Proxy":null,"Weights":null},"Checks":null}"#;
        let entry: HealthEntry = serde_json::from_str(entry).unwrap();
        assert_eq!(entry.service.id, "a");
        let names: ServiceNames =
            serde_json::from_str(r#"{"consul":[],"db":null,"web":["v1"]}"#).unwrap();
        assert_eq!(names.0.len(), 3);
    }

    #[test]
    fn what_is_not_known_is_passed_over() {
        let entry = r#"{"Node":{"Node":"n","Address":"192.0.2.1","Locality":{"Zone":"a"}},
            "Service":{"ID":"db-proxy","Kind":"connect-proxy","Port":21000,"Ports":[{"Name":"x"}],"PeerName":"",
                "Proxy":{"DestinationServiceName":"db","Mode":"transparent","Upstreams":[{"x":1}]},"Connect":{}},
            "Checks":[{"Status":"passing","Output":"fine"}],"New":{"a":[1]}}"#;
        let entry: HealthEntry = serde_json::from_str(entry).unwrap();
        assert_eq!(entry.service.proxy.destination_service_name, "db");
        assert_eq!(entry.service.port, 21000);
    }
}
