//! Peers that connect in every way that Consul's proxies do, and some more.

use std::net::TcpStream;

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    claims::{Finding, Size},
    consul::{ConsulMesh, SOON},
    envoy::Identity,
    mesh::local,
    services,
    tls_client::TlsClient,
    wait::wait_for_value,
};

/// What the server says first.
const BANNER: &str = "220 ";

/// A mesh with `mail`, which speaks first, on node b, where an agent runs. Node a has none.
fn with_mail(purpose: &str, more: Value) -> Result<(ConsulMesh, services::Service)> {
    let mut mesh = ConsulMesh::dev(purpose)?;
    let place = mesh.place("mail")?;
    let server = services::peer(&place, "banner", local(2525), "")?;
    mesh.register("mail", "mail", 2525, more)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    Ok((mesh, server))
}

pub(super) fn every_way_of_tls_is_served(_size: Size) -> Result<Finding> {
    let (mesh, _server) = with_mail("c-tls", Value::Null)?;
    let tunnel = mesh.tunnel_of("mail")?;
    let trust_domain = mesh.api().trust_domain()?;
    let expected = format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/mail");
    let plain = TlsClient::new(&mesh.lab.a, "shop", &Identity::of(mesh.api(), "shop")?)?;
    let name = format!("mail.default.dc1.internal.{trust_domain}");
    let mut clients = vec![];
    for (version, client) in [("1.3", plain.clone()), ("1.2", plain.tls12())] {
        for (named, client) in [
            ("no name", client.clone()),
            ("named", client.server_name(&name)),
        ] {
            for protocols in [&[][..], &["h2"], &["http/1.1"], &["h2", "http/1.1"]] {
                let offering = protocols
                    .iter()
                    .fold(client.clone(), |client, it| client.alpn(it));
                clients.push((format!("{version} {named} {protocols:?}"), offering));
            }
        }
    }
    let mut wrong = vec![];
    for (way, client) in &clients {
        let seen = client.read(tunnel)?;
        if !seen.said.starts_with(BANNER) || seen.uri.as_deref() != Some(&expected) {
            wrong.push(format!("{way}: {seen:?}"));
        }
    }
    let all = clients.len();
    Ok(Finding::new(
        wrong.is_empty(),
        format!(
            "{} of {all} combinations read the banner of {expected} {}",
            all - wrong.len(),
            wrong.join("\n")
        ),
    ))
}

pub(super) fn a_tcp_health_check_is_no_call(_size: Size) -> Result<Finding> {
    const CHECKS: usize = 50;
    let (mesh, server) = with_mail("c-check", Value::Null)?;
    let tunnel = mesh.tunnel_of("mail")?;
    let before = mesh.lab.b.metric("sidestep_connections_total", &[])?;
    let lines = mesh.lab.b.access_log().len();
    mesh.lab.a.namespace().run(move || {
        for _ in 0..CHECKS {
            drop(TcpStream::connect(tunnel)?);
        }
        Ok(())
    })?;
    // As Consul itself does it, which looks once a second.
    let check = json!({ "ID": "bare", "Name": "bare", "TCP": tunnel, "Interval": "1s" });
    mesh.consul.b().api().put("agent/check/register", &check)?;
    wait_for_value("a check that passes", SOON, || {
        let checks = mesh.consul.b().api().get("agent/checks")?;
        let status = checks.pointer("/bare/Status").and_then(Value::as_str);
        Ok((status == Some("passing")).then_some(()))
    })?;
    let client = TlsClient::new(&mesh.lab.a, "shop", &Identity::of(mesh.api(), "shop")?)?;
    let accepted = server.said().matches("accepted").count();
    let banner = client.read(tunnel)?.said.starts_with(BANNER);
    // One call was real: what it left says that what came before is all there.
    mesh.lab.b.wait_for_access_log(lines, &["mail"])?;
    let after = mesh.lab.b.metric("sidestep_connections_total", &[])?;
    let failures = mesh.lab.b.access_log().len() - lines - 1;
    Ok(Finding::new(
        accepted == 0 && banner && failures == 0 && after - before < 2.0,
        format!(
            "{CHECKS} checks and Consul's own: {accepted} connections to the application, {failures} lines of log; a call after them {}",
            if banner { "is served" } else { "is not served" }
        ),
    ))
}

pub(super) fn a_denied_peer_sees_no_banner(_size: Size) -> Result<Finding> {
    let (mesh, server) = with_mail("c-banner", Value::Null)?;
    let tunnel = mesh.tunnel_of("mail")?;
    let guest = TlsClient::new(&mesh.lab.a, "guest", &Identity::of(mesh.api(), "guest")?)?;
    let shop = TlsClient::new(&mesh.lab.a, "shop", &Identity::of(mesh.api(), "shop")?)?;
    mesh.api().intend("guest", "mail", "deny")?;
    wait_for_value("the intention to be in force", SOON, || {
        Ok((!allowed(&mesh)?).then_some(()))
    })?;
    let before = server.said().matches("accepted").count();
    let denied = [guest.read(tunnel)?, guest.clone().tls12().read(tunnel)?];
    let opened = server.said().matches("accepted").count() - before;
    let banner = shop.read(tunnel)?.said;
    let bytes: usize = denied.iter().map(|seen| seen.said.len()).sum();
    let ends: Vec<&str> = denied.iter().map(|seen| seen.end.as_str()).collect();
    Ok(Finding::new(
        bytes == 0 && opened == 0 && banner.starts_with(BANNER),
        format!(
            "denied over TLS 1.3 and 1.2: {bytes} bytes, {opened} connections to the application ({}); another peer reads {:?}",
            ends.join(", "),
            banner.trim()
        ),
    ))
}

/// Whether node b lets `guest` call `mail`.
fn allowed(mesh: &ConsulMesh) -> Result<bool> {
    super::intentions::allows(&mesh.lab.b, "guest", "mail")
}
