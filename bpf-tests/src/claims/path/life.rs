//! Endpoints, catalogs, configurations and agents that come and go.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::{
    capture::{bytes, read, text},
    policy::live,
};
use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    mode::Mode,
    services,
    wait::{SOON, wait_for, wait_for_value},
    workload::Kind,
};

pub(super) fn a_host_like_this_is_accepted(_size: Size) -> Result<Finding> {
    let mesh = Mesh::new("check")?;
    let configuration = mesh.lab.a.configuration_file();
    fs::write(&configuration, mesh.lab.a.configuration())?;
    let output = mesh.lab.a.sidestep(&["check"])?.output(SOON)?;
    let lines = output
        .stdout
        .lines()
        .filter(|line| !line.is_empty())
        .count();
    ensure!(
        output.succeeded(),
        "{}: {}{}",
        output.code_text(),
        output.stdout,
        output.stderr
    );
    Ok(Finding::new(true, format!("{lines} lines, exit code 0")))
}

/// The top of the hierarchy is closed to processes without `CAP_DAC_OVERRIDE`, also to those of root.
pub(super) fn the_agent_makes_its_own_cgroup(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("own-cgroup")?;
    let above = mesh.lab.a.cgroup().child("closed")?;
    fs::set_permissions(above.directory(), Permissions::from_mode(0o555))?;
    let own = format!("{}/agent", above.path());
    mesh.lab
        .a
        .add_setting(&format!("[agent]\ncgroup = \"{own}\""));
    mesh.start()?;
    let status = mesh.lab.a.status()?;
    let process = status.get("process").and_then(Value::as_u64);
    let process = process.context("no process id")?;
    let membership = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    let is_in = |line: &str| line.starts_with("0::") && line.ends_with(&own);
    Ok(Finding::new(
        membership.lines().any(is_in),
        format!("process {process} is in {}", membership.trim()),
    ))
}

pub(super) fn load_follows_health(size: Size) -> Result<Finding> {
    let requests = size.pick(40_u32, 400);
    let mut mesh = web_with_two_instances("spread")?;
    mesh.start()?;
    let both = spread(&mesh, requests)?;
    set_health(&mut mesh, ["critical", "passing"])?;
    let one = spread(&mesh, requests)?;
    set_health(&mut mesh, ["critical", "critical"])?;
    // The status has the catalog a moment before the kernel.
    let none = wait_for_value("calls to be refused", SOON, || {
        let report = read(&mesh.shop, &vip(1, 80).to_string())?;
        let refused = report.get("connected") == Some(&false.into());
        Ok(refused.then(|| text(&report, "end")))
    })?;
    set_health(&mut mesh, ["passing", "passing"])?;
    let again = spread(&mesh, requests)?;
    // Two random choices out of two leave either side a fifth with near certainty.
    let fair = |counts: &BTreeMap<String, u32>| {
        counts.len() == 2 && counts.values().all(|count| count * 5 >= requests)
    };
    let only_second = one.len() == 1 && one.contains_key("web-2");
    Ok(Finding::new(
        fair(&both) && only_second && none == "ECONNREFUSED" && fair(&again),
        format!("{both:?}; one sick: {one:?}; both sick: {none}; well again: {again:?}"),
    ))
}

pub(super) fn a_dead_instance_costs_no_connection(size: Size) -> Result<Finding> {
    let requests = size.pick(20_u32, 200);
    let mut mesh = web_with_two_instances("dead")?;
    if let Some(dead) = mesh.instances().first_mut() {
        // The other node has no listener there.
        dead.tunnel_port = Some(9);
        "c".clone_into(&mut dead.node);
    }
    mesh.start()?;
    let counts = spread(&mesh, requests)?;
    let good = counts.get("web-2").copied().unwrap_or(0);
    Ok(Finding::new(
        good == requests,
        format!("{good} of {requests} succeed with half of the instances dead"),
    ))
}

pub(super) fn a_broken_file_changes_nothing(_size: Size) -> Result<Finding> {
    let mut mesh = web_with_two_instances("broken")?;
    mesh.start()?;
    let problem = mesh.lab.break_catalog(|catalog| {
        catalog.write("services.yaml", "service: { name: web, port: \n")
    })?;
    let counts = spread(&mesh, 10)?;
    let good: u32 = counts.values().sum();
    let named = problem.contains("services.yaml");
    Ok(Finding::new(
        good == 10 && named,
        format!("{good} of 10 calls succeed; status: {problem}"),
    ))
}

pub(super) fn a_bad_reload_changes_nothing(_size: Size) -> Result<Finding> {
    let mut mesh = web_with_two_instances("reload")?;
    let newcomer = mesh.lab.a.add_stranger("newcomer")?;
    mesh.start()?;
    let file = mesh.lab.a.configuration_file();
    let good = fs::read_to_string(&file)?;
    let before = mesh.lab.a.agent_said().len();

    fs::write(
        &file,
        good.clone() + "[limits]\nmax_connections = \"many\"\n",
    )?;
    mesh.lab.a.signal_agent(Signal::HUP)?;
    let complaint = wait_for_value("the agent to complain", SOON, || {
        let said = mesh.lab.a.agent_said();
        let mut new = said.get(before..).unwrap_or_default().lines();
        Ok(new
            .find(|line| line.contains("max_connections"))
            .map(str::to_owned))
    })?;
    let still: u32 = spread(&mesh, 10)?.values().sum();

    let rule = format!(
        "[[workload]]\nservice = \"shop\"\ncgroup = \"{}\"\n",
        newcomer.cgroup().path()
    );
    fs::write(&file, good + &rule)?;
    mesh.lab.a.signal_agent(Signal::HUP)?;
    let url = format!("http://{}/", vip(1, 80));
    wait_for_value("the newcomer to be known", SOON, || {
        Ok(newcomer.curl(&url).output(SOON)?.succeeded().then_some(()))
    })?;
    Ok(Finding::new(
        still == 10 && complaint.contains("sidestep.toml"),
        format!("{still} of 10 calls after a bad one; a new workload calls after a good one"),
    ))
}

pub(super) fn decisions_are_logged_while_asked_for(_size: Size) -> Result<Finding> {
    let mut mesh = web_with_two_instances("debug")?;
    mesh.lab.a.set_capture("debug = true");
    if Mode::chosen() != Mode::Ebpf {
        return debug_is_refused(&mut mesh);
    }
    mesh.start()?;
    let expected = format!("connect to ::ffff:{} port 80: captured", vip(1, 80).ip());
    let decided = |mesh: &Mesh| mesh.lab.a.agent_said().matches(&expected).count();
    spread(&mesh, 3)?;
    let logged = wait_for_value("three decisions in the log", SOON, || {
        Ok((decided(&mesh) >= 3).then(|| decided(&mesh)))
    })
    .with_context(|| mesh.lab.a.agent_said())?;
    let handed_over = mesh.lab.a.agent_said().matches(": moved").count();

    let file = mesh.lab.a.configuration_file();
    let quiet = fs::read_to_string(&file)?.replace("debug = true", "debug = false");
    fs::write(&file, quiet)?;
    mesh.lab.a.signal_agent(Signal::HUP)?;
    wait_for("the configuration to be reloaded", SOON, || {
        mesh.lab.a.agent_said().contains("configuration reloaded")
    })?;
    spread(&mesh, 3)?;
    let after = decided(&mesh);
    Ok(Finding::new(
        // The agent's own probes are handed over too.
        logged == 3 && handed_over >= 3 && after == 3,
        format!(
            "{logged} of 3 connects and {handed_over} hand-overs logged, {after} in all after 3 more without"
        ),
    ))
}

/// Rules log nothing, and the agent says so.
fn debug_is_refused(mesh: &mut Mesh) -> Result<Finding> {
    mesh.lab.a.start_agent()?;
    let code = mesh.lab.a.wait_for_agent_end(SOON)?;
    let said = mesh.lab.a.agent_said();
    Ok(Finding::new(
        code == Some(64) && said.contains("capture.debug"),
        format!("only with eBPF: exit code {code:?}, {}", said.trim()),
    ))
}

pub(super) fn every_connection_is_counted_once(size: Size) -> Result<Finding> {
    const METRIC: &str = "sidestep_connections_total";
    let calls = size.pick(50_u32, 500);
    let mut mesh = web_with_two_instances("count")?;
    mesh.start()?;
    let reached: u32 = spread(&mesh, calls)?.values().sum();
    ensure!(
        reached == calls,
        "only {reached} of {calls} calls succeeded"
    );
    let denied = read(&mesh.guest, &vip(1, 80).to_string())?;
    ensure!(bytes(&denied) == 0, "the guest was not denied");

    // The denied one does not reach the other side.
    let expected = [
        ("outbound", &mesh.lab.a, calls + 1),
        ("inbound", &mesh.lab.b, calls),
    ];
    let (mut holds, mut seen) = (true, vec![]);
    for (direction, node, expected) in expected {
        let label = format!("direction=\"{direction}\"");
        let counted = wait_for_value("the last count", SOON, || {
            let counted = node.metric(METRIC, &[&label])?;
            Ok((counted >= f64::from(expected)).then_some(counted))
        })?;
        let lines = wait_for_value("the last line", SOON, || {
            let lines = u32::try_from(node.access_log().len())?;
            Ok((lines >= expected).then_some(lines))
        })?;
        holds &= lines == expected && (counted - f64::from(expected)).abs() < 0.5;
        for step in ["connect", "handshake"] {
            let metric = format!("sidestep_{step}_duration_seconds_count");
            // A denied call gets to neither step outbound.
            holds &= (node.metric(&metric, &[&label])? - f64::from(calls)).abs() < 0.5;
        }
        seen.push(format!(
            "{direction}: {lines} lines, {counted} counted of {expected}"
        ));
    }
    let peer = format!("peer={}:", mesh.lab.b.address());
    let peers = mesh
        .lab
        .a
        .access_log()
        .iter()
        .filter(|line| line.contains(&peer))
        .count();
    holds &= peers == calls as usize;
    Ok(Finding::new(holds, seen.join("; ")))
}

pub(super) fn a_stop_drains(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("drain")?;
    let place = mesh.place("chat", "chat-1", Kind::Cgroup)?;
    mesh.register("chat", "chat-1", vip(1, 80), local(8080));
    mesh.keep(services::peer(&place, "echo", local(8080), "")?);
    mesh.lab.a.add_setting("[limits]\ndrain_timeout = \"20s\"");
    mesh.start()?;

    let mut client = live(&mesh.shop)?;
    mesh.lab.a.signal_agent(Signal::TERM)?;
    let refusal = wait_for_value("new connections to be refused", SOON, || {
        let report = read(&mesh.guest, &vip(1, 80).to_string())?;
        let end = text(&report, "end");
        Ok((report.get("connected") == Some(&false.into())).then_some(end))
    })?;
    let alive = client.ended()?.is_none();
    client.kill();
    let code = mesh
        .lab
        .a
        .wait_for_agent_end(Duration::from_secs(15))
        .with_context(|| format!("it said:\n{}", mesh.lab.a.agent_said()))?;
    Ok(Finding::new(
        alive && code == Some(0),
        format!(
            "a live connection {}, new ones get {refusal}, then exit code {code:?}",
            if alive { "goes on" } else { "was cut" }
        ),
    ))
}

/// Two web servers on `b`: `web-1` in a cgroup, `web-2` in a namespace of its own.
fn web_with_two_instances(purpose: &str) -> Result<Mesh> {
    let mut mesh = Mesh::new(purpose)?;
    for (id, kind) in [("web-1", Kind::Cgroup), ("web-2", Kind::Netns)] {
        let place = mesh.place("web", id, kind)?;
        let address = (place.address(), 8080).into();
        mesh.register("web", id, vip(1, 80), address);
        mesh.keep(services::http(&place, address, id)?);
    }
    Ok(mesh)
}

fn set_health(mesh: &mut Mesh, health: [&'static str; 2]) -> Result<()> {
    for (instance, health) in mesh.instances().iter_mut().zip(health) {
        instance.health = health;
    }
    mesh.publish()
}

/// Calls `requests` times and counts the answers.
fn spread(mesh: &Mesh, requests: u32) -> Result<BTreeMap<String, u32>> {
    let url = format!("http://{}/", vip(1, 80));
    let mut counts = BTreeMap::new();
    for _ in 0..requests {
        let output = mesh.shop.curl(&url).output(SOON)?;
        if output.succeeded() {
            *counts.entry(output.stdout.trim().to_owned()).or_default() += 1;
        }
    }
    Ok(counts)
}
