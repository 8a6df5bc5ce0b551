//! The catalog in force: a snapshot together with the addresses and numbers given to its services.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    instances::{InstanceAddresses, Owner},
    model::{Instance, NodeName, Ports, Service, ServiceName, Snapshot},
    vip::{VipAllocator, VipPools, VipProblem},
};
use crate::{
    datapath::{AwayPolicy, ServiceId, VipTarget, VipTargets},
    stable_hash::fnv1a,
};

/// One version of the catalog. Immutable: a connection keeps the one it began with.
#[derive(Debug, Default)]
pub struct Catalog {
    /// Counts publications since the agent started; 0 is the empty catalog before the first.
    pub version: u64,
    /// When it was published.
    pub published_at: Option<SystemTime>,
    /// What the source said.
    pub snapshot: Snapshot,
    /// The virtual addresses of each service. The same `Arc` in versions between which no service came or went and
    /// none changed its addresses or ports.
    pub addresses: Arc<BTreeMap<ServiceName, BTreeSet<IpAddr>>>,
    /// Follows from `addresses` and the services' ports, and is shared like it.
    owners: Arc<Owners>,
    /// Empty unless [`CatalogStore::with_instances`]. The same `Arc` in versions between which no service changed.
    instances: Arc<InstanceAddresses>,
}

/// What the kernel must be told of a version that comes after another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// What is new, or otherwise.
    pub some: VipTargets,
    /// Addresses that are nobody's any more.
    pub gone: Vec<SocketAddr>,
}

impl Change {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Whose a destination is.
#[derive(Debug, Default)]
struct Owners {
    by_destination: HashMap<SocketAddr, ServiceName>,
    /// Of the services that answer at every port.
    by_address: HashMap<IpAddr, ServiceName>,
}

impl Catalog {
    /// The service that answers at a virtual address and port; v4-mapped addresses are the IPv4 ones.
    pub fn service_at(&self, destination: SocketAddr) -> Option<&Arc<Service>> {
        let address = destination.ip().to_canonical();
        let of_port = SocketAddr::new(address, destination.port());
        let owners = &self.owners;
        let of_address = || owners.by_address.get(&address);
        let owner = owners.by_destination.get(&of_port).or_else(of_address)?;
        self.service(owner)
    }

    /// The instance that is called at an address of its own, and its service, where such connections are captured.
    pub fn instance_at(&self, destination: SocketAddr) -> Option<(&Arc<Service>, &Arc<Instance>)> {
        let address = SocketAddr::new(destination.ip().to_canonical(), destination.port());
        let owner = self.instances.at(address)?;
        if owner.rival.is_some() {
            return None;
        }
        Some((self.service(&owner.service)?, &owner.instance))
    }

    /// What is wrong with the addresses of instances, for people.
    pub fn instance_problems(&self) -> Vec<String> {
        self.instances.problems()
    }

    /// The service of that name.
    pub fn service(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.snapshot.services.get(name)
    }

    /// The instances that run on `node`, each with its service.
    pub fn instances_on(
        &self,
        node: &NodeName,
    ) -> impl Iterator<Item = (&ServiceName, &Arc<Instance>)> {
        self.snapshot.services.values().flat_map(move |service| {
            let here = service.instances.iter().filter(move |i| i.node == *node);
            // One that stands in for this service is there as what it is.
            let own = here.filter(|instance| instance.target.is_none());
            own.map(|instance| (&service.name, instance))
        })
    }

    /// What the kernel must know: every virtual address and port, whose it is, and whether it can be called; and every
    /// address of an instance that is captured.
    ///
    /// `away` is what becomes of connects while no agent takes them.
    pub fn vip_targets(&self, away: &BTreeMap<ServiceName, AwayPolicy>) -> VipTargets {
        let mut targets = self.vip_targets_of(self.snapshot.services.values(), away);
        add_instances(&mut targets, self.instances.all(), away);
        targets
    }

    /// The part of it that is about the virtual addresses of `services`.
    fn vip_targets_of<'a>(
        &self,
        services: impl IntoIterator<Item = &'a Arc<Service>>,
        away: &BTreeMap<ServiceName, AwayPolicy>,
    ) -> VipTargets {
        let mut targets = VipTargets::default();
        for service in services {
            let target = VipTarget {
                away: away.get(&service.name).copied().unwrap_or_default(),
                service: id_of(&service.name),
                reachable: is_reachable(service),
            };
            let addresses = self.addresses.get(&service.name).into_iter().flatten();
            for address in addresses.map(IpAddr::to_canonical) {
                // An address of its own is virtual, and no other port of it is anybody's.
                if service.explicit_addresses.contains(&address) && service.destination().is_some()
                {
                    targets.real.insert(address);
                }
                match &service.ports {
                    Ports::Listed(ports) => targets.ports.extend(
                        ports
                            .iter()
                            .map(|port| (SocketAddr::new(address, *port), target)),
                    ),
                    Ports::Any => {
                        targets.any_port.insert(address, target);
                    }
                }
            }
        }
        targets
    }

    /// What the kernel must be told when this version comes after `before`; `None` if that is everything, since services
    /// came or went, or their virtual addresses or ports did.
    pub fn change_in_kernel(
        &self,
        before: &Self,
        away: &BTreeMap<ServiceName, AwayPolicy>,
    ) -> Option<Change> {
        let services = self.changed_in_kernel(before)?;
        let mut change = Change {
            some: self.vip_targets_of(services, away),
            gone: vec![],
        };
        if !Arc::ptr_eq(&self.instances, &before.instances) {
            let (new, gone) = self.instances.since(&before.instances);
            add_instances(&mut change.some, new.into_iter(), away);
            // What is missing in a catalog that was not read whole may only be unreadable.
            if self.snapshot.is_whole {
                change.gone = gone;
            }
        }
        Some(change)
    }

    /// The services of which the kernel knows something else by `before`; `None` if it must be told everything.
    fn changed_in_kernel(&self, before: &Self) -> Option<Vec<&Arc<Service>>> {
        let is_alike = Arc::ptr_eq(&self.owners, &before.owners)
            && self.snapshot.is_whole == before.snapshot.is_whole;
        let services = self.snapshot.services.values();
        // The same services: the owners are the same.
        let pairs = services.zip(before.snapshot.services.values());
        let changed = pairs.filter(|(now, before)| {
            !Arc::ptr_eq(now, before) && is_reachable(now) != is_reachable(before)
        });
        is_alike.then(|| changed.map(|(now, _)| now).collect())
    }
}

/// Adds the addresses of instances. Only one port of each is ours.
fn add_instances<'a>(
    targets: &mut VipTargets,
    instances: impl Iterator<Item = (SocketAddr, &'a Owner)>,
    away: &BTreeMap<ServiceName, AwayPolicy>,
) {
    for (address, owner) in instances {
        // Of two services neither has a say: nothing but a refusal is right for both.
        let is_one = owner.rival.is_none();
        let policy = away.get(&owner.service).copied().filter(|_| is_one);
        let target = VipTarget {
            away: policy.unwrap_or_default(),
            service: id_of(&owner.service),
            reachable: is_one,
        };
        targets.ports.insert(address, target);
        targets.real.insert(address.ip());
    }
}

/// What is outside the mesh has no health here: whether it answers is seen when it is called.
fn is_reachable(service: &Service) -> bool {
    let mut instances = service.instances.iter();
    service.destination().is_some() || instances.any(|instance| instance.weight() > 0)
}

/// The number by which the kernel knows a service.
pub fn id_of(name: &ServiceName) -> ServiceId {
    ServiceId(fnv1a(name.as_str().as_bytes()))
}

/// Publishes catalogs.
#[derive(Debug)]
pub struct CatalogStore {
    current: ArcSwap<Catalog>,
    version: watch::Sender<u64>,
    /// Remembers the addresses given. Locked while publishing.
    allocator: Mutex<VipAllocator>,
    /// What is virtual, if connections to addresses of instances are captured as well.
    instances_but: Option<VipPools>,
}

impl CatalogStore {
    /// Starts with the empty catalog.
    pub fn new(allocator: VipAllocator) -> Self {
        Self {
            current: ArcSwap::default(),
            version: watch::channel(0).0,
            allocator: Mutex::new(allocator),
            instances_but: None,
        }
    }

    /// Has the addresses of instances captured as well, but for those in `virtual_ranges`.
    #[must_use]
    pub fn with_instances(self, virtual_ranges: VipPools) -> Self {
        Self {
            instances_but: Some(virtual_ranges),
            ..self
        }
    }

    /// Puts a snapshot in force. The problems are about single addresses; the rest holds.
    pub fn publish(&self, snapshot: Snapshot) -> Vec<VipProblem> {
        let mut allocator = self.allocator.lock();
        let before = self.current.load_full();
        let now = SystemTime::now();
        let mut problems = vec![];
        let (addresses, owners) =
            if allocator.is_settled() && have_same_destinations(&before.snapshot, &snapshot) {
                (Arc::clone(&before.addresses), Arc::clone(&before.owners))
            } else {
                let assigned = allocator.assign(&snapshot, now);
                problems = assigned.problems;
                let owners = Owners::new(&snapshot, &assigned.addresses);
                (Arc::new(assigned.addresses), Arc::new(owners))
            };
        let instances = match self.instances_but {
            Some(ranges) if !is_alike(&before, &snapshot, &owners) => {
                Arc::new(owners.instances(&snapshot, &addresses, ranges))
            }
            // Without, it is empty for ever.
            Some(_) | None => Arc::clone(&before.instances),
        };
        let version = before.version + 1;
        self.current.store(Arc::new(Catalog {
            version,
            published_at: Some(now),
            snapshot,
            addresses,
            owners,
            instances,
        }));
        self.version.send_replace(version);
        problems
    }

    /// The catalog in force.
    pub fn current(&self) -> Arc<Catalog> {
        self.current.load_full()
    }

    /// The version in force, for waiting on the next.
    pub fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl Owners {
    fn new(snapshot: &Snapshot, addresses: &BTreeMap<ServiceName, BTreeSet<IpAddr>>) -> Self {
        let mut owners = Self::default();
        for (name, addresses) in addresses {
            let Some(service) = snapshot.services.get(name) else {
                continue;
            };
            for address in addresses.iter().map(IpAddr::to_canonical) {
                let Ports::Listed(ports) = &service.ports else {
                    owners.by_address.insert(address, name.clone());
                    continue;
                };
                let destinations = ports.iter().map(|port| SocketAddr::new(address, *port));
                owners
                    .by_destination
                    .extend(destinations.map(|destination| (destination, name.clone())));
            }
        }
        owners
    }

    /// The addresses of the instances, but for what has an owner already.
    fn instances(
        &self,
        snapshot: &Snapshot,
        addresses: &BTreeMap<ServiceName, BTreeSet<IpAddr>>,
        ranges: VipPools,
    ) -> InstanceAddresses {
        // Those outside of the ranges are few. Of a host outside the mesh only one port is taken.
        let is_whole = |name: &ServiceName| {
            let service = snapshot.services.get(name);
            service.is_some_and(|service| service.destination().is_none())
        };
        let explicit: HashSet<IpAddr> = addresses
            .iter()
            .filter(|(name, _)| is_whole(name))
            .flat_map(|(_, addresses)| addresses.iter().map(IpAddr::to_canonical))
            .filter(|address| !ranges.contain(*address))
            .collect();
        InstanceAddresses::new(snapshot.services.values(), |address| {
            let ip = address.ip();
            ranges.contain(ip)
                || explicit.contains(&ip)
                || self.by_destination.contains_key(&address)
        })
    }
}

/// Whether no service differs, nor what is virtual.
fn is_alike(before: &Catalog, now: &Snapshot, owners: &Arc<Owners>) -> bool {
    // Mostly by their pointers.
    Arc::ptr_eq(owners, &before.owners) && before.snapshot.services == now.services
}

/// Whether the same services want the same addresses and ports in both.
fn have_same_destinations(before: &Snapshot, now: &Snapshot) -> bool {
    let wants_same = |before: &Arc<Service>, now: &Arc<Service>| {
        Arc::ptr_eq(before, now)
            || before.name == now.name
                && before.explicit_addresses == now.explicit_addresses
                && before.ports == now.ports
    };
    let mut pairs = before.services.values().zip(now.services.values());
    before.services.len() == now.services.len()
        && pairs.all(|(before, now)| wants_same(before, now))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::catalog::{
        model::{Health, ServiceDefaults, Weights},
        vip::VipPools,
    };

    fn instance(id: &str) -> Arc<Instance> {
        Arc::new(Instance {
            id: id.parse().unwrap(),
            node: "b".parse().unwrap(),
            tunnel: ([192, 0, 2, 1], 15443).into(),
            local: ([127, 0, 0, 1], 5432).into(),
            port: 5432,
            tags: vec![],
            meta: BTreeMap::new(),
            health: Health::Passing,
            weights: Weights::default(),
            target: None,
        })
    }

    fn store() -> CatalogStore {
        let pools = VipPools {
            ipv4: "240.0.0.0/4".parse().unwrap(),
            ipv6: "fd00::/64".parse().unwrap(),
        };
        CatalogStore::new(VipAllocator::new(pools, None, Duration::ZERO).0)
    }

    fn snapshot(names: &[&str]) -> Snapshot {
        let service = |name: &&str| {
            let name: ServiceName = name.parse().unwrap();
            let service = Service {
                name: name.clone(),
                instances: vec![],
                explicit_addresses: BTreeSet::new(),
                ports: Ports::Listed(BTreeSet::from([80, 443])),
                defaults: ServiceDefaults::default(),
            };
            (name, Arc::new(service))
        };
        Snapshot {
            is_whole: true,
            services: names.iter().map(service).collect(),
            nodes: BTreeMap::new(),
            intentions: vec![],
            default_intention: None,
        }
    }

    #[test]
    fn every_address_and_port_leads_to_its_service() {
        let store = store();
        assert!(store.publish(snapshot(&["db", "web"])).is_empty());
        let catalog = store.current();
        let fallback = AwayPolicy::Fallback("192.0.2.9:1".parse().unwrap());
        let away = BTreeMap::from([("db".parse().unwrap(), fallback)]);
        let targets = catalog.vip_targets(&away);
        for target in targets.ports.values() {
            let is_db = target.service == id_of(&"db".parse().unwrap());
            let expected = if is_db { fallback } else { AwayPolicy::Closed };
            assert_eq!(target.away, expected);
        }
        assert_eq!(
            (targets.ports.len(), targets.any_port.len()),
            (2 * 2 * 2, 0)
        );
        for (name, addresses) in catalog.addresses.iter() {
            for address in addresses {
                let found = catalog.service_at(SocketAddr::new(*address, 443)).unwrap();
                assert_eq!(found.name, *name);
                assert!(catalog.service_at(SocketAddr::new(*address, 444)).is_none());
            }
        }
    }

    #[test]
    fn a_service_may_answer_at_every_port() {
        let store = store();
        let mut snapshot = snapshot(&["db", "web"]);
        let web = snapshot.services.get_mut(&"web".parse().unwrap()).unwrap();
        Arc::make_mut(web).ports = Ports::Any;
        store.publish(snapshot);
        let catalog = store.current();
        let targets = catalog.vip_targets(&BTreeMap::new());
        assert_eq!((targets.ports.len(), targets.any_port.len()), (2 * 2, 2));
        for (name, addresses) in catalog.addresses.iter() {
            for address in addresses {
                let found = catalog.service_at(SocketAddr::new(*address, 444));
                let expected = (name.as_str() == "web").then_some("web");
                assert_eq!(found.map(|service| service.name.as_str()), expected);
            }
        }
    }

    #[test]
    fn the_kernel_is_told_only_what_it_must_know() {
        let store = store();
        let publish = |change: &dyn Fn(&mut Snapshot)| {
            let before = store.current();
            let mut snapshot = snapshot(&["db", "web"]);
            change(&mut snapshot);
            assert!(store.publish(snapshot).is_empty());
            let now = store.current();
            let changed = now.changed_in_kernel(&before);
            changed.map(|all| all.iter().map(|s| s.name.to_string()).collect::<Vec<_>>())
        };
        let with_db = |change: fn(&mut Service)| {
            move |snapshot: &mut Snapshot| {
                let db = snapshot.services.get_mut(&"db".parse().unwrap());
                change(Arc::make_mut(db.unwrap()));
            }
        };
        let healthy = |service: &mut Service| service.instances = vec![instance("db-1")];
        let told = Some(vec![]);
        assert_eq!(publish(&|_| {}), None, "the first one");
        let addresses = Arc::clone(&store.current().addresses);
        assert_eq!(publish(&|_| {}), told);
        assert_eq!(publish(&with_db(healthy)), Some(vec!["db".to_owned()]));
        let two = |service: &mut Service| {
            service.instances = vec![instance("db-1"), instance("db-2")];
        };
        assert_eq!(publish(&with_db(two)), told, "instances");
        assert_eq!(publish(&|_| {}), Some(vec!["db".to_owned()]));
        assert!(Arc::ptr_eq(&addresses, &store.current().addresses));

        let ports = |service: &mut Service| service.ports = Ports::Any;
        let moved = |service: &mut Service| {
            service.explicit_addresses.insert([240, 0, 0, 9].into());
        };
        let everything: [&dyn Fn(&mut Snapshot); 4] = [
            &with_db(ports),
            &with_db(moved),
            &|snapshot| snapshot.is_whole = false,
            &|snapshot| drop(snapshot.services.pop_first()),
        ];
        for change in everything {
            assert_eq!(publish(change), None);
            assert_eq!(publish(&|_| {}), None, "and back");
        }
    }

    fn instance_at(id: &str, address: &str) -> Arc<Instance> {
        let address: SocketAddr = address.parse().unwrap();
        Arc::new(Instance {
            id: id.parse().unwrap(),
            tunnel: (address.ip(), 15443).into(),
            port: address.port(),
            health: Health::Critical,
            ..(*instance(id)).clone()
        })
    }

    fn with_instances() -> CatalogStore {
        store().with_instances(VipPools {
            ipv4: "10.96.0.0/16".parse().unwrap(),
            ipv6: "fd00::/64".parse().unwrap(),
        })
    }

    #[test]
    fn addresses_of_instances_are_captured_only_if_wanted() {
        let mut snapshot = snapshot(&["db", "web"]);
        let name: ServiceName = "db".parse().unwrap();
        let db = Arc::make_mut(snapshot.services.get_mut(&name).unwrap());
        db.explicit_addresses = [[192, 0, 2, 9].into()].into();
        db.instances = [
            ("1", "192.0.2.1:5432"),
            ("2", "[2001:db8::2]:5432"),
            ("in-range", "10.96.0.1:5432"),
            ("virtual", "192.0.2.9:1"),
        ]
        .map(|(id, address)| instance_at(id, address))
        .to_vec();
        let away = BTreeMap::from([(name.clone(), AwayPolicy::Open)]);
        let without = store();
        without.publish(snapshot.clone());
        let without = without.current().vip_targets(&away);
        assert!(without.real.is_empty());

        let store = with_instances();
        assert!(store.publish(snapshot).is_empty());
        let catalog = store.current();
        let mut targets = catalog.vip_targets(&away);
        let real: Vec<String> = targets.real.iter().map(ToString::to_string).collect();
        assert_eq!(real, ["192.0.2.1", "2001:db8::2"]);
        for address in ["192.0.2.1:5432", "[2001:db8::2]:5432"] {
            let target = targets.ports.remove(&address.parse().unwrap()).unwrap();
            // Whatever the health: who calls it has chosen it.
            let expected = VipTarget {
                service: id_of(&name),
                reachable: true,
                away: AwayPolicy::Open,
            };
            assert_eq!(target, expected);
        }
        assert_eq!(targets.ports, without.ports);
        let mapped = "[::ffff:192.0.2.1]:5432".parse().unwrap();
        let (service, instance) = catalog.instance_at(mapped).unwrap();
        assert_eq!((&service.name, instance.id.as_str()), (&name, "1"));
        for other in ["192.0.2.1:5433", "192.0.2.9:5432", "10.96.0.1:5432"] {
            let other = other.parse().unwrap();
            assert!(catalog.instance_at(other).is_none(), "{other}");
        }
    }

    #[test]
    fn the_kernel_is_told_of_instances_that_come_and_go() {
        let store = with_instances();
        let away = BTreeMap::new();
        let publish = |is_whole: bool, instances: &[(&str, &str)]| {
            let before = store.current();
            let mut snapshot = snapshot(&["db", "web"]);
            snapshot.is_whole = is_whole;
            for (name, address) in instances {
                let service = snapshot.services.get_mut(&name.parse().unwrap()).unwrap();
                let instances = &mut Arc::make_mut(service).instances;
                instances.push(instance_at(&format!("{name}-{address}"), address));
            }
            assert!(store.publish(snapshot).is_empty());
            let now = store.current();
            let change = now.change_in_kernel(&before, &away)?;
            let some = change.some.ports.iter().map(|(address, target)| {
                let refused = if target.reachable { "" } else { " refused" };
                format!("{address}{refused}")
            });
            let gone = change.gone.iter().map(|address| format!("not {address}"));
            Some(some.chain(gone).collect::<Vec<_>>().join(", "))
        };
        let (first, second) = (("db", "192.0.2.1:80"), ("db", "192.0.2.2:80"));
        let rival = ("web", "192.0.2.2:80");
        let told = |change: &str| Some(change.to_owned());
        assert_eq!(publish(true, &[first]), None, "everything");
        assert_eq!(publish(true, &[first]), told(""));
        assert_eq!(publish(true, &[first, second]), told("192.0.2.2:80"));
        assert_eq!(
            publish(true, &[second]),
            told("not 192.0.2.1:80"),
            "one has gone"
        );
        assert_eq!(
            publish(true, &[second, rival]),
            told("192.0.2.2:80 refused")
        );
        assert_eq!(store.current().instance_problems().len(), 1);
        assert_eq!(publish(true, &[rival]), told("192.0.2.2:80"), "another's");
        assert_eq!(publish(false, &[rival]), None, "not whole");
        assert_eq!(publish(false, &[first]), told("192.0.2.1:80"), "kept");
    }

    #[test]
    fn what_is_outside_can_be_called_without_an_instance() {
        use crate::catalog::destination::Destination;
        let store = store();
        let destination = Destination::read(&["192.0.2.7".to_owned()], 443).unwrap();
        let defaults = ServiceDefaults {
            destination: Some(destination.clone().into()),
            ..ServiceDefaults::default()
        };
        let service = Service::outside("api".parse().unwrap(), &destination, defaults);
        let mut snapshot = snapshot(&["web"]);
        snapshot
            .services
            .insert(service.name.clone(), service.into());
        assert!(store.publish(snapshot).is_empty());
        let targets = store.current().vip_targets(&BTreeMap::new());
        let reachable = targets.ports.iter().filter(|(_, target)| target.reachable);
        let reachable: Vec<String> = reachable.map(|(at, _)| at.to_string()).collect();
        assert_eq!(reachable, ["192.0.2.7:443"]);
        // What is at its other ports is not ours.
        assert_eq!(targets.real, [IpAddr::from([192, 0, 2, 7])].into());
    }

    #[test]
    fn a_part_of_the_targets_says_what_the_whole_says() {
        let store = store();
        store.publish(snapshot(&["db", "web"]));
        let catalog = store.current();
        let away = BTreeMap::new();
        let mut parts = VipTargets::default();
        for service in catalog.snapshot.services.values() {
            let part = catalog.vip_targets_of([service], &away);
            assert_eq!(part.ports.len(), 2 * 2);
            parts.ports.extend(part.ports);
        }
        assert_eq!(parts, catalog.vip_targets(&away));
    }

    #[test]
    fn mapped_addresses_are_the_plain_ones() {
        let store = store();
        store.publish(snapshot(&["web"]));
        let catalog = store.current();
        let IpAddr::V4(v4) = *catalog
            .addresses
            .values()
            .flatten()
            .find(|a| a.is_ipv4())
            .unwrap()
        else {
            panic!()
        };
        let mapped = SocketAddr::new(IpAddr::V6(v4.to_ipv6_mapped()), 80);
        assert!(catalog.service_at(mapped).is_some());
    }

    #[test]
    fn a_number_follows_from_the_name() {
        // A constant: agents of other versions must find the same.
        assert_eq!(
            id_of(&"web".parse().unwrap()),
            ServiceId(0x5ea0_e119_4872_1ef1)
        );
        assert_ne!(
            id_of(&"web".parse().unwrap()),
            id_of(&"web2".parse().unwrap())
        );
    }
}
