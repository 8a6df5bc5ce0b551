//! A web server on `b`, called by `shop` on `a`: what most claims here begin with.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    mesh::{Mesh, local, vip},
    node::Node,
    services,
    wait::{SOON, wait_for_value},
    workload::Kind,
};

/// The mesh, not yet started.
pub(in crate::claims) fn mesh(purpose: &str) -> Result<Mesh> {
    let mut mesh = Mesh::new(purpose)?;
    let place = mesh.place("web", "web", Kind::Cgroup)?;
    mesh.register("web", "web", vip(1, 80), local(8080));
    mesh.keep(services::http(&place, local(8080), "web")?);
    Ok(mesh)
}

/// Whether a call is answered.
pub(in crate::claims) fn serves(mesh: &Mesh) -> Result<bool> {
    let url = format!("http://{}/", vip(1, 80));
    Ok(mesh.shop.curl(&url).output(SOON)?.stdout.trim() == "web")
}

/// How many of `count` calls are answered.
pub(super) fn served(mesh: &Mesh, count: usize) -> Result<usize> {
    (0..count).try_fold(0, |good, _| Ok(good + usize::from(serves(mesh)?)))
}

/// Waits until a call is answered.
pub(super) fn wait_until_served(mesh: &Mesh) -> Result<()> {
    wait_for_value("a call to be answered", SOON, || {
        Ok(serves(mesh)?.then_some(()))
    })
}

/// `ok`, or the errno that `connect()` ended with.
pub(in crate::claims) fn connect(mesh: &Mesh) -> Result<String> {
    connect_to(mesh, vip(1, 80))
}

/// As [`connect`], to any address.
pub(in crate::claims) fn connect_to(mesh: &Mesh, to: SocketAddr) -> Result<String> {
    let report = mesh.shop.ask_peer(&format!("read {to}"), SOON)?;
    let connected = report.get("connected") == Some(&true.into());
    let end = report.get("end").and_then(Value::as_str);
    Ok(if connected {
        "ok".to_owned()
    } else {
        end.unwrap_or("nothing").to_owned()
    })
}

/// How often the programs came to `verdict` on a node.
pub(super) fn verdicts(node: &Node, verdict: &str) -> Result<u64> {
    number(node, &format!("/capture/{verdict}"))
}

/// Connections that a node has taken and that have not ended, `outbound` or `inbound`.
pub(super) fn live(node: &Node, direction: &str) -> Result<u64> {
    number(node, &format!("/connections/live_{direction}"))
}

/// Waits until a node carries no connection at all.
pub(super) fn wait_until_idle(node: &Node) -> Result<()> {
    wait_for_value("the connections to be gone", SOON, || {
        let left = live(node, "outbound")? + live(node, "inbound")?;
        Ok((left == 0).then_some(()))
    })
}

/// What a node's status says is wrong with its catalog.
pub(in crate::claims) fn problems(node: &Node) -> Result<Vec<String>> {
    let status = node.status()?;
    let problems = status.pointer("/catalog/problems");
    let problems = problems.and_then(Value::as_array);
    Ok(problems
        .with_context(|| format!("no problems in {status}"))?
        .iter()
        .map(|problem| problem.as_str().unwrap_or_default().to_owned())
        .collect())
}

fn number(node: &Node, pointer: &str) -> Result<u64> {
    let status = node.status()?;
    let number = status.pointer(pointer).and_then(Value::as_u64);
    number.with_context(|| format!("no {pointer} in {status}"))
}
