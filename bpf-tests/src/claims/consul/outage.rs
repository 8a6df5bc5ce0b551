//! Consul that fails, forbids or goes back in time.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::intentions::allows;
use crate::{
    claims::{Finding, Size, storm::Storm},
    consul::{ConsulMesh, SOON, policy},
    mesh::local,
    node::Node,
    services,
    wait::{Stopwatch, wait_for_value},
};

/// How soon a change is to be in force once Consul is well again: longer than any back-off.
const FOLLOWED: Duration = Duration::from_mins(1);

/// A cluster with `names` on node b, which is called already, and a load on it.
fn under_load(purpose: &str, size: Size) -> Result<(ConsulMesh, Storm)> {
    let mut mesh = ConsulMesh::cluster(purpose)?;
    let place = mesh.place("names")?;
    mesh.keep(services::peer(&place, "names", local(20_000), "1 name")?);
    mesh.register("names", "names", 20_000, Value::Null)?;
    mesh.start()?;
    let targets = mesh.write_targets(&[(mesh.callable("names")?, "name0")])?;
    let storm = Storm::begin(&mesh.shop, targets, size)?;
    Ok((mesh, storm))
}

/// Changes what `guest` may do until both nodes follow. Returns how long that took.
pub(super) fn until_followed(mesh: &ConsulMesh, action: &str) -> Result<Duration> {
    // Consul itself may need a moment to be well.
    wait_for_value("Consul to take an intention", FOLLOWED, || {
        Ok(mesh.api().intend("guest", "names", action).ok())
    })?;
    let clock = Stopwatch::start();
    for node in [&mesh.lab.a, &mesh.lab.b] {
        until_decided(node, action)?;
    }
    Ok(clock.elapsed())
}

fn until_decided(node: &Node, action: &str) -> Result<()> {
    let what = format!("node {} to {action}", node.name());
    wait_for_value(&what, FOLLOWED, || {
        let allowed = allows(node, "guest", "names")?;
        Ok((allowed == (action == "allow")).then_some(()))
    })
    .with_context(|| node.agent_said())
}

pub(super) fn a_killed_leader_costs_no_connection(size: Size) -> Result<Finding> {
    let rounds = size.pick(1, 3);
    let (mut mesh, storm) = under_load("c-leader", size)?;
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        let leader = mesh.consul.leader()?;
        let server = mesh.consul.servers().get_mut(leader);
        server.context("a leader that is no server")?.kill();
        slowest = slowest.max(until_followed(&mesh, "deny")?);
        let server = mesh.consul.servers().get_mut(leader);
        server.context("a leader that is no server")?.start()?;
        mesh.consul.wait_until_ready()?;
        slowest = slowest.max(until_followed(&mesh, "allow")?);
    }
    let report = storm.end()?;
    Ok(Finding::new(
        report.failures.is_empty() && report.wrong == 0 && report.right > 0,
        format!(
            "{rounds} leaders killed: {}, {} wrong, failed: {:?}; changes after that in force within {} ms",
            report.load(),
            report.wrong,
            report.failures,
            slowest.as_millis()
        ),
    ))
}

pub(super) fn a_lost_token_takes_nothing_away(size: Size) -> Result<Finding> {
    let (mesh, storm) = under_load("c-acl", size)?;
    mesh.api().change_policy("sidestep", "")?;
    let mut said = String::new();
    for node in [&mesh.lab.a, &mesh.lab.b] {
        said = wait_for_value("the lost rights to be reported", FOLLOWED, || {
            let status = node.status()?;
            let problem = status.pointer("/consul/problems/0");
            Ok(problem.and_then(Value::as_str).map(str::to_owned))
        })?;
    }
    // What is there is there still, and not only in the connections that go on.
    let known = mesh.lab.a.service("names")?;
    let available = known.get("available").and_then(Value::as_u64);
    mesh.api().change_policy("sidestep", policy()?)?;
    let time = until_followed(&mesh, "deny")?;
    let report = storm.end()?;
    Ok(Finding::new(
        report.failures.is_empty() && report.right > 0 && available == Some(1),
        format!(
            "{}, failed: {:?}; reported: {said}; with the rights back a change is in force after {} ms",
            report.load(),
            report.failures,
            time.as_millis()
        ),
    ))
}

pub(super) fn a_restored_snapshot_is_followed(size: Size) -> Result<Finding> {
    let (mesh, storm) = under_load("c-restore", size)?;
    let file = mesh.lab.scratch().directory().join("snapshot");
    let snapshot = |action: &str| -> Result<()> {
        let consul = mesh.consul.command(&mesh.lab.a, &["snapshot", action])?;
        consul.arg(&file).run(SOON + SOON).map(drop)
    };
    snapshot("save")?;
    let index = || -> Result<u64> {
        let answer = mesh.api().ask("GET", "connect/intentions", None)?;
        let index = answer.header("x-consul-index").unwrap_or_default();
        index
            .parse()
            .with_context(|| format!("the index {index:?}"))
    };
    for action in ["deny", "allow", "deny"] {
        until_followed(&mesh, action)?;
    }
    let before = index()?;
    snapshot("restore")?;
    let clock = Stopwatch::start();
    for node in [&mesh.lab.a, &mesh.lab.b] {
        until_decided(node, "allow")?;
    }
    let time = clock.elapsed();
    let after = index()?;
    let next = until_followed(&mesh, "deny")?;
    let report = storm.end()?;
    Ok(Finding::new(
        report.failures.is_empty() && report.right > 0 && after < before,
        format!(
            "the index went from {before} to {after}: what was restored is in force after {} ms, the next change after {} ms; {}, failed: {:?}",
            time.as_millis(),
            next.as_millis(),
            report.load(),
            report.failures,
        ),
    ))
}
