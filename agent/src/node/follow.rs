//! Keeping the parts in step with the catalog, the configuration and the namespaces that come and go.
//!
//! One task does all of it, one change after the other: no two changes are ever half applied at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior, interval},
};

use super::{
    Node, NodeError, away, consul::LocalFollower, source::ruled, start, supervisor::Watchdog,
};
use crate::{
    catalog::store::Catalog,
    config::{self, Config, FilesConfig, SourceConfig},
    datapath::{DatapathError, NetnsCookie, Reconciled, Undesired},
    health,
    inbound::{listeners::TunnelListeners, targets::Targets},
    telemetry::log::chain,
};

/// How often namespaces that rules name are looked for.
const NAMESPACES: Duration = Duration::from_secs(1);

/// How often what a vanished connect left behind is swept, and how old that is.
const SWEEP: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(30));

/// How often the kernel is compared with the catalog without a change: somebody else may have changed a map.
const COMPARE: Duration = Duration::from_secs(60);

/// Resolves when something of what Consul registers here has changed.
async fn changed(local: &mut Option<LocalFollower>) {
    match local {
        Some(local) => local.changed().await,
        None => std::future::pending().await,
    }
}

/// Applies changes to a running node.
#[derive(Debug)]
pub(super) struct Follower {
    node: Arc<Node>,
    tunnels: TunnelListeners,
    /// What Consul registers here, if it is the source.
    local: Option<LocalFollower>,
    versions: watch::Receiver<u64>,
    /// Cookies of the namespaces that workload rules name, as last seen.
    namespaces: BTreeMap<PathBuf, NetnsCookie>,
    /// The kernel's maps could not be brought up to date; try again.
    behind: bool,
    /// What the kernel was last brought up to date with.
    in_kernel: Option<(Arc<Catalog>, Arc<Config>)>,
    /// What of `[[away]]` is not possible, and which instances cannot be told apart, as last told.
    told_problems: Vec<String>,
    look_for_namespaces: Interval,
    sweep: Interval,
    compare: Interval,
    watchdog: Watchdog,
}

impl Follower {
    pub(super) fn new(node: Arc<Node>, tunnels: TunnelListeners) -> Result<Self, NodeError> {
        let local = node.consul.as_ref().map(|consul| {
            LocalFollower::new(consul, Arc::clone(&node.outbound), node.sockets.clone())
                .map_err(NodeError::when("ask the kernel whose sockets are"))
        });
        let every = |period| {
            let mut interval = interval(period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let versions = node.catalog.versions();
        Ok(Self {
            node,
            tunnels,
            local: local.transpose()?,
            versions,
            namespaces: BTreeMap::new(),
            behind: false,
            in_kernel: None,
            told_problems: vec![],
            look_for_namespaces: every(NAMESPACES),
            sweep: every(SWEEP.0),
            compare: every(COMPARE),
            watchdog: Watchdog::new(),
        })
    }

    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Waits for one change and applies it. Cancel-safe: a change that was not applied is seen again.
    pub(super) async fn next_change(&mut self) {
        tokio::select! {
            Ok(()) = self.versions.changed() => self.follow_catalog(),
            () = changed(&mut self.local) => self.follow_local(),
            _ = self.look_for_namespaces.tick() => {
                self.watchdog.alive();
                self.follow_namespaces();
                if self.behind {
                    self.apply_catalog();
                }
                if self.tunnels.is_incomplete() {
                    self.follow_local();
                } else {
                    self.follow_upstreams();
                }
            }
            _ = self.sweep.tick() => self.sweep_flows(),
            _ = self.compare.tick() => self.apply_catalog(),
        }
    }

    /// Puts the current catalog in force everywhere, whatever the kernel says now.
    pub(super) fn apply_catalog(&mut self) {
        self.in_kernel = None;
        self.follow_catalog();
    }

    /// Puts the current catalog in force everywhere.
    ///
    /// Policy first and cutting last: a connection that begins meanwhile is decided by the new intentions,
    /// one that began before is found in the table.
    fn follow_catalog(&mut self) {
        self.versions.mark_unchanged();
        let node = Arc::clone(&self.node);
        let catalog = node.catalog.current();
        node.decide_by(&catalog.snapshot);
        self.follow_local();
        // Before the kernel leads anybody to them.
        node.outbound.destinations.follow(&catalog);
        self.follow_in_kernel(&catalog);
        node.in_kernel.send_replace(Arc::clone(&catalog));
        let found = self.local.as_ref().map(LocalFollower::found);
        let found = found.unwrap_or_default();
        node.outbound.balancer.retain(&catalog.snapshot, &found);
        self.forget_certificates(&node.config.load());
        node.cut_forbidden();
        node.cut_lost();
    }

    /// Brings to the kernel what changed since it was last brought up to date: mostly nothing, since it knows no
    /// endpoints, unless connections to their addresses are captured.
    fn follow_in_kernel(&mut self, catalog: &Arc<Catalog>) {
        let config = self.node.config.load_full();
        self.tell_problems(catalog, &config);
        let before = self
            .in_kernel
            .take()
            .filter(|(_, before)| Arc::ptr_eq(before, &config));
        let change = before
            .as_ref()
            .and_then(|(before, _)| catalog.change_in_kernel(before, &config.away));
        let result = match change {
            Some(change) if change.is_empty() => Ok(Reconciled::default()),
            Some(change) => self.node.datapath.update(&change.some, &change.gone),
            None => self.bring_all(catalog, &config),
        };
        match result {
            Ok(changed) => {
                self.behind = false;
                self.in_kernel = Some((Arc::clone(catalog), config));
                *self.node.kernel_problem.lock() = None;
                if changed != Reconciled::default() {
                    tracing::info!(
                        version = catalog.version,
                        added = changed.added,
                        changed = changed.changed,
                        removed = changed.removed,
                        "addresses in the kernel"
                    );
                }
            }
            Err(error) => {
                self.behind = true;
                let problem = chain(&error).to_string();
                let before = self.node.kernel_problem.lock().replace(problem.clone());
                // It is tried again every second.
                if before.as_ref() != Some(&problem) {
                    tracing::error!(error = problem, "addresses not brought to the kernel");
                }
            }
        }
    }

    /// Each problem once, as long as it lasts.
    fn tell_problems(&mut self, catalog: &Catalog, config: &Config) {
        let away = away::problems(&config.away, catalog, start::vip_pools(config));
        let instances = catalog.instance_problems();
        let is_told = |problem: &&String| self.told_problems.contains(problem);
        for problem in away.iter().filter(|problem| !is_told(problem)) {
            tracing::error!(problem, "configuration");
        }
        for problem in instances.iter().filter(|problem| !is_told(problem)) {
            tracing::error!(problem, "addresses of instances");
        }
        self.told_problems = [away, instances].concat();
    }

    /// Compares all that the kernel has with the catalog.
    fn bring_all(&self, catalog: &Catalog, config: &Config) -> Result<Reconciled, DatapathError> {
        let undesired = if catalog.snapshot.is_whole {
            Undesired::Remove
        } else {
            Undesired::Keep
        };
        let mut targets = catalog.vip_targets(&config.away);
        for address in health::reserved(config.capture.ipv6_range) {
            targets.ports.insert(address, health::target());
        }
        self.node.datapath.reconcile(&targets, undesired)
    }

    /// Takes tunnels for what is on this node now: by Consul's registrations, or by the catalog.
    fn follow_local(&mut self) {
        let node = Arc::clone(&self.node);
        let targets = match &mut self.local {
            Some(local) => {
                let instances = local.instances();
                Targets::at_own_ports(instances.iter(), &node.local)
            }
            None => Targets::new(node.catalog.current().instances_on(&node.name), &node.local),
        };
        let ports = targets.ports();
        // First: who comes in by a new port finds its instance.
        node.inbound.targets.store(Arc::new(targets));
        self.tunnels.follow(&ports);
        let open = self.tunnels.addresses();
        node.tunnel_addresses.lock().clone_from(&open);
        let Some(consul) = &node.consul else {
            return;
        };
        // Registered is only what is listened for.
        let open = open.iter().map(SocketAddr::port);
        consul
            .services
            .listening_at(open.filter(|port| ports.contains(port)).collect());
        consul.serve(ruled(&node.config.load()));
        self.follow_upstreams();
    }

    /// Opens and closes the ports of explicit upstreams.
    fn follow_upstreams(&mut self) {
        if let Some(local) = &mut self.local {
            local.follow_upstreams();
            *self.node.upstreams.lock() = local.upstreams();
        }
    }

    /// Certificates are kept for services that are called from here or served here.
    fn forget_certificates(&self, config: &Config) {
        let targets = self.node.inbound.targets.load();
        let mut wanted: BTreeSet<_> = config.workloads.iter().map(|w| &w.service).collect();
        wanted.extend(targets.all().map(|target| &target.service));
        self.node
            .certificates
            .retain(|identity| wanted.contains(&identity.service));
    }

    /// Opens and closes capture in the namespaces that workload rules name.
    pub(super) fn follow_namespaces(&mut self) {
        let workloads = Arc::clone(&self.node.outbound.workloads);
        let files: BTreeSet<PathBuf> = workloads
            .namespaces()
            .into_iter()
            .map(|(path, _service)| path)
            .collect();
        if files.is_empty() && self.namespaces.is_empty() {
            return;
        }
        let now = self.node.captures.follow(&files);
        for (path, cookie) in &self.namespaces {
            if now.get(path) != Some(cookie) {
                workloads.dismiss_namespace(*cookie);
            }
        }
        for (path, cookie) in &now {
            workloads.enrol_namespace(path, *cookie);
        }
        self.namespaces = now;
    }

    fn sweep_flows(&self) {
        match self.node.datapath.sweep_flows(SWEEP.1) {
            Ok(0) => {}
            Ok(swept) => tracing::debug!(swept, "published connects that nobody accepted swept"),
            Err(error) => tracing::warn!(error = %chain(&error), "flows not swept"),
        }
    }

    /// Reads the configuration anew and takes over what can be; a bad one changes nothing.
    pub(super) fn reload(&mut self) {
        self.node.telemetry.reopen_logs();
        match config::load(&self.node.config_path) {
            Ok(new) => self.take_over(new),
            Err(error) => {
                tracing::error!(%error, "configuration not reloaded: the one from before stays");
            }
        }
    }

    fn take_over(&mut self, new: Config) {
        let node = Arc::clone(&self.node);
        let old = node.config.load_full();
        if let Err(error) = node.outbound.workloads.reload(&new.workloads) {
            tracing::error!(error = %chain(&error), "configuration not reloaded: the one from before stays");
            return;
        }
        for table in old.needs_restart(&new) {
            tracing::warn!(table, "changed in the configuration, but takes a restart");
        }
        // What takes a restart stays as it runs, also in what we say of ourselves.
        let source = self.reload_source(&old.source, new.source);
        let merged = Config {
            source,
            workloads: new.workloads,
            away: new.away,
            limits: config::LimitsConfig {
                max_connections: old.limits.max_connections,
                ..new.limits
            },
            tunnel: config::TunnelConfig {
                listen: old.tunnel.listen,
                port: old.tunnel.port,
                hbone_port: old.tunnel.hbone_port,
                ..new.tunnel
            },
            telemetry: config::TelemetryConfig {
                log: new.telemetry.log,
                ..old.telemetry.clone()
            },
            capture: config::CaptureConfig {
                debug: new.capture.debug,
                hung_after: new.capture.hung_after,
                ..old.capture.clone()
            },
            ..(*old).clone()
        };
        node.inbound
            .namespaces
            .store(Arc::new(start::namespaces(&merged.workloads)));
        node.outbound
            .settings
            .store(Arc::new(start::outbound_settings(&merged)));
        node.inbound
            .settings
            .store(Arc::new(start::inbound_settings(&merged)));
        if merged.telemetry.log != old.telemetry.log
            && let Err(error) = node.log.set(&merged.telemetry.log)
        {
            tracing::error!(error = %chain(&error), "log level not changed");
        }
        if let Err(error) = node.datapath.set_debug(merged.capture.debug) {
            tracing::error!(error = %chain(&error), "capture.debug not changed");
        }
        node.config.store(Arc::new(merged));
        self.follow_namespaces();
        self.apply_catalog();
        tracing::info!("configuration reloaded");
    }

    /// Reads the certificate authority again, also if its paths are the same. Returns what is in force now.
    fn reload_source(&self, old: &SourceConfig, new: SourceConfig) -> SourceConfig {
        let (SourceConfig::Files(old), SourceConfig::Files(new)) = (old, new) else {
            // Consul's settings take a restart; what it says needs no reload.
            return old.clone();
        };
        // Of another trust domain, which takes a restart, the authority would come too early.
        let is_taken_over = new.identity.trust_domain == old.identity.trust_domain
            && self.node.authority.reload(&new.identity);
        SourceConfig::Files(FilesConfig {
            identity: if is_taken_over {
                new.identity
            } else {
                old.identity.clone()
            },
            default_intention: new.default_intention,
            ..old.clone()
        })
    }
}
