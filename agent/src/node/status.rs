//! What the agent says of itself, gathered from its parts.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use sidestep_abi::MAX_SERVERS;

use super::{Node, away, consul::ConsulParts, next_agent, start};
use crate::{
    admin::{
        StatusSource,
        status::{
            AttachmentStatus, CatalogStatus, CertificateStatus, ConnectionCounts, ConnectionStatus,
            DestinationStatus, EffectStatus, HeartbeatStatus, IntentionStatus, ListenerStatus,
            QueriesStatus, ServiceStatus, Status, WorkloadStatus,
        },
    },
    catalog::model::{IntentionAction, Ports, Service, ServiceName, Snapshot},
    config::WorkloadRule,
    datapath::Verdict,
    health::Effect,
    outbound::listeners::Place,
    policy::{Decision, Reason},
    telemetry::{
        log::{LogError, chain},
        metrics::{CatalogObservation, CertificateObservation, Observations},
        record::Direction,
        timestamp::Timestamp,
    },
};

/// The node as operators see it.
pub(super) struct Operators(pub(super) Arc<Node>);

impl StatusSource for Operators {
    fn status(&self) -> Status {
        let node = &self.0;
        let attachments = node.datapath.attachments();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            node: node.name.to_string(),
            started_at: Timestamp(node.started_at),
            uptime_seconds: since(node.started_at),
            draining: node.shutdown.is_draining(),
            predecessor: *node.predecessor.lock(),
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            capture_mode: node.datapath.name(),
            attachments: attachments
                .into_iter()
                .map(|attachment| AttachmentStatus {
                    program: attachment.program.to_owned(),
                    target: attachment.target.display().to_string(),
                    link_id: attachment.link_id,
                    program_id: attachment.program_id,
                })
                .collect(),
            effects: effects(node),
            heartbeat: heartbeat(node),
            capture: verdicts(node)
                .into_iter()
                .map(|(name, n)| (name.to_owned(), n))
                .collect(),
            hand_over: hand_over(node)
                .into_iter()
                .map(|(name, n)| (name.to_owned(), n))
                .collect(),
            queries: queries(node),
            catalog: catalog_status(node),
            consul: node.consul.as_ref().map(ConsulParts::status),
            services: services(node),
            authority: node.authority.status(),
            certificates: certificates(node),
            connections: ConnectionCounts {
                live_outbound: node.connections.admitted(Direction::Outbound),
                live_inbound: node.connections.admitted(Direction::Inbound),
                limit: node.connections.limit(Direction::Outbound) as usize,
            },
            listeners: listeners(node),
            workloads: workloads(node),
        }
    }

    fn connections(&self) -> Vec<ConnectionStatus> {
        let describe = |connection: &Arc<crate::connections::Connection>| {
            let (bytes_sent, bytes_received) = connection.counts.snapshot();
            ConnectionStatus {
                id: connection.id,
                direction: connection.direction.as_str().to_owned(),
                source: Some(connection.source.to_string()),
                destination: Some(connection.service.to_string()),
                instance: connection.instance().map(|instance| instance.to_string()),
                started: Timestamp(connection.started_at),
                bytes_sent,
                bytes_received,
            }
        };
        self.0.connections.list().iter().map(describe).collect()
    }

    fn decide(&self, source: &ServiceName, destination: &ServiceName) -> IntentionStatus {
        let node = &self.0;
        let identity = node.local.identity_of(source);
        let Decision { action, reason } = node.policy.current().decide(&identity, destination);
        IntentionStatus {
            allowed: action == IntentionAction::Allow,
            entry: match &reason {
                Reason::Intention { entry, .. } => Some(entry.to_string()),
                Reason::Default(_) => None,
            },
            reason: reason.to_string(),
        }
    }

    fn metrics(&self) -> String {
        self.0.telemetry.metrics().render()
    }

    fn upgrade(&self) -> io::Result<u32> {
        let node = &self.0;
        let mut command = Command::new(own_program()?);
        command
            .args(["run", "--take-over", "--config"])
            .arg(&node.config_path)
            // They are about this process. The next one is told of by itself, or inherits by the handover.
            .env_remove("WATCHDOG_PID")
            .env_remove("LISTEN_PID")
            .stdin(Stdio::null());
        let next = next_agent::start(command)?;
        let process = next.as_raw_nonzero().get();
        tracing::info!(process, "next agent started");
        let stopped = node.shutdown.clone();
        node.shutdown.spawn_service("next agent", async move {
            tokio::select! {
                ended = next_agent::ended(next) => tracing::error!(?ended, process, "the next agent ended"),
                () = stopped.stopped() => {}
            }
        });
        Ok(process.unsigned_abs())
    }

    fn set_log(&self, directives: &str) -> Result<(), LogError> {
        self.0.log.set(directives)
    }
}

/// What a scrape asks of the parts that keep no metrics themselves.
pub(super) fn observe(node: &Node) -> Observations {
    let catalog = node.catalog.current();
    let certificates = node.certificates.status().into_iter();
    Observations {
        capture: verdicts(node),
        hand_over: hand_over(node),
        longest_gap: node.heartbeats.so_far().longest_gap,
        hangs: node.heartbeats.so_far().hangs,
        effective: node.health.is_well(),
        attached_programs: node.datapath.attachments().len() as u64,
        hbone: node.outbound.hbone.in_use(),
        catalog: catalog.published_at.map(|loaded_at| CatalogObservation {
            version: catalog.version,
            loaded_at,
            services: catalog.snapshot.services.len(),
            instances: instances(&catalog.snapshot),
            problems: problems(node).len(),
        }),
        authority: Some(node.authority.observe()),
        certificates: certificates
            .map(|certificate| CertificateObservation {
                service: certificate.identity.service,
                not_after: certificate.not_after,
                failing: certificate.last_error.is_some(),
            })
            .collect(),
    }
}

fn verdicts(node: &Node) -> Vec<(&'static str, u64)> {
    match node.datapath.counters() {
        Ok(counters) => counters
            .into_iter()
            .map(|(verdict, n)| (verdict.as_str(), n))
            .collect(),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "capture counters not read");
            Vec::new()
        }
    }
}

fn hand_over(node: &Node) -> Vec<(&'static str, u64)> {
    match node.datapath.flow_counters() {
        Ok(counters) => counters
            .into_iter()
            .map(|(event, n)| (event.as_str(), n))
            .collect(),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "hand-over counters not read");
            Vec::new()
        }
    }
}

fn queries(node: &Node) -> Option<QueriesStatus> {
    let served = node.outbound.queries.as_ref()?.served();
    let counted = verdicts(node);
    let count = |verdict: Verdict| {
        let found = counted.iter().find(|(name, _)| *name == verdict.as_str());
        found.map_or(0, |(_, n)| *n)
    };
    let servers = node.datapath.servers().unwrap_or_else(|error| {
        tracing::warn!(error = %chain(&error), "DNS servers not counted");
        0
    });
    Some(QueriesStatus {
        namespaces: served.namespaces,
        over_udp: served.datagrams,
        captured: count(Verdict::QueryCaptured),
        passed: count(Verdict::QueryPassed),
        servers,
        servers_limit: MAX_SERVERS,
    })
}

fn heartbeat(node: &Node) -> HeartbeatStatus {
    let beaten = node.heartbeats.so_far();
    let milliseconds = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    HeartbeatStatus {
        hung_after_ms: node.config.load().capture.hung_after.map(milliseconds),
        longest_gap_ms: milliseconds(beaten.longest_gap),
        hangs: beaten.hangs,
    }
}

fn catalog_status(node: &Node) -> CatalogStatus {
    let catalog = node.catalog.current();
    CatalogStatus {
        version: catalog.version,
        kernel_version: node.in_kernel.borrow().version,
        services: catalog.snapshot.services.len(),
        instances: instances(&catalog.snapshot),
        age_seconds: catalog.published_at.map(since).unwrap_or_default(),
        problems: problems(node),
    }
}

fn services(node: &Node) -> Vec<ServiceStatus> {
    let catalog = node.catalog.current();
    let destinations = node.outbound.destinations.all();
    let destination = |service: &Service| {
        let endpoints = destinations.get(&service.name);
        Some(DestinationStatus {
            place: service.destination()?.to_string(),
            endpoints: endpoints.map(|it| it.addresses()).unwrap_or_default(),
            problem: endpoints.and_then(|it| it.problem.clone()),
        })
    };
    let describe = |(name, service): (&_, &Arc<Service>)| ServiceStatus {
        name: format!("{name}"),
        addresses: catalog
            .addresses
            .get(name)
            .into_iter()
            .flatten()
            .copied()
            .collect(),
        ports: match &service.ports {
            Ports::Listed(ports) => Some(ports.iter().copied().collect()),
            Ports::Any => None,
        },
        instances: service.instances.len(),
        available: service.instances.iter().filter(|i| i.weight() > 0).count(),
        destination: destination(service),
    };
    catalog.snapshot.services.iter().map(describe).collect()
}

fn instances(snapshot: &Snapshot) -> usize {
    snapshot
        .services
        .values()
        .map(|service| service.instances.len())
        .sum()
}

fn certificates(node: &Node) -> Vec<CertificateStatus> {
    let status = node.certificates.status().into_iter();
    status
        .map(|certificate| CertificateStatus {
            identity: certificate.identity.to_string(),
            issuer: certificate.issuer,
            not_after: certificate.not_after.map(Timestamp),
            renew_at: certificate.renew_at.map(Timestamp),
            last_error: certificate
                .last_error
                .map(|error| chain(&*error).to_string()),
        })
        .collect()
}

fn listeners(node: &Node) -> Vec<ListenerStatus> {
    let config = node.config.load();
    let listener = |purpose: &str, address: String, netns| ListenerStatus {
        purpose: purpose.to_owned(),
        address,
        netns,
    };
    let captures = node.captures.list().into_iter().map(|(place, _cookie)| {
        let netns = match place {
            Place::Host => None,
            Place::File(path) => Some(path.display().to_string()),
        };
        listener("capture", format!("lo:{}", config.capture.port), netns)
    });
    let tunnels = node.tunnel_addresses.lock().clone();
    let tunnels = tunnels
        .into_iter()
        .map(|a| listener("tunnel", a.to_string(), None));
    let upstreams = node
        .upstreams
        .lock()
        .open
        .clone()
        .into_iter()
        .map(|(address, destination)| {
            let address = format!("{address} for {destination}");
            listener("upstream", address, None)
        });
    let metrics = config
        .telemetry
        .metrics
        .map(|a| listener("metrics", a.to_string(), None));
    let dns = config.dns.listen.iter();
    let dns = dns.map(|a| listener("dns", a.to_string(), None));
    let admin = listener("admin", config.admin.socket.display().to_string(), None);
    captures
        .chain(tunnels)
        .chain(upstreams)
        .chain(metrics)
        .chain(dns)
        .chain([admin])
        .collect()
}

fn workloads(node: &Node) -> Vec<WorkloadStatus> {
    let config = node.config.load();
    let open: Vec<_> = node
        .captures
        .list()
        .into_iter()
        .map(|(place, _)| place)
        .collect();
    let describe = |workload: &crate::config::WorkloadConfig| {
        let (rule, present) = match &workload.rule {
            WorkloadRule::Cgroup(path) => (format!("cgroup {}", path.display()), true),
            WorkloadRule::Unit(unit) => (format!("unit {unit}"), true),
            WorkloadRule::User(uid) => (format!("user {uid}"), true),
            WorkloadRule::Netns(path) => {
                let present = open.contains(&Place::File(path.clone()));
                (format!("netns {}", path.display()), present)
            }
        };
        WorkloadStatus {
            service: workload.service.to_string(),
            rule,
            present,
        }
    };
    let mut workloads: Vec<_> = config.workloads.iter().map(describe).collect();
    if let Some(consul) = &node.consul {
        workloads.extend(consul.discovered());
    }
    workloads
}

fn since(then: SystemTime) -> u64 {
    then.elapsed().unwrap_or_default().as_secs()
}

/// What is wrong with the catalog's sources, with bringing it to the kernel, and with what is configured for it.
fn problems(node: &Node) -> Vec<String> {
    let mut problems = node.catalog_problems.lock().clone();
    problems.extend(node.kernel_problem.lock().clone());
    problems.extend(node.upstreams.lock().problems.clone());
    let destinations = node.outbound.destinations.all();
    problems.extend(destinations.values().filter_map(|it| it.problem.clone()));
    let (config, catalog) = (node.config.load(), node.catalog.current());
    let ranges = start::vip_pools(&config);
    problems.extend(away::problems(&config.away, &catalog, ranges));
    problems.extend(catalog.instance_problems());
    problems
}

fn effects(node: &Node) -> Vec<EffectStatus> {
    let described = |(cgroup, effect): (PathBuf, Effect)| {
        let (captured, problem) = match effect {
            Effect::Captured => (Some(true), None),
            Effect::Missed(happened) => (Some(false), Some(happened)),
            Effect::Unknown(why) => (None, Some(why)),
        };
        EffectStatus {
            cgroup: cgroup.display().to_string(),
            captured,
            problem,
        }
    };
    node.health.all().into_iter().map(described).collect()
}

/// The file of this program as it is now: an upgrade puts another one at its path.
fn own_program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let name = path.as_os_str().as_encoded_bytes();
    // proc_pid_exe(5): what the link says once the file was replaced.
    Ok(match name.strip_suffix(b" (deleted)") {
        Some(name) => OsStr::from_bytes(name).into(),
        None => path,
    })
}
