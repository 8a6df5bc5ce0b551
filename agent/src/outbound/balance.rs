//! Which instance takes the next connection: power of two choices on live connections, with ejection.
//!
//! Health comes from the catalog (an instance of weight 0 is never chosen). Beside it the balancer keeps
//! what it saw itself: live connections and dials that failed in a row. An instance that failed often enough
//! is left out for a while; when all are left out, all are tried, since refusing everything helps nobody.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::catalog::model::{Instance, InstanceId, NodeName, Service, ServiceName, Snapshot};

/// When dial failures eject an instance, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Ejection {
    /// Failures in a row; 0 never ejects.
    pub after: u32,
    /// How long the instance is left out.
    pub for_: Duration,
}

/// What the balancer saw of every instance.
#[derive(Debug, Default)]
pub struct Balancer {
    seen: Mutex<HashMap<Key, Arc<Seen>>>,
}

/// Instance ids are unique per node only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    service: ServiceName,
    node: NodeName,
    id: InstanceId,
}

#[derive(Debug, Default)]
struct Seen {
    live: AtomicUsize,
    failures: AtomicU32,
    ejected_until: Mutex<Option<Instant>>,
}

/// An instance that was chosen; counts as a live connection of it until dropped.
#[derive(Debug)]
pub struct Choice {
    /// Where the connection goes.
    pub instance: Arc<Instance>,
    seen: Arc<Seen>,
}

impl Choice {
    /// The instance answered: its failures are forgiven.
    pub fn succeeded(&self) {
        self.seen.failures.store(0, Ordering::Relaxed);
    }

    /// The dial failed; says whether this ejected the instance.
    pub fn failed(&self, ejection: Ejection) -> bool {
        let failures = self
            .seen
            .failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        if ejection.after == 0 || failures < ejection.after {
            return false;
        }
        self.seen.failures.store(0, Ordering::Relaxed);
        *self.seen.ejected_until.lock() = Some(Instant::now() + ejection.for_);
        true
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        self.seen.live.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Balancer {
    /// Chooses an instance of `service`, not one of `tried`; `None` if nothing is left that may take traffic.
    pub fn choose(&self, service: &Service, tried: &[Choice]) -> Option<Choice> {
        let untried = |instance: &&Arc<Instance>| {
            !tried
                .iter()
                .any(|t| t.instance.id == instance.id && t.instance.node == instance.node)
        };
        let candidates: Vec<(&Arc<Instance>, Arc<Seen>)> = service
            .instances
            .iter()
            .filter(|instance| instance.weight() > 0)
            .filter(untried)
            .map(|instance| (instance, self.seen(&service.name, instance)))
            .collect();
        let now = Instant::now();
        let admitted: Vec<&(&Arc<Instance>, Arc<Seen>)> = candidates
            .iter()
            .filter(|(_, seen)| !is_ejected(seen, now))
            .collect();
        let pool = if admitted.is_empty() {
            candidates.iter().collect()
        } else {
            admitted
        };
        let weights: Vec<u32> = pool.iter().map(|(instance, _)| instance.weight()).collect();
        let loads: Vec<usize> = pool
            .iter()
            .map(|(_, seen)| seen.live.load(Ordering::Relaxed))
            .collect();
        let index = two_choices(&weights, &loads, fastrand::u64(..), fastrand::u64(..))?;
        let (instance, seen) = pool.get(index)?;
        seen.live.fetch_add(1, Ordering::Relaxed);
        Some(Choice {
            instance: Arc::clone(instance),
            seen: Arc::clone(seen),
        })
    }

    /// Takes this very instance, whatever its health and whoever left it out: who calls has chosen it.
    pub fn keep(&self, service: &ServiceName, instance: &Arc<Instance>) -> Choice {
        let seen = self.seen(service, instance);
        seen.live.fetch_add(1, Ordering::Relaxed);
        Choice {
            instance: Arc::clone(instance),
            seen,
        }
    }

    /// Forgets instances that neither the catalog nor any of `found` has any longer.
    pub fn retain(&self, snapshot: &Snapshot, found: &[Arc<Service>]) {
        let mut seen = self.seen.lock();
        // Few are called of all that there are.
        let called: HashSet<&ServiceName> = seen.keys().map(|key| &key.service).collect();
        let known: HashSet<Key> = called
            .into_iter()
            .filter_map(|name| snapshot.services.get(name))
            .chain(found)
            .flat_map(|service| service.instances.iter().map(|i| key(&service.name, i)))
            .collect();
        seen.retain(|key, _| known.contains(key));
    }

    /// How many instances it remembers.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.seen.lock().len()
    }

    fn seen(&self, service: &ServiceName, instance: &Instance) -> Arc<Seen> {
        Arc::clone(self.seen.lock().entry(key(service, instance)).or_default())
    }
}

fn key(service: &ServiceName, instance: &Instance) -> Key {
    Key {
        service: service.clone(),
        node: instance.node.clone(),
        id: instance.id.clone(),
    }
}

fn is_ejected(seen: &Seen, now: Instant) -> bool {
    seen.ejected_until.lock().is_some_and(|until| now < until)
}

/// Draws two by weight and takes the one with fewer live connections per weight. Pure.
fn two_choices(weights: &[u32], loads: &[usize], first: u64, second: u64) -> Option<usize> {
    let a = by_weight(weights, first)?;
    let b = by_weight(weights, second)?;
    let weight = |i: usize| weights.get(i).copied().unwrap_or(1) as usize;
    let load = |i: usize| loads.get(i).copied().unwrap_or(0).saturating_add(1);
    // load(a)/weight(a) <= load(b)/weight(b), without division.
    let a_is_lighter = load(a).saturating_mul(weight(b)) <= load(b).saturating_mul(weight(a));
    Some(if a_is_lighter { a } else { b })
}

/// The index that a uniformly random `draw` falls on when each index is as wide as its weight.
fn by_weight(weights: &[u32], draw: u64) -> Option<usize> {
    let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
    let mut left = draw.checked_rem(total)?;
    for (index, weight) in weights.iter().enumerate() {
        match left.checked_sub(u64::from(*weight)) {
            Some(rest) => left = rest,
            None => return Some(index),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::catalog::model::{Health, Ports, ServiceDefaults, Weights};

    const EJECTION: Ejection = Ejection {
        after: 3,
        for_: Duration::from_secs(30),
    };

    fn service(healths: &[Health]) -> Service {
        let instances = healths.iter().enumerate().map(|(i, health)| {
            Arc::new(Instance {
                id: format!("db-{i}").parse().unwrap(),
                node: "b".parse().unwrap(),
                tunnel: ([192, 0, 2, 1], 15443).into(),
                local: ([127, 0, 0, 1], 5432).into(),
                port: 5432,
                tags: vec![],
                meta: BTreeMap::new(),
                health: *health,
                weights: Weights::default(),
                target: None,
            })
        });
        Service {
            name: "db".parse().unwrap(),
            instances: instances.collect(),
            explicit_addresses: BTreeSet::new(),
            ports: Ports::Listed(BTreeSet::from([5432])),
            defaults: ServiceDefaults::default(),
        }
    }

    #[test]
    fn critical_instances_are_never_chosen() {
        let balancer = Balancer::default();
        let service = service(&[Health::Critical, Health::Warning]);
        for _ in 0..100 {
            assert_eq!(
                balancer.choose(&service, &[]).unwrap().instance.id.as_str(),
                "db-1"
            );
        }
        assert!(
            balancer
                .choose(&self::service(&[Health::Critical]), &[])
                .is_none()
        );
    }

    #[test]
    fn an_instance_that_was_chosen_already_is_kept_and_counted() {
        let balancer = Balancer::default();
        let service = service(&[Health::Critical, Health::Passing, Health::Passing]);
        for _ in 0..10 {
            let kept = balancer.keep(&service.name, &service.instances[0]);
            assert_eq!(kept.instance.id.as_str(), "db-0", "although it is critical");
            assert!((0..3).any(|_| kept.failed(EJECTION)));
        }
        let held = [(); 20].map(|()| balancer.keep(&service.name, &service.instances[1]));
        assert_eq!(held[0].seen.live.load(Ordering::Relaxed), 20);
    }

    #[test]
    fn held_connections_even_out() {
        let balancer = Balancer::default();
        let service = service(&[Health::Passing; 4]);
        let held: Vec<Choice> = (0..400)
            .map(|_| balancer.choose(&service, &[]).unwrap())
            .collect();
        for i in 0..4 {
            let id = format!("db-{i}");
            let count = held.iter().filter(|c| c.instance.id.as_str() == id).count();
            assert!((90..=110).contains(&count), "{id} holds {count} of 400");
        }
    }

    #[test]
    fn a_tried_instance_is_not_chosen_again() {
        let balancer = Balancer::default();
        let service = service(&[Health::Passing; 2]);
        let first = balancer.choose(&service, &[]).unwrap();
        let second = balancer
            .choose(&service, std::slice::from_ref(&first))
            .unwrap();
        assert_ne!(first.instance.id, second.instance.id);
        assert!(balancer.choose(&service, &[first, second]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_eject_until_the_time_is_over() {
        let balancer = Balancer::default();
        let service = service(&[Health::Passing; 2]);
        let bad = loop {
            let choice = balancer.choose(&service, &[]).unwrap();
            if choice.instance.id.as_str() == "db-0" {
                break choice;
            }
        };
        assert!(!bad.failed(EJECTION));
        bad.succeeded();
        assert!(!bad.failed(EJECTION) && !bad.failed(EJECTION));
        assert!(bad.failed(EJECTION), "the third in a row ejects");
        drop(bad);
        let ids = |n: usize| -> HashSet<InstanceId> {
            (0..n)
                .map(|_| balancer.choose(&service, &[]).unwrap().instance.id.clone())
                .collect()
        };
        assert_eq!(ids(100).len(), 1);
        tokio::time::advance(EJECTION.for_).await;
        assert_eq!(ids(100).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_are_ejected_all_are_tried() {
        let balancer = Balancer::default();
        let service = service(&[Health::Passing]);
        let only = balancer.choose(&service, &[]).unwrap();
        for _ in 0..3 {
            only.failed(EJECTION);
        }
        assert!(balancer.choose(&service, &[]).is_some());
    }

    proptest::proptest! {
        #[test]
        fn the_draw_is_in_range_and_weighted(
            weights in proptest::collection::vec(0_u32..100, 0..20),
            draw: u64,
        ) {
            match by_weight(&weights, draw) {
                Some(index) => proptest::prop_assert!(weights[index] > 0),
                None => proptest::prop_assert!(weights.iter().all(|w| *w == 0)),
            }
        }
    }
}
