//! Many connections.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    services,
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
    // No destination has more than its share of one range of 28,232 ports: neither a virtual address, nor
    // the tunnel of a service, nor the application behind it.
    const SERVICES: u16 = 5;
    let connections = size.pick(2_000_u64, 50_000);
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
    mesh.start()?;

    let targets = mesh.write_targets()?;
    let report = mesh.shop.ask_peer(
        &format!("hold {} 16 {connections}", targets.display()),
        Duration::from_mins(15),
    )?;
    let (opened, answered) = (number(&report, "opened")?, number(&report, "answered")?);
    Ok(Finding::new(
        opened == connections && answered == connections,
        format!(
            "{opened} of {connections} open at once, {answered} of them answer; errors: {}",
            errors(&report)
        ),
    ))
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
