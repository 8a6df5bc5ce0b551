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
    /// The virtual addresses of each service.
    pub addresses: BTreeMap<ServiceName, BTreeSet<IpAddr>>,
    by_destination: HashMap<SocketAddr, Arc<Service>>,
    /// Of the services that answer at every port.
    by_address: HashMap<IpAddr, Arc<Service>>,
}

impl Catalog {
    /// The service that answers at a virtual address and port; v4-mapped addresses are the IPv4 ones.
    pub fn service_at(&self, destination: SocketAddr) -> Option<&Arc<Service>> {
        let address = destination.ip().to_canonical();
        let of_port = SocketAddr::new(address, destination.port());
        self.by_destination
            .get(&of_port)
            .or_else(|| self.by_address.get(&address))
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
        let target = |service: &Service| {
            let mut instances = service.instances.iter();
            VipTarget {
                away: away.get(&service.name).copied().unwrap_or_default(),
                service: id_of(&service.name),
                reachable: instances.any(|instance| instance.weight() > 0),
            }
        };
        let by_destination = self.by_destination.iter();
        let by_address = self.by_address.iter();
        VipTargets {
            ports: by_destination.map(|(at, s)| (*at, target(s))).collect(),
            any_port: by_address.map(|(at, s)| (*at, target(s))).collect(),
        }
    }
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
        let now = SystemTime::now();
        let assigned = allocator.assign(&snapshot, now);
        let mut by_destination = HashMap::new();
        let mut by_address = HashMap::new();
        for (name, addresses) in &assigned.addresses {
            let Some(service) = snapshot.services.get(name) else {
                continue;
            };
            for address in addresses.iter().map(IpAddr::to_canonical) {
                match &service.ports {
                    Ports::Listed(ports) => by_destination.extend(ports.iter().map(|port| {
                        let destination = SocketAddr::new(address, *port);
                        (destination, Arc::clone(service))
                    })),
                    Ports::Any => {
                        by_address.insert(address, Arc::clone(service));
                    }
                }
            }
        }
        let version = self.current.load().version + 1;
        self.current.store(Arc::new(Catalog {
            version,
            published_at: Some(now),
            snapshot,
            addresses: assigned.addresses,
            by_destination,
            by_address,
        }));
        self.version.send_replace(version);
        assigned.problems
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::catalog::{model::ServiceDefaults, vip::VipPools};

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
        for (name, addresses) in &catalog.addresses {
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
        for (name, addresses) in &catalog.addresses {
            for address in addresses {
                let found = catalog.service_at(SocketAddr::new(*address, 444));
                let expected = (name.as_str() == "web").then_some("web");
                assert_eq!(found.map(|service| service.name.as_str()), expected);
            }
        }
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
