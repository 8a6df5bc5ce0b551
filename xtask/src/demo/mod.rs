//! `cargo xtask demo`: a newcomer sees a connection go through the mesh.

mod consul;

use std::{collections::BTreeMap, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    cgroup,
    mesh::{Mesh, local, vip},
    node::METRICS,
    programs, scratch, services,
    wait::{SOON, pause},
    wire::Capture,
    workload::{Kind, Workload},
};

use crate::{
    build, host,
    progress::{Step, say},
};

/// See [`crate::Command::Demo`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Leave everything running for exploring, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// With a real Consul: services, identities and intentions are there, and peers know nothing of Sidestep.
    #[arg(long)]
    consul: bool,
    /// End demos that were left running, and remove what they made.
    #[arg(long, conflicts_with = "keep")]
    clean: bool,
}

/// The text to look for on the wire.
const SECRET: &str = "the-secret-of-the-shop";

/// So many calls are spread over two instances.
const CALLS: u32 = 20;

/// Exits with 0 only if every step did what it says.
///
/// # Errors
/// The first step that does not.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.clean {
        return clean();
    }
    if !host::is_root() {
        bail!("needs root: it makes network namespaces and loads eBPF programs");
    }
    if arguments.consul {
        return consul::run(arguments.keep);
    }
    say("Sidestep's demo: two nodes, an agent on each, and programs that know nothing of it.\n");
    prepare()?;
    let mut demo = Demo::start()?;
    demo.show()?;
    if arguments.keep {
        demo.keep();
    }
    say("\nEvery step did what it says. Cleaning up.");
    Ok(ExitCode::SUCCESS)
}

/// Finds, installs and builds.
fn prepare() -> Result<()> {
    host::require(&["ip", "curl", "tcpdump"])?;
    // Real services if they are to be had; the demo has something to show without them.
    if let Err(error) = host::require(&["nginx"]) {
        say(format_args!(
            "      no nginx, Python's web server serves: {error:#}"
        ));
        host::require(&["python3"])?;
    }
    if let Err(error) = host::require(&["redis-server", "redis-cli"]) {
        say(format_args!("      no Redis: {error:#}"));
    }
    build::ebpf_programs()?;
    build::agent_and_peer()
}

/// The nodes and who is on them.
struct Demo {
    steps: u32,
    mesh: Mesh,
    container: Workload,
    redis: bool,
}

impl Demo {
    fn start() -> Result<Self> {
        let step = Step::begin("making two nodes, starting services and agents");
        let mut mesh = Mesh::new("demo")?;
        let container = mesh
            .lab
            .a
            .add_workload("shop", "shop-container", Kind::Netns)?;
        let mut what = "";
        for (id, kind) in [("web-1", Kind::Cgroup), ("web-2", Kind::Netns)] {
            let place = mesh.place("web", id, kind)?;
            let address = (place.address(), 8080).into();
            mesh.register("web", id, vip(80, 80), address);
            let service = services::http(&place, address, &format!("hello from {id}"))?;
            what = service.what;
            mesh.keep(service);
        }
        let redis = host::missing(&["redis-server", "redis-cli"]).is_empty();
        if redis {
            let place = mesh.place("redis", "redis-1", Kind::Cgroup)?;
            mesh.register("redis", "redis-1", vip(6379, 6379), local(6379));
            mesh.keep(services::redis(&place, local(6379))?);
        }
        mesh.start()?;
        step.done();
        say(format_args!(
            "
  node a 10.77.0.1                       node b 10.77.0.2
    shop            a cgroup               web-1  {what} in a cgroup, 127.0.0.1:8080
    shop-container  its own namespace      web-2  {what} in its own namespace, {web2}:8080
    guest           a cgroup             {redis}
  An intention lets shop call everything; nobody else may call anything.
  web has the virtual address {web}: no interface has it and no route leads there.",
            web2 = container_address(&mesh),
            redis = if redis {
                "  redis  redis-server, 127.0.0.1:6379"
            } else {
                ""
            },
            web = vip(80, 80),
        ));
        Ok(Self {
            steps: 0,
            mesh,
            container,
            redis,
        })
    }

    fn show(&mut self) -> Result<()> {
        self.a_call_works()?;
        self.a_call_is_denied()?;
        self.load_is_spread()?;
        self.a_container_calls()?;
        if self.redis {
            self.redis_answers()?;
        }
        self.the_wire_is_tls()?;
        self.an_intention_changes()?;
        self.it_left_numbers()
    }

    fn a_call_works(&mut self) -> Result<()> {
        self.title("shop calls web at its virtual address, with plain curl");
        let answer = self.curl(&self.mesh.shop.clone())?;
        ensure!(
            answer.starts_with("hello from web-"),
            "another answer: {answer:?}"
        );
        Ok(())
    }

    fn a_call_is_denied(&mut self) -> Result<()> {
        self.title("guest may not: no intention allows it");
        let seen = self.mesh.lab.a.access_log().len();
        let guest = self.mesh.guest.clone();
        let output = guest.curl(&url("")).output(SOON)?;
        shell("guest", &format!("curl {}", url("")));
        said(&output.stderr);
        ensure!(
            !output.succeeded() && output.stdout.is_empty(),
            "the guest was not denied but got {:?}",
            output.stdout
        );
        let line = self
            .mesh
            .lab
            .a
            .wait_for_access_log(seen, &["guest", "denied"])?;
        say("    The agent's access log says why:");
        said(&line);
        Ok(())
    }

    fn load_is_spread(&mut self) -> Result<()> {
        self.title(&format!(
            "{CALLS} calls of shop are spread over both instances"
        ));
        let mut counts = BTreeMap::<String, u32>::new();
        for _ in 0..CALLS {
            let answer = self.mesh.shop.curl(&url("")).run(SOON)?;
            *counts.entry(answer.trim().to_owned()).or_default() += 1;
        }
        for (answer, count) in &counts {
            said(&format!("{count:3} times {answer}"));
        }
        ensure!(counts.len() == 2, "one instance got everything");
        Ok(())
    }

    fn a_container_calls(&mut self) -> Result<()> {
        self.title("the same from a network namespace of its own, which has no route to anywhere");
        let answer = self.curl(&self.container.clone())?;
        ensure!(
            answer.starts_with("hello from web-"),
            "another answer: {answer:?}"
        );
        Ok(())
    }

    fn redis_answers(&mut self) -> Result<()> {
        self.title("redis-cli stores and reads");
        let address = vip(6379, 6379).ip().to_string();
        for (command, expected) in [("set greeting hello", "OK"), ("get greeting", "hello")] {
            let redis_cli = self.mesh.shop.program("redis-cli").args(["-h", &address]);
            let answer = redis_cli.args(command.split(' ')).run(SOON)?;
            shell("shop", &format!("redis-cli -h {address} {command}"));
            said(&answer);
            ensure!(answer.trim() == expected, "another answer: {answer:?}");
        }
        Ok(())
    }

    fn the_wire_is_tls(&mut self) -> Result<()> {
        self.title("what tcpdump sees between the nodes is TLS");
        let capture = Capture::start(&self.mesh.lab.a, "tcp")?;
        let query = format!("?{SECRET}");
        let answer = self.mesh.shop.curl(&url(&query)).run(SOON)?;
        shell("shop", &format!("curl {}", url(&query)));
        said(&answer);
        let wire = capture.stop()?;
        let records = wire.tls_records()?;
        ensure!(
            records > 0,
            "no TLS record with data among {} bytes",
            wire.len()
        );
        ensure!(
            !wire.contains(SECRET) && !wire.contains("hello from"),
            "question or answer went over the wire in the clear"
        );
        said(&format!(
            "{} bytes, every one in a TLS record; {records} records with data",
            wire.len()
        ));
        said(&format!("{SECRET:?} and \"hello from\" are not among them"));
        Ok(())
    }

    fn an_intention_changes(&mut self) -> Result<()> {
        self.title("an intention for guest is written to the catalog, and guest may call");
        let allow = [("shop", "allow"), ("guest", "allow")];
        self.mesh
            .lab
            .change_catalog(|catalog| catalog.write_intentions("web", &allow))?;
        let answer = self.curl(&self.mesh.guest.clone())?;
        ensure!(
            answer.starts_with("hello from web-"),
            "another answer: {answer:?}"
        );
        Ok(())
    }

    fn it_left_numbers(&mut self) -> Result<()> {
        self.title("and the metrics it left, on node a");
        shell("node a", &format!("curl http://{METRICS}/metrics"));
        let metrics = self.mesh.lab.a.metrics()?;
        let name = "sidestep_connections_total{";
        let mut lines: Vec<&str> = metrics
            .lines()
            .filter(|line| line.starts_with(name))
            .collect();
        lines.sort_unstable();
        for line in &lines {
            said(line);
        }
        ensure!(
            lines
                .iter()
                .any(|line| line.contains("shop") && line.contains("web")),
            "no count of shop's calls to web"
        );
        ensure!(
            lines
                .iter()
                .any(|line| line.contains("guest") && line.contains("denied")),
            "no count of guest's denied call"
        );
        Ok(())
    }

    fn title(&mut self, text: &str) {
        self.steps += 1;
        say(format_args!("\n{}. {text}", self.steps));
    }

    fn curl(&self, workload: &Workload) -> Result<String> {
        shell(workload.name(), &format!("curl {}", url("")));
        let answer = workload
            .curl(&url(""))
            .run(SOON)
            .with_context(|| format!("node a's agent said:\n{}", self.mesh.lab.a.agent_said()))?;
        said(&answer);
        Ok(answer)
    }

    /// Says how to explore, and waits until somebody ends it.
    fn keep(&self) {
        let mount = cgroup::mount().unwrap_or_default();
        let run = self.mesh.scratch().name();
        let directory = self.mesh.scratch().directory().display();
        let agent = programs::agent().unwrap_or_default();
        let web = vip(80, 80).ip();
        say(format_args!(
            "
Everything stays. In another shell, as root:

  # be shop on node a: its cgroup, the node's network namespace
  sh -c 'echo $$ > {mount}/{run}/a/workloads/shop/cgroup.procs
         exec nsenter --net={directory}/netns/a bash'
  curl http://{web}/

  # what the agents say
  {agent} status --socket {directory}/a/admin.sock
  nsenter --net={directory}/netns/a curl http://{METRICS}/metrics
  tail -f {directory}/[ab]/access.log {directory}/[ab]/agent.log

  # change what is allowed, or who is there: the agents watch
  ls {directory}/catalog

  # the wire
  nsenter --net={directory}/netns/a tcpdump -ni mesh0 -A

Ctrl-C here ends it, and so does `cargo xtask demo --clean` elsewhere.",
            mount = mount.display(),
            agent = agent.display(),
        ));
        until_removed(self.mesh.scratch().directory());
    }
}

/// Waits until somebody removes the run, whose directory this is.
fn until_removed(directory: &Path) {
    while directory.exists() {
        pause(std::time::Duration::from_millis(300));
    }
}

/// Removes demos of other processes, running or not.
fn clean() -> Result<ExitCode> {
    let mut count = 0;
    for run in scratch::runs()? {
        if run.starts_with("sidestep-demo-") {
            scratch::remove(&run)?;
            say(format_args!("removed {run}"));
            count += 1;
        }
    }
    say(format_args!("{count} demos ended"));
    Ok(ExitCode::SUCCESS)
}

fn container_address(mesh: &Mesh) -> String {
    let address = mesh.registered("web-2").map(|address| address.ip());
    address.map_or_else(String::new, |address| address.to_string())
}

fn url(query: &str) -> String {
    format!("http://{}/{query}", vip(80, 80).ip())
}

fn shell(who: &str, command: &str) {
    say(format_args!("    {who}$ {command}"));
}

fn said(text: &str) {
    for line in text.trim().lines() {
        say(format_args!("      {line}"));
    }
}
