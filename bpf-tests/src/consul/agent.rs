//! A Consul agent on a node: a server or a client.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::api::{Api, Tls};
use crate::{
    node::Node,
    program::{Program, Running},
    wait::{Stopwatch, pause},
};

/// Elections and joining take seconds on a busy machine.
pub(super) const READY: Duration = Duration::from_mins(1);

/// A Consul agent; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    name: String,
    program: Program,
    log: PathBuf,
    api: Api,
    running: Option<Running>,
}

/// Where an agent's API is, and how it is spoken to.
pub(super) struct Door<'a> {
    pub(super) base: &'a str,
    pub(super) tls: Option<&'a Tls>,
    pub(super) token: Option<&'a str>,
}

impl Agent {
    /// The agent `name` on `node`, with `arguments` and a configuration, as `consul agent` takes both. Not started.
    pub(super) fn new(
        node: &Node,
        name: &str,
        arguments: &[&str],
        configuration: &Value,
        door: &Door<'_>,
    ) -> Result<Self> {
        let directory = node.directory().join(format!("consul-{name}"));
        fs::create_dir_all(directory.join("data"))
            .with_context(|| format!("creating {}", directory.display()))?;
        let file = directory.join("agent.json");
        fs::write(&file, configuration.to_string())
            .with_context(|| format!("writing {}", file.display()))?;
        let program = node
            .tool("consul")?
            .args(["agent", "-node", name])
            .args(arguments)
            .arg("-config-file")
            .arg(&file)
            .arg("-data-dir")
            .arg(directory.join("data"))
            .in_directory(&directory);
        let api = Api::new(node, door.base, door.tls)?;
        Ok(Self {
            name: name.to_owned(),
            program,
            log: directory.join("agent.log"),
            api: match door.token {
                Some(token) => api.with_token(token),
                None => api,
            },
            running: None,
        })
    }

    /// Its name, which is that of its node in the catalog.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its API, with every right.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// What it has said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Starts it, also once more after [`Agent::kill`], with what it kept on disk. Returns at once.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        self.running = Some(self.program.clone().log(&self.log).spawn()?);
        Ok(())
    }

    /// Kills it, as a power cut would.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Waits until it knows a leader, the nodes of all of `names`, and roots.
    ///
    /// # Errors
    /// If it ends, or does not get there; with what it said.
    pub fn wait_until_ready(&mut self, names: &[&str]) -> Result<()> {
        let clock = Stopwatch::start();
        loop {
            let running = self.running.as_mut().context("it was not started")?;
            if let Some(status) = running.ended()? {
                bail!(
                    "Consul's agent {} ended with {status}:\n{}",
                    self.name,
                    self.said()
                );
            }
            match self.ready(names) {
                Ok(()) => return Ok(()),
                Err(error) if clock.elapsed() > READY => {
                    let said = self.said();
                    return Err(error.context(format!(
                        "Consul's agent {} is not ready after {READY:?}; it said:\n{said}",
                        self.name
                    )));
                }
                Err(_not_yet) => pause(Duration::from_millis(50)),
            }
        }
    }

    fn ready(&self, names: &[&str]) -> Result<()> {
        let leader = self.api.get("status/leader")?;
        if leader.as_str().is_none_or(str::is_empty) {
            bail!("there is no leader");
        }
        let nodes = self.api.get("catalog/nodes")?.to_string();
        for name in names {
            if !nodes.contains(&format!("\"Node\":\"{name}\"")) {
                bail!("{name} has not joined: {nodes}");
            }
        }
        self.api.active_root()?;
        if self.api.has_token() {
            // A new cluster begins with what ACLs were before 1.4, and refuses policies.
            self.api.get("acl/policies")?;
        }
        Ok(())
    }
}
