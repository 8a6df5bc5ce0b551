//! Who may call whom, and that nobody else listens.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde_json::Value;

use super::capture::{bytes, read, text};
use crate::{
    catalog::Catalog,
    claims::{Finding, Size},
    lab::DEVICE,
    mesh::{Mesh, local, vip},
    node::Node,
    program::Running,
    services,
    wait::{SOON, Stopwatch, wait_for, wait_for_value},
    wire::Capture,
    workload::{Kind, Workload},
};

pub(super) fn the_wire_is_tls(_size: Size) -> Result<Finding> {
    const MARKER: &str = "seen-on-the-wire-4711";
    let mut mesh = Mesh::new("wire")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::http(&place, local(8080), "answer-4711")?);
    mesh.start()?;

    let capture = Capture::start(&mesh.lab.a, "tcp")?;
    let url = format!("http://{}/?{MARKER}", vip(1, 80));
    // Python's server does not care for the question either.
    let page = mesh.shop.curl(&url).run(SOON)?;
    ensure!(page.trim() == "answer-4711", "another page: {page:?}");
    let wire = capture.stop()?;
    let clear = wire.contains(MARKER) || wire.contains("answer-4711");
    let records = wire.tls_records()?;
    Ok(Finding::new(
        !clear && records > 1,
        format!(
            "{} bytes in TLS records, {records} of them application data; question and answer {}",
            wire.len(),
            if clear { "readable" } else { "unreadable" }
        ),
    ))
}

pub(super) fn a_denied_client_sees_no_banner(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("banner")?;
    let place = mesh.place("mail", "mail-1", Kind::Cgroup)?;
    mesh.register("mail", "mail-1", vip(1, 25), local(2525));
    let server = services::peer(&place, "banner", local(2525), "")?;
    mesh.start()?;

    let denied = read(&mesh.guest, &vip(1, 25).to_string())?;
    let accepted_before = server.said().matches("accepted").count();
    let allowed = read(&mesh.shop, &vip(1, 25).to_string())?;
    let accepted_after = server.said().matches("accepted").count();
    let explained = |caller| {
        let question = ["intention", "check", caller, "mail"];
        mesh.lab.a.sidestep(&question)?.output(SOON)
    };
    let (told_denied, told_allowed) = (explained("guest")?, explained("shop")?);
    let is_explained = told_denied.code() == Some(2)
        && told_denied.stdout.starts_with("Denied: default deny")
        && told_allowed.code() == Some(0)
        && told_allowed.stdout.contains("intention allow shop => *")
        && told_allowed.stdout.contains(".yaml");
    Ok(Finding::new(
        bytes(&denied) == 0
            && accepted_before == 0
            && bytes(&allowed) > 0
            && accepted_after == 1
            && is_explained,
        format!(
            "denied: {} bytes ({}), {accepted_before} connections at the server; allowed: {} bytes, {accepted_after}; \
             explained as {:?} and {:?}",
            bytes(&denied),
            text(&denied, "end"),
            bytes(&allowed),
            told_denied.stdout.trim(),
            told_allowed.stdout.trim(),
        ),
    ))
}

pub(super) fn the_called_side_decides_too(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("called")?;
    let place = mesh.place("mail", "mail-1", Kind::Cgroup)?;
    mesh.register("mail", "mail-1", vip(1, 25), local(2525));
    let server = services::peer(&place, "banner", local(2525), "")?;
    // Node `a` believes that everybody may call.
    let credulous = Catalog::new(mesh.scratch().subdirectory("credulous")?);
    credulous.write_instances("services", mesh.instances())?;
    credulous.write_intentions("*", &[("*", "allow")])?;
    mesh.lab.a.use_catalog(credulous.directory());
    mesh.start()?;

    let denied = read(&mesh.guest, &vip(1, 25).to_string())?;
    let line = mesh
        .lab
        .b
        .wait_for_access_log(0, &["guest", "denied"])
        .context("node b wrote no line about it")?;
    let accepted = server.said().matches("accepted").count();
    let allowed = read(&mesh.shop, &vip(1, 25).to_string())?;
    let called = line.contains("inbound");
    Ok(Finding::new(
        bytes(&denied) == 0 && accepted == 0 && called && bytes(&allowed) > 0,
        format!(
            "{} bytes and {accepted} connections past a node that lets all pass",
            bytes(&denied)
        ),
    ))
}

pub(super) fn a_new_denial_cuts_live_connections(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("cut")?;
    let place = mesh.place("chat", "chat-1", Kind::Cgroup)?;
    mesh.register("chat", "chat-1", vip(1, 80), local(8080));
    mesh.keep(services::peer(&place, "echo", local(8080), "")?);
    mesh.start()?;
    let both = [("shop", "allow"), ("guest", "allow")];
    mesh.lab
        .change_catalog(|catalog| catalog.write_intentions("chat", &both))?;

    let mut kept = live(&mesh.shop)?;
    let mut cut = live(&mesh.guest)?;
    let clock = Stopwatch::start();
    mesh.lab
        .catalog
        .write_intentions("chat", &[("shop", "allow"), ("guest", "deny")])?;
    let ended = cut.wait(SOON)?.is_some();
    let time = clock.elapsed();
    let said = fs::read_to_string(mesh.guest.directory().join("live.log"))?;
    let survived = kept.ended()?.is_none();
    Ok(Finding::new(
        ended && survived && time < Duration::from_secs(5),
        format!(
            "the forbidden one {} after {} ms ({}), the allowed one {}",
            if ended { "ended" } else { "lives" },
            time.as_millis(),
            said.lines().last().unwrap_or("nothing said"),
            if survived { "lives" } else { "ended" },
        ),
    ))
}

pub(super) fn silent_strangers_keep_nobody_out(_size: Size) -> Result<Finding> {
    const LIMIT: usize = 64;
    let mut mesh = Mesh::new("silent")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::http(&place, local(8080), "page")?);
    mesh.lab.b.add_setting(&format!(
        "[limits]\nmax_connections = {LIMIT}\n[tunnel]\nhandshake_timeout = \"60s\""
    ));
    mesh.start()?;

    // From another address of the same node: the limit is by address.
    let stranger = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 99));
    mesh.lab.a.namespace().add_address(DEVICE, stranger)?;
    let target = SocketAddr::new(mesh.lab.b.address(), tunnel_port(&mesh.lab.b)?);
    let silent = mesh.lab.a.namespace().run(move || {
        let connect = |_| connect_from(stranger, target);
        (0..4 * LIMIT).map(connect).collect::<Result<Vec<_>>>()
    })?;
    let held = || -> Result<u64> {
        let status = mesh.lab.b.status()?;
        let live = status.pointer("/connections/live_inbound");
        live.and_then(Value::as_u64)
            .context("no count of connections")
    };
    let before = wait_for_value("the strangers to be counted", SOON, || {
        let held = held()?;
        Ok((held >= (LIMIT / 2) as u64).then_some(held))
    })?;
    let url = format!("http://{}/", vip(1, 80));
    let calls = 20;
    let answered = (0..calls)
        .filter(|_| {
            mesh.shop
                .curl(&url)
                .output(SOON)
                .is_ok_and(|said| said.succeeded())
        })
        .count();
    let after = held()?;
    drop(silent);
    Ok(Finding::new(
        answered == calls && before < LIMIT as u64 && after >= before,
        format!(
            "{answered} of {calls} calls succeed while {} silent connections from one address hold {after} of {LIMIT} places",
            4 * LIMIT
        ),
    ))
}

/// Where a node takes tunnels.
fn tunnel_port(node: &Node) -> Result<u16> {
    let status = node.status()?;
    let listeners = status.get("listeners").and_then(Value::as_array);
    let tunnel = listeners
        .into_iter()
        .flatten()
        .find(|listener| listener.get("purpose").is_some_and(|it| it == "tunnel"));
    let address = tunnel.and_then(|listener| listener.get("address")?.as_str());
    let address = address.context("the status names no tunnel listener")?;
    let address: SocketAddr = address.parse().with_context(|| address.to_owned())?;
    Ok(address.port())
}

fn connect_from(source: IpAddr, target: SocketAddr) -> Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
    rustix::net::connect(&socket, &target).with_context(|| format!("connecting to {target}"))?;
    Ok(socket)
}

/// A client that exchanges bytes all the time; returns when it does.
pub(super) fn live(client: &Workload) -> Result<Running> {
    let log = client.directory().join("live.log");
    let running = client
        .peer(&format!("live {}", vip(1, 80)))?
        .log(&log)
        .spawn()?;
    wait_for("a live connection", SOON, || {
        fs::read_to_string(&log).is_ok_and(|said| said.starts_with("up"))
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    Ok(running)
}
