//! The real Consul, with fields in its answers that only newer versions know.

use anyhow::Result;

use crate::{daemon::Daemon, mesh::local, node::Node};

const SCRIPT: &str = include_str!("newer.py");

/// Where it serves, and where it asks.
const PORTS: (u16, u16) = (8_700, 8_500);

/// Stands before a node's Consul agent, at [`NewerConsul::HTTP`]; ends when dropped.
#[derive(Debug)]
pub struct NewerConsul(Daemon);

impl NewerConsul {
    /// Where it serves the API.
    pub const HTTP: &str = "http://127.0.0.1:8700";

    /// In front of the agent on `node`.
    ///
    /// # Errors
    /// If it does not start; with what it said.
    pub fn start(node: &Node) -> Result<Self> {
        let (here, consul) = PORTS;
        let program = node.tool("python3")?.args(["-c", SCRIPT]);
        let program = program.args([here.to_string(), consul.to_string()]);
        let log = node.directory().join("newer-consul.log");
        let addresses = [local(here)];
        Daemon::start(
            "a newer Consul",
            &program,
            &log,
            node.namespace(),
            &addresses,
        )
        .map(Self)
    }

    /// What it has said.
    pub fn said(&self) -> String {
        self.0.said()
    }
}
