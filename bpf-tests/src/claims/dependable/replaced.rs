//! Agents that are killed and replaced while connections come without pause.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    claims::{Finding, Size, storm::Storm},
    mesh::{Mesh, local, vip},
    node::Node,
    program::Running,
    services,
    wait::{SOON, monotonic_ms, wait_for},
    workload::Kind,
};

const SERVICES: u16 = 200;

/// The service that takes uploads.
const UPLOADS: &str = "hash";

/// A steady load from `shop` on `a` to all services on `b` that say their name without being asked.
pub(super) fn storm(mesh: &Mesh, size: Size) -> Result<Storm> {
    let targets = mesh.write_targets()?;
    let all = fs::read_to_string(&targets)?;
    let named: Vec<&str> = all
        .lines()
        .filter(|line| !line.ends_with(UPLOADS))
        .collect();
    fs::write(&targets, named.join("\n"))?;
    Storm::begin(&mesh.shop, targets, size)
}

pub(super) fn many_services(purpose: &str) -> Result<Mesh> {
    let mut mesh = Mesh::new(purpose)?;
    let place = mesh.place("svc-0", "names", Kind::Cgroup)?;
    for number in 0..SERVICES {
        let name = format!("svc-{number}");
        let answer = format!("answer-{number}");
        mesh.register(&name, &answer, vip(number, 80), local(20_000 + number));
    }
    let served = format!("{SERVICES} answer-");
    mesh.keep(services::peer(&place, "names", local(20_000), &served)?);
    Ok(mesh)
}

pub(in crate::claims) fn upgrade(node: &Node) -> Result<String> {
    let output = node
        .sidestep(&["upgrade"])?
        .output(Duration::from_mins(1))?;
    ensure!(
        output.succeeded(),
        "upgrade of {}: {}; the agent said:\n{}",
        node.name(),
        output.stderr,
        node.agent_said()
    );
    Ok(output.stdout)
}

/// An upload of which half was sent.
pub(super) struct Upload {
    hold: PathBuf,
    log: PathBuf,
    running: Running,
}

impl Upload {
    pub(super) fn begin(mesh: &Mesh, name: &str, bytes: u64) -> Result<Self> {
        let file = |kind: &str| mesh.shop.directory().join(format!("{name}.{kind}"));
        let (hold, log) = (file("hold"), file("log"));
        fs::write(&hold, "")?;
        let arguments = format!("upload {} {bytes} {}", vip(999, 80), hold.display());
        let running = mesh.shop.peer(&arguments)?.log(&log).spawn()?;
        wait_for("half of an upload", SOON, || {
            fs::read_to_string(&log).is_ok_and(|said| said.starts_with("up"))
        })?;
        Ok(Self { hold, log, running })
    }

    /// Begins to send the second half.
    pub(super) fn go_on(&self) -> Result<()> {
        fs::remove_file(&self.hold).context("letting an upload go on")
    }

    /// Waits for its end. Returns whether all of it arrived.
    pub(super) fn end(mut self) -> Result<bool> {
        self.running.wait(Duration::from_mins(1))?;
        let said = fs::read_to_string(&self.log)?;
        let report = said.lines().nth(1).unwrap_or_default();
        let report: Value = serde_json::from_str(report).unwrap_or_default();
        Ok(report.get("sent").is_some() && report.get("sent") == report.get("answer"))
    }
}

pub(super) fn an_upgrade_loses_no_connection(size: Size) -> Result<Finding> {
    let rounds = size.pick(2_usize, 10);
    let mut mesh = many_services("upgrade")?;
    let hash = mesh.place(UPLOADS, UPLOADS, Kind::Cgroup)?;
    mesh.register(UPLOADS, UPLOADS, vip(999, 80), local(8080));
    mesh.keep(services::peer(&hash, "hash", local(8080), "")?);
    for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
        node.add_setting("[limits]\ndrain_timeout = \"60s\"");
    }
    mesh.start()?;
    let storm = storm(&mesh, size)?;
    let mut whole = 0;
    for round in 0..rounds {
        for node in [&mesh.lab.a, &mesh.lab.b] {
            let name = format!("{round}-{}", node.name());
            let upload = Upload::begin(&mesh, &name, size.pick(4 << 20, 64 << 20))?;
            upgrade(node)?;
            upload.go_on()?;
            whole += usize::from(upload.end()?);
        }
    }
    let report = storm.end()?;
    let upgrades = 2 * rounds;
    Ok(Finding::new(
        report.wrong == 0 && report.failures.is_empty() && report.right > 0 && whole == upgrades,
        format!(
            "{upgrades} upgrades: {}, {} wrong, failed: {:?}; {whole} uploads over an upgrade whole",
            report.load(),
            report.wrong,
            report.failures,
        ),
    ))
}

pub(super) fn a_kill_costs_only_the_time_away(size: Size) -> Result<Finding> {
    let rounds = size.pick(2_usize, 10);
    let mut mesh = many_services("kills")?;
    mesh.start()?;
    let storm = storm(&mesh, size)?;
    let mut away = vec![];
    for _ in 0..rounds {
        for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
            let from = monotonic_ms();
            node.kill_agent();
            node.start_agent()?;
            node.wait_until_ready()?;
            away.push((from, monotonic_ms()));
        }
    }
    let report = storm.end()?;
    let unexplained = report.unexplained(&away);
    let longest = away.iter().map(|(from, to)| to - from).max().unwrap_or(0);
    Ok(Finding::new(
        report.wrong == 0 && unexplained.is_empty() && report.right > 0,
        format!(
            "{} kills, each agent back within {longest} ms: {}, {} wrong, {} failed while an agent was away, and at other times: {unexplained:?}",
            2 * rounds,
            report.load(),
            report.wrong,
            report.failures.len() - unexplained.len(),
        ),
    ))
}
