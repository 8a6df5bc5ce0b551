//! The time of day, as a value that tests can set.
//!
//! Validity of certificates is about the time of day, which jumps; waiting is about the monotonic clock.
//! Code that does both takes the first from here and the second from tokio.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls_pki_types::UnixTime;

/// Tells the time of day.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The time of day.
    fn now(&self) -> SystemTime;
}

/// The host's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A [`Clock`] as rustls asks for one.
#[derive(Debug, Clone)]
pub(crate) struct TlsClock(pub(crate) Arc<dyn Clock>);

impl rustls::time_provider::TimeProvider for TlsClock {
    fn current_time(&self) -> Option<UnixTime> {
        let since_epoch = self.0.now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since_epoch))
    }
}

/// For tests: moves with tokio's clock, which tests pause, from a given start.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct TokioClock {
    start: parking_lot::Mutex<SystemTime>,
    origin: tokio::time::Instant,
}

#[cfg(test)]
impl TokioClock {
    /// Must be made within a runtime.
    pub(crate) fn starting_at(start: SystemTime) -> Arc<Self> {
        Arc::new(Self {
            start: parking_lot::Mutex::new(start),
            origin: tokio::time::Instant::now(),
        })
    }

    /// Sets the time of day ahead. What waits on the monotonic clock does not notice.
    pub(crate) fn jump_ahead(&self, by: std::time::Duration) {
        *self.start.lock() += by;
    }

    /// Sets the time of day back.
    pub(crate) fn jump_back(&self, by: std::time::Duration) {
        *self.start.lock() -= by;
    }
}

#[cfg(test)]
impl Clock for TokioClock {
    fn now(&self) -> SystemTime {
        *self.start.lock() + self.origin.elapsed()
    }
}
