//! The decision, asked on the host what the kernel will ask.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    vec::Vec,
};

use proptest::prelude::*;

use crate::{
    Address, Class, Facts, FlowEvent, Found, KnownAddress, PortBe, Ranges, Target, Verdict, VipKey,
    VipValue, classify, decide, loopback_spread,
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
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_situation_has_its_verdict() {
    let key = VipKey::new(address("240.0.0.5"), PortBe::from_host(80));
    let vip = Found::Value(VipValue::new(&key, Target::new(1, true)));
    let sick = Found::Value(VipValue::new(&key, Target::new(1, false)));
    let known = Found::Value(KnownAddress::listed_ports(&key.address));
    let any = Found::Value(KnownAddress::any_port(&key.address, Target::new(2, true)));
    let sick_any = Found::Value(KnownAddress::any_port(&key.address, Target::new(2, false)));
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

proptest! {
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
        // Without a listener nothing is captured, and what belongs to the mesh is never passed.
        prop_assert!(decide(&facts).is_refusal());
    }
}

fn target() -> impl Strategy<Value = Target> {
    any::<(u64, bool)>().prop_map(|(service, reachable)| Target::new(service, reachable))
}

/// As a reader may find it while it is written.
fn torn(target: Target) -> [Target; 2] {
    let service = target.service.wrapping_add(1);
    let reachable = 1 - target.reachable;
    [
        Target { service, ..target },
        Target {
            reachable,
            ..target
        },
    ]
}
