//! Tables: what Consul's agent shows in, what to register out.

use serde_json::{Value, json};

use super::*;

fn node() -> OwnNode {
    OwnNode {
        name: "node-a".parse().unwrap(),
        address: [192, 0, 2, 1].into(),
        version: "1.2.3".to_owned(),
    }
}

fn agent(entries: &[Value]) -> AgentServices {
    let by_id = entries.iter().map(|entry| {
        let id = entry["ID"].as_str().unwrap().to_owned();
        (id, serde_json::from_value(entry.clone()).unwrap())
    });
    AgentServices(by_id.collect())
}

fn web() -> Value {
    json!({"ID": "web-1", "Service": "web", "Port": 8080, "Address": "", "Tags": ["v1"], "Meta": {"version": "1"},
        "Weights": {"Passing": 10, "Warning": 2}})
}

/// What `registration` looks like once Consul's agent has it.
fn shown(registration: &Registration) -> Value {
    let mut value = serde_json::to_value(registration).unwrap();
    let entry = value.as_object_mut().unwrap();
    entry.remove("Checks");
    let name = entry.remove("Name").unwrap();
    entry.insert("Service".to_owned(), name);
    value
}

fn wanted(service: &Value, port: u16) -> Registration {
    let (services, unusable) = local_services(&agent(std::slice::from_ref(service)));
    assert!(unusable.is_empty());
    let local = ([127, 0, 0, 1], services[0].port).into();
    let instance = node().instance(&services[0], port, local);
    node().registration(&services[0].service, &instance)
}

/// The plan where there is a listener at every port of `wanted`.
fn planned(node: &OwnNode, wanted: Vec<Registration>, present: &AgentServices) -> Plan {
    let listening = wanted
        .iter()
        .map(|registration| registration.port)
        .collect();
    plan(node, wanted, &listening, present)
}

#[test]
fn a_registration_is_a_connect_proxy_with_all_that_the_service_says() {
    let expected = json!({
        "ID": "sidestep-web-1", "Name": "web-sidestep-proxy", "Kind": "connect-proxy",
        "Address": "192.0.2.1", "Port": 21500, "Tags": ["v1"],
        "Meta": {"version": "1", "sidestep": "1.2.3", "sidestep-node": "node-a",
            "sidestep-instance": "web-1"},
        "Weights": {"Passing": 10, "Warning": 2},
        "Proxy": {"DestinationServiceName": "web",
            "LocalServiceAddress": "127.0.0.1", "LocalServicePort": 8080},
        "Checks": [
            {"Name": "Sidestep takes tunnels", "TCP": "192.0.2.1:21500", "Interval": "10s", "Timeout": "5s",
                "Status": "passing"},
            {"Name": "The instance behind it", "AliasService": "web-1"},
        ],
    });
    assert_eq!(
        serde_json::to_value(wanted(&web(), 21_500)).unwrap(),
        expected
    );
}

#[test]
fn an_address_that_does_not_follow_from_the_proxy_is_told() {
    let local: SocketAddr = ([127, 0, 0, 1], 8080).into();
    let table = [
        ("", 8080, None),
        ("192.0.2.1", 8080, None),
        ("0.0.0.0", 8080, None),
        ("192.0.2.9", 8080, Some("192.0.2.9:8080")),
        ("2001:db8::9", 8080, Some("[2001:db8::9]:8080")),
        ("", 80, Some("192.0.2.1:80")),
    ];
    for (address, port, expected) in table {
        let mut service = web();
        service["Address"] = json!(address);
        service["Port"] = json!(port);
        let (services, _) = local_services(&agent(&[service]));
        let instance = node().instance(&services[0], 21_500, local);
        let registered = expected.unwrap_or("192.0.2.1:8080");
        assert_eq!(
            instance.address().to_string(),
            registered,
            "{address} {port}"
        );
        let registration = node().registration(&services[0].service, &instance);
        let told = registration.meta.get(META_ADDRESS).map(String::as_str);
        assert_eq!(told, expected, "{address} {port}");
    }
}

#[test]
fn only_instances_that_can_be_reached_through_the_node_are_local() {
    let present = agent(&[
        web(),
        json!({"ID": "db-1", "Service": "db", "Port": 5432, "Address": "2001:db8::5"}),
        json!({"ID": "everywhere", "Service": "everywhere", "Port": 2, "Address": "0.0.0.0"}),
        json!({"ID": "named", "Service": "named", "Port": 1, "Address": "db.example"}),
        json!({"ID": "portless", "Service": "portless", "Port": 0}),
        json!({"ID": "web-1-sidecar-proxy", "Kind": "connect-proxy", "Service": "web-sidecar-proxy", "Port": 21000}),
        json!({"ID": "gateway", "Kind": "mesh-gateway", "Service": "gateway", "Port": 8443}),
        json!({"ID": "native", "Service": "native", "Port": 1, "Connect": {"Native": true}}),
        json!({"ID": "_nomad/task 1", "Service": "nomad", "Port": 1}),
        json!({"ID": "odd", "Service": "ödd", "Port": 1}),
    ]);
    let (services, unusable) = local_services(&present);
    let found: Vec<_> = services
        .iter()
        .map(|s| {
            (
                s.instance.as_str(),
                s.port,
                s.address.map(|a| a.to_string()),
            )
        })
        .collect();
    let expected = [
        ("_nomad/task 1", 1, None),
        ("db-1", 5432, Some("2001:db8::5".to_owned())),
        ("everywhere", 2, None),
        ("named", 1, None),
        ("web-1", 8080, None),
    ];
    assert_eq!(found, expected);
    assert_eq!(unusable, ["odd"]);
    assert_eq!(services[1].weights, Weights::default());
}

#[test]
fn what_is_there_already_is_not_registered_again() {
    let registration = wanted(&web(), 21_500);
    let present = agent(&[web(), shown(&registration)]);
    assert_eq!(
        planned(&node(), vec![registration], &present),
        Plan::default()
    );
}

type Change = fn(&mut Value);

#[test]
fn any_change_of_the_service_is_carried_to_its_proxy() {
    let present = agent(&[web(), shown(&wanted(&web(), 21_500))]);
    let changes: [(&str, Change); 6] = [
        ("meta", |service| service["Meta"]["version"] = json!("2")),
        ("meta gone", |service| service["Meta"] = json!({})),
        ("tags", |service| service["Tags"] = json!([])),
        ("weights", |service| {
            service["Weights"]["Passing"] = json!(1);
        }),
        ("port", |service| service["Port"] = json!(8081)),
        ("service", |service| service["Service"] = json!("api")),
    ];
    for (what, change) in changes {
        let mut service = web();
        change(&mut service);
        let changed = wanted(&service, 21_500);
        let done = planned(&node(), vec![changed.clone()], &present);
        assert_eq!(done.register, [changed], "{what}");
        assert!(done.deregister.is_empty(), "{what}");
    }
    let moved = wanted(&web(), 21_501);
    assert_eq!(
        planned(&node(), vec![moved.clone()], &present).register,
        [moved]
    );
    let updated = OwnNode {
        version: "1.2.4".to_owned(),
        ..node()
    };
    let (services, _) = local_services(&agent(&[web()]));
    let instance = updated.instance(&services[0], 21_500, ([127, 0, 0, 1], 8080).into());
    let again = updated.registration(&services[0].service, &instance);
    assert_eq!(
        planned(&updated, vec![again], &present).register.len(),
        1,
        "another version"
    );
}

#[test]
fn ours_of_an_earlier_life_go_and_what_is_of_others_stays() {
    let ours = shown(&wanted(
        &json!({"ID": "old-1", "Service": "old", "Port": 1}),
        21_501,
    ));
    let mut other_node = ours.clone();
    other_node["ID"] = json!("sidestep-far-1");
    other_node["Meta"]["sidestep-node"] = json!("node-b");
    let mut only_named_so = ours.clone();
    only_named_so["ID"] = json!("sidestep-mine");
    only_named_so["Meta"] = json!({});
    let mut not_a_proxy = ours.clone();
    not_a_proxy["ID"] = json!("sidestep-service");
    not_a_proxy["Kind"] = json!("");
    let mut renamed = ours.clone();
    renamed["ID"] = json!("old-1-sidecar-proxy");
    let present = agent(&[web(), ours, other_node, only_named_so, not_a_proxy, renamed]);
    let done = planned(&node(), vec![], &present);
    let expected = Plan {
        deregister: vec!["sidestep-old-1".to_owned()],
        ..Plan::default()
    };
    assert_eq!(done, expected);
}

#[test]
fn an_id_that_somebody_else_has_is_left_to_them() {
    let mut theirs = shown(&wanted(&web(), 21_500));
    theirs["Meta"]["sidestep-node"] = json!("node-b");
    let done = planned(
        &node(),
        vec![wanted(&web(), 21_500)],
        &agent(&[web(), theirs]),
    );
    let expected = Plan {
        taken: ["sidestep-web-1".to_owned()].into(),
        ..Plan::default()
    };
    assert_eq!(done, expected);
}

#[test]
fn without_a_listener_nothing_is_registered_and_what_was_stays() {
    let registration = wanted(&web(), 21_500);
    let none = BTreeSet::new();
    let nothing_yet = plan(&node(), vec![registration.clone()], &none, &agent(&[web()]));
    assert_eq!(nothing_yet, Plan::default());
    let mut of_before = shown(&registration);
    of_before["Meta"]["sidestep"] = json!("1.2.2");
    let present = agent(&[web(), of_before]);
    let stays = plan(&node(), vec![registration.clone()], &none, &present);
    assert_eq!(stays, Plan::default());
    let listening = [21_500].into();
    let renewed = plan(&node(), vec![registration.clone()], &listening, &present);
    assert_eq!(renewed.register, [registration]);
}
