//! From what the files say to what the agent uses, or everything that is wrong. Touches nothing outside.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZero,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use sidestep_abi::MAX_FALLBACKS;

use super::{
    AccessLog, AdminConfig, AgentConfig, AwayPolicy, CaConfig, CaptureConfig, CaptureMode,
    CatalogConfig, Config, ConfigError, ConfigProblem, FilesConfig, IdentityConfig, LimitsConfig,
    LogFormat, NodeConfig, SourceConfig, TelemetryConfig, TunnelConfig, WorkloadConfig,
    WorkloadRule, merge::Merged, raw,
};
use crate::{
    catalog::model::{IntentionAction, NodeName, ServiceName},
    telemetry::log,
};

/// Collects what is wrong.
pub(super) struct Checker<'a> {
    merged: &'a Merged,
    problems: Vec<ConfigProblem>,
}

impl Checker<'_> {
    pub(super) fn problem(&mut self, key: impl Into<String>, message: impl Into<String>) {
        let key = key.into();
        let file = self.merged.file_of(&key);
        self.problems.push(ConfigProblem {
            file,
            key,
            message: message.into(),
        });
    }

    pub(super) fn expect(&mut self, good: bool, key: &str, message: impl FnOnce() -> String) {
        if !good {
            self.problem(key, message());
        }
    }

    pub(super) fn absolute(&mut self, key: &str, path: &Path) {
        self.expect(path.is_absolute(), key, || {
            format!("{:?}: expected an absolute path", path.display())
        });
    }

    /// A cgroup as `/proc/PID/cgroup` shows it: absolute below the mount, without `..`.
    fn cgroup(&mut self, key: &str, path: &Path) {
        // A name with a line feed would be two lines of an iptables rule.
        let plain = path
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
            && !path.to_string_lossy().contains(char::is_control);
        self.expect(path.is_absolute() && plain, key, || {
            format!(
                "{:?}: expected a cgroup's path below the cgroup2 mount, like \"/system.slice/web.service\"",
                path.display()
            )
        });
    }

    fn at_least(&mut self, key: &str, span: Duration, least: Duration) {
        self.expect(span >= least, key, || {
            format!(
                "{} ms: expected at least {} ms",
                span.as_millis(),
                least.as_millis()
            )
        });
    }
}

pub(super) fn check(raw: raw::Config, merged: &Merged) -> Result<Config, ConfigError> {
    let mut checker = Checker {
        merged,
        problems: Vec::new(),
    };
    let c = &mut checker;
    if let Some(address) = raw.node.address {
        let unicast = !address.is_unspecified() && !address.is_multicast();
        c.expect(unicast, "node.address", || {
            format!("{address}: expected an address at which other nodes reach this one")
        });
    }
    c.absolute("node.state_dir", &raw.node.state_dir);
    if let Some(cgroup) = &raw.agent.cgroup {
        c.cgroup("agent.cgroup", cgroup);
        c.expect(cgroup != Path::new("/"), "agent.cgroup", || {
            "\"/\": expected a cgroup below the root, of which the agent can be told apart"
                .to_owned()
        });
    }
    let capture = capture(c, raw.capture);
    let vip_quarantine = raw.catalog.vip_quarantine.0;
    let files = FilesSource {
        node: raw.node.name,
        datacenter: raw.node.datacenter,
        directory: raw.catalog.directory,
        identity: raw.identity,
        default_intention: raw.policy.default,
    };
    let source = match raw.consul {
        Some(consul) => {
            refuse_files(c, &files);
            Some(SourceConfig::Consul(super::consul::check(c, consul)))
        }
        None => check_files(c, files).map(SourceConfig::Files),
    };
    let workloads = workloads(c, raw.workload, &capture.cgroups);
    let away = away(c, raw.away, &capture);
    let tunnel = tunnel(c, &raw.tunnel, raw.node.address);
    c.expect(tunnel.port != capture.port, "tunnel.port", || {
        format!("{}: expected another port than capture.port", tunnel.port)
    });
    for (other, port) in [("capture.port", capture.port), ("tunnel.port", tunnel.port)] {
        c.expect(tunnel.hbone_port != Some(port), "tunnel.hbone_port", || {
            format!("{port}: expected another port than {other}")
        });
    }
    let dns = super::dns::check(c, raw.dns);
    let limits = limits(c, &raw.limits);
    let telemetry = telemetry(c, raw.telemetry);
    c.expect(
        dns.query_log.is_none() || telemetry.access_log != AccessLog::Off,
        "dns.query_log",
        || "expected telemetry.access_log to say where lines go".to_owned(),
    );
    if let Some(address) = telemetry.metrics {
        for (other, port) in [("capture.port", capture.port), ("tunnel.port", tunnel.port)] {
            c.expect(address.port() != port, "telemetry.metrics", || {
                format!("{address}: expected another port than {other}")
            });
        }
    }
    c.absolute("admin.socket", &raw.admin.socket);

    match source {
        Some(source) if checker.problems.is_empty() => Ok(Config {
            node: NodeConfig {
                address: raw.node.address,
                state_dir: raw.node.state_dir,
            },
            agent: AgentConfig {
                cgroup: raw.agent.cgroup,
            },
            capture,
            catalog: CatalogConfig { vip_quarantine },
            source,
            workloads,
            away,
            tunnel,
            dns,
            limits,
            telemetry,
            admin: AdminConfig {
                socket: raw.admin.socket,
            },
        }),
        _ => Err(ConfigError {
            problems: checker.problems,
        }),
    }
}

/// What the tables say that matter only with files as the source.
struct FilesSource {
    node: Option<NodeName>,
    datacenter: Option<String>,
    directory: Option<PathBuf>,
    identity: Option<raw::Identity>,
    default_intention: Option<IntentionAction>,
}

/// With Consul, two could say what one must.
fn refuse_files(c: &mut Checker<'_>, raw: &FilesSource) {
    let given = [
        ("node.name", raw.node.is_some()),
        ("node.datacenter", raw.datacenter.is_some()),
        ("catalog.directory", raw.directory.is_some()),
        ("identity", raw.identity.is_some()),
        ("policy.default", raw.default_intention.is_some()),
    ];
    for (key, is_given) in given {
        c.expect(!is_given, key, || {
            "expected not to be set beside [consul], which says it".to_owned()
        });
    }
}

fn check_files(c: &mut Checker<'_>, raw: FilesSource) -> Option<FilesConfig> {
    let node = node_name(c, raw.node);
    let datacenter = raw.datacenter.unwrap_or_else(|| "dc1".to_owned());
    check_datacenter(c, &datacenter);
    let directory = raw
        .directory
        .unwrap_or_else(|| "/etc/sidestep/catalog".into());
    c.absolute("catalog.directory", &directory);
    let identity = raw.identity.map(|raw| identity(c, raw));
    c.expect(identity.is_some(), "identity", || {
        "missing: expected [identity] with `trust_domain` and [identity.ca], or [consul]".to_owned()
    });
    Some(FilesConfig {
        node: node?,
        datacenter,
        directory,
        identity: identity?,
        default_intention: raw.default_intention.unwrap_or(IntentionAction::Deny),
    })
}

fn node_name(c: &mut Checker<'_>, name: Option<NodeName>) -> Option<NodeName> {
    if name.is_some() {
        return name;
    }
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    match host.parse() {
        Ok(name) => Some(name),
        Err(error) => {
            c.problem(
                "node.name",
                format!("not set, and the host's name does not serve: {error}"),
            );
            None
        }
    }
}

/// A label of server names and a part of identities. Consul takes the same characters.
fn check_datacenter(c: &mut Checker<'_>, name: &str) {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'));
    c.expect(
        plain && (1..=63).contains(&name.len()),
        "node.datacenter",
        || format!("{name:?}: expected 1 to 63 characters out of a-z 0-9 - _"),
    );
}

fn capture(c: &mut Checker<'_>, raw: raw::Capture) -> CaptureConfig {
    c.expect(!raw.cgroups.is_empty(), "capture.cgroups", || {
        "[]: expected at least one cgroup, like [\"/system.slice\"]: only processes below one are captured"
            .to_owned()
    });
    for (index, cgroup) in raw.cgroups.iter().enumerate() {
        c.cgroup(&format!("capture.cgroups[{index}]"), cgroup);
        let repeated = raw.cgroups.iter().take(index).any(|other| other == cgroup);
        c.expect(!repeated, &format!("capture.cgroups[{index}]"), || {
            format!("{:?}: given twice", cgroup.display())
        });
    }
    let port = raw.port.unwrap_or_else(|| raw::capture_port(raw.mode));
    c.expect(port != 0, "capture.port", || {
        "0: expected a port from 1 to 65535".to_owned()
    });
    let v4 = raw.ipv4_range;
    let network = v4.network();
    let usable = !network.is_loopback() && !network.is_multicast() && !network.is_unspecified();
    c.expect(
        usable && (4..=30).contains(&v4.prefix_len()),
        "capture.ipv4_range",
        || format!("{v4}: expected a unicast network between /4 and /30, like 240.0.0.0/4"),
    );
    let v6 = raw.ipv6_range;
    let network = v6.network();
    let usable = !network.is_loopback() && !network.is_multicast() && !network.is_unspecified();
    c.expect(
        usable && (8..=120).contains(&v6.prefix_len()),
        "capture.ipv6_range",
        || format!("{v6}: expected a unicast network between /8 and /120, like fd00:1:2:3::/64"),
    );
    for (key, value) in [
        ("capture.max_vips", raw.max_vips),
        ("capture.max_flows", raw.max_flows),
    ] {
        c.expect((1..=1 << 24).contains(&value), key, || {
            format!("{value}: expected 1 to {}", 1 << 24)
        });
    }
    if let Some(limit) = raw.hung_after.0 {
        // Five heartbeats.
        c.at_least("capture.hung_after", limit, Duration::from_secs(1));
    }
    let pins = (raw.pin_directory.as_os_str() != "off").then_some(raw.pin_directory);
    if let Some(path) = &pins {
        c.expect(path.is_absolute(), "capture.pin_directory", || {
            format!(
                "\"{}\": expected \"off\" or an absolute path",
                path.display()
            )
        });
    }
    let has_programs = raw.mode == CaptureMode::Ebpf;
    for (key, value) in [
        ("capture.debug", raw.debug),
        ("capture.dns", raw.dns),
        ("capture.so_original_dst", raw.so_original_dst),
    ] {
        c.expect(has_programs || !value, key, || {
            "true: expected false, for only with capture.mode = \"ebpf\" are there programs that could do it"
                .to_owned()
        });
    }
    CaptureConfig {
        mode: raw.mode,
        cgroups: raw.cgroups,
        port,
        ipv4_range: v4.trunc(),
        ipv6_range: v6.trunc(),
        max_vips: raw.max_vips,
        max_flows: raw.max_flows,
        pin_directory: pins,
        so_original_dst: raw.so_original_dst,
        dns: raw.dns,
        instances: raw.instances,
        hung_after: raw.hung_after.0,
        debug: raw.debug,
    }
}

fn identity(c: &mut Checker<'_>, raw: raw::Identity) -> IdentityConfig {
    let ca = raw.ca;
    c.absolute("identity.ca.certificate", &ca.certificate);
    c.absolute("identity.ca.key", &ca.key);
    if let Some(path) = &ca.passphrase_file {
        c.absolute("identity.ca.passphrase_file", path);
    }
    for (index, root) in ca.roots.iter().enumerate() {
        c.absolute(&format!("identity.ca.roots[{index}]"), root);
    }
    c.at_least("identity.leaf_ttl", raw.leaf_ttl.0, Duration::from_secs(60));
    let roots = if ca.roots.is_empty() {
        vec![ca.certificate.clone()]
    } else {
        ca.roots
    };
    IdentityConfig {
        trust_domain: raw.trust_domain,
        ca: CaConfig {
            certificate: ca.certificate,
            key: ca.key,
            passphrase_file: ca.passphrase_file,
            roots,
        },
        leaf_ttl: raw.leaf_ttl.0,
    }
}

fn workloads(
    c: &mut Checker<'_>,
    raw: Vec<raw::Workload>,
    captured: &[PathBuf],
) -> Vec<WorkloadConfig> {
    let mut seen: HashMap<WorkloadRule, usize> = HashMap::new();
    let mut workloads = Vec::new();
    for (index, workload) in raw.into_iter().enumerate() {
        let key = format!("workload[{index}]");
        let Some(rule) = rule(c, &key, &workload, captured) else {
            continue;
        };
        if let Some(first) = seen.insert(rule.clone(), index) {
            c.problem(
                &key,
                format!("the same rule as workload[{first}]: one process cannot be two services"),
            );
        }
        workloads.push(WorkloadConfig {
            service: workload.service,
            instance: workload.instance,
            rule,
        });
    }
    workloads
}

fn away(
    c: &mut Checker<'_>,
    raw: Vec<raw::Away>,
    capture: &CaptureConfig,
) -> BTreeMap<ServiceName, AwayPolicy> {
    c.expect(raw.len() <= MAX_FALLBACKS as usize, "away", || {
        format!("{} blocks: expected at most {MAX_FALLBACKS}", raw.len())
    });
    let mut policies = BTreeMap::new();
    for (index, entry) in raw.into_iter().enumerate() {
        let key = format!("away[{index}]");
        let policy = match (entry.policy, entry.endpoint) {
            (raw::AwayWord::Closed, None) => AwayPolicy::Closed,
            (raw::AwayWord::Open, None) => AwayPolicy::Open,
            (raw::AwayWord::Fallback, Some(endpoint)) => {
                fallback(c, &format!("{key}.endpoint"), endpoint, capture);
                AwayPolicy::Fallback(endpoint)
            }
            (raw::AwayWord::Fallback, None) => {
                c.problem(
                    key,
                    "no endpoint: expected one with the policy \"fallback\"",
                );
                continue;
            }
            (raw::AwayWord::Closed | raw::AwayWord::Open, Some(endpoint)) => {
                let message = format!("{endpoint}: expected only with the policy \"fallback\"");
                c.problem(format!("{key}.endpoint"), message);
                continue;
            }
        };
        let by_rules = capture.mode != CaptureMode::Ebpf && policy != AwayPolicy::Closed;
        c.expect(!by_rules, &format!("{key}.policy"), || {
            "expected \"closed\", for iptables rules do not know whether an agent runs".to_owned()
        });
        let service = entry.service.clone();
        if policies.insert(entry.service, policy).is_some() {
            c.problem(
                format!("{key}.service"),
                format!("\"{service}\": given twice"),
            );
        }
    }
    policies
}

/// An endpoint that a connect can be sent to from any namespace, and that is not ours.
fn fallback(c: &mut Checker<'_>, key: &str, endpoint: SocketAddr, capture: &CaptureConfig) {
    let address = endpoint.ip().to_canonical();
    let is_host = match address {
        // 240.0.0.0/4 belongs to the virtual addresses whatever the range is.
        IpAddr::V4(v4) => v4.octets()[0] < 224 && !capture.ipv4_range.contains(&v4),
        // A link-local address means nothing without an interface.
        IpAddr::V6(v6) => {
            !v6.is_multicast() && !v6.is_unicast_link_local() && !capture.ipv6_range.contains(&v6)
        }
    };
    let is_ours = address.is_loopback() && endpoint.port() == capture.port;
    let good = is_host && !address.is_unspecified() && endpoint.port() != 0 && !is_ours;
    c.expect(good, key, || {
        format!("{endpoint}: expected a host's address outside the virtual ranges, and a port")
    });
}

fn rule(
    c: &mut Checker<'_>,
    key: &str,
    workload: &raw::Workload,
    captured: &[PathBuf],
) -> Option<WorkloadRule> {
    let rules: Vec<WorkloadRule> = [
        workload.cgroup.clone().map(WorkloadRule::Cgroup),
        workload
            .unit
            .as_deref()
            .map(unit_name)
            .map(WorkloadRule::Unit),
        workload.user.map(WorkloadRule::User),
        workload.netns.clone().map(WorkloadRule::Netns),
    ]
    .into_iter()
    .flatten()
    .collect();
    let [rule] = rules.as_slice() else {
        c.problem(
            key,
            format!(
                "{} rules: expected exactly one of cgroup, unit, user, netns",
                rules.len()
            ),
        );
        return None;
    };
    match rule {
        WorkloadRule::Cgroup(path) => workload_cgroup(c, &format!("{key}.cgroup"), path, captured),
        WorkloadRule::Unit(unit) => {
            // systemd.unit(5): what a unit's name may be made of.
            let plain = unit
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b));
            let good = plain && !unit.starts_with('.') && unit.len() <= 255;
            c.expect(good, &format!("{key}.unit"), || {
                let given = workload.unit.as_deref().unwrap_or_default();
                format!("{given:?}: expected a unit's name, like \"web.service\"")
            });
        }
        WorkloadRule::User(_) => {}
        WorkloadRule::Netns(path) => c.absolute(&format!("{key}.netns"), path),
    }
    Some(rule.clone())
}

/// A rule for processes that nothing captures would never match: most likely a slip of the pen.
fn workload_cgroup(c: &mut Checker<'_>, key: &str, path: &Path, captured: &[PathBuf]) {
    c.cgroup(key, path);
    c.expect(path != Path::new("/"), key, || {
        "\"/\": expected a cgroup below the root: every process is in the root".to_owned()
    });
    let meets = |other: &PathBuf| path.starts_with(other) || other.starts_with(path);
    // With no cgroups at all, that is the problem.
    let is_captured = captured.is_empty() || captured.iter().any(meets);
    c.expect(is_captured || !path.is_absolute(), key, || {
        format!(
            "{:?}: expected a cgroup that is or has or is below one of capture.cgroups",
            path.display()
        )
    });
}

/// A unit's full name: as for systemctl, `web` is `web.service`. Sockets, timers and the like have no processes.
fn unit_name(unit: &str) -> String {
    match unit.rsplit_once('.') {
        Some((_, "service" | "scope" | "slice")) => unit.to_owned(),
        _other => format!("{unit}.service"),
    }
}

fn tunnel(c: &mut Checker<'_>, raw: &raw::Tunnel, address: Option<IpAddr>) -> TunnelConfig {
    c.expect(raw.port != 0, "tunnel.port", || {
        "0: expected a port from 1 to 65535".to_owned()
    });
    if let Some(listen) = raw.listen {
        c.expect(!listen.is_multicast(), "tunnel.listen", || {
            format!("{listen}: expected an address of this node, or 0.0.0.0")
        });
    }
    let least = Duration::from_millis(10);
    c.at_least("tunnel.connect_timeout", raw.connect_timeout.0, least);
    c.at_least("tunnel.handshake_timeout", raw.handshake_timeout.0, least);
    TunnelConfig {
        listen: raw
            .listen
            .or(address)
            .unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        port: raw.port,
        hbone_port: raw.hbone_port.0,
        connect_timeout: raw.connect_timeout.0,
        handshake_timeout: raw.handshake_timeout.0,
    }
}

fn limits(c: &mut Checker<'_>, raw: &raw::Limits) -> LimitsConfig {
    // tokio's semaphores hold less than usize::MAX; a node holds far less than this.
    let most = 10_000_000;
    c.expect(
        (1..=most).contains(&raw.max_connections),
        "limits.max_connections",
        || format!("{}: expected 1 to {most}", raw.max_connections),
    );
    if let Some(workers) = raw.workers {
        c.expect((1..=1024).contains(&workers), "limits.workers", || {
            format!("{workers}: expected 1 to 1024")
        });
    }
    if let Some(idle) = raw.idle_timeout {
        c.at_least("limits.idle_timeout", idle.0, Duration::from_secs(1));
    }
    LimitsConfig {
        workers: raw.workers.map_or_else(workers, |workers| workers as usize),
        max_connections: raw.max_connections,
        idle_timeout: raw.idle_timeout.map(|span| span.0),
        drain_timeout: raw.drain_timeout.0,
        eject_after: raw.eject_after,
        eject_for: raw.eject_for.0,
    }
}

/// As many as processors that the agent may use: a quota of its cgroup counts.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

fn telemetry(c: &mut Checker<'_>, raw: raw::Telemetry) -> TelemetryConfig {
    if let Err(error) = log::parse(&raw.log) {
        c.problem("telemetry.log", format!("{:?}: {}", raw.log, error));
    }
    let access_log = match raw.access_log.as_str() {
        "off" => AccessLog::Off,
        "stdout" => AccessLog::Stdout,
        path => {
            c.expect(
                Path::new(path).is_absolute(),
                "telemetry.access_log",
                || format!("{path:?}: expected \"off\", \"stdout\" or an absolute path"),
            );
            AccessLog::File(PathBuf::from(path))
        }
    };
    TelemetryConfig {
        metrics: match raw.metrics {
            raw::Metrics::Off => None,
            raw::Metrics::At(address) => Some(address),
        },
        log: raw.log,
        log_format: match raw.log_format {
            raw::LogFormat::Text => LogFormat::Text,
            raw::LogFormat::Json => LogFormat::Json,
        },
        access_log,
    }
}
