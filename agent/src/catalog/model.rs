//! The catalog's model: services, instances, intentions, in Consul's terms.
//!
//! Sources build a [`Snapshot`]; nobody changes one. It holds no address that Sidestep allocates:
//! that is [`super::vip`], and the two meet in [`super::store`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::destination::Destination;

/// Everything one source said at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Whether the source could be read whole since the agent started. Until then what is missing here may only
    /// be unreadable, and nothing that an agent before knew is removed.
    pub is_whole: bool,
    /// Services by name. A service with only a `service-defaults` entry is here too, without instances.
    pub services: BTreeMap<ServiceName, Arc<Service>>,
    /// Where nodes are, as far as the source says.
    pub nodes: BTreeMap<NodeName, IpAddr>,
    /// Intentions in no particular order; [`crate::policy`] sorts them by precedence.
    pub intentions: Vec<Intention>,
    /// The answer where no intention matches, if the source has one; else the configuration's.
    pub default_intention: Option<IntentionAction>,
}

/// A service: what has a virtual address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name, unique within the snapshot.
    pub name: ServiceName,
    /// Instances in the order of their ids.
    pub instances: Vec<Arc<Instance>>,
    /// Addresses given explicitly (`TaggedAddresses.virtual`, `consul-virtual`); empty if Sidestep allocates.
    pub explicit_addresses: BTreeSet<IpAddr>,
    /// The ports that answer on every virtual address of the service.
    pub ports: Ports,
    /// From `service-defaults`, or the defaults of that kind.
    pub defaults: ServiceDefaults,
}

impl Service {
    /// Where it is, if it is outside the mesh.
    pub fn destination(&self) -> Option<&Arc<Destination>> {
        self.defaults.destination.as_ref()
    }

    /// A service outside the mesh. What is called at its addresses is captured like everything at virtual ones.
    pub fn outside(
        name: ServiceName,
        destination: &Destination,
        defaults: ServiceDefaults,
    ) -> Self {
        Self {
            name,
            instances: vec![],
            explicit_addresses: destination.addresses(),
            ports: Ports::Listed(BTreeSet::from([destination.port])),
            defaults,
        }
    }
}

/// At which ports of its virtual addresses a service answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    /// At these.
    Listed(BTreeSet<u16>),
    /// At every one: the address alone says which service is meant, as with Consul's virtual addresses.
    Any,
}

/// The part of a `service-defaults` config entry that Sidestep honours.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceDefaults {
    /// `Protocol`; Sidestep carries every protocol as bytes and keeps this for display and later use.
    pub protocol: Option<String>,
    /// `MaxInboundConnections`: how many connections one instance takes at once; `None` is unlimited.
    pub max_inbound_connections: Option<u32>,
    /// `UpstreamConfig.Defaults.ConnectTimeoutMs` or `LocalConnectTimeoutMs`: the dial to the application.
    pub local_connect_timeout: Option<std::time::Duration>,
    /// `Destination`: where the service is, if it is outside the mesh. Such a service has no instances.
    pub destination: Option<Arc<Destination>>,
}

/// `Meta` of an instance: the address and port that it registered, where these do not follow from where its node takes
/// tunnels for it. Sidestep's own registrations with Consul say so of the instance behind them.
pub const META_ADDRESS: &str = "sidestep-address";

/// One running copy of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Consul's service id, unique per node.
    pub id: InstanceId,
    /// The node it runs on.
    pub node: NodeName,
    /// Where its node takes tunnels for it: the instance's address (or its node's) and the sidecar port.
    pub tunnel: SocketAddr,
    /// Where its own node reaches the application (`Proxy.LocalServiceAddress`, `LocalServicePort`).
    pub local: SocketAddr,
    /// The port that the instance registered.
    pub port: u16,
    /// Tags as registered.
    pub tags: Vec<String>,
    /// Meta as registered.
    pub meta: BTreeMap<String, String>,
    /// The worst of its checks.
    pub health: Health,
    /// `Weights.Passing` and `Weights.Warning`.
    pub weights: Weights,
    /// Whose instance it is, if not one of the service that lists it: see [`Target`].
    pub target: Option<Target>,
}

/// Whose instance stands in for a service, because a `service-resolver` redirects the service or fails over. A tunnel
/// to it expects the target's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The service that the instance proves to be.
    pub service: ServiceName,
    /// The datacenter in its certificate.
    pub datacenter: Arc<str>,
    /// The TLS server name to ask for, where a gateway on the way goes by it.
    pub sni: Option<Arc<str>>,
}

impl Instance {
    /// Where it is called by who knows nothing of the mesh: the address and port that it registered.
    pub fn address(&self) -> SocketAddr {
        let said = self.meta.get(META_ADDRESS);
        let said = said.and_then(|text| text.parse::<SocketAddr>().ok());
        let (ip, port) = said.map_or((self.tunnel.ip(), self.port), |it| (it.ip(), it.port()));
        SocketAddr::new(ip.to_canonical(), port)
    }

    /// The share of traffic it asks for at its present health; 0 means: send nothing.
    pub fn weight(&self) -> u32 {
        match self.health {
            Health::Passing => self.weights.passing,
            Health::Warning => self.weights.warning,
            Health::Critical => 0,
        }
    }
}

/// A check's status, ordered from good to bad, so that `max` is the worst.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// `passing`, also when there is no check.
    #[default]
    Passing,
    /// `warning`: still takes traffic.
    Warning,
    /// `critical` or `maintenance`: takes none.
    #[serde(alias = "maintenance")]
    Critical,
}

/// Consul's `Weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights {
    /// While passing.
    pub passing: u32,
    /// While warning.
    pub warning: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            passing: 1,
            warning: 1,
        }
    }
}

/// May calls from `source` to `destination` be made?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intention {
    /// Who calls.
    pub source: IntentionMatch,
    /// Who is called.
    pub destination: IntentionMatch,
    /// The answer.
    pub action: IntentionAction,
    /// Free text of the author.
    pub description: String,
    /// Where it is written, for people: a file, an entry of Consul.
    pub entry: Arc<str>,
}

/// One side of an intention. A wildcard namespace with an exact name does not exist in Consul.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntentionMatch {
    /// `None` is `*`.
    pub namespace: Option<Arc<str>>,
    /// `None` is `*`.
    pub name: Option<ServiceName>,
}

impl fmt::Display for IntentionMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_deref() {
            Some("default") => {}
            Some(namespace) => write!(f, "{namespace}/")?,
            None => f.write_str("*/")?,
        }
        f.write_str(self.name.as_ref().map_or("*", ServiceName::as_str))
    }
}

/// What an intention answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IntentionAction {
    /// The call may be made.
    Allow,
    /// The call is refused.
    Deny,
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                $check($what, text).map(|()| Self(text.into()))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name_type!(
    /// A service's name: 1 to 128 of ASCII letters, digits, `-`, `_`, `.`, beginning with a letter or digit.
    ServiceName,
    "service name",
    check_strictly
);
name_type!(
    /// A node's name: 1 to 256 characters, none of them a control character.
    NodeName,
    "node name",
    check_text
);
name_type!(
    /// An instance's id (Consul's service id): 1 to 256 characters, none of them a control character. Schedulers write
    /// all sorts of things into it: Nomad `_nomad-task-...`, others slashes.
    InstanceId,
    "instance id",
    check_text
);

/// A name that is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} {text:?}: expected {expected}")]
pub struct NameError {
    what: &'static str,
    text: String,
    expected: &'static str,
}

/// What is part of addresses and of other names.
fn check_strictly(what: &'static str, text: &str) -> Result<(), NameError> {
    let good = text.len() <= 128
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
    let expected = "1 to 128 characters out of a-z A-Z 0-9 - _ . that begin with a letter or digit";
    name_error(good, what, text, expected)
}

/// What is only shown and compared.
fn check_text(what: &'static str, text: &str) -> Result<(), NameError> {
    let characters = text.chars().take(257).count();
    let good = (1..=256).contains(&characters) && !text.chars().any(char::is_control);
    name_error(
        good,
        what,
        text,
        "1 to 256 characters, none of them a control character",
    )
}

fn name_error(
    is_good: bool,
    what: &'static str,
    text: &str,
    expected: &'static str,
) -> Result<(), NameError> {
    if is_good {
        return Ok(());
    }
    Err(NameError {
        what,
        text: text.to_owned(),
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["web", "db-1", "a.b_c", "9lives"] {
            assert_eq!(
                good.parse::<ServiceName>().map(|n| n.to_string()),
                Ok(good.to_owned())
            );
        }
        for bad in ["", "-web", "we b", "a/b", "é", &"x".repeat(129)] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?} passed");
        }
    }

    #[test]
    fn ids_are_whatever_schedulers_make_of_them() {
        for good in [
            "_nomad-task-1-group-api-db-5432",
            "host:db/5432",
            "é",
            "a b",
        ] {
            assert!(good.parse::<InstanceId>().is_ok(), "{good:?} was refused");
        }
        for bad in ["", "a\nb", &"x".repeat(257)] {
            assert!(bad.parse::<InstanceId>().is_err(), "{bad:?} passed");
        }
    }

    #[test]
    fn only_critical_instances_take_no_traffic() {
        let weights = Weights {
            passing: 10,
            warning: 1,
        };
        let instance = |health| Instance {
            id: "web-1".parse().unwrap(),
            node: "a".parse().unwrap(),
            tunnel: ([192, 0, 2, 1], 15443).into(),
            local: ([127, 0, 0, 1], 8080).into(),
            port: 8080,
            tags: vec![],
            meta: BTreeMap::new(),
            health,
            weights,
            target: None,
        };
        assert_eq!(instance(Health::Passing).weight(), 10);
        assert_eq!(instance(Health::Warning).weight(), 1);
        assert_eq!(instance(Health::Critical).weight(), 0);
    }
}
