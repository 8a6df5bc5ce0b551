//! What sidecars offered their applications beside ports for services.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::intentions::allows;
use crate::{
    claims::{Finding, Size},
    consul::{ConsulMesh, sidecar_for},
    mesh::local,
    services,
    wait::{SOON, Stopwatch, wait_for_value},
};

/// Where `shop`'s sidecar would be; none runs.
const SIDECAR: u16 = 21_001;

/// Where `shop` reaches what the query finds.
const PAGES: u16 = 9_192;

/// A web server on node b that answers with its own id.
fn page(mesh: &mut ConsulMesh, service: &str, id: &str, port: u16) -> Result<()> {
    let place = mesh.place(id)?;
    mesh.keep(services::http(&place, local(port), id)?);
    mesh.register(service, id, port, json!({ "Tags": [id] }))
}

/// Registers `shop` with these upstreams, in Consul's own terms.
fn with_upstreams(mesh: &ConsulMesh, upstreams: &Value) -> Result<()> {
    let mut connect = sidecar_for(&mesh.lab.a, SIDECAR, &[]);
    if let Some(registered) = connect.pointer_mut("/SidecarService/Proxy/Upstreams") {
        registered.clone_from(upstreams);
    }
    mesh.api().register(&json!({
        "ID": "shop", "Name": "shop", "Port": 7_001, "Connect": connect,
    }))
}

/// Has `shop` ask `url` until it reads `expected`. Returns how many milliseconds that took.
fn until_read(mesh: &ConsulMesh, url: &str, expected: &str) -> Result<u128> {
    let clock = Stopwatch::start();
    wait_for_value(&format!("{expected} at {url}"), SOON, || {
        let page = mesh.shop.curl(url).run(SOON).unwrap_or_default();
        Ok((page.trim() == expected).then(|| clock.elapsed().as_millis()))
    })
    .with_context(|| mesh.said())
}

pub(super) fn a_prepared_query_is_followed(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("c-query")?;
    for (service, id, port) in [
        ("web", "old", 8_081),
        ("web", "new", 8_082),
        ("vault", "gold", 8_083),
    ] {
        page(&mut mesh, service, id, port)?;
    }
    let query = |service: &str, tag: &str| json!({ "Name": "pages", "Service": { "Service": service, "Tags": [tag] } });
    let created = mesh
        .api()
        .ask("POST", "query", Some(&query("web", "old")))?;
    let created = created.json()?;
    let id = created.get("ID").and_then(Value::as_str);
    let path = format!("query/{}", id.context("no id of the query")?);
    with_upstreams(
        &mesh,
        &json!([{ "DestinationType": "prepared_query", "DestinationName": "pages", "LocalBindPort": PAGES }]),
    )?;
    mesh.api().intend("shop", "vault", "deny")?;
    mesh.start()?;
    let url = format!("http://{}/", local(PAGES));
    until_read(&mesh, &url, "old")?;
    mesh.api().put(&path, &query("web", "new"))?;
    let changed = until_read(&mesh, &url, "new")?;
    // Tags narrow what is called: the other instance is healthy all the time.
    let others = (0..20).filter(|_| {
        mesh.shop
            .curl(&url)
            .run(SOON)
            .is_ok_and(|page| page.trim() != "new")
    });
    let others = others.count();

    mesh.api().put(&path, &query("vault", "gold"))?;
    let denied = wait_for_value("a denial", SOON, || {
        let seen = mesh.lab.a.access_log().len();
        if mesh.shop.curl(&url).run(SOON).is_ok() {
            return Ok(None);
        }
        let line = mesh.lab.a.wait_for_access_log(seen, &["svc/shop"])?;
        Ok(line.contains("outcome=denied").then_some(line))
    })
    .with_context(|| mesh.said())?;
    mesh.api().intend("shop", "vault", "allow")?;
    wait_for_value("leave", SOON, || {
        Ok(allows(&mesh.lab.a, "shop", "vault")?.then_some(()))
    })?;
    let allowed = until_read(&mesh, &url, "gold").is_ok();
    Ok(Finding::new(
        others == 0 && allowed && denied.contains("vault"),
        format!(
            "curl at {url} got the instance that the query chose by its tag, and {changed} ms after the query changed the \
             other one, {others} times the wrong one; led to a service that an intention denies, it got nothing ({denied}), \
             and with leave its page"
        ),
    ))
}
