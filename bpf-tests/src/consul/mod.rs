//! The real Consul on the nodes of a lab: each node has an agent of its own, at [`HTTP`] or [`HTTPS`].
//!
//! ```text
//! dev      node a: the only server, in memory     node b: a client agent
//! cluster  node a: a client agent, and three      node b: a client agent
//!          servers at addresses of their own
//! ```
//!
//! The agents run beside the workloads, in the cgroup of the test's tools; their files are in
//! `NODE/consul-NAME`.

#![expect(
    clippy::indexing_slicing,
    reason = "there are as many agents as were made; JSON objects take every key"
)]

mod agent;
mod api;
mod faults;
mod mesh;
mod newer;
mod proxy;

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use self::agent::{Door, READY};
pub use self::{
    agent::Agent,
    api::{Answer, Api, Leaf, Tls},
    faults::{Canned, Fault, Faults, Rule},
    mesh::{ConsulMesh, narrow_policy, policy},
    newer::NewerConsul,
    proxy::{BuiltInProxy, sidecar_for},
};
use crate::{
    lab::{DEVICE, Lab},
    node::Node,
    program::Program,
    wait::wait_for_value,
};

/// What waits for Consul or for its answers: it tries again after up to 30 seconds.
pub const SOON: Duration = Duration::from_mins(1);

/// Where each node's agent serves its API in [`Consul::dev`].
pub const HTTP: &str = "http://127.0.0.1:8500";

/// Where each node's agent serves its API in [`Consul::cluster`].
pub const HTTPS: &str = "https://127.0.0.1:8501";

/// Every right in [`Consul::cluster`].
const MANAGEMENT: &str = "5ca1ab1e-0000-4000-8000-00000000acce";

/// How many servers [`Consul::cluster`] has.
const SERVERS: u8 = 3;

/// Consul on the nodes of a lab; ends when dropped.
#[derive(Debug)]
pub struct Consul {
    /// Servers first; the last is node b's.
    agents: Vec<Agent>,
    servers: usize,
    /// Which of them is node a's.
    on_a: usize,
    tls: Option<Tls>,
}

impl Consul {
    /// `consul agent -dev` on node a and a client agent on node b: HTTP, everything allowed.
    ///
    /// # Errors
    /// If they do not start; with what they said.
    pub fn dev(lab: &Lab) -> Result<Self> {
        let door = Door {
            base: HTTP,
            tls: None,
            token: None,
        };
        let bind = |node: &Node| format!("-bind={}", node.address());
        let (bind_a, bind_b) = (bind(&lab.a), bind(&lab.b));
        let quiet = ["-log-level=info"];
        let a = [&["-dev", bind_a.as_str()], quiet.as_slice()].concat();
        let join = format!("-retry-join={}", lab.a.address());
        let b = [
            &[bind_b.as_str(), join.as_str(), "-retry-interval=1s"],
            quiet.as_slice(),
        ]
        .concat();
        let consul = Self {
            agents: vec![
                Agent::new(&lab.a, "a", &a, &json!({}), &door)?,
                Agent::new(&lab.b, "b", &b, &json!({}), &door)?,
            ],
            servers: 1,
            on_a: 0,
            tls: None,
        };
        consul.start()
    }

    /// A datacenter on each node, both in memory: `dc1` on node a, the primary one, and `dc2` on node b. HTTP,
    /// everything allowed.
    ///
    /// # Errors
    /// If they do not start or do not find each other; with what they said.
    pub fn datacenters(lab: &Lab) -> Result<Self> {
        let door = Door {
            base: HTTP,
            tls: None,
            token: None,
        };
        let server = |node: &Node, datacenter: &str| {
            let bind = format!("-bind={}", node.address());
            let arguments = ["-dev", &bind, "-log-level=info", "-dns-port=-1"];
            let configuration = json!({
                "datacenter": datacenter,
                "primary_datacenter": "dc1",
                "retry_join_wan": [lab.a.address()],
                "retry_interval_wan": "1s",
            });
            Agent::new(node, node.name(), &arguments, &configuration, &door)
        };
        let mut consul = Self {
            agents: vec![server(&lab.a, "dc1")?, server(&lab.b, "dc2")?],
            servers: 1,
            on_a: 0,
            tls: None,
        };
        for agent in &mut consul.agents {
            agent.start()?;
            let own = agent.name().to_owned();
            agent.wait_until_ready(&[&own])?;
        }
        wait_for_value("one trust domain", READY, || {
            let trust_domain = |agent: &Agent| agent.api().trust_domain();
            let is_one = trust_domain(consul.a())? == trust_domain(consul.b())?;
            Ok(is_one.then_some(()))
        })?;
        Ok(consul)
    }

    /// Three servers and a client agent on each node: HTTPS with certificates on both sides, ACLs that deny what they
    /// do not allow. The clients serve their API at [`Consul::socket`], too. What [`Consul::a`] and the others' APIs do
    /// they do with every right.
    ///
    /// # Errors
    /// If they do not start; with what they said.
    pub fn cluster(lab: &Lab) -> Result<Self> {
        let tls = make_certificates(&lab.scratch().subdirectory("consul-tls")?)?;
        let servers: Vec<IpAddr> = (0..SERVERS)
            .map(|index| IpAddr::V4(Ipv4Addr::new(10, 77, 0, 11 + index)))
            .collect();
        let mut agents = vec![];
        for (index, address) in servers.iter().enumerate() {
            lab.a.namespace().add_address(DEVICE, *address)?;
            let mut configuration = cluster_configuration(&tls, "server", *address, &servers);
            configuration["server"] = true.into();
            configuration["bootstrap_expect"] = SERVERS.into();
            configuration["connect"] = json!({ "enabled": true });
            configuration["client_addr"] = address.to_string().into();
            configuration["acl"]["tokens"]["master"] = MANAGEMENT.into();
            let base = format!("https://{address}:8501");
            let name = format!("server-{index}");
            agents.push(Agent::new(
                &lab.a,
                &name,
                &[],
                &configuration,
                &door(&base, &tls),
            )?);
        }
        for node in [&lab.a, &lab.b] {
            let mut configuration = cluster_configuration(&tls, "client", node.address(), &servers);
            let socket = format!("unix://{}", Self::socket(node).display());
            configuration["addresses"] = json!({ "http": socket });
            // There is no such listener for it without a port.
            configuration["ports"]["http"] = 8_500.into();
            let door = door(HTTPS, &tls);
            agents.push(Agent::new(node, node.name(), &[], &configuration, &door)?);
        }
        let consul = Self {
            agents,
            servers: servers.len(),
            on_a: servers.len(),
            tls: Some(tls),
        };
        consul.start()
    }

    /// Where a node's client agent has its API as a Unix socket, in [`Consul::cluster`].
    pub fn socket(node: &Node) -> PathBuf {
        node.directory().join("consul.sock")
    }

    fn start(mut self) -> Result<Self> {
        for agent in &mut self.agents {
            agent.start()?;
        }
        self.wait_until_ready()?;
        Ok(self)
    }

    /// Waits until every agent knows a leader, all others and the roots.
    ///
    /// # Errors
    /// If one ends or does not get there; with what it said.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let names: Vec<String> = self
            .agents
            .iter()
            .map(|agent| agent.name().to_owned())
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.agents
            .iter_mut()
            .try_for_each(|agent| agent.wait_until_ready(&names))
    }

    /// The agent of node a.
    pub fn a(&self) -> &Agent {
        &self.agents[self.on_a]
    }

    /// The agent of node b.
    pub fn b(&self) -> &Agent {
        &self.agents[self.agents.len() - 1]
    }

    /// The servers.
    pub fn servers(&mut self) -> &mut [Agent] {
        &mut self.agents[..self.servers]
    }

    /// The files of a client of the API in [`Consul::cluster`].
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// `consul` with `arguments`, on `node`, for that node's agent and with every right.
    ///
    /// # Errors
    /// As [`Node::tool`].
    pub fn command(&self, node: &Node, arguments: &[&str]) -> Result<Program> {
        let program = node.tool("consul")?.args(arguments);
        let Some(tls) = &self.tls else {
            return Ok(program.env("CONSUL_HTTP_ADDR", HTTP));
        };
        Ok(program
            .env("CONSUL_HTTP_ADDR", HTTPS)
            .env("CONSUL_HTTP_TOKEN", MANAGEMENT)
            .env("CONSUL_CACERT", &tls.ca)
            .env("CONSUL_CLIENT_CERT", &tls.certificate)
            .env("CONSUL_CLIENT_KEY", &tls.key))
    }

    /// Which server leads, once one does.
    ///
    /// # Errors
    /// If none comes to lead.
    pub fn leader(&self) -> Result<usize> {
        wait_for_value("a leader", READY, || {
            let leads = |agent: &Agent| {
                let own = agent.api().get("agent/self").ok()?;
                let leads = own.pointer("/Stats/consul/leader")? == "true";
                leads.then_some(())
            };
            let servers = self.agents.iter().take(self.servers);
            Ok(servers
                .into_iter()
                .position(|server| leads(server).is_some()))
        })
    }
}

fn door<'a>(base: &'a str, tls: &'a Tls) -> Door<'a> {
    Door {
        base,
        tls: Some(tls),
        token: Some(MANAGEMENT),
    }
}

fn cluster_configuration(tls: &Tls, role: &str, address: IpAddr, servers: &[IpAddr]) -> Value {
    let directory = tls.ca.parent().unwrap_or(Path::new("/"));
    json!({
        "bind_addr": address.to_string(),
        "retry_join": servers,
        "retry_interval": "1s",
        "log_level": "info",
        // As quick as `-dev` is: the machine holds all of them.
        "performance": { "raft_multiplier": 1 },
        "ports": { "http": -1, "https": 8501, "dns": -1, "serf_wan": -1 },
        "verify_incoming": true,
        "verify_outgoing": true,
        "verify_server_hostname": true,
        "ca_file": tls.ca,
        "cert_file": certificate(directory, role),
        "key_file": key(directory, role),
        "acl": {
            "enabled": true,
            "default_policy": "deny",
            // A changed policy is in force within a second, not half a minute.
            "policy_ttl": "1s",
            "token_ttl": "1s",
            "tokens": { "agent": MANAGEMENT },
        },
    })
}

/// Consul's own tool makes them: an authority, a certificate for servers and one for clients.
fn make_certificates(directory: &Path) -> Result<Tls> {
    let consul = |arguments: &[&str]| {
        Program::new("consul")
            .args(["tls"])
            .args(arguments)
            .in_directory(directory)
            .run(SOON)
            .context("making Consul's certificates")
    };
    consul(&["ca", "create"])?;
    for role in ["server", "client"] {
        let mut arguments = vec![
            "cert",
            "create",
            if role == "server" {
                "-server"
            } else {
                "-client"
            },
        ];
        let addresses: Vec<String> = (0..SERVERS)
            .map(|index| format!("-additional-ipaddress=10.77.0.{}", 11 + index))
            .collect();
        arguments.extend(addresses.iter().map(String::as_str));
        consul(&arguments)?;
    }
    Ok(Tls {
        ca: directory.join("consul-agent-ca.pem"),
        certificate: certificate(directory, "client"),
        key: key(directory, "client"),
    })
}

fn certificate(directory: &Path, role: &str) -> PathBuf {
    directory.join(format!("dc1-{role}-consul-0.pem"))
}

fn key(directory: &Path, role: &str) -> PathBuf {
    directory.join(format!("dc1-{role}-consul-0-key.pem"))
}
