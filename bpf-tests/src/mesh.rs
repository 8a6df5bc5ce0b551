//! The lab as most tests want it: clients on node `a`, services on node `b`.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use crate::{
    catalog::Instance,
    lab::Lab,
    scratch::Scratch,
    services::Service,
    workload::{Kind, Workload},
};

/// Clients on `a`, services on `b`. Services end before the lab does.
#[derive(Debug)]
pub struct Mesh {
    services: Vec<Service>,
    instances: Vec<Instance>,
    /// The nodes and their catalog.
    pub lab: Lab,
    /// A client, on node `a` in a cgroup.
    pub shop: Workload,
    /// Another one.
    pub guest: Workload,
}

impl Mesh {
    /// A lab with the clients `shop` and `guest` and no service.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn new(purpose: &str) -> Result<Self> {
        let mut lab = Lab::new(purpose)?;
        Ok(Self {
            shop: lab.a.add_workload("shop", "shop", Kind::Cgroup)?,
            guest: lab.a.add_workload("guest", "guest", Kind::Cgroup)?,
            services: vec![],
            instances: vec![],
            lab,
        })
    }

    /// The run.
    pub fn scratch(&self) -> &Scratch {
        self.lab.scratch()
    }

    /// A place on `b` for the instance `id` of `service`.
    ///
    /// # Errors
    /// As [`crate::node::Node::add_workload`].
    pub fn place(&mut self, service: &str, id: &str, kind: Kind) -> Result<Workload> {
        self.lab.b.add_workload(service, id, kind)
    }

    /// Keeps `service` running until the mesh goes.
    pub fn keep(&mut self, service: Service) {
        self.services.push(service);
    }

    /// Ends the services that were kept.
    pub fn end_services(&mut self) {
        self.services.clear();
    }

    /// Registers an instance on `b`: reached at `vip`, delivered to `local`. To be written by [`Mesh::start`].
    pub fn register(&mut self, service: &str, id: &str, vip: SocketAddr, local: SocketAddr) {
        self.instances.push(Instance {
            service: service.to_owned(),
            id: id.to_owned(),
            node: self.lab.b.name().to_owned(),
            node_address: self.lab.b.address(),
            virtual_address: vip,
            local,
            tunnel_port: None,
            meta: vec![],
            health: "passing",
        });
    }

    /// The instances, to be changed before they are written again.
    pub fn instances(&mut self) -> &mut Vec<Instance> {
        &mut self.instances
    }

    /// Where the instance `id` is delivered to.
    pub fn registered(&self, id: &str) -> Option<SocketAddr> {
        let instance = self.instances.iter().find(|instance| instance.id == id)?;
        Some(instance.local)
    }

    /// Writes the instances, with an intention that lets `shop` call everything, and starts both agents.
    ///
    /// # Errors
    /// As [`Lab::start_agents`].
    pub fn start(&mut self) -> Result<()> {
        self.lab
            .catalog
            .write_instances("services", &self.instances)?;
        self.lab
            .catalog
            .write_intentions("*", &[("shop", "allow")])?;
        self.lab.start_agents()
    }

    /// Writes the instances as they are now and waits for the agents to have taken them over.
    ///
    /// # Errors
    /// As [`Lab::change_catalog`].
    pub fn publish(&self) -> Result<()> {
        self.lab
            .change_catalog(|catalog| catalog.write_instances("services", &self.instances))
    }

    /// Writes a file for `sidestep-peer` with a line for every instance: virtual address and id.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_targets(&self) -> Result<PathBuf> {
        let lines: Vec<String> = self
            .instances
            .iter()
            .map(|instance| format!("{} {}\n", instance.virtual_address, instance.id))
            .collect();
        let file = self.scratch().directory().join("targets");
        fs::write(&file, lines.concat()).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }
}

/// The virtual address of test service number `index`, with its `port`.
pub fn vip(index: u16, port: u16) -> SocketAddr {
    let [high, low] = index.to_be_bytes();
    (Ipv4Addr::new(240, 9, high, low), port).into()
}

/// `port` of the node's own loopback.
pub fn local(port: u16) -> SocketAddr {
    (IpAddr::V4(Ipv4Addr::LOCALHOST), port).into()
}
