//! What is read when, of those without a blocking query.

use serde_json::json;

use super::*;
use crate::{
    consul::{ClientSettings, ConsulAddress},
    identity::LocalDomain,
};

fn known(health: &str) -> Arc<Endpoints> {
    serde_json::from_value(json!([{
        "Node": {"Node": "n1", "Address": "192.0.2.7"},
        "Service": {"ID": "x", "Port": 1, "Connect": {"Native": true}},
        "Checks": [{"Status": health}],
    }]))
    .unwrap()
}

#[tokio::test]
async fn every_second_turn_is_of_one_that_is_refused() {
    let client = Client::new(ClientSettings {
        address: ConsulAddress::Unix("/nowhere".into()),
        token_file: None,
        tls: None,
        namespace: None,
        partition: None,
        datacenter: None,
    });
    let domain = LocalDomain::new("td.test".parse().unwrap(), "dc1".to_owned());
    let settings = SourceSettings::new("n1".parse().unwrap(), domain);
    let (source, _handle) = ConsulSource::new(client, settings, watch::channel(None).1);
    let mut runner = Runner::new(source);
    for number in 0..6 {
        let query = Query::of(&format!("s{number}").parse().unwrap());
        let health = if matches!(number, 2 | 4) {
            "critical"
        } else {
            "passing"
        };
        let watch = runner.new_watch(&query);
        runner.asking.insert(query.clone(), Asking::Idle(watch));
        let known = if number == 5 {
            Arc::default()
        } else {
            known(health)
        };
        runner.state.endpoints.insert(query.clone(), known);
        runner.queries.push(query);
    }
    let mut turns = |count: usize| -> Vec<String> {
        let turns = (0..count).map(|_| runner.next_in_turn().unwrap());
        turns.map(|query| query.service.to_string()).collect()
    };
    assert_eq!(turns(6), ["s2", "s1", "s4", "s2", "s2", "s3"]);
    assert_eq!(turns(6), ["s4", "s4", "s2", "s5", "s4", "s0"]);
    runner.state.endpoints.clear();
    let mut turns = (0..2).map(|_| runner.next_in_turn().unwrap().service.to_string());
    assert_eq!(turns.next().as_deref(), Some("s1"));
    assert_eq!(turns.next().as_deref(), Some("s2"));
}
