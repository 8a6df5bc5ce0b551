//! Watching whether what is attached is effective, and attaching anew where it is not.

use std::{sync::Arc, time::Duration};

use super::Node;
use crate::{
    health::{self, Effect},
    telemetry::log::chain,
};

/// How often each attach point is looked at.
const PERIOD: Duration = Duration::from_secs(10);

/// Looks at each attach point now and then, until the agent drains.
pub(super) fn watch(node: &Arc<Node>) {
    let inner = Arc::clone(node);
    node.shutdown.spawn_service("health", async move {
        let mut period = tokio::time::interval(PERIOD);
        let shutdown = inner.shutdown.clone();
        loop {
            tokio::select! {
                biased;
                () = shutdown.draining() => return,
                _ = period.tick() => {}
            }
            tokio::select! {
                biased;
                () = shutdown.draining() => return,
                () = inner.look() => {}
            }
        }
    });
}

impl Node {
    async fn look(&self) {
        let addresses = health::reserved(self.config.load().capture.ipv6_range);
        for cgroup in self.datapath.attach_points() {
            let mut effect = health::probe(cgroup, &addresses).await;
            if let Effect::Missed(happened) = &effect {
                // Mostly another cgroup of the same name; what is still in place is left alone.
                effect = match self.datapath.attach_again() {
                    Ok(()) => health::probe(cgroup, &addresses).await,
                    Err(error) => Effect::Missed(format!("{happened}; {}", chain(&error))),
                };
            }
            if !self.health.found(cgroup, effect.clone()) {
                continue;
            }
            let cgroup = cgroup.display();
            match effect {
                Effect::Captured => tracing::info!(%cgroup, "capture is effective"),
                Effect::Missed(happened) => {
                    tracing::error!(%cgroup, happened, "attached, but not effective: connects are not captured");
                }
                Effect::Unknown(why) => {
                    tracing::warn!(%cgroup, why, "whether capture is effective is not known");
                }
            }
        }
    }
}
