//! When to renew and when to try again: arithmetic only, no clock and no task.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

/// The part of a leaf's life after which it may be renewed, and the part by which it should have been.
///
/// Consul's agent renews at a random point between the two, so that a fleet which started together does not
/// ask together.
const RENEW_FROM: f64 = 0.6;
const RENEW_UNTIL: f64 = 0.9;

/// The wait after the first failure; it doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// The longest wait between two attempts: a provider that is back is noticed within five minutes.
const LONGEST_RETRY: Duration = Duration::from_mins(5);

/// The longest wait while the leaf has expired, so that nothing works without the next one.
const LONGEST_RETRY_EXPIRED: Duration = Duration::from_secs(30);

/// When the authority is replaced the leaves of a node are renewed over this time, not all at once.
const ROTATION_SPREAD: Duration = Duration::from_secs(10);

/// When a leaf of this validity, issued at `now`, is to be renewed.
///
/// Never before most of what is left has passed. A leaf of an authority that runs out ends with it, and is
/// backdated: most of its life can be over when it is made, and the next one would be no better.
pub(super) fn renew_at(
    now: SystemTime,
    not_before: SystemTime,
    not_after: SystemTime,
    jitter: &Jitter,
) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    let part = (RENEW_UNTIL - RENEW_FROM).mul_add(jitter.draw(), RENEW_FROM);
    let left = not_after.duration_since(now).unwrap_or_default();
    let soonest = now + left.mul_f64(RENEW_FROM).max(FIRST_RETRY);
    (not_before + life.mul_f64(part)).max(soonest)
}

/// By when a leaf should have been replaced, whoever does it.
pub(super) fn overdue_at(not_before: SystemTime, not_after: SystemTime) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    not_before + life.mul_f64(RENEW_UNTIL)
}

/// How long to wait before a leaf that is still good is renewed because another authority issues now.
pub(super) fn after_rotation(jitter: &Jitter) -> Duration {
    ROTATION_SPREAD.mul_f64(jitter.draw())
}

/// How long to wait after `failures` attempts in a row failed, when the leaf in use lasts `left`.
///
/// Half of the wait is random. While a leaf is running out the wait is at most a tenth of what is left, so
/// that a short-lived leaf still sees several attempts.
pub(super) fn retry_after(failures: u32, left: Option<Duration>, jitter: &Jitter) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
    let cap = match left {
        None => LONGEST_RETRY,
        Some(Duration::ZERO) => LONGEST_RETRY_EXPIRED,
        Some(left) => (left / 10).clamp(FIRST_RETRY, LONGEST_RETRY),
    };
    doubled
        .min(cap)
        .mul_f64(0.5_f64.mul_add(jitter.draw(), 0.5))
}

/// Numbers without meaning, from 0 to below 1. Not for secrets.
#[derive(Debug)]
pub struct Jitter(AtomicU64);

impl Jitter {
    /// The sequence of `seed`, the same in each run.
    pub fn seeded(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// A sequence that differs from node to node and from run to run.
    pub fn random() -> Self {
        let mut seed = [0; 8];
        // Without randomness no key could be made either; a jitter that repeats is the least of it.
        let filled = rustls::crypto::aws_lc_rs::default_provider()
            .secure_random
            .fill(&mut seed);
        if filled.is_err() {
            tracing::warn!("no system randomness for the renewal jitter");
        }
        Self::seeded(u64::from_le_bytes(seed))
    }

    /// The next number. Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    fn draw(&self) -> f64 {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let state = self
            .0
            .fetch_add(GOLDEN, Ordering::Relaxed)
            .wrapping_add(GOLDEN);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let top = u32::try_from((mixed ^ (mixed >> 31)) >> 32).unwrap_or_default();
        f64::from(top) / (f64::from(u32::MAX) + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_falls_between_60_and_90_percent_of_life() {
        let jitter = Jitter::seeded(7);
        let start = SystemTime::UNIX_EPOCH;
        let mut parts = Vec::new();
        for _ in 0..1000 {
            let at = renew_at(start, start, start + Duration::from_secs(1000), &jitter);
            let part = at.duration_since(start).unwrap().as_secs_f64() / 1000.0;
            assert!((0.6..=0.9).contains(&part), "{part}");
            parts.push(part);
        }
        let mean = parts.iter().sum::<f64>() / 1000.0;
        assert!((0.74..0.76).contains(&mean), "mean {mean}");
    }

    #[test]
    fn a_leaf_whose_life_is_over_when_it_is_made_is_not_renewed_at_once() {
        let jitter = Jitter::seeded(7);
        let now = SystemTime::UNIX_EPOCH + Duration::from_mins(1);
        let backdated = SystemTime::UNIX_EPOCH;
        for (left, least) in [(0, 1000), (1, 1000), (10_000, 6000), (60_000, 36_000)] {
            let not_after = now + Duration::from_millis(left);
            let at = renew_at(now, backdated, not_after, &jitter);
            let wait = at.duration_since(now).unwrap();
            assert!(
                wait >= Duration::from_millis(least),
                "{left} ms left: {wait:?}"
            );
        }
    }

    #[test]
    fn retries_back_off_up_to_a_cap() {
        let jitter = Jitter::seeded(7);
        let mut waits = (1..=40).map(|failures| retry_after(failures, None, &jitter));
        let first = waits.next().unwrap();
        assert!((Duration::from_millis(500)..=Duration::from_secs(1)).contains(&first));
        for wait in waits.skip(10) {
            assert!(
                (LONGEST_RETRY / 2..=LONGEST_RETRY).contains(&wait),
                "{wait:?}"
            );
        }
        let left = Some(Duration::from_mins(1));
        assert!(retry_after(40, left, &jitter) <= Duration::from_secs(6));
        let expired = retry_after(40, Some(Duration::ZERO), &jitter);
        assert!((LONGEST_RETRY_EXPIRED / 2..=LONGEST_RETRY_EXPIRED).contains(&expired));
        let almost = Some(Duration::from_millis(1));
        assert!(retry_after(40, almost, &jitter) >= Duration::from_millis(500));
    }
}
