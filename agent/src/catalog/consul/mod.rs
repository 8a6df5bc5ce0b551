//! The catalog of a Consul datacenter, as far as it concerns this node.
//!
//! Followed by blocking queries: the names of all services, all intentions, the config entries. Of the services, only
//! those are read that a service of this node may call by these intentions, and its own. Each has a blocking query,
//! up to [`SourceSettings::max_watches`], since Consul bounds the connections of a client; the others are read in
//! turns, slowly, and at once when a connection to one is being made ([`ConsulHandle::wanted`]).
//!
//! What answers mean is pure: [`services`], [`intentions`], [`entries`], [`chain`]; what follows from them is
//! [`state`]. [`follow`] does the asking, and [`found`] what explicit upstreams ask for beside. Whatever fails, what
//! was known stays.

mod services;
mod intentions;
mod entries;
mod chain;
mod state;
mod policy;
mod follow;
pub mod found;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use self::{
    chain::{Plan, Query},
    entries::{AllDefaults, Global, Resolvers},
    services::Endpoints,
    state::Policy,
};
use super::model::{NodeName, ServiceName, Snapshot};
use crate::{
    consul::{Client, Event, WatchSettings, answers::ServiceNames, watch::WatchStatus},
    identity::LocalDomain,
    lifecycle::Shutdown,
};

/// The longest that a connection waits for a fresh answer.
const FRESH_WAIT: Duration = Duration::from_millis(100);

/// The longest that a name's resolution waits until it is known whether the mesh has the service.
const LOOK_UP_WAIT: Duration = Duration::from_secs(2);

/// What to follow.
#[derive(Debug, Clone)]
pub struct SourceSettings {
    /// This node, as Consul names it.
    pub node: NodeName,
    /// The identities of this datacenter.
    pub domain: LocalDomain,
    /// Whether services are read that no service of this node may call.
    pub everything: bool,
    /// How many services have a blocking query. Each is a connection to Consul, which takes 200 from one address
    /// (`limits.http_max_conns_per_client`).
    pub max_watches: usize,
    /// How many services a second are read in turns, of those without one.
    pub reads_per_second: u32,
    /// How each query is made.
    pub watch: WatchSettings,
}

impl SourceSettings {
    /// With what is good for most.
    pub fn new(node: NodeName, domain: LocalDomain) -> Self {
        Self {
            node,
            domain,
            everything: false,
            max_watches: 128,
            reads_per_second: 5,
            watch: WatchSettings::default(),
        }
    }
}

/// Follows a datacenter.
#[derive(Debug)]
pub struct ConsulSource {
    client: Client,
    settings: SourceSettings,
    local: watch::Receiver<Option<BTreeSet<ServiceName>>>,
    wanted: mpsc::Receiver<Wanted>,
    named: mpsc::Receiver<Named>,
    shared: Arc<Shared>,
}

/// What others ask of a running [`ConsulSource`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ConsulHandle {
    wanted: mpsc::Sender<Wanted>,
    named: mpsc::Sender<Named>,
    shared: Arc<Shared>,
}

/// What the source and its handles share.
#[derive(Debug, Default)]
struct Shared {
    /// Services whose answer is fresh by itself, and whether they were called since this was last looked at.
    watched: ArcSwap<HashMap<ServiceName, AtomicBool>>,
    /// Services that were read and have nobody who speaks mutual TLS.
    outside: Mutex<HashSet<ServiceName>>,
    status: Mutex<ConsulStatus>,
}

/// How the source fares, for operators.
#[derive(Debug, Clone, Default)]
pub struct ConsulStatus {
    /// The blocking queries that are not of services, and of services those that have a problem.
    pub watches: Vec<WatchStatus>,
    /// How many services have a blocking query.
    pub watched: usize,
    /// How many are read in turns.
    pub in_turns: usize,
    /// How many were not read yet.
    pub unread: usize,
    /// What is registered or configured and has no effect here.
    pub problems: Vec<String>,
    /// Why the last read of a service in turns failed.
    pub problem: Option<String>,
}

impl ConsulStatus {
    /// The longest that something has not been up to date; `None` if all is.
    pub fn behind_for(&self, now: Instant) -> Option<Duration> {
        let behind = self.watches.iter().filter(|watch| watch.problem.is_some());
        behind
            .map(|watch| watch.age(now).unwrap_or(Duration::MAX))
            .max()
    }
}

/// A connection to a service is being made.
#[derive(Debug)]
struct Wanted {
    service: ServiceName,
    /// Told when a fresh answer is in force.
    fresh: oneshot::Sender<()>,
}

/// A service's name is being resolved.
#[derive(Debug)]
struct Named {
    service: ServiceName,
    /// Told when what is known of it is published: whether the mesh has it. Dropped if there is no such service.
    known: oneshot::Sender<bool>,
}

/// What is known of a service by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookUp {
    /// The catalog has it, or will within moments: as soon as what was published is in force.
    InMesh,
    /// Consul has no such service, or nobody who speaks mutual TLS for it.
    Outside,
    /// Consul did not say in time.
    NotKnown,
}

impl ConsulHandle {
    /// Finds out whether the mesh has `service`, also if nobody here may call it: from then on the catalog has it. Else
    /// its name would lead around the mesh, to addresses that Consul knows, because an intention denies.
    pub async fn look_up(&self, service: &ServiceName) -> LookUp {
        if self.shared.outside.lock().contains(service) {
            return LookUp::Outside;
        }
        let (known, told) = oneshot::channel();
        let named = Named {
            service: service.clone(),
            known,
        };
        if self.named.try_send(named).is_err() {
            return LookUp::NotKnown;
        }
        match timeout(LOOK_UP_WAIT, told).await {
            Ok(Ok(true)) => LookUp::InMesh,
            // Dropped: there is no such service.
            Ok(Ok(false) | Err(_)) => LookUp::Outside,
            Err(_late) => LookUp::NotKnown,
        }
    }

    /// Says that a connection to `service` is being made. Returns at once where the service has a blocking query; else
    /// when a fresh answer is published, or soon without one.
    pub async fn wanted(&self, service: &ServiceName) {
        if let Some(used) = self.shared.watched.load().get(service) {
            used.store(true, Ordering::Relaxed);
            return;
        }
        let (fresh, published) = oneshot::channel();
        let wanted = Wanted {
            service: service.clone(),
            fresh,
        };
        // A source that is busy or gone is no reason to hold the connection up.
        if self.wanted.try_send(wanted).is_ok() {
            let _fresh_or_not = timeout(FRESH_WAIT, published).await;
        }
    }

    /// How the source fares.
    pub fn status(&self) -> ConsulStatus {
        self.shared.status.lock().clone()
    }
}

impl ConsulSource {
    /// Asks nothing before [`Self::run`]. `local` are the names of this node's own services, `None` while they are not
    /// known: until then no catalog is whole.
    pub fn new(
        client: Client,
        settings: SourceSettings,
        local: watch::Receiver<Option<BTreeSet<ServiceName>>>,
    ) -> (Self, ConsulHandle) {
        let (sender, wanted) = mpsc::channel(256);
        let (names, named) = mpsc::channel(256);
        let shared = Arc::<Shared>::default();
        let handle = ConsulHandle {
            wanted: sender,
            named: names,
            shared: Arc::clone(&shared),
        };
        let source = Self {
            client,
            settings,
            local,
            wanted,
            named,
            shared,
        };
        (source, handle)
    }

    /// Publishes what the datacenter says with each change, until all has drained.
    pub async fn run(self, shutdown: Shutdown, publish: impl Fn(Snapshot)) {
        follow::Runner::new(self).run(shutdown, publish).await;
    }
}

/// What the asking tasks tell the one that owns the state.
#[derive(Debug)]
enum Message {
    Names(Arc<ServiceNames>),
    Policy(Arc<Policy>),
    Defaults(Arc<AllDefaults>),
    Global(Arc<Global>),
    Resolvers(Arc<Resolvers>),
    Chain(ServiceName, Plan),
    Endpoints(Query, Event<Endpoints>),
    /// Made sure of: nobody is there any more.
    Gone(Query, Arc<Endpoints>),
}
