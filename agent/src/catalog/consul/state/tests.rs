//! The state with every order of answers that a datacenter may give.

use serde_json::json;

use super::*;
use crate::catalog::consul::{chain::ChainAnswer, entries::Resolvers};
use crate::catalog::model::{Intention, IntentionMatch};

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn names(texts: &[&str]) -> BTreeSet<ServiceName> {
    texts.iter().map(|text| name(text)).collect()
}

fn state() -> State {
    let domain = LocalDomain::new("td.test".parse().unwrap(), "dc1".to_owned());
    let mut state = State::new("n1".parse().unwrap(), domain, false);
    state.local = Some(names(&["web"]));
    state.names = Some(names(&[
        "consul",
        "db",
        "db-sidecar-proxy",
        "api",
        "web",
        "web-sidecar-proxy",
    ]));
    state.defaults = Some(Arc::default());
    state.global = Some(Arc::default());
    state.resolvers = Some(BTreeSet::new());
    state.policy = Some(Arc::new(Policy {
        intentions: vec![allow("web", "db")],
        default: Some(IntentionAction::Deny),
        problems: vec![],
    }));
    state.choose();
    state
}

fn allow(source: &str, destination: &str) -> Intention {
    let side = |text: &str| IntentionMatch {
        namespace: Some("default".into()),
        name: Some(name(text)),
    };
    Intention {
        source: side(source),
        destination: side(destination),
        action: IntentionAction::Allow,
        description: String::new(),
        entry: "".into(),
    }
}

fn known(instances: &[(&str, &str, &str)]) -> Arc<Endpoints> {
    let entry = |(id, node, status): &(&str, &str, &str)| {
        json!({"Node": {"Node": node, "Address": "192.0.2.7"},
            "Service": {"ID": format!("{id}-proxy"), "Kind": "connect-proxy", "Port": 21000,
                "Proxy": {"DestinationServiceID": id, "LocalServicePort": 80}},
            "Checks": [{"Status": status}]})
    };
    let entries: Vec<_> = instances.iter().map(entry).collect();
    serde_json::from_value(json!(entries))
        .map(Arc::new)
        .unwrap()
}

fn shown(state: &mut State) -> (bool, Vec<String>) {
    let queries = state.queries();
    let snapshot = state.snapshot(&queries);
    let services = snapshot.services.values().map(|service| {
        let instances = service.instances.iter();
        let instances: Vec<_> = instances
            .map(|i| format!("{}*{}", i.id, i.weight()))
            .collect();
        format!("{}: {}", service.name, instances.join(" "))
    });
    (snapshot.is_whole, services.collect())
}

#[test]
fn only_what_concerns_this_node_is_read() {
    let mut state = state();
    let read = |state: &State| {
        let queries = state.queries();
        let names: Vec<_> = queries.iter().map(|q| q.service.to_string()).collect();
        names.join(" ")
    };
    assert_eq!(read(&state), "web db");
    let everyone = Policy {
        default: Some(IntentionAction::Allow),
        ..Policy::default()
    };
    state.policy = Some(Arc::new(everyone));
    state.choose();
    assert_eq!(
        read(&state),
        "web api consul db db-sidecar-proxy web-sidecar-proxy"
    );
    // What is called comes first, then what can be called.
    state.know(Query::of(&name("db")), known(&[("db-1", "n2", "passing")]));
    state.wanted.insert(name("consul"), Instant::now());
    assert_eq!(
        read(&state),
        "web consul db api db-sidecar-proxy web-sidecar-proxy"
    );
}

#[test]
fn services_whose_names_were_resolved_are_chosen_for_an_hour() {
    let mut state = state();
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    assert!(state.name(&name("api"), at(0)));
    assert!(!state.name(&name("db"), at(0)), "chosen anyway");
    state.name(&name("nobody"), at(0));
    state.choose();
    assert!(state.is_chosen(&name("api")));
    assert!(!state.is_chosen(&name("nobody")), "Consul has none");

    state.name(&name("consul"), at(4000));
    state.choose();
    assert!(!state.is_chosen(&name("api")));
    assert!(state.is_chosen(&name("consul")));

    for n in 0..NAMED_MAX {
        state.name(&name(&format!("s{n}")), at(4001));
    }
    state.choose();
    assert!(!state.is_chosen(&name("consul")), "the oldest makes room");
    assert_eq!(state.named.len(), NAMED_MAX);
}

#[test]
fn a_catalog_is_whole_when_everything_was_read() {
    let mut state = state();
    assert_eq!(shown(&mut state), (false, vec![]));
    state.know(Query::of(&name("db")), known(&[("db-1", "n2", "passing")]));
    assert_eq!(shown(&mut state), (false, vec!["db: db-1*1".to_owned()]));
    state.know(Query::of(&name("web")), known(&[]));
    // web cannot be called: no proxy. It gets no address.
    assert_eq!(shown(&mut state), (true, vec!["db: db-1*1".to_owned()]));
    // And whole it stays.
    state.policy = Some(Arc::new(Policy {
        default: Some(IntentionAction::Allow),
        ..Policy::default()
    }));
    state.choose();
    assert!(shown(&mut state).0);
    for part in 0..6 {
        let mut state = self::state();
        for service in ["db", "web"] {
            state.know(Query::of(&name(service)), known(&[]));
        }
        match part {
            0 => state.local = None,
            1 => state.names = None,
            2 => state.policy = None,
            3 => state.defaults = None,
            4 => state.global = None,
            _ => state.resolvers = None,
        }
        assert!(!shown(&mut state).0, "part {part}");
    }
}

#[test]
fn a_name_that_left_the_list_stays_until_its_own_answer_is_empty() {
    let mut state = state();
    let db = Query::of(&name("db"));
    state.know(db.clone(), known(&[("db-1", "n2", "passing")]));
    state.names = Some(names(&["consul"]));
    state.choose();
    assert_eq!(shown(&mut state).1, ["db: db-1*1"]);
    state.know(db, known(&[]));
    state.choose();
    assert_eq!(shown(&mut state).1, [""; 0]);
    assert_eq!(state.queries(), [Query::of(&name("web"))]);
}

#[test]
fn what_nobody_here_may_call_any_more_is_forgotten() {
    let mut state = state();
    let db = Query::of(&name("db"));
    state.know(db.clone(), known(&[("db-1", "n2", "passing")]));
    state.policy = Some(Arc::default());
    state.policy = Some(Arc::new(Policy {
        default: Some(IntentionAction::Deny),
        ..Policy::default()
    }));
    state.choose();
    let queries = state.queries();
    state.retain(&queries);
    assert!(!state.endpoints.contains_key(&db));
    assert_eq!(shown(&mut state).1, [""; 0]);
}

#[test]
fn a_resolver_decides_whose_instances_are_called() {
    let mut state = state();
    let resolvers: Resolvers =
        serde_json::from_value(json!([{"Name": "db", "ModifyIndex": 7}, {"Name": "web"}])).unwrap();
    state.resolvers = Some(resolvers.names());
    state.choose();
    assert_eq!(state.with_resolver(), [name("db"), name("web")]);
    state.know(Query::of(&name("db")), known(&[("db-1", "n2", "passing")]));
    // Until the chain is known, nobody is sent to the wrong place.
    assert_eq!(shown(&mut state), (false, vec![]));
    // What was known before stays so long.
    let mut later = self::state();
    later.know(Query::of(&name("db")), known(&[("db-1", "n2", "passing")]));
    assert_eq!(shown(&mut later).1, ["db: db-1*1"]);
    later.resolvers.clone_from(&state.resolvers);
    later.choose();
    assert_eq!(shown(&mut later).1, ["db: db-1*1"]);
    let chain = |service: &str, filter: &str| -> ChainAnswer {
        serde_json::from_value(json!({"Chain": {"Datacenter": "dc1", "StartNode": "r",
            "Nodes": {"r": {"Resolver": {"Target": "t"}}},
            "Targets": {"t": {"Service": service, "Datacenter": "dc1", "Subset": {"Filter": filter}}}}}))
        .unwrap()
    };
    for (service, target, filter) in [("db", "db-standby", ""), ("web", "web", "v2")] {
        let plan = Plan::of_chain(&name(service), &chain(target, filter)).unwrap();
        state.plan(name(service), plan);
    }
    let queries = state.queries();
    let standby = Query::of(&name("db-standby"));
    let v2 = Query {
        filter: "v2".into(),
        ..Query::of(&name("web"))
    };
    assert_eq!(
        queries,
        [
            v2.clone(),
            Query::of(&name("web")),
            standby.clone(),
            Query::of(&name("db"))
        ]
    );
    state.retain(&queries);
    state.know(standby, known(&[("standby-1", "n3", "passing")]));
    state.know(v2, known(&[("web-2", "n2", "passing")]));
    let own = known(&[("web-1", "n1", "passing"), ("web-2", "n2", "passing")]);
    state.know(Query::of(&name("web")), own);
    assert_eq!(
        shown(&mut state),
        (
            true,
            vec![
                "db: standby-1*1".to_owned(),
                "web: web-2*1 web-1*0".to_owned()
            ]
        )
    );
}

#[test]
fn a_destination_is_a_service_outside_unless_the_mesh_has_it() {
    let mut state = state();
    state.know(Query::of(&name("db")), known(&[("db-1", "n2", "passing")]));
    state.know(Query::of(&name("web")), known(&[]));
    let entry = |name: &str, host: &str| {
        json!({"Kind": "service-defaults", "Name": name, "Protocol": "tcp",
            "Destination": {"Addresses": [host], "Port": 443}})
    };
    let defaults = |entries: &[serde_json::Value]| {
        Some(Arc::new(serde_json::from_value(json!(entries)).unwrap()))
    };
    state.defaults = defaults(&[
        entry("payments", "api.example.com"),
        entry("legacy", "192.0.2.9"),
        // Consul knows a service of this name.
        entry("db", "db.example.com"),
        entry("broken", "*.example.com"),
    ]);
    state.rebuild();
    let expected = ["db: db-1*1", "legacy: ", "payments: "].map(str::to_owned);
    assert_eq!(shown(&mut state), (true, expected.to_vec()));
    let [problem] = state.problems().try_into().unwrap();
    assert!(
        problem.starts_with("service-defaults broken: destination.addresses: \"*.example.com\""),
        "{problem}"
    );
    let queries = state.queries();
    let first = state.snapshot(&queries);
    let place = |name_: &str| {
        let service = &first.services[&name(name_)];
        service.destination().map(ToString::to_string)
    };
    assert_eq!(place("payments").unwrap(), "api.example.com:443");
    assert_eq!(place("legacy").unwrap(), "192.0.2.9:443");
    assert_eq!(place("db"), None);
    // What did not change is shared.
    state.rebuild();
    let second = state.snapshot(&queries);
    let [before, now] = [&first, &second].map(|s| &s.services[&name("payments")]);
    assert!(Arc::ptr_eq(before, now));

    state.defaults = defaults(&[]);
    state.rebuild();
    assert_eq!(shown(&mut state), (true, vec!["db: db-1*1".to_owned()]));
}
