//! Roots that are rotated in Consul.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::intentions::live;
use crate::{
    claims::{Finding, Size, storm::Storm},
    consul::ConsulMesh,
    envoy::Identity,
    mesh::local,
    node::Node,
    services,
    tls_client::TlsClient,
    wait::{Stopwatch, wait_for_value},
};

/// Consul's agents wait up to half a minute before they renew a leaf.
const RENEWED: Duration = Duration::from_secs(90);

/// What tells a certificate from the one after it. The end alone does not: it has whole seconds, and Consul may renew
/// within the one in which it issued.
pub(super) type Certificate = [String; 3];

/// Waits until none of the certificates `before` is in use on `node`.
fn until_renewed(node: &Node, before: &[Certificate]) -> Result<()> {
    let renewed = wait_for_value("leaves under the new root", RENEWED, || {
        let now = certificates(node)?;
        let renewed = before.iter().all(|old| !now.contains(old));
        Ok((renewed && !now.is_empty()).then_some(()))
    });
    renewed.with_context(|| format!("{}, which said\n{}", node.name(), node.agent_said()))
}

/// Identity, end and issuer of each.
pub(super) fn certificates(node: &Node) -> Result<Vec<Certificate>> {
    let status = node.status()?;
    let all = status.get("certificates").and_then(Value::as_array);
    let of = |certificate: &Value| {
        ["identity", "not_after", "issuer"].map(|key| {
            let text = certificate.get(key).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        })
    };
    Ok(all.into_iter().flatten().map(of).collect())
}

pub(super) fn a_rotated_root_costs_no_connection(size: Size) -> Result<Finding> {
    let rotations = size.pick(1, 3);
    let mut mesh = ConsulMesh::dev("c-rotate")?;
    let place = mesh.place("names")?;
    mesh.keep(services::peer(&place, "names", local(20_000), "1 name")?);
    mesh.register("names", "names", 20_000, Value::Null)?;
    mesh.echo("chat", 8080)?;
    mesh.start()?;
    let names = mesh.callable("names")?;
    let mut kept = live(&mesh.shop, (mesh.callable("chat")?, 80).into())?;
    let targets = mesh.write_targets(&[(names, "name0")])?;
    let storm = Storm::begin(&mesh.shop, targets, size)?;
    let clock = Stopwatch::start();
    for _ in 0..rotations {
        let before = [certificates(&mesh.lab.a)?, certificates(&mesh.lab.b)?];
        mesh.api().rotate_root()?;
        for (node, before) in [&mesh.lab.a, &mesh.lab.b].into_iter().zip(&before) {
            until_renewed(node, before)?;
        }
    }
    let seconds = clock.elapsed().as_secs();
    let report = storm.end()?;
    let lives = kept.ended()?.is_none();
    Ok(Finding::new(
        report.failures.is_empty() && report.wrong == 0 && report.right > 0 && lives,
        format!(
            "{rotations} rotations, all leaves replaced in {seconds} s: {}, {} wrong, failed: {:?}; a live connection {}",
            report.load(),
            report.wrong,
            report.failures,
            if lives { "goes on" } else { "was cut" },
        ),
    ))
}

pub(super) fn a_peer_that_knows_only_the_old_root_is_served(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("c-oldroot")?;
    let place = mesh.place("mail")?;
    mesh.keep(services::peer(&place, "banner", local(2525), "")?);
    mesh.register("mail", "mail", 2525, Value::Null)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    let tunnel = mesh.tunnel_of("mail")?;
    // Roots and leaf of before.
    let old = TlsClient::new(&mesh.lab.a, "old", &Identity::of(mesh.api(), "shop")?)?;
    let first = old.read(tunnel)?;
    let before = certificates(&mesh.lab.b)?;
    mesh.api().rotate_root()?;
    until_renewed(&mesh.lab.b, &before)?;
    let (old_13, old_12) = (old.read(tunnel)?, old.clone().tls12().read(tunnel)?);
    let ok = [&first, &old_13, &old_12].map(|seen| seen.said.starts_with("220 "));
    Ok(Finding::new(
        ok.iter().all(|ok| *ok),
        format!(
            "before {}; under the new root {} over TLS 1.3, {} over 1.2",
            first.end, old_13.end, old_12.end
        ),
    ))
}
