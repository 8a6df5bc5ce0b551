//! From sidecars to Sidestep, and back.

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    claims::{Finding, Size},
    consul::{BuiltInProxy, ConsulMesh, SOON, sidecar_for},
    mesh::local,
    node::Node,
    services,
    wait::{Stopwatch, wait_for_value},
    workload::Workload,
};

/// Where `shop` reaches `db` by its registration, whoever listens there.
const TO_DB: u16 = 9_191;

/// Where the sidecars are, and where `db` is itself.
const SIDECAR_OF_SHOP: u16 = 21_001;
const SIDECAR_OF_DB: u16 = 21_002;
const APPLICATION: u16 = 9_000;

/// `shop` with the upstream `db`, and `db` with a sidecar, as they were registered before anybody knew of Sidestep.
fn before_sidestep(purpose: &str) -> Result<ConsulMesh> {
    let mut mesh = ConsulMesh::dev(purpose)?;
    let place = mesh.place("db")?;
    mesh.keep(services::peer(&place, "banner", local(APPLICATION), "")?);
    let sidecar = sidecar_for(&mesh.lab.b, SIDECAR_OF_DB, &[]);
    mesh.register("db", "db", APPLICATION, json!({ "Connect": sidecar }))?;
    let sidecar = sidecar_for(&mesh.lab.a, SIDECAR_OF_SHOP, &[("db", TO_DB)]);
    mesh.api().register(&json!({
        "ID": "shop", "Name": "shop", "Port": 7_001, "Connect": sidecar,
    }))?;
    Ok(mesh)
}

fn sidecar_of_db(mesh: &ConsulMesh) -> Result<BuiltInProxy> {
    let listens = (mesh.lab.b.address(), SIDECAR_OF_DB).into();
    BuiltInProxy::start(&mesh.lab.b, mesh.consul.b().api(), "db", &[listens])
}

fn sidecar_of_shop(mesh: &ConsulMesh) -> Result<BuiltInProxy> {
    BuiltInProxy::start(&mesh.lab.a, mesh.api(), "shop", &[local(TO_DB)])
}

/// Whether `client` reads what `db` says first, at the upstream's port.
fn reads(client: &Workload) -> Result<bool> {
    let report = client.ask_peer(&format!("read {}", local(TO_DB)), SOON)?;
    Ok(report.get("bytes").and_then(Value::as_u64) > Some(0))
}

pub(super) fn explicit_upstreams_go_on(_size: Size) -> Result<Finding> {
    let mut mesh = before_sidestep("c-upstream")?;
    mesh.start()?;
    wait_for_value("the upstream's port", SOON, || {
        Ok(reads(&mesh.shop)?.then_some(()))
    })
    .with_context(|| mesh.said())?;
    mesh.api().intend("guest", "db", "deny")?;
    wait_for_value("the denial", SOON, || {
        let allowed = super::intentions::allows(&mesh.lab.a, "guest", "db")?;
        Ok((!allowed).then_some(()))
    })?;
    let (shop, guest) = (reads(&mesh.shop)?, reads(&mesh.guest)?);
    // Now nobody here may call it, and it leaves this node's catalog.
    mesh.api().intend("shop", "db", "deny")?;
    wait_for_value("the last denial", SOON, || {
        let allowed = super::intentions::allows(&mesh.lab.a, "shop", "db")?;
        Ok((!allowed).then_some(()))
    })?;
    let seen = mesh.lab.a.access_log().len();
    let denied = !reads(&mesh.shop)?;
    let told = mesh.lab.a.wait_for_access_log(seen, &["svc/shop"])?;
    Ok(Finding::new(
        shop && !guest && denied && told.contains("outcome=denied"),
        format!(
            "at port {TO_DB} of the registration, without a sidecar: shop {}, guest, whom an intention denies, {}; \
             with shop denied too, the access log has {told}",
            if shop { "reads" } else { "reads nothing" },
            if guest { "reads" } else { "reads nothing" },
        ),
    ))
}

/// Each step changes one thing; then `shop` calls as it always did.
pub(super) fn a_service_goes_from_sidecars_to_us_and_back(_size: Size) -> Result<Finding> {
    let mut mesh = before_sidestep("c-migrate")?;
    let mut steps = Steps::default();
    let db = sidecar_of_db(&mesh)?;
    let shop = sidecar_of_shop(&mesh)?;
    steps.after("both with sidecars", &mesh)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    steps.after("Sidestep beside db's sidecar", &mesh)?;
    drop(db);
    steps.after("db without", &mesh)?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    steps.after("Sidestep beside shop's sidecar", &mesh)?;
    drop(shop);
    steps.after("shop without", &mesh)?;
    stop(&mut mesh.lab.a)?;
    let shop = sidecar_of_shop(&mesh)?;
    steps.after("shop with its sidecar again", &mesh)?;
    let db = sidecar_of_db(&mesh)?;
    steps.after("db with both", &mesh)?;
    stop(&mut mesh.lab.b)?;
    steps.after("db with its sidecar alone", &mesh)?;
    let left = mesh.api().get("health/connect/db")?.to_string();
    drop((shop, db));
    let clean = !left.contains("sidestep");
    Ok(Finding::new(
        clean,
        format!(
            "calls go on after each step: {}; of Sidestep {} is left in Consul",
            steps.0.join(", "),
            if clean { "nothing" } else { "something" }
        ),
    ))
}

/// What was done, and how long until calls were well.
#[derive(Default)]
struct Steps(Vec<String>);

impl Steps {
    /// Waits until ten calls in a row succeed: a sidecar that is gone is called until its check fails.
    fn after(&mut self, what: &str, mesh: &ConsulMesh) -> Result<()> {
        let clock = Stopwatch::start();
        let time = wait_for_value(&format!("calls after {what:?}"), SOON, || {
            let time = clock.elapsed();
            for _ in 0..10 {
                if !reads(&mesh.shop)? {
                    return Ok(None);
                }
            }
            Ok(Some(time))
        })
        .with_context(|| mesh.said())?;
        self.0
            .push(format!("{what} (after {} ms)", time.as_millis()));
        Ok(())
    }
}

fn stop(node: &mut Node) -> Result<()> {
    node.signal_agent(Signal::TERM)?;
    node.wait_for_agent_end(SOON)?;
    Ok(())
}
