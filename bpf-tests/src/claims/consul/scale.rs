//! A datacenter with many services.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::changes;
use crate::{
    claims::{Finding, Size},
    consul::{Api, ConsulMesh, SOON},
    mesh::local,
    node::Node,
    services,
    wait::{Stopwatch, pause, wait_for_value},
};

/// Instances of each service, on nodes that have no agent.
const INSTANCES: usize = 4;

/// Changes a second while it is measured what they cost.
const CHANGES: u32 = 100;

/// While so many changes of one service are timed, which take about a fifth of a second each.
const SWITCHES: (usize, usize) = (5, 100);

/// How soon new connections follow Consul's answer, mostly.
const AT_ONCE: u64 = 200;

/// What the largest catalog may cost on node a, which calls: until the first call, until all is read, and in bytes.
const FIRST_CALL: Duration = Duration::from_secs(30);
const READ: Duration = Duration::from_mins(10);
const MEMORY: f64 = 512.0 * 1024.0 * 1024.0;

pub(super) fn a_large_datacenter_is_carried(size: Size) -> Result<Finding> {
    let count = size.pick(200_usize, 5_000);
    let seconds = size.pick(3_u32, 20);
    let mut mesh = ConsulMesh::dev("c-scale")?;
    let place = mesh.place("web")?;
    mesh.keep(services::peer(&place, "banner", local(8_080), "")?);
    mesh.register("web", "web", 8_080, Value::Null)?;
    changes::add_pair(&mut mesh)?;
    register_many(mesh.api(), count)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    mesh.tunnel_of("web")?;

    let clock = Stopwatch::start();
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let ready = clock.elapsed();
    let address = mesh.callable("web")?;
    wait_for_value("the first call", SOON, || {
        Ok(reads(&mesh, address)?.then_some(()))
    })?;
    let called = clock.elapsed();
    until_known(&mesh.lab.a, count)?;
    let all = clock.elapsed();
    let idle = processor(&mesh.lab.a, || {
        pause(Duration::from_secs(seconds.into()));
        Ok(())
    })?;
    let changing = processor(&mesh.lab.a, || change_for(mesh.api(), count, 0..seconds))?;
    let switches = switch_under_change(&mesh, count, size.pick(SWITCHES.0, SWITCHES.1))?;
    let [median, most, worst] = [50, 99, 100].map(|percent| changes::share(&switches, percent));
    let memory = mesh.lab.a.metric("process_resident_memory_bytes", &[])?;
    ensure!(reads(&mesh, address)?, "web is not called any more");
    Ok(Finding::new(
        called < FIRST_CALL && memory < MEMORY && median <= AT_ONCE,
        format!(
            "{count} services with {} instances: ready after {} ms, the first call after {} ms, everything read after {} ms; {:.0} MiB; processor {idle:.1} % idle, {changing:.1} % at {CHANGES} changes a second; meanwhile a change of endpoints reaches new connections after {median} ms in the median, {most} ms in 99 of 100, {worst} ms at most",
            count * INSTANCES,
            ready.as_millis(),
            called.as_millis(),
            all.as_millis(),
            memory / 1024.0 / 1024.0,
        ),
    ))
}

fn reads(mesh: &ConsulMesh, address: std::net::IpAddr) -> Result<bool> {
    let report = mesh.shop.ask_peer(&format!("read {address}:80"), SOON)?;
    Ok(report.get("bytes").and_then(Value::as_u64) > Some(0))
}

/// Waits until all of the many services are known, and nothing of them is still to be read.
fn until_known(node: &Node, count: usize) -> Result<()> {
    wait_for_value("all services to be read", READ, || {
        let status = node.status()?;
        let services = status.get("services").and_then(Value::as_array);
        let many = services.into_iter().flatten().filter(|service| {
            let name = service.get("name").and_then(Value::as_str);
            name.is_some_and(|name| name.starts_with("many-"))
        });
        let unread = status.pointer("/consul/unread").and_then(Value::as_u64);
        Ok((many.count() == count && unread == Some(0)).then_some(()))
    })
    .with_context(|| node.agent_said())
}

/// The share of one processor that the agent of `node` takes while `during` runs, in percent.
fn processor(node: &Node, during: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (clock, before) = (Stopwatch::start(), node.agent_processor_time()?);
    during()?;
    let used = node.agent_processor_time()?.saturating_sub(before);
    Ok(100.0 * used.as_secs_f64() / clock.elapsed().as_secs_f64())
}

/// Times changes of one service while others change all the time.
fn switch_under_change(mesh: &ConsulMesh, count: usize, rounds: usize) -> Result<Vec<u64>> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let changing = scope.spawn(|| -> Result<()> {
            // Other states than those that they are in.
            let mut second = 1_000;
            while !over.load(Ordering::Relaxed) {
                change_for(mesh.api(), count, second..second + 1)?;
                second += 1;
            }
            Ok(())
        });
        let times = changes::switches(mesh, rounds);
        over.store(true, Ordering::Relaxed);
        let changed = changing.join();
        changed.map_err(|_panic| anyhow!("the thread that changes panicked"))??;
        times
    })
}

/// Instance `index` of service number `service`, in its state `version`, as catalogs take what no agent registers:
/// one that speaks TLS itself.
fn instance(service: usize, index: usize, version: u32) -> (&'static str, Value) {
    let name = format!("many-{service}");
    let address = format!("10.78.{index}.1");
    let body = json!({
        "Node": format!("far-{index}"),
        "Address": address,
        "Service": {
            "ID": format!("{name}-{index}"),
            "Service": name,
            "Address": address,
            "Port": 20_000,
            "Meta": { "version": version.to_string() },
            "Connect": { "Native": true },
        },
    });
    ("catalog/register", body)
}

fn register_many(api: &Api, count: usize) -> Result<()> {
    let all: Vec<_> = (0..count)
        .flat_map(|service| (0..INSTANCES).map(move |index| instance(service, index, 0)))
        .collect();
    api.put_many(&all)
}

/// Changes one instance after the other, those of a tenth of a second at once.
fn change_for(api: &Api, count: usize, seconds: Range<u32>) -> Result<()> {
    let clock = Stopwatch::start();
    let tenths = seconds.start * 10..seconds.end * 10;
    for (position, tenth) in (0..).zip(tenths) {
        let due = Duration::from_millis(position * 100);
        pause(due.saturating_sub(clock.elapsed()));
        let changes = (0..CHANGES / 10).map(|change| {
            let number = usize::try_from(tenth * CHANGES / 10 + change).unwrap_or_default();
            instance(number % count, number % INSTANCES, tenth + 1)
        });
        api.put_many(&changes.collect::<Vec<_>>())?;
    }
    Ok(())
}
