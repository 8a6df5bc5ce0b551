//! What sidecars offered their applications beside ports for services.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::intentions::allows;
use crate::{
    claims::{Finding, Size},
    consul::{ConsulMesh, NewerConsul, SOON, sidecar_for},
    mesh::local,
    program::Program,
    services,
    wait::{Stopwatch, wait_for_value},
    workload::Workload,
};

/// Where `shop`'s sidecar would be; none runs.
const SIDECAR: u16 = 21_001;

/// Where `shop` reaches what the query finds.
const PAGES: u16 = 9_192;

/// Where it reaches what is in another datacenter.
const FAR: u16 = 9_193;

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

/// Has `curl` ask until it reads `expected`. Returns how many milliseconds that took.
fn until_read(mesh: &ConsulMesh, curl: &Program, expected: &str) -> Result<u128> {
    let clock = Stopwatch::start();
    wait_for_value(&format!("{expected} by {}", curl.line()), SOON, || {
        let page = curl.run(SOON).unwrap_or_default();
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
    let curl = mesh.shop.curl(&url);
    until_read(&mesh, &curl, "old")?;
    mesh.api().put(&path, &query("web", "new"))?;
    let changed = until_read(&mesh, &curl, "new")?;
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
        if curl.run(SOON).is_ok() {
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
    let allowed = until_read(&mesh, &curl, "gold").is_ok();
    Ok(Finding::new(
        others == 0 && allowed && denied.contains("vault"),
        format!(
            "curl at {url} got the instance that the query chose by its tag, and {changed} ms after the query changed the \
             other one, {others} times the wrong one; led to a service that an intention denies, it got nothing ({denied}), \
             and with leave its page"
        ),
    ))
}

/// curl in `client`, by a Unix socket: the agent goes by the process that connects.
fn by_socket(client: &Workload, socket: &Path) -> Program {
    let curl = client.curl("http://web/").arg("--unix-socket");
    curl.arg(socket)
}

pub(super) fn a_unix_socket_is_offered(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("c-unix")?;
    page(&mut mesh, "web", "page", 8_081)?;
    let _newer = NewerConsul::start(&mesh.lab.a)?;
    let address = format!("address = \"{}\"", NewerConsul::HTTP);
    mesh.lab.a.use_consul(&address);
    let socket = mesh.shop.directory().join("web.sock");
    let fields = json!({ "LocalBindSocketPath": socket, "LocalBindSocketMode": "0600" });
    with_upstreams(
        &mesh,
        &json!([{ "DestinationName": "web", "LocalBindPort": PAGES, "Config": fields }]),
    )?;
    mesh.api().intend("guest", "web", "deny")?;
    mesh.start()?;
    let [shop, guest] = [&mesh.shop, &mesh.guest].map(|client| by_socket(client, &socket));
    until_read(&mesh, &shop, "page")?;
    wait_for_value("the denial", SOON, || {
        Ok((!allows(&mesh.lab.a, "guest", "web")?).then_some(()))
    })?;
    let seen = mesh.lab.a.access_log().len();
    let refused = guest.run(SOON).is_err();
    let denied = mesh.lab.a.wait_for_access_log(seen, &["svc/guest"])?;

    // Somebody tidies up.
    fs::remove_file(&socket)?;
    until_read(&mesh, &shop, "page")?;

    // Killed, it leaves its socket to the next one; stopped, it leaves none.
    mesh.lab.a.kill_agent();
    ensure!(fs::exists(&socket)?, "a killed agent's socket is gone");
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    until_read(&mesh, &shop, "page")?;
    mesh.lab.a.signal_agent(Signal::TERM)?;
    mesh.lab.a.wait_for_agent_end(SOON)?;
    let left = fs::exists(&socket)?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    until_read(&mesh, &shop, "page")?;

    let log = mesh.lab.a.directory().join("upgrade.log");
    let mut upgrade = mesh.lab.a.sidestep(&["upgrade"])?.log(&log).spawn()?;
    let mut served = vec![];
    let status = loop {
        let ended = upgrade.ended()?;
        // Once more after the end: only the next agent serves then.
        served.push(shop.run(SOON).is_ok_and(|page| page.trim() == "page"));
        if let Some(status) = ended {
            break status;
        }
    };
    ensure!(status.success(), "{}", fs::read_to_string(&log)?);
    let good = served.iter().filter(|served| **served).count();
    Ok(Finding::new(
        refused && denied.contains("outcome=denied") && !left && good == served.len(),
        format!(
            "curl of shop got the page by the socket, that of guest nothing ({denied}); it goes on after it was removed, after the agent was \
             killed, {} after it stopped, and {good} of {} calls were served during an upgrade",
            if left { "is left" } else { "is gone" },
            served.len()
        ),
    ))
}

pub(super) fn another_datacenter_is_reached(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::datacenters("c-far")?;
    page(&mut mesh, "web", "far", 8_081)?;
    let query = json!({ "Name": "pages", "Service": {
        "Service": "web", "Failover": { "Datacenters": ["dc2"] },
    } });
    let created = mesh.api().ask("POST", "query", Some(&query))?;
    ensure!(created.status == 200, "{}", created.body);
    with_upstreams(
        &mesh,
        &json!([
            { "DestinationName": "web", "Datacenter": "dc2", "LocalBindPort": FAR },
            { "DestinationType": "prepared_query", "DestinationName": "pages", "LocalBindPort": PAGES },
        ]),
    )?;
    mesh.api().intend("guest", "web", "deny")?;
    mesh.start()?;
    let url = |port: u16| format!("http://{}/", local(port));
    for port in [FAR, PAGES] {
        until_read(&mesh, &mesh.shop.curl(&url(port)), "far")?;
    }
    let callers = "/ns/default/dc/dc1/svc/shop";
    // A connection is logged when it has ended.
    let known = wait_for_value("both calls in the access log of dc2", SOON, || {
        let there = mesh.lab.b.access_log();
        let known = there.iter().filter(|line| line.contains(callers)).count();
        Ok((known >= 2).then_some(known))
    })?;
    let (mut refused, mut last) = (0, String::new());
    for port in [FAR, PAGES] {
        let seen = mesh.lab.a.access_log().len();
        let denied = mesh.guest.curl(&url(port)).run(SOON).is_err();
        last = mesh.lab.a.wait_for_access_log(seen, &["svc/guest"])?;
        refused += usize::from(denied && last.contains("outcome=denied"));
    }
    Ok(Finding::new(
        refused == 2,
        format!(
            "curl in dc1 got the page of a service that is only in dc2, by an upstream there and by a query that fails \
             over; dc2 knew the caller as {callers} {known} times; of another caller, whom an intention denies, {refused} \
             of 2 were refused ({last})"
        ),
    ))
}
