//! What `[[away]]` asks for and cannot have, once the catalog says where a service is.

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    catalog::{model::ServiceName, store::Catalog, vip::VipPools},
    config::AwayPolicy,
};

/// A line for each service that is to be open at a virtual address: nothing but the mesh answers there, and the
/// programs refuse what they would have to pass.
pub(crate) fn problems(
    away: &BTreeMap<ServiceName, AwayPolicy>,
    catalog: &Catalog,
    virtual_ranges: VipPools,
) -> Vec<String> {
    let open = away
        .iter()
        .filter(|(_, policy)| **policy == AwayPolicy::Open);
    open.filter_map(|(service, _)| {
        let addresses = catalog.addresses.get(service)?.iter();
        let refused: Vec<String> = addresses
            .filter(|address| is_virtual(**address, virtual_ranges))
            .map(ToString::to_string)
            .collect();
        (!refused.is_empty()).then(|| {
            format!(
                "[[away]] of {service}: \"open\" is not possible at {}, where nothing else answers: closed there",
                refused.join(" and ")
            )
        })
    })
    .collect()
}

fn is_virtual(address: IpAddr, ranges: VipPools) -> bool {
    match address.to_canonical() {
        // 240.0.0.0/4 counts as virtual whatever is configured.
        IpAddr::V4(v4) => v4.octets()[0] >= 240 || ranges.ipv4.contains(&v4),
        IpAddr::V6(v6) => ranges.ipv6.contains(&v6),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use super::*;

    #[test]
    fn only_open_at_a_virtual_address_is_a_problem() {
        let name = |name: &str| -> ServiceName { name.parse().unwrap() };
        let addresses = |all: &[&str]| -> BTreeSet<IpAddr> {
            all.iter().map(|address| address.parse().unwrap()).collect()
        };
        let mut catalog = Catalog::default();
        catalog.addresses = Arc::new(BTreeMap::from([
            (name("real"), addresses(&["10.97.0.1"])),
            (name("vip"), addresses(&["240.0.0.5", "fd00::5"])),
            (name("both"), addresses(&["10.96.0.1", "10.97.0.2"])),
        ]));
        let ranges = VipPools {
            ipv4: "10.96.0.0/16".parse().unwrap(),
            ipv6: "fd00::/64".parse().unwrap(),
        };
        let all = |policy| {
            ["real", "vip", "both", "unknown"]
                .map(|n| (name(n), policy))
                .into()
        };
        let found = problems(&all(AwayPolicy::Open), &catalog, ranges);
        let [both, vip] = found.as_slice() else {
            panic!("{found:?}");
        };
        assert!(
            both.contains("of both: ") && both.contains("at 10.96.0.1, "),
            "{both}"
        );
        assert!(vip.contains("at 240.0.0.5 and fd00::5, "), "{vip}");
        let fallback = AwayPolicy::Fallback("192.0.2.9:80".parse().unwrap());
        for policy in [AwayPolicy::Closed, fallback] {
            assert_eq!(
                problems(&all(policy), &catalog, ranges),
                Vec::<String>::new()
            );
        }
    }
}
