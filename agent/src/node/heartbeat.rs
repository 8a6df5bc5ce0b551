//! Showing the programs in the kernel that the agent runs, and noticing afterwards when it did not.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::Node;
use crate::{
    datapath::HEARTBEAT_PERIOD,
    telemetry::{log::chain, rate::OncePer},
};

/// A kernel that refuses one will refuse the next.
static ONCE: OncePer = OncePer::new(Duration::from_secs(60));

/// What is known of the heartbeats so far.
#[derive(Debug, Default)]
pub(super) struct Heartbeats(Mutex<Beaten>);

/// See [`Heartbeats`].
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Beaten {
    last: Option<Instant>,
    /// The longest time between two heartbeats.
    pub(super) longest_gap: Duration,
    /// How often a heartbeat came later than the limit.
    pub(super) hangs: u64,
}

impl Beaten {
    /// Returns for how long there was none, if that was longer than the limit.
    fn beat(&mut self, now: Instant, hung_after: Option<Duration>) -> Option<Duration> {
        let gap = now.duration_since(self.last.replace(now)?);
        self.longest_gap = self.longest_gap.max(gap);
        let is_late = hung_after.is_some_and(|limit| gap > limit);
        self.hangs += u64::from(is_late);
        is_late.then_some(gap)
    }
}

impl Heartbeats {
    pub(super) fn so_far(&self) -> Beaten {
        *self.0.lock()
    }
}

/// Beats until the agent drains. The first heartbeat has happened when this returns: nothing is captured before it.
///
/// It comes from the runtime that accepts and carries connections: when that hangs, so does this.
pub(super) fn start(node: &Arc<Node>) {
    node.beat();
    let inner = Arc::clone(node);
    node.shutdown.spawn("heartbeat", async move {
        let mut period = interval(HEARTBEAT_PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = inner.shutdown.draining() => return,
                _ = period.tick() => inner.beat(),
            }
        }
    });
}

impl Node {
    fn beat(&self) {
        let hung_after = self.config.load().capture.hung_after;
        let written = self.datapath.beat(hung_after);
        let gap = self.heartbeats.0.lock().beat(Instant::now(), hung_after);
        if let Some(gap) = gap {
            let milliseconds = gap.as_millis();
            tracing::warn!(
                milliseconds,
                "the agent did not run: connects went as [[away]] says after capture.hung_after"
            );
        }
        if let Err(error) = written
            && ONCE.pass("heartbeat").is_some()
        {
            tracing::error!(error = %chain(&error), "heartbeat not written");
        }
    }

    /// For an agent that ends and that no other one has replaced.
    pub(super) fn stop_beating(&self) {
        let hung_after = self.config.load().capture.hung_after;
        if let Err(error) = self.datapath.stop_beating(hung_after) {
            tracing::warn!(error = %chain(&error), "heartbeat not taken back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_gap_above_the_limit_is_a_hang() {
        let mut beaten = Beaten::default();
        let start = Instant::now();
        let limit = Some(Duration::from_secs(3));
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(beaten.beat(at(0), limit), None);
        assert_eq!(beaten.beat(at(3), limit), None);
        assert_eq!(beaten.beat(at(8), limit), Some(Duration::from_secs(5)));
        assert_eq!(beaten.beat(at(20), None), None);
        assert_eq!(beaten.hangs, 1);
        assert_eq!(beaten.longest_gap, Duration::from_secs(12));
    }
}
