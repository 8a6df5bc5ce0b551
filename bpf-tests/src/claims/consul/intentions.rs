//! Intentions that are written to Consul.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    claims::{Finding, Size},
    consul::{ConsulMesh, SOON},
    envoy::Identity,
    mesh::local,
    node::Node,
    program::Running,
    programs, services,
    tls_client::TlsClient,
    wait::{Stopwatch, wait_for, wait_for_value},
    workload::Workload,
};

/// Whether the agent of `node` lets `source` call `destination`, as `sidestep intention check` says it.
pub(super) fn allows(node: &Node, source: &str, destination: &str) -> Result<bool> {
    let output = node
        .tool(programs::agent()?)?
        .args(["intention", "check", source, destination, "--socket"])
        .arg(node.admin_socket())
        .output(SOON)?;
    match output.code() {
        Some(0) => Ok(true),
        Some(2) => Ok(false),
        _ => Err(anyhow::anyhow!("{} {}", output.code_text(), output.stderr)),
    }
}

pub(super) fn decisions_are_consuls(_size: Size) -> Result<Finding> {
    const SOURCES: [&str; 4] = ["shop", "guest", "web", "other"];
    const DESTINATIONS: [&str; 4] = ["web", "db", "cache", "other"];
    let mut mesh = ConsulMesh::dev("c-decide")?;
    mesh.echo("web", 8080)?;
    mesh.start()?;
    let steps = [
        ("web", "db", "allow"),
        ("*", "db", "deny"),
        ("web", "*", "deny"),
        ("*", "*", "deny"),
        ("shop", "*", "allow"),
        ("*", "cache", "allow"),
        ("guest", "web", "allow"),
        ("*", "*", "allow"),
        ("web", "db", "deny"),
    ];
    let (mut compared, mut wrong) = (0, vec![]);
    for (source, destination, action) in steps {
        mesh.api().intend(source, destination, action)?;
        for source in SOURCES {
            for destination in DESTINATIONS {
                let path =
                    format!("connect/intentions/check?source={source}&destination={destination}");
                let consul = mesh.api().get(&path)?.get("Allowed") == Some(&true.into());
                let what = format!("{source} to {destination} after {action}");
                // A change takes a moment.
                let agrees = wait_for(&what, Duration::from_secs(3), || {
                    allows(&mesh.lab.a, source, destination).is_ok_and(|ours| ours == consul)
                });
                compared += 1;
                if agrees.is_err() {
                    wrong.push(format!("{what}: Consul says {consul}"));
                }
            }
        }
    }
    Ok(Finding::new(
        wrong.is_empty(),
        format!(
            "{} of {compared} decisions equal over {} changes {}",
            compared - wrong.len(),
            steps.len(),
            wrong.join("; ")
        ),
    ))
}

pub(super) fn a_new_denial_cuts_live_connections(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("c-cut")?;
    mesh.echo("chat", 8080)?;
    mesh.start()?;
    let chat = (mesh.callable("chat")?, 80).into();
    let mut kept = live(&mesh.shop, chat)?;
    let mut cut = live(&mesh.guest, chat)?;
    mesh.api().intend("guest", "chat", "deny")?;
    let clock = Stopwatch::start();
    let ended = cut.wait(SOON)?.is_some();
    let time = clock.elapsed();
    let survived = kept.ended()?.is_none();
    Ok(Finding::new(
        ended && survived && time < Duration::from_secs(1),
        format!(
            "the forbidden one {} after {} ms, the allowed one {}",
            if ended { "ended" } else { "lives" },
            time.as_millis(),
            if survived { "lives" } else { "ended" },
        ),
    ))
}

/// A client on a node with Sidestep that exchanges bytes with `address` all the time; returns when it does.
pub(super) fn live(client: &Workload, address: SocketAddr) -> Result<Running> {
    let log = client.directory().join("live.log");
    let running = client.peer(&format!("live {address}"))?.log(&log).spawn()?;
    wait_for("a live connection", SOON, || {
        fs::read_to_string(&log).is_ok_and(|said| said.starts_with("up"))
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    Ok(running)
}

pub(super) fn a_denial_cuts_peers_of_other_kinds(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("c-cut-peer")?;
    let place = mesh.place("chat")?;
    mesh.keep(services::peer(&place, "echo", local(8080), "")?);
    mesh.register("chat", "chat", 8080, serde_json::Value::Null)?;
    mesh.lab.b.start_agent()?;
    mesh.lab.b.wait_until_ready()?;
    let tunnel = mesh.tunnel_of("chat")?;
    let client = |name: &str| {
        let identity = Identity::of(mesh.api(), name)?;
        TlsClient::new(&mesh.lab.a, name, &identity)?.live(tunnel)
    };
    let (mut kept, mut cut) = (client("shop")?, client("guest")?);
    mesh.api().intend("guest", "chat", "deny")?;
    let clock = Stopwatch::start();
    let end = cut.end()?;
    let time = clock.elapsed();
    // Some more exchanges.
    let survived = wait_for_value("more exchanges", SOON, || {
        let waited = clock.elapsed() > time + Duration::from_millis(200);
        Ok(waited.then_some(()))
    })
    .and_then(|()| kept.lives())?;
    Ok(Finding::new(
        end.is_some() && survived && time < Duration::from_secs(1),
        format!(
            "the forbidden one {} after {} ms, the allowed one {}",
            end.map_or("lives".to_owned(), |seen| format!("ended ({})", seen.end)),
            time.as_millis(),
            if survived { "lives" } else { "ended" },
        ),
    ))
}
