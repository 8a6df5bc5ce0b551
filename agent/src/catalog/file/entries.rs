//! What a document of a catalog file may say, as Consul spells it. Types only; meaning is in [`super::content`].

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use crate::{
    catalog::model::{Health, InstanceId, IntentionAction, NodeName, ServiceName},
    whole_number::Whole,
};

/// Service definitions as Consul's agent reads them, with the node they are on.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Definitions {
    pub(super) node: Option<Node>,
    #[serde(default)]
    pub(super) service: OneOrMany<Service>,
    #[serde(default)]
    pub(super) services: OneOrMany<Service>,
}

/// The node that the services of the same document are on; this node if it is left out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub(super) name: NodeName,
    pub(super) address: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Service {
    pub(super) name: ServiceName,
    pub(super) id: Option<InstanceId>,
    #[serde(default)]
    pub(super) tags: Vec<String>,
    pub(super) address: Option<String>,
    pub(super) port: Whole<u16>,
    #[serde(default)]
    pub(super) meta: BTreeMap<String, String>,
    pub(super) weights: Option<Weights>,
    #[serde(default)]
    pub(super) check: OneOrMany<Check>,
    #[serde(default)]
    pub(super) checks: OneOrMany<Check>,
    #[serde(default)]
    pub(super) tagged_addresses: BTreeMap<String, TaggedAddress>,
    pub(super) connect: Option<Connect>,
    // Fields of Consul's without a meaning here; named, so that a misspelt field is still an error.
    #[serde(rename = "enable_tag_override", default)]
    _enable_tag_override: Option<IgnoredAny>,
    #[serde(rename = "token", default)]
    _token: Option<IgnoredAny>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Weights {
    #[serde(default = "one")]
    pub(super) passing: Whole<u32>,
    #[serde(default = "one")]
    pub(super) warning: Whole<u32>,
}

fn one() -> Whole<u32> {
    Whole(1)
}

/// Only the status counts: nobody runs the checks of a file.
#[derive(Debug, Deserialize)]
pub(super) struct Check {
    #[serde(default)]
    pub(super) status: Health,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TaggedAddress {
    pub(super) address: String,
    pub(super) port: Option<Whole<u16>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Connect {
    pub(super) sidecar_service: Option<SidecarService>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SidecarService {
    pub(super) port: Option<Whole<u16>>,
    pub(super) proxy: Option<Proxy>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Proxy {
    pub(super) local_service_address: Option<String>,
    pub(super) local_service_port: Option<Whole<u16>>,
}

/// `service-intentions`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceIntentions {
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    pub(super) name: String,
    pub(super) namespace: Option<String>,
    #[serde(rename = "meta", default)]
    _meta: Option<IgnoredAny>,
    #[serde(default)]
    pub(super) sources: OneOrMany<Source>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) namespace: Option<String>,
    pub(super) action: Option<IntentionAction>,
    #[serde(default)]
    pub(super) description: String,
    /// L7; Consul treats it as deny where the service is not HTTP, and so do we everywhere.
    pub(super) permissions: Option<IgnoredAny>,
    // Consul writes these when it shows an entry.
    #[serde(rename = "type", default)]
    _type: Option<IgnoredAny>,
    #[serde(rename = "precedence", default)]
    _precedence: Option<IgnoredAny>,
}

/// `service-defaults`; what is not named here is accepted and has no effect yet.
#[derive(Debug, Deserialize)]
pub(super) struct ServiceDefaults {
    pub(super) name: ServiceName,
    pub(super) protocol: Option<String>,
    pub(super) max_inbound_connections: Option<Whole<u32>>,
    pub(super) local_connect_timeout_ms: Option<u64>,
    pub(super) destination: Option<Destination>,
    #[serde(flatten)]
    pub(super) rest: BTreeMap<String, Value>,
}

/// Where a service is that is outside the mesh.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Destination {
    #[serde(default)]
    pub(super) addresses: OneOrMany<String>,
    pub(super) port: i64,
}

/// An intention as Consul's API had it before 1.9.
#[derive(Debug, Deserialize)]
pub(super) struct OldIntention {
    pub(super) source_name: String,
    pub(super) source_ns: Option<String>,
    pub(super) destination_name: String,
    pub(super) destination_ns: Option<String>,
    pub(super) action: IntentionAction,
    #[serde(default)]
    pub(super) description: String,
}

/// A block given once, several times, or as a list.
#[derive(Debug)]
pub(super) struct OneOrMany<T>(pub(super) Vec<T>);

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: serde::de::DeserializeOwned> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // Not an untagged enum: that would swallow which field is wrong.
        let value = Value::deserialize(from)?;
        let values = match value {
            Value::Array(values) => values,
            Value::Null => Vec::new(),
            one @ (Value::Object(_) | Value::String(_) | Value::Number(_) | Value::Bool(_)) => {
                vec![one]
            }
        };
        values
            .into_iter()
            .map(|value| serde_path_to_error::deserialize(value).map_err(serde::de::Error::custom))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}
