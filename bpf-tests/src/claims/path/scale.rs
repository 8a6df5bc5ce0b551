//! Many connections.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    program::open_files_limit,
    services,
    wait::{SOON, wait_for},
    workload::Kind,
};

pub(super) fn connections_reach_the_right_service(size: Size) -> Result<Finding> {
    const SERVICES: u16 = 500;
    let connections = size.pick(1_000_u64, 10_000);
    let mut mesh = Mesh::new("names")?;
    // One process that listens at a port for each: what answers tells which port was reached.
    let place = mesh.place("svc-0", "names", Kind::Cgroup)?;
    for number in 0..SERVICES {
        let name = format!("svc-{number}");
        mesh.register(&name, &name, vip(number, 80), local(20_000 + number));
    }
    mesh.keep(services::peer(
        &place,
        "names",
        local(20_000),
        &format!("{SERVICES} svc-"),
    )?);
    mesh.start()?;

    let targets = mesh.write_targets()?;
    let report = mesh.shop.ask_peer(
        &format!("ask {} 32 {connections}", targets.display()),
        Duration::from_mins(5),
    )?;
    let (right, wrong) = (number(&report, "right")?, number(&report, "wrong")?);
    Ok(Finding::new(
        right == connections && wrong == 0,
        format!(
            "{right} of {connections} right, {wrong} wrong, at {SERVICES} addresses, in {} ms; errors: {}",
            number(&report, "ms")?,
            errors(&report),
        ),
    ))
}

pub(super) fn many_connections_at_once(size: Size) -> Result<Finding> {
    // No destination has more than its share of one range of ports: neither a virtual address, nor the
    // tunnel of a service, nor the application behind it.
    const SERVICES: u16 = 5;
    let load = Load::of(size);
    let mut mesh = Mesh::new("hold")?;
    let place = mesh.place("svc-0", "echo", Kind::Cgroup)?;
    for number in 0..SERVICES {
        let name = format!("svc-{number}");
        mesh.register(&name, &name, vip(number, 80), local(20_000 + number));
        if let Some(instance) = mesh.instances().last_mut() {
            instance.tunnel_port = Some(21_000 + number);
        }
        mesh.keep(services::peer(&place, "echo", local(20_000 + number), "")?);
    }
    let range = format!("{FIRST_PORT} {}", FIRST_PORT + (load.ports - 1));
    for node in [&mesh.lab.a, &mesh.lab.b] {
        node.namespace().set_ipv4("ip_local_port_range", &range)?;
    }
    mesh.start()?;

    let targets = mesh.write_targets()?;
    let report = mesh.shop.ask_peer(
        &format!("hold {} 16 {}", targets.display(), load.connections),
        Duration::from_mins(15),
    )?;
    let (opened, answered) = (number(&report, "opened")?, number(&report, "answered")?);
    Ok(Finding::new(
        opened == load.connections && answered == opened && opened > u64::from(load.ports),
        format!(
            "{opened} of {} open at once, {answered} of them answer, with {} ephemeral ports{}; errors: {}",
            load.connections,
            load.ports,
            load.remark,
            errors(&report)
        ),
    ))
}

pub(super) fn an_agent_out_of_files_catches_up(_size: Size) -> Result<Finding> {
    const CALLERS: usize = 5;
    let mut mesh = Mesh::new("files")?;
    let place = mesh.place("web", "web", Kind::Cgroup)?;
    mesh.register("web", "web", vip(1, 80), local(8080));
    mesh.keep(services::http(&place, local(8080), "web")?);
    mesh.start()?;

    let node = &mesh.lab.a;
    // Not one more than standard input, output and error.
    node.limit_agent_files(3)?;
    let url = format!("http://{}/", vip(1, 80));
    let mut callers = vec![];
    for _ in 0..CALLERS {
        callers.push(mesh.shop.curl(&url).spawn()?);
    }
    wait_for("the agent to notice", SOON, || {
        node.agent_said().contains("accept failed")
    })?;
    node.limit_agent_files(open_files_limit())?;
    let mut served = 0;
    for caller in &mut callers {
        let ended = caller.wait(SOON)?;
        served += usize::from(ended.is_some_and(|status| status.success()));
    }
    let counted = node.metric("sidestep_accept_errors_total", &["direction=\"outbound\""])?;
    Ok(Finding::new(
        served == CALLERS && counted > 0.0,
        format!(
            "{served} of {CALLERS} callers served in the end, {counted} failed accepts counted"
        ),
    ))
}

/// The first port of Linux' default range, and how many that has.
const FIRST_PORT: u16 = 32_768;
const PORTS: u16 = 28_232;

/// How many connections, from how many ports.
struct Load {
    connections: u64,
    ports: u16,
    remark: String,
}

impl Load {
    /// 50,000 connections with the default range. Where this machine does not let a process have two
    /// files for each, or where time is short, fewer connections out of fewer ports: the relation is the same.
    fn of(size: Size) -> Self {
        const WANTED: u64 = 50_000;
        // What an agent has open besides connections.
        const SPARE: u64 = 1_000;
        let limit = open_files_limit();
        let possible = limit.saturating_sub(SPARE) / 2;
        let wanted = size.pick(2_000, WANTED);
        let connections = wanted.min(possible);
        let ports = u64::from(PORTS) * connections / WANTED;
        let remark = if connections < wanted {
            format!(" (scaled down: a process may open {limit} files here)")
        } else {
            String::new()
        };
        Self {
            connections,
            ports: u16::try_from(ports).unwrap_or(PORTS),
            remark,
        }
    }
}

fn number(report: &Value, key: &str) -> Result<u64> {
    report
        .get(key)
        .and_then(Value::as_u64)
        .with_context(|| format!("no {key} in {report}"))
}

fn errors(report: &Value) -> String {
    match report.get("errors").and_then(Value::as_object) {
        Some(errors) if !errors.is_empty() => Value::Object(errors.clone()).to_string(),
        _ => "none".to_owned(),
    }
}
