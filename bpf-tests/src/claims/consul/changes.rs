//! Endpoints and virtual addresses that change in Consul.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::intentions::live;
use crate::{
    claims::{Finding, Size},
    consul::{Api, BuiltInProxy, ConsulMesh, SOON, sidecar_for},
    mesh::local,
    services,
    wait::{Stopwatch, monotonic_ms, wait_for_value},
};

/// How soon new connections follow Consul's answer.
const AT_ONCE: u64 = 200;

/// Where `red` and `blue` listen, and by how much their sidecars are beside that.
const RED: u16 = 8_081;
const BLUE: u16 = 8_082;
const SIDECARS: u16 = 1_000;

pub(super) fn an_endpoint_change_is_followed_at_once(size: Size) -> Result<Finding> {
    let rounds = size.pick(5_usize, 50);
    let mut mesh = ConsulMesh::dev("c-endpoint")?;
    add_pair(&mut mesh)?;
    mesh.start()?;
    let times = switches(&mesh, rounds)?;
    let worst = times.last().copied().unwrap_or(u64::MAX);
    Ok(Finding::new(
        worst <= AT_ONCE,
        format!(
            "{rounds} changes: {} ms in the median, {worst} ms at most",
            share(&times, 50)
        ),
    ))
}

/// Two instances of `pair`, for [`switches`]; before the agents start.
pub(super) fn add_pair(mesh: &mut ConsulMesh) -> Result<()> {
    for (id, port) in [("one", 20_001), ("two", 20_002)] {
        let place = mesh.place(id)?;
        let answer = format!("1 {id}");
        mesh.keep(services::peer(&place, "names", local(port), &answer)?);
        let check = json!({ "Check": { "TTL": "1h", "Status": "passing" } });
        mesh.register("pair", id, port, check)?;
    }
    Ok(())
}

/// Makes one of `pair` critical and the other healthy, `rounds` times by turns. Returns how many milliseconds after
/// Consul's answer the last connection reached the critical one, each time, in ascending order.
pub(super) fn switches(mesh: &ConsulMesh, rounds: usize) -> Result<Vec<u64>> {
    let pair = mesh.callable("pair")?;
    let mut times = vec![];
    for round in 0..rounds {
        let (gone, stays) = if round % 2 == 0 {
            ("one", "two")
        } else {
            ("two", "one")
        };
        times.push(switch(mesh, pair, gone, stays)?);
    }
    times.sort_unstable();
    Ok(times)
}

/// What so many percent of `times`, which ascend, do not exceed.
pub(super) fn share(times: &[u64], percent: usize) -> u64 {
    let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times.get(index).copied().unwrap_or(u64::MAX)
}

/// Makes `stays` healthy and `gone` critical. Returns how many milliseconds after Consul's answer the last connection
/// reached `gone`.
pub(super) fn switch(mesh: &ConsulMesh, pair: IpAddr, gone: &str, stays: &str) -> Result<u64> {
    let b = mesh.consul.b().api();
    b.put(&format!("agent/check/pass/service:{stays}"), &Value::Null)?;
    until_healthy(mesh.api(), &[gone, stays])?;
    let targets = mesh.write_targets(&[(pair, &format!("{stays}0"))])?;
    let answered = thread::scope(|scope| -> Result<u64> {
        let answer = scope.spawn(|| until_healthy(mesh.api(), &[stays]));
        b.put(&format!("agent/check/fail/service:{gone}"), &Value::Null)?;
        answer
            .join()
            .map_err(|_panic| anyhow!("the watch panicked"))?
    })?;
    // Ten connections in a row that reach the other one: with both in force that is one chance in a thousand.
    let clock = Stopwatch::start();
    let mut last_wrong = answered;
    loop {
        let from = monotonic_ms();
        let report = mesh
            .shop
            .ask_peer(&format!("ask {} 1 10", targets.display()), SOON)?;
        let count = |key: &str| report.get(key).and_then(Value::as_u64).unwrap_or(0);
        ensure!(count("failed") == 0, "connections failed: {report}");
        if count("wrong") == 0 {
            return Ok(last_wrong.saturating_sub(answered));
        }
        last_wrong = monotonic_ms().max(from);
        ensure!(
            clock.elapsed() < SOON,
            "{gone} is called still: {}",
            mesh.said()
        );
    }
}

/// Waits, with Consul's blocking queries, until just these instances of `pair` are healthy. Returns when Consul said
/// so.
fn until_healthy(api: &Api, wanted: &[&str]) -> Result<u64> {
    let mut index = "0".to_owned();
    let mut last = String::new();
    let clock = Stopwatch::start();
    while clock.elapsed() < SOON {
        let path = format!("health/connect/pair?passing&wait=5s&index={index}");
        let answer = api.ask("GET", &path, None)?;
        let found = answer.header("x-consul-index").context("no index")?;
        found.clone_into(&mut index);
        let now = monotonic_ms();
        answer.body.clone_into(&mut last);
        let all = answer.json()?;
        let all = all.as_array().context("no list of instances")?;
        let is = |id: &str| {
            all.iter()
                .filter_map(|entry| entry.pointer("/Service/Meta/sidestep-instance")?.as_str())
                .any(|found| found == id)
        };
        if all.len() == wanted.len() && wanted.iter().all(|id| is(id)) {
            return Ok(now);
        }
    }
    Err(anyhow!("{wanted:?} are not what is healthy: {last}"))
}

/// `red` and `blue` are behind sidecars, whose registrations have the addresses: that is where Consul puts them.
pub(super) fn swapped_virtual_addresses_lead_to_their_new_owners(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("c-swap")?;
    let mut proxies = vec![];
    for (name, port) in [("red", RED), ("blue", BLUE)] {
        let place = mesh.place(name)?;
        mesh.keep(services::peer(&place, "echo", local(port), "")?);
        let listens = (mesh.lab.b.address(), port + SIDECARS).into();
        give(&mesh, name, port, None)?;
        let api = mesh.consul.b().api();
        proxies.push(BuiltInProxy::start(&mesh.lab.b, api, name, &[listens])?);
    }
    let [first, second] = [20, 21].map(|host| IpAddr::V4(Ipv4Addr::new(240, 77, 0, host)));
    give(&mesh, "red", RED, Some(first))?;
    give(&mesh, "blue", BLUE, Some(second))?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    until_owned(&mesh, "red", first)?;
    until_owned(&mesh, "blue", second)?;
    let target = (first, 80).into();
    let mut before = live(&mesh.shop, target)?;
    let seen = mesh.lab.a.access_log().len();

    give(&mesh, "red", RED, Some(second))?;
    give(&mesh, "blue", BLUE, Some(first))?;
    until_owned(&mesh, "blue", first)?;
    until_owned(&mesh, "red", second)?;
    let cut = before.wait(Duration::from_secs(5))?.is_some();
    let mut after = live(&mesh.guest, target)?;
    after.kill();
    let line = mesh.lab.a.wait_for_access_log(seen, &["guest"])?;
    Ok(Finding::new(
        cut && line.contains("blue"),
        format!(
            "a live connection to the first owner {}; the next one: {line}",
            if cut { "was cut" } else { "goes on" },
        ),
    ))
}

/// Registers `service` with a sidecar that has a virtual address, as newer versions of Consul give them.
fn give(mesh: &ConsulMesh, service: &str, port: u16, address: Option<IpAddr>) -> Result<()> {
    let mut connect = sidecar_for(&mesh.lab.b, port + SIDECARS, &[]);
    let sidecar = connect.pointer_mut("/SidecarService");
    if let (Some(address), Some(Value::Object(sidecar))) = (address, sidecar) {
        let tagged = json!({ "consul-virtual": { "Address": address, "Port": port } });
        sidecar.insert("TaggedAddresses".to_owned(), tagged);
    }
    mesh.register(service, service, port, json!({ "Connect": connect }))
}

fn until_owned(mesh: &ConsulMesh, owner: &str, address: IpAddr) -> Result<()> {
    let wanted = address.to_string();
    wait_for_value(&format!("{owner} to have {address}"), SOON, || {
        let service = mesh.in_force(&mesh.lab.a, owner).unwrap_or_default();
        let has = service.pointer("/addresses/0").and_then(Value::as_str) == Some(&wanted);
        let available = service.get("available").and_then(Value::as_u64) > Some(0);
        Ok((has && available).then_some(()))
    })
    .with_context(|| mesh.said())
}
