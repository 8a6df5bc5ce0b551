//! The live connections of this node, and how they are cut.
//!
//! A connection is registered *before* policy decides on it: whoever changes an intention afterwards
//! either finds it here ([`Connections::cut_forbidden`]) or is seen by the decision. Nothing falls between.

use std::{
    collections::HashMap,
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
    catalog::model::{InstanceId, ServiceName},
    identity::spiffe::SpiffeId,
    relay::Counts,
    telemetry::record::Direction,
};

/// Every connection between its identification and its end, in both directions.
#[derive(Debug)]
pub struct Connections {
    live: Mutex<HashMap<u64, Arc<Connection>>>,
    next_id: AtomicU64,
    outbound: Slots,
    inbound: Slots,
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

impl Drop for Registered {
    fn drop(&mut self) {
        self.table.live.lock().remove(&self.connection.id);
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
        })
    }

    /// Takes a slot for a connection that was just accepted; `None` when the direction is full.
    pub fn admit(&self, direction: Direction) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots(direction).free)
            .try_acquire_owned()
            .ok()
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
            cut: CancellationToken::new(),
            cut_reason: Mutex::default(),
        });
        self.live.lock().insert(id, Arc::clone(&connection));
        Registered {
            table: Arc::clone(self),
            connection,
        }
    }

    /// Inbound connections to one service that are registered now.
    pub fn inbound_to(&self, service: &ServiceName) -> usize {
        let live = self.live.lock();
        live.values()
            .filter(|c| matches!(c.direction, Direction::Inbound) && c.service == *service)
            .count()
    }

    /// How many are registered now, in both directions.
    pub fn count(&self) -> usize {
        self.live.lock().len()
    }

    /// A copy of the table, oldest first.
    pub fn list(&self) -> Vec<Arc<Connection>> {
        let mut list: Vec<_> = self.live.lock().values().map(Arc::clone).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn an_ended_connection_leaves_the_table() {
        let table = Connections::new(10);
        let first = register(&table, "web", "db");
        assert_eq!(table.list().len(), 1);
        drop(first);
        assert_eq!(table.list().len(), 0);
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
