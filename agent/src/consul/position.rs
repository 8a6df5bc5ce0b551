//! Where a watch stands: what the next request asks for, and when. Pure; the clock is handed in.

use std::time::Duration;

use tokio::time::Instant;

/// How long Consul may wait on an index that it has not confirmed.
const CONFIRM_WAIT: Duration = Duration::from_secs(1);

/// How far an index may be ahead of the one before without a doubt. A farther one costs a request more; one that is
/// wrong by less is soon reached by what Consul writes.
const LEAP_MAX: u64 = 10_000;

/// What the next request names, so that Consul waits for a change before it answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Position {
    /// Nothing: Consul answers at once.
    #[default]
    Unknown,
    /// As [`Self::Index`], but said only once: Consul may never have come that far, and then changes nothing for us.
    Unconfirmed(u64),
    /// Consul answers when its index is higher.
    Index(u64),
    /// Consul's agent answers when what it has hashes to something else.
    Hash(String),
}

impl Position {
    /// Where an answer with status 200 leaves us. Answers with another status say nothing, whatever index they bear:
    /// see [`Self::after_failure`].
    ///
    /// An index that is lower than before is of another Consul, or of one that was restored: begin again. 0 would not
    /// wait and is taken as 1. Source: Consul's "Blocking queries", implementation details. The first index, and one
    /// that is far from the one before, is to be confirmed: Consul answers a query that nothing ended with the index
    /// that it has.
    #[must_use]
    pub fn after_answer(&self, index: Option<u64>, hash: Option<&str>) -> Self {
        let Some(index) = index.map(|index| index.max(1)) else {
            return hash.map_or(Self::Unknown, |hash| Self::Hash(hash.to_owned()));
        };
        match self.index() {
            Some(before) if index < before => Self::Unknown,
            Some(before) if index - before <= LEAP_MAX => Self::Index(index),
            Some(_) | None => Self::Unconfirmed(index),
        }
    }

    /// The index to wait on.
    pub fn index(&self) -> Option<u64> {
        match self {
            Self::Unconfirmed(index) | Self::Index(index) => Some(*index),
            Self::Unknown | Self::Hash(_) => None,
        }
    }

    /// How long Consul may wait for a change, where it may not for longer than `longest`.
    pub fn wait(&self, longest: Duration) -> Duration {
        match self {
            Self::Unconfirmed(_) => longest.min(CONFIRM_WAIT),
            Self::Unknown | Self::Index(_) | Self::Hash(_) => longest,
        }
    }

    /// Whether nothing has changed for Consul since `before`.
    pub fn is_same_state(&self, before: &Self) -> bool {
        match self.index() {
            Some(index) => before.index() == Some(index),
            None => self == before,
        }
    }

    /// After an error what was known of the index may be of a Consul that is no more: with an index of its future it
    /// would wait in vain. So the next request does not wait.
    #[must_use]
    pub fn after_failure() -> Self {
        Self::Unknown
    }
}

/// When the next request may be made.
///
/// A change is asked for at once, also a few in a row; one that never rests is seen at intervals. After failures the
/// pause doubles. Every pause has jitter, so that the nodes of a datacenter do not ask in step.
#[derive(Debug, Clone)]
pub struct Pace {
    limits: PaceLimits,
    /// Answers that may be followed at once.
    credit: f64,
    counted_at: Instant,
    failures: u32,
}

/// The bounds of a [`Pace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaceLimits {
    /// Answers that may follow one another without a pause.
    pub burst: u32,
    /// Between two answers in the long run.
    pub interval: Duration,
    /// The pause after the first failure.
    pub pause_min: Duration,
    /// The longest pause.
    pub pause_max: Duration,
}

impl Default for PaceLimits {
    fn default() -> Self {
        Self {
            burst: 5,
            interval: Duration::from_millis(100),
            pause_min: Duration::from_millis(100),
            pause_max: Duration::from_secs(30),
        }
    }
}

impl Pace {
    /// Nothing was asked yet.
    pub fn new(limits: PaceLimits, now: Instant) -> Self {
        Self {
            limits,
            credit: f64::from(limits.burst),
            counted_at: now,
            failures: 0,
        }
    }

    /// How long to wait after an answer. `random` is from 0 to 1.
    pub fn after_answer(&mut self, now: Instant, random: f64) -> Duration {
        self.failures = 0;
        let earned = (now - self.counted_at).as_secs_f64() / self.limits.interval.as_secs_f64();
        self.counted_at = now;
        self.credit = (self.credit + earned).min(f64::from(self.limits.burst)) - 1.0;
        if self.credit >= 0.0 {
            return Duration::ZERO;
        }
        let missing = self.limits.interval.mul_f64(-self.credit);
        // Above the interval only: the long run is a bound.
        missing + missing.mul_f64(random.clamp(0.0, 1.0) / 4.0)
    }

    /// How long to wait after a failure, or after an answer that is none. `random` is from 0 to 1.
    pub fn after_failure(&mut self, random: f64) -> Duration {
        let doubled = 2_u32.saturating_pow(self.failures.min(31));
        let pause = self.limits.pause_min.saturating_mul(doubled);
        let pause = pause.min(self.limits.pause_max);
        self.failures = self.failures.saturating_add(1);
        pause.div_f64(2.0) + pause.mul_f64(random.clamp(0.0, 1.0) / 2.0)
    }

    /// Failures since the last answer.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_next_index_follows_consuls_rules() {
        use Position::{Hash, Index, Unconfirmed, Unknown};
        let table = [
            // before, header, expected
            (Unknown, Some(23), Unconfirmed(23)),
            (Unconfirmed(23), Some(23), Index(23)),
            (Unconfirmed(23), Some(24), Index(24)),
            (Unconfirmed(999_999), Some(23), Unknown),
            (Index(23), Some(999_999), Unconfirmed(999_999)),
            (Index(23), Some(23), Index(23)),
            (Index(23), Some(24), Index(24)),
            (Index(23), Some(22), Unknown),
            (Index(999_999), Some(23), Unknown),
            (Index(1), Some(0), Index(1)),
            (Unknown, Some(0), Unconfirmed(1)),
            (Index(23), Some(0), Unknown),
            (Index(23), None, Unknown),
            (Unknown, None, Unknown),
        ];
        for (before, header, expected) in table {
            assert_eq!(
                before.after_answer(header, None),
                expected,
                "{before:?} and then {header:?}"
            );
        }
        assert_eq!(
            Unknown.after_answer(None, Some("6d09")),
            Hash("6d09".into())
        );
        assert_eq!(Unknown.after_answer(Some(5), Some("6d09")), Unconfirmed(5));
    }

    proptest! {
        #[test]
        fn a_watch_never_waits_on_an_index_that_consul_has_left(
            indexes in proptest::collection::vec(proptest::option::of(0_u64..6), 0..20),
        ) {
            let mut position = Position::Unknown;
            for header in indexes {
                position = position.after_answer(header, None);
                match (&position, header) {
                    (Position::Index(next) | Position::Unconfirmed(next), Some(header)) => {
                        prop_assert_eq!(*next, header.max(1));
                    }
                    (Position::Index(_) | Position::Unconfirmed(_), None) => prop_assert!(false, "an index from nowhere"),
                    (Position::Unknown | Position::Hash(_), _) => {}
                }
            }
        }

        #[test]
        fn an_index_that_never_rests_does_not_spin(
            gaps in proptest::collection::vec(0_u64..300, 50..200), random in 0.0..1.0_f64,
        ) {
            let limits = PaceLimits::default();
            let start = Instant::now();
            let mut now = start;
            let mut pace = Pace::new(limits, now);
            let count = gaps.len();
            for gap in gaps {
                now += Duration::from_millis(gap);
                now += pace.after_answer(now, random);
            }
            let least = limits.interval * (u32::try_from(count).unwrap() - limits.burst);
            prop_assert!(now - start >= least.mul_f64(0.999), "{count} answers in {:?}", now - start);
        }

        #[test]
        fn pauses_grow_to_their_bound_and_no_further(failures in 1_usize..60, random in 0.0..1.0_f64) {
            let limits = PaceLimits::default();
            let mut pace = Pace::new(limits, Instant::now());
            let pauses: Vec<_> = (0..failures).map(|_| pace.after_failure(random)).collect();
            prop_assert!(pauses[0] >= limits.pause_min / 2);
            prop_assert!(pauses.iter().all(|pause| *pause <= limits.pause_max));
            prop_assert!(pauses.is_sorted());
            pace.after_answer(Instant::now(), random);
            prop_assert!(pace.after_failure(random) <= limits.pause_min);
        }
    }

    #[test]
    fn a_lone_change_is_asked_after_at_once() {
        let mut now = Instant::now();
        let mut pace = Pace::new(PaceLimits::default(), now);
        for _ in 0..20 {
            now += Duration::from_secs(1);
            assert_eq!(pace.after_answer(now, 1.0), Duration::ZERO);
        }
    }
}
