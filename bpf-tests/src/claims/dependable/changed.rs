//! What changes around connections that come without pause: catalog, configuration, agents.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use rustix::process::Signal;
use serde_json::Value;

use super::replaced::{many_services, storm, upgrade};
use crate::{
    catalog::Instance,
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    node::Node,
    wait::{SOON, Stopwatch, pause, wait_for, wait_for_value},
    wire::Capture,
};

/// A second's worth of changes.
const CHANGES: u16 = 100;

pub(super) fn changes_cost_no_connection(size: Size) -> Result<Finding> {
    let (seconds, reloads) = size.pick((2, 4_usize), (20, 20));
    let mut mesh = many_services("changes")?;
    mesh.start()?;
    let storm = storm(&mesh, size)?;
    let clock = Stopwatch::start();
    let mut written = 0_u64;
    let mut last = BTreeSet::new();
    for second in 0..seconds {
        for change in 0..CHANGES {
            let names = [change, change + 1].map(|n| format!("new-{second}-{n}"));
            let instances: Vec<Instance> =
                (0..).zip(&names).map(|(i, n)| other(&mesh, i, n)).collect();
            mesh.lab.catalog.write_instances("changing", &instances)?;
            last = names.into();
            written += 1;
            let due = Duration::from_millis(written * 1_000 / u64::from(CHANGES));
            pause(due.saturating_sub(clock.elapsed()));
        }
    }
    for _ in 0..reloads {
        for node in [&mesh.lab.a, &mesh.lab.b] {
            let before = reloaded(node);
            node.signal_agent(Signal::HUP)?;
            wait_for("a reload", SOON, || reloaded(node) > before)?;
        }
    }
    for node in [&mesh.lab.a, &mesh.lab.b] {
        wait_for_value("the last change", SOON, || {
            let services = node.status()?.get("services").cloned().unwrap_or_default();
            let names = services.as_array().into_iter().flatten();
            let names = names.filter_map(|s| s.get("name").and_then(Value::as_str));
            let new: BTreeSet<String> = names
                .filter(|name| name.starts_with("new-"))
                .map(str::to_owned)
                .collect();
            Ok((new == last).then_some(()))
        })?;
    }
    let report = storm.end()?;
    Ok(Finding::new(
        report.wrong == 0 && report.failures.is_empty() && report.right > 0,
        format!(
            "{written} changes of the catalog at {CHANGES} a second, {reloads} reloads of each agent: {}, {} wrong, failed: {:?}",
            report.load(),
            report.wrong,
            report.failures,
        ),
    ))
}

pub(super) fn nothing_is_readable_meanwhile(_size: Size) -> Result<Finding> {
    let mut mesh = many_services("readable")?;
    mesh.start()?;
    let capture = Capture::start(&mesh.lab.a, "tcp")?;
    let storm = storm(&mesh, Size::Quick)?;
    for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
        node.kill_agent();
        node.start_agent()?;
        node.wait_until_ready()?;
        upgrade(node)?;
    }
    let report = storm.end()?;
    let wire = capture.stop()?;
    let clear = wire.contains("answer-");
    Ok(Finding::new(
        !clear && report.right > 0 && report.wrong == 0,
        format!(
            "{} answers over two kills and two upgrades, {} bytes in TLS records, answers {}",
            report.right,
            wire.len(),
            if clear { "readable" } else { "unreadable" }
        ),
    ))
}

fn reloaded(node: &Node) -> usize {
    node.agent_said().matches("configuration reloaded").count()
}

/// An instance that nobody calls.
fn other(mesh: &Mesh, index: u16, name: &str) -> Instance {
    Instance {
        service: name.to_owned(),
        id: name.to_owned(),
        node: mesh.lab.b.name().to_owned(),
        node_address: mesh.lab.b.address(),
        virtual_address: vip(30_000 + index, 80),
        local: local(9),
        tunnel_port: None,
        meta: vec![],
        health: "passing",
    }
}
