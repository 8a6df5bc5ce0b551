//! Agents that are replaced while Consul looks on.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use serde_json::Value;

use super::{outage::until_followed, roots::certificates};
use crate::{
    claims::{Finding, Size, dependable::replaced::upgrade, storm::Storm},
    consul::{Api, ConsulMesh, SOON},
    mesh::local,
    services,
    wait::{pause, wait_for_value},
};

/// How the agent registers the proxy of `names`.
const PROXY: &str = "sidestep-names";

/// What all looks at Consul showed.
#[derive(Debug, Default)]
struct Seen {
    looks: usize,
    wrong: Vec<String>,
}

/// What Consul has of the proxy: where it is, since when, and how it fares.
#[derive(Debug, PartialEq)]
struct Registration {
    port: Value,
    /// Another one if it was removed in between.
    created: Value,
    /// Names and states, of the instance's too.
    checks: Vec<(String, String)>,
}

impl Registration {
    /// As the servers tell callers.
    fn read(api: &Api) -> Result<Self> {
        let all = api.get("health/connect/names")?;
        let proxy = all.get(0).context("no proxy is registered")?;
        let value = |pointer: &str| proxy.pointer(pointer).cloned().unwrap_or_default();
        let checks = proxy.get("Checks").and_then(Value::as_array);
        let text = |check: &Value, key: &str| {
            let text = check.get(key).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        let checks = checks.into_iter().flatten();
        Ok(Self {
            port: value("/Service/Port"),
            created: value("/Service/CreateIndex"),
            checks: checks
                .map(|check| (text(check, "CheckID"), text(check, "Status")))
                .collect(),
        })
    }

    fn is_passing(&self) -> bool {
        let of_proxy = |id: &str| id.contains(PROXY);
        let passing = self.checks.iter().all(|(_, status)| status == "passing");
        passing && self.checks.iter().filter(|(id, _)| of_proxy(id)).count() == 2
    }
}

/// Looks again and again, at the servers and at node b's agent, until `is_over`.
fn look(servers: &Api, own: &Api, before: &Registration, is_over: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    while !is_over.load(Ordering::Relaxed) {
        let now = Registration::read(servers)?;
        if now != *before {
            seen.wrong.push(format!("{now:?}"));
        }
        let services = own.get("agent/services")?;
        if services.pointer(&format!("/{PROXY}/Port")) != Some(&before.port) {
            seen.wrong.push(services.to_string());
        }
        seen.looks += 1;
    }
    Ok(seen)
}

pub(super) fn an_upgrade_is_not_seen_in_consul(size: Size) -> Result<Finding> {
    let rounds = size.pick(1_usize, 5);
    let mut mesh = ConsulMesh::dev("c-upgrade")?;
    let place = mesh.place("names")?;
    mesh.keep(services::peer(&place, "names", local(20_000), "1 name")?);
    mesh.register("names", "names", 20_000, Value::Null)?;
    mesh.start()?;
    let names = mesh.callable("names")?;
    let before = wait_for_value("a passing proxy", SOON, || {
        let registration = Registration::read(mesh.api()).ok();
        Ok(registration.filter(Registration::is_passing))
    })?;
    let targets = mesh.write_targets(&[(names, "name0")])?;
    let storm = Storm::begin(&mesh.shop, targets, size)?;
    let known = wait_for_value("both sides' certificates", SOON, || {
        let all = [certificates(&mesh.lab.a)?, certificates(&mesh.lab.b)?];
        let issued = |of_node: &Vec<_>| {
            let mut texts = of_node.iter().flatten();
            !of_node.is_empty() && texts.all(|text: &String| !text.is_empty())
        };
        Ok(all.iter().all(issued).then_some(all))
    })?;
    let is_over = AtomicBool::new(false);
    let seen = thread::scope(|scope| -> Result<Seen> {
        let (servers, own) = (mesh.api(), mesh.consul.b().api());
        let looking = scope.spawn(|| look(servers, own, &before, &is_over));
        let upgraded = (0..rounds).try_for_each(|_| {
            for node in [&mesh.lab.b, &mesh.lab.a] {
                upgrade(node)?;
            }
            Ok(())
        });
        // The next agents follow what changes, and one of them has the port.
        let followed = upgraded.and_then(|()| until_followed(&mesh, "deny"));
        // Consul itself tries the port every ten seconds.
        pause(Duration::from_secs(size.pick(0, 12)));
        is_over.store(true, Ordering::Relaxed);
        let seen = looking.join().map_err(|_panic| anyhow!("a panic"))?;
        followed?;
        seen
    })?;
    let after = [certificates(&mesh.lab.a)?, certificates(&mesh.lab.b)?];
    let report = storm.end()?;
    let has_same = known == after;
    Ok(Finding::new(
        report.failures.is_empty()
            && report.right > 0
            && seen.wrong.is_empty()
            && seen.looks > 1
            && has_same,
        format!(
            "{} upgrades: {}, failed: {:?}; registered and passing at each of {} looks at Consul{}; certificates {}",
            2 * rounds,
            report.load(),
            report.failures,
            seen.looks,
            if seen.wrong.is_empty() {
                String::new()
            } else {
                format!(" but {}", seen.wrong.join(", "))
            },
            if has_same {
                "are the same".to_owned()
            } else {
                format!("were {known:?} and are {after:?}")
            },
        ),
    ))
}
