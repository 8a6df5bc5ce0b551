//! What is known of the datacenter, and the snapshot that follows from it. Pure.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    chain::{Plan, Query},
    entries::{AllDefaults, Global},
    services::Endpoints,
};
use crate::{
    catalog::model::{
        Health, Instance, Intention, IntentionAction, NodeName, Ports, Service, ServiceDefaults,
        ServiceName, Snapshot,
    },
    identity::LocalDomain,
    policy::Intentions,
};

/// How long a service stays chosen whose name was resolved.
const NAMED_FOR: Duration = Duration::from_secs(3600);

/// The most of these.
const NAMED_MAX: usize = 1024;

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
    /// Services whose names were resolved, and when; in the mesh or not, they may be called or not.
    named: HashMap<ServiceName, Instant>,
    /// What was read since [`Self::choose`] may change the choice.
    pub(super) is_outdated: bool,
    /// What is in the snapshot, by [`Self::choose`].
    chosen: BTreeSet<ServiceName>,
    /// As last built.
    built: BTreeMap<ServiceName, Arc<Service>>,
    /// Services outside the mesh, as last built.
    outside: BTreeMap<ServiceName, Arc<Service>>,
    /// What is to be built again.
    stale: Stale,
    was_whole: bool,
}

/// Which services follow from something that changed since they were built.
#[derive(Debug)]
enum Stale {
    All,
    These(BTreeSet<ServiceName>),
}

/// What follows for one service.
enum Built {
    Service(Service),
    /// It cannot be called: what has no instance that speaks mutual TLS gets no virtual address.
    Nothing,
    /// Something of it is not read: what was known before stays.
    NotYet,
}

impl Stale {
    fn add(&mut self, name: &ServiceName) {
        match self {
            Self::All => {}
            Self::These(names) => {
                names.insert(name.clone());
            }
        }
    }
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
            named: HashMap::new(),
            is_outdated: true,
            chosen: BTreeSet::new(),
            built: BTreeMap::new(),
            outside: BTreeMap::new(),
            stale: Stale::All,
            was_whole: false,
        }
    }

    /// Chooses the services that concern this node: its own, those that its own may call, and those whose names were
    /// resolved. To be called when names,
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
        let is_there = |name: &&ServiceName| {
            self.names
                .as_ref()
                .is_some_and(|names| names.contains(*name))
        };
        chosen.extend(self.named.keys().filter(is_there).cloned());
        let resolvers = self.resolvers.as_ref();
        let stale = &mut self.stale;
        self.plans.retain(|name, _| {
            let has_one = resolvers.is_some_and(|with| with.contains(name));
            if !has_one {
                stale.add(name);
            }
            has_one
        });
        for changed in self.chosen.symmetric_difference(&chosen) {
            self.stale.add(changed);
        }
        self.chosen = chosen;
    }

    /// Notes that the name of `service` is being resolved; says whether that changes the choice.
    pub(super) fn name(&mut self, service: &ServiceName, now: Instant) -> bool {
        self.named.retain(|_, named_at| now - *named_at < NAMED_FOR);
        if self.named.len() >= NAMED_MAX && !self.named.contains_key(service) {
            let oldest = self.named.iter().min_by_key(|(_, named_at)| **named_at);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.named.remove(&oldest);
            }
        }
        self.named.insert(service.clone(), now);
        !self.chosen.contains(service)
    }

    /// The service by that name as Consul spells it, since DNS knows no difference; `None` if there is none. As long as
    /// the names are not read, there may be one.
    pub(super) fn spelled(&self, name: ServiceName) -> Option<ServiceName> {
        let Some(names) = &self.names else {
            return Some(name);
        };
        if names.contains(&name) || self.chosen.contains(&name) {
            return Some(name);
        }
        let is_same = |known: &&ServiceName| known.as_str().eq_ignore_ascii_case(name.as_str());
        names.iter().find(is_same).cloned()
    }

    pub(super) fn is_chosen(&self, service: &ServiceName) -> bool {
        self.chosen.contains(service)
    }

    /// What holds for all services changed.
    pub(super) fn rebuild(&mut self) {
        self.stale = Stale::All;
    }

    /// Takes the compiled chain of a service; says whether it is another than before.
    pub(super) fn plan(&mut self, name: ServiceName, plan: Plan) -> bool {
        if self.plans.get(&name) == Some(&plan) {
            return false;
        }
        self.stale.add(&name);
        self.plans.insert(name, plan);
        true
    }

    /// Takes the instances of a query; returns those from before.
    pub(super) fn know(&mut self, query: Query, known: Arc<Endpoints>) -> Option<Arc<Endpoints>> {
        self.stale.add(&query.service);
        for (name, plan) in &self.plans {
            if plan.targets.iter().any(|target| target.query == query) {
                self.stale.add(name);
            }
        }
        self.endpoints.insert(query, known)
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
            // Its own also where its callers are sent elsewhere: they have its addresses, and the local ones take
            // calls from elsewhere.
            for query in planned.chain([Query::of(name)]) {
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
                // Only then is it worth while to look at each.
                && self.endpoints.len() >= queries.len()
                && queries
                    .iter()
                    .all(|query| self.endpoints.contains_key(query));
        self.was_whole
    }

    /// The catalog as far as it is known. `queries` are those of [`Self::queries`]. What did not change is shared with
    /// the snapshot before.
    pub(super) fn snapshot(&mut self, queries: &[Query]) -> Snapshot {
        let stale = std::mem::replace(&mut self.stale, Stale::These(BTreeSet::new()));
        let stale = match stale {
            Stale::All => {
                let chosen = &self.chosen;
                self.built.retain(|name, _| chosen.contains(name));
                self.chosen.clone()
            }
            Stale::These(names) => names,
        };
        for name in stale {
            let built = if self.chosen.contains(&name) {
                self.service(&name)
            } else {
                Built::Nothing
            };
            match built {
                Built::NotYet => {}
                Built::Nothing => {
                    self.built.remove(&name);
                }
                Built::Service(service) => {
                    if self
                        .built
                        .get(&name)
                        .is_none_or(|before| **before != service)
                    {
                        self.built.insert(name, Arc::new(service));
                    }
                }
            }
        }
        self.build_outside();
        let policy = self.policy.clone().unwrap_or_default();
        let mut services = self.outside.clone();
        // Who is in the mesh is not outside it.
        services.extend(self.built.clone());
        Snapshot {
            is_whole: self.is_whole(queries),
            services,
            // Names of nodes are answered by Consul.
            nodes: BTreeMap::new(),
            intentions: policy.intentions.clone(),
            default_intention: policy.default,
        }
    }

    /// Services outside the mesh: those with a destination that Consul's catalog does not have. Whether anybody here may
    /// call them does not matter: there is nothing to read, and who may not is to be denied.
    fn build_outside(&mut self) {
        let (Some(defaults), Some(names)) = (&self.defaults, &self.names) else {
            return;
        };
        let mut before = std::mem::take(&mut self.outside);
        for (name, own) in &defaults.by_service {
            let Some(destination) = own.destination.as_ref().filter(|_| !names.contains(name))
            else {
                continue;
            };
            let defaults = match &self.global {
                Some(global) => global.under(Some(own)),
                None => own.clone(),
            };
            let now = Service::outside(name.clone(), destination, defaults);
            let same = before.remove(name).filter(|before| **before == now);
            self.outside
                .insert(name.clone(), same.unwrap_or_else(|| Arc::new(now)));
        }
    }

    fn service(&self, name: &ServiceName) -> Built {
        let (Some(own), Some(resolvers)) = (self.endpoints.get(&Query::of(name)), &self.resolvers)
        else {
            return Built::NotYet;
        };
        let known = |query: &Query| self.endpoints.get(query).map(AsRef::as_ref);
        let instances = match self.plans.get(name) {
            Some(plan) => plan.instances(known),
            None if resolvers.contains(name) => None,
            None => {
                let own = own.list.iter();
                Some(own.map(|e| Arc::clone(&e.instance)).collect())
            }
        };
        let Some(mut instances) = instances else {
            return Built::NotYet;
        };
        self.add_local(own, &mut instances);
        if instances.is_empty() {
            return Built::Nothing;
        }
        let all = self.defaults.as_ref();
        let defaults = all.and_then(|all| all.by_service.get(name));
        let defaults = match &self.global {
            Some(global) => global.under(defaults),
            None => defaults.cloned().unwrap_or_default(),
        };
        Built::Service(Service {
            name: name.clone(),
            instances,
            explicit_addresses: own.explicit_addresses.clone(),
            ports: Ports::Any,
            defaults: ServiceDefaults {
                destination: None,
                ..defaults
            },
        })
    }

    /// Instances of this node are delivered to whether or not callers of the service are sent to them: those that a
    /// resolver leaves out are listed as taking nothing from here.
    fn add_local(&self, own: &Endpoints, instances: &mut Vec<Arc<Instance>>) {
        let here = own
            .list
            .iter()
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
        let of_defaults = self.defaults.iter().flat_map(|all| all.problems.clone());
        of_policy
            .chain(of_plans)
            .chain(of_services)
            .chain(of_defaults)
            .collect()
    }
}
