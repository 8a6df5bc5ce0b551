//! A limit on log lines that a peer can cause: one per key and interval.

use std::{collections::BTreeMap, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

/// The most keys that are remembered. Beyond it new keys share one.
const KEYS_MAX: usize = 1024;

/// Lets one through per key and interval. Can be a `static`.
#[derive(Debug)]
pub struct OncePer {
    interval: Duration,
    seen: Mutex<BTreeMap<String, Seen>>,
}

#[derive(Debug)]
struct Seen {
    since: Instant,
    suppressed: u64,
}

impl OncePer {
    /// One per key and `interval`.
    pub const fn new(interval: Duration) -> Self {
        Self {
            interval,
            seen: Mutex::new(BTreeMap::new()),
        }
    }

    /// `Some` if this one may pass, with the number held back since the last that did.
    pub fn pass(&self, key: &str) -> Option<u64> {
        let now = Instant::now();
        let mut seen = self.seen.lock();
        if let Some(entry) = seen.get_mut(key) {
            return entry.pass(now, self.interval);
        }
        if seen.len() >= KEYS_MAX {
            seen.retain(|_, entry| now - entry.since < self.interval);
        }
        // The empty key is the one that all share when there are too many.
        let key = if seen.len() >= KEYS_MAX { "" } else { key };
        if let Some(entry) = seen.get_mut(key) {
            return entry.pass(now, self.interval);
        }
        seen.insert(
            key.to_owned(),
            Seen {
                since: now,
                suppressed: 0,
            },
        );
        Some(0)
    }
}

impl Seen {
    fn pass(&mut self, now: Instant, interval: Duration) -> Option<u64> {
        if now - self.since < interval {
            self.suppressed += 1;
            return None;
        }
        self.since = now;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    #[tokio::test(start_paused = true)]
    async fn one_passes_per_interval_and_tells_of_the_others() {
        let limit = OncePer::new(MINUTE);
        assert_eq!(limit.pass("a"), Some(0));
        assert_eq!(limit.pass("a"), None);
        assert_eq!(limit.pass("a"), None);
        assert_eq!(limit.pass("b"), Some(0));
        tokio::time::advance(MINUTE).await;
        assert_eq!(limit.pass("a"), Some(2));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_bounded() {
        let limit = OncePer::new(MINUTE);
        let passed = (0..10 * KEYS_MAX)
            .filter(|n| limit.pass(&n.to_string()).is_some())
            .count();
        assert_eq!(passed, KEYS_MAX + 1);
        assert!(limit.seen.lock().len() <= KEYS_MAX + 1);
    }
}
