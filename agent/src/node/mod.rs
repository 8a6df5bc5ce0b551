//! The composition root: builds the parts of the agent in order, runs them, drains them.
//!
//! [`run`] reads in the order in which things must exist: privileges and cgroup, catalog, certificates,
//! datapath, listeners. What [`start`] builds, [`follow`] keeps up to date and [`status`] describes.

mod follow;
mod start;
mod status;

pub(crate) use start::{certificate_authority, file_context, vip_pools};

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    catalog::{file, store::CatalogStore},
    config::Config,
    connections::Connections,
    datapath::Datapath,
    identity::{LocalDomain, ca::BuiltinCa, certificates::Certificates},
    inbound::Inbound,
    lifecycle::Shutdown,
    outbound::{Outbound, listeners::CaptureNamespaces},
    policy::PolicyStore,
    telemetry::{Telemetry, log::LogHandle},
};

/// The agent could not start, or not end in order.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct NodeError {
    doing: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl NodeError {
    fn when<E: std::error::Error + Send + Sync + 'static>(
        doing: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        move |source| Self {
            doing,
            source: Box::new(source),
        }
    }
}

/// The parts of a running agent.
#[derive(Debug)]
struct Node {
    config_path: PathBuf,
    config: ArcSwap<Config>,
    started_at: SystemTime,
    log: LogHandle,
    telemetry: Telemetry,
    catalog: Arc<CatalogStore>,
    /// What the catalog's source and its addresses complain about now.
    catalog_problems: Mutex<Vec<String>>,
    policy: Arc<PolicyStore>,
    ca: Arc<BuiltinCa>,
    /// Why the authority's files were not taken over by the last reload.
    ca_problem: Mutex<Option<String>>,
    certificates: Certificates,
    datapath: Arc<Datapath>,
    connections: Arc<Connections>,
    outbound: Arc<Outbound>,
    inbound: Arc<Inbound>,
    captures: CaptureNamespaces,
    /// Where tunnels are taken now.
    tunnel_addresses: Mutex<Vec<std::net::SocketAddr>>,
    local: LocalDomain,
    shutdown: Shutdown,
}

/// Runs the agent until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// If it cannot start; once it runs, it does not give up.
pub async fn run(path: PathBuf, config: Config, log: LogHandle) -> Result<(), NodeError> {
    // Registered first: a signal during a slow start must not kill without cleaning up.
    let mut terminate =
        signal(SignalKind::terminate()).map_err(NodeError::when("watch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeError::when("watch SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(NodeError::when("watch SIGHUP"))?;

    let mut follower = start::start(path, config, log).await?;
    let node = Arc::clone(follower.node());
    tracing::info!(node = %node.config.load().node.name, "ready");
    let reason = loop {
        tokio::select! {
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            _ = hangup.recv() => follower.reload(),
            () = follower.next_change() => {}
        }
    };
    let deadline = node.config.load().limits.drain_timeout;
    let cut = tokio::select! {
        cut = node.shutdown.run(reason, deadline) => cut,
        // The second time is meant.
        _ = terminate.recv() => node.shutdown.run("second signal", std::time::Duration::ZERO).await,
        _ = interrupt.recv() => node.shutdown.run("second signal", std::time::Duration::ZERO).await,
    };
    tracing::info!(cut, "stopped");
    node.telemetry
        .access_log()
        .flush(std::time::Duration::from_secs(1));
    Ok(())
}

/// Lines for people out of a file catalog's problems. Notes are none: what has no effect needs no repair.
fn problem_lines(problems: &[file::Problem]) -> Vec<String> {
    let errors = problems
        .iter()
        .filter(|problem| problem.severity == file::Severity::Error);
    errors.map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_no_problem() {
        let [error, note] =
            [file::Severity::Error, file::Severity::Note].map(|severity| file::Problem {
                file: "/catalog/x.yaml".into(),
                severity,
                message: "said".to_owned(),
            });
        assert_eq!(problem_lines(&[note, error]), ["/catalog/x.yaml: said"]);
    }
}
