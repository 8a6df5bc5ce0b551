//! The decision, asked on the host what the kernel will ask.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    vec::Vec,
};

use proptest::prelude::*;

use crate::{
    Address, Away, Class, DNS_PORT, Facts, Fallback, FlowEvent, Found, Heartbeat, KnownAddress,
    PortBe, QueryFacts, Ranges, Server, Target, Verdict, VipKey, VipValue, classify, decide,
    decide_query, loopback_spread, may_fall_back, may_stand_in, stand_in,
};

fn address(text: &str) -> Address {
    Address::from_ip(text.parse().unwrap())
}

fn ranges() -> Ranges {
    Ranges {
        v4_network: Ipv4Addr::new(10, 96, 0, 0).to_bits().to_be(),
        v4_mask: Ipv4Addr::new(255, 255, 0, 0).to_bits().to_be(),
        v6_network: address("fd00:1::"),
        v6_mask: address("ffff:ffff:ffff:ffff::"),
    }
}

#[test]
fn addresses_are_classified() {
    let table = [
        ("127.0.0.1", Class::Loopback),
        ("127.255.255.254", Class::Loopback),
        ("::1", Class::Loopback),
        // Linux takes the unspecified addresses for loopback.
        ("0.0.0.0", Class::Loopback),
        ("::", Class::Loopback),
        ("240.0.0.1", Class::VipRange),
        ("255.255.255.254", Class::VipRange),
        ("255.255.255.255", Class::Other),
        ("239.255.255.255", Class::Other),
        ("10.96.1.2", Class::VipRange),
        ("10.97.0.0", Class::Other),
        ("fd00:1::5", Class::VipRange),
        ("fd00:1:0:1::5", Class::Other),
        ("2001:db8::1", Class::Other),
        ("192.0.2.1", Class::Other),
    ];
    for (text, class) in table {
        assert_eq!(classify(&address(text), &ranges()), class, "{text}");
    }
}

#[test]
fn no_range_for_ipv6_is_no_range() {
    let none = Ranges::default();
    assert_eq!(classify(&address("fd00:1::5"), &none), Class::Other);
}

fn facts(class: Class) -> Facts {
    Facts {
        class,
        configured: true,
        agent: false,
        vip: Found::Absent,
        address: Found::Absent,
        listener: PortBe(0),
        heartbeat: Heartbeat::default(),
        now_ns: 0,
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_situation_has_its_verdict() {
    let key = VipKey::new(address("240.0.0.5"), PortBe::from_host(80));
    let vip = Found::Value(VipValue::new(&key, Target::new(1, true, Away::CLOSED)));
    let sick = Found::Value(VipValue::new(&key, Target::new(1, false, Away::CLOSED)));
    let known = Found::Value(KnownAddress::listed_ports(&key.address));
    let any = Found::Value(KnownAddress::any_port(
        &key.address,
        Target::new(2, true, Away::CLOSED),
    ));
    let sick_any = Found::Value(KnownAddress::any_port(
        &key.address,
        Target::new(2, false, Away::CLOSED),
    ));
    let listener = PortBe::from_host(15_001);
    let range = facts(Class::VipRange);
    let other = facts(Class::Other);
    let table = [
        (
            Facts {
                vip,
                listener,
                ..range
            },
            Verdict::Captured,
        ),
        (
            Facts {
                vip,
                listener,
                ..other
            },
            Verdict::Captured,
        ),
        (Facts { vip, ..range }, Verdict::RefusedNetns),
        (
            Facts {
                vip: sick,
                listener,
                ..range
            },
            Verdict::RefusedNoEndpoint,
        ),
        (
            Facts {
                address: known,
                ..range
            },
            Verdict::RefusedUnknownPort,
        ),
        (
            Facts {
                address: known,
                ..other
            },
            Verdict::RefusedUnknownPort,
        ),
        (
            Facts {
                address: any,
                listener,
                ..range
            },
            Verdict::Captured,
        ),
        (
            Facts {
                address: any,
                listener,
                ..other
            },
            Verdict::Captured,
        ),
        (
            Facts {
                address: any,
                ..other
            },
            Verdict::RefusedNetns,
        ),
        (
            Facts {
                address: sick_any,
                listener,
                ..other
            },
            Verdict::RefusedNoEndpoint,
        ),
        (
            Facts {
                vip: sick,
                address: any,
                listener,
                ..range
            },
            Verdict::RefusedNoEndpoint,
        ),
        (
            Facts {
                agent: true,
                address: any,
                listener,
                ..range
            },
            Verdict::RefusedAgent,
        ),
        (range, Verdict::RefusedUnknownVip),
        (other, Verdict::PassedOther),
        (
            Facts {
                vip: Found::Torn,
                ..other
            },
            Verdict::RefusedTorn,
        ),
        (
            Facts {
                address: Found::Torn,
                ..other
            },
            Verdict::RefusedTorn,
        ),
        (
            Facts {
                configured: false,
                ..range
            },
            Verdict::RefusedUnconfigured,
        ),
        (
            Facts {
                configured: false,
                ..other
            },
            Verdict::PassedOther,
        ),
        (
            Facts {
                agent: true,
                vip,
                listener,
                ..range
            },
            Verdict::RefusedAgent,
        ),
        (
            Facts {
                agent: true,
                vip,
                listener,
                ..other
            },
            Verdict::PassedAgent,
        ),
        (
            Facts {
                vip,
                listener,
                ..facts(Class::Loopback)
            },
            Verdict::PassedLoopback,
        ),
    ];
    for (facts, verdict) in table {
        assert_eq!(decide(&facts), verdict, "{facts:?}");
    }
}

#[test]
fn an_agent_that_is_away_is_answered_by_the_policy() {
    let closed = [Verdict::RefusedNetns, Verdict::RefusedHung];
    for (away, class, answers) in [
        (Away::CLOSED, Class::Other, closed),
        (Away::CLOSED, Class::VipRange, closed),
        (Away(3), Class::Other, closed),
        (Away::OPEN, Class::Other, [Verdict::PassedOpen; 2]),
        (Away::OPEN, Class::VipRange, closed),
        (Away::FALLBACK, Class::Other, [Verdict::Fallback; 2]),
        (Away::FALLBACK, Class::VipRange, [Verdict::Fallback; 2]),
    ] {
        for reachable in [false, true] {
            assert_away(class, Target::new(1, reachable, away), answers);
        }
    }
}

fn assert_away(class: Class, target: Target, [if_gone, if_hung]: [Verdict; 2]) {
    let key = VipKey::new(address("10.97.0.1"), PortBe::from_host(80));
    let listed = Facts {
        vip: Found::Value(VipValue::new(&key, target)),
        ..facts(class)
    };
    let any_port = Facts {
        address: Found::Value(KnownAddress::any_port(&key.address, target)),
        ..facts(class)
    };
    // That no instance is there is the agent's answer, and it may not be there to give it.
    let (if_there, if_own) = match (target.reachable, class) {
        (0, Class::VipRange) => (Verdict::RefusedNoEndpoint, Verdict::RefusedAgent),
        (0, _) => (Verdict::RefusedNoEndpoint, Verdict::PassedAgent),
        (_, Class::VipRange) => (Verdict::Captured, Verdict::RefusedAgent),
        (_, _) => (Verdict::Captured, Verdict::PassedAgent),
    };
    let listener = PortBe::from_host(15_001);
    for (listener, now_ns, verdict) in [
        (listener, 1_500, if_there),
        (listener, 1_501, if_hung),
        (PortBe(0), 0, if_gone),
    ] {
        for found in [listed, any_port] {
            let facts = Facts {
                listener,
                heartbeat: Heartbeat {
                    beat_ns: 1_000,
                    hung_after_ns: 500,
                },
                now_ns,
                ..found
            };
            assert_eq!(decide(&facts), verdict, "{facts:?}");
            let own = Facts {
                agent: true,
                ..facts
            };
            assert_eq!(decide(&own), if_own, "{own:?}");
        }
    }
}

#[test]
fn a_fallback_must_fit_the_socket_and_be_no_virtual_address() {
    for (destination, endpoint, port, expected) in [
        ("240.0.0.5", "192.0.2.9", 80, true),
        ("240.0.0.5", "127.0.0.1", 80, true),
        ("fd00:1::5", "2001:db8::9", 80, true),
        ("fd00:1::5", "192.0.2.9", 80, true),
        ("240.0.0.5", "2001:db8::9", 80, false),
        ("240.0.0.5", "240.0.0.6", 80, false),
        ("240.0.0.5", "10.96.0.6", 80, false),
        ("fd00:1::5", "fd00:1::6", 80, false),
        ("240.0.0.5", "192.0.2.9", 0, false),
    ] {
        let to = Fallback::new(1, address(endpoint), PortBe::from_host(port));
        let may = may_fall_back(&address(destination), &to, &ranges());
        assert_eq!(may, expected, "{destination} to {endpoint} port {port}");
    }
}

#[test]
fn refusals_and_only_refusals_have_an_errno() {
    for verdict in Verdict::ALL {
        assert_eq!(
            verdict.is_refusal(),
            verdict.as_str().starts_with("refused_"),
            "{verdict}"
        );
        assert_eq!(Verdict::from_slot(verdict.slot()), Some(*verdict));
    }
}

#[test]
fn labels_and_slots_are_unique() {
    let labels: HashSet<&str> = Verdict::ALL
        .iter()
        .map(|verdict| verdict.as_str())
        .chain(FlowEvent::ALL.iter().map(|event| event.as_str()))
        .collect();
    assert_eq!(labels.len(), Verdict::ALL.len() + FlowEvent::ALL.len());
    let slots: HashSet<u32> = Verdict::ALL
        .iter()
        .map(|verdict| verdict.slot())
        .chain(FlowEvent::ALL.iter().map(|event| event.slot()))
        .collect();
    assert_eq!(slots.len(), labels.len());
    assert!(slots.iter().all(|slot| *slot < crate::COUNTERS));
}

#[test]
fn the_spread_is_even() {
    // 65,536 destinations over 254 second bytes: 258 each on average.
    let mut counts = [0_u32; 256];
    for host in 0..=u16::MAX {
        let destination = Address::from_ip(IpAddr::V4(Ipv4Addr::from_bits(
            0xf000_0000 | u32::from(host),
        )));
        let word = u32::from_be(loopback_spread(&destination, PortBe::from_host(80)));
        counts[(word >> 16 & 0xff) as usize] += 1;
    }
    let used: Vec<u32> = counts.into_iter().filter(|count| *count > 0).collect();
    assert_eq!(used.len(), 254);
    assert!(
        used.iter().all(|count| (150..400).contains(count)),
        "{used:?}"
    );
}

#[test]
fn a_query_is_captured_only_if_an_agent_takes_it() {
    let taken = QueryFacts {
        enabled: true,
        agent: false,
        can_capture: true,
        listener: PortBe::from_host(15_001),
        heartbeat: Heartbeat {
            beat_ns: 100,
            hung_after_ns: 50,
        },
        now_ns: 150,
    };
    let table = [
        (taken, Some(Verdict::QueryCaptured)),
        (
            QueryFacts {
                enabled: false,
                ..taken
            },
            None,
        ),
        (
            QueryFacts {
                agent: true,
                ..taken
            },
            None,
        ),
        (
            QueryFacts {
                can_capture: false,
                ..taken
            },
            Some(Verdict::QueryPassed),
        ),
        (
            QueryFacts {
                listener: PortBe(0),
                ..taken
            },
            Some(Verdict::QueryPassed),
        ),
        (
            QueryFacts {
                now_ns: 151,
                ..taken
            },
            Some(Verdict::QueryPassed),
        ),
    ];
    for (facts, verdict) in table {
        assert_eq!(decide_query(&facts), verdict, "{facts:?}");
    }
}

#[test]
fn a_loopback_address_stands_for_one_host_on_the_network_or_this_one() {
    let table = [
        ("192.0.2.53", 0, true),
        ("127.0.0.53", 0, true),
        ("127.0.0.53", 1, true),
        ("192.0.2.53", 2, false),
        ("0.0.0.0", 0, false),
        ("224.0.0.251", 0, false),
        ("255.255.255.255", 0, false),
        ("240.0.0.1", 0, false),
        // In a configured range.
        ("10.96.0.10", 0, false),
        ("2001:db8::53", 0, false),
        ("::1", 0, false),
    ];
    for (text, device, may) in table {
        let server = address(text);
        let class = classify(&server, &ranges());
        assert_eq!(may_stand_in(&server, class, device), may, "{text}");
    }
}

proptest! {
    #[test]
    fn nothing_refuses_a_query(
        flags: [bool; 3], listener: u16, beat_ns: u64, hung_after_ns: u64, now_ns: u64,
    ) {
        let [enabled, agent, can_capture] = flags;
        let heartbeat = Heartbeat { beat_ns, hung_after_ns };
        let listener = PortBe(listener);
        let facts = QueryFacts { enabled, agent, can_capture, listener, heartbeat, now_ns };
        match decide_query(&facts) {
            None => prop_assert!(!enabled || agent),
            Some(verdict) => {
                prop_assert!(!verdict.is_refusal());
                let captured = verdict == Verdict::QueryCaptured;
                prop_assert!(!captured || (can_capture && listener.0 != 0 && !heartbeat.is_late(now_ns)));
            }
        }
    }

    #[test]
    fn what_stands_for_a_server_is_loopback_and_where_no_program_listens(bits: u32, attempt in 0_u16..4) {
        let word = stand_in(&Address::from_v4_word(bits.to_be()), attempt);
        let stands = Ipv4Addr::from_bits(u32::from_be(word));
        prop_assert!(stands.is_loopback() && stands.octets()[1] != 0);
    }

    #[test]
    fn an_address_stays_itself(ip: IpAddr) {
        prop_assert_eq!(Address::from_ip(ip).to_ip(), ip.to_canonical());
    }

    #[test]
    fn mapped_and_plain_addresses_are_one(bits: u32) {
        let v4 = Ipv4Addr::from_bits(bits);
        let plain = Address::from_ip(IpAddr::V4(v4));
        prop_assert_eq!(plain, Address::from_ip(IpAddr::V6(v4.to_ipv6_mapped())));
        prop_assert_eq!(plain, Address::from_v4_word(bits.to_be()));
    }

    #[test]
    fn class_e_never_passes(bits in 0xf000_0000_u32..u32::MAX, configured: bool, agent: bool) {
        let destination = Address::from_ip(IpAddr::V4(Ipv4Addr::from_bits(bits)));
        let class = classify(&destination, &Ranges::default());
        let verdict = decide(&Facts { configured, agent, ..facts(class) });
        prop_assert!(verdict.is_refusal(), "{verdict}");
    }

    #[test]
    fn class_e_never_goes_out_whatever_the_maps_say(
        bits in 0xf000_0000_u32..u32::MAX, target in target(), listener: u16, beat_ns: u64, hung_after_ns: u64, now_ns: u64,
    ) {
        let key = VipKey::new(Address::from_ip(IpAddr::V4(Ipv4Addr::from_bits(bits))), PortBe(80));
        let class = classify(&key.address, &Ranges::default());
        let verdict = decide(&Facts {
            vip: Found::Value(VipValue::new(&key, target)),
            listener: PortBe(listener),
            heartbeat: Heartbeat { beat_ns, hung_after_ns },
            now_ns,
            ..facts(class)
        });
        let is_sent = matches!(verdict, Verdict::Captured | Verdict::Fallback);
        prop_assert!(is_sent || verdict.is_refusal(), "{verdict}");
    }

    #[test]
    fn a_heartbeat_is_late_once_and_stays_so(beat_ns: u64, hung_after_ns in 1_u64.., now_ns: u64, later: u64) {
        let heartbeat = Heartbeat { beat_ns, hung_after_ns };
        let expected = u128::from(now_ns) > u128::from(beat_ns) + u128::from(hung_after_ns);
        prop_assert_eq!(heartbeat.is_late(now_ns), expected);
        prop_assert!(!expected || heartbeat.is_late(now_ns.saturating_add(later)));
        let without_limit = Heartbeat { hung_after_ns: 0, ..heartbeat };
        prop_assert!(!without_limit.is_late(now_ns));
    }

    #[test]
    fn a_fallback_of_another_service_is_not_taken(service: u64, other: u64, bits: u32, port: u16) {
        let to = Fallback::new(service, Address::from_v4_word(bits), PortBe(port));
        prop_assert!(to.is_for(service));
        prop_assert!(service == other || !to.is_for(other));
        let torn = Fallback { port: PortBe(port.wrapping_add(1)), ..to };
        prop_assert!(!torn.is_for(service));
    }

    #[test]
    fn loopback_is_never_captured(low in 0_u32..=0x00ff_ffff) {
        let destination = Address::from_ip(IpAddr::V4(Ipv4Addr::from_bits(0x7f00_0000 | low)));
        prop_assert_eq!(classify(&destination, &ranges()), Class::Loopback);
    }

    #[test]
    fn the_spread_is_a_usable_loopback_address(bits: u128, port: u16) {
        let destination = Address::from_ip(IpAddr::V6(Ipv6Addr::from_bits(bits)));
        let word = loopback_spread(&destination, PortBe::from_host(port));
        let [first, second, _third, fourth] = Ipv4Addr::from_bits(u32::from_be(word)).octets();
        prop_assert_eq!(first, 127);
        prop_assert!((1..=254).contains(&second));
        prop_assert!((1..=254).contains(&fourth));
    }

    #[test]
    fn a_value_of_another_key_is_not_taken(a: u32, b: u32, port: u16, other_port: u16, target in target()) {
        let key = |bits: u32, port| {
            VipKey::new(Address::from_v4_word(bits), PortBe::from_host(port))
        };
        let (one, other) = (key(a, port), key(b, other_port));
        let value = VipValue::new(&one, target);
        prop_assert!(value.is_for(&one));
        prop_assert!(one == other || !value.is_for(&other));
        for torn in torn(target) {
            let value = VipValue { target: torn, ..value };
            prop_assert!(!value.is_for(&one));
        }
    }

    #[test]
    fn an_address_is_not_taken_for_another(a: u32, b: u32, target in target()) {
        let (one, other) = (Address::from_v4_word(a), Address::from_v4_word(b));
        for value in [KnownAddress::listed_ports(&one), KnownAddress::any_port(&one, target)] {
            prop_assert!(value.is_for(&one));
            prop_assert!(one == other || !value.is_for(&other));
            let other_kind = KnownAddress { any_port: 1 - value.any_port, ..value };
            prop_assert!(!other_kind.is_for(&one));
            for torn in torn(value.target) {
                let value = KnownAddress { target: torn, ..value };
                prop_assert!(!value.is_for(&one));
            }
        }
        prop_assert!(!KnownAddress::default().is_for(&one));
    }

    #[test]
    fn an_entry_of_the_port_wins_over_one_of_every_port(
        bits: u32, port: u16, exact in target(), any in target(), is_listed: bool, has_any_port: bool,
    ) {
        let key = VipKey::new(Address::from_v4_word(bits), PortBe::from_host(port));
        let address = if has_any_port {
            KnownAddress::any_port(&key.address, any)
        } else {
            KnownAddress::listed_ports(&key.address)
        };
        let vip = if is_listed { Found::Value(VipValue::new(&key, exact)) } else { Found::Absent };
        let facts = Facts { vip, address: Found::Value(address), ..facts(Class::Other) };
        let expected = if is_listed { Some(exact) } else { has_any_port.then_some(any) };
        prop_assert_eq!(facts.target(), expected);
        // Without a listener nothing is captured, and only a policy lets through what belongs to the mesh.
        let policy = expected.map_or(Away::CLOSED, |target| target.away);
        let verdict = decide(&facts);
        match policy {
            Away::OPEN => prop_assert_eq!(verdict, Verdict::PassedOpen),
            Away::FALLBACK => prop_assert_eq!(verdict, Verdict::Fallback),
            _ => prop_assert!(verdict.is_refusal()),
        }
    }
}

fn target() -> impl Strategy<Value = Target> {
    any::<(u64, bool, u8)>().prop_map(|(service, reachable, away)| {
        Target::new(service, reachable, Away(u32::from(away % 4)))
    })
}

/// As a reader may find it while it is written.
fn torn(target: Target) -> [Target; 3] {
    let service = target.service.wrapping_add(1);
    let reachable = 1 - target.reachable;
    let away = Away(target.away.0 ^ 1);
    [
        Target { away, ..target },
        Target { service, ..target },
        Target {
            reachable,
            ..target
        },
    ]
}

#[test]
fn a_server_is_whole_only_for_its_own_address_and_while_nothing_but_its_stamp_changes() {
    let address = Address::from_v4_word(0x0100_0a0a);
    let server = Server::new(7, address, DNS_PORT, 1);
    let retired = server.with_retired(7, true, 2);
    let with = |change: fn(&mut Server)| {
        let mut changed = server;
        change(&mut changed);
        changed
    };
    for (value, stand_in, whole) in [
        (server, 7, true),
        (server, 8, false),
        (retired, 7, true),
        (retired, 8, false),
        (retired.with_retired(7, false, 3), 7, true),
        (with(|server| server.used_ns = 9), 7, true),
        (with(|server| server.retired = 1), 7, false),
        (with(|server| server.port = PortBe(54)), 7, false),
        (
            with(|server| server.address = Address::LOOPBACK_V6),
            7,
            false,
        ),
        (Server::default(), 0, false),
    ] {
        assert_eq!(value.is_for(stand_in), whole, "{value:?} {stand_in}");
    }
}
