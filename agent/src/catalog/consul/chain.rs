//! What `/v1/discovery-chain/<service>` says: whose instances take a service's connections. Pure.
//!
//! The chain is compiled by Consul for TCP, so that it is a resolver and nothing else: a target, and targets to fail
//! over to. Splitters and routers decide about requests, which are not looked into.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::services::Endpoints;
use crate::catalog::model::{Health, Instance, ServiceName, Target};

/// What to ask the discovery chain with.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ChainRequest {
    override_protocol: &'static str,
}

impl ChainRequest {
    pub(super) const TCP: Self = Self {
        override_protocol: "tcp",
    };
}

/// The answer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ChainAnswer {
    chain: Chain,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Chain {
    #[serde(default)]
    datacenter: String,
    #[serde(default)]
    start_node: String,
    #[serde(default)]
    nodes: Option<BTreeMap<String, Node>>,
    #[serde(default)]
    targets: Option<BTreeMap<String, ChainTarget>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(default)]
    resolver: Option<Resolver>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Resolver {
    #[serde(default)]
    target: String,
    #[serde(default)]
    failover: Option<Failover>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failover {
    #[serde(default)]
    targets: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ChainTarget {
    #[serde(default)]
    service: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    partition: String,
    #[serde(default)]
    datacenter: String,
    #[serde(default)]
    peer: String,
    #[serde(default)]
    external: bool,
    #[serde(default)]
    mesh_gateway: Option<MeshGateway>,
    #[serde(default)]
    subset: Option<Subset>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MeshGateway {
    #[serde(default)]
    mode: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Subset {
    #[serde(default)]
    filter: String,
    #[serde(default)]
    only_passing: bool,
}

/// Instances that are asked for together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Query {
    pub(super) service: ServiceName,
    /// `None` is our own.
    pub(super) datacenter: Option<Arc<str>>,
    /// Consul's expression; empty for all.
    pub(super) filter: Arc<str>,
}

impl Query {
    /// All instances of a service of our own datacenter.
    pub(super) fn of(service: &ServiceName) -> Self {
        Self {
            service: service.clone(),
            datacenter: None,
            filter: "".into(),
        }
    }

    /// Whether it is that, of some service.
    pub(super) fn is_plain(&self) -> bool {
        self.datacenter.is_none() && self.filter.is_empty()
    }
}

/// Whose instances take a service's connections: those of the first target that has a healthy one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) targets: Vec<PlanTarget>,
    /// What is configured and has no effect here.
    pub(super) problems: Vec<String>,
}

/// Some instances, and who they prove to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlanTarget {
    pub(super) query: Query,
    only_passing: bool,
    target: Option<Target>,
}

impl Plan {
    /// Without a resolver: the service's own.
    pub(super) fn plain(service: &ServiceName) -> Self {
        Self {
            targets: vec![PlanTarget {
                query: Query::of(service),
                only_passing: false,
                target: None,
            }],
            problems: Vec::new(),
        }
    }

    /// Out of the compiled chain of `service`.
    ///
    /// # Errors
    /// If the chain is none that an agent can follow.
    pub(super) fn of_chain(service: &ServiceName, answer: &ChainAnswer) -> Result<Self, String> {
        let chain = &answer.chain;
        let resolver = chain
            .nodes
            .iter()
            .flatten()
            .find(|(name, _)| **name == chain.start_node)
            .and_then(|(_, node)| node.resolver.as_ref())
            .ok_or_else(|| {
                let start = &chain.start_node;
                format!("the discovery chain begins with {start:?}, expected a resolver")
            })?;
        let failover = resolver
            .failover
            .iter()
            .flat_map(|f| f.targets.iter().flatten());
        let mut plan = Self {
            targets: Vec::new(),
            problems: Vec::new(),
        };
        for id in std::iter::once(&resolver.target).chain(failover) {
            let target = chain.targets.as_ref().and_then(|targets| targets.get(id));
            let target = target.ok_or_else(|| format!("target {id:?} is missing"))?;
            match plan_target(service, chain, target) {
                Ok(planned) => plan.targets.push(planned),
                Err(problem) => plan.problems.push(format!("target {id}: {problem}")),
            }
            let gateway = target
                .mesh_gateway
                .as_ref()
                .map(|gateway| gateway.mode.as_str());
            if let Some(mode @ ("local" | "remote")) = gateway
                && target.datacenter != chain.datacenter
            {
                plan.problems.push(format!(
                    "target {id}: mesh gateways ({mode}) have no effect yet, it is dialled directly"
                ));
            }
        }
        Ok(plan)
    }

    /// The instances to balance between. `None` while not enough of them is known: what is not read yet is no reason
    /// to fail over.
    pub(super) fn instances<'a>(
        &self,
        known: impl Fn(&Query) -> Option<&'a Endpoints>,
    ) -> Option<Vec<Arc<Instance>>> {
        let mut first = None;
        for target in &self.targets {
            let instances = target.instances(known(&target.query)?);
            if instances.iter().any(|instance| instance.weight() > 0) {
                return Some(instances);
            }
            first.get_or_insert(instances);
        }
        Some(first.unwrap_or_default())
    }
}

fn plan_target(
    service: &ServiceName,
    chain: &Chain,
    target: &ChainTarget,
) -> Result<PlanTarget, String> {
    let is_other = |name: &str| !matches!(name, "" | "default");
    if !target.peer.is_empty() {
        return Err("peers cannot be called yet".to_owned());
    }
    if is_other(&target.namespace) || is_other(&target.partition) {
        return Err("other namespaces and partitions cannot be called yet".to_owned());
    }
    if target.external {
        return Err("external services cannot be called yet".to_owned());
    }
    let name: ServiceName = target.service.parse().map_err(|error| format!("{error}"))?;
    let datacenter = Some(target.datacenter.as_str())
        .filter(|datacenter| !datacenter.is_empty() && *datacenter != chain.datacenter);
    let subset = target.subset.as_ref();
    let stands_in = name != *service || datacenter.is_some();
    Ok(PlanTarget {
        target: stands_in.then(|| Target {
            service: name.clone(),
            datacenter: datacenter.unwrap_or(&chain.datacenter).into(),
            sni: None,
        }),
        query: Query {
            service: name,
            datacenter: datacenter.map(Arc::from),
            filter: subset.map_or("", |subset| &subset.filter).into(),
        },
        only_passing: subset.is_some_and(|subset| subset.only_passing),
    })
}

impl PlanTarget {
    fn instances(&self, known: &Endpoints) -> Vec<Arc<Instance>> {
        let changes = self.target.is_some() || self.only_passing;
        known
            .list
            .iter()
            .map(|endpoint| {
                let instance = &endpoint.instance;
                if !changes {
                    return Arc::clone(instance);
                }
                let is_far = self.query.datacenter.is_some();
                Arc::new(Instance {
                    target: self.target.clone(),
                    tunnel: endpoint.wan.filter(|_| is_far).unwrap_or(instance.tunnel),
                    health: match instance.health {
                        Health::Warning if self.only_passing => Health::Critical,
                        Health::Passing | Health::Warning | Health::Critical => instance.health,
                    },
                    ..(**instance).clone()
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn chain(failover: &Value, targets: &Value) -> ChainAnswer {
        serde_json::from_value(json!({"Chain": {
            "ServiceName": "db", "Namespace": "default", "Datacenter": "dc1", "CustomizationHash": "9c0f",
            "Protocol": "tcp", "StartNode": "resolver:db.default.dc1", "AutoVirtualIPs": ["240.0.0.1"],
            "Nodes": {"resolver:db.default.dc1": {"Type": "resolver", "Name": "db.default.dc1",
                "Resolver": {"ConnectTimeout": "5s", "Target": "first", "Failover": failover}}},
            "Targets": targets,
        }}))
        .unwrap()
    }

    fn target(service: &str, datacenter: &str, subset: &Value) -> Value {
        json!({"ID": "x", "Service": service, "Namespace": "default", "Partition": "default",
            "Datacenter": datacenter, "MeshGateway": {}, "Subset": subset, "SNI": "s", "Name": "n"})
    }

    fn plan(failover: &Value, targets: &Value) -> Plan {
        Plan::of_chain(&"db".parse().unwrap(), &chain(failover, targets)).unwrap()
    }

    fn endpoints(id: &str, status: &str) -> Endpoints {
        serde_json::from_value(json!([{
            "Node": {"Node": "n1", "Address": "192.0.2.7", "TaggedAddresses": {"wan": "198.51.100.7"}},
            "Service": {"ID": id, "Port": 8443, "Connect": {"Native": true}},
            "Checks": [{"Status": status}]}]))
        .unwrap()
    }

    #[test]
    fn a_chain_of_the_service_itself_is_plain() {
        let plan = plan(
            &json!(null),
            &json!({"first": target("db", "dc1", &json!({}))}),
        );
        assert_eq!(plan, Plan::plain(&"db".parse().unwrap()));
    }

    #[test]
    fn subsets_redirects_and_failover_are_followed() {
        let plan = plan(
            &json!({"Targets": ["second", "third"]}),
            &json!({
                "first": target("db", "dc1", &json!({"Filter": "Service.Meta.version == v2", "OnlyPassing": true})),
                "second": target("db-standby", "dc1", &json!(null)),
                "third": target("db", "dc2", &json!({})),
            }),
        );
        assert!(plan.problems.is_empty());
        let shown: Vec<_> = plan
            .targets
            .iter()
            .map(|t| {
                let target = t
                    .target
                    .as_ref()
                    .map(|t| format!("{}@{}", t.service, t.datacenter));
                (
                    t.query.service.to_string(),
                    t.query.datacenter.as_deref(),
                    &*t.query.filter,
                    target,
                )
            })
            .collect();
        let db = || "db".to_owned();
        assert_eq!(
            shown,
            [
                (db(), None, "Service.Meta.version == v2", None),
                (
                    "db-standby".to_owned(),
                    None,
                    "",
                    Some("db-standby@dc1".to_owned())
                ),
                (db(), Some("dc2"), "", Some("db@dc2".to_owned())),
            ]
        );
    }

    #[test]
    fn the_first_target_with_a_healthy_instance_takes_all() {
        let plan = plan(
            &json!({"Targets": ["second"]}),
            &json!({
                "first": target("db", "dc1", &json!({"OnlyPassing": true})),
                "second": target("db", "dc2", &json!({})),
            }),
        );
        // first, second: which is chosen, where it is dialled
        let table = [
            (
                Some("passing"),
                Some("passing"),
                Some(("a", [192, 0, 2, 7])),
            ),
            (
                Some("warning"),
                Some("passing"),
                Some(("b", [198, 51, 100, 7])),
            ),
            (
                Some("critical"),
                Some("warning"),
                Some(("b", [198, 51, 100, 7])),
            ),
            (
                Some("critical"),
                Some("critical"),
                Some(("a", [192, 0, 2, 7])),
            ),
            (Some("critical"), None, None),
            (None, Some("passing"), None),
            (Some("passing"), None, Some(("a", [192, 0, 2, 7]))),
        ];
        for (first, second, expected) in table {
            let first = first.map(|status| endpoints("a", status));
            let second = second.map(|status| endpoints("b", status));
            let instances = plan.instances(|query| {
                if query.datacenter.is_some() {
                    second.as_ref()
                } else {
                    first.as_ref()
                }
            });
            let shown = instances
                .as_ref()
                .map(|all| (all[0].id.as_str(), all[0].tunnel.ip()));
            assert_eq!(shown, expected.map(|(id, ip)| (id, ip.into())));
        }
    }

    #[test]
    fn what_cannot_be_followed_is_told() {
        let mut peer = target("db", "dc1", &json!({}));
        peer["Peer"] = json!("other");
        let mut gateway = target("db", "dc2", &json!({}));
        gateway["MeshGateway"] = json!({"Mode": "local"});
        let plan = plan(
            &json!({"Targets": ["second"]}),
            &json!({"first": peer, "second": gateway}),
        );
        assert_eq!((plan.targets.len(), plan.problems.len()), (1, 2));
        let broken = chain(
            &json!({"Targets": ["nowhere"]}),
            &json!({"first": target("db", "dc1", &json!({}))}),
        );
        Plan::of_chain(&"db".parse().unwrap(), &broken).unwrap_err();
        let empty =
            serde_json::from_value(json!({"Chain": {"Nodes": null, "Targets": null}})).unwrap();
        Plan::of_chain(&"db".parse().unwrap(), &empty).unwrap_err();
    }
}
