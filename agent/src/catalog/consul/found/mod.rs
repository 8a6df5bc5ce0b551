//! What explicit upstreams lead to beside the catalog: the instances that a prepared query finds, and those of a
//! service in another datacenter.
//!
//! Consul cannot wait for a change of a query's answer, so it is asked at intervals. Each answer stands for itself: it
//! names the service, the datacenter and the instances that are left after tags, `OnlyPassing`, `Limit` and failover.
//! Whatever fails, what was found stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    chain::Query,
    follow::sees,
    services::{Endpoint, Endpoints},
};
use crate::{
    catalog::model::{Health, Instance, Ports, Service, ServiceDefaults, ServiceName, Target},
    consul::{
        Client, ConsulError, Event, Request, Watch, WatchSettings,
        answers::{HealthEntry, List},
        judge::{Content, Doubt},
        position::{Pace, PaceLimits},
        upstreams::Destination,
        watch::WatchStatus,
    },
    lifecycle::Shutdown,
    telemetry::log::chain,
};

/// Between two answers of a prepared query.
const POLL: Duration = Duration::from_secs(10);

/// Between two requests while there is no answer.
const RETRY: PaceLimits = PaceLimits {
    burst: 1,
    interval: POLL,
    pause_min: Duration::from_secs(1),
    pause_max: POLL,
};

/// Follows what is not in the catalog. One per agent.
#[derive(Debug)]
pub struct Finder {
    client: Client,
    /// Our own.
    datacenter: String,
    shutdown: Shutdown,
    poll: Duration,
    followed: BTreeMap<Destination, Followed>,
}

#[derive(Debug)]
struct Followed {
    found: Arc<Found>,
    _until: DropGuard,
}

/// What a destination leads to now.
#[derive(Debug)]
pub struct Found {
    destination: Destination,
    service: ArcSwapOption<Service>,
    status: Arc<Mutex<WatchStatus>>,
    /// What is wrong with the last answer.
    problems: Mutex<Vec<String>>,
}

impl Found {
    /// As it was registered.
    pub fn destination(&self) -> &Destination {
        &self.destination
    }

    /// The service, with those of its instances that were found; `None` before the first answer.
    pub fn service(&self) -> Option<Arc<Service>> {
        self.service.load_full()
    }

    /// What is wrong, for operators.
    pub fn problems(&self) -> Vec<String> {
        let asking = self.status.lock().problem.clone();
        let mut all = self.problems.lock().clone();
        all.extend(asking);
        let named = all.into_iter();
        named
            .map(|problem| format!("{}: {problem}", self.destination))
            .collect()
    }
}

impl Finder {
    /// Asks for nothing before [`Self::follow`]. `datacenter` is that of the client.
    pub fn new(client: Client, datacenter: String, shutdown: Shutdown) -> Self {
        Self {
            client,
            datacenter,
            shutdown,
            poll: POLL,
            followed: BTreeMap::new(),
        }
    }

    /// Follows these destinations, as far as the catalog does not have them, and no others any more.
    pub fn follow<'a>(&mut self, destinations: impl IntoIterator<Item = &'a Destination>) {
        let wanted: BTreeSet<&Destination> = destinations.into_iter().collect();
        self.followed
            .retain(|destination, _| wanted.contains(destination));
        for destination in wanted {
            if !self.followed.contains_key(destination)
                && let Some(followed) = self.start(destination)
            {
                self.followed.insert(destination.clone(), followed);
            }
        }
    }

    /// What is followed for `destination`; `None` if the catalog has it.
    pub fn found(&self, destination: &Destination) -> Option<Arc<Found>> {
        let followed = self.followed.get(destination)?;
        Some(Arc::clone(&followed.found))
    }

    /// All that is followed.
    pub fn all(&self) -> impl Iterator<Item = &Found> {
        self.followed.values().map(|followed| &*followed.found)
    }

    /// `None` if the catalog has it.
    fn start(&self, destination: &Destination) -> Option<Followed> {
        let asking = match destination {
            Destination::Service(_) => return None,
            Destination::Query(name) => {
                let request =
                    Request::to(&["v1", "query", name, "execute"]).with("connect", "true");
                Asking::Query(self.watch(request))
            }
            Destination::Elsewhere {
                service,
                datacenter,
            } => {
                let request = Request::to(&["v1", "health", "connect", service.as_str()]);
                Asking::Elsewhere {
                    watch: self.watch(request.with("dc", &**datacenter)),
                    service: service.clone(),
                    datacenter: Arc::clone(datacenter),
                }
            }
        };
        let found = Arc::new(Found {
            destination: destination.clone(),
            service: ArcSwapOption::empty(),
            status: asking.status(),
            problems: Mutex::default(),
        });
        let until = CancellationToken::new();
        let following = Following {
            client: self.client.clone(),
            datacenter: self.datacenter.clone(),
            poll: self.poll,
            found: Arc::clone(&found),
            before: Arc::default(),
            is_seen: false,
        };
        let (ended, shutdown) = (until.clone(), self.shutdown.clone());
        self.shutdown.spawn_service("upstream", async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = shutdown.stopped() => {}
                () = following.run(asking) => {}
            }
        });
        Some(Followed {
            found,
            _until: until.drop_guard(),
        })
    }

    fn watch<T: DeserializeOwned + PartialEq + Content>(&self, request: Request) -> Watch<T> {
        Watch::new(self.client.clone(), request, WatchSettings::default())
    }
}

/// What Consul is asked for.
enum Asking {
    /// It answers at once.
    Query(Watch<Answer>),
    /// It waits for a change.
    Elsewhere {
        watch: Watch<Endpoints>,
        service: ServiceName,
        datacenter: Arc<str>,
    },
}

/// There is no answer, or none to believe. The watch has the reason in its status.
struct Unanswered;

impl Asking {
    fn status(&self) -> Arc<Mutex<WatchStatus>> {
        match self {
            Self::Query(watch) => watch.status(),
            Self::Elsewhere { watch, .. } => watch.status(),
        }
    }

    /// The next answer, `None` if it is the same as the last one. With `may_wait` it is asked for as things are
    /// expected to go on, and else at once.
    async fn next(&mut self, may_wait: bool) -> Result<Option<Arc<Answer>>, Unanswered> {
        match self {
            Self::Query(watch) => told(watch.read().await),
            Self::Elsewhere {
                watch,
                service,
                datacenter,
            } => {
                let event = if may_wait {
                    Some(watch.next().await)
                } else {
                    watch.read().await
                };
                let nodes = told(event)?;
                let answer = |nodes: Arc<Endpoints>| Answer {
                    service: service.to_string(),
                    datacenter: datacenter.to_string(),
                    peer: String::new(),
                    is_chosen: false,
                    nodes: (*nodes).clone(),
                };
                Ok(nodes.map(answer).map(Arc::new))
            }
        }
    }
}

fn told<T>(event: Option<Event<T>>) -> Result<Option<Arc<T>>, Unanswered> {
    match event {
        Some(Event::Changed(answer)) => Ok(Some(answer.body)),
        None => Ok(None),
        Some(Event::Doubtful(_) | Event::Failed(_)) => Err(Unanswered),
    }
}

/// One destination's task.
struct Following {
    client: Client,
    datacenter: String,
    poll: Duration,
    found: Arc<Found>,
    /// The answer in force.
    before: Arc<Answer>,
    /// Nobody is there any more, and the token may see who was.
    is_seen: bool,
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    InForce,
    /// It is to be asked for once more: only one that was given after the rights were looked at counts.
    Again,
    Not,
}

impl Following {
    async fn run(mut self, mut asking: Asking) {
        let mut pace = Pace::new(RETRY, Instant::now());
        // Answered, and not in force yet.
        let mut unsettled: Option<Arc<Answer>> = None;
        loop {
            let answered = asking.next(unsettled.is_none()).await;
            if !matches!(answered, Ok(None)) {
                self.is_seen = false;
            }
            let taken = match answered {
                Ok(new) => {
                    unsettled = new.or(unsettled);
                    match &unsettled {
                        Some(answer) => self.take(answer).await,
                        None => Taken::InForce,
                    }
                }
                Err(Unanswered) => Taken::Not,
            };
            let random = fastrand::f64();
            let pause = match (taken, &asking) {
                (Taken::InForce, asking) => {
                    unsettled = None;
                    pace.after_answer(Instant::now(), random);
                    match asking {
                        Asking::Query(_) => self.poll.mul_f64(0.75 + random / 2.0),
                        Asking::Elsewhere { .. } => Duration::ZERO,
                    }
                }
                (Taken::Again, _) => Duration::ZERO,
                (Taken::Not, _) => pace.after_failure(random).min(self.poll),
            };
            sleep(pause).await;
        }
    }

    /// Puts an answer in force, if it can be.
    async fn take(&mut self, answer: &Arc<Answer>) -> Taken {
        let service = match answer.found(&self.datacenter) {
            Ok(service) => service,
            Err(problem) => return self.refuse(problem),
        };
        // A token that lost its rights is answered as if nobody were there.
        if answer.is_empty() && !self.before.is_empty() && !self.is_seen {
            return match self.sees().await {
                Ok(true) => {
                    self.is_seen = true;
                    Taken::Again
                }
                Ok(false) => self.refuse(Doubt::LostRights.to_string()),
                Err(error) => self.refuse(chain(&error).to_string()),
            };
        }
        let (before, now) = (&self.before, answer);
        if (&before.service, &before.datacenter) != (&now.service, &now.datacenter)
            || before.is_empty() != now.is_empty()
        {
            tracing::info!(
                destination = %self.found.destination, service = %service.name,
                datacenter = now.datacenter, instances = service.instances.len(), "instances found"
            );
        }
        self.found.service.store(Some(Arc::new(service)));
        self.found
            .problems
            .lock()
            .clone_from(&answer.nodes.problems);
        self.before = Arc::clone(answer);
        self.is_seen = false;
        Taken::InForce
    }

    fn refuse(&self, problem: String) -> Taken {
        *self.found.problems.lock() = vec![problem];
        Taken::Not
    }

    /// Whether the token may see what was there.
    async fn sees(&self) -> Result<bool, ConsulError> {
        let Ok(service) = self.before.name() else {
            return Ok(true);
        };
        let seen = Query {
            service,
            datacenter: Some(self.before.datacenter.as_str().into()),
            filter: "".into(),
        };
        sees(&self.client, &seen, &self.before.nodes).await
    }
}

/// The instances of one service.
///
/// As `/v1/query/:name/execute` says it.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "Executed")]
struct Answer {
    service: String,
    datacenter: String,
    peer: String,
    /// Whether Consul has left out what may not be called.
    is_chosen: bool,
    nodes: Endpoints,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Executed {
    #[serde(default)]
    service: String,
    #[serde(default)]
    datacenter: String,
    #[serde(default)]
    peer_name: String,
    #[serde(default)]
    nodes: Option<List<HealthEntry>>,
}

impl From<Executed> for Answer {
    fn from(executed: Executed) -> Self {
        let mut nodes = executed.nodes.unwrap_or(List(Vec::new()));
        // Consul shuffles them with each answer.
        let key = |entry: &HealthEntry| (entry.node.node.clone(), entry.service.id.clone());
        nodes.0.sort_by_key(key);
        Self {
            service: executed.service,
            datacenter: executed.datacenter,
            peer: executed.peer_name,
            is_chosen: true,
            nodes: nodes.into(),
        }
    }
}

impl Content for Answer {
    fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

impl Answer {
    fn name(&self) -> Result<ServiceName, String> {
        self.service.parse().map_err(|error| format!("{error}"))
    }

    /// The service, with the instances that the answer lists. `own` is our datacenter.
    fn found(&self, own: &str) -> Result<Service, String> {
        let name = self.name()?;
        if !self.peer.is_empty() {
            return Err(format!(
                "it fails over to the cluster {:?}: other clusters are not supported",
                self.peer
            ));
        }
        let is_far = !self.datacenter.is_empty() && self.datacenter != own;
        let target = is_far.then(|| Target {
            service: name.clone(),
            datacenter: self.datacenter.as_str().into(),
            sni: None,
        });
        let instances = self.nodes.list.iter();
        Ok(Service {
            instances: instances
                .map(|endpoint| Arc::new(self.instance(endpoint, target.as_ref())))
                .collect(),
            name,
            explicit_addresses: BTreeSet::new(),
            ports: Ports::Any,
            defaults: ServiceDefaults::default(),
        })
    }

    fn instance(&self, endpoint: &Endpoint, target: Option<&Target>) -> Instance {
        let instance = &*endpoint.instance;
        let far = endpoint.wan.filter(|_| target.is_some());
        Instance {
            tunnel: far.unwrap_or(instance.tunnel),
            health: match instance.health {
                // A check of what a query lists that fails all the same is one that it ignores (`IgnoreCheckIDs`).
                Health::Critical if self.is_chosen => Health::Passing,
                Health::Passing | Health::Warning | Health::Critical => instance.health,
            },
            target: target.cloned(),
            ..instance.clone()
        }
    }
}

#[cfg(test)]
mod tests;
