//! What is known of the datacenter, and the snapshot that follows from it. Pure.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::Instant;

use super::{
    chain::{Plan, Query},
    entries::{AllDefaults, Global},
    services::Endpoints,
};
use crate::{
    catalog::model::{
        Health, Instance, Intention, IntentionAction, NodeName, Ports, Service, ServiceName,
        Snapshot,
    },
    identity::LocalDomain,
    policy::Intentions,
};

/// Intentions, and what answers where none matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) intentions: Vec<Intention>,
    /// `None` if it could not be found out or never counts.
    pub(super) default: Option<IntentionAction>,
    pub(super) problems: Vec<String>,
}

/// All that was read. What is `None` was not read yet.
#[derive(Debug)]
pub(super) struct State {
    node: NodeName,
    domain: LocalDomain,
    /// Whether what no local service may call is read as well.
    everything: bool,
    pub(super) local: Option<BTreeSet<ServiceName>>,
    pub(super) names: Option<BTreeSet<ServiceName>>,
    pub(super) policy: Option<Arc<Policy>>,
    pub(super) defaults: Option<Arc<AllDefaults>>,
    pub(super) global: Option<Arc<Global>>,
    /// Services with a resolver.
    pub(super) resolvers: Option<BTreeSet<ServiceName>>,
    /// Of those, by the compiled chain.
    pub(super) plans: BTreeMap<ServiceName, Plan>,
    pub(super) endpoints: HashMap<Query, Arc<Endpoints>>,
    /// When a connection to it was last made.
    pub(super) wanted: HashMap<ServiceName, Instant>,
    /// What was read since [`Self::choose`] may change the choice.
    pub(super) is_outdated: bool,
    /// What is in the snapshot, by [`Self::choose`].
    chosen: BTreeSet<ServiceName>,
    /// As last built: what did not change is shared.
    built: BTreeMap<ServiceName, Arc<Service>>,
    was_whole: bool,
}

impl State {
    pub(super) fn new(node: NodeName, domain: LocalDomain, everything: bool) -> Self {
        Self {
            node,
            domain,
            everything,
            local: None,
            names: None,
            policy: None,
            defaults: None,
            global: None,
            resolvers: None,
            plans: BTreeMap::new(),
            endpoints: HashMap::new(),
            wanted: HashMap::new(),
            is_outdated: true,
            chosen: BTreeSet::new(),
            built: BTreeMap::new(),
            was_whole: false,
        }
    }

    /// Chooses the services that concern this node: its own, and those that its own may call. To be called when names,
    /// policy, resolvers or the local services changed.
    pub(super) fn choose(&mut self) {
        self.is_outdated = false;
        let local = self.local.clone().unwrap_or_default();
        let mut candidates: BTreeSet<&ServiceName> = self.names.iter().flatten().collect();
        candidates.extend(self.resolvers.iter().flatten());
        // A name that left the list is let go only when its own answer says that nothing is there: to a token that
        // lost its rights, the list looks the same.
        let known = self.endpoints.iter().filter(|(query, known)| {
            query.is_plain() && !known.list.is_empty() && self.chosen.contains(&query.service)
        });
        candidates.extend(known.map(|(query, _)| &query.service));
        let mut chosen: BTreeSet<ServiceName> = match &self.policy {
            _ if self.everything => candidates.into_iter().cloned().collect(),
            Some(policy) => {
                let callers: Vec<_> = local
                    .iter()
                    .map(|name| self.domain.identity_of(name))
                    .collect();
                let default = policy.default.unwrap_or(IntentionAction::Allow);
                let intentions = Intentions::new(&policy.intentions, default);
                let may_be_called = |name: &&&ServiceName| {
                    let mut callers = callers.iter();
                    callers.any(|caller| {
                        intentions.decide(caller, name).action == IntentionAction::Allow
                    })
                };
                let callable = candidates.iter().filter(may_be_called);
                callable.map(|name| (*name).clone()).collect()
            }
            None => BTreeSet::new(),
        };
        chosen.extend(local);
        let resolvers = self.resolvers.as_ref();
        self.plans
            .retain(|name, _| resolvers.is_some_and(|with| with.contains(name)));
        self.chosen = chosen;
    }

    /// Which of them have a resolver, so that their chain is to be asked for.
    pub(super) fn with_resolver(&self) -> Vec<ServiceName> {
        let resolvers = self.resolvers.iter().flatten();
        resolvers
            .filter(|name| self.chosen.contains(name))
            .cloned()
            .collect()
    }

    /// What is to be read, the most urgent first: local services, those called last, those that can be called.
    pub(super) fn queries(&self) -> Vec<Query> {
        let local = self.local.iter().flatten().collect::<BTreeSet<_>>();
        let mut ranked: Vec<_> = self
            .chosen
            .iter()
            .map(|name| {
                let is_callable = self
                    .endpoints
                    .get(&Query::of(name))
                    .is_some_and(|known| !known.list.is_empty());
                let rank = (
                    !local.contains(name),
                    std::cmp::Reverse(self.wanted.get(name).copied()),
                    !is_callable,
                    // Consul's own name for a proxy. Read last, not never: it may be the name of a service.
                    name.as_str().ends_with("-sidecar-proxy"),
                );
                (rank, name)
            })
            .collect();
        ranked.sort();
        let mut seen: BTreeSet<Query> = BTreeSet::new();
        let mut queries = Vec::new();
        for (_, name) in ranked {
            let plan = self.plans.get(name);
            let planned = plan
                .iter()
                .flat_map(|plan| &plan.targets)
                .map(|target| target.query.clone());
            let own = (plan.is_none() || local.contains(name)).then(|| Query::of(name));
            for query in planned.chain(own) {
                if seen.insert(query.clone()) {
                    queries.push(query);
                }
            }
        }
        queries
    }

    /// Forgets what is not among `queries` any more.
    pub(super) fn retain(&mut self, queries: &[Query]) {
        let wanted: BTreeSet<&Query> = queries.iter().collect();
        self.endpoints.retain(|query, _| wanted.contains(query));
        let chosen = &self.chosen;
        self.wanted.retain(|name, _| chosen.contains(name));
    }

    /// Whether everything that concerns this node was read, once.
    fn is_whole(&mut self, queries: &[Query]) -> bool {
        self.was_whole = self.was_whole
            || !self.is_outdated
                && self.local.is_some()
                && self.names.is_some()
                && self.policy.is_some()
                && self.defaults.is_some()
                && self.global.is_some()
                && self.resolvers.is_some()
                && self
                    .with_resolver()
                    .iter()
                    .all(|name| self.plans.contains_key(name))
                && queries
                    .iter()
                    .all(|query| self.endpoints.contains_key(query));
        self.was_whole
    }

    /// The catalog as far as it is known. `queries` are those of [`Self::queries`].
    pub(super) fn snapshot(&mut self, queries: &[Query]) -> Snapshot {
        let services = self.chosen.iter().filter_map(|name| {
            let service = self.service(name)?;
            let service = match self.built.get(name) {
                Some(built) if **built == service => Arc::clone(built),
                Some(_) | None => Arc::new(service),
            };
            Some((name.clone(), service))
        });
        self.built = services.collect();
        let policy = self.policy.clone().unwrap_or_default();
        Snapshot {
            is_whole: self.is_whole(queries),
            services: self.built.clone(),
            intentions: policy.intentions.clone(),
            default_intention: policy.default,
        }
    }

    /// `None` for what cannot be called: what has no instance that speaks mutual TLS gets no virtual address.
    fn service(&self, name: &ServiceName) -> Option<Service> {
        let own = self.endpoints.get(&Query::of(name));
        let mut instances = match self.plans.get(name) {
            Some(plan) => plan.instances(|query| self.endpoints.get(query).map(AsRef::as_ref))?,
            None if self.resolvers.as_ref()?.contains(name) => return None,
            None => {
                let endpoints = &own?.list;
                endpoints.iter().map(|e| Arc::clone(&e.instance)).collect()
            }
        };
        self.add_local(own, &mut instances);
        if instances.is_empty() {
            return None;
        }
        let defaults = self.defaults.as_ref().and_then(|all| all.0.get(name));
        Some(Service {
            name: name.clone(),
            instances,
            explicit_addresses: own
                .map(|own| own.explicit_addresses.clone())
                .unwrap_or_default(),
            ports: Ports::Any,
            defaults: match &self.global {
                Some(global) => global.under(defaults),
                None => defaults.cloned().unwrap_or_default(),
            },
        })
    }

    /// Instances of this node are delivered to whether or not callers of the service are sent to them: those that a
    /// resolver leaves out are listed as taking nothing from here.
    fn add_local(&self, own: Option<&Arc<Endpoints>>, instances: &mut Vec<Arc<Instance>>) {
        let here = own
            .iter()
            .flat_map(|own| &own.list)
            .map(|endpoint| &endpoint.instance)
            .filter(|instance| instance.node == self.node);
        for instance in here {
            let is_same = |other: &Arc<Instance>| {
                other.id == instance.id && other.node == instance.node && other.target.is_none()
            };
            if !instances.iter().any(is_same) {
                instances.push(Arc::new(Instance {
                    health: Health::Critical,
                    ..(**instance).clone()
                }));
            }
        }
    }

    /// What is configured or registered and has no effect, for operators.
    pub(super) fn problems(&self) -> Vec<String> {
        let of_policy = self
            .policy
            .iter()
            .flat_map(|policy| policy.problems.clone());
        let of_plans = self.plans.iter().flat_map(|(name, plan)| {
            let problems = plan.problems.iter();
            problems.map(move |problem| format!("service-resolver {name}: {problem}"))
        });
        let of_services = self.endpoints.iter().flat_map(|(query, known)| {
            let problems = known.problems.iter();
            problems.map(move |problem| format!("service {}: {problem}", query.service))
        });
        of_policy.chain(of_plans).chain(of_services).collect()
    }
}
