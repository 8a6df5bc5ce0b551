//! The tunnel `hbone` between two nodes.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    node::Node,
    services,
    wait::SOON,
    workload::Kind,
};

/// The least that may carry them, and the most that the pool opens for so many.
const TUNNELS: std::ops::RangeInclusive<usize> = 1..=4;

pub(super) fn calls_share_tunnels(size: Size) -> Result<Finding> {
    let connections = size.pick(400_u64, 1_000);
    let mut mesh = Mesh::new("shared")?;
    let place = mesh.place("echo", "echo", Kind::Cgroup)?;
    for (index, mode) in [(1, "echo"), (2, "hash"), (3, "reset")] {
        mesh.register(mode, mode, vip(index, 80), local(8080 + index));
        mesh.keep(services::peer(&place, mode, local(8080 + index), "")?);
    }
    for instance in mesh.instances() {
        instance.meta = vec![("sidestep-tunnel", "hbone")];
    }
    // The called side listens where it is told; the caller needs no setting.
    mesh.lab.b.add_setting("[tunnel]\nhbone_port = 15008");
    mesh.start()?;

    let targets = mesh.scratch().subdirectory("echo")?.join("targets");
    std::fs::write(&targets, format!("{} echo\n", vip(1, 80)))
        .with_context(|| format!("writing {}", targets.display()))?;
    let held = mesh.shop.ask_peer(
        &format!("hold {} 16 {connections}", targets.display()),
        Duration::from_mins(5),
    )?;
    let answered = held.get("answered").and_then(Value::as_u64);
    let tunnels = tunnels(&mesh.lab.a)?;

    let upload = format!("upload {} {}", vip(2, 80), 64 << 20);
    let upload = mesh.shop.ask_peer(&upload, Duration::from_mins(5))?;
    let is_whole =
        upload.get("sent").context("no hash")? == upload.get("answer").context("none")?;
    let reset = mesh.shop.ask_peer(&format!("read {}", vip(3, 80)), SOON)?;
    let is_reset = reset.get("end").and_then(Value::as_str) == Some("ECONNRESET");
    Ok(Finding::new(
        answered == Some(connections) && TUNNELS.contains(&tunnels) && is_whole && is_reset,
        format!(
            "{answered:?} of {connections} connections at once over {tunnels} tunnels; upload whole: {is_whole}; reset seen: {is_reset}",
        ),
    ))
}

/// Connections to the other node's HBONE port.
fn tunnels(node: &Node) -> Result<usize> {
    let sockets = node.tool("ss")?;
    let sockets = sockets.args(["--no-header", "--tcp", "--numeric", "state", "established"]);
    let said = sockets.args(["dport", "=", ":15008"]).run(SOON)?;
    Ok(said.lines().filter(|line| !line.trim().is_empty()).count())
}
