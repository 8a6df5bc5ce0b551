//! A node: a network namespace, a subtree of cgroups, an agent and workloads.
//!
//! ```text
//! cgroup  /RUN/NODE/agent           the agent
//!         /RUN/NODE/workloads       where connections are captured
//!         /RUN/NODE/workloads/NAME  a workload
//!         /RUN/NODE/tools           the test's own programs on the node
//! files   /run/sidestep-lab/RUN/NODE/{sidestep.toml,agent.log,access.log,state,admin.sock}
//! ```

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    cgroup::Cgroup,
    lab::TRUST_DOMAIN,
    mode::Mode,
    namespace::Namespace,
    program::{Program, Running},
    programs,
    scratch::Scratch,
    wait::{SOON, Stopwatch, pause, wait_for_value},
    workload::{Kind, Workload},
};

/// Where every agent serves its metrics, inside its own namespace.
pub const METRICS: &str = "127.0.0.1:15020";

/// Loading and verifying the programs takes a moment on a busy machine.
const START: Duration = Duration::from_mins(1);

/// What signs on a node, and whom the node trusts: `[identity.ca]`.
#[derive(Debug, Clone)]
pub struct Authority {
    /// The certificate that signs.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The roots.
    pub roots: Vec<PathBuf>,
}

impl Authority {
    /// The authority `name` in `directory`, under the root in `root`.
    pub(crate) fn in_directory(directory: &Path, name: &str, root: &Path) -> Result<Self> {
        let authority = Self {
            certificate: directory.join(format!("{name}.pem")),
            key: directory.join(format!("{name}-key.pem")),
            roots: vec![root.join("root.pem")],
        };
        ensure!(
            authority.certificate.is_file() && authority.key.is_file(),
            "{authority:?} has no files"
        );
        Ok(authority)
    }
}

/// A node with, at most, one agent.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    address: IpAddr,
    namespace: Namespace,
    cgroup: Cgroup,
    directory: PathBuf,
    bpffs: PathBuf,
    authority: Authority,
    catalog: PathBuf,
    workloads: Vec<String>,
    containers: Vec<Namespace>,
    mode: Mode,
    pins: bool,
    capture: Vec<String>,
    consul: Option<String>,
    settings: Vec<String>,
    program: Option<PathBuf>,
    agent: Option<Running>,
}

impl Node {
    pub(crate) fn new(
        scratch: &Scratch,
        name: &str,
        number: u8,
        address: IpAddr,
        namespace: Namespace,
        authority: Authority,
    ) -> Result<Self> {
        let cgroup = scratch.cgroup().child(name)?;
        cgroup.child("workloads")?;
        Ok(Self {
            name: name.to_owned(),
            number,
            address,
            namespace,
            cgroup,
            directory: scratch.subdirectory(name)?,
            bpffs: scratch.bpffs(&format!("{name}/bpf"))?,
            authority,
            catalog: scratch.directory().join("catalog"),
            workloads: vec![],
            containers: vec![],
            mode: Mode::chosen(),
            pins: true,
            capture: vec![],
            consul: None,
            settings: vec![],
            program: None,
            agent: None,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the wire.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its cgroup, with its agent's and those of its workloads below.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Where connections are captured: here and below.
    ///
    /// # Errors
    /// If the cgroup is gone and cannot be made.
    pub fn attach_point(&self) -> Result<Cgroup> {
        self.cgroup.child("workloads")
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds a workload that is `service`, in a cgroup called `name`. Before the agent starts.
    ///
    /// # Errors
    /// If its cgroup or namespace cannot be made.
    pub fn add_workload(&mut self, service: &str, name: &str, kind: Kind) -> Result<Workload> {
        let cgroup = self.cgroup.child(&format!("workloads/{name}"))?;
        let directory = self.directory.join(name);
        fs::create_dir_all(&directory)?;
        let mut workload = Workload {
            name: name.to_owned(),
            cgroup,
            namespace: self.namespace.clone(),
            user: None,
            address: Ipv4Addr::LOCALHOST.into(),
            directory,
        };
        let rule = match kind {
            Kind::Cgroup => format!("cgroup = \"{}\"", workload.cgroup.path()),
            Kind::User(user) => {
                workload.user = Some(user);
                format!("user = {user}")
            }
            Kind::Netns => {
                (workload.namespace, workload.address) = self.add_container(name)?;
                format!("netns = \"{}\"", workload.namespace.path().display())
            }
        };
        self.workloads
            .push(format!("[[workload]]\nservice = \"{service}\"\n{rule}\n"));
        Ok(workload)
    }

    /// A cgroup below the attach point that the configuration does not know.
    ///
    /// # Errors
    /// If its cgroup cannot be made.
    pub fn add_stranger(&mut self, name: &str) -> Result<Workload> {
        let workload = self.add_workload("stranger", name, Kind::Cgroup)?;
        self.workloads.pop();
        Ok(workload)
    }

    /// Adds lines to the end of the configuration, for instance a whole table.
    pub fn add_setting(&mut self, toml: &str) {
        self.settings.push(format!("{toml}\n"));
    }

    /// Changes what [`Node::add_setting`] added.
    pub fn replace_setting(&mut self, from: &str, to: &str) {
        for setting in &mut self.settings {
            *setting = setting.replace(from, to);
        }
    }

    /// Adds a key to the table `[capture]`.
    pub fn set_capture(&mut self, toml: &str) {
        self.capture.push(toml.to_owned());
    }

    /// Makes the agent take everything from Consul: `toml` is the table `[consul]`. What the node is called, where it
    /// is and who signs is not in its configuration any more.
    pub fn use_consul(&mut self, toml: &str) {
        self.consul = Some(toml.to_owned());
    }

    /// Makes the agent read another catalog than the other node's.
    pub fn use_catalog(&mut self, directory: &Path) {
        directory.clone_into(&mut self.catalog);
    }

    /// By what the agent is to capture.
    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }

    /// Makes the agent keep nothing in the kernel beyond its end.
    pub fn do_not_pin(&mut self) {
        self.pins = false;
    }

    /// What signs on this node.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Gives the node another authority. A running agent takes it over with [`Node::reload_agent`].
    pub fn set_authority(&mut self, authority: Authority) {
        self.authority = authority;
    }

    /// A program on the node that is no workload: its connections are not captured.
    ///
    /// # Errors
    /// If its cgroup cannot be made.
    pub fn tool(&self, program: impl AsRef<OsStr>) -> Result<Program> {
        Ok(Program::new(program)
            .in_cgroup(&self.cgroup.child("tools")?)
            .in_namespace(&self.namespace))
    }

    /// Makes this node start the agent at `path` instead of the one under test.
    pub fn use_agent(&mut self, path: PathBuf) {
        self.program = Some(path);
    }

    /// Starts the agent and returns at once.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_agent(&mut self) -> Result<()> {
        let configuration = self.write_configuration()?;
        let program = self.program.clone().map_or_else(programs::agent, Ok)?;
        let agent = Program::new(program)
            .args(["run", "--config"])
            .arg(&configuration)
            .in_cgroup(&self.agent_cgroup()?)
            .in_namespace(&self.namespace)
            .log(&self.log_file())
            .spawn()?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Writes the configuration as it is now and tells the agent to read it. Returns at once.
    ///
    /// # Errors
    /// If the file cannot be written or the agent has ended.
    pub fn reload_agent(&self) -> Result<()> {
        self.write_configuration()?;
        self.signal_agent(Signal::HUP)
    }

    fn write_configuration(&self) -> Result<PathBuf> {
        let configuration = self.configuration_file();
        fs::write(&configuration, self.configuration())
            .with_context(|| format!("writing {}", configuration.display()))?;
        Ok(configuration)
    }

    /// Waits until the agent answers, which it does when everything is in place.
    ///
    /// # Errors
    /// If it ends or is not ready in time; with what it said.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let clock = Stopwatch::start();
        loop {
            let agent = self.agent.as_mut().context("the agent was not started")?;
            if let Some(status) = agent.ended()? {
                bail!(
                    "the agent of node {} ended with {status}:\n{}",
                    self.name,
                    self.agent_said()
                );
            }
            match self.status() {
                Ok(_status) => return Ok(()),
                Err(error) if clock.elapsed() > START => {
                    return Err(error.context(format!(
                        "the agent of node {} is not ready after {START:?}; it said:\n{}",
                        self.name,
                        self.agent_said()
                    )));
                }
                Err(_not_yet) => pause(Duration::from_millis(20)),
            }
        }
    }

    /// What `sidestep status --json` says.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn status(&self) -> Result<Value> {
        let text = self
            .tool(programs::agent()?)?
            .args(["status", "--json", "--socket"])
            .arg(self.admin_socket())
            .run(SOON)?;
        serde_json::from_str(&text).with_context(|| format!("reading the status {text:?}"))
    }

    /// The agent's own command line for this node: `sidestep ARGUMENTS --config ...`.
    ///
    /// # Errors
    /// If the agent is not built.
    pub fn sidestep(&self, arguments: &[&str]) -> Result<Program> {
        Ok(self
            .tool(programs::agent()?)?
            .args(arguments)
            .arg("--config")
            .arg(self.configuration_file()))
    }

    /// What the status says of `service`.
    ///
    /// # Errors
    /// If the agent does not answer, or does not know the service.
    pub fn service(&self, name: &str) -> Result<Value> {
        let status = self.status()?;
        let services = status.get("services").and_then(Value::as_array);
        let mut services = services.into_iter().flatten();
        let found = services.find(|service| service.get("name").is_some_and(|it| it == name));
        let found = found.with_context(|| format!("node {} knows no {name}", self.name))?;
        Ok(found.clone())
    }

    /// The number of the catalog in use.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn catalog_version(&self) -> Result<u64> {
        self.status()?
            .pointer("/catalog/version")
            .and_then(Value::as_u64)
            .context("the status has no catalog version")
    }

    /// The agent's metrics in Prometheus' text format.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn metrics(&self) -> Result<String> {
        self.tool("curl")?
            .args(["--silent", "--show-error", "--fail", "--max-time", "10"])
            .arg(format!("http://{METRICS}/metrics"))
            .run(SOON)
    }

    /// The sum of a metric over the lines that contain all of `labels`.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(self
            .metrics()?
            .lines()
            .filter(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
                    && labels.iter().all(|label| line.contains(label))
            })
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    /// The lines of the access log so far.
    pub fn access_log(&self) -> Vec<String> {
        fs::read_to_string(self.access_log_file())
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Waits for a new line of the access log, after the first `seen`, that contains all of `words`.
    ///
    /// # Errors
    /// If there is none.
    pub fn wait_for_access_log(&self, seen: usize, words: &[&str]) -> Result<String> {
        wait_for_value(
            &format!(
                "a line with {words:?} in the access log of node {}",
                self.name
            ),
            SOON,
            || {
                let mut lines = self.access_log().into_iter().skip(seen);
                Ok(lines.find(|line| words.iter().all(|word| line.contains(word))))
            },
        )
    }

    /// What the agent said so far.
    pub fn agent_said(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// The processor time that the agent has used.
    ///
    /// # Errors
    /// If its cgroup is gone.
    pub fn agent_processor_time(&self) -> Result<Duration> {
        self.agent_cgroup()?.processor_time()
    }

    /// Tells the agent to read its configuration again.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal_agent(&self, signal: Signal) -> Result<()> {
        self.agent
            .as_ref()
            .context("the agent does not run")?
            .signal(signal)
    }

    /// Sets how many files the agent may open.
    ///
    /// # Errors
    /// If it has ended.
    pub fn limit_agent_files(&self, limit: u64) -> Result<()> {
        self.agent
            .as_ref()
            .context("the agent does not run")?
            .limit_open_files(limit)
    }

    /// Waits for the agent's end and returns its exit code.
    ///
    /// # Errors
    /// If it does not end.
    pub fn wait_for_agent_end(&mut self, deadline: Duration) -> Result<Option<i32>> {
        let agent = self.agent.as_mut().context("the agent does not run")?;
        let status = agent
            .wait(deadline)?
            .with_context(|| format!("the agent did not end within {deadline:?}"))?;
        self.agent = None;
        Ok(status.code())
    }

    /// Kills the agent.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// The configuration that the agent is started with.
    pub fn configuration_file(&self) -> PathBuf {
        self.directory.join("sidestep.toml")
    }

    /// The text of that configuration.
    pub fn configuration(&self) -> String {
        let directory = self.directory.display();
        let (facts, source) = match &self.consul {
            Some(consul) => (String::new(), format!("[consul]\n{consul}\n")),
            None => self.files(),
        };
        let mut text = format!(
            "\
[node]
{facts}
state_dir = \"{directory}/state\"

[capture]
mode = \"{mode}\"
cgroups = [\"{cgroup}/workloads\"]
pin_directory = \"{pins}\"
{capture}

{source}

[telemetry]
metrics = \"{METRICS}\"
access_log = \"{access_log}\"

[admin]
socket = \"{socket}\"

",
            mode = self.mode.as_str(),
            cgroup = self.cgroup.path(),
            pins = if self.pins {
                self.pin_directory().display().to_string()
            } else {
                "off".to_owned()
            },
            capture = self.capture.join("\n"),
            socket = self.admin_socket().display(),
            access_log = self.access_log_file().display(),
        );
        for part in self.settings.iter().chain(&self.workloads) {
            // Writing to a string does not fail.
            let _written = writeln!(text, "{part}");
        }
        text
    }

    /// What a node without Consul is told: of itself, and where catalog and identity come from.
    fn files(&self) -> (String, String) {
        let Authority {
            certificate,
            key,
            roots,
        } = &self.authority;
        let facts = format!(
            "name = \"{}\"\naddress = \"{}\"\ndatacenter = \"dc1\"",
            self.name, self.address
        );
        let source = format!(
            "\
[catalog]
directory = \"{catalog}\"

[identity]
trust_domain = \"{TRUST_DOMAIN}\"

[identity.ca]
certificate = \"{certificate}\"
key = \"{key}\"
roots = {roots:?}
",
            catalog = self.catalog.display(),
            certificate = certificate.display(),
            key = key.display(),
        );
        (facts, source)
    }

    /// Where the agent keeps its programs and maps.
    pub fn pin_directory(&self) -> PathBuf {
        self.bpffs.join("sidestep")
    }

    /// Where the agent answers `sidestep status`.
    pub fn admin_socket(&self) -> PathBuf {
        self.directory.join("admin.sock")
    }

    fn agent_cgroup(&self) -> Result<Cgroup> {
        self.cgroup.child("agent")
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    fn access_log_file(&self) -> PathBuf {
        self.directory.join("access.log")
    }

    /// A namespace that only the node reaches, as a container's.
    fn add_container(&mut self, name: &str) -> Result<(Namespace, IpAddr)> {
        let scratch_directory = self.directory.parent().context("a node without a run")?;
        let container = Namespace::create_in(scratch_directory, &format!("{}-{name}", self.name))?;
        let count = u8::try_from(self.containers.len())?;
        let device = format!("pod{count}");
        self.namespace.join(&device, &container, "eth0")?;
        let network = self.number * 100 + count;
        let address = |host| IpAddr::V4(Ipv4Addr::new(10, 77, network, host));
        self.namespace.add_address(&device, address(1))?;
        container.add_address("eth0", address(2))?;
        self.containers.push(container.clone());
        Ok((container, address(2)))
    }
}
