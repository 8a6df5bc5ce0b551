//! Consul as this node's source: connects, and brings what it says to the catalog.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{NodeError, authority::Authority, source::Opened, source::Source, supervisor};
use crate::{
    catalog::{
        consul::{ConsulSource, Published},
        model::NodeName,
    },
    config::ConsulConfig,
    consul::{Client, ConsulError, rights},
    identity::{
        LocalDomain,
        clock::SystemClock,
        consul_ca::{ConsulAgent, ConsulCa, ConsulCaError},
    },
    lifecycle::Shutdown,
    telemetry::log::chain,
};

/// How often the supervisor is told that Consul is still waited for, and how long it is to wait beyond that.
const WAITING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// How long the first catalog is waited for. Capture begins then with what there is, and removes nothing.
const FIRST_CATALOG: Duration = Duration::from_secs(30);

/// What Consul feeds: the catalog, as it comes.
#[derive(Debug)]
pub(super) struct ConsulFeed {
    published: watch::Receiver<Option<Arc<Published>>>,
}

/// Connects to Consul, as long as that takes, and follows it from then on.
///
/// # Errors
/// If waiting does not help: Consul refuses, or runs without Connect.
pub(super) async fn open(consul: &ConsulConfig, shutdown: &Shutdown) -> Result<Opened, NodeError> {
    let client = Client::new(consul.client.clone());
    let connecting = async {
        let clock = Arc::new(SystemClock);
        let (ca, roots) = ConsulCa::connect(client.clone(), clock)
            .await
            .map_err(NodeError::when("get the roots of Consul's CA"))?;
        let agent = ask_agent(&client)
            .await
            .map_err(NodeError::when("ask the Consul agent who it is"))?;
        Ok((ca, roots, agent))
    };
    let (ca, roots, agent) = while_waiting("waiting for Consul", connecting).await?;
    shutdown.spawn_service("Consul's roots", roots.run(shutdown.clone()));
    tell_missing_rights(&client).await;
    let name: NodeName = agent
        .node
        .parse()
        .map_err(NodeError::when("take Consul's name for this node"))?;
    tracing::info!(node = %name, datacenter = agent.datacenter, version = agent.version, "connected to Consul");
    let local = LocalDomain::new(ca.trust_domain().clone(), agent.datacenter);
    todo!()
}

/// Asks until there is an answer, or one that does not change.
async fn ask_agent(client: &Client) -> Result<ConsulAgent, ConsulCaError> {
    let mut pause = Duration::from_millis(100);
    loop {
        match ConsulAgent::ask(client).await {
            Err(error) if !error.is_refused() => {
                tracing::warn!(error = %chain(&error), "waiting for the Consul agent");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(10));
            }
            answered => return answered,
        }
    }
}

/// Does `work`, and keeps the supervisor from taking the agent for hung.
async fn while_waiting<T>(status: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut next = Instant::now() + WAITING.0;
    loop {
        match timeout_at(next, &mut work).await {
            Ok(done) => return done,
            Err(_elapsed) => {
                supervisor::waiting(status, WAITING.1);
                next += WAITING.0;
            }
        }
    }
}

async fn tell_missing_rights(client: &Client) {
    for right in rights::check(client).await {
        let Some(problem) = right.problem else {
            continue;
        };
        let needed_for = right.needed_for;
        if right.is_vital {
            tracing::error!(needed_for, problem, "the agent may not ask Consul for what it needs");
        } else {
            tracing::info!(needed_for, problem, "the agent may not do everything at Consul");
        }
    }
}
