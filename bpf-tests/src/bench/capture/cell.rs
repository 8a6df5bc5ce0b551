//! One variant with one number of services: a namespace with a client, a server, and what captures between them.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::{CONNECT, Variant, number, rules, subject};
use crate::{
    bench::{
        machine::{self, Busy},
        recording::{Sample, Subject},
    },
    catalog::Instance,
    lab::Lab,
    mode::Mode,
    program::Running,
    programs,
    wait::{SOON, Stopwatch, wait_for},
    workload::{Kind, Workload},
};

/// Median latency of a `connect()` to what is not captured.
pub(super) const OTHERS: &str = "connect to what is not captured, p50";

/// For an agent with 100,000 services, or a change of one of them.
const PATIENCE: u64 = 180;

/// Services in one file of the catalog.
const PER_FILE: usize = 1_000;

/// How many clients there are where it is counted how many connects there can be.
const CLIENTS: u64 = 4;

/// Where programs listen that nobody captures.
const OTHER_PORT: u16 = 9100;

/// See the module. What runs in it ends before the lab is removed.
#[derive(Debug)]
pub(super) struct Cell {
    /// What this is.
    pub(super) subject: Subject,
    variant: Variant,
    servers: Vec<Running>,
    client: Workload,
    targets: PathBuf,
    others: PathBuf,
    /// One of the targets.
    target: SocketAddr,
    /// The service that the next change adds.
    next: u32,
    lab: Lab,
}

impl Cell {
    /// Sets it up. Returns it with what that took.
    ///
    /// # Errors
    /// If something does not start, or captures nothing.
    pub(super) fn new(variant: Variant, services: u32) -> Result<(Self, Vec<Sample>)> {
        ensure!(services > 0, "without services nothing is captured");
        let mut lab = Lab::new("capture")?;
        let client = lab.a.add_workload("shop", "shop", Kind::Cgroup)?;
        let is_direct = matches!(variant, Variant::None | Variant::NoneTracked);
        let address = |index| -> SocketAddr {
            if is_direct {
                rules::loopback(index).into()
            } else {
                rules::virtual_address(index).into()
            }
        };
        let write = |name: &str, addresses: &mut dyn Iterator<Item = SocketAddr>| {
            let file = client.directory().join(name);
            let lines = addresses.map(|address| format!("{address} it\n"));
            fs::write(&file, lines.collect::<String>())
                .with_context(|| format!("writing {}", file.display()))?;
            anyhow::Ok(file)
        };
        let other = SocketAddr::new(lab.a.address(), OTHER_PORT);
        let mut cell = Self {
            subject: subject(variant, services),
            variant,
            servers: vec![],
            targets: write("targets", &mut (0..services).map(address))?,
            others: write("others", &mut std::iter::once(other))?,
            target: address(services - 1),
            next: services,
            client,
            lab,
        };
        cell.serve("other", &format!("serve {other}"))?;
        let samples = cell.set_up(services)?;
        Ok((cell, samples))
    }

    fn set_up(&mut self, services: u32) -> Result<Vec<Sample>> {
        let namespace = self.lab.a.namespace().clone();
        if matches!(self.variant, Variant::NoneTracked | Variant::EbpfTracked) {
            rules::track(&namespace)?;
        }
        if self.agent_mode().is_none() {
            self.serve("plain", &format!("serve 0.0.0.0:{}", rules::PORT))?;
        }
        let before = machine::kernel_memory()?;
        let mut samples = vec![];
        if let Some((mode, port)) = self.agent_mode() {
            samples.extend(self.start_agent(mode, port, services)?);
        } else if self.variant == Variant::Nft {
            let clock = Stopwatch::start();
            rules::load(&namespace, self.lab.a.directory(), services)?;
            samples.push(seconds("load", clock.elapsed()));
        }
        if self.variant.is_tracked() {
            rules::forget_fast(&namespace)?;
        }
        if !self.is_direct() {
            let grown = machine::kernel_memory()?.saturating_sub(before);
            samples.push(mebibytes("kernel memory", grown));
        }
        Ok(samples)
    }

    fn is_direct(&self) -> bool {
        matches!(self.variant, Variant::None | Variant::NoneTracked)
    }

    /// By what the agent captures, and the port at which it then listens unless told otherwise.
    fn agent_mode(&self) -> Option<(Mode, u16)> {
        match self.variant {
            Variant::Ebpf | Variant::EbpfTracked => Some((Mode::Ebpf, 15001)),
            Variant::IptablesNft => Some((Mode::IptablesNft, 301)),
            Variant::IptablesLegacy => Some((Mode::IptablesLegacy, 301)),
            Variant::None | Variant::NoneTracked | Variant::Nft => None,
        }
    }

    /// Lets the agent set capture up, then stops it and puts a plain server in its place.
    fn start_agent(&mut self, mode: Mode, port: u16, services: u32) -> Result<Vec<Sample>> {
        let instances: Vec<Instance> = (0..services).map(|index| self.instance(index)).collect();
        for (number, some) in instances.chunks(PER_FILE).enumerate() {
            let file = format!("services-{number}");
            self.lab.catalog.write_instances(&file, some)?;
        }
        self.lab
            .catalog
            .write_intentions("*", &[("shop", "allow")])?;
        self.lab.a.set_mode(mode);
        self.lab.a.set_capture(&format!("port = {port}"));
        // Stopped is what it is going to be.
        self.lab.a.set_capture("hung_after = \"off\"");
        let trying = self.try_connecting(self.target)?;
        let clock = Stopwatch::start();
        self.lab.a.start_agent()?;
        let loaded = trying.wait(&self.lab, clock)?;
        self.lab.a.wait_until_ready()?;
        let cgroup = self.lab.a.cgroup().directory().join("agent");
        let agent = machine::processes(&cgroup)?;
        let agent = *agent.first().context("the agent has no process")?;
        let mut samples = vec![
            seconds("load", loaded),
            mebibytes("agent's resident memory", machine::resident(&cgroup)?),
        ];
        if mode == Mode::Ebpf {
            samples.push(mebibytes("memory of the maps", machine::maps(agent)?));
        }
        self.lab.a.signal_agent(Signal::STOP)?;
        self.serve("in-place", &format!("serve-for {agent} {port}"))?;
        Ok(samples)
    }

    fn instance(&self, index: u32) -> Instance {
        let name = format!("svc-{index}");
        Instance {
            service: name.clone(),
            id: name,
            node: self.lab.b.name().to_owned(),
            node_address: self.lab.b.address(),
            virtual_address: rules::virtual_address(index).into(),
            local: ([127, 0, 0, 1], 8080).into(),
            tunnel_port: None,
            meta: vec![],
            health: "passing",
        }
    }

    /// Starts a server that is no workload.
    fn serve(&mut self, name: &str, arguments: &str) -> Result<()> {
        let log = self.lab.a.directory().join(format!("serve-{name}.log"));
        let program = self.lab.a.tool(programs::peer()?)?;
        let program = program.args(arguments.split(' ')).log(&log);
        self.servers.push(program.spawn()?);
        let said = || fs::read_to_string(&log).unwrap_or_default();
        wait_for("a server to listen", SOON, || {
            said().contains("listening on")
        })
        .with_context(|| format!("{arguments}: {}", said()))
    }

    /// For people.
    pub(super) fn what(&self) -> String {
        let services = self.subject.services.unwrap_or_default();
        format!("{}, {services} services", self.subject.variant)
    }

    /// Connects to services drawn at random: one client at a time for latency, several for rate and processor time.
    ///
    /// # Errors
    /// If one fails.
    pub(super) fn connects(&self, time: Duration, seed: u64) -> Result<Vec<Sample>> {
        let one = self.connect(&self.targets, 1, time, seed)?;
        let before = Busy::now()?;
        let many = self.connect(&self.targets, CLIENTS, time, seed)?;
        let busy = Busy::now()?.since(before);
        let count = number(&many, "count")?;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / count;
        Ok(vec![
            Sample::new(CONNECT, "us", number(&one, "p50_us")?),
            Sample::new("connect, p99", "us", number(&one, "p99_us")?),
            Sample::new("connects per second", "1/s", number(&many, "per_second")?),
            Sample::new("kernel time per connect", "us", each(busy.kernel)),
            Sample::new("processor time per connect", "us", each(busy.all())),
        ])
    }

    /// Connects to an address that is nobody's virtual one.
    ///
    /// # Errors
    /// If one fails.
    pub(super) fn others(&self, time: Duration, seed: u64) -> Result<Vec<Sample>> {
        let one = self.connect(&self.others, 1, time, seed)?;
        let p99 = "connect to what is not captured, p99";
        Ok(vec![
            Sample::new(OTHERS, "us", number(&one, "p50_us")?),
            Sample::new(p99, "us", number(&one, "p99_us")?),
        ])
    }

    /// What goes over connections that are established.
    ///
    /// # Errors
    /// If one fails.
    pub(super) fn established(&self, time: Duration) -> Result<Vec<Sample>> {
        let target = self.target;
        let seconds = time.as_secs_f64();
        let turns = self.ask(&format!("turns {target} 1 {seconds} 8"), time)?;
        let bulk = self.ask(&format!("bulk {target} 1 {seconds}"), time)?;
        Ok(vec![
            Sample::new("round trip, p50", "us", number(&turns, "p50_us")?),
            Sample::new("round trip, p99", "us", number(&turns, "p99_us")?),
            Sample::new("bulk", "Gbit/s", number(&bulk, "per_second")? * 8e-9),
        ])
    }

    /// Adds a service, or replaces the one that was added before, and waits until connects to it are captured. Nothing for
    /// variants without capture.
    ///
    /// # Errors
    /// If they are not.
    pub(super) fn change(&mut self) -> Result<Vec<Sample>> {
        if self.is_direct() {
            return Ok(vec![]);
        }
        let index = self.next;
        self.next += 1;
        let has_agent = self.agent_mode().is_some();
        if has_agent {
            self.lab.a.signal_agent(Signal::CONT)?;
            self.lab.a.wait_until_ready()?;
        }
        let trying = self.try_connecting(rules::virtual_address(index).into())?;
        let clock = Stopwatch::start();
        if has_agent {
            let instance = self.instance(index);
            self.lab.catalog.write_instances("changed", &[instance])?;
        } else {
            rules::add(self.lab.a.namespace(), index)?;
        }
        let changed = trying.wait(&self.lab, clock)?;
        if has_agent {
            self.lab.a.signal_agent(Signal::STOP)?;
        }
        Ok(vec![seconds("change of one service", changed)])
    }

    fn connect(
        &self,
        file: &std::path::Path,
        clients: u64,
        time: Duration,
        seed: u64,
    ) -> Result<Value> {
        let (file, seconds) = (file.display(), time.as_secs_f64());
        self.ask(&format!("connects {file} {clients} {seconds} {seed}"), time)
    }

    fn ask(&self, arguments: &str, time: Duration) -> Result<Value> {
        self.client.ask_peer(arguments, time + SOON * 3)
    }

    fn try_connecting(&self, target: SocketAddr) -> Result<Trying> {
        let log = self.client.directory().join("until.log");
        // What an earlier one said is not about this one.
        fs::write(&log, "").with_context(|| format!("writing {}", log.display()))?;
        let peer = self.client.peer(&format!("until {target} {PATIENCE}"))?;
        let running = peer.log(&log).spawn()?;
        wait_for("a client to try", SOON, || {
            fs::read_to_string(&log).is_ok_and(|said| said.contains("trying"))
        })?;
        Ok(Trying { running, log })
    }
}

/// A client that tries to connect until it succeeds.
struct Trying {
    running: Running,
    log: PathBuf,
}

impl Trying {
    /// How long it took by `clock`.
    fn wait(mut self, lab: &Lab, clock: Stopwatch) -> Result<Duration> {
        let ended = self.running.wait(Duration::from_secs(PATIENCE) + SOON)?;
        let time = clock.elapsed();
        ensure!(
            ended.is_some_and(|status| status.success()),
            "{}; the agent said:\n{}",
            fs::read_to_string(&self.log).unwrap_or_default().trim(),
            lab.a.agent_said()
        );
        Ok(time)
    }
}

fn seconds(measure: &'static str, time: Duration) -> Sample {
    Sample::new(measure, "s", time.as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 bytes")]
fn mebibytes(measure: &'static str, bytes: u64) -> Sample {
    Sample::new(measure, "MiB", bytes as f64 / f64::from(1 << 20))
}
