//! What the agent says about itself: the record of each connection, metrics, the access log, the log.
//!
//! [`record`] is what the way of a connection writes to; it feeds [`metrics`] and [`access_log`]. Nothing
//! here decides about a connection, and nothing here ever makes one wait.

pub mod record;
pub mod access_log;
pub mod metrics;
pub mod series;
pub mod names;
pub mod process;
pub mod http;
pub mod log;
pub mod rate;
pub mod timestamp;

use std::sync::Arc;

use access_log::AccessLog;
use metrics::Metrics;

/// Where connections are recorded. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Telemetry {
    metrics: Arc<Metrics>,
    access_log: Arc<AccessLog>,
}

impl Telemetry {
    /// Records into `metrics` and `access_log`.
    pub fn new(metrics: Arc<Metrics>, access_log: Arc<AccessLog>) -> Self {
        Self {
            metrics,
            access_log,
        }
    }

    /// The agent's metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The access log.
    pub fn access_log(&self) -> &Arc<AccessLog> {
        &self.access_log
    }
}
