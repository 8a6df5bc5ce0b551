//! While there is no agent.

use std::{collections::BTreeSet, fs};

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use serde_json::Value;

use super::web::{self, serves};
use crate::{
    claims::{Finding, Size},
    node::Node,
    wait::SOON,
};

fn links(node: &Node) -> Result<BTreeSet<u64>> {
    let status = node.status()?;
    let attachments = status.get("attachments").and_then(Value::as_array);
    let attachments = attachments.with_context(|| format!("no attachments in {status}"))?;
    Ok(attachments
        .iter()
        .filter_map(|attachment| attachment.get("link_id").and_then(Value::as_u64))
        .collect())
}

pub(super) fn a_killed_agent_fails_closed(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("killed")?;
    mesh.start()?;
    let (before, first) = (links(&mesh.lab.a)?, serves(&mesh)?);
    mesh.lab.a.kill_agent();
    let away = web::connect(&mesh)?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let (after, second) = (links(&mesh.lab.a)?, serves(&mesh)?);
    Ok(Finding::new(
        first && away == "ECONNREFUSED" && second && before == after && !after.is_empty(),
        format!(
            "served before: {first}, while away: {away}, served after: {second}, links before {before:?} and after {after:?}"
        ),
    ))
}

pub(super) fn a_broken_catalog_at_start_takes_nothing_away(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("partly")?;
    mesh.start()?;
    mesh.lab.a.kill_agent();
    let file = mesh.lab.catalog.directory().join("services.yaml");
    let good = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    fs::write(&file, "service: { name: web, port: \n")?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    // Not EHOSTUNREACH: the kernel knows the address, though the agent does not serve it.
    let broken = web::connect(&mesh)?;
    fs::write(&file, &good)?;
    web::wait_until_served(&mesh)?;
    Ok(Finding::new(
        broken != "EHOSTUNREACH",
        format!("with the broken file: {broken}; once it is mended: served"),
    ))
}

pub(super) fn detach_leaves_a_clean_host(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("clean")?;
    mesh.start()?;
    let node = &mut mesh.lab.a;
    let refused = node.sidestep(&["detach"])?.output(SOON)?;
    node.signal_agent(Signal::TERM)?;
    node.wait_for_agent_end(SOON)?;
    let left = node.pin_directory().exists();
    let detached = node.sidestep(&["detach"])?.output(SOON)?;
    let gone = !node.pin_directory().exists();
    let (complaint, lines) = (refused.stderr.clone(), detached.stdout.lines().count());
    let after = web::connect(&mesh)?;
    Ok(Finding::new(
        !refused.succeeded() && left && detached.succeeded() && gone && after == "ENETUNREACH",
        format!(
            "while it runs: {}; after: {lines} links detached, then calls end with {after}",
            complaint.trim()
        ),
    ))
}
