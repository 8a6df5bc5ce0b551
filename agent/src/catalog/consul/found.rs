//! What explicit upstreams lead to beside the catalog: the instances that a prepared query finds.
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
use serde::Deserialize;
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
        Client, Event, Request, Watch, WatchSettings,
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
            if let Destination::Query(name) = destination
                && !self.followed.contains_key(destination)
            {
                let followed = self.start(destination, name);
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

    fn start(&self, destination: &Destination, name: &str) -> Followed {
        let request = Request::to(&["v1", "query", name, "execute"]).with("connect", "true");
        let watch = Watch::new(self.client.clone(), request, WatchSettings::default());
        let found = Arc::new(Found {
            destination: destination.clone(),
            service: ArcSwapOption::empty(),
            status: watch.status(),
            problems: Mutex::default(),
        });
        let until = CancellationToken::new();
        let following = Following {
            client: self.client.clone(),
            datacenter: self.datacenter.clone(),
            poll: self.poll,
            found: Arc::clone(&found),
            before: Arc::default(),
        };
        let (ended, shutdown) = (until.clone(), self.shutdown.clone());
        self.shutdown.spawn_service("prepared query", async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = shutdown.stopped() => {}
                () = following.run(watch) => {}
            }
        });
        Followed {
            found,
            _until: until.drop_guard(),
        }
    }
}

/// One destination's task.
struct Following {
    client: Client,
    datacenter: String,
    poll: Duration,
    found: Arc<Found>,
    /// The answer in force.
    before: Arc<QueryAnswer>,
}

impl Following {
    async fn run(mut self, mut watch: Watch<QueryAnswer>) {
        let mut pace = Pace::new(RETRY, Instant::now());
        // Answered, and not in force yet.
        let mut unsettled: Option<Arc<QueryAnswer>> = None;
        loop {
            let answered = match watch.read().await {
                Some(Event::Changed(answer)) => {
                    unsettled = Some(answer.body);
                    true
                }
                None => true,
                Some(Event::Doubtful(_) | Event::Failed(_)) => false,
            };
            if let Some(answer) = unsettled.take()
                && !self.take(&answer).await
            {
                unsettled = Some(answer);
            }
            let random = fastrand::f64();
            let pause = if answered && unsettled.is_none() {
                pace.after_answer(Instant::now(), random);
                self.poll.mul_f64(0.75 + random / 2.0)
            } else {
                pace.after_failure(random).min(self.poll)
            };
            sleep(pause).await;
        }
    }

    /// Puts an answer in force, if it can be.
    async fn take(&mut self, answer: &Arc<QueryAnswer>) -> bool {
        let service = match self.judge(answer).await {
            Ok(service) => service,
            Err(problem) => {
                *self.found.problems.lock() = vec![problem];
                return false;
            }
        };
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
        true
    }

    async fn judge(&self, answer: &QueryAnswer) -> Result<Service, String> {
        let service = answer.found(&self.datacenter)?;
        // A token that lost its rights is answered as if nobody were there.
        if answer.is_empty() && !self.before.is_empty() {
            let seen = Query {
                service: self.before.name()?,
                datacenter: Some(self.before.datacenter.as_str().into()),
                filter: "".into(),
            };
            match sees(&self.client, &seen, &self.before.nodes).await {
                Ok(true) => {}
                Ok(false) => return Err(Doubt::LostRights.to_string()),
                Err(error) => return Err(chain(&error).to_string()),
            }
        }
        Ok(service)
    }
}

/// `/v1/query/:name/execute`
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "Executed")]
struct QueryAnswer {
    service: String,
    datacenter: String,
    peer: String,
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

impl From<Executed> for QueryAnswer {
    fn from(executed: Executed) -> Self {
        let mut nodes = executed.nodes.unwrap_or(List(Vec::new()));
        // Consul shuffles them with each answer.
        let key = |entry: &HealthEntry| (entry.node.node.clone(), entry.service.id.clone());
        nodes.0.sort_by_key(key);
        Self {
            service: executed.service,
            datacenter: executed.datacenter,
            peer: executed.peer_name,
            nodes: nodes.into(),
        }
    }
}

impl Content for QueryAnswer {
    fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

impl QueryAnswer {
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
                .map(|endpoint| Arc::new(usable(endpoint, target.as_ref())))
                .collect(),
            name,
            explicit_addresses: BTreeSet::new(),
            ports: Ports::Any,
            defaults: ServiceDefaults::default(),
        })
    }
}

/// What a query lists may be called: a check that fails all the same is one that the query ignores
/// (`IgnoreCheckIDs`).
fn usable(endpoint: &Endpoint, target: Option<&Target>) -> Instance {
    let instance = &*endpoint.instance;
    Instance {
        tunnel: endpoint
            .wan
            .filter(|_| target.is_some())
            .unwrap_or(instance.tunnel),
        health: match instance.health {
            Health::Critical => Health::Passing,
            Health::Passing | Health::Warning => instance.health,
        },
        target: target.cloned(),
        ..instance.clone()
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

    fn answer(datacenter: &str, nodes: &Value) -> QueryAnswer {
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
    }

    #[test]
    fn what_cannot_be_followed_is_told() {
        assert!(answer("dc1", &json!(null)).is_empty());
        let peer = json!({"Service": "db", "Nodes": [], "PeerName": "east"});
        let peer: QueryAnswer = serde_json::from_value(peer).unwrap();
        assert!(peer.found("dc1").unwrap_err().contains("east"));
        QueryAnswer::default().found("dc1").unwrap_err();
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
