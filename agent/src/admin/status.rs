//! What the agent says of itself. `sidestep status --json` prints it as it is here: field names are API.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use crate::telemetry::timestamp::Timestamp;

/// The answer to `GET /intention`: whether a call may be made, and what decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentionStatus {
    /// Whether it may.
    pub allowed: bool,
    /// The intention that decides, or the default, as access logs say it.
    pub reason: String,
    /// Where that intention is written; none for the default.
    pub entry: Option<String>,
}

/// The answer to `GET /status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// Its process id.
    pub process: u32,
    /// The node's name.
    pub node: String,
    /// When the agent started.
    pub started_at: Timestamp,
    /// Since then.
    pub uptime_seconds: u64,
    /// Whether it takes no new connections because it is shutting down.
    pub draining: bool,
    /// The agent that this one took over from, while it still carries connections.
    pub predecessor: Option<PredecessorStatus>,
    /// The kernel's release.
    pub kernel: String,
    /// By what connections are captured: `ebpf`, `iptables-nft` or `iptables-legacy`.
    pub capture_mode: String,
    /// The programs it holds attached.
    pub attachments: Vec<AttachmentStatus>,
    /// Whether connects are captured, found out by doing.
    pub effects: Vec<EffectStatus>,
    /// How well it shows the programs that it runs.
    pub heartbeat: HeartbeatStatus,
    /// Capture verdicts by name, since the programs were loaded.
    pub capture: BTreeMap<String, u64>,
    /// What became of captured connections on their way to the agent, by name, since the programs were loaded.
    pub hand_over: BTreeMap<String, u64>,
    /// How DNS queries are captured; `None` if they are not.
    pub queries: Option<QueriesStatus>,
    /// The catalog in use.
    pub catalog: CatalogStatus,
    /// What Consul says, where that is the source.
    pub consul: Option<ConsulStatus>,
    /// Every service and where it is called.
    pub services: Vec<ServiceStatus>,
    /// What signs certificates on this node.
    pub authority: AuthorityStatus,
    /// Certificates of local workloads.
    pub certificates: Vec<CertificateStatus>,
    /// How many connections it carries.
    pub connections: ConnectionCounts,
    /// Where it listens.
    pub listeners: Vec<ListenerStatus>,
    /// The configured workloads.
    pub workloads: Vec<WorkloadStatus>,
}

/// How DNS queries are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueriesStatus {
    /// In how many network namespaces.
    pub namespaces: usize,
    /// In how many of them over UDP too; if not in all, the log says why.
    pub over_udp: usize,
    /// How many were captured since the programs were loaded: datagrams and connects.
    pub captured: u64,
    /// How many went to their server instead.
    pub passed: u64,
    /// Towards how many servers queries over UDP were captured.
    pub servers: usize,
    /// For how many there is room; queries to more are not captured.
    pub servers_limit: u32,
}

/// What a connect below an attach point came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EffectStatus {
    /// The attach point.
    pub cgroup: String,
    /// Whether it was captured; `None` if that could not be found out.
    pub captured: Option<bool>,
    /// What happened instead, or why it is not known.
    pub problem: Option<String>,
}

/// When the programs count the agent as hung.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatStatus {
    /// Without a heartbeat for so long, in milliseconds; `None` for never.
    pub hung_after_ms: Option<u64>,
    /// The longest time between two heartbeats since the agent started, in milliseconds.
    pub longest_gap_ms: u64,
    /// How often that was above the limit.
    pub hangs: u64,
}

/// An agent that drains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PredecessorStatus {
    /// Its process id.
    pub process: u32,
    /// Connections that it still carries.
    pub connections: usize,
}

/// The answer to `POST /upgrade`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrading {
    /// The process id of the agent that is to take over.
    pub process: u32,
}

/// A program on its hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// The program's name.
    pub program: String,
    /// The cgroup or namespace it is attached to.
    pub target: String,
    /// The kernel's link id, as `bpftool link` shows it.
    pub link_id: u32,
    /// The kernel's program id, as `bpftool prog` shows it.
    pub program_id: u32,
}

/// The catalog in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogStatus {
    /// Its number; rises with every change.
    pub version: u64,
    /// The number of the one that was last brought to the kernel, moments later.
    pub kernel_version: u64,
    /// How many services it has.
    pub services: usize,
    /// How many instances it has.
    pub instances: usize,
    /// Since it was read.
    pub age_seconds: u64,
    /// What is wrong with its sources: the previous content of what is named here is still in use.
    pub problems: Vec<String>,
}

/// How the agent and Consul get on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsulStatus {
    /// Where Consul is.
    pub address: String,
    /// Its version.
    pub version: String,
    /// How many services are followed by a blocking query.
    pub watched: usize,
    /// How many others are read in turns.
    pub in_turns: usize,
    /// How many were not read yet.
    pub unread: usize,
    /// The instances that are reached through this node.
    pub registered: Vec<RegisteredStatus>,
    /// What is wrong: what was known before is still in use.
    pub problems: Vec<String>,
}

/// An instance with a proxy that this agent registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredStatus {
    /// Its id.
    pub instance: String,
    /// The port of its proxy.
    pub port: u16,
}

/// A service and where it is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Its virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports that answer there; `None` if every one does.
    pub ports: Option<Vec<u16>>,
    /// How many instances it has.
    pub instances: usize,
    /// How many of them take traffic.
    pub available: usize,
    /// Where it is, if it is outside the mesh; it has no instances then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<DestinationStatus>,
}

/// Where a service is that is outside the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationStatus {
    /// As the catalog says it: `host:port`, or addresses with ports.
    pub place: String,
    /// Where connections go now.
    pub endpoints: Vec<SocketAddr>,
    /// Why there are none, or none that are new.
    pub problem: Option<String>,
}

/// The built-in certificate authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityStatus {
    /// The subject of the certificate that signs.
    pub subject: String,
    /// Until when it may.
    pub not_after: Timestamp,
    /// The subjects of the roots that are trusted.
    pub roots: Vec<String>,
    /// Why the last reload did not take over its files, until one does.
    pub problem: Option<String>,
}

/// A workload's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// The SPIFFE id in it.
    pub identity: String,
    /// The subject of the certificate that signed it; `None` if there is none yet.
    pub issuer: Option<String>,
    /// Until when it is good; `None` if there is none yet.
    pub not_after: Option<Timestamp>,
    /// When the next one is asked for.
    pub renew_at: Option<Timestamp>,
    /// Why the last attempt failed, until one succeeds.
    pub last_error: Option<String>,
}

/// How many connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ConnectionCounts {
    /// From local workloads.
    pub live_outbound: usize,
    /// To local workloads.
    pub live_inbound: usize,
    /// The most there may be in each direction.
    pub limit: usize,
}

/// Where the agent listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// What for: `capture`, `tunnel`, `metrics`, `dns`, `admin`.
    pub purpose: String,
    /// The address, or the path of a Unix socket.
    pub address: String,
    /// The network namespace, if it is not the agent's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
}

/// A configured workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// The service it is.
    pub service: String,
    /// How it is recognised, for example `unit redis.service`.
    pub rule: String,
    /// Whether what the rule names exists now.
    pub present: bool,
}

/// One live connection: the answer to `GET /connections` is a list of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Its number in this run of the agent.
    pub id: u64,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// The caller's SPIFFE id.
    pub source: Option<String>,
    /// The called service.
    pub destination: Option<String>,
    /// The chosen instance.
    pub instance: Option<String>,
    /// When it was accepted.
    pub started: Timestamp,
    /// Bytes towards the upstream so far.
    pub bytes_sent: u64,
    /// Bytes from the upstream so far.
    pub bytes_received: u64,
}
