//! What upstreams lead to, by answers of Consul.

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
    let acl =
        json!({"acl": {"enabled": true, "default_policy": "allow", "tokens": {"master": "root"}}});
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
