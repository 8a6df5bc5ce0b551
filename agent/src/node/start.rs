//! Building the parts, in the order in which each needs the ones before.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::SystemTime,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Node, NodeError,
    authority::Authority,
    consul::Surroundings,
    follow::Follower,
    heartbeat::{self, Heartbeats},
    source::{Opened, Source},
    status,
};
use crate::{
    admin::{AdminServer, Existing},
    catalog::{
        consul::ConsulHandle,
        model::{IntentionAction, Snapshot},
        store::{Catalog, CatalogStore},
        vip::{VipAllocator, VipPools},
    },
    config::{CaConfig, CaptureMode, Config, WorkloadConfig, WorkloadRule},
    connections::Connections,
    datapath::{
        Backend, Datapath, DatapathSettings, VipRanges,
        cgroup::Cgroup2,
        iptables::{Choice, Iptables, IptablesSettings, Variant},
        pins::PinDirectory,
    },
    handover::Inheritance,
    health::Health,
    identity::{
        LocalDomain,
        ca::CaFiles,
        certificates::{Certificates, Jitter},
        clock::SystemClock,
        workload::WorkloadResolver,
    },
    inbound::{
        Inbound, InboundSettings, NamespaceRule, Namespaces, deliver::Deliverer,
        listeners::TunnelListeners,
    },
    lifecycle::Shutdown,
    outbound::{
        Outbound, OutboundSettings,
        balance::{Balancer, Ejection},
        destinations::{Destinations, Own},
        listeners::CaptureNamespaces,
    },
    policy::{Intentions, PolicyStore},
    sockets::ListeningSockets,
    telemetry::{
        Telemetry,
        access_log::{AccessLog, LineFormat},
        http::MetricsServer,
        log::{LogFormat, LogHandle, chain},
        metrics::Metrics,
        series::SeriesLimits,
    },
    tunnel::hbone::{self, Pool, PoolLimits},
    workers::Workers,
};

/// Builds everything and starts it. Capture begins when all behind it is ready.
pub(super) async fn start(
    config_path: PathBuf,
    config: Config,
    log: LogHandle,
    workers: Workers,
    inheritance: Inheritance,
) -> Result<Follower, NodeError> {
    let shutdown = Shutdown::with(workers);
    let sockets = ListeningSockets::inheriting(inheritance.sockets);
    let cgroups = Arc::new(find_cgroups()?);
    let telemetry = telemetry(&config)?;
    let catalog = catalog(&config);
    let workloads = Arc::new(workloads(&config, Arc::clone(&cgroups))?);
    let replaced = Arc::<AtomicBool>::default();
    let around = Surroundings {
        config: &config,
        cgroups: &cgroups,
        workloads: &workloads,
        replaced: &replaced,
        shutdown: &shutdown,
    };
    let Opened {
        name,
        local,
        authority,
        mut source,
        consul,
    } = Source::open(around).await?;
    let problems = source.load(&catalog, consul.as_ref(), &config).await;
    let certificates = certificates(&authority, &shutdown);
    let policy = Arc::new(PolicyStore::new(intentions(&config, &catalog)));
    let datapath = Arc::new(datapath(&config, &cgroups, inheritance.pin_lock)?);
    let connections = Connections::new(config.limits.max_connections);
    let in_kernel = watch::Sender::new(catalog.current());
    let common = Common {
        catalog: Arc::clone(&catalog),
        policy: Arc::clone(&policy),
        certificates: certificates.clone(),
        connections: Arc::clone(&connections),
        telemetry: telemetry.clone(),
        local: local.clone(),
        in_kernel: in_kernel.subscribe(),
        replaced: Arc::clone(&replaced),
        shutdown: shutdown.clone(),
    };
    let freshness = consul.as_ref().map(|consul| consul.source.clone());
    let outbound = common.outbound(&config, Arc::clone(&datapath), workloads, freshness);
    let inbound = common.inbound(&config);
    let tunnels = tunnel_listeners(&config, &inbound, &sockets)?;
    let captures =
        CaptureNamespaces::new(Arc::clone(&outbound), config.capture.port, sockets.clone());
    let node = Arc::new(Node {
        config_path,
        started_at: SystemTime::now(),
        name,
        replaced,
        log,
        telemetry,
        catalog,
        catalog_problems: Mutex::new(problems),
        in_kernel,
        kernel_problem: Mutex::default(),
        policy,
        authority,
        consul,
        upstreams: Mutex::default(),
        certificates,
        datapath,
        connections,
        outbound,
        inbound,
        captures,
        sockets,
        predecessor: Mutex::default(),
        health: Health::default(),
        heartbeats: Heartbeats::default(),
        tunnel_addresses: Mutex::default(),
        local,
        shutdown,
        config: ArcSwap::from_pointee(config),
    });
    let mut follower = Follower::new(Arc::clone(&node), tunnels)?;
    begin_capture(&mut follower)?;
    source.watch(&node);
    log_refusals(&node)?;
    super::names::serve(&node)?;
    // Last: whoever gets an answer from the agent may count on capture.
    serve_operators(&node, inheritance.takes_over).await?;
    node.sockets.close_unused();
    Ok(follower)
}

/// What both directions have.
pub(super) struct Common {
    catalog: Arc<CatalogStore>,
    policy: Arc<PolicyStore>,
    certificates: Certificates,
    connections: Arc<Connections>,
    pub(super) telemetry: Telemetry,
    pub(super) local: LocalDomain,
    /// The catalog as the kernel has it.
    pub(super) in_kernel: watch::Receiver<Arc<Catalog>>,
    pub(super) replaced: Arc<AtomicBool>,
    pub(super) shutdown: Shutdown,
}

impl Common {
    fn outbound(
        &self,
        config: &Config,
        datapath: Arc<Backend>,
        workloads: Arc<WorkloadResolver>,
        freshness: Option<ConsulHandle>,
    ) -> Arc<Outbound> {
        let queries =
            super::names::captured(config, self, &datapath, &workloads, freshness.as_ref());
        Arc::new(Outbound {
            datapath,
            catalog: Arc::clone(&self.catalog),
            workloads,
            freshness,
            policy: Arc::clone(&self.policy),
            certificates: self.certificates.clone(),
            balancer: Balancer::default(),
            destinations: Destinations::new(
                super::names::lookup(&config.dns),
                own_listeners(config),
                self.shutdown.clone(),
            ),
            hbone: Pool::new(
                self.certificates.clone(),
                self.shutdown.clone(),
                PoolLimits::default(),
            ),
            queries,
            connections: Arc::clone(&self.connections),
            telemetry: self.telemetry.clone(),
            settings: ArcSwap::from_pointee(outbound_settings(config)),
            local: self.local.clone(),
            shutdown: self.shutdown.clone(),
        })
    }

    /// Without targets: those come with the first catalog that is applied.
    fn inbound(&self, config: &Config) -> Arc<Inbound> {
        Arc::new(Inbound {
            catalog: Arc::clone(&self.catalog),
            targets: ArcSwap::default(),
            namespaces: ArcSwap::from_pointee(namespaces(&config.workloads)),
            policy: Arc::clone(&self.policy),
            certificates: self.certificates.clone(),
            deliverer: Deliverer::default(),
            connections: Arc::clone(&self.connections),
            telemetry: self.telemetry.clone(),
            settings: ArcSwap::from_pointee(inbound_settings(config)),
            local: self.local.clone(),
            shutdown: self.shutdown.clone(),
        })
    }
}

fn tunnel_listeners(
    config: &Config,
    inbound: &Arc<Inbound>,
    sockets: &ListeningSockets,
) -> Result<TunnelListeners, NodeError> {
    let mut tunnels = TunnelListeners::open(
        Arc::clone(inbound),
        config.tunnel.listen,
        config.tunnel.port,
        sockets.clone(),
    )
    .map_err(NodeError::when("open the tunnel port"))?;
    if let Some(port) = config.tunnel.hbone_port {
        tunnels
            .open_hbone(port)
            .map_err(NodeError::when("open the HBONE port"))?;
    }
    Ok(tunnels)
}

/// Fills the maps, takes connections and captures them, in the order that [`Datapath::load`] asks for.
fn begin_capture(follower: &mut Follower) -> Result<(), NodeError> {
    let node = Arc::clone(follower.node());
    follower.apply_catalog();
    node.datapath
        .attach_hand_over()
        .map_err(NodeError::when("put capture in place"))?;
    heartbeat::start(&node);
    node.captures
        .open_host()
        .map_err(NodeError::when("capture in the host's network namespace"))?;
    follower.follow_namespaces();
    node.datapath
        .attach_capture()
        .map_err(NodeError::when("put capture in place"))?;
    super::well::watch(&node);
    Ok(())
}

fn certificates(authority: &Authority, shutdown: &Shutdown) -> Certificates {
    let clock = Arc::new(SystemClock);
    Certificates::new(
        authority.provider(),
        clock,
        Jitter::random(),
        shutdown.clone(),
    )
}

fn workloads(config: &Config, cgroups: Arc<Cgroup2>) -> Result<WorkloadResolver, NodeError> {
    WorkloadResolver::new(&config.workloads, move |id| cgroups.path_of(id))
        .map_err(NodeError::when("compile the [[workload]] rules"))
}

/// Moves the agent into the cgroup that is configured for it: before any socket exists, since a socket belongs to the
/// cgroup in which it was made.
///
/// # Errors
/// If it cannot be made or entered.
pub(crate) fn enter_own_cgroup(config: &Config) -> Result<(), NodeError> {
    let Some(cgroup) = &config.agent.cgroup else {
        return Ok(());
    };
    find_cgroups()?
        .enter(cgroup)
        .map_err(NodeError::when("enter agent.cgroup"))
}

fn find_cgroups() -> Result<Cgroup2, NodeError> {
    Cgroup2::find().map_err(NodeError::when("find the cgroup2 hierarchy"))
}

fn telemetry(config: &Config) -> Result<Telemetry, NodeError> {
    let metrics = Arc::new(Metrics::new(
        SeriesLimits::default(),
        env!("CARGO_PKG_VERSION"),
    ));
    let format = match config.telemetry.log_format {
        LogFormat::Text => LineFormat::Text,
        LogFormat::Json => LineFormat::Json,
    };
    let start = || {
        AccessLog::start(
            &config.telemetry.access_log,
            format,
            metrics.dropped_lines(),
        )
        .map_err(NodeError::when("open the access log"))
    };
    let access_log = start()?;
    let query_log = if config.dns.query_log.is_none() {
        AccessLog::off()
    } else {
        start()?
    };
    Ok(Telemetry::new(metrics, Arc::new(access_log)).with_query_log(query_log))
}

/// Where virtual addresses are taken from.
pub(crate) fn vip_pools(config: &Config) -> VipPools {
    VipPools {
        ipv4: config.capture.ipv4_range,
        ipv6: config.capture.ipv6_range,
    }
}

/// The empty catalog, with the virtual addresses that were given out before.
fn catalog(config: &Config) -> Arc<CatalogStore> {
    let state_file = config.node.state_dir.join("virtual-addresses.json");
    let quarantine = config.catalog.vip_quarantine;
    let (allocator, damaged) = VipAllocator::new(vip_pools(config), Some(state_file), quarantine);
    if let Some(problem) = damaged {
        tracing::error!(problem = %chain(&problem), "virtual addresses follow from names again");
    }
    Arc::new(catalog_store(config, allocator))
}

/// Of addresses by `allocator`.
pub(crate) fn catalog_store(config: &Config, allocator: VipAllocator) -> CatalogStore {
    let store = CatalogStore::new(allocator);
    if config.capture.instances {
        store.with_instances(vip_pools(config))
    } else {
        store
    }
}

/// The answer where no intention matches: the source's, if it has one.
pub(super) fn default_intention(config: &Config, snapshot: &Snapshot) -> IntentionAction {
    let configured = || config.source.files().map(|files| files.default_intention);
    snapshot
        .default_intention
        .or_else(configured)
        .unwrap_or(IntentionAction::Deny)
}

fn intentions(config: &Config, catalog: &CatalogStore) -> Intentions {
    let snapshot = &catalog.current().snapshot;
    Intentions::new(&snapshot.intentions, default_intention(config, snapshot))
}

/// `[identity.ca]` as the CA takes it.
pub(super) fn ca_files(ca: &CaConfig) -> CaFiles {
    CaFiles {
        certificate: ca.certificate.clone(),
        key: ca.key.clone(),
        passphrase_file: ca.passphrase_file.clone(),
        roots: ca.roots.clone(),
    }
}

fn datapath(
    config: &Config,
    cgroups: &Cgroup2,
    pin_lock: Option<OwnedFd>,
) -> Result<Backend, NodeError> {
    let capture = &config.capture;
    let own = cgroups
        .own()
        .map_err(NodeError::when("find the agent's own cgroup"))?;
    let pins = match (&capture.pin_directory, pin_lock) {
        (Some(path), Some(lock)) => Some(PinDirectory::take_over(path, lock)),
        (Some(path), None) => Some(PinDirectory::open(path)),
        (None, _) => None,
    };
    let pins = pins
        .transpose()
        .map_err(NodeError::when("take the pinned datapath"))?;
    let directories = capture.cgroups.iter();
    let directories = directories.map(|path| cgroups.directory(path)).collect();
    let vip_ranges = vip_ranges(config);
    if let Some(choice) = iptables_choice(capture.mode) {
        let settings = IptablesSettings {
            attach_points: capture.cgroups.clone(),
            directories,
            agent_cgroup: own,
            vip_ranges,
            port: capture.port,
            max_vips: capture.max_vips,
            choice,
        };
        let rules = Iptables::new(settings, pins)
            .map_err(NodeError::when("prepare capture by iptables"))?;
        return Ok(Backend::Rules(Box::new(rules)));
    }
    let settings = DatapathSettings {
        cgroups: directories,
        agent_cgroup: cgroups.directory(Path::new(&own)),
        vip_ranges,
        max_vips: capture.max_vips,
        max_flows: capture.max_flows,
        so_original_dst: capture.so_original_dst,
        dns_port: capture.dns.then_some(capture.port),
        debug: capture.debug,
    };
    let programs =
        Datapath::load(settings, pins).map_err(NodeError::when("load the eBPF programs"))?;
    Ok(Backend::Programs(Box::new(programs)))
}

/// With which iptables to capture, if with any.
pub(crate) fn iptables_choice(mode: CaptureMode) -> Option<Choice> {
    match mode {
        CaptureMode::Ebpf => None,
        CaptureMode::Iptables => Some(Choice::OfHost),
        CaptureMode::IptablesNft => Some(Choice::Only(Variant::Nft)),
        CaptureMode::IptablesLegacy => Some(Choice::Only(Variant::Legacy)),
    }
}

/// What is virtual on this node, whether or not a service has it.
pub(crate) fn vip_ranges(config: &Config) -> VipRanges {
    VipRanges {
        ipv4: config.capture.ipv4_range,
        ipv6: config.capture.ipv6_range,
    }
}

/// What is no destination outside the mesh.
fn own_listeners(config: &Config) -> Own {
    let ports = [config.capture.port, config.tunnel.port].into_iter();
    let metrics = config.telemetry.metrics.map(|address| address.port());
    let dns = config.dns.listen.iter().map(std::net::SocketAddr::port);
    Own {
        virtual_ranges: vip_pools(config),
        ports: ports
            .chain(config.tunnel.hbone_port)
            .chain(metrics)
            .chain(dns)
            .collect(),
    }
}

/// `[tunnel]` and `[limits]` as far as outbound connections follow them.
pub(super) fn outbound_settings(config: &Config) -> OutboundSettings {
    OutboundSettings {
        connect_timeout: config.tunnel.connect_timeout,
        handshake_timeout: config.tunnel.handshake_timeout,
        hbone_port: config.tunnel.hbone_port.unwrap_or(hbone::PORT),
        idle_timeout: config.limits.idle_timeout,
        ejection: Ejection {
            after: config.limits.eject_after,
            for_: config.limits.eject_for,
        },
    }
}

/// `[tunnel]` and `[limits]` as far as inbound connections follow them.
pub(super) fn inbound_settings(config: &Config) -> InboundSettings {
    InboundSettings {
        handshake_timeout: config.tunnel.handshake_timeout,
        connect_timeout: config.tunnel.connect_timeout,
        idle_timeout: config.limits.idle_timeout,
    }
}

/// The `[[workload]]` rules as far as delivery follows them.
pub(super) fn namespaces(workloads: &[WorkloadConfig]) -> Namespaces {
    let rule = |workload: &WorkloadConfig| NamespaceRule {
        service: workload.service.clone(),
        instance: workload.instance.clone(),
        netns: match &workload.rule {
            WorkloadRule::Netns(path) => Some(path.clone()),
            WorkloadRule::Cgroup(_) | WorkloadRule::Unit(_) | WorkloadRule::User(_) => None,
        },
    };
    Namespaces {
        rules: workloads.iter().map(rule).collect(),
    }
}

/// Metrics and the admin socket.
async fn serve_operators(node: &Arc<Node>, takes_over: bool) -> Result<(), NodeError> {
    let existing = if takes_over {
        Existing::Replace
    } else {
        Existing::Refuse
    };
    let config = node.config.load_full();
    let metrics = Arc::clone(node.telemetry.metrics());
    let observed = Arc::downgrade(node);
    metrics.observe(move || {
        observed
            .upgrade()
            .map(|node| status::observe(&node))
            .unwrap_or_default()
    });
    if let Some(address) = config.telemetry.metrics {
        let server = MetricsServer::bind(address, &node.sockets)
            .map_err(NodeError::when("serve metrics"))?;
        let shutdown = node.shutdown.clone();
        node.shutdown.spawn_service("metrics", async move {
            server
                .serve(metrics, async move { shutdown.operators_released().await })
                .await;
        });
    }
    let admin = AdminServer::bind(&config.admin.socket, existing)
        .await
        .map_err(NodeError::when("serve the admin socket"))?;
    let shutdown = node.shutdown.clone();
    let source = Arc::new(status::Operators(Arc::clone(node)));
    node.shutdown.spawn_service("admin", async move {
        admin
            .serve(source, async move { shutdown.operators_released().await })
            .await;
    });
    Ok(())
}

/// Says which connects the programs refused, at most once a minute per reason and cgroup.
fn log_refusals(node: &Arc<Node>) -> Result<(), NodeError> {
    use crate::telemetry::rate::OncePer;
    static ONCE: OncePer = OncePer::new(std::time::Duration::from_secs(60));
    let events = node
        .datapath
        .events()
        .map_err(NodeError::when("watch the programs' events"))?;
    let Some(mut events) = events else {
        return Ok(());
    };
    let shutdown = node.shutdown.clone();
    node.shutdown.spawn("refusals", async move {
        loop {
            let refused = tokio::select! {
                biased;
                () = shutdown.draining() => return,
                refused = events.next() => refused,
            };
            match refused {
                Ok(refused) => {
                    let key = format!("{} {}", refused.reason, refused.cgroup);
                    if let Some(suppressed) = ONCE.pass(&key) {
                        tracing::warn!(
                            destination = %refused.destination, reason = %refused.reason,
                            process = refused.process, command = refused.command, uid = refused.uid,
                            cgroup = %refused.cgroup, netns = %refused.netns, suppressed,
                            "connect refused"
                        );
                    }
                }
                Err(error) => {
                    tracing::error!(error = %chain(&error), "refused connects are not logged any more");
                    return;
                }
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        catalog::file::{FileSource, Loaded},
        node::file_context,
    };

    #[tokio::test]
    async fn what_is_wrong_with_the_first_catalog_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        std::fs::create_dir(place.join("catalog")).unwrap();
        std::fs::write(
            place.join("catalog/web.yaml"),
            "node: {name: a, address: 192.0.2.1}\nservice: {name: web, port: 80}",
        )
        .unwrap();
        // A file where a directory must be.
        std::fs::write(place.join("state"), "").unwrap();
        let path = place.join("sidestep.toml");
        let text = format!(
            "[node]\nname = \"a\"\nstate_dir = \"{place}/state\"\n[capture]\ncgroups = [\"/mesh\"]\n\
             [catalog]\ndirectory = \"{place}/catalog\"\n\
             [identity]\ntrust_domain = \"example.test\"\n\
             [identity.ca]\ncertificate = \"/ca.pem\"\nkey = \"/key.pem\"\n",
            place = place.display()
        );
        std::fs::write(&path, text).unwrap();
        let config = crate::config::load(&path).unwrap();

        let files = config.source.files().unwrap();
        let source = FileSource::new(files.directory.clone(), file_context(&config, files));
        let mut source = Source::Files(source, Loaded::default());
        let problems = source.load(&catalog(&config), None, &config).await;
        let [problem] = problems.as_slice() else {
            panic!("{problems:?}");
        };
        assert!(
            problem.starts_with("remember virtual addresses in "),
            "{problem}"
        );
    }
}
