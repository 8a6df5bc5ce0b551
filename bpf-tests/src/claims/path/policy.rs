//! Who may call whom, and that nobody else listens.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::capture::{bytes, read, text};
use crate::{
    catalog::Catalog,
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    program::Running,
    services,
    wait::{SOON, Stopwatch, wait_for},
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
    Ok(Finding::new(
        bytes(&denied) == 0 && accepted_before == 0 && bytes(&allowed) > 0 && accepted_after == 1,
        format!(
            "denied: {} bytes ({}), {accepted_before} connections at the server; allowed: {} bytes, {accepted_after}",
            bytes(&denied),
            text(&denied, "end"),
            bytes(&allowed),
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
