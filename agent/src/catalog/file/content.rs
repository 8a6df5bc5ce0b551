//! What one catalog file says, checked: text in, services and intentions out, or why not. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    FileContext,
    entries::{Definitions, Node, OldIntention, Service, ServiceDefaults, ServiceIntentions},
    format::{self, Format},
};
use crate::{
    catalog::{
        destination::Destination,
        model::{
            self, Health, Instance, Intention, IntentionAction, IntentionMatch, NodeName,
            ServiceName, Weights,
        },
    },
    whole_number::Whole,
};

/// What one file contributes to the snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(super) instances: Vec<Registered>,
    pub(super) intentions: Vec<Intention>,
    pub(super) defaults: Vec<(ServiceName, model::ServiceDefaults)>,
    /// What was read and has no effect.
    pub(super) notes: Vec<String>,
}

/// An instance and what its registration says about its service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registered {
    pub(super) service: ServiceName,
    pub(super) instance: Arc<Instance>,
    pub(super) node_address: Option<IpAddr>,
    pub(super) explicit_addresses: Vec<IpAddr>,
    pub(super) virtual_ports: Vec<u16>,
}

/// Consul's kinds of config entries that Sidestep reads over.
const UNUSED_KINDS: [&str; 15] = [
    "proxy-defaults",
    "service-router",
    "service-splitter",
    "service-resolver",
    "ingress-gateway",
    "terminating-gateway",
    "mesh",
    "exported-services",
    "api-gateway",
    "bound-api-gateway",
    "http-route",
    "tcp-route",
    "inline-certificate",
    "sameness-group",
    "jwt-provider",
];

/// Parses and checks a file. One wrong document makes the whole file wrong: half a file is no state anybody meant.
pub(crate) fn read(path: &Path, text: &str, context: &FileContext) -> Result<Content, String> {
    let format = Format::of(path).ok_or("expected a .yaml, .yml, .json or .hcl file")?;
    let mut content = Content::default();
    for (index, document) in format::parse(format, text)?.into_iter().enumerate() {
        read_document(document, context, &mut content)
            .map_err(|message| format!("document {}: {message}", index + 1))?;
    }
    Ok(content)
}

fn read_document(
    document: Value,
    context: &FileContext,
    content: &mut Content,
) -> Result<(), String> {
    let Value::Object(map) = &document else {
        return Err("expected an object with service, services or kind".to_owned());
    };
    if map.contains_key("source_name") {
        content.intentions.push(old_intention(typed(document)?)?);
        return Ok(());
    }
    let kind = map
        .get("kind")
        .map(|kind| kind.as_str().map(str::to_owned).ok_or(kind.clone()));
    match kind {
        None => definitions(typed(document)?, context, content),
        Some(Ok(kind)) if kind == "service-intentions" => {
            service_intentions(typed(document)?, content)
        }
        Some(Ok(kind)) if kind == "service-defaults" => {
            let (name, defaults) = service_defaults(typed(document)?, content)?;
            content.defaults.push((name, defaults));
            Ok(())
        }
        Some(Ok(kind)) if UNUSED_KINDS.contains(&kind.as_str()) => {
            content
                .notes
                .push(format!("config entries of kind {kind} have no effect yet"));
            Ok(())
        }
        Some(Ok(other)) => Err(format!(
            "kind: {other:?}: expected service-intentions, service-defaults or another config entry of Consul's"
        )),
        Some(Err(other)) => Err(format!("kind: {other}: expected a string")),
    }
}

fn typed<T: DeserializeOwned>(document: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(document).map_err(|error| error.to_string())
}

fn definitions(
    definitions: Definitions,
    context: &FileContext,
    content: &mut Content,
) -> Result<(), String> {
    let place = Place::of(definitions.node, context)?;
    for service in definitions
        .service
        .0
        .into_iter()
        .chain(definitions.services.0)
    {
        let name = service.name.clone();
        let registered = registered(service, &place, context)
            .map_err(|message| format!("service {name}: {message}"))?;
        content.instances.push(registered);
    }
    Ok(())
}

/// The node that services are on.
struct Place {
    node: NodeName,
    address: Option<IpAddr>,
}

impl Place {
    fn of(node: Option<Node>, context: &FileContext) -> Result<Self, String> {
        let Some(node) = node else {
            return Ok(Self {
                node: context.local_node.clone(),
                address: context.local_address,
            });
        };
        let address = match &node.address {
            Some(text) => Some(address("node.address", text)?),
            None if node.name == context.local_node => context.local_address,
            None => None,
        };
        Ok(Self {
            node: node.name,
            address,
        })
    }
}

fn registered(
    service: Service,
    place: &Place,
    context: &FileContext,
) -> Result<Registered, String> {
    let port = port("port", service.port)?;
    let own = service.address.as_deref().filter(|text| !text.is_empty());
    let own = own.map(|text| address("address", text)).transpose()?;
    let reached_at = own.or(place.address).ok_or_else(|| {
        format!(
            "address: not set, and the address of node {} is not known either",
            place.node
        )
    })?;
    let sidecar = service.connect.and_then(|connect| connect.sidecar_service);
    let sidecar_port = sidecar
        .as_ref()
        .and_then(|sidecar| sidecar.port)
        .map(|given| self::port("connect.sidecar_service.port", given))
        .transpose()?;
    let proxy = sidecar.and_then(|sidecar| sidecar.proxy);
    let local_address = match proxy
        .as_ref()
        .and_then(|p| p.local_service_address.as_deref())
    {
        Some(text) => address("connect.sidecar_service.proxy.local_service_address", text)?,
        None => IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    let local_port = match proxy.and_then(|p| p.local_service_port) {
        Some(given) => self::port("connect.sidecar_service.proxy.local_service_port", given)?,
        None => port,
    };
    let (explicit_addresses, virtual_ports) = virtual_addresses(&service.tagged_addresses)?;
    let checks = service.check.0.iter().chain(&service.checks.0);
    let id = match service.id {
        Some(id) => id,
        // Consul's default.
        None => service
            .name
            .as_str()
            .parse()
            .map_err(|error| format!("id: {error}"))?,
    };
    let weights = service.weights.map(|w| Weights {
        passing: w.passing.0,
        warning: w.warning.0,
    });
    Ok(Registered {
        service: service.name,
        node_address: place.address,
        instance: Arc::new(Instance {
            id,
            node: place.node.clone(),
            tunnel: SocketAddr::new(reached_at, sidecar_port.unwrap_or(context.tunnel_port)),
            local: SocketAddr::new(local_address, local_port),
            port,
            tags: service.tags,
            meta: service.meta,
            health: checks
                .map(|check| check.status)
                .max()
                .unwrap_or(Health::Passing),
            weights: weights.unwrap_or_default(),
            target: None,
        }),
        explicit_addresses,
        virtual_ports,
    })
}

/// `virtual` is what a user sets, `consul-virtual` what Consul's servers allocate; other tags are not virtual.
fn virtual_addresses(
    tagged: &BTreeMap<String, super::entries::TaggedAddress>,
) -> Result<(Vec<IpAddr>, Vec<u16>), String> {
    let (mut addresses, mut ports) = (Vec::new(), Vec::new());
    for tag in ["virtual", "consul-virtual"] {
        let Some(entry) = tagged.get(tag) else {
            continue;
        };
        let key = format!("tagged_addresses.{tag}.address");
        let parsed = address(&key, &entry.address)?;
        if parsed.is_loopback() || parsed.is_unspecified() || parsed.is_multicast() {
            return Err(format!(
                "{key}: {parsed}: expected a unicast address that is not loopback"
            ));
        }
        addresses.push(parsed);
        // Consul writes port 0 for "any".
        ports.extend(entry.port.map(|Whole(port)| port).filter(|port| *port != 0));
    }
    Ok((addresses, ports))
}

fn port(key: &str, Whole(port): Whole<u16>) -> Result<u16, String> {
    if port == 0 {
        return Err(format!("{key}: 0: expected 1 to 65535"));
    }
    Ok(port)
}

fn address(key: &str, text: &str) -> Result<IpAddr, String> {
    let parsed: IpAddr = text.parse().map_err(|_invalid| {
        format!("{key}: {text:?}: expected an IP address; host names are not resolved")
    })?;
    Ok(parsed.to_canonical())
}

fn service_intentions(entry: ServiceIntentions, content: &mut Content) -> Result<(), String> {
    let destination = side("name", &entry.name, entry.namespace.as_deref())?;
    for (index, source) in entry.sources.0.into_iter().enumerate() {
        let key = format!("sources[{index}].name");
        let action = match (source.action, source.permissions) {
            (Some(action), None) => action,
            (None, Some(_)) => {
                content.notes.push(format!(
                    "intention {} => {}: permissions of single requests are not supported: denied",
                    source.name, entry.name
                ));
                IntentionAction::Deny
            }
            (Some(_), Some(_)) | (None, None) => {
                return Err(format!(
                    "sources[{index}]: expected either action or permissions"
                ));
            }
        };
        content.intentions.push(Intention {
            source: side(&key, &source.name, source.namespace.as_deref())?,
            destination: destination.clone(),
            action,
            description: source.description,
            entry: Arc::default(),
        });
    }
    Ok(())
}

fn old_intention(entry: OldIntention) -> Result<Intention, String> {
    Ok(Intention {
        source: side(
            "source_name",
            &entry.source_name,
            entry.source_ns.as_deref(),
        )?,
        destination: side(
            "destination_name",
            &entry.destination_name,
            entry.destination_ns.as_deref(),
        )?,
        action: entry.action,
        description: entry.description,
        entry: Arc::default(),
    })
}

fn side(key: &str, name: &str, namespace: Option<&str>) -> Result<IntentionMatch, String> {
    let namespace = match namespace {
        None | Some("") => Some("default".into()),
        Some("*") => None,
        Some(other) => Some(other.into()),
    };
    let name: Option<ServiceName> = match name {
        "*" => None,
        exact => Some(exact.parse().map_err(|error| format!("{key}: {error}"))?),
    };
    if namespace.is_none() && name.is_some() {
        return Err(format!(
            "{key}: an exact name cannot follow the namespace *"
        ));
    }
    Ok(IntentionMatch { namespace, name })
}

fn service_defaults(
    entry: ServiceDefaults,
    content: &mut Content,
) -> Result<(ServiceName, model::ServiceDefaults), String> {
    let destination = entry
        .destination
        .map(|it| Destination::read(&it.addresses.0, it.port))
        .transpose()
        .map_err(|error| format!("service-defaults {}: {error}", entry.name))?;
    let unused: Vec<&str> = entry
        .rest
        .keys()
        .map(String::as_str)
        .filter(|key| !matches!(*key, "kind" | "meta" | "namespace" | "partition"))
        .collect();
    if !unused.is_empty() {
        let keys = unused.join(", ");
        content.notes.push(format!(
            "service-defaults {}: {keys}: no effect yet",
            entry.name
        ));
    }
    // Consul writes 0 for "not set".
    let nonzero = |n: &u32| *n != 0;
    let most = entry.max_inbound_connections.map(|Whole(most)| most);
    let defaults = model::ServiceDefaults {
        protocol: entry.protocol.filter(|protocol| !protocol.is_empty()),
        max_inbound_connections: most.filter(nonzero),
        local_connect_timeout: entry
            .local_connect_timeout_ms
            .filter(|ms| *ms != 0)
            .map(Duration::from_millis),
        destination: destination.map(Arc::new),
    };
    Ok((entry.name, defaults))
}
