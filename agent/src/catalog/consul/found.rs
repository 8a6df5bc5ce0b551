//! What explicit upstreams lead to beside the catalog: the instances that a prepared query finds, and those of a service
//! in another datacenter.
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
mod tests {
    use serde_json::{Value, json};
    use tokio::time::timeout;

    use super::*;
    use crate::{
        catalog::consul::tests::create_policy,
        consul::testing::{RealConsul, register, with_sidecar},
    };

    fn entry(id: &str, node: &str, status: &str) -> Value {
        json!({"Node": {"Node": node, "Address": "192.0.2.7", "TaggedAddresses": {"wan": "198.51.100.7"}},
            "Service": {"Kind": "connect-proxy", "ID": id, "Service": "db-proxy", "Port": 21000,
                "Proxy": {"DestinationServiceName": "db", "DestinationServiceID": "db-1"}},
            "Checks": [{"Status": status}]})
    }

    fn answer(datacenter: &str, nodes: &Value) -> Answer {
        serde_json::from_value(json!({"Service": "db", "Nodes": nodes, "DNS": {"TTL": ""},
            "Datacenter": datacenter, "Failovers": 0}))
        .unwrap()
    }

    #[test]
    fn an_answer_names_who_must_be_there() {
        // The answer's datacenter, which is expected in certificates, and the address to dial.
        let table = [
            ("dc1", None, [192, 0, 2, 7]),
            ("", None, [192, 0, 2, 7]),
            ("dc2", Some("dc2"), [198, 51, 100, 7]),
        ];
        for (datacenter, expected, address) in table {
            let answer = answer(datacenter, &json!([entry("a", "n1", "passing")]));
            let service = answer.found("dc1").unwrap();
            let instance = &service.instances[0];
            let target = instance.target.as_ref();
            assert_eq!(service.name.as_str(), "db");
            assert_eq!(target.map(|target| &*target.datacenter), expected);
            assert_eq!(instance.tunnel, (address, 21000).into());
        }
    }

    #[test]
    fn the_order_of_an_answer_says_nothing() {
        let [one, two] = [entry("a", "n1", "passing"), entry("b", "n1", "passing")];
        let shuffled = answer("dc1", &json!([two, one]));
        assert_eq!(answer("dc1", &json!([one, two])), shuffled);
        let ids: Vec<String> = shuffled
            .found("dc1")
            .unwrap()
            .instances
            .iter()
            .map(|instance| instance.id.to_string())
            .collect();
        assert_eq!(ids, ["b", "db-1"]);
    }

    #[test]
    fn a_check_that_the_query_ignores_keeps_nobody_away() {
        let nodes = json!([entry("a", "n1", "critical"), entry("b", "n2", "warning")]);
        let service = answer("dc1", &nodes).found("dc1").unwrap();
        let health: Vec<Health> = service.instances.iter().map(|i| i.health).collect();
        assert_eq!(health, [Health::Passing, Health::Warning]);
        // Of a service as a whole, all are listed.
        let listed = Answer {
            is_chosen: false,
            ..answer("dc1", &nodes)
        };
        assert_eq!(listed.found("dc1").unwrap().instances[0].weight(), 0);
    }

    #[test]
    fn what_cannot_be_followed_is_told() {
        assert!(answer("dc1", &json!(null)).is_empty());
        let peer = json!({"Service": "db", "Nodes": [], "PeerName": "east"});
        let peer: Answer = serde_json::from_value(peer).unwrap();
        assert!(peer.found("dc1").unwrap_err().contains("east"));
        Answer::default().found("dc1").unwrap_err();
    }

    fn to_db() -> Destination {
        Destination::Query("to db".into())
    }

    fn follow(client: Client) -> (Finder, Arc<Found>) {
        let mut finder = Finder::new(client, "dc1".to_owned(), Shutdown::default());
        finder.poll = Duration::from_millis(50);
        finder.follow([&to_db(), &Destination::Service("db".parse().unwrap())]);
        let found = finder.found(&to_db()).unwrap();
        assert_eq!(finder.all().count(), 1);
        (finder, found)
    }

    async fn until(found: &Found, what: &str, is_so: impl Fn(&Found) -> bool) {
        let waiting = async {
            while !is_so(found) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let reached = timeout(Duration::from_secs(20), waiting).await;
        assert!(reached.is_ok(), "{what}: {found:?}");
    }

    fn leads_to(found: &Found) -> Vec<String> {
        let service = found.service();
        let instances = service.iter().flat_map(|service| &service.instances);
        instances.map(|i| i.id.to_string()).collect()
    }

    async fn put_query(client: &Client, id: Option<&str>, tag: &str) -> String {
        #[derive(Debug, Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Created {
            #[serde(rename = "ID")]
            id: String,
        }
        let query = json!({"Name": "to db", "Service": {"Service": "db", "Tags": [tag]}});
        if let Some(id) = id {
            let request = Request::to(&["v1", "query", id]);
            client.put(&request, &query).await.unwrap();
            return id.to_owned();
        }
        let request = Request::to(&["v1", "query"]);
        let created = client.post::<Created>(&request, &query).await.unwrap();
        created.body.id
    }

    async fn register_both(client: &Client) {
        for (id, port, tag) in [("db-1", 5432, "old"), ("db-2", 5433, "new")] {
            let mut service = with_sidecar("db", port, port + 10_000);
            service["ID"] = json!(id);
            service["Tags"] = json!([tag]);
            register(client, &service).await;
        }
    }

    #[tokio::test]
    async fn a_query_is_followed_and_what_it_found_stays() {
        let Some(consul) = RealConsul::start(json!({})).await else {
            return;
        };
        let client = consul.client();
        let (mut finder, found) = follow(client.clone());
        until(&found, "told", |found| {
            found
                .problems()
                .iter()
                .any(|problem| problem.contains("404"))
        })
        .await;
        assert!(found.service().is_none());
        register_both(&client).await;
        let id = put_query(&client, None, "old").await;
        until(&found, "found", |found| leads_to(found) == ["db-1"]).await;
        assert_eq!(found.problems(), Vec::<String>::new());
        put_query(&client, Some(&id), "new").await;
        until(&found, "changed", |found| leads_to(found) == ["db-2"]).await;
        put_query(&client, Some(&id), "none").await;
        until(&found, "nobody", |found| leads_to(found).is_empty()).await;
        put_query(&client, Some(&id), "new").await;
        until(&found, "again", |found| leads_to(found) == ["db-2"]).await;
        let request = Request::to(&["v1", "query", &id]);
        client.delete(&request).await.unwrap();
        until(&found, "gone", |found| !found.problems().is_empty()).await;
        assert_eq!(leads_to(&found), ["db-2"]);
        finder.follow([]);
        assert!(finder.found(&to_db()).is_none());
    }

    #[tokio::test]
    async fn a_service_elsewhere_is_followed() {
        let Some(consul) = RealConsul::start(json!({})).await else {
            return;
        };
        let client = consul.client();
        let there = |datacenter: &str| Destination::Elsewhere {
            service: "db".parse().unwrap(),
            datacenter: datacenter.into(),
        };
        // To one of another datacenter, the only one there is is elsewhere.
        let mut finder = Finder::new(client.clone(), "dc0".to_owned(), Shutdown::default());
        finder.follow([&there("dc1"), &there("nowhere")]);
        let nowhere = finder.found(&there("nowhere")).unwrap();
        until(&nowhere, "told", |found| !found.problems().is_empty()).await;
        assert!(nowhere.service().is_none());
        let found = finder.found(&there("dc1")).unwrap();
        until(&found, "nobody", |found| found.service().is_some()).await;
        register_both(&client).await;
        until(&found, "both", |found| leads_to(found) == ["db-1", "db-2"]).await;
        let service = found.service().unwrap();
        let target = service.instances[0].target.as_ref().unwrap();
        assert_eq!(
            (target.service.as_str(), &*target.datacenter),
            ("db", "dc1")
        );
        for (id, left) in [("db-1", &["db-2"][..]), ("db-2", &[])] {
            for id in [format!("{id}-sidecar-proxy"), id.to_owned()] {
                let request = Request::to(&["v1", "agent", "service", "deregister", &id]);
                client.put_nothing(&request).await.unwrap();
            }
            until(&found, "gone", |found| leads_to(found) == left).await;
        }
    }

    #[tokio::test]
    async fn a_token_that_loses_its_rights_loses_nothing_found() {
        let acl = json!({"acl": {"enabled": true, "default_policy": "allow", "tokens": {"master": "root"}}});
        let Some(consul) = RealConsul::start(acl).await else {
            return;
        };
        let root = consul.client_with("root", "root");
        let rules = |node: &str| {
            let rules = format!(
                "service_prefix \"\" {{policy=\"read\"}} node_prefix \"\" {{policy=\"{node}\"}}"
            );
            json!({"Name": "p", "Rules": rules})
        };
        let id = create_policy(&root, &rules("read")).await;
        let secret = "11111111-2222-3333-4444-555555555555";
        let token = json!({"SecretID": secret, "Policies": [{"Name": "p"}]});
        let tokens = Request::to(&["v1", "acl", "token"]);
        root.put(&tokens, &token).await.unwrap();
        register_both(&root).await;
        put_query(&root, None, "old").await;
        let (_finder, found) = follow(consul.client_with("token", secret));
        until(&found, "found", |found| leads_to(found) == ["db-1"]).await;
        let update = Request::to(&["v1", "acl", "policy", &id]);
        // Nodes that may not be seen are left out of an answer that looks right otherwise.
        root.put(&update, &rules("deny")).await.unwrap();
        until(&found, "doubted", |found| {
            let lost = Doubt::LostRights.to_string();
            found
                .problems()
                .iter()
                .any(|problem| problem.ends_with(&lost))
        })
        .await;
        assert_eq!(leads_to(&found), ["db-1"]);
        root.put(&update, &rules("read")).await.unwrap();
        until(&found, "believed", |found| found.problems().is_empty()).await;
        assert_eq!(leads_to(&found), ["db-1"]);
    }
}
