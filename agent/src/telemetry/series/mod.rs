//! Per-connection metrics, with a life time: label sets that nobody uses go away, and there is a most.
//!
//! A mesh's label sets are pairs of services; services come and go, an agent stays. Prometheus's own
//! families only grow, so this module keeps the pairs itself and hands [`super::metrics`] a collector.
//! Bytes of live connections are read from their [`Counts`] at scrape: the data path counts once.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use tokio::time::Instant;

use super::{
    names::{self, Samples},
    record::{Direction, Side, Stage},
};
use crate::relay::Counts;

mod key;

use key::Key;
pub use key::PairLabels;

/// How long and how many.
#[derive(Debug, Clone, Copy)]
pub struct SeriesLimits {
    /// A pair without live connections is dropped after this long without a new one.
    pub idle: Duration,
    /// The most series; what would be more is counted under `other`.
    pub max: usize,
}

impl Default for SeriesLimits {
    /// An hour outlives any sensible scrape interval; 10,000 series are about 5 MiB here and in a scrape.
    fn default() -> Self {
        Self {
            idle: Duration::from_hours(1),
            max: 10_000,
        }
    }
}

/// How it ended. Stage and side only of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct OutcomeLabels {
    /// The outcome's word.
    pub outcome: &'static str,
    /// Where it failed.
    pub stage: Option<Stage>,
    /// Who failed.
    pub side: Option<Side>,
}

/// The connection metrics.
#[derive(Debug)]
pub struct ConnectionSeries {
    limits: SeriesLimits,
    pairs: Mutex<Pairs>,
    /// Where connections beyond the cap are counted: outbound, inbound.
    other: [Arc<Pair>; 2],
    /// Series of all pairs; those of `other` are not counted.
    series: AtomicUsize,
    overflowed: AtomicU64,
    next_id: AtomicU64,
}

#[derive(Debug)]
struct Pairs {
    by_key: HashMap<Key, Arc<Pair>>,
    swept: Instant,
}

#[derive(Debug)]
struct Pair {
    state: Mutex<PairState>,
}

#[derive(Debug)]
struct PairState {
    live: HashMap<u64, Arc<Counts>>,
    /// Bytes of connections that have ended.
    sent: u64,
    received: u64,
    outcomes: BTreeMap<OutcomeLabels, u64>,
    last_used: Instant,
}

/// Live, bytes sent, bytes received.
const SERIES_PER_PAIR: usize = 3;

/// The shortest time between two looks for idle pairs that the cap asks for.
const SWEEP_EVERY: Duration = Duration::from_mins(1);

impl ConnectionSeries {
    /// No series yet.
    pub fn new(limits: SeriesLimits) -> Self {
        Self {
            limits,
            pairs: Mutex::new(Pairs {
                by_key: HashMap::new(),
                swept: Instant::now(),
            }),
            other: [Arc::new(Pair::new()), Arc::new(Pair::new())],
            series: AtomicUsize::new(0),
            overflowed: AtomicU64::new(0),
            next_id: AtomicU64::new(0),
        }
    }

    /// A connection begins to carry bytes.
    pub fn begin(self: &Arc<Self>, labels: PairLabels, counts: Arc<Counts>) -> Live {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let direction = labels.direction;
        let pair = self.with_pair(labels, |pair, state| {
            state.live.insert(id, Arc::clone(&counts));
            Arc::clone(pair)
        });
        Live {
            series: Arc::clone(self),
            direction,
            pair,
            id,
            counts,
        }
    }

    /// A connection ended before it carried anything.
    pub fn count(&self, labels: PairLabels, outcome: OutcomeLabels) {
        let direction = labels.direction;
        let counted = self.with_pair(labels, |_, state| self.count_in(state, outcome));
        if !counted {
            self.count_other(direction, outcome);
        }
    }

    /// Connections that were counted under `other` since the start.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Finds or makes the pair and uses it before a sweep can take it away.
    fn with_pair<T>(
        &self,
        labels: PairLabels,
        using: impl FnOnce(&Arc<Pair>, &mut PairState) -> T,
    ) -> T {
        let key = Key::from(labels);
        let now = Instant::now();
        let mut pairs = self.pairs.lock();
        let known = pairs.by_key.get(&key).cloned();
        let pair = match known {
            Some(pair) => pair,
            None => self.new_pair(&mut pairs, key, now),
        };
        let mut state = pair.state.lock();
        state.last_used = now;
        using(&pair, &mut state)
    }

    fn new_pair(&self, pairs: &mut Pairs, key: Key, now: Instant) -> Arc<Pair> {
        if key.is_other() {
            return Arc::clone(self.other_pair(key.direction));
        }
        if !self.reserve(SERIES_PER_PAIR) {
            if now - pairs.swept >= SWEEP_EVERY {
                self.sweep(pairs, now);
            }
            if !self.reserve(SERIES_PER_PAIR) {
                self.overflowed.fetch_add(1, Ordering::Relaxed);
                return Arc::clone(self.other_pair(key.direction));
            }
        }
        let pair = Arc::new(Pair::new());
        pairs.by_key.insert(key, Arc::clone(&pair));
        pair
    }

    /// Counts an outcome; false if that would be a series too many.
    fn count_in(&self, state: &mut PairState, outcome: OutcomeLabels) -> bool {
        if let Some(count) = state.outcomes.get_mut(&outcome) {
            *count += 1;
            return true;
        }
        let room = self.reserve(1);
        if room {
            state.outcomes.insert(outcome, 1);
        }
        room
    }

    fn count_other(&self, direction: Direction, outcome: OutcomeLabels) {
        self.overflowed.fetch_add(1, Ordering::Relaxed);
        let mut state = self.other_pair(direction).state.lock();
        *state.outcomes.entry(outcome).or_default() += 1;
    }

    fn reserve(&self, series: usize) -> bool {
        self.series
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                held.checked_add(series)
                    .filter(|sum| *sum <= self.limits.max)
            })
            .is_ok()
    }

    fn sweep(&self, pairs: &mut Pairs, now: Instant) {
        pairs.swept = now;
        pairs.by_key.retain(|_, pair| {
            let state = pair.state.lock();
            let keep = !state.live.is_empty() || now - state.last_used < self.limits.idle;
            if !keep {
                self.series
                    .fetch_sub(SERIES_PER_PAIR + state.outcomes.len(), Ordering::Relaxed);
            }
            keep
        });
    }

    fn other_pair(&self, direction: Direction) -> &Arc<Pair> {
        let [outbound, inbound] = &self.other;
        match direction {
            Direction::Outbound => outbound,
            Direction::Inbound => inbound,
        }
    }

    /// Drops what is idle and says what is left, in a stable order.
    fn snapshot(&self) -> Vec<(Key, PairValues)> {
        let mut all: Vec<(Key, Arc<Pair>)> = {
            let mut pairs = self.pairs.lock();
            self.sweep(&mut pairs, Instant::now());
            pairs
                .by_key
                .iter()
                .map(|(key, pair)| (key.clone(), Arc::clone(pair)))
                .collect()
        };
        all.sort_by(|(a, _), (b, _)| a.text().cmp(&b.text()));
        for direction in [Direction::Outbound, Direction::Inbound] {
            let pair = self.other_pair(direction);
            if pair.state.lock().is_used() {
                all.push((Key::other(direction), Arc::clone(pair)));
            }
        }
        all.into_iter()
            .map(|(key, pair)| (key, pair.state.lock().values()))
            .collect()
    }
}

impl Pair {
    fn new() -> Self {
        Self {
            state: Mutex::new(PairState {
                live: HashMap::new(),
                sent: 0,
                received: 0,
                outcomes: BTreeMap::new(),
                last_used: Instant::now(),
            }),
        }
    }
}

impl PairState {
    fn is_used(&self) -> bool {
        !self.live.is_empty() || !self.outcomes.is_empty() || self.sent + self.received > 0
    }

    fn values(&self) -> PairValues {
        let (mut sent, mut received) = (self.sent, self.received);
        for counts in self.live.values() {
            let (up, down) = counts.snapshot();
            sent += up;
            received += down;
        }
        PairValues {
            live: self.live.len(),
            sent,
            received,
            outcomes: self.outcomes.iter().map(|(k, v)| (*k, *v)).collect(),
        }
    }
}

/// A connection that counts as live until it is [finished](Live::finish).
#[derive(Debug)]
pub struct Live {
    series: Arc<ConnectionSeries>,
    direction: Direction,
    pair: Arc<Pair>,
    id: u64,
    counts: Arc<Counts>,
}

impl Live {
    /// Bytes sent to the upstream and received from it so far.
    pub fn bytes(&self) -> (u64, u64) {
        self.counts.snapshot()
    }

    /// The connection has ended.
    pub fn finish(self, outcome: OutcomeLabels) {
        let counted = {
            // One critical section, so that a scrape never sees the bytes twice or not at all.
            let mut state = self.pair.state.lock();
            state.live.remove(&self.id);
            let (sent, received) = self.counts.snapshot();
            state.sent += sent;
            state.received += received;
            state.last_used = Instant::now();
            if Arc::ptr_eq(&self.pair, self.series.other_pair(self.direction)) {
                *state.outcomes.entry(outcome).or_default() += 1;
                true
            } else {
                self.series.count_in(&mut state, outcome)
            }
        };
        if !counted {
            self.series.count_other(self.direction, outcome);
        }
    }
}

/// A pair's numbers at one moment.
struct PairValues {
    live: usize,
    sent: u64,
    received: u64,
    outcomes: Vec<(OutcomeLabels, u64)>,
}

impl Collector for ConnectionSeries {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let snapshot = self.snapshot();
        let mut family = Samples::begin(&mut encoder, &names::CONNECTIONS)?;
        for (key, values) in &snapshot {
            for (outcome, count) in &values.outcomes {
                let mut labels = key.labels();
                labels.push(("outcome", outcome.outcome));
                labels.extend(outcome.stage.map(|stage| ("stage", stage.as_str())));
                labels.extend(outcome.side.map(|side| ("side", side.as_str())));
                family.counter(&labels, *count)?;
            }
        }
        let mut family = Samples::begin(&mut encoder, &names::CONNECTION_BYTES)?;
        for (key, values) in &snapshot {
            for (way, bytes) in [("sent", values.sent), ("received", values.received)] {
                let mut labels = key.labels();
                labels.push(("way", way));
                family.counter(&labels, bytes)?;
            }
        }
        let mut family = Samples::begin(&mut encoder, &names::CONNECTIONS_LIVE)?;
        for (key, values) in &snapshot {
            family.gauge(
                &key.labels(),
                u64::try_from(values.live).unwrap_or(u64::MAX),
            )?;
        }
        Samples::begin(&mut encoder, &names::SERIES_OVERFLOWED)?.counter(&[], self.overflowed())
    }
}

#[cfg(test)]
mod tests;
