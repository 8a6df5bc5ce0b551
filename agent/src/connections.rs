//! The live connections of this node, and how they are cut.
//!
//! A connection is registered *before* policy decides on it: whoever changes an intention afterwards
//! either finds it here ([`Connections::cut_forbidden`]) or is seen by the decision. Nothing falls between.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    catalog::{
        model::{InstanceId, ServiceName},
        store::Catalog,
    },
    identity::spiffe::SpiffeId,
    relay::Counts,
    telemetry::record::Direction,
};

/// Every connection between its identification and its end, in both directions.
#[derive(Debug)]
pub struct Connections {
    live: Mutex<Live>,
    next_id: AtomicU64,
    outbound: Slots,
    inbound: Slots,
    /// Peers whose handshakes are not finished, by their network: see [`Connections::admit_unproven`].
    unproven: Mutex<HashMap<IpAddr, usize>>,
}

/// What is registered now.
#[derive(Debug, Default)]
struct Live {
    by_id: HashMap<u64, Arc<Connection>>,
    /// How many inbound ones each service has, so that its limit costs no walk over all of them.
    inbound: HashMap<ServiceName, usize>,
}

/// Bounds one direction, so that strangers at the inbound port cannot take the workloads' share.
#[derive(Debug)]
struct Slots {
    free: Arc<Semaphore>,
    limit: u32,
}

/// One live connection.
#[derive(Debug)]
pub struct Connection {
    /// Unique while the agent runs.
    pub id: u64,
    /// Captured here, or delivered here.
    pub direction: Direction,
    /// The calling workload.
    pub source: SpiffeId,
    /// The service it called.
    pub service: ServiceName,
    /// When it was accepted.
    pub started_at: SystemTime,
    /// Bytes so far.
    pub counts: Arc<Counts>,
    instance: Mutex<Option<InstanceId>>,
    destination: Mutex<Option<SocketAddr>>,
    cut: CancellationToken,
    cut_reason: Mutex<Option<String>>,
}

impl Connection {
    /// Resolves when somebody cut the connection.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }

    /// Why it was cut.
    pub fn cut_reason(&self) -> Option<String> {
        self.cut_reason.lock().clone()
    }

    /// The instance that carries it, once one was chosen.
    pub fn instance(&self) -> Option<InstanceId> {
        self.instance.lock().clone()
    }

    /// Notes the instance that carries it.
    pub fn carried_by(&self, instance: &InstanceId) {
        *self.instance.lock() = Some(instance.clone());
    }

    /// The virtual address that was called, if one was.
    pub fn destination(&self) -> Option<SocketAddr> {
        *self.destination.lock()
    }

    /// Notes the virtual address that was called.
    pub fn called_at(&self, destination: SocketAddr) {
        *self.destination.lock() = Some(destination);
    }

    /// Why it must end, if the virtual address that it called is another service's by `catalog`. An address that is
    /// nobody's takes nothing away.
    pub fn lost_address(&self, catalog: &Catalog) -> Option<String> {
        let destination = self.destination()?;
        let owner = &catalog.service_at(destination)?.name;
        (*owner != self.service)
            .then(|| format!("the virtual address {} is {owner}'s now", destination.ip()))
    }

    fn cut_because(&self, reason: String) {
        self.cut_reason.lock().get_or_insert(reason);
        self.cut.cancel();
    }
}

/// Keeps a connection in the table until dropped.
#[derive(Debug)]
pub struct Registered {
    table: Arc<Connections>,
    /// The registered connection.
    pub connection: Arc<Connection>,
}

/// A peer in a handshake, counted until dropped.
#[derive(Debug)]
pub struct Unproven {
    table: Arc<Connections>,
    network: IpAddr,
}

impl Drop for Unproven {
    fn drop(&mut self) {
        count_down(&mut self.table.unproven.lock(), self.network);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Connection {
            id,
            direction,
            service,
            ..
        } = &*self.connection;
        let mut live = self.table.live.lock();
        live.by_id.remove(id);
        if matches!(direction, Direction::Inbound) {
            count_down(&mut live.inbound, service.clone());
        }
    }
}

impl Connections {
    /// An empty table that admits `limit` connections per direction.
    pub fn new(limit: u32) -> Arc<Self> {
        let slots = || Slots {
            free: Arc::new(Semaphore::new(limit as usize)),
            limit,
        };
        Arc::new(Self {
            live: Mutex::default(),
            next_id: AtomicU64::new(1),
            outbound: slots(),
            inbound: slots(),
            unproven: Mutex::default(),
        })
    }

    /// Takes a slot for a connection that was just accepted; `None` when the direction is full.
    pub fn admit(&self, direction: Direction) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots(direction).free)
            .try_acquire_owned()
            .ok()
    }

    /// Counts an inbound peer, which has a slot, until its handshake is finished. `None` to send it away: once half
    /// of the slots are taken, one network may hold no more unfinished handshakes than there are free slots.
    ///
    /// Otherwise anybody could keep all peers out by opening connections and saying nothing.
    pub fn admit_unproven(self: &Arc<Self>, peer: IpAddr) -> Option<Unproven> {
        let network = network_of(peer);
        let free = self.inbound.free.available_permits();
        let is_scarce = free < self.inbound.limit as usize / 2;
        let mut unproven = self.unproven.lock();
        let held = unproven.get(&network).copied().unwrap_or_default();
        if is_scarce && held > free {
            return None;
        }
        unproven.insert(network, held + 1);
        drop(unproven);
        Some(Unproven {
            table: Arc::clone(self),
            network,
        })
    }

    /// How many connections a direction admits at once.
    pub fn limit(&self, direction: Direction) -> u32 {
        self.slots(direction).limit
    }

    /// Slots in use, including connections that are not identified yet.
    pub fn admitted(&self, direction: Direction) -> usize {
        let slots = self.slots(direction);
        (slots.limit as usize).saturating_sub(slots.free.available_permits())
    }

    /// Registers an identified connection until the returned guard is dropped.
    pub fn register(
        self: &Arc<Self>,
        direction: Direction,
        source: SpiffeId,
        service: ServiceName,
        counts: Arc<Counts>,
    ) -> Registered {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            direction,
            source,
            service,
            started_at: SystemTime::now(),
            counts,
            instance: Mutex::default(),
            destination: Mutex::default(),
            cut: CancellationToken::new(),
            cut_reason: Mutex::default(),
        });
        let mut live = self.live.lock();
        live.by_id.insert(id, Arc::clone(&connection));
        if matches!(direction, Direction::Inbound) {
            *live.inbound.entry(connection.service.clone()).or_default() += 1;
        }
        drop(live);
        Registered {
            table: Arc::clone(self),
            connection,
        }
    }

    /// Inbound connections to one service that are registered now.
    pub fn inbound_to(&self, service: &ServiceName) -> usize {
        let live = self.live.lock();
        live.inbound.get(service).copied().unwrap_or_default()
    }

    /// How many are registered now, in both directions.
    pub fn count(&self) -> usize {
        self.live.lock().by_id.len()
    }

    /// A copy of the table, oldest first.
    pub fn list(&self) -> Vec<Arc<Connection>> {
        let mut list: Vec<_> = self.live.lock().by_id.values().map(Arc::clone).collect();
        list.sort_by_key(|c| c.id);
        list
    }

    /// Cuts every connection for which `forbidden` gives a reason; returns how many.
    pub fn cut_forbidden(&self, forbidden: impl Fn(&Connection) -> Option<String>) -> usize {
        let mut cut = 0;
        for connection in self.list() {
            if let Some(reason) = forbidden(&connection) {
                connection.cut_because(reason);
                cut += 1;
            }
        }
        cut
    }

    fn slots(&self, direction: Direction) -> &Slots {
        match direction {
            Direction::Outbound => &self.outbound,
            Direction::Inbound => &self.inbound,
        }
    }
}

/// One less; what nobody holds is forgotten.
fn count_down<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K) {
    if let Entry::Occupied(mut held) = counts.entry(key) {
        *held.get_mut() -= 1;
        if *held.get() == 0 {
            held.remove();
        }
    }
}

/// What one host can choose its address from: an IPv4 address, or the /64 of an IPv6 address.
fn network_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::catalog::{
        model::{Ports, Service, ServiceDefaults, Snapshot},
        store::CatalogStore,
        vip::{VipAllocator, VipPools},
    };

    fn register(table: &Arc<Connections>, from: &str, to: &str) -> Registered {
        let id = format!("spiffe://example.test/ns/default/dc/dc1/svc/{from}");
        table.register(
            Direction::Outbound,
            id.parse().unwrap(),
            to.parse().unwrap(),
            Arc::default(),
        )
    }

    #[tokio::test]
    async fn only_forbidden_connections_are_cut() {
        let table = Connections::new(10);
        let (kept, cut) = (
            register(&table, "web", "db"),
            register(&table, "guest", "db"),
        );
        let forbidden = |c: &Connection| {
            (c.source.service.as_str() == "guest").then(|| "intention deny".to_owned())
        };
        assert_eq!(table.cut_forbidden(forbidden), 1);
        cut.connection.cut().await;
        assert_eq!(
            cut.connection.cut_reason().as_deref(),
            Some("intention deny")
        );
        assert_eq!(kept.connection.cut_reason(), None);
    }

    #[test]
    fn only_an_address_of_another_service_is_lost() {
        let pools = VipPools {
            ipv4: "240.0.0.0/4".parse().unwrap(),
            ipv6: "fd00::/64".parse().unwrap(),
        };
        let store = CatalogStore::new(VipAllocator::new(pools, None, Duration::ZERO).0);
        let address: IpAddr = "240.0.0.80".parse().unwrap();
        let owned_by = |owner: Option<&str>| {
            let service = owner.map(|owner| Service {
                name: owner.parse().unwrap(),
                instances: vec![],
                explicit_addresses: [address].into(),
                ports: Ports::Any,
                defaults: ServiceDefaults::default(),
            });
            let services = service
                .into_iter()
                .map(|it| (it.name.clone(), Arc::new(it)));
            store.publish(Snapshot {
                services: services.collect(),
                ..Snapshot::default()
            });
            store.current()
        };
        let table = Connections::new(10);
        let live = register(&table, "web", "db");
        let lost = |owner| live.connection.lost_address(&owned_by(owner));
        assert_eq!(lost(Some("other")), None);
        live.connection.called_at((address, 80).into());
        assert_eq!(lost(Some("db")), None);
        assert_eq!(lost(None), None);
        let reason = lost(Some("other")).unwrap();
        assert_eq!(reason, "the virtual address 240.0.0.80 is other's now");
    }

    #[test]
    fn an_ended_connection_leaves_the_table() {
        let table = Connections::new(10);
        let first = register(&table, "web", "db");
        assert_eq!(table.list().len(), 1);
        drop(first);
        assert_eq!(table.list().len(), 0);
    }

    #[test]
    fn each_service_has_its_own_count_of_inbound_connections() {
        let table = Connections::new(10);
        let [db, cache] = ["db", "cache"].map(|name| name.parse::<ServiceName>().unwrap());
        let inbound = |service: &ServiceName| {
            let id = "spiffe://example.test/ns/default/dc/dc1/svc/web";
            table.register(
                Direction::Inbound,
                id.parse().unwrap(),
                service.clone(),
                Arc::default(),
            )
        };
        let calling = register(&table, "web", "db");
        let (first, second, other) = (inbound(&db), inbound(&db), inbound(&cache));
        assert_eq!((table.inbound_to(&db), table.inbound_to(&cache)), (2, 1));
        drop((calling, first));
        assert_eq!((table.inbound_to(&db), table.inbound_to(&cache)), (1, 1));
        drop((second, other));
        assert!(table.live.lock().inbound.is_empty());
    }

    #[test]
    fn one_network_cannot_take_all_slots_without_proving_itself() {
        let table = Connections::new(64);
        let open = |peer: &str| {
            let slot = table.admit(Direction::Inbound)?;
            let unproven = table.admit_unproven(peer.parse().unwrap())?;
            Some((slot, unproven))
        };
        let open_all = |peer: &dyn Fn(usize) -> String| -> Vec<_> {
            let opened = (0..64).map(|n| open(&peer(n)));
            opened.map_while(|opened| opened).collect()
        };
        let silent = open_all(&|_| "192.0.2.1".to_owned());
        assert_eq!(silent.len(), 32);
        let others = open_all(&|n| format!("2001:db8::{n:x}"));
        assert_eq!(others.len(), 16, "a /64 counts as one");
        // Who finishes handshakes may have all that is free.
        let mut proven = vec![];
        while let Some((slot, handshake)) = open("192.0.2.9") {
            drop(handshake);
            proven.push(slot);
        }
        assert_eq!(proven.len(), 16);
        assert!(open("192.0.2.9").is_none());

        drop((silent, others));
        assert!(table.unproven.lock().is_empty());
        assert!(open("192.0.2.1").is_some());
    }

    #[test]
    fn a_full_direction_leaves_the_other_alone() {
        let table = Connections::new(1);
        let held = table.admit(Direction::Inbound);
        assert!(held.is_some());
        assert!(table.admit(Direction::Inbound).is_none());
        assert!(table.admit(Direction::Outbound).is_some());
        assert_eq!(table.admitted(Direction::Inbound), 1);
        drop(held);
        assert!(table.admit(Direction::Inbound).is_some());
    }
}
