//! What is full in the kernel: maps, the memory of sockets, ring buffers.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::web;
use crate::{
    claims::{Finding, Size},
    mesh::{local, vip},
    node::Node,
    wait::{SOON, wait_for, wait_for_value},
};

/// Destinations that the kernel of `a` may know.
const FEW: u16 = 4;

pub(super) fn a_catalog_too_large_takes_nothing_away(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("vips")?;
    mesh.lab.a.set_capture(&format!("max_vips = {FEW}"));
    mesh.start()?;
    let fitting = mesh.instances().len();
    for number in 0..FEW {
        let name = format!("more-{number}");
        mesh.register(&name, &name, vip(100 + number, 80), local(8080));
    }
    mesh.publish()?;
    wait_for_value("the status to say what is too small", SOON, || {
        let status = mesh.lab.a.status()?;
        let problem = status.pointer("/catalog/problems/0");
        let named = problem.is_some_and(|p| p.to_string().contains("capture.max_vips"));
        Ok(named.then_some(()))
    })?;
    let during = web::served(&mesh, 10)?;
    mesh.instances().truncate(fitting);
    mesh.register("late", "late", vip(200, 80), local(8080));
    mesh.publish()?;
    wait_for_value("what was registered since", SOON, || {
        let page = mesh.shop.curl(&format!("http://{}/", vip(200, 80)));
        Ok((page.output(SOON)?.stdout.trim() == "web").then_some(()))
    })?;
    Ok(Finding::new(
        during == 10,
        format!(
            "with one destination more than the {FEW} that fit: {during} of 10 calls; once it is smaller, a new one is called"
        ),
    ))
}

pub(super) fn a_socket_without_memory_is_refused(_size: Size) -> Result<Finding> {
    const CALLS: u64 = 20;
    const OPTMEM: &str = "../core/optmem_max";
    let mut mesh = web::mesh("optmem")?;
    mesh.start()?;
    let namespace = mesh.lab.a.namespace().clone();
    // Of this namespace alone since Linux 6.8. Before, a namespace has no such file, and this is an error.
    let before = namespace.run(|| Ok(fs::read_to_string("/proc/sys/net/core/optmem_max")?))?;
    namespace.set_ipv4(OPTMEM, "16")?;
    let mut ends = vec![];
    for _ in 0..CALLS {
        ends.push(web::connect(&mesh)?);
    }
    let refused = ends.iter().filter(|end| *end == "ECONNREFUSED").count();
    let counted = web::verdicts(&mesh.lab.a, "refused_storage")?;
    namespace.set_ipv4(OPTMEM, before.trim())?;
    let after = web::served(&mesh, 10)?;
    ends.dedup();
    Ok(Finding::new(
        refused as u64 == CALLS && counted == CALLS && after == 10,
        format!(
            "{CALLS} calls without memory end with {}, {counted} counted as refused_storage; with memory {after} of 10 succeed",
            ends.join(", ")
        ),
    ))
}

pub(super) fn refusals_that_nobody_reads_block_nothing(size: Size) -> Result<Finding> {
    // The ring buffer has room for about 3,000.
    let refusals = size.pick(10_000_u64, 200_000);
    let mut mesh = web::mesh("ring")?;
    // It is to wait, not to be taken for hung.
    mesh.lab.a.set_capture("hung_after = \"off\"");
    mesh.start()?;
    let process = stop(&mesh.lab.a)?;
    let script = format!(
        "
import errno, socket, time
ends, slowest = {{}}, 0
for _ in range({refusals}):
    s = socket.socket()
    begun = time.monotonic()
    end = errno.errorcode[s.connect_ex(('{}', 80))]
    slowest = max(slowest, time.monotonic() - begun)
    s.close()
    ends[end] = ends.get(end, 0) + 1
import json
print(json.dumps({{'ends': ends, 'slowest_ms': int(slowest * 1000)}}))",
        vip(9, 80).ip()
    );
    let said = mesh.shop.program("python3").args(["-c", &script]);
    let said = said.run(SOON * 3)?;
    let report: Value = serde_json::from_str(&said).with_context(|| format!("reading {said:?}"))?;
    // Captured while the agent stands still: it waits, and is served.
    let url = format!("http://{}/", vip(1, 80));
    let mut waiting = mesh.shop.curl(&url).spawn()?;
    wait_for_value("the call to be captured", SOON, || {
        ensure!(waiting.ended()?.is_none(), "the call has ended");
        // From the new connection's listener: established, and not accepted.
        let queued = mesh.lab.a.tool("ss")?;
        let queued = queued.args(["--no-header", "--tcp", "--numeric", "state", "established"]);
        Ok(queued.run(SOON)?.contains(":15001").then_some(()))
    })?;
    mesh.lab.a.signal_agent(Signal::CONT)?;
    let served = waiting.wait(SOON)?.is_some_and(|status| status.success());
    let counted = web::verdicts(&mesh.lab.a, "refused_unknown_vip")?;
    let after = web::served(&mesh, 10)?;
    let right = report.pointer("/ends/EHOSTUNREACH").and_then(Value::as_u64);
    let slowest = report.get("slowest_ms").and_then(Value::as_u64);
    Ok(Finding::new(
        right == Some(refusals)
            && counted == refusals
            && slowest.is_some_and(|ms| ms < 1_000)
            && served
            && after == 10,
        format!(
            "process {process} stopped: {report} of {refusals} refusals, {counted} counted; a call made meanwhile {}, {after} of 10 after it",
            if served { "is served later" } else { "is lost" },
        ),
    ))
}

/// Stops the agent's process, as a debugger does; returns its id once it stands still.
fn stop(node: &Node) -> Result<u64> {
    let status = node.status()?;
    let process = status.get("process").and_then(Value::as_u64);
    let process = process.context("the status has no process")?;
    node.signal_agent(Signal::STOP)?;
    wait_for("the agent to stand still", SOON, || {
        fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| stat.contains(") T "))
    })?;
    Ok(process)
}
