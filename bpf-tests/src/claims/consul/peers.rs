//! Interoperation with what else speaks Consul's mesh: its built-in proxy, and Envoy.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{
    claims::{Finding, Size},
    consul::{BuiltInProxy, ConsulMesh, SOON, sidecar_for},
    envoy::{Denied, Envoy, Identity, Upstream},
    mesh::local,
    services,
    wait::{Stopwatch, wait_for_value},
    workload::Workload,
};

/// Where a sidecar on node a leads to `db`.
const TO_DB: u16 = 9_191;

/// Where a sidecar of `db` is, on node b, and where `db` is itself.
const SIDECAR: u16 = 21_002;
const APPLICATION: u16 = 9_000;

/// How many calls are made, one after the other.
fn calls(size: Size) -> u32 {
    size.pick(20, 500)
}

/// What `client` reads first at `address`, so many times.
fn finding(size: Size, client: &Workload, address: SocketAddr, said: &str) -> Result<Finding> {
    let all = calls(size);
    let clock = Stopwatch::start();
    let mut right = 0;
    let mut last = Value::Null;
    for _ in 0..all {
        let report = client.ask_peer(&format!("read {address}"), SOON)?;
        right += u32::from(report.get("bytes").and_then(Value::as_u64) > Some(0));
        last = report;
    }
    let tail = if right == all {
        format!("in {} ms", clock.elapsed().as_millis())
    } else {
        format!("the last: {last}\n{said}")
    };
    Ok(Finding::new(
        right == all,
        format!("{right} of {all} connections read what the server says first, {tail}"),
    ))
}

/// A mesh in which `db`, which speaks first, runs on node b.
fn with_db(purpose: &str, connect: bool) -> Result<ConsulMesh> {
    let mut mesh = ConsulMesh::dev(purpose)?;
    let place = mesh.place("db")?;
    mesh.keep(services::peer(&place, "banner", local(APPLICATION), "")?);
    let more = if connect {
        json!({ "Connect": sidecar_for(&mesh.lab.b, SIDECAR, &[]) })
    } else {
        Value::Null
    };
    mesh.register("db", "db", APPLICATION, more)?;
    Ok(mesh)
}

pub(super) fn a_built_in_proxy_calls_us(size: Size) -> Result<Finding> {
    let mut mesh = with_db("c-bi-in", false)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    mesh.tunnel_of("db")?;
    let upstreams = sidecar_for(&mesh.lab.a, 21_001, &[("db", TO_DB)]);
    let shop = json!({ "ID": "shop", "Name": "shop", "Port": 7_001, "Connect": upstreams });
    mesh.api().register(&shop)?;
    let proxy = BuiltInProxy::start(&mesh.lab.a, mesh.api(), "shop", &[local(TO_DB)])?;
    // It listens before Consul has told it all that it needs, and drops who comes then.
    wait_for_value("the proxy's first call", SOON, || {
        let report = mesh
            .shop
            .ask_peer(&format!("read {}", local(TO_DB)), SOON)?;
        let bytes = report.get("bytes").and_then(Value::as_u64);
        Ok(bytes.filter(|bytes| *bytes > 0))
    })?;
    finding(size, &mesh.shop, local(TO_DB), &proxy.said())
}

pub(super) fn we_call_a_built_in_proxy(size: Size) -> Result<Finding> {
    let mut mesh = with_db("c-bi-out", true)?;
    let listens = (mesh.lab.b.address(), SIDECAR).into();
    let api = mesh.consul.b().api();
    let proxy = BuiltInProxy::start(&mesh.lab.b, api, "db", &[listens])?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let address = (mesh.callable("db")?, 5432).into();
    finding(size, &mesh.shop, address, &proxy.said())
}

pub(super) fn envoy_calls_us(size: Size) -> Result<Finding> {
    let mut mesh = with_db("c-envoy-in", false)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    let upstream = Upstream {
        service: "db",
        trust_domain: &mesh.api().trust_domain()?,
        endpoints: &[mesh.tunnel_of("db")?],
    };
    let identity = Identity::of(mesh.api(), "shop")?;
    let envoy = Envoy::outbound(&mesh.lab.a, "shop", &identity, local(TO_DB), &upstream)?;
    finding(size, &mesh.shop, local(TO_DB), &envoy.said())
}

pub(super) fn we_call_envoy(size: Size) -> Result<Finding> {
    let mut mesh = with_db("c-envoy-out", true)?;
    let identity = Identity::of(mesh.consul.b().api(), "db")?;
    let envoy = Envoy::inbound(
        &mesh.lab.b,
        "db",
        &identity,
        (mesh.lab.b.address(), SIDECAR).into(),
        local(APPLICATION),
        Denied(&[]),
    )?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let address = (mesh.callable("db")?, 5432).into();
    finding(size, &mesh.shop, address, &envoy.said()).with_context(|| mesh.said())
}
