//! What config entries say about services, beside intentions and resolvers. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    catalog::{
        destination::Destination,
        model::{ServiceDefaults, ServiceName},
    },
    consul::{answers::List, judge::Content},
};

/// `/v1/config/service-defaults`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "List<DefaultsEntry>")]
pub(super) struct AllDefaults {
    pub(super) by_service: BTreeMap<ServiceName, ServiceDefaults>,
    /// Destinations that cannot be called.
    pub(super) problems: Vec<String>,
}

impl Content for AllDefaults {
    fn is_empty(&self) -> bool {
        self.by_service.is_empty()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DefaultsEntry {
    #[serde(default)]
    name: String,
    #[serde(default)]
    protocol: Option<String>,
    #[serde(default)]
    max_inbound_connections: Option<i64>,
    #[serde(default)]
    local_connect_timeout_ms: Option<i64>,
    #[serde(default)]
    destination: Option<DestinationEntry>,
}

/// Since Consul 1.13. Source: Consul's documentation, "Service defaults configuration reference", `Destination`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DestinationEntry {
    #[serde(default)]
    addresses: Option<Vec<String>>,
    #[serde(default)]
    port: i64,
}

impl From<List<DefaultsEntry>> for AllDefaults {
    fn from(List(entries): List<DefaultsEntry>) -> Self {
        let mut problems = vec![];
        let mut read = |entry: DefaultsEntry| {
            let name: ServiceName = entry.name.parse().ok()?;
            let destination = entry.destination.and_then(|it| {
                let addresses = it.addresses.unwrap_or_default();
                let read = Destination::read(&addresses, it.port);
                read.map_err(|error| problems.push(format!("service-defaults {name}: {error}")))
                    .ok()
            });
            let defaults = ServiceDefaults {
                protocol: entry.protocol.filter(|protocol| !protocol.is_empty()),
                max_inbound_connections: entry.max_inbound_connections.and_then(positive),
                local_connect_timeout: entry.local_connect_timeout_ms.and_then(milliseconds),
                destination: destination.map(Arc::new),
            };
            Some((name, defaults))
        };
        Self {
            by_service: entries.into_iter().filter_map(&mut read).collect(),
            problems,
        }
    }
}

/// `/v1/config/proxy-defaults`: what holds for a service that does not say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "List<GlobalEntry>")]
pub(super) struct Global {
    defaults: ServiceDefaults,
    listed: usize,
}

impl Content for Global {
    fn is_empty(&self) -> bool {
        self.listed == 0
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GlobalEntry {
    #[serde(default)]
    name: String,
    #[serde(default)]
    config: Option<BTreeMap<String, Value>>,
}

impl From<List<GlobalEntry>> for Global {
    fn from(List(entries): List<GlobalEntry>) -> Self {
        let listed = entries.len();
        // Consul takes others as well and ignores them.
        let global = entries.into_iter().find(|entry| entry.name == "global");
        let config = global.and_then(|entry| entry.config).unwrap_or_default();
        let number = |key| config.get(key).and_then(whole);
        Self {
            defaults: ServiceDefaults {
                protocol: config
                    .get("protocol")
                    .and_then(Value::as_str)
                    .map(str::to_owned),
                max_inbound_connections: number("max_inbound_connections").and_then(positive),
                local_connect_timeout: number("local_connect_timeout_ms").and_then(milliseconds),
                destination: None,
            },
            listed,
        }
    }
}

impl Global {
    /// What holds for a service.
    pub(super) fn under(&self, own: Option<&ServiceDefaults>) -> ServiceDefaults {
        let own = own.cloned().unwrap_or_default();
        let global = &self.defaults;
        ServiceDefaults {
            protocol: own.protocol.or_else(|| global.protocol.clone()),
            max_inbound_connections: own
                .max_inbound_connections
                .or(global.max_inbound_connections),
            local_connect_timeout: own.local_connect_timeout.or(global.local_connect_timeout),
            destination: own.destination,
        }
    }
}

/// `/v1/config/service-resolver`: which services have one, and when they changed. What they mean, Consul compiles:
/// see [`super::chain`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "List<ResolverEntry>")]
pub(super) struct Resolvers(BTreeMap<ServiceName, u64>);

impl Content for Resolvers {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ResolverEntry {
    #[serde(default)]
    name: String,
    #[serde(default)]
    modify_index: u64,
}

impl From<List<ResolverEntry>> for Resolvers {
    fn from(List(entries): List<ResolverEntry>) -> Self {
        let read = |entry: ResolverEntry| Some((entry.name.parse().ok()?, entry.modify_index));
        Self(entries.into_iter().filter_map(read).collect())
    }
}

impl Resolvers {
    /// The services that have one.
    pub(super) fn names(&self) -> BTreeSet<ServiceName> {
        self.0.keys().cloned().collect()
    }

    /// Services that had one and have none in `now`.
    pub(super) fn vanished<'a>(&'a self, now: &'a Self) -> impl Iterator<Item = &'a ServiceName> {
        self.0.keys().filter(|name| !now.0.contains_key(*name))
    }
}

/// A number, also as HCL's authors and `consul config write` leave it: as text.
fn whole(value: &Value) -> Option<i64> {
    let of_float = |number: f64| format!("{number:.0}").parse().ok();
    value
        .as_i64()
        .or_else(|| value.as_f64().and_then(of_float))
        .or_else(|| value.as_str()?.trim().parse().ok())
}

/// Consul's 0 is "not set".
fn positive(number: i64) -> Option<u32> {
    u32::try_from(number).ok().filter(|number| *number > 0)
}

fn milliseconds(number: i64) -> Option<Duration> {
    let number = u64::try_from(number).ok().filter(|number| *number > 0);
    number.map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn what_a_service_does_not_say_the_global_entry_says() {
        let all: AllDefaults = from_value(json!([
            {"Kind": "service-defaults", "Name": "db", "Protocol": "tcp", "MaxInboundConnections": 10,
             "LocalConnectTimeoutMs": 250, "UpstreamConfig": {"Defaults": {}}, "ModifyIndex": 7},
            {"Kind": "service-defaults", "Name": "web", "Protocol": "", "MaxInboundConnections": 0},
            {"Kind": "service-defaults", "Name": "no name!"},
        ]))
        .unwrap();
        assert_eq!(all.by_service.len(), 2);
        let global: Global = from_value(json!([
            {"Kind": "proxy-defaults", "Name": "other", "Config": {"protocol": "grpc"}},
            {"Kind": "proxy-defaults", "Name": "global",
             "Config": {"protocol": "http", "local_connect_timeout_ms": "500", "max_inbound_connections": 7.0}},
        ]))
        .unwrap();
        let of = |name: &str| {
            let defaults = global.under(all.by_service.get(&name.parse().unwrap()));
            (
                defaults.protocol,
                defaults.max_inbound_connections,
                defaults.local_connect_timeout.map(|t| t.as_millis()),
            )
        };
        assert_eq!(of("db"), (Some("tcp".to_owned()), Some(10), Some(250)));
        for other in ["web", "unknown"] {
            assert_eq!(of(other), (Some("http".to_owned()), Some(7), Some(500)));
        }
        let none: Global = from_value(json!(null)).unwrap();
        assert!(none.is_empty());
        assert_eq!(none.under(None), ServiceDefaults::default());
    }

    /// As Consul's documentation has it, "Service defaults configuration reference": the Consul that tests are run with
    /// is older and knows no destinations.
    #[test]
    fn a_destination_is_read_as_documented() {
        let all: AllDefaults = from_value(json!([
            {"Kind": "service-defaults", "Name": "payments", "Protocol": "tcp",
             "MeshGateway": {}, "Expose": {}, "TransparentProxy": {},
             "Destination": {"Addresses": ["api.example.com"], "Port": 443},
             "CreateIndex": 18, "ModifyIndex": 18},
            {"Kind": "service-defaults", "Name": "legacy",
             "Destination": {"Addresses": ["192.0.2.9", "192.0.2.10"], "Port": 5432}},
            {"Kind": "service-defaults", "Name": "both",
             "Destination": {"Addresses": ["a.test", "192.0.2.9"], "Port": 443}},
            {"Kind": "service-defaults", "Name": "none", "Destination": null},
        ]))
        .unwrap();
        let place = |name: &str| {
            let defaults = &all.by_service[&name.parse().unwrap()];
            let own = Global::default().under(Some(defaults)).destination;
            own.map(|destination| destination.to_string())
        };
        assert_eq!(place("payments").unwrap(), "api.example.com:443");
        let legacy = "192.0.2.9:5432 192.0.2.10:5432";
        assert_eq!(place("legacy").unwrap(), legacy);
        assert_eq!((place("both"), place("none")), (None, None));
        let [problem] = all.problems.as_slice() else {
            panic!("{:?}", all.problems);
        };
        assert!(problem.contains("both: destination.addresses: \"a.test\" beside others"));
    }

    #[test]
    fn a_resolver_that_was_written_anew_is_another() {
        let read = |index: u64| -> Resolvers {
            from_value(json!([{"Kind": "service-resolver", "Name": "db", "ModifyIndex": index}]))
                .unwrap()
        };
        assert_ne!(read(7), read(8));
        assert_eq!(read(7).vanished(&read(8)).count(), 0);
        assert_eq!(read(7).vanished(&Resolvers::default()).count(), 1);
        assert_eq!(read(7).names().len(), 1);
    }
}
