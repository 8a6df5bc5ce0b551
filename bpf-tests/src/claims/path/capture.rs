//! Who is captured, and what a program sees of it.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    mode::Mode,
    services,
    wait::SOON,
    workload::{Kind, Workload},
};

/// A user id that nobody has.
const USER: u32 = 47_011;

pub(super) fn all_kinds_of_workloads_call_and_serve(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("kinds")?;
    let clients = [
        ("cgroup", mesh.shop.clone()),
        (
            "user",
            mesh.lab
                .a
                .add_workload("shop", "by-user", Kind::User(USER))?,
        ),
        (
            "netns",
            mesh.lab.a.add_workload("shop", "by-netns", Kind::Netns)?,
        ),
    ];
    let kinds = [Kind::Cgroup, Kind::Netns];
    for ((index, kind), name) in (1..).zip(kinds).zip(["host", "container"]) {
        let place = mesh.place(name, name, kind)?;
        let address = SocketAddr::new(place.address(), 8000 + index);
        mesh.register(name, name, vip(index, 80), address);
        mesh.keep(services::http(&place, address, name)?);
    }
    mesh.start()?;

    let mut reached = vec![];
    let mut calls = 0;
    for (kind, client) in &clients {
        for (index, name) in [(1, "host"), (2, "container")] {
            calls += 1;
            let url = format!("http://{}/", vip(index, 80));
            let output = client.curl(&url).output(SOON)?;
            if output.stdout.trim() == name {
                reached.push(format!("{kind} to {name}"));
            }
        }
    }
    Ok(Finding::new(
        reached.len() == calls,
        format!("{} of {calls}: {}", reached.len(), reached.join(", ")),
    ))
}

pub(super) fn ipv6_virtual_addresses_work(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("ipv6")?;
    let range = "fd00:51de:57e9::/64";
    for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
        node.set_capture(&format!("ipv6_range = \"{range}\""));
    }
    let native: SocketAddr = "[fd00:51de:57e9::80]:80".parse()?;
    let place = mesh.place("six", "six-1", Kind::Cgroup)?;
    mesh.register("six", "six-1", native, local(8081));
    mesh.register("four", "four-1", vip(4, 80), local(8082));
    mesh.keep(services::peer(&place, "banner", local(8081), "")?);
    let place = mesh.place("four", "four-1", Kind::Cgroup)?;
    mesh.keep(services::peer(&place, "banner", local(8082), "")?);
    mesh.start()?;

    let mapped = format!("[::ffff:{}]:80", vip(4, 80).ip());
    let mut seen = vec![];
    let mut holds = true;
    for target in [native.to_string(), mapped] {
        let report = read(&mesh.shop, &target)?;
        let peer = text(&report, "peer");
        holds &= peer == target && bytes(&report) > 0;
        seen.push(peer);
    }
    Ok(Finding::new(holds, format!("peers {}", seen.join(", "))))
}

pub(super) fn refusals_are_understood(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("refuse")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.register("idle", "idle-1", vip(2, 80), local(8081));
    if let Some(idle) = mesh.instances().last_mut() {
        idle.health = "critical";
    }
    mesh.keep(services::peer(&place, "banner", local(8080), "")?);
    mesh.start()?;

    // A rule can reset a connection at once, but not say by what.
    let unknown_address = match Mode::chosen() {
        Mode::Ebpf => "EHOSTUNREACH",
        Mode::IptablesNft | Mode::IptablesLegacy => "ECONNREFUSED",
    };
    let cases = [
        ("unknown port", vip(1, 81), "ECONNREFUSED"),
        ("no healthy instance", vip(2, 80), "ECONNREFUSED"),
        ("unknown address", vip(9, 80), unknown_address),
    ];
    let (mut holds, mut seen) = (true, vec![]);
    for (case, address, expected) in cases {
        let report = read(&mesh.shop, &address.to_string())?;
        let end = text(&report, "end");
        let refused_in_connect = report.get("connected") == Some(&Value::Bool(false));
        let at_once = report
            .get("ms")
            .and_then(Value::as_u64)
            .is_some_and(|ms| ms < 1000);
        holds &= end == expected && refused_in_connect && at_once;
        seen.push(format!("{case} {end}"));
    }
    Ok(Finding::new(holds, seen.join(", ")))
}

pub(super) fn a_stranger_is_refused(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("stranger")?;
    let stranger = mesh.lab.a.add_stranger("nobody-knows")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    let server = services::peer(&place, "banner", local(8080), "")?;
    mesh.start()?;

    let known = read(&mesh.shop, &vip(1, 80).to_string())?;
    let unknown = read(&stranger, &vip(1, 80).to_string())?;
    let accepted = server.said().matches("accepted").count();
    Ok(Finding::new(
        bytes(&known) > 0 && bytes(&unknown) == 0 && accepted == 1,
        format!(
            "the stranger reads {} bytes ({}), a workload {}; {accepted} connection at the server",
            bytes(&unknown),
            text(&unknown, "end"),
            bytes(&known),
        ),
    ))
}

pub(super) fn read(client: &Workload, target: &str) -> Result<Value> {
    client
        .ask_peer(&format!("read {target}"), SOON)
        .with_context(|| format!("reading from {target}"))
}

pub(super) fn bytes(report: &Value) -> u64 {
    report.get("bytes").and_then(Value::as_u64).unwrap_or(0)
}

pub(super) fn text(report: &Value, key: &str) -> String {
    report
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or("nothing")
        .to_owned()
}
