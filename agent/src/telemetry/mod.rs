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

use std::{sync::Arc, time::Duration};

use access_log::AccessLog;
use metrics::Metrics;

/// Where connections are recorded. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Telemetry {
    metrics: Arc<Metrics>,
    access_log: Arc<AccessLog>,
    query_log: Arc<AccessLog>,
}

impl Telemetry {
    /// Records into `metrics` and `access_log`.
    pub fn new(metrics: Arc<Metrics>, access_log: Arc<AccessLog>) -> Self {
        Self {
            metrics,
            access_log,
            query_log: Arc::new(AccessLog::off()),
        }
    }

    /// Writes lines of DNS queries to `query_log`: one of its own, so that they take no room from connections.
    #[must_use]
    pub fn with_query_log(mut self, query_log: AccessLog) -> Self {
        self.query_log = Arc::new(query_log);
        self
    }

    /// The agent's metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The access log.
    pub fn access_log(&self) -> &Arc<AccessLog> {
        &self.access_log
    }

    /// Where lines of DNS queries go.
    pub fn query_log(&self) -> &Arc<AccessLog> {
        &self.query_log
    }

    /// [`AccessLog::reopen`] of both.
    pub fn reopen_logs(&self) {
        self.access_log.reopen();
        self.query_log.reopen();
    }

    /// [`AccessLog::flush`] of both, for `patience` each.
    pub fn flush_logs(&self, patience: Duration) {
        self.access_log.flush(patience);
        self.query_log.flush(patience);
    }
}
