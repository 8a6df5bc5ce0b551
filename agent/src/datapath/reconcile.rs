//! Making the kernel's maps say what the catalog says, by content.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::Pod;
use sidestep_abi::{Address, Away, Fallback, KnownAddress, PortBe, Target, VipKey, VipValue};

use super::{
    DatapathError, Maps, Reconciled, Undesired, VipTarget, VipTargets, bpf, error::MapOperation,
};
use crate::config::AwayPolicy;

/// Adds and changes first, then deletes: what stays is never missing in between.
pub(super) fn reconcile(
    maps: &Maps,
    desired: &VipTargets,
    undesired: Undesired,
    max_vips: u32,
) -> Result<Reconciled, DatapathError> {
    let destinations = desired.ports.len() + desired.any_port.len();
    if destinations > max_vips as usize {
        return Err(DatapathError::TooManyVips {
            wanted: destinations,
            limit: max_vips,
        });
    }
    let (wanted_vips, wanted_addresses) = wanted(desired);
    let wanted_elsewhere = wanted_fallbacks(desired);

    let (vips, addresses) = (maps.vips.as_fd(), maps.addresses.as_fd());
    let fallbacks = maps.fallbacks.as_fd();
    let fails =
        |map, operation| move |source: io::Error| DatapathError::map(map, operation, source);
    let current =
        there(vips, &wanted_vips, undesired).map_err(fails("VIPS", MapOperation::Read))?;
    let known = there(addresses, &wanted_addresses, undesired)
        .map_err(fails("ADDRESSES", MapOperation::Read))?;
    let known_fallbacks = there(fallbacks, &wanted_elsewhere, undesired)
        .map_err(fails("FALLBACKS", MapOperation::Read))?;
    let elsewhere = Difference::between(&known_fallbacks, &wanted_elsewhere);
    let ports = Difference::between(&current, &wanted_vips);
    let hosts = Difference::between(&known, &wanted_addresses);

    // A fallback is there before a service is told to use it, and until after it is not.
    // An address is known before its ports are, and until after they are gone: a connect to a port that
    // is about to come or has just gone is refused, never passed. One whose ports become few is changed after
    // those are there, and one that answers at every port from now on before they go.
    for written in [&elsewhere.added, &elsewhere.changed] {
        bpf::map_update_batch(fallbacks, written)
            .map_err(fails("FALLBACKS", MapOperation::Write))?;
    }
    bpf::map_update_batch(addresses, &hosts.added)
        .map_err(fails("ADDRESSES", MapOperation::Write))?;
    for written in [&ports.added, &ports.changed] {
        bpf::map_update_batch(vips, written).map_err(fails("VIPS", MapOperation::Write))?;
    }
    bpf::map_update_batch(addresses, &hosts.changed)
        .map_err(fails("ADDRESSES", MapOperation::Write))?;
    if undesired == Undesired::Remove {
        bpf::map_delete_batch(vips, &ports.removed).map_err(fails("VIPS", MapOperation::Delete))?;
        bpf::map_delete_batch(addresses, &hosts.removed)
            .map_err(fails("ADDRESSES", MapOperation::Delete))?;
        bpf::map_delete_batch(fallbacks, &elsewhere.removed)
            .map_err(fails("FALLBACKS", MapOperation::Delete))?;
    }
    let mut changed = Reconciled::default();
    let any_port = Difference::between(&of_any_port(&known), &of_any_port(&wanted_addresses));
    for (added, other, removed) in [ports.counts(), any_port.counts()] {
        changed.added += added;
        changed.changed += other;
        if undesired == Undesired::Remove {
            changed.removed += removed;
        }
    }
    Ok(changed)
}

/// Removes destinations that are one port of an address of somebody else's. Returns how many were there.
pub(super) fn forget(maps: &Maps, gone: &[SocketAddr]) -> Result<usize, DatapathError> {
    let vips = maps.vips.as_fd();
    let mut there = Vec::with_capacity(gone.len());
    for destination in gone {
        let key = key_of(destination);
        let found = bpf::map_lookup::<VipKey, VipValue>(vips, &key)
            .map_err(|source| DatapathError::map("VIPS", MapOperation::Read, source))?;
        there.extend(found.map(|_value| key));
    }
    bpf::map_delete_batch(vips, &there)
        .map_err(|source| DatapathError::map("VIPS", MapOperation::Delete, source))?;
    Ok(there.len())
}

fn key_of(destination: &SocketAddr) -> VipKey {
    let address = Address::from_ip(destination.ip());
    VipKey::new(address, PortBe::from_host(destination.port()))
}

/// What a map has: all of it, or as much as matters where nothing is removed.
fn there<K: Pod + Ord, V: Pod>(
    map: BorrowedFd<'_>,
    wanted: &BTreeMap<K, V>,
    undesired: Undesired,
) -> io::Result<BTreeMap<K, V>> {
    match undesired {
        Undesired::Remove => Ok(bpf::map_entries(map)?.into_iter().collect()),
        Undesired::Keep => wanted
            .keys()
            .filter_map(|key| {
                let found = bpf::map_lookup(map, key).transpose()?;
                Some(found.map(|value| (*key, value)))
            })
            .collect(),
    }
}

fn wanted(desired: &VipTargets) -> (BTreeMap<VipKey, VipValue>, BTreeMap<Address, KnownAddress>) {
    let mut vips = BTreeMap::new();
    let mut addresses = BTreeMap::new();
    for (destination, target) in &desired.ports {
        let key = key_of(destination);
        vips.insert(key, VipValue::new(&key, in_kernel(target)));
        if !desired.real.contains(&destination.ip()) {
            let address = Address::from_ip(destination.ip());
            addresses.insert(address, KnownAddress::listed_ports(&address));
        }
    }
    for (ip, target) in &desired.any_port {
        let address = Address::from_ip(*ip);
        addresses.insert(address, KnownAddress::any_port(&address, in_kernel(target)));
    }
    (vips, addresses)
}

fn in_kernel(target: &VipTarget) -> Target {
    let away = match target.away {
        AwayPolicy::Closed => Away::CLOSED,
        AwayPolicy::Open => Away::OPEN,
        AwayPolicy::Fallback(_) => Away::FALLBACK,
    };
    Target::new(target.service.0, target.reachable, away)
}

fn wanted_fallbacks(desired: &VipTargets) -> BTreeMap<u64, Fallback> {
    let targets = desired.ports.values().chain(desired.any_port.values());
    let fallback = |target: &VipTarget| match target.away {
        AwayPolicy::Closed | AwayPolicy::Open => None,
        AwayPolicy::Fallback(endpoint) => {
            let service = target.service.0;
            let address = Address::from_ip(endpoint.ip());
            let port = PortBe::from_host(endpoint.port());
            Some((service, Fallback::new(service, address, port)))
        }
    };
    targets.filter_map(fallback).collect()
}

fn of_any_port(addresses: &BTreeMap<Address, KnownAddress>) -> BTreeMap<Address, KnownAddress> {
    let of_any_port = addresses.iter().filter(|(_, known)| known.any_port != 0);
    of_any_port
        .map(|(address, known)| (*address, *known))
        .collect()
}

/// What makes one map another, by key.
struct Difference<K, V> {
    added: Vec<(K, V)>,
    changed: Vec<(K, V)>,
    removed: Vec<K>,
}

impl<K: Copy + Ord, V: Copy + PartialEq> Difference<K, V> {
    fn between(current: &BTreeMap<K, V>, wanted: &BTreeMap<K, V>) -> Self {
        let written = wanted
            .iter()
            .filter(|(key, value)| current.get(key) != Some(value))
            .map(|(key, value)| (*key, *value));
        let (changed, added) = written.partition(|(key, _)| current.contains_key(key));
        let removed = current.keys().filter(|key| !wanted.contains_key(key));
        Self {
            added,
            changed,
            removed: removed.copied().collect(),
        }
    }

    /// Of additions, changes, removals.
    fn counts(&self) -> (usize, usize, usize) {
        (self.added.len(), self.changed.len(), self.removed.len())
    }
}
