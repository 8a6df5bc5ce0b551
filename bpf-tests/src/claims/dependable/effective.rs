//! Programs that are attached and have no effect.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::web::{self, serves};
use crate::{
    claims::{Finding, Size},
    foreign::{ForeignProgram, Sharing, Verdict},
    node::Node,
    wait::{SOON, wait_for_value},
};

/// Waits until the agent says of its attach point whether connects are captured.
fn wait_for_effect(node: &Node, captured: bool) -> Result<String> {
    // It looks every ten seconds.
    wait_for_value(&format!("captured: {captured}"), 2 * SOON, || {
        let status = node.status()?;
        let effect = status.pointer("/effects/0").cloned().unwrap_or_default();
        let problem = effect.get("problem").and_then(Value::as_str).unwrap_or("");
        let is_so = effect.get("captured") == Some(&captured.into());
        Ok(is_so.then(|| problem.to_owned()))
    })
}

pub(super) fn an_effect_that_is_lost_is_told(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("effect")?;
    mesh.start()?;
    let node = &mesh.lab.a;
    wait_for_effect(node, true)?;
    // It runs after ours and has the last word.
    let foreign = ForeignProgram::load("somebody_else", Verdict::Refuse)?;
    let workloads = node.attach_point()?;
    foreign.attach(&workloads, Sharing::Multi)?;
    let problem = wait_for_effect(node, false)?;
    let metric = node.metric("sidestep_capture_effective", &[])?;
    foreign.detach(&workloads)?;
    wait_for_effect(node, true)?;
    let served = serves(&mesh)?;
    Ok(Finding::new(
        metric == 0.0 && served && !problem.is_empty(),
        format!(
            "told within seconds, in words ({problem}) and as a metric; well again once it is gone"
        ),
    ))
}

pub(super) fn a_cgroup_that_was_replaced_is_attached_anew(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("anew")?;
    mesh.start()?;
    let node = &mesh.lab.a;
    wait_for_effect(node, true)?;
    let workloads = node.attach_point()?;
    let directory = workloads.directory();
    let below: Vec<_> = fs::read_dir(directory)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    // What had the name before goes, with all programs on it.
    for cgroup in &below {
        fs::remove_dir(cgroup).with_context(|| format!("removing {}", cgroup.display()))?;
    }
    fs::remove_dir(directory)?;
    fs::create_dir(directory)?;
    for cgroup in &below {
        fs::create_dir(cgroup)?;
    }
    let served = wait_for_value("capture in the new cgroup", 2 * SOON, || {
        Ok(serves(&mesh)?.then_some(true))
    })?;
    Ok(Finding::new(served, "captured again by itself, and served"))
}
