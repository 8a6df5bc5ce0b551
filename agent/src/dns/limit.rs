//! How many queries one source may ask: a token bucket each.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// The most sources that are remembered. Beyond it new ones share a bucket.
const SOURCES_MAX: usize = 4096;

/// Queries per second and source, with a second's worth at once.
#[derive(Debug)]
pub struct RateLimit {
    per_second: u32,
    buckets: Mutex<HashMap<IpAddr, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    filled_at: Instant,
}

impl RateLimit {
    /// `per_second` queries; 0 is no limit.
    pub fn new(per_second: u32) -> Self {
        Self {
            per_second,
            buckets: Mutex::default(),
        }
    }

    /// Whether one more may be asked now.
    pub fn pass(&self, source: IpAddr) -> bool {
        if self.per_second == 0 {
            return true;
        }
        let now = Instant::now();
        let most = f64::from(self.per_second);
        let mut buckets = self.buckets.lock();
        let mut key = network(source);
        if buckets.len() >= SOURCES_MAX && !buckets.contains_key(&key) {
            // One that is full again is as good as none.
            buckets.retain(|_, bucket| bucket.level(now, most) < most);
            if buckets.len() >= SOURCES_MAX {
                key = Ipv6Addr::UNSPECIFIED.into();
            }
        }
        let bucket = buckets.entry(key).or_insert(Bucket {
            tokens: most,
            filled_at: now,
        });
        bucket.tokens = bucket.level(now, most);
        bucket.filled_at = now;
        let may = bucket.tokens >= 1.0;
        if may {
            bucket.tokens -= 1.0;
        }
        may
    }
}

impl Bucket {
    fn level(&self, now: Instant, most: f64) -> f64 {
        let since = now.saturating_duration_since(self.filled_at).as_secs_f64();
        (self.tokens + since * most).min(most)
    }
}

/// Who has one IPv6 address has the /64 around it.
fn network(source: IpAddr) -> IpAddr {
    let source = source.to_canonical();
    match source {
        IpAddr::V6(v6) if !v6.is_loopback() => {
            Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into()
        }
        IpAddr::V4(_) | IpAddr::V6(_) => source,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    #[tokio::test(start_paused = true)]
    async fn a_source_has_a_second_of_queries_at_once_and_then_its_rate() {
        let limit = RateLimit::new(10);
        let passed = |source| (0..100).filter(|_| limit.pass(source)).count();
        assert_eq!((passed(A), passed(B)), (10, 10));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(passed(A), 5);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(passed(A), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_is_none() {
        let limit = RateLimit::new(0);
        assert!((0..1000).all(|_| limit.pass(A)));
    }

    #[tokio::test(start_paused = true)]
    async fn many_sources_are_bounded() {
        let limit = RateLimit::new(1);
        for n in 0..10 * SOURCES_MAX {
            let number = u32::try_from(n).unwrap();
            limit.pass(std::net::Ipv4Addr::from_bits(number).into());
        }
        assert!(limit.buckets.lock().len() <= SOURCES_MAX + 1);
        // Those that came late share one bucket, which is empty.
        assert!(!limit.pass("198.51.100.1".parse().unwrap()));
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_of_one_network_are_one_source() {
        let limit = RateLimit::new(1);
        assert!(limit.pass("2001:db8::1".parse().unwrap()));
        assert!(!limit.pass("2001:db8::2".parse().unwrap()));
        assert!(limit.pass("2001:db8:0:1::1".parse().unwrap()));
        assert!(limit.pass("::ffff:192.0.2.1".parse().unwrap()));
        assert!(!limit.pass(A));
    }
}
