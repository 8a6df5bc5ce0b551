//! The catalog in force: a snapshot together with the addresses and numbers given to its services.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    model::{Instance, NodeName, Ports, Service, ServiceName, Snapshot},
    vip::{VipAllocator, VipProblem},
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

    /// What the kernel must know: every virtual address and port, whose it is, and whether it can be called.
    ///
    /// `away` is what becomes of connects while no agent takes them.
    pub fn vip_targets(&self, away: &BTreeMap<ServiceName, AwayPolicy>) -> VipTargets {
        self.vip_targets_of(self.snapshot.services.values(), away)
    }

    /// The part of it that is about `services`.
    pub fn vip_targets_of<'a>(
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

    /// The services that the kernel must be told of when this version comes after `before`; `None` if it must be told
    /// everything, since destinations came or went.
    pub fn changed_in_kernel(&self, before: &Self) -> Option<Vec<&Arc<Service>>> {
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
}

impl CatalogStore {
    /// Starts with the empty catalog.
    pub fn new(allocator: VipAllocator) -> Self {
        Self {
            current: ArcSwap::default(),
            version: watch::channel(0).0,
            allocator: Mutex::new(allocator),
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
        let version = before.version + 1;
        self.current.store(Arc::new(Catalog {
            version,
            published_at: Some(now),
            snapshot,
            addresses,
            owners,
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
