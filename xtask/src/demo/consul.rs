//! `cargo xtask demo --consul`: two nodes that know nothing but where Consul is.

use std::{net::IpAddr, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    cgroup,
    consul::{BuiltInProxy, ConsulMesh, HTTP, sidecar_for},
    forward::forward,
    mesh::local,
    programs, services,
    wait::{SOON, wait_for_value},
    workload::Workload,
};
use serde_json::{Value, json};

use super::{said, shell, until_removed};
use crate::{
    build, host,
    progress::{Step, say},
};

/// Where Consul's own proxies are, and where one leads to `web`.
const SIDECAR_OF_BILLING: u16 = 21_001;
const SIDECAR_OF_OLD: u16 = 21_002;
const TO_WEB: u16 = 9_191;

/// Exits with 0 only if every step did what it says.
pub(super) fn run(keep: bool) -> Result<ExitCode> {
    if !host::is_root() {
        bail!("needs root: it makes network namespaces and loads eBPF programs");
    }
    say("Sidestep's demo with Consul: two nodes, Consul and an agent of Sidestep on each.\n");
    host::require(&["ip", "curl", "consul", "python3"])?;
    build::ebpf_programs()?;
    build::agent_and_peer()?;
    let mut demo = Demo::start()?;
    demo.show()?;
    if keep {
        demo.keep();
    }
    say("\nEvery step did what it says. Cleaning up.");
    Ok(ExitCode::SUCCESS)
}

/// The nodes and who is on them.
struct Demo {
    steps: u32,
    /// Sidecars of Consul's own, which know nothing of Sidestep.
    sidecars: Vec<BuiltInProxy>,
    mesh: ConsulMesh,
    web: IpAddr,
}

impl Demo {
    fn start() -> Result<Self> {
        let step = Step::begin("starting Consul, services and agents");
        let mut mesh = ConsulMesh::dev("demo")?;
        for (id, port) in [("web-1", 8_081), ("web-2", 8_082)] {
            let place = mesh.place(id)?;
            mesh.keep(services::http(
                &place,
                local(port),
                &format!("hello from {id}"),
            )?);
            mesh.register("web", id, port, Value::Null)?;
        }
        mesh.start()?;
        let web = mesh.callable("web")?;
        step.done();
        let ui = forward(mesh.lab.a.namespace(), local(8_500))?;
        say(format_args!(
            "
  node a 10.77.0.1                       node b 10.77.0.2
    Consul 1.8.7, the server               Consul 1.8.7, a client
    shop   a cgroup                        web-1  in a cgroup, 127.0.0.1:8081
    guest  a cgroup                        web-2  in a cgroup, 127.0.0.1:8082
  Consul's UI: http://{ui}/ui
  This is all that Sidestep is told on both nodes, beside paths of this demo:

    [consul]
    address = \"{HTTP}\""
        ));
        Ok(Self {
            steps: 0,
            sidecars: vec![],
            mesh,
            web,
        })
    }

    fn show(&mut self) -> Result<()> {
        self.a_call_works()?;
        self.peers_are_told()?;
        self.a_sidecar_calls()?;
        self.a_sidecar_is_called()?;
        self.an_intention_is_written()
    }

    fn a_call_works(&mut self) -> Result<()> {
        self.title("web is registered at Consul like any service; shop calls it with plain curl");
        shell("node b", "consul catalog services");
        said(
            &self
                .mesh
                .consul
                .command(&self.mesh.lab.b, &["catalog", "services"])?
                .run(SOON)?,
        );
        let node = &self.mesh.lab.a;
        let status = node.service("web")?;
        shell(
            "node a",
            "sidestep status --json | jq '.services[] | select(.name == \"web\")'",
        );
        said(&status.to_string());
        self.expect_hello(&self.mesh.shop.clone(), &format!("http://{}/", self.web))
    }

    fn peers_are_told(&mut self) -> Result<()> {
        self.title(
            "Sidestep has registered where each instance takes mutual TLS: sidecars find it",
        );
        shell("node a", "curl /v1/health/connect/web");
        let entries = self.mesh.api().get("health/connect/web")?;
        let entries = entries.as_array().context("no list of instances")?;
        ensure!(entries.len() == 2, "other instances: {entries:?}");
        for entry in entries {
            let service = entry.get("Service").context("no service")?;
            let text = |key: &str| service.get(key).cloned().unwrap_or_default();
            said(&format!(
                "{} {} at port {}",
                text("Kind"),
                text("ID"),
                text("Port")
            ));
        }
        Ok(())
    }

    fn a_sidecar_calls(&mut self) -> Result<()> {
        self.title("billing, behind Consul's built-in proxy on node a, calls web as ever");
        let upstreams = sidecar_for(&self.mesh.lab.a, SIDECAR_OF_BILLING, &[("web", TO_WEB)]);
        self.mesh.api().register(&json!({
            "ID": "billing", "Name": "billing", "Port": 7_003, "Connect": upstreams,
        }))?;
        let (node, api) = (&self.mesh.lab.a, self.mesh.api());
        let proxy = BuiltInProxy::start(node, api, "billing", &[local(TO_WEB)])?;
        self.sidecars.push(proxy);
        let billing = self.mesh.lab.a.tool("curl")?;
        let url = format!("http://{}/", local(TO_WEB));
        shell("billing", &format!("curl {url}"));
        let answer = billing
            .args(["--silent", "--show-error", "--fail", &url])
            .run(SOON)?;
        said(&answer);
        ensure!(
            answer.starts_with("hello from web-"),
            "another answer: {answer:?}"
        );
        Ok(())
    }

    fn a_sidecar_is_called(&mut self) -> Result<()> {
        self.title(
            "legacy, behind Consul's built-in proxy on node b, is called by shop without a sidecar",
        );
        let place = self.mesh.place("legacy")?;
        self.mesh
            .keep(services::http(&place, local(8_083), "hello from legacy")?);
        let sidecar = sidecar_for(&self.mesh.lab.b, SIDECAR_OF_OLD, &[]);
        self.mesh
            .register("legacy", "legacy", 8_083, json!({ "Connect": sidecar }))?;
        let listens = (self.mesh.lab.b.address(), SIDECAR_OF_OLD).into();
        let api = self.mesh.consul.b().api();
        let proxy = BuiltInProxy::start(&self.mesh.lab.b, api, "legacy", &[listens])?;
        self.sidecars.push(proxy);
        let legacy = self.mesh.callable("legacy")?;
        self.expect_hello(&self.mesh.shop.clone(), &format!("http://{legacy}/"))
    }

    fn an_intention_is_written(&mut self) -> Result<()> {
        self.title(
            "an intention is written with Consul's own tool, and takes hold of guest at once",
        );
        let guest = self.mesh.guest.clone();
        let url = format!("http://{}/", self.web);
        self.expect_hello(&guest, &url)?;
        let arguments = ["intention", "create", "-deny", "guest", "web"];
        shell("node a", &format!("consul {}", arguments.join(" ")));
        said(
            &self
                .mesh
                .consul
                .command(&self.mesh.lab.a, &arguments)?
                .run(SOON)?,
        );
        let seen = self.mesh.lab.a.access_log().len();
        // Node b may hear of it first; what the caller's own node says is the better story.
        let (refused, line) = wait_for_value("the intention to be in force", SOON, || {
            let output = guest.curl(&url).output(SOON)?;
            let log = self.mesh.lab.a.access_log();
            let mut new = log.into_iter().skip(seen);
            let line = new.find(|line| line.contains("guest") && line.contains("outcome=denied"));
            Ok(line.map(|line| (output, line)))
        })?;
        shell("guest", &format!("curl {url}"));
        said(&refused.stderr);
        say("    The agent's access log says why:");
        said(&line);
        Ok(())
    }

    fn expect_hello(&self, workload: &Workload, url: &str) -> Result<()> {
        shell(workload.name(), &format!("curl {url}"));
        let answer = workload
            .curl(url)
            .run(SOON)
            .with_context(|| self.mesh.said())?;
        said(&answer);
        ensure!(
            answer.starts_with("hello from "),
            "another answer: {answer:?}"
        );
        Ok(())
    }

    fn title(&mut self, text: &str) {
        self.steps += 1;
        say(format_args!("\n{}. {text}", self.steps));
    }

    /// Says how to explore, and waits until somebody ends it.
    fn keep(&self) {
        let mount = cgroup::mount().unwrap_or_default();
        let scratch = self.mesh.lab.scratch();
        say(format_args!(
            "
Everything stays, and Consul's UI shows it. In another shell, as root:

  # be shop on node a: its cgroup, the node's network namespace
  sh -c 'echo $$ > {mount}/{run}/a/workloads/shop/cgroup.procs
         exec nsenter --net={directory}/netns/a bash'
  curl http://{web}/

  # Consul's own tool, and what the agents say
  nsenter --net={directory}/netns/a {consul} intention list
  {agent} status --socket {directory}/a/admin.sock
  tail -f {directory}/[ab]/access.log {directory}/[ab]/agent.log

Ctrl-C here ends it, and so does `cargo xtask demo --clean` elsewhere.",
            mount = mount.display(),
            run = scratch.name(),
            directory = scratch.directory().display(),
            web = self.web,
            consul = programs::find("consul").unwrap_or_default().display(),
            agent = programs::agent().unwrap_or_default().display(),
        ));
        until_removed(scratch.directory());
    }
}
