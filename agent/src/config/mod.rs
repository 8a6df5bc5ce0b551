//! The agent's configuration: read once, checked whole, immutable afterwards.
//!
//! [`raw`] is what the files may say, [`check`] turns it into the types below or lists everything that is wrong,
//! [`merge`] lays drop-ins over the main file and remembers who said what. `docs/configuration.md` is its reference.

mod check;
mod consul;
mod dns;
mod merge;
mod raw;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    catalog::model::{InstanceId, IntentionAction, NodeName, ServiceName},
    identity::spiffe::TrustDomain,
};

pub use consul::ConsulConfig;

pub use self::dns::DnsConfig;
pub use crate::telemetry::{access_log::Destination as AccessLog, log::LogFormat};

/// Where the configuration is looked for unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/sidestep/sidestep.toml";

/// Where links and maps are kept unless told otherwise.
pub const DEFAULT_PIN_DIRECTORY: &str = "/sys/fs/bpf/sidestep";

/// The ranges of virtual addresses unless told otherwise.
pub fn default_ranges() -> (Ipv4Net, Ipv6Net) {
    (raw::ipv4_range(), raw::ipv6_range())
}

/// Everything that an operator decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `[node]`
    pub node: NodeConfig,
    /// `[agent]`
    pub agent: AgentConfig,
    /// `[capture]`
    pub capture: CaptureConfig,
    /// `[catalog]`
    pub catalog: CatalogConfig,
    /// Where services, intentions and identities come from.
    pub source: SourceConfig,
    /// `[[workload]]`, in the order of files and lines.
    pub workloads: Vec<WorkloadConfig>,
    /// `[[away]]`, by service; those that are not here are closed.
    pub away: BTreeMap<ServiceName, AwayPolicy>,
    /// `[tunnel]`
    pub tunnel: TunnelConfig,
    /// `[dns]`
    pub dns: DnsConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
    /// `[admin]`
    pub admin: AdminConfig,
}

/// `[node]`: where this node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// `address`: where other nodes reach this one; services that name no address are here.
    pub address: Option<IpAddr>,
    /// `state_dir`: what must outlive the agent (the virtual addresses given out).
    pub state_dir: PathBuf,
}

/// `[agent]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentConfig {
    /// `cgroup`: the agent moves itself there at start; needed only where it would run in the root cgroup.
    pub cgroup: Option<PathBuf>,
}

/// `[capture]`: whose connections are captured, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a key of its own, which operators switch"
)]
pub struct CaptureConfig {
    /// `mode`: by what the kernel captures.
    pub mode: CaptureMode,
    /// `cgroups`, relative to the cgroup2 mount: every process below one of these is captured.
    pub cgroups: Vec<PathBuf>,
    /// `port` of the capture listener on loopback, in each network namespace.
    pub port: u16,
    /// `ipv4_range` that virtual addresses are taken from.
    pub ipv4_range: Ipv4Net,
    /// `ipv6_range` that virtual addresses are taken from.
    pub ipv6_range: Ipv6Net,
    /// `max_vips`: virtual address and port pairs that the kernel maps hold.
    pub max_vips: u32,
    /// `max_flows`: connections between `connect()` and accept.
    pub max_flows: u32,
    /// `pin_directory`: where links and maps outlive the agent; `"off"` for nowhere.
    pub pin_directory: Option<PathBuf>,
    /// `so_original_dst`: answer `SO_ORIGINAL_DST` on accepted sockets, for other proxies.
    pub so_original_dst: bool,
    /// `dns`: capture DNS queries, so that workloads know services' names.
    pub dns: bool,
    /// `instances`: capture connections to the addresses of services' instances as well.
    pub instances: bool,
    /// `hung_after`: without a heartbeat for so long, the agent counts as away; `"off"` for never.
    pub hung_after: Option<Duration>,
    /// `debug`: let the eBPF programs log every decision.
    pub debug: bool,
}

/// By what connections are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureMode {
    /// eBPF programs.
    #[default]
    Ebpf,
    /// iptables rules, of the implementation that the host uses.
    Iptables,
    /// iptables rules by way of nftables.
    IptablesNft,
    /// iptables rules in the older tables.
    IptablesLegacy,
}

/// `[catalog]`, whatever its source is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogConfig {
    /// `vip_quarantine`: for how long a freed virtual address goes to no other service.
    pub vip_quarantine: Duration,
}

/// Where services, intentions and identities come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceConfig {
    /// A directory of files, with the built-in CA.
    Files(FilesConfig),
    /// `[consul]`: Consul, which then also says the node's name, its datacenter and its trust domain.
    Consul(ConsulConfig),
}

impl SourceConfig {
    /// The files, unless something else is the source.
    pub fn files(&self) -> Option<&FilesConfig> {
        match self {
            Self::Files(files) => Some(files),
            Self::Consul(_) => None,
        }
    }
}

/// `[catalog]`, `[identity]` and `[policy]` where files are the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilesConfig {
    /// `node.name`; the host's name by default.
    pub node: NodeName,
    /// `node.datacenter`, as it stands in identities.
    pub datacenter: String,
    /// `catalog.directory` of the files.
    pub directory: PathBuf,
    /// `[identity]`
    pub identity: IdentityConfig,
    /// `policy.default`: the answer where no intention matches.
    pub default_intention: IntentionAction,
}

/// `[identity]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityConfig {
    /// `trust_domain` of every identity here.
    pub trust_domain: TrustDomain,
    /// `[identity.ca]`
    pub ca: CaConfig,
    /// `leaf_ttl`: for how long a workload's certificate is valid.
    pub leaf_ttl: Duration,
}

/// `[identity.ca]`: the built-in CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaConfig {
    /// `certificate` that signs: the root's, or this node's intermediate with what is between it and the root.
    pub certificate: PathBuf,
    /// `key` of that certificate.
    pub key: PathBuf,
    /// `passphrase_file`, if the key is encrypted.
    pub passphrase_file: Option<PathBuf>,
    /// `roots` that are trusted: several while a root is replaced.
    pub roots: Vec<PathBuf>,
}

/// One `[[workload]]`: which processes are which service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// `service` that the processes are.
    pub service: ServiceName,
    /// `instance` of that service that the processes serve, where this node has several.
    pub instance: Option<InstanceId>,
    /// Which processes.
    pub rule: WorkloadRule,
}

/// Which processes a `[[workload]]` means.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum WorkloadRule {
    /// `cgroup`: those in or below this cgroup, relative to the cgroup2 mount.
    Cgroup(PathBuf),
    /// `unit`: those of this systemd unit.
    Unit(String),
    /// `user`: those of this user id. Weaker: whoever becomes the user becomes the workload.
    User(u32),
    /// `netns`: those in the network namespace at this file.
    Netns(PathBuf),
}

/// What becomes of new connects to a service while no agent takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AwayPolicy {
    /// `closed`: they are refused.
    #[default]
    Closed,
    /// `open`: they go to their destination as if there were no mesh. Only where that is no virtual address.
    Open,
    /// `fallback`: they go to this `endpoint`, in plaintext, without identity, whatever the intentions say.
    Fallback(SocketAddr),
}

/// `[tunnel]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelConfig {
    /// `listen`: the address that tunnels are taken at.
    pub listen: IpAddr,
    /// `port` of tunnels, here and at every node that declares none.
    pub port: u16,
    /// `hbone_port`: where tunnels of the kind `hbone` are taken; `"off"` for nowhere.
    pub hbone_port: Option<u16>,
    /// `connect_timeout` of the dial to another node.
    pub connect_timeout: Duration,
    /// `handshake_timeout` of TLS, on both sides.
    pub handshake_timeout: Duration,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitsConfig {
    /// `workers`: threads that carry connections; as many as processors, unless it is set.
    pub workers: usize,
    /// `max_connections` at once, per direction.
    pub max_connections: u32,
    /// `idle_timeout`: end connections on which nothing moves for so long; none by default.
    pub idle_timeout: Option<Duration>,
    /// `drain_timeout`: how long live connections may last once the agent was told to stop.
    pub drain_timeout: Duration,
    /// `eject_after` so many failed dials in a row an instance is left out; 0 never.
    pub eject_after: u32,
    /// `eject_for`: for how long.
    pub eject_for: Duration,
}

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelemetryConfig {
    /// `metrics`: where Prometheus scrapes; `"off"` for nowhere.
    pub metrics: Option<SocketAddr>,
    /// `log`: a level, or a filter like `info,sidestep::outbound=debug`.
    pub log: String,
    /// `log_format`
    pub log_format: LogFormat,
    /// `access_log`: `off`, `stdout`, or a file.
    pub access_log: AccessLog,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    /// `socket` of `sidestep status` and friends.
    pub socket: PathBuf,
}

/// The configuration cannot be used. Lists everything that is wrong with it.
#[derive(Debug)]
pub struct ConfigError {
    /// At least one.
    pub problems: Vec<ConfigProblem>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The file that says so: the main one or a drop-in.
    pub file: PathBuf,
    /// The key, as `table.key`; empty if the file cannot be read at all.
    pub key: String,
    /// What is wrong, with the value, and what was expected.
    pub message: String,
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(self.message.trim_end())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.problems.iter().map(ToString::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Reads `path` and its drop-ins: the `*.toml` files in the directory beside it that is named like it with
/// `.d` in place of `.toml`, in the order of their names.
///
/// # Errors
/// [`ConfigError`] with every problem found.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    from_merged(&merge::read(path)?)
}

/// For [`crate::fuzzing`]: what a file without drop-ins means if it holds `text`.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_text(text: &str) -> Result<Config, ConfigError> {
    from_merged(&merge::read_text(Path::new(DEFAULT_PATH), text)?)
}

fn from_merged(merged: &merge::Merged) -> Result<Config, ConfigError> {
    let parsed: raw::Config =
        serde_path_to_error::deserialize(merged.table.clone()).map_err(|error| {
            let key = error.path().to_string();
            let key = if key == "." { String::new() } else { key };
            ConfigError {
                problems: vec![ConfigProblem {
                    file: merged.file_of(&key),
                    key,
                    message: error.into_inner().message().to_owned(),
                }],
            }
        })?;
    check::check(parsed, merged)
}

impl Config {
    /// The tables in which `new` differs and that only a restart changes.
    ///
    /// Everything else is taken over by a reload: `[[workload]]`, `[[away]]`, `[policy]`, `[limits]` but for
    /// `workers` and `max_connections`, the timeouts of `[tunnel]`, `[identity]` but for `trust_domain`, `telemetry.log`,
    /// `capture.debug`, `capture.hung_after`.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let capture = |c: &CaptureConfig| CaptureConfig {
            debug: false,
            hung_after: None,
            ..c.clone()
        };
        let telemetry = |t: &TelemetryConfig| TelemetryConfig {
            log: String::new(),
            ..t.clone()
        };
        let listening = |t: &TunnelConfig| (t.listen, t.port, t.hbone_port);
        let checks = [
            ("node", self.node != new.node),
            ("agent", self.agent != new.agent),
            ("capture", capture(&self.capture) != capture(&new.capture)),
            ("catalog.vip_quarantine", self.catalog != new.catalog),
            (
                "tunnel.listen, tunnel.port or tunnel.hbone_port",
                listening(&self.tunnel) != listening(&new.tunnel),
            ),
            ("limits.workers", self.limits.workers != new.limits.workers),
            (
                "limits.max_connections",
                self.limits.max_connections != new.limits.max_connections,
            ),
            (
                "telemetry",
                telemetry(&self.telemetry) != telemetry(&new.telemetry),
            ),
            ("dns", self.dns != new.dns),
            ("admin", self.admin != new.admin),
        ];
        checks
            .into_iter()
            .chain(self.source.needs_restart(&new.source))
            .filter_map(|(name, differs)| differs.then_some(name))
            .collect()
    }
}

impl SourceConfig {
    /// What of it only a restart changes, each with whether `new` differs in it.
    fn needs_restart(&self, new: &Self) -> Vec<(&'static str, bool)> {
        match (self, new) {
            (Self::Files(old), Self::Files(new)) => {
                let node = (&old.node, &old.datacenter) != (&new.node, &new.datacenter);
                vec![
                    ("node.name or node.datacenter", node),
                    ("catalog.directory", old.directory != new.directory),
                    (
                        "identity.trust_domain",
                        old.identity.trust_domain != new.identity.trust_domain,
                    ),
                ]
            }
            (Self::Consul(old), Self::Consul(new)) => vec![("consul", old != new)],
            (Self::Files(_), Self::Consul(_)) | (Self::Consul(_), Self::Files(_)) => {
                vec![("consul", true)]
            }
        }
    }
}
