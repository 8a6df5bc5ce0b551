//! The source against the real Consul.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde_json::{Value, json};

use super::*;
use crate::{
    catalog::model::IntentionAction,
    consul::{
        Request,
        testing::{RealConsul, register, with_sidecar},
    },
    telemetry::log::chain,
};

/// A source that runs, and what it published last.
struct Running {
    snapshots: watch::Receiver<Option<Snapshot>>,
    handle: ConsulHandle,
    local: watch::Sender<Option<BTreeSet<ServiceName>>>,
    _task: tokio::task::JoinHandle<()>,
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

impl Running {
    fn start(client: Client, max_watches: usize) -> Self {
        let domain = LocalDomain::new("td.test".parse().unwrap(), "dc1".to_owned());
        let settings = SourceSettings {
            max_watches,
            ..SourceSettings::new("node1".parse().unwrap(), domain)
        };
        let (local, receiver) = watch::channel(None);
        let (source, handle) = ConsulSource::new(client, settings, receiver);
        let (sender, snapshots) = watch::channel(None);
        let shutdown = Shutdown::default();
        let task = shutdown.clone().spawn("source", async move {
            let publish = |snapshot| {
                sender.send_replace(Some(snapshot));
            };
            source.run(shutdown, publish).await;
        });
        Self {
            snapshots,
            handle,
            local,
            _task: task,
        }
    }

    fn set_local(&self, names: &[&str]) {
        let names = names.iter().map(|text| name(text)).collect();
        self.local.send_replace(Some(names));
    }

    /// Waits until what is published is so, and returns it.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let reached = self
            .snapshots
            .wait_for(|snapshot| snapshot.as_ref().is_some_and(&is_so));
        let reached = timeout(Duration::from_secs(20), reached).await;
        let reached = reached.map(|snapshot| snapshot.unwrap().clone().unwrap());
        reached.unwrap_or_else(|_elapsed| {
            panic!(
                "not reached: {what}\n{:#?}\n{:#?}",
                *self.snapshots.borrow(),
                self.handle.status()
            )
        })
    }
}

/// Names and instances.
fn shown(snapshot: &Snapshot) -> BTreeMap<&str, Vec<String>> {
    let services = snapshot.services.values();
    services
        .map(|service| {
            let instances = service.instances.iter();
            let instances = instances.map(|i| format!("{}*{}", i.id, i.weight()));
            (service.name.as_str(), instances.collect())
        })
        .collect()
}

async fn intend(client: &Client, source: &str, destination: &str, action: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Created {
        #[serde(rename = "ID")]
        id: String,
    }
    let request = Request::to(&["v1", "connect", "intentions"]);
    let intention = json!({"SourceName": source, "DestinationName": destination, "Action": action});
    let created = client.post::<Created>(&request, &intention).await;
    created.unwrap().body.id
}

async fn configure(client: &Client, entry: Value) {
    let request = Request::to(&["v1", "config"]);
    client.put(&request, &entry).await.unwrap();
}

async fn deregister(client: &Client, id: &str) {
    let request = Request::to(&["v1", "agent", "service", "deregister", id]);
    client.put_nothing(&request).await.unwrap();
}

#[tokio::test]
async fn a_datacenter_is_followed() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    register(&client, &with_sidecar("db", 5432, 21000)).await;
    register(&client, &with_sidecar("web", 8080, 21001)).await;
    register(&client, &json!({"Name": "plain", "Port": 80})).await;
    let mut running = Running::start(client.clone(), 128);
    let unknown = running.until("intentions", |_| true).await;
    assert!(!unknown.is_whole, "the local services are not known");
    running.set_local(&["web"]);
    let snapshot = running.until("whole", |snapshot| snapshot.is_whole).await;
    let expected = BTreeMap::from([
        ("db", vec!["db-1*1".to_owned()]),
        ("web", vec!["web-1*1".to_owned()]),
    ]);
    assert_eq!(shown(&snapshot), expected);
    assert_eq!(snapshot.default_intention, Some(IntentionAction::Allow));
    let db = &snapshot.services[&name("db")].instances[0];
    assert_eq!(db.tunnel, (Ipv4Addr::LOCALHOST, 21000).into());
    assert_eq!(db.local, (Ipv4Addr::LOCALHOST, 5432).into());

    // A new service, and one that gets a proxy only now.
    register(&client, &with_sidecar("cache", 6379, 21002)).await;
    register(&client, &with_sidecar("plain", 80, 21003)).await;
    running
        .until("new services", |s| {
            shown(s).contains_key("cache") && shown(s).contains_key("plain")
        })
        .await;
    // And gone.
    deregister(&client, "cache-1").await;
    running
        .until("cache gone", |s| !shown(s).contains_key("cache"))
        .await;

    // What nobody here may call is not read.
    let id = intend(&client, "web", "db", "deny").await;
    let snapshot = running
        .until("db denied", |s| !shown(s).contains_key("db"))
        .await;
    let intention = &snapshot.intentions[0];
    assert_eq!(&*intention.entry, format!("intention {id}"));
    assert_eq!(intention.action, IntentionAction::Deny);
    let gone = Request::to(&["v1", "connect", "intentions", &id]);
    client.delete(&gone).await.unwrap();
    running
        .until("db allowed", |s| {
            shown(s).contains_key("db") && s.intentions.is_empty()
        })
        .await;
    let status = running.handle.status();
    assert_eq!(status.behind_for(Instant::now()), None, "{status:?}");
    assert_eq!((status.in_turns, status.problem), (0, None));
}

#[tokio::test]
async fn config_entries_count() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    for (service, port) in [("db", 21000), ("standby", 21001), ("web", 21002)] {
        register(&client, &with_sidecar(service, 80, port)).await;
    }
    let mut running = Running::start(client.clone(), 128);
    running.set_local(&["web"]);
    let target = |snapshot: &Snapshot| {
        let db = snapshot.services.get(&name("db"))?;
        let instance = db.instances.first()?;
        let target = instance.target.as_ref().map(|t| t.service.to_string());
        Some((instance.id.to_string(), target))
    };
    let own = |id: &str| Some((id.to_owned(), None));
    running.until("db", |s| target(s) == own("db-1")).await;
    configure(
        &client,
        json!({"Kind": "service-resolver", "Name": "db", "Failover": {"*": {"Service": "standby"}}}),
    )
    .await;
    configure(
        &client,
        json!({"Kind": "service-defaults", "Name": "db", "Protocol": "tcp"}),
    )
    .await;
    running
        .until("defaults", |s| {
            let db = s.services.get(&name("db"));
            db.is_some_and(|db| db.defaults.protocol.as_deref() == Some("tcp"))
        })
        .await;
    // Its only instance fails: the other service stands in, as itself.
    let standby = || Some(("standby-1".to_owned(), Some("standby".to_owned())));
    let ttl = Request::to(&["v1", "agent", "check", "fail", "service:db-1-sidecar-proxy"]);
    client.put_nothing(&ttl).await.unwrap();
    running.until("failover", |s| target(s) == standby()).await;
    let ttl = Request::to(&["v1", "agent", "check", "pass", "service:db-1-sidecar-proxy"]);
    client.put_nothing(&ttl).await.unwrap();
    running.until("back", |s| target(s) == own("db-1")).await;
    configure(
        &client,
        json!({"Kind": "service-resolver", "Name": "db", "Redirect": {"Service": "standby"}}),
    )
    .await;
    running.until("redirect", |s| target(s) == standby()).await;
    // A subset that has nobody: this node's own instances are still delivered to, and nobody is sent there.
    configure(
        &client,
        json!({"Kind": "service-resolver", "Name": "web", "DefaultSubset": "v9",
            "Subsets": {"v9": {"Filter": "Service.Meta.version == v9"}}}),
    )
    .await;
    running
        .until("nobody", |s| {
            shown(s).get("web") == Some(&vec!["web-1*0".to_owned()])
        })
        .await;
    for service in ["db", "web"] {
        let entry = Request::to(&["v1", "config", "service-resolver", service]);
        client.delete(&entry).await.unwrap();
    }
    running
        .until("no resolver", |s| {
            target(s) == own("db-1") && shown(s).get("web") == Some(&vec!["web-1*1".to_owned()])
        })
        .await;
}

#[tokio::test]
async fn beyond_its_queries_what_is_called_is_read_at_once() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    for index in 0..12_u16 {
        let service = format!("s{index}");
        register(&client, &with_sidecar(&service, 80, 21000 + index)).await;
    }
    let mut running = Running::start(client.clone(), 3);
    running.set_local(&["s0"]);
    let snapshot = running.until("whole", |snapshot| snapshot.is_whole).await;
    assert_eq!(snapshot.services.len(), 12);
    // Another instance of the last, which nobody watches; the turns come round in seconds.
    let mut second = with_sidecar("s9", 81, 22000);
    second["ID"] = json!("s9-2");
    register(&client, &second).await;
    let instances = |s: &Snapshot| s.services[&name("s9")].instances.len();
    running.handle.wanted(&name("s9")).await;
    running.snapshots.mark_unchanged();
    let now = running.snapshots.borrow().as_ref().map(instances);
    assert_eq!(now, Some(2));
    // From then on it is watched.
    let watched = async {
        while !running
            .handle
            .shared
            .watched
            .load()
            .contains_key(&name("s9"))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(5), watched).await.unwrap();
    deregister(&client, "s9-2").await;
    running.until("gone", |s| instances(s) == 1).await;
    // And the others are seen in turns.
    deregister(&client, "s7-1").await;
    running
        .until("seen in turns", |s| s.services.len() == 11)
        .await;
}

#[derive(serde::Deserialize)]
struct AclPolicy {
    #[serde(rename = "ID")]
    id: String,
}

/// Consul takes it only some time after it has a leader. Returns its id.
pub(super) async fn create_policy(root: &Client, policy: &Value) -> String {
    let create = Request::to(&["v1", "acl", "policy"]);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match root.put(&create, policy).await {
            Ok(answer) => {
                return serde_json::from_slice::<AclPolicy>(&answer.body)
                    .unwrap()
                    .id;
            }
            Err(error) => assert!(Instant::now() < deadline, "{}", chain(&error)),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_token_that_loses_its_rights_loses_nothing_else() {
    let acl = json!({"acl": {"enabled": true, "default_policy": "allow", "tokens": {"master": "root-token"}}});
    let Some(consul) = RealConsul::start(acl).await else {
        return;
    };
    let root = consul.client_with("root", "root-token");
    let rules = |service: &str, node: &str| {
        let rules = format!(
            "service_prefix \"\" {{policy=\"{service}\" intentions=\"{service}\"}} \
             node_prefix \"\" {{policy=\"{node}\"}}"
        );
        json!({"Name": "p", "Rules": rules})
    };
    let id = create_policy(&root, &rules("read", "read")).await;
    let secret = "11111111-2222-3333-4444-555555555555";
    let token = json!({"SecretID": secret, "Policies": [{"Name": "p"}]});
    let tokens = Request::to(&["v1", "acl", "token"]);
    root.put(&tokens, &token).await.unwrap();
    register(&root, &with_sidecar("db", 5432, 21000)).await;
    register(&root, &with_sidecar("web", 80, 21001)).await;
    intend(&root, "web", "db", "allow").await;
    let denial = intend(&root, "*", "*", "deny").await;
    let mut running = Running::start(consul.client_with("token", secret), 128);
    running.set_local(&["web"]);
    let is_read = |s: &Snapshot| s.is_whole && shown(s).len() == 2 && s.intentions.len() == 2;
    running.until("whole", is_read).await;

    let update = Request::to(&["v1", "acl", "policy", &id]);
    // Without the right to see nodes, all instances are left out of answers that look right otherwise.
    root.put(&update, &rules("read", "deny")).await.unwrap();
    let behind = async {
        let mut n = 0;
        while running.handle.status().behind_for(Instant::now()).is_none() {
            n += 1;
            register(&root, &with_sidecar("db", 5500 + n, 21000)).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let doubted = timeout(Duration::from_secs(20), behind).await;
    doubted.unwrap_or_else(|_elapsed| panic!("{:#?}", running.handle.status()));
    let now = running.snapshots.borrow().clone().unwrap();
    assert!(shown(&now).contains_key("db"), "{now:?}");

    root.put(&update, &rules("deny", "deny")).await.unwrap();
    let behind = async {
        let mut n = 0;
        loop {
            // What is watched changes, so that it is answered.
            n += 1;
            register(&root, &with_sidecar("db", 6000 + n, 21000)).await;
            register(&root, &with_sidecar(&format!("new-{n}"), 80, 22000)).await;
            configure(&root, json!({"Kind": "service-defaults", "Name": "x"})).await;
            let added = intend(&root, "nobody", &format!("n{n}"), "deny").await;
            let status = running.handle.status();
            let doubted = |path: &str| {
                let mut watches = status.watches.iter();
                watches.any(|w| w.path.contains(path) && w.problem.is_some())
            };
            if doubted("health/connect/db") && doubted("connect/intentions") {
                return added;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let doubted = timeout(Duration::from_secs(20), behind).await;
    doubted.unwrap_or_else(|_elapsed| panic!("{:#?}", running.handle.status()));
    let now = running.snapshots.borrow().clone().unwrap();
    assert!(shown(&now).contains_key("db"), "{now:?}");
    assert!(
        now.intentions
            .iter()
            .any(|i| *i.entry == *format!("intention {denial}"))
    );
    // The right comes back, and with it the truth.
    root.put(&update, &rules("read", "read")).await.unwrap();
    let gone = Request::to(&["v1", "connect", "intentions", &denial]);
    root.delete(&gone).await.unwrap();
    running
        .until("the denial gone", |s| {
            !s.intentions
                .iter()
                .any(|i| *i.entry == *format!("intention {denial}"))
                && s.default_intention == Some(IntentionAction::Allow)
        })
        .await;
}

#[tokio::test]
async fn a_resolver_that_is_out_of_sight_still_holds() {
    let acl = json!({"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "root-token"}}});
    let Some(consul) = RealConsul::start(acl).await else {
        return;
    };
    let root = consul.client_with("root", "root-token");
    let rules = |service: &str| {
        let rules = format!(
            "service_prefix \"\" {{policy=\"read\"}} node_prefix \"\" {{policy=\"read\"}} \
             service \"db\" {{policy=\"{service}\"}}"
        );
        json!({"Name": "p", "Rules": rules})
    };
    let id = create_policy(&root, &rules("read")).await;
    let secret = "11111111-2222-3333-4444-555555555555";
    let token = json!({"SecretID": secret, "Policies": [{"Name": "p"}]});
    let tokens = Request::to(&["v1", "acl", "token"]);
    root.put(&tokens, &token).await.unwrap();
    intend(&root, "web", "*", "allow").await;
    for (service, port) in [("db", 21000), ("standby", 21001), ("web", 21002)] {
        register(&root, &with_sidecar(service, 80, port)).await;
    }
    configure(
        &root,
        json!({"Kind": "service-resolver", "Name": "db", "Redirect": {"Service": "standby"}}),
    )
    .await;
    let mut running = Running::start(consul.client_with("token", secret), 128);
    running.set_local(&["web"]);
    // The own instance is listed for calls from elsewhere.
    let redirected = ["standby-1*1", "db-1*0"].map(str::to_owned).to_vec();
    running
        .until("redirected", |s| shown(s).get("db") == Some(&redirected))
        .await;
    let update = Request::to(&["v1", "acl", "policy", &id]);
    root.put(&update, &rules("deny")).await.unwrap();
    let doubted = async {
        loop {
            // An entry of the same kind, so that the query is answered.
            configure(&root, json!({"Kind": "service-resolver", "Name": "x"})).await;
            let status = running.handle.status();
            let mut watches = status.watches.iter();
            if watches.any(|w| w.path.contains("service-resolver") && w.problem.is_some()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let reached = timeout(Duration::from_secs(10), doubted).await;
    reached.unwrap_or_else(|_elapsed| panic!("{:#?}", running.handle.status()));
    let now = running.snapshots.borrow().clone().unwrap();
    assert_eq!(shown(&now).get("db"), Some(&redirected));
}

#[tokio::test]
async fn a_consul_that_is_away_takes_nothing_with_it() {
    let Some(mut consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    register(&client, &with_sidecar("db", 5432, 21000)).await;
    register(&client, &with_sidecar("web", 80, 21001)).await;
    let mut running = Running::start(client.clone(), 1);
    running.set_local(&["web"]);
    let before = running.until("whole", |snapshot| snapshot.is_whole).await;
    consul.kill();
    let behind = async {
        while running.handle.status().behind_for(Instant::now()).is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), behind).await.unwrap();
    assert_eq!(*running.snapshots.borrow(), Some(before));
    // Another one on the same port, without memory, and so with lower indexes.
    consul.restart().await;
    register(&client, &with_sidecar("db", 5433, 21000)).await;
    register(&client, &with_sidecar("web", 80, 21001)).await;
    running
        .until("followed again", |s| {
            let db = s.services.get(&name("db"));
            db.is_some_and(|db| db.instances.iter().any(|i| i.port == 5433))
        })
        .await;
}

#[tokio::test]
async fn a_service_whose_name_is_resolved_is_known_also_if_nobody_may_call_it() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    register(&client, &with_sidecar("Db", 5432, 21000)).await;
    register(&client, &with_sidecar("web", 8080, 21001)).await;
    register(&client, &json!({"Name": "plain", "Port": 80})).await;
    intend(&client, "*", "*", "deny").await;
    let mut running = Running::start(client.clone(), 128);
    running.set_local(&["web"]);
    let before = running.until("the own service", |s| s.is_whole).await;
    assert_eq!(shown(&before).into_keys().collect::<Vec<_>>(), ["web"]);

    // DNS does not tell upper from lower case.
    for (service, expected) in [
        ("db", LookUp::InMesh),
        ("plain", LookUp::Outside),
        ("plain", LookUp::Outside),
        ("nope", LookUp::Outside),
        ("web", LookUp::InMesh),
    ] {
        assert_eq!(
            running.handle.look_up(&name(service)).await,
            expected,
            "{service}"
        );
    }
    let after = running.snapshots.borrow().clone().unwrap();
    assert_eq!(shown(&after).into_keys().collect::<Vec<_>>(), ["Db", "web"]);

    // One that joins the mesh later.
    register(&client, &with_sidecar("plain", 80, 21002)).await;
    running
        .until("the one that joined", |s| {
            s.services.contains_key(&name("plain"))
        })
        .await;
    assert_eq!(running.handle.look_up(&name("plain")).await, LookUp::InMesh);
}
