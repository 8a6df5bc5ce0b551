//! While there is no agent, or one that hangs.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::web::{self, serves};
use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    node::Node,
    program::{Program, Running},
    services,
    wait::{SOON, Stopwatch, wait_for_value},
    workload::Kind,
};

/// A real address, outside of every virtual range, with a server of its own on the caller's node.
const REAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 80);

/// Of the agents that are to hang.
const HUNG_AFTER: Duration = Duration::from_secs(2);

fn links(node: &Node) -> Result<BTreeSet<u64>> {
    let status = node.status()?;
    let attachments = status.get("attachments").and_then(Value::as_array);
    let attachments = attachments.with_context(|| format!("no attachments in {status}"))?;
    Ok(attachments
        .iter()
        .filter_map(|attachment| attachment.get("link_id").and_then(Value::as_u64))
        .collect())
}

pub(super) fn a_killed_agent_fails_closed(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("killed")?;
    mesh.start()?;
    let (before, first) = (links(&mesh.lab.a)?, serves(&mesh)?);
    mesh.lab.a.kill_agent();
    let away = web::connect(&mesh)?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let (after, second) = (links(&mesh.lab.a)?, serves(&mesh)?);
    Ok(Finding::new(
        first && away == "ECONNREFUSED" && second && before == after && !after.is_empty(),
        format!(
            "served before: {first}, while away: {away}, served after: {second}, links before {before:?} and after {after:?}"
        ),
    ))
}

pub(super) fn a_broken_catalog_at_start_takes_nothing_away(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("partly")?;
    mesh.start()?;
    mesh.lab.a.kill_agent();
    let file = mesh.lab.catalog.directory().join("services.yaml");
    let good = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    fs::write(&file, "service: { name: web, port: \n")?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    // Not EHOSTUNREACH: the kernel knows the address, though the agent does not serve it.
    let broken = web::connect(&mesh)?;
    fs::write(&file, &good)?;
    web::wait_until_served(&mesh)?;
    Ok(Finding::new(
        broken != "EHOSTUNREACH",
        format!("with the broken file: {broken}; once it is mended: served"),
    ))
}

pub(super) fn detach_leaves_a_clean_host(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("clean")?;
    mesh.start()?;
    let node = &mut mesh.lab.a;
    let refused = node.sidestep(&["detach"])?.output(SOON)?;
    node.signal_agent(Signal::TERM)?;
    node.wait_for_agent_end(SOON)?;
    let left = node.pin_directory().exists();
    let detached = node.sidestep(&["detach"])?.output(SOON)?;
    let gone = !node.pin_directory().exists();
    let (complaint, lines) = (refused.stderr.clone(), detached.stdout.lines().count());
    let after = web::connect(&mesh)?;
    Ok(Finding::new(
        !refused.succeeded() && left && detached.succeeded() && gone && after == "ENETUNREACH",
        format!(
            "while it runs: {}; after: {lines} links detached, then calls end with {after}",
            complaint.trim()
        ),
    ))
}

/// Three services on `b` that answer "web": the first is closed while the agent is away; the second has a real address
/// and is open; the third falls back. What answers at the real address without the mesh says "plain".
fn policies(purpose: &str) -> Result<Mesh> {
    let mut mesh = web::mesh(purpose)?;
    mesh.register("open", "open", REAL, local(8080));
    mesh.register("db", "db", vip(3, 80), local(8080));
    let node = &mut mesh.lab.a;
    node.set_capture(&format!("hung_after = \"{}s\"", HUNG_AFTER.as_secs()));
    node.add_setting("[[away]]\nservice = \"open\"\npolicy = \"open\"");
    node.add_setting(&format!(
        "[[away]]\nservice = \"db\"\npolicy = \"fallback\"\nendpoint = \"{REAL}\""
    ));
    node.namespace().add_address("lo", REAL.ip())?;
    let place = node.add_workload("plain", "plain", Kind::Cgroup)?;
    mesh.keep(services::http(&place, REAL, "plain")?);
    Ok(mesh)
}

/// What each of the three calls comes to: what was answered, or the errno of `connect()`.
fn answers(mesh: &Mesh) -> Result<[String; 3]> {
    let call = |to: SocketAddr| {
        let said = mesh.shop.curl(&format!("http://{to}/")).output(SOON)?;
        match said.stdout.trim() {
            "" => web::connect_to(mesh, to),
            answer => Ok(answer.to_owned()),
        }
    };
    Ok([call(vip(1, 80))?, call(REAL)?, call(vip(3, 80))?])
}

const THERE: [&str; 3] = ["web", "web", "web"];
const AWAY: [&str; 3] = ["ECONNREFUSED", "plain", "plain"];

pub(super) fn a_killed_agent_is_answered_by_the_policy(_size: Size) -> Result<Finding> {
    let mut mesh = policies("policykill")?;
    mesh.start()?;
    let before = answers(&mesh)?;
    mesh.lab.a.kill_agent();
    let clock = Stopwatch::start();
    let away = answers(&mesh)?;
    let elapsed = clock.elapsed();
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let after = answers(&mesh)?;
    let counts = ["refused_netns", "passed_open", "fallback"]
        .map(|verdict| web::verdicts(&mesh.lab.a, verdict));
    let [closed, open, fallback] = counts;
    let (closed, open, fallback) = (closed?, open?, fallback?);
    Ok(Finding::new(
        before == THERE
            && away == AWAY
            && after == THERE
            && elapsed < HUNG_AFTER
            && (open, fallback) == (1, 1)
            && closed > 0,
        format!(
            "before {before:?}, while away {away:?} within {} ms, after {after:?}; counted: {closed} refused, {open} passed, {fallback} fallen back",
            elapsed.as_millis()
        ),
    ))
}

pub(super) fn a_hung_agent_is_answered_by_the_policy(_size: Size) -> Result<Finding> {
    let mut mesh = policies("policyhang")?;
    mesh.start()?;
    let before = answers(&mesh)?;
    let clock = Stopwatch::start();
    mesh.lab.a.signal_agent(Signal::STOP)?;
    wait_until_refused(&mesh)?;
    let waited = clock.elapsed();
    let away = answers(&mesh)?;
    mesh.lab.a.signal_agent(Signal::CONT)?;
    web::wait_until_served(&mesh)?;
    let after = answers(&mesh)?;
    let node = &mesh.lab.a;
    let refused = web::verdicts(node, "refused_hung")?;
    let told = node.metric("sidestep_hangs_total", &[])?;
    let gap = node.metric("sidestep_heartbeat_longest_gap_seconds", &[])?;
    // The last heartbeat was before the signal: a fifth of a second, or longer on a busy machine.
    let least = HUNG_AFTER / 2;
    Ok(Finding::new(
        before == THERE
            && away == AWAY
            && after == THERE
            && (least..3 * HUNG_AFTER).contains(&waited)
            && refused > 0
            && (told - 1.0).abs() < f64::EPSILON
            && gap > HUNG_AFTER.as_secs_f64(),
        format!(
            "stopped: after {} ms {away:?}; going on: {after:?}, and it says that it hung once, for {gap:.1} s",
            waited.as_millis()
        ),
    ))
}

/// Waits until connects to the service that is closed are refused. Those before are captured and wait.
fn wait_until_refused(mesh: &Mesh) -> Result<()> {
    let script = format!(
        "
import socket, time
end = 0
while end == 0:
    s = socket.socket()
    end = s.connect_ex(('{}', 80))
    s.close()
    time.sleep(0.02)
print(end)",
        vip(1, 80).ip()
    );
    let said = mesh.shop.program("python3").args(["-c", &script]);
    let said = said.run(SOON)?;
    ensure!(said.trim() == "111", "the last connect ended with {said}");
    Ok(())
}

pub(super) fn a_reload_changes_the_policy(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("policyreload")?;
    mesh.lab.a.namespace().add_address("lo", REAL.ip())?;
    let place = mesh.lab.a.add_workload("plain", "plain", Kind::Cgroup)?;
    mesh.keep(services::http(&place, REAL, "plain")?);
    mesh.start()?;
    mesh.lab
        .a
        .add_setting("[[away]]\nservice = \"web\"\npolicy = \"open\"");
    mesh.lab.a.reload_agent()?;
    let complaint = wait_for_value("the complaint about an open virtual address", SOON, || {
        Ok(web::problems(&mesh.lab.a)?.into_iter().next())
    })?;
    mesh.lab.a.kill_agent();
    let open = web::connect(&mesh)?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    mesh.lab.a.replace_setting(
        "policy = \"open\"",
        &format!("policy = \"fallback\"\nendpoint = \"{REAL}\""),
    );
    // The status says what is configured; the log says when the kernel has it.
    let reloads = |node: &Node| node.agent_said().matches("configuration reloaded").count();
    let before = reloads(&mesh.lab.a);
    mesh.lab.a.reload_agent()?;
    wait_for_value("the reload", SOON, || {
        Ok((reloads(&mesh.lab.a) > before).then_some(()))
    })?;
    ensure!(
        web::problems(&mesh.lab.a)?.is_empty(),
        "the complaint is still there"
    );
    mesh.lab.a.kill_agent();
    let url = format!("http://{}/", vip(1, 80));
    let fallback = mesh.shop.curl(&url).output(SOON)?.stdout;
    Ok(Finding::new(
        open == "ECONNREFUSED"
            && complaint.contains("[[away]] of web")
            && fallback.trim() == "plain",
        format!(
            "told to be open at a virtual address: {complaint}; calls end with {open}. Told to fall back: {}",
            fallback.trim()
        ),
    ))
}

pub(super) fn a_busy_machine_is_no_hang(size: Size) -> Result<Finding> {
    const BUSY: usize = 16;
    let seconds = size.pick(8_u64, 60);
    let mut mesh = web::mesh("busy")?;
    mesh.lab.a.set_capture("hung_after = \"1s\"");
    mesh.start()?;
    let mut burners: Vec<Running> = vec![];
    for _ in 0..BUSY {
        let burner = Program::new("sh").args(["-c", "while :; do :; done"]);
        burners.push(
            burner
                .in_cgroup(&mesh.scratch().cgroup().child("busy")?)
                .spawn()?,
        );
    }
    let clock = Stopwatch::start();
    let (mut calls, mut good) = (0_u32, 0_u32);
    while clock.elapsed() < Duration::from_secs(seconds) {
        calls += 1;
        good += u32::from(serves(&mesh)?);
    }
    drop(burners);
    let node = &mesh.lab.a;
    let gap = node.metric("sidestep_heartbeat_longest_gap_seconds", &[])?;
    let refused = web::verdicts(node, "refused_hung")?;
    Ok(Finding::new(
        good == calls && calls > 0 && refused == 0,
        format!(
            "beside {BUSY} processes that never sleep: {good} of {calls} calls served, none refused as hung; the longest time between two heartbeats was {:.0} ms",
            1000.0 * gap
        ),
    ))
}
