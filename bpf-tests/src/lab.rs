//! A run with one certificate authority, one catalog and nodes that are joined by veth.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    catalog::Catalog,
    namespace::Namespace,
    node::{Authority, Node},
    program::Program,
    programs,
    scratch::Scratch,
    wait::{SOON, wait_for_value},
};

/// The device that leads from a node to the other one: what a packet capture listens to.
pub const DEVICE: &str = "mesh0";

/// The trust domain of all identities, in the form that Consul gives it.
pub const TRUST_DOMAIN: &str = "5ca1ab1e-0000-4000-8000-000000000001.consul";

/// How long a change of the catalog may take to be in force on a busy machine.
const APPLIED: Duration = Duration::from_secs(20);

/// Two nodes, `a` and `b`, in namespaces of their own; neither runs an agent yet.
#[derive(Debug)]
pub struct Lab {
    /// The first node, by custom the one of clients.
    pub a: Node,
    /// The second node, by custom the one of services.
    pub b: Node,
    /// What both agents read.
    pub catalog: Catalog,
    /// Dropped last: it removes what the others were in.
    scratch: Scratch,
}

impl Lab {
    /// Makes the run, the certificate authority and the nodes; `purpose` becomes part of the run's name.
    ///
    /// # Errors
    /// Without root, or if the agent is not built.
    pub fn new(purpose: &str) -> Result<Self> {
        let scratch = Scratch::new(purpose)?;
        let catalog = Catalog::new(scratch.subdirectory("catalog")?);
        let authority = make_root(&scratch.subdirectory("ca")?)?;
        let [a, b] = ["a", "b"].map(|name| Namespace::create(&scratch, name));
        let (a, b) = (a?, b?);
        a.join(DEVICE, &b, DEVICE)?;
        let nodes = [(1, "a", a), (2, "b", b)].map(|(number, name, namespace)| {
            let address = IpAddr::V4(Ipv4Addr::new(10, 77, 0, number));
            let address6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into());
            namespace.add_address(DEVICE, address)?;
            namespace.add_address(DEVICE, address6.into())?;
            Node::new(
                &scratch,
                name,
                number,
                address,
                namespace,
                authority.clone(),
            )
        });
        let [a, b] = nodes;
        Ok(Self {
            a: a?,
            b: b?,
            catalog,
            scratch,
        })
    }

    /// The run.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Starts both agents and waits until they are ready.
    ///
    /// # Errors
    /// If one ends or does not become ready; with what it said.
    pub fn start_agents(&mut self) -> Result<()> {
        self.a.start_agent()?;
        self.b.start_agent()?;
        self.a.wait_until_ready()?;
        self.b.wait_until_ready()
    }

    /// Lets `change` write to the catalog and waits until both agents have taken it over.
    ///
    /// # Errors
    /// Those of `change`; or if an agent does not take it over.
    pub fn change_catalog(&self, change: impl FnOnce(&Catalog) -> Result<()>) -> Result<()> {
        let nodes = [&self.a, &self.b];
        let before = nodes.map(Node::catalog_version);
        change(&self.catalog)?;
        for (node, before) in nodes.into_iter().zip(before) {
            let before = before?;
            wait_for_value(
                &format!("node {} to take over the catalog", node.name()),
                APPLIED,
                || Ok((node.catalog_version()? > before).then_some(())),
            )?;
        }
        Ok(())
    }

    /// Like [`Lab::change_catalog`] for a change which both agents must refuse and report.
    ///
    /// # Errors
    /// Those of `change`; or if an agent reports no problem.
    pub fn break_catalog(&self, change: impl FnOnce(&Catalog) -> Result<()>) -> Result<String> {
        change(&self.catalog)?;
        let mut said = String::new();
        for node in [&self.a, &self.b] {
            said = wait_for_value(
                &format!("node {} to report a problem", node.name()),
                APPLIED,
                || {
                    let status = node.status()?;
                    let problems = status.pointer("/catalog/problems");
                    let first = problems.and_then(|problems| problems.get(0)?.as_str());
                    Ok(first.map(str::to_owned))
                },
            )?;
        }
        Ok(said)
    }
}

/// `sidestep ca init`, as a user would do it.
pub(crate) fn make_root(directory: &Path) -> Result<Authority> {
    Program::new(programs::agent()?)
        .args(["ca", "init", "--trust-domain", TRUST_DOMAIN])
        .arg("--directory")
        .arg(directory)
        .run(SOON)
        .context("making a root")?;
    Authority::in_directory(directory, "root", directory)
}

/// `sidestep ca intermediate` for a node, by the root in `root`, written to `output`.
pub(crate) fn make_intermediate(root: &Path, node: &str, output: &Path) -> Result<Authority> {
    Program::new(programs::agent()?)
        .args(["ca", "intermediate", "--trust-domain", TRUST_DOMAIN])
        .args(["--node", node, "--directory"])
        .arg(root)
        .arg("--output")
        .arg(output)
        .run(SOON)
        .with_context(|| format!("making the intermediate of node {node}"))?;
    Authority::in_directory(output, node, root)
}
