//! Names and what they lead to.

use hickory_proto::rr::RecordType::{A, AAAA, ANY, AXFR, MX, NS, PTR, SOA, SRV, TXT};

use super::*;
use crate::dns::testing;

const VIRTUAL: &str = "240.0.0.10";

fn zone(service_answers: ServiceAnswers) -> Zone {
    testing::zone(service_answers, true)
}

/// Everything in an answer, a line each.
fn lines(answer: &Answer) -> Vec<String> {
    let section = |mark: &str, records: &[Record]| -> Vec<String> {
        records
            .iter()
            .map(|r| format!("{mark}{} {} {}", r.name, r.record_type(), r.data))
            .collect()
    };
    let mut lines = vec![format!("{:?}", answer.code)];
    lines.extend(section("", &answer.answers));
    lines.extend(
        section("authority ", &answer.authorities)
            .into_iter()
            .map(|line| {
                // The numbers of the SOA record are another test's.
                line.split(" SOA ").next().unwrap_or_default().to_owned()
            }),
    );
    lines.extend(section("additional ", &answer.additionals));
    lines
}

#[track_caller]
fn assert_answer(zone: &Zone, name: &str, query: RecordType, expected: &[&str]) {
    let name = Name::from_ascii(name).unwrap();
    let answer = zone.answer(&name, query, 0).unwrap();
    assert_eq!(lines(&answer), expected, "{name} {query}");
}

#[test]
fn virtual_names_lead_to_virtual_addresses() {
    for answers in [ServiceAnswers::Virtual, ServiceAnswers::Instances] {
        let zone = zone(answers);
        assert_answer(
            &zone,
            "web.virtual.consul.",
            A,
            &["NoError", "web.virtual.consul. A 240.0.0.10"],
        );
        assert_answer(
            &zone,
            "web.virtual.consul.",
            AAAA,
            &["NoError", "web.virtual.consul. AAAA fd00::10"],
        );
        assert_answer(
            &zone,
            "web.virtual.consul.",
            ANY,
            &[
                "NoError",
                "web.virtual.consul. A 240.0.0.10",
                "web.virtual.consul. AAAA fd00::10",
            ],
        );
        assert_answer(
            &zone,
            "db.virtual.consul.",
            AAAA,
            &["NoError", "authority consul."],
        );
        assert_answer(
            &zone,
            "web.virtual.consul.",
            MX,
            &["NoError", "authority consul."],
        );
        assert_answer(
            &zone,
            "nope.virtual.consul.",
            A,
            &["NXDomain", "authority consul."],
        );
    }
}

#[test]
fn service_names_lead_to_virtual_addresses_where_wanted() {
    let zone = zone(ServiceAnswers::Virtual);
    for name in [
        "web.service.consul.",
        "web.service.dc1.consul.",
        "web.connect.consul.",
        "web.connect.dc1.consul.",
    ] {
        assert_answer(&zone, name, A, &["NoError", &format!("{name} A {VIRTUAL}")]);
    }
    assert_answer(
        &zone,
        "_web._tcp.service.consul.",
        SRV,
        &[
            "NoError",
            "_web._tcp.service.consul. SRV 1 1 80 web.virtual.consul.",
            "_web._tcp.service.consul. SRV 1 1 443 web.virtual.consul.",
            "additional web.virtual.consul. A 240.0.0.10",
            "additional web.virtual.consul. AAAA fd00::10",
        ],
    );
    // A tag picks instances, which a virtual address cannot.
    assert_answer(
        &zone,
        "v2.web.service.consul.",
        A,
        &["NoError", "v2.web.service.consul. A 192.0.2.2"],
    );
    // Its address stays although nobody is there to answer.
    assert_answer(
        &zone,
        "idle.service.consul.",
        A,
        &["NoError", "idle.service.consul. A 240.0.0.12"],
    );
}

#[test]
fn service_names_lead_to_instances_where_wanted() {
    let zone = zone(ServiceAnswers::Instances);
    assert_answer(
        &zone,
        "web.service.consul.",
        A,
        &[
            "NoError",
            "web.service.consul. A 192.0.2.1",
            "web.service.consul. A 192.0.2.2",
        ],
    );
    assert_answer(
        &zone,
        "V1.Web.Service.DC1.Consul.",
        A,
        &["NoError", "V1.Web.Service.DC1.Consul. A 192.0.2.1"],
    );
    assert_answer(
        &zone,
        "v3.web.service.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    assert_answer(
        &zone,
        "web.service.consul.",
        AAAA,
        &["NoError", "authority consul."],
    );
    assert_answer(
        &zone,
        "web.service.consul.",
        TXT,
        &["NoError", "authority consul."],
    );
    // No instance, or only failing ones.
    assert_answer(
        &zone,
        "idle.service.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    assert_answer(
        &zone,
        "broken.service.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    assert_answer(
        &zone,
        "_web._v2.service.consul.",
        SRV,
        &[
            "NoError",
            "_web._v2.service.consul. SRV 1 3 8081 c0000202.addr.dc1.consul.",
            "additional c0000202.addr.dc1.consul. A 192.0.2.2",
        ],
    );
    assert_answer(
        &zone,
        "web.connect.consul.",
        SRV,
        &[
            "NoError",
            "web.connect.consul. SRV 1 1 21000 a.node.dc1.consul.",
            "web.connect.consul. SRV 1 3 21001 c0000202.addr.dc1.consul.",
            "additional a.node.dc1.consul. A 192.0.2.1",
            "additional c0000202.addr.dc1.consul. A 192.0.2.2",
        ],
    );
    assert_answer(
        &zone,
        "db.service.consul.",
        SRV,
        &[
            "NoError",
            "db.service.consul. SRV 1 1 5432 20010db8000000000000000000000003.addr.dc1.consul.",
            "additional 20010db8000000000000000000000003.addr.dc1.consul. AAAA 2001:db8::3",
        ],
    );
}

#[test]
fn instances_take_turns() {
    let zone = zone(ServiceAnswers::Instances);
    let name: Name = "web.service.consul.".parse().unwrap();
    let first = |turn| {
        zone.answer(&name, A, turn).unwrap().answers[0]
            .data
            .to_string()
    };
    assert_eq!(
        [first(0), first(1), first(2)],
        ["192.0.2.1", "192.0.2.2", "192.0.2.1"]
    );
}

#[test]
fn nodes_and_addresses_have_names() {
    let zone = zone(ServiceAnswers::Virtual);
    assert_answer(
        &zone,
        "A.node.consul.",
        A,
        &["NoError", "A.node.consul. A 192.0.2.1"],
    );
    assert_answer(
        &zone,
        "a.node.dc1.consul.",
        AAAA,
        &["NoError", "authority consul."],
    );
    assert_answer(
        &zone,
        "x.node.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    // It has instances, but its address is not known.
    assert_answer(
        &zone,
        "b.node.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    assert_answer(
        &zone,
        "c0000207.addr.dc1.consul.",
        A,
        &["NoError", "c0000207.addr.dc1.consul. A 192.0.2.7"],
    );
    assert_answer(
        &zone,
        "c0000207.addr.dc1.consul.",
        AAAA,
        &["NoError", "authority consul."],
    );
    assert_answer(
        &zone,
        "xyz.addr.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    assert_eq!(address("+1234567"), None);
}

#[test]
fn the_domain_describes_itself() {
    let zone = zone(ServiceAnswers::Virtual);
    assert_answer(
        &zone,
        "consul.",
        SOA,
        &[
            "NoError",
            &format!(
                "consul. SOA ns.consul. hostmaster.consul. {} 3600 600 86400 5",
                zone.serial
            ),
        ],
    );
    assert_answer(
        &zone,
        "consul.",
        NS,
        &[
            "NoError",
            "consul. NS ns.consul.",
            "additional ns.consul. A 127.0.0.1",
        ],
    );
    assert_answer(
        &zone,
        "ns.consul.",
        A,
        &["NoError", "ns.consul. A 127.0.0.1"],
    );
    // Names that have names below them exist, and resolvers that minimise what they ask (RFC 9156) come by.
    for branch in [
        "consul.",
        "service.consul.",
        "dc1.consul.",
        "service.dc1.consul.",
        "_tcp.service.consul.",
    ] {
        assert_answer(&zone, branch, A, &["NoError", "authority consul."]);
    }
    assert_answer(
        &zone,
        "web.consul.x.consul.",
        A,
        &["NXDomain", "authority consul."],
    );
    assert_answer(&zone, "consul.", AXFR, &["Refused"]);
}

#[test]
fn virtual_addresses_have_names() {
    let zone = zone(ServiceAnswers::Instances);
    assert_answer(
        &zone,
        "10.0.0.240.in-addr.arpa.",
        PTR,
        &[
            "NoError",
            "10.0.0.240.in-addr.arpa. PTR web.virtual.consul.",
        ],
    );
    let v6 = "0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.";
    assert_answer(
        &zone,
        v6,
        PTR,
        &["NoError", &format!("{v6} PTR web.virtual.consul.")],
    );
    assert_answer(
        &zone,
        "10.0.0.240.IN-ADDR.arpa.",
        A,
        &["NoError", "authority 240.IN-ADDR.arpa."],
    );
    // Not given out, but nobody else's either.
    assert_answer(
        &zone,
        "77.0.0.240.in-addr.arpa.",
        PTR,
        &["NXDomain", "authority 240.in-addr.arpa."],
    );
    assert_answer(
        &zone,
        "0.0.240.in-addr.arpa.",
        PTR,
        &["NoError", "authority 240.in-addr.arpa."],
    );
    for others in [
        "1.2.0.192.in-addr.arpa.",
        "in-addr.arpa.",
        "arpa.",
        "1.0.0.127.in-addr.arpa.",
    ] {
        let name: Name = others.parse().unwrap();
        assert_eq!(zone.answer(&name, PTR, 0), None, "{others}");
        assert_eq!(zone.answer(&name, AXFR, 0), None, "{others}");
    }
}

#[test]
fn what_is_not_known_is_not_denied() {
    let zone = testing::zone(ServiceAnswers::Instances, false);
    assert_answer(&zone, "nope.service.consul.", A, &["ServFail"]);
    assert_answer(&zone, "web.service.dc2.consul.", A, &["ServFail"]);
    assert_answer(
        &zone,
        "web.virtual.consul.",
        A,
        &["NoError", "web.virtual.consul. A 240.0.0.10"],
    );
}

#[test]
fn only_names_below_the_domain_are_ours() {
    let zone = zone(ServiceAnswers::Virtual);
    for (name, ours) in [
        ("consul.", true),
        ("a.b.CONSUL.", true),
        ("notconsul.", false),
        ("consul.example.", false),
        (".", false),
    ] {
        let name: Name = name.parse().unwrap();
        assert_eq!(zone.answer(&name, A, 0).is_some(), ours, "{name}");
    }
}

#[test]
fn in_a_shared_domain_only_what_leads_to_virtual_addresses_is_ours() {
    let shared = |service_answers| {
        let settings = ZoneSettings {
            shared: true,
            ..testing::settings(service_answers)
        };
        Zone::new(Arc::new(settings), testing::catalog(true))
    };
    let zone = shared(ServiceAnswers::Virtual);
    let address = ["NoError", "web.service.consul. A 240.0.0.10"];
    assert_answer(&zone, "web.service.consul.", A, &address);
    assert_answer(
        &zone,
        "db.virtual.consul.",
        AAAA,
        &["NoError", "authority consul."],
    );
    let ours = [
        ("web.virtual.consul.", A),
        ("web.service.dc1.consul.", A),
        ("_web._tcp.service.consul.", SRV),
        ("idle.connect.consul.", AAAA),
        ("10.0.0.240.in-addr.arpa.", PTR),
    ];
    let of_others = [
        ("consul.", SOA),
        ("ns.consul.", A),
        ("service.consul.", A),
        ("nope.virtual.consul.", A),
        ("nope.service.consul.", A),
        ("v1.web.service.consul.", A),
        ("_web._v1.service.consul.", SRV),
        ("web.service.dc2.consul.", A),
        ("a.node.consul.", A),
        ("c0000201.addr.dc1.consul.", A),
        ("web.query.consul.", A),
        ("web.service.consul.", AXFR),
    ];
    for (name, query) in ours {
        let answer = zone.answer(&name.parse().unwrap(), query, 0);
        assert!(answer.is_some(), "{name} {query}");
    }
    for (name, query) in of_others {
        assert_eq!(
            zone.answer(&name.parse().unwrap(), query, 0),
            None,
            "{name} {query}"
        );
    }
    for (name, service) in [
        ("nope.virtual.consul.", Some("nope")),
        ("nope.service.consul.", Some("nope")),
        ("Nope.connect.dc1.consul.", Some("nope")),
        ("nope.service.dc2.consul.", None),
        ("v1.nope.service.consul.", None),
        ("web.service.consul.", None),
        ("nope.node.consul.", None),
        ("nope.service.example.", None),
    ] {
        let might = zone.might_lead_to(&name.parse().unwrap(), A);
        assert_eq!(might.as_ref().map(ServiceName::as_str), service, "{name}");
    }
    // Where services' names lead to instances, they are Consul's.
    let zone = shared(ServiceAnswers::Instances);
    for (name, ours) in [
        ("web.virtual.consul.", true),
        ("web.service.consul.", false),
        ("web.connect.consul.", false),
    ] {
        let answer = zone.answer(&name.parse().unwrap(), A, 0);
        assert_eq!(answer.is_some(), ours, "{name}");
    }
}

/// A zone of `api` at the host `API.example.com`, of `legacy` at an address, and of `web`.
fn with_outside(shared: bool) -> Zone {
    use crate::catalog::{
        destination::Destination,
        model::{ServiceDefaults, Snapshot},
        store::CatalogStore,
        vip::{VipAllocator, VipPools},
    };
    let outside = |name: &str, place: &str, explicit: &[&str]| {
        let destination = Destination::read(&[place.to_owned()], 443).unwrap();
        let defaults = ServiceDefaults {
            destination: Some(Arc::new(destination.clone())),
            ..ServiceDefaults::default()
        };
        let mut service = Service::outside(name.parse().unwrap(), &destination, defaults);
        service
            .explicit_addresses
            .extend(explicit.iter().map(|a| a.parse::<IpAddr>().unwrap()));
        (service.name.clone(), Arc::new(service))
    };
    let pools = VipPools {
        ipv4: "240.1.0.0/16".parse().unwrap(),
        ipv6: "fd01::/64".parse().unwrap(),
    };
    let store = CatalogStore::new(VipAllocator::new(pools, None, Duration::ZERO).0);
    let problems = store.publish(Snapshot {
        is_whole: true,
        services: BTreeMap::from([
            outside("api", "API.example.com", &["240.0.0.20", "fd00::20"]),
            outside("legacy", "192.0.2.7", &[]),
        ]),
        ..Snapshot::default()
    });
    assert!(problems.is_empty(), "{problems:?}");
    let settings = ZoneSettings {
        shared,
        ..testing::settings(ServiceAnswers::Virtual)
    };
    Zone::new(Arc::new(settings), store.current())
}

#[test]
fn the_host_of_a_service_outside_leads_to_virtual_addresses() {
    use hickory_proto::rr::RecordType::{CNAME, HTTPS, SVCB};
    for shared in [false, true] {
        let zone = with_outside(shared);
        for (name, query, expected) in [
            ("api.example.com.", A, "api.example.com. A 240.0.0.20"),
            ("Api.Example.COM.", A, "Api.Example.COM. A 240.0.0.20"),
            ("api.example.com.", AAAA, "api.example.com. AAAA fd00::20"),
            ("api.virtual.consul.", A, "api.virtual.consul. A 240.0.0.20"),
            (
                "legacy.virtual.consul.",
                A,
                "legacy.virtual.consul. A 192.0.2.7",
            ),
        ] {
            assert_answer(&zone, name, query, &["NoError", expected]);
        }
        assert_answer(
            &zone,
            "api.example.com.",
            ANY,
            &[
                "NoError",
                "api.example.com. A 240.0.0.20",
                "api.example.com. AAAA fd00::20",
            ],
        );
        // What has addresses in it would lead around the mesh.
        for query in [HTTPS, SVCB] {
            let none = ["NoError", "authority api.example.com."];
            assert_answer(&zone, "api.example.com.", query, &none);
        }
        for (name, query) in [
            ("api.example.com.", MX),
            ("api.example.com.", TXT),
            ("api.example.com.", CNAME),
            ("example.com.", A),
            ("www.api.example.com.", A),
            ("api.example.com.test.", A),
            ("192.0.2.7.", A),
        ] {
            let answer = zone.answer(&name.parse().unwrap(), query, 0);
            assert_eq!(answer, None, "{name} {query}");
        }
    }
}
