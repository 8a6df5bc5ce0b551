//! The lab with nothing configured but where Consul is: callers on node `a`, services on node `b`.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Api, Consul, HTTP, HTTPS, SOON};
use crate::{
    lab::Lab,
    mesh::local,
    node::Node,
    services::{self, Service},
    wait::wait_for_value,
    workload::{Kind, Workload},
};

/// The page that says what an agent's token must allow.
const PAGE: &str = include_str!("../../../docs/consul.md");

/// The least that an agent's token must allow: what docs/consul.md says.
///
/// # Errors
/// If the page has no such section.
pub fn policy() -> Result<&'static str> {
    documented(0)
}

/// The same for a node with the service `web` and no other.
///
/// # Errors
/// If the page has no such section.
pub fn narrow_policy() -> Result<&'static str> {
    documented(1)
}

/// The policies of the page, in their order.
fn documented(number: usize) -> Result<&'static str> {
    let section = PAGE.split("\n## The token\n").nth(1);
    let block = section.and_then(|section| section.split("```text\n").nth(number + 1));
    let rules = block.and_then(|block| block.split("```").next());
    rules.context("docs/consul.md has no policy")
}

/// Where the callers themselves listen: that is how an agent finds out who they are.
const SHOP: u16 = 7_001;
const GUEST: u16 = 7_002;

/// Callers on `a`, services on `b`. Services end before the lab does.
#[derive(Debug)]
pub struct ConsulMesh {
    services: Vec<Service>,
    /// Consul's agents.
    pub consul: Consul,
    /// The nodes.
    pub lab: Lab,
    /// A caller, on node `a`, known by the port that it listens at.
    pub shop: Workload,
    /// Another one.
    pub guest: Workload,
}

impl ConsulMesh {
    /// With [`Consul::dev`], and no service but the callers. The agents do not run yet.
    ///
    /// # Errors
    /// If Consul does not start.
    pub fn dev(purpose: &str) -> Result<Self> {
        Self::new(Lab::new(purpose)?, Consul::dev)
    }

    /// With [`Consul::cluster`], in which the agents may do what [`policy`] says. Everybody may call everybody.
    ///
    /// # Errors
    /// If Consul does not start.
    pub fn cluster(purpose: &str) -> Result<Self> {
        let mesh = Self::new(Lab::new(purpose)?, Consul::cluster)?;
        mesh.api().intend("*", "*", "allow")?;
        Ok(mesh)
    }

    /// With [`Consul::datacenters`]: the callers in `dc1`, the services in `dc2`.
    ///
    /// # Errors
    /// If Consul does not start.
    pub fn datacenters(purpose: &str) -> Result<Self> {
        Self::new(Lab::new(purpose)?, Consul::datacenters)
    }

    fn new(mut lab: Lab, start: impl FnOnce(&Lab) -> Result<Consul>) -> Result<Self> {
        let shop = lab.a.add_stranger("shop")?;
        let guest = lab.a.add_stranger("guest")?;
        let consul = start(&lab)?;
        let access = access(&lab, &consul)?;
        for node in [&mut lab.a, &mut lab.b] {
            node.use_consul(&access);
        }
        let mut mesh = Self {
            services: vec![],
            consul,
            lab,
            shop: shop.clone(),
            guest: guest.clone(),
        };
        for (workload, port) in [(shop, SHOP), (guest, GUEST)] {
            mesh.keep(services::peer(&workload, "echo", local(port), "")?);
            let name = workload.name();
            let api = mesh.consul.a().api();
            api.register(&json!({ "ID": name, "Name": name, "Port": port }))?;
        }
        Ok(mesh)
    }

    /// Makes the agent of node b the owner of a token with `rules`, in [`Consul::cluster`] and before it starts.
    /// Returns node b's API as that owner.
    ///
    /// # Errors
    /// If Consul refuses.
    pub fn use_token_on_b(&mut self, name: &str, rules: &str) -> Result<Api> {
        let file = token_file(&self.lab, &self.consul, name, rules)?;
        let access = access_with(&self.consul, &file)?;
        self.lab.b.use_consul(&access);
        let token = fs::read_to_string(&file)?;
        Ok(self.consul.b().api().clone().with_token(&token))
    }

    /// Makes the agent of node a reach its Consul by a Unix socket, in [`Consul::cluster`] and before it starts.
    ///
    /// # Errors
    /// If there is no token for it.
    pub fn use_socket_on_a(&mut self) -> Result<()> {
        let file = token_file(&self.lab, &self.consul, "socket", policy()?)?;
        let socket = Consul::socket(&self.lab.a);
        let (socket, file) = (socket.display(), file.display());
        let access = format!("address = \"unix://{socket}\"\ntoken_file = \"{file}\"");
        self.lab.a.use_consul(&access);
        Ok(())
    }

    /// The API of node a's agent, with every right.
    pub fn api(&self) -> &Api {
        self.consul.a().api()
    }

    /// A place on `b` for the instance `id`.
    ///
    /// # Errors
    /// As [`Node::add_stranger`].
    pub fn place(&mut self, id: &str) -> Result<Workload> {
        self.lab.b.add_stranger(id)
    }

    /// A place on `b` whose service is named in the configuration, as for one whose port nobody holds open.
    ///
    /// # Errors
    /// As [`Node::add_workload`].
    pub fn named_place(&mut self, service: &str, id: &str) -> Result<Workload> {
        self.lab.b.add_workload(service, id, Kind::Cgroup)
    }

    /// Keeps `service` running until the mesh goes.
    pub fn keep(&mut self, service: Service) {
        self.services.push(service);
    }

    /// Registers an instance of `service` on `b`, at a port of its loopback, with all of `more`.
    ///
    /// # Errors
    /// If Consul refuses.
    pub fn register(&self, service: &str, id: &str, port: u16, more: Value) -> Result<()> {
        let mut registration = json!({ "ID": id, "Name": service, "Port": port });
        if let (Some(all), Value::Object(more)) = (registration.as_object_mut(), more) {
            all.extend(more);
        }
        self.consul.b().api().register(&registration)
    }

    /// An echo server on `b` that is registered as `service`.
    ///
    /// # Errors
    /// If it does not start.
    pub fn echo(&mut self, service: &str, port: u16) -> Result<()> {
        let place = self.place(service)?;
        self.keep(services::peer(&place, "echo", local(port), "")?);
        self.register(service, service, port, Value::Null)
    }

    /// Starts both agents and waits until they are ready.
    ///
    /// # Errors
    /// As [`Lab::start_agents`].
    pub fn start(&mut self) -> Result<()> {
        self.lab.start_agents()
    }

    /// What `node` has of `service` in force: in the kernel, too, which hears of it after the status does. `None` if it
    /// is not known, or not yet there.
    pub fn in_force(&self, node: &Node, service: &str) -> Option<Value> {
        let status = node.status().ok()?;
        let services = status.get("services").and_then(Value::as_array)?;
        let found = services
            .iter()
            .find(|it| it.get("name").is_some_and(|name| name == service))?;
        let version = status.pointer("/catalog/version").and_then(Value::as_u64)?;
        let kernel = status.pointer("/catalog/kernel_version");
        let has = kernel.and_then(Value::as_u64)?;
        (has >= version).then(|| found.clone())
    }

    /// Waits until node a can call `service`. Returns its virtual address.
    ///
    /// # Errors
    /// If it does not come to that; with what the agents said.
    pub fn callable(&self, service: &str) -> Result<IpAddr> {
        let found = wait_for_value(&format!("{service} to be callable"), SOON, || {
            let Some(status) = self.in_force(&self.lab.a, service) else {
                return Ok(None);
            };
            let available = status.get("available").and_then(Value::as_u64);
            let address = status.pointer("/addresses/0").and_then(Value::as_str);
            Ok(address
                .filter(|_| available.is_some_and(|count| count > 0))
                .map(str::to_owned))
        });
        let address = found.with_context(|| self.said())?;
        address.parse().with_context(|| address.clone())
    }

    /// Where `service` takes tunnels, as Consul tells every peer.
    ///
    /// # Errors
    /// If no instance is healthy.
    pub fn tunnel_of(&self, service: &str) -> Result<SocketAddr> {
        let path = format!("health/connect/{service}?passing");
        wait_for_value(&format!("a healthy proxy of {service}"), SOON, || {
            let all = self.api().get(&path)?;
            let Some(first) = all.get(0) else {
                return Ok(None);
            };
            let text = |pointer: &str| first.pointer(pointer).and_then(Value::as_str);
            let own = text("/Service/Address").filter(|address| !address.is_empty());
            let address = own.or_else(|| text("/Node/Address")).unwrap_or_default();
            let port = first.pointer("/Service/Port").and_then(Value::as_u64);
            let address: IpAddr = address.parse().with_context(|| first.to_string())?;
            let port = u16::try_from(port.unwrap_or(0))?;
            Ok(Some(SocketAddr::new(address, port)))
        })
        .with_context(|| self.said())
    }

    /// Writes a file for `sidestep-peer` with a line for each: virtual address and the name that answers.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_targets(&self, targets: &[(IpAddr, &str)]) -> Result<PathBuf> {
        let lines: Vec<String> = targets
            .iter()
            .map(|(address, name)| format!("{} {name}\n", SocketAddr::new(*address, 80)))
            .collect();
        let file = self.lab.scratch().directory().join("targets");
        fs::write(&file, lines.concat()).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    /// What the agents said, for the reader of a failure.
    pub fn said(&self) -> String {
        let said = |node: &Node| {
            let log = node.access_log();
            let last = log.get(log.len().saturating_sub(3)..).unwrap_or_default();
            let (name, said) = (node.name(), node.agent_said());
            format!("agent of node {name}:\n{said}{}\n", last.join("\n"))
        };
        format!("{}\n{}", said(&self.lab.a), said(&self.lab.b))
    }
}

/// The table `[consul]` of both nodes.
fn access(lab: &Lab, consul: &Consul) -> Result<String> {
    if consul.tls().is_none() {
        return Ok(format!("address = \"{HTTP}\""));
    }
    access_with(consul, &token_file(lab, consul, "sidestep", policy()?)?)
}

/// The same, over HTTPS and with the token in `file`.
fn access_with(consul: &Consul, file: &Path) -> Result<String> {
    let tls = consul.tls().context("a Consul without ACLs")?;
    let mut access = format!("address = \"{HTTPS}\"\n");
    let files = [
        ("token_file", file),
        ("ca_file", &*tls.ca),
        ("certificate_file", &*tls.certificate),
        ("key_file", &*tls.key),
    ];
    for (key, file) in files {
        writeln!(access, "{key} = \"{}\"", file.display())?;
    }
    Ok(access)
}

/// A file with a token that counts already, for a policy `name` with `rules`.
fn token_file(lab: &Lab, consul: &Consul, name: &str, rules: &str) -> Result<PathBuf> {
    let token = consul.a().api().token(name, rules, &[])?;
    for agent in [consul.a(), consul.b()] {
        let api = agent.api().clone().with_token(&token);
        // A server that has not heard of it yet says that there is no such token.
        wait_for_value("a token that counts", SOON, || {
            Ok(api.get("agent/self").ok())
        })?;
    }
    let file = lab.scratch().directory().join(format!("token-{name}"));
    fs::write(&file, token).with_context(|| format!("writing {}", file.display()))?;
    Ok(file)
}
