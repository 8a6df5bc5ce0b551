//! Nodes that are cut off from each other.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{replaced::Upload, web};
use crate::{
    claims::{Finding, Size},
    lab::DEVICE,
    mesh::{Mesh, local, vip},
    node::Node,
    services,
    wait::{SOON, Stopwatch, wait_for, wait_for_value},
    workload::Kind,
};

/// Without an answer, Linux sends as often as this before it gives a connection up; 15 otherwise.
const RETRIES: &str = "3";

/// What that takes (0.2 s, doubled with each: 3 s), and some time for a busy machine.
const GIVEN_UP: Duration = Duration::from_secs(10);

pub(super) fn a_transfer_goes_on_when_the_link_is_back(size: Size) -> Result<Finding> {
    let bytes = size.pick(32_u64, 1024) << 20;
    let mut mesh = Mesh::new("back")?;
    let hash = mesh.place("hash", "hash", Kind::Cgroup)?;
    mesh.register("hash", "hash", vip(999, 80), local(8080));
    mesh.keep(services::peer(&hash, "hash", local(8080), "")?);
    mesh.start()?;
    let upload = Upload::begin(&mesh, "upload", bytes)?;
    // The other end: what `a` sends leaves, and does not arrive.
    set_link(&mesh.lab.b, "down")?;
    upload.go_on()?;
    let clock = Stopwatch::start();
    wait_for_value("bytes that do not arrive", SOON, || {
        Ok(is_retransmitting(&mesh.lab.a)?.then_some(()))
    })?;
    set_link(&mesh.lab.b, "up")?;
    let away = clock.elapsed();
    let whole = upload.end()?;
    for node in [&mesh.lab.a, &mesh.lab.b] {
        web::wait_until_idle(node)?;
    }
    Ok(Finding::new(
        whole,
        format!(
            "{} MiB, in the middle of which the link was down for {} ms: {}, no connection left",
            bytes >> 20,
            away.as_millis(),
            if whole { "whole" } else { "broken" }
        ),
    ))
}

pub(super) fn a_transfer_to_a_lost_node_ends(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("lost")?;
    let place = mesh.place("both", "both", Kind::Cgroup)?;
    mesh.register("both", "both", vip(1, 80), local(8080));
    mesh.keep(services::peer(&place, "talk", local(8080), "")?);
    for node in [&mesh.lab.a, &mesh.lab.b] {
        node.namespace().set_ipv4("tcp_retries2", RETRIES)?;
    }
    mesh.start()?;
    let log = mesh.shop.directory().join("talk.log");
    let talk = mesh.shop.peer(&format!("talk-to {}", vip(1, 80)))?;
    let mut client = talk.log(&log).spawn()?;
    wait_for("bytes in both directions", SOON, || {
        fs::read_to_string(&log).is_ok_and(|said| said.starts_with("up"))
    })?;
    let before = [
        web::live(&mesh.lab.a, "outbound")?,
        web::live(&mesh.lab.b, "inbound")?,
    ];
    set_link(&mesh.lab.b, "down")?;
    let clock = Stopwatch::start();
    client.wait(SOON)?.context("the client waits for ever")?;
    let told = clock.elapsed();
    for node in [&mesh.lab.a, &mesh.lab.b] {
        web::wait_until_idle(node)?;
    }
    let gone = clock.elapsed();
    let said = fs::read_to_string(&log)?;
    let end: Value = serde_json::from_str(said.lines().nth(1).unwrap_or_default())?;
    let end = end.get("end").and_then(Value::as_str).unwrap_or("nothing");
    Ok(Finding::new(
        before == [1, 1] && end == "ECONNRESET" && gone < GIVEN_UP,
        format!(
            "with net.ipv4.tcp_retries2 = {RETRIES} the client reads {end} after {} ms, and neither node a connection after {} ms",
            told.as_millis(),
            gone.as_millis()
        ),
    ))
}

/// A cable at the node `b`: `up` or `down`.
fn set_link(node: &Node, state: &str) -> Result<()> {
    node.namespace().ip(&format!("link set {DEVICE} {state}"))
}

/// Whether a connection to the other node's tunnel port sends again what was not answered.
fn is_retransmitting(node: &Node) -> Result<bool> {
    let sockets = node.tool("ss")?;
    let sockets = sockets.args(["--no-header", "--tcp", "--numeric", "--options"]);
    let said = sockets.args(["dport", "=", ":15443"]).run(SOON)?;
    // timer:(on,TIME,RETRANSMISSIONS)
    Ok(said.lines().any(|line| {
        let timer = line.split_once("timer:(on,").map(|(_, timer)| timer);
        let again = timer.and_then(|timer| timer.split_once(',')?.1.strip_suffix(')'));
        again.is_some_and(|again| again != "0")
    }))
}
