//! Who gets which address.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::catalog::model::{Ports, Service, ServiceDefaults};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn pools(ipv4: &str) -> VipPools {
    VipPools {
        ipv4: ipv4.parse().unwrap(),
        ipv6: "fd00:1::/64".parse().unwrap(),
    }
}

fn allocator(ipv4: &str, state: Option<&Path>) -> VipAllocator {
    let (allocator, problem) = VipAllocator::new(pools(ipv4), state.map(Path::to_owned), DAY);
    assert!(problem.is_none(), "{problem:?}");
    allocator
}

fn snapshot<'a>(services: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) -> Snapshot {
    let service = |(name, explicit): (&str, Option<&str>)| {
        let name: ServiceName = name.parse().unwrap();
        let service = Service {
            name: name.clone(),
            instances: vec![],
            explicit_addresses: explicit.into_iter().map(|a| a.parse().unwrap()).collect(),
            ports: Ports::Listed(BTreeSet::from([80])),
            defaults: ServiceDefaults::default(),
        };
        (name, service.into())
    };
    Snapshot {
        is_whole: true,
        services: services.into_iter().map(service).collect(),
        nodes: BTreeMap::new(),
        intentions: vec![],
        default_intention: None,
    }
}

fn named(names: &[String]) -> Snapshot {
    snapshot(names.iter().map(|name| (name.as_str(), None)))
}

fn at(days: u32) -> SystemTime {
    UNIX_EPOCH + DAY * 20_000 + DAY * days
}

#[test]
fn the_address_follows_from_the_name_alone() {
    let alone = allocator("240.0.0.0/4", None).assign(&snapshot([("web", None)]), at(0));
    let among = allocator("240.0.0.0/4", None).assign(
        &snapshot([("api", None), ("db", None), ("web", None)]),
        at(5),
    );
    let web = "web".parse().unwrap();
    assert_eq!(alone.addresses.get(&web), among.addresses.get(&web));
    assert_eq!(alone.addresses[&web].len(), 2, "one of each family");
}

#[test]
fn a_freed_address_is_held_back_then_given_again() {
    // Two hosts: .1 and .2.
    let mut vips = allocator("240.0.0.0/30", None);
    let first = vips.assign(&snapshot([("a", None), ("b", None)]), at(0));
    assert!(first.problems.is_empty());
    let third = vips.assign(&snapshot([("a", None), ("c", None)]), at(0));
    assert!(
        matches!(third.problems.as_slice(), [VipProblem::Exhausted { service, .. }] if service.as_str() == "c"),
        "{:?}",
        third.problems
    );
    let back = vips.assign(&snapshot([("a", None), ("b", None)]), at(0));
    assert_eq!(
        back.addresses, first.addresses,
        "the same service gets it back"
    );
    vips.assign(&snapshot([("a", None)]), at(1));
    let later = vips.assign(&snapshot([("a", None), ("c", None)]), at(3));
    assert!(later.problems.is_empty(), "{:?}", later.problems);
}

#[test]
fn explicit_addresses_are_honoured_and_never_given_to_others() {
    let mut vips = allocator("240.0.0.0/30", None);
    let own = vips.assign(&snapshot([("web", None)]), at(0)).addresses;
    let v4 = own
        .values()
        .flatten()
        .find(|a| a.is_ipv4())
        .unwrap()
        .to_string();
    let claimed = vips.assign(&snapshot([("db", Some(v4.as_str())), ("web", None)]), at(0));
    assert_eq!(
        claimed.addresses[&"db".parse().unwrap()],
        BTreeSet::from([v4.parse().unwrap()])
    );
    assert!(!claimed.addresses[&"web".parse().unwrap()].contains(&v4.parse().unwrap()));
}

#[test]
fn an_address_claimed_twice_goes_to_the_first_by_name() {
    let mut vips = allocator("240.0.0.0/4", None);
    let twice = snapshot([("a", Some("10.96.0.1")), ("b", Some("10.96.0.1"))]);
    let assigned = vips.assign(&twice, at(0));
    assert_eq!(assigned.problems.len(), 1);
    assert!(assigned.addresses.contains_key(&"a".parse().unwrap()));
    assert!(!assigned.addresses.contains_key(&"b".parse().unwrap()));
}

#[test]
fn assignments_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state/vips.json");
    let both = snapshot([("a", None), ("b", None)]);
    let first = allocator("240.0.0.0/30", Some(&state)).assign(&both, at(0));
    assert!(first.problems.is_empty(), "{:?}", first.problems);
    // Alone and without memory, "b" might get what "a" has now.
    let only_b = allocator("240.0.0.0/30", Some(&state)).assign(&snapshot([("b", None)]), at(0));
    let b = "b".parse().unwrap();
    assert_eq!(only_b.addresses.get(&b), first.addresses.get(&b));
}

#[test]
fn a_damaged_state_file_is_moved_aside() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("vips.json");
    for damage in ["{", "{\"version\":9,\"services\":{}}", "\u{0}"] {
        fs::write(&state, damage).unwrap();
        let (mut vips, problem) = VipAllocator::new(pools("240.0.0.0/4"), Some(state.clone()), DAY);
        assert!(
            matches!(problem, Some(VipProblem::Damaged { .. })),
            "{damage:?}"
        );
        assert_eq!(
            fs::read_to_string(state.with_extension("damaged")).unwrap(),
            damage
        );
        assert!(
            vips.assign(&snapshot([("a", None)]), at(0))
                .problems
                .is_empty()
        );
    }
}

#[test]
fn what_a_state_file_may_not_say_is_given_anew() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("vips.json");
    let [a, b, c] = ["a", "b", "c"].map(|name| name.parse::<ServiceName>().unwrap());
    fs::write(
        &state,
        r#"{"version": 1, "services": {
            "a": {"ipv4": "240.0.0.5", "ipv6": "fd00:1::5"},
            "b": {"ipv4": "240.0.0.5", "ipv6": "fd00:1::5"},
            "c": {"ipv4": "255.255.255.255", "ipv6": "fd00:1::6"}}}"#,
    )
    .unwrap();
    let services = snapshot([("a", None), ("b", None), ("c", None)]);
    let given = allocator("240.0.0.0/4", Some(&state))
        .assign(&services, at(0))
        .addresses;
    let both = ["240.0.0.5", "fd00:1::5"].map(|a| a.parse().unwrap());
    assert_eq!(given[&a], BTreeSet::from(both));
    assert_eq!(given[&b].len(), 2);
    assert!(given[&b].is_disjoint(&given[&a]));
    assert!(!given[&c].contains(&IpAddr::V4(Ipv4Addr::BROADCAST)));
    assert_eq!(given[&c].len(), 2);
}

#[test]
fn what_could_not_be_saved_is_a_problem_until_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("state");
    let state = place.join("vips.json");
    let mut vips = allocator("240.0.0.0/4", Some(&state));
    // A file where the directory is to be made.
    fs::write(&place, "").unwrap();
    let web = snapshot([("web", None)]);
    for _ in 0..2 {
        let problems = vips.assign(&web, at(0)).problems;
        assert!(
            matches!(problems.as_slice(), [VipProblem::NotSaved { .. }]),
            "{problems:?}"
        );
    }
    fs::remove_file(&place).unwrap();
    assert!(vips.assign(&web, at(0)).problems.is_empty());
    assert!(fs::read_to_string(&state).unwrap().contains("web"));
    fs::remove_file(&state).unwrap();
    vips.assign(&web, at(0));
    assert!(!state.exists(), "saved once");
}

#[test]
fn a_state_file_that_cannot_be_written_is_reported_and_addresses_hold() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let (mut vips, _) = VipAllocator::new(pools("240.0.0.0/4"), Some(file.join("vips.json")), DAY);
    let assigned = vips.assign(&snapshot([("a", None)]), at(0));
    assert!(matches!(
        assigned.problems.as_slice(),
        [VipProblem::NotSaved { .. }]
    ));
    assert_eq!(assigned.addresses.len(), 1);
}

proptest! {
    #[test]
    fn no_two_services_share_and_adding_moves_nobody(
        mut names in proptest::collection::btree_set("[a-z]{1,3}", 1..60),
        more in proptest::collection::btree_set("[a-z]{1,3}", 0..60),
    ) {
        let mut vips = allocator("240.0.0.0/24", None);
        let first_names: Vec<String> = names.iter().cloned().collect();
        let first = vips.assign(&named(&first_names), at(0)).addresses;
        names.extend(more);
        let all_names: Vec<String> = names.into_iter().collect();
        let second = vips.assign(&named(&all_names), at(0)).addresses;
        for (name, addresses) in &first {
            prop_assert_eq!(second.get(name), Some(addresses));
        }
        let given: Vec<IpAddr> = second.values().flatten().copied().collect();
        let distinct: BTreeSet<IpAddr> = given.iter().copied().collect();
        prop_assert_eq!(distinct.len(), given.len());
    }
}

fn outside(destinations: &[(&str, &[&str], i64)]) -> Snapshot {
    use crate::catalog::destination::Destination;
    let mut outside = snapshot([]);
    for (name, addresses, port) in destinations {
        let addresses: Vec<String> = addresses.iter().map(|a| (*a).to_owned()).collect();
        let destination = Destination::read(&addresses, *port).unwrap();
        let defaults = ServiceDefaults {
            destination: Some(destination.clone().into()),
            ..ServiceDefaults::default()
        };
        let service = Service::outside(name.parse().unwrap(), &destination, defaults);
        outside
            .services
            .insert(service.name.clone(), service.into());
    }
    outside
}

#[test]
fn one_address_outside_may_have_a_service_at_each_port() {
    let mut snapshot = outside(&[
        ("db", &["192.0.2.7"], 5432),
        ("other", &["192.0.2.7"], 443),
        ("web", &["192.0.2.7"], 443),
    ]);
    let virtual_one = self::snapshot([("zone", Some("192.0.2.7"))]);
    snapshot.services.extend(virtual_one.services);
    let assigned = allocator("240.0.0.0/4", None).assign(&snapshot, at(0));
    let names: Vec<&str> = assigned.addresses.keys().map(ServiceName::as_str).collect();
    assert_eq!(names, ["db", "other"]);
    let problems: Vec<String> = assigned.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "services other and web both claim the address 192.0.2.7: other has it",
            "services db and zone both claim the address 192.0.2.7: db has it",
        ]
    );
}

#[test]
fn a_destination_outside_is_not_where_addresses_are_virtual() {
    let outside = outside(&[
        ("host", &["api.example.com"], 443),
        ("good", &["192.0.2.7"], 443),
        ("bad", &["192.0.2.8", "10.9.0.1", "fd00:1::7"], 443),
    ]);
    let assigned = allocator("10.9.0.0/16", None).assign(&outside, at(0));
    let of = |name: &str| &assigned.addresses[&name.parse().unwrap()];
    assert_eq!(of("host").len(), 2, "addresses of its own");
    assert_eq!(of("good"), &BTreeSet::from(["192.0.2.7".parse().unwrap()]));
    assert_eq!(of("bad"), &BTreeSet::from(["192.0.2.8".parse().unwrap()]));
    let problems: Vec<String> = assigned.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "the destination of bad, 10.9.0.1, is in 10.9.0.0/16, whose addresses are virtual",
            "the destination of bad, fd00:1::7, is in fd00:1::/64, whose addresses are virtual",
        ]
    );
}
