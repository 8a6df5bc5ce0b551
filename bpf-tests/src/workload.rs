//! A workload: a place on a node in which programs run as a service.

use std::{
    ffi::OsStr,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{cgroup::Cgroup, namespace::Namespace, program::Program, programs};

/// What makes a process part of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A cgroup in the node's own network namespace, like a systemd unit.
    Cgroup,
    /// A network namespace of its own, like a container. Its cgroup says nothing of what it is.
    Netns,
    /// A user id, in a cgroup that it may share with others.
    User(u32),
}

/// A place on a node in which programs run as a service.
#[derive(Debug, Clone)]
pub struct Workload {
    pub(crate) name: String,
    pub(crate) cgroup: Cgroup,
    pub(crate) namespace: Namespace,
    pub(crate) user: Option<u32>,
    /// The address of its namespace that the node reaches: loopback if it has none of its own.
    pub(crate) address: IpAddr,
    pub(crate) directory: PathBuf,
}

impl Workload {
    /// Its name on the node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the node reaches what listens in it.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A directory for its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A program that runs in it.
    pub fn program(&self, name: impl AsRef<OsStr>) -> Program {
        let program = Program::new(name)
            .in_cgroup(&self.cgroup)
            .in_namespace(&self.namespace)
            .in_directory(&self.directory);
        match self.user {
            Some(user) => program.as_user(user, user),
            None => program,
        }
    }

    /// `sidestep-peer` in it, with the words of `arguments`.
    ///
    /// # Errors
    /// If that is not built.
    pub fn peer(&self, arguments: &str) -> Result<Program> {
        Ok(self
            .program(programs::peer()?)
            .args(arguments.split_whitespace()))
    }

    /// Runs `sidestep-peer` to its end and reads its report.
    ///
    /// # Errors
    /// If it fails or does not end in time.
    pub fn ask_peer(&self, arguments: &str, deadline: Duration) -> Result<Value> {
        let said = self.peer(arguments)?.run(deadline)?;
        serde_json::from_str(&said).with_context(|| format!("reading {said:?}"))
    }

    /// `curl` in it with the usual options of a script.
    pub fn curl(&self, url: &str) -> Program {
        self.program("curl").args([
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "20",
            url,
        ])
    }
}
