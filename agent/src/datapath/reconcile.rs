//! Making the kernel's maps say what the catalog says, by content.

use std::{collections::BTreeMap, net::SocketAddr, os::fd::AsFd as _};

use sidestep_abi::{Address, KnownAddress, PortBe, VipKey, VipValue};

use super::{DatapathError, Maps, Reconciled, Undesired, VipTarget, bpf, error::MapOperation};

/// Adds and changes first, then deletes: what stays is never missing in between.
pub(super) fn reconcile(
    maps: &Maps,
    desired: &BTreeMap<SocketAddr, VipTarget>,
    undesired: Undesired,
    max_vips: u32,
) -> Result<Reconciled, DatapathError> {
    if desired.len() > max_vips as usize {
        return Err(DatapathError::TooManyVips {
            wanted: desired.len(),
            limit: max_vips,
        });
    }
    let (wanted_vips, wanted_addresses) = wanted(desired);

    let vips = maps.vips.as_fd();
    let fails = |operation| move |source| DatapathError::map("VIPS", operation, source);
    let current: BTreeMap<VipKey, VipValue> = bpf::map_entries(vips)
        .map_err(fails(MapOperation::Read))?
        .into_iter()
        .collect();
    let known: BTreeMap<Address, KnownAddress> = bpf::map_entries(maps.addresses.as_fd())
        .map_err(|source| DatapathError::map("ADDRESSES", MapOperation::Read, source))?
        .into_iter()
        .collect();

    let added = wanted_vips
        .keys()
        .filter(|key| !current.contains_key(key))
        .count();
    let written: Vec<(VipKey, VipValue)> = wanted_vips
        .iter()
        .filter(|(key, value)| current.get(key) != Some(value))
        .map(|(key, value)| (*key, *value))
        .collect();
    let removed: Vec<VipKey> = current
        .keys()
        .filter(|key| !wanted_vips.contains_key(key))
        .copied()
        .collect();
    // An address is known before its ports are, and until after they are gone: a connect to a port that
    // is about to come or has just gone is refused, never passed.
    write_addresses(maps, &wanted_addresses, &known)?;
    bpf::map_update_batch(vips, &written).map_err(fails(MapOperation::Write))?;
    let mut reconciled = Reconciled {
        added,
        changed: written.len() - added,
        removed: 0,
    };
    if undesired == Undesired::Keep {
        return Ok(reconciled);
    }
    bpf::map_delete_batch(vips, &removed).map_err(fails(MapOperation::Delete))?;
    delete_addresses(maps, &wanted_addresses, &known)?;
    reconciled.removed = removed.len();
    Ok(reconciled)
}

fn wanted(
    desired: &BTreeMap<SocketAddr, VipTarget>,
) -> (BTreeMap<VipKey, VipValue>, BTreeMap<Address, KnownAddress>) {
    let mut vips = BTreeMap::new();
    let mut addresses = BTreeMap::new();
    for (destination, target) in desired {
        let address = Address::from_ip(destination.ip());
        let key = VipKey::new(address, PortBe::from_host(destination.port()));
        vips.insert(key, VipValue::new(&key, target.service.0, target.reachable));
        addresses.insert(address, KnownAddress::new(&address));
    }
    (vips, addresses)
}

fn write_addresses(
    maps: &Maps,
    wanted: &BTreeMap<Address, KnownAddress>,
    known: &BTreeMap<Address, KnownAddress>,
) -> Result<(), DatapathError> {
    let missing: Vec<(Address, KnownAddress)> = wanted
        .iter()
        .filter(|(address, value)| known.get(address) != Some(value))
        .map(|(address, value)| (*address, *value))
        .collect();
    bpf::map_update_batch(maps.addresses.as_fd(), &missing)
        .map_err(|source| DatapathError::map("ADDRESSES", MapOperation::Write, source))
}

fn delete_addresses(
    maps: &Maps,
    wanted: &BTreeMap<Address, KnownAddress>,
    known: &BTreeMap<Address, KnownAddress>,
) -> Result<(), DatapathError> {
    let gone: Vec<Address> = known
        .keys()
        .filter(|address| !wanted.contains_key(address))
        .copied()
        .collect();
    bpf::map_delete_batch(maps.addresses.as_fd(), &gone)
        .map_err(|source| DatapathError::map("ADDRESSES", MapOperation::Delete, source))
}
