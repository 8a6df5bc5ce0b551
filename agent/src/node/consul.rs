//! Consul as this node's source: connects, and brings what it says to the parts.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    NodeError,
    authority::Authority,
    source::{Opened, Source},
    supervisor,
};
use crate::{
    admin::status::{ConsulStatus, RegisteredStatus, WorkloadStatus},
    catalog::{
        consul::{
            ConsulHandle, ConsulSource, SourceSettings,
            found::{Finder, Found},
        },
        model::{NodeName, Service, ServiceName, Snapshot},
    },
    config::{Config, ConsulConfig},
    consul::{
        Client,
        registration::{
            LocalInstances, LocalServices, Registrar, RegistrarSettings, plan::OwnNode,
        },
        rights,
        upstreams::{Destination, Offer},
    },
    datapath::cgroup::Cgroup2,
    identity::{
        LocalDomain,
        clock::SystemClock,
        consul_ca::{ConsulAgent, ConsulCa, ConsulCaError, RootsFollower},
        workload::{WorkloadResolver, discovered::Bounds},
    },
    lifecycle::Shutdown,
    outbound::{Outbound, upstreams::UpstreamListeners},
    sockets::{ListenAddress, ListeningSockets},
    telemetry::log::chain,
};

/// How often the supervisor is told that Consul is still waited for, and how long it is to wait beyond that.
const WAITING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// How long the local services and the first whole catalog are waited for, each. Then capture begins with what there
/// is, and nothing that an agent before knew is removed.
const FIRST: Duration = Duration::from_secs(15);

/// The catalog as Consul says it, as it changes.
pub(super) type Snapshots = watch::Receiver<Option<Snapshot>>;

/// What a node has of Consul while it runs.
#[derive(Debug)]
pub(super) struct ConsulParts {
    pub(super) source: ConsulHandle,
    pub(super) services: LocalServices,
    client: Client,
    /// The services that are here: what they may call is read.
    local: watch::Sender<Option<BTreeSet<ServiceName>>>,
    address: String,
    version: String,
    dns_servers: Vec<SocketAddr>,
}

impl ConsulParts {
    /// Where Consul's own DNS is asked.
    pub(super) fn dns_servers(&self) -> &[SocketAddr] {
        &self.dns_servers
    }

    /// For operators.
    pub(super) fn status(&self) -> ConsulStatus {
        let source = self.source.status();
        let now = Instant::now();
        let watches = source.watches.iter().filter_map(|watch| {
            let problem = watch.problem.as_ref()?;
            let age = watch.age(now);
            let age = age.map_or("never read".to_owned(), |age| {
                format!("read {} s ago", age.as_secs())
            });
            Some(format!("{} ({age}): {problem}", watch.path))
        });
        let registrar = self.services.status();
        let problems = watches
            .chain(source.problem.clone())
            .chain(source.problems.clone())
            .chain(registrar.problems)
            .chain(registrar.refused);
        let registered = registrar.registered.into_iter();
        ConsulStatus {
            address: self.address.clone(),
            version: self.version.clone(),
            watched: source.watched,
            in_turns: source.in_turns,
            unread: source.unread,
            registered: registered
                .map(|(instance, port)| RegisteredStatus {
                    instance: instance.to_string(),
                    port,
                })
                .collect(),
            problems: problems.collect(),
        }
    }

    /// The cgroups that were found to be services.
    pub(super) fn discovered(&self) -> Vec<WorkloadStatus> {
        let found = self.services.status().discovered.into_iter();
        found
            .map(|(cgroup, service)| WorkloadStatus {
                service: service.to_string(),
                rule: format!("found in cgroup {}", cgroup.display()),
                present: true,
            })
            .collect()
    }

    /// The services of this node are those that rules name and those that have an instance here.
    pub(super) fn serve(&self, ruled: impl IntoIterator<Item = ServiceName>) {
        let mut local: BTreeSet<ServiceName> = ruled.into_iter().collect();
        let instances = self.services.instances().borrow().clone();
        local.extend(instances.iter().map(|(service, _)| service.clone()));
        self.local.send_if_modified(|before| {
            let is_new = before.as_ref() != Some(&local);
            *before = Some(local);
            is_new
        });
    }
}

/// What [`open`] builds on.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    pub(super) config: &'a Config,
    pub(super) cgroups: &'a Cgroup2,
    pub(super) workloads: &'a Arc<WorkloadResolver>,
    /// Whether another agent goes on in this one's place.
    pub(super) replaced: &'a Arc<AtomicBool>,
    pub(super) shutdown: &'a Shutdown,
}

/// Connects to Consul, as long as that takes, and follows it from then on.
///
/// # Errors
/// If waiting does not help: Consul refuses, or runs without Connect.
pub(super) async fn open(
    consul: &ConsulConfig,
    around: Surroundings<'_>,
) -> Result<Opened, NodeError> {
    let client = Client::new(consul.client.clone());
    let connecting = connect(&client);
    let (ca, roots, agent) = while_waiting("waiting for Consul", Box::pin(connecting)).await?;
    let following = roots.run(around.shutdown.clone());
    around.shutdown.spawn_service("Consul's roots", following);
    tell_missing_rights(&client).await;
    let name: NodeName = agent
        .node
        .parse()
        .map_err(NodeError::when("take Consul's name for this node"))?;
    tracing::info!(node = %name, datacenter = agent.datacenter, version = agent.version, "connected to Consul");
    tell_of_other_domain(around.config, &agent);
    let domain = LocalDomain::new(ca.trust_domain().clone(), agent.datacenter.clone());
    let services = register(&client, consul, &agent, name.clone(), &around)?;
    let (local, local_seen) = watch::channel(None);
    let settings = SourceSettings {
        max_watches: consul.max_watches,
        // Of a service that nobody here may call, an instance's own address must not lead around the mesh either.
        everything: around.config.capture.instances,
        ..SourceSettings::new(name.clone(), domain.clone())
    };
    let (source, handle) = ConsulSource::new(client.clone(), settings, local_seen);
    let (publish, snapshots) = watch::channel(None);
    let publish = move |snapshot| {
        publish.send_replace(Some(snapshot));
    };
    around
        .shutdown
        .spawn_service("Consul", source.run(around.shutdown.clone(), publish));
    let parts = ConsulParts {
        source: handle,
        services,
        client,
        local,
        address: consul.client.address.to_string(),
        version: agent.version,
        dns_servers: agent.dns_servers,
    };
    Ok(Opened {
        name,
        local: domain,
        authority: Authority::Consul(ca),
        source: Source::Consul(snapshots),
        consul: Some(parts),
    })
}

async fn connect(
    client: &Client,
) -> Result<(Arc<ConsulCa>, RootsFollower, ConsulAgent), NodeError> {
    let clock = Arc::new(SystemClock);
    let connected = ConsulCa::connect(client.clone(), clock).await;
    let (ca, roots) = connected.map_err(NodeError::when("get the roots of Consul's CA"))?;
    let agent = ask_agent(client)
        .await
        .map_err(NodeError::when("ask the Consul agent who it is"))?;
    Ok((ca, roots, agent))
}

fn tell_of_other_domain(config: &Config, agent: &ConsulAgent) {
    let ours = config.dns.domain.to_ascii();
    let plain = |domain: &str| domain.trim_end_matches('.').to_ascii_lowercase();
    let (consuls, ours) = (plain(&agent.dns_domain), plain(&ours));
    if !config.dns.listen.is_empty() && !consuls.is_empty() && consuls != ours {
        tracing::warn!(
            consuls,
            ours,
            "names are answered below another domain than Consul's: set dns.domain to it"
        );
    }
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

/// Starts to register what is local, and to find it.
fn register(
    client: &Client,
    consul: &ConsulConfig,
    agent: &ConsulAgent,
    name: NodeName,
    around: &Surroundings<'_>,
) -> Result<LocalServices, NodeError> {
    let Surroundings {
        config, cgroups, ..
    } = around;
    let own = cgroups
        .own()
        .map_err(NodeError::when("find the agent's own cgroup"))?;
    let init = cgroups.of_first_process();
    let bounds = || Bounds::new(&config.capture.cgroups, &own, init.as_deref());
    let discovery = consul.discover_workloads.then(bounds);
    let address = config.node.address.or(agent.address);
    let settings = RegistrarSettings {
        node: OwnNode {
            name,
            address: address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        datacenter: agent.datacenter.clone(),
        register: consul.register,
        inbound_ports: consul.inbound_ports.clone(),
        state_file: Some(config.node.state_dir.join("inbound-ports.json")),
        discovery,
    };
    let workloads = Arc::clone(around.workloads);
    let (registrar, services) = Registrar::new(client.clone(), settings, workloads);
    let replaced = Arc::clone(around.replaced);
    let is_replaced = move || replaced.load(Ordering::Acquire);
    let running = registrar.run(around.shutdown.clone(), is_replaced);
    around.shutdown.spawn("registrar", running);
    Ok(services)
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
            tracing::error!(
                needed_for,
                problem,
                "the agent may not ask Consul for what it needs"
            );
        } else {
            tracing::info!(
                needed_for,
                problem,
                "the agent may not do everything at Consul"
            );
        }
    }
}

/// Waits for what is local and for the first whole catalog, but not for ever.
pub(super) async fn first(
    snapshots: &mut Snapshots,
    parts: &ConsulParts,
    ruled: impl IntoIterator<Item = ServiceName>,
) {
    let mut local = parts.services.instances();
    let known = timeout(FIRST, local.changed());
    let known = while_waiting("waiting for the services of this node", known).await;
    if known.is_err() {
        tracing::error!(
            "Consul's agent does not tell the services of this node: none is known yet"
        );
    }
    parts.serve(ruled);
    let is_whole = |snapshot: &Option<Snapshot>| snapshot.as_ref().is_some_and(|s| s.is_whole);
    let whole = timeout(FIRST, snapshots.wait_for(is_whole));
    if while_waiting("waiting for the catalog", whole)
        .await
        .is_err()
    {
        tracing::error!("Consul does not tell its whole catalog: beginning with what is known");
    }
}

/// The explicit upstreams of this node.
#[derive(Debug, Clone, Default)]
pub(super) struct OpenUpstreams {
    /// Where they are open, and what they lead to.
    pub(super) open: Vec<(ListenAddress, Destination)>,
    /// Why others are not, and what is wrong with what they lead to.
    pub(super) problems: Vec<String>,
}

/// What is local changes, and what depends on it follows.
#[derive(Debug)]
pub(super) struct LocalFollower {
    instances: watch::Receiver<LocalInstances>,
    upstreams: watch::Receiver<BTreeMap<ListenAddress, Offer>>,
    listeners: UpstreamListeners,
    /// What is wrong with the upstreams, as last told.
    problems: Vec<String>,
}

impl LocalFollower {
    /// # Errors
    /// If the kernel cannot be asked whose a socket is.
    pub(super) fn new(
        parts: &ConsulParts,
        outbound: Arc<Outbound>,
        sockets: ListeningSockets,
    ) -> io::Result<Self> {
        let finder = Finder::new(
            parts.client.clone(),
            outbound.local.datacenter().to_owned(),
            outbound.shutdown.clone(),
        );
        Ok(Self {
            instances: parts.services.instances(),
            upstreams: parts.services.upstreams(),
            listeners: UpstreamListeners::new(outbound, sockets, finder)?,
            problems: vec![],
        })
    }

    /// Resolves when something local has changed. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.instances.changed() => {}
            Ok(()) = self.upstreams.changed() => {}
            // Nobody tells any more.
            else => std::future::pending().await,
        }
    }

    /// The instances now.
    pub(super) fn instances(&mut self) -> LocalInstances {
        self.instances.borrow_and_update().clone()
    }

    /// Opens and closes the ports of explicit upstreams. What could not be opened is tried again at the next call.
    pub(super) fn follow_upstreams(&mut self) {
        let wanted = self.upstreams.borrow_and_update().clone();
        let failed = self.listeners.follow(&wanted);
        let failed = failed.iter().map(|e| chain(e).to_string());
        let problems = failed.chain(self.listeners.found().flat_map(Found::problems));
        let problems: Vec<String> = problems.collect();
        for problem in &problems {
            if !self.problems.contains(problem) {
                tracing::error!(problem, "upstream");
            }
        }
        self.problems = problems;
    }

    /// The services that upstreams lead to beside the catalog.
    pub(super) fn found(&self) -> Vec<Arc<Service>> {
        self.listeners.found().filter_map(Found::service).collect()
    }

    /// What is open of them.
    pub(super) fn upstreams(&self) -> OpenUpstreams {
        let open = self.listeners.list();
        OpenUpstreams {
            open: open
                .map(|(address, destination)| (address.clone(), destination.clone()))
                .collect(),
            problems: self.problems.clone(),
        }
    }
}
