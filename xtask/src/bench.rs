//! `cargo xtask bench`: measurements, printed as rows for docs/performance.md.

use std::{fs, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail};
use bpf_tests::{
    mesh::{Mesh, local, vip},
    programs, services,
    wait::{SOON, Stopwatch},
    workload::Kind,
};
use serde_json::Value;

use crate::{
    build, host,
    progress::{Step, say, table},
};

/// See [`crate::Command::Bench`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to measure.
    #[arg(value_enum)]
    what: Subject,
    /// For how long each row is measured.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Subject {
    /// The way of bytes and of new connections through two agents.
    Relay,
}

/// What one measurement found.
struct Row {
    what: String,
    amount: f64,
    unit: &'static str,
    elapsed: Duration,
    /// Of both agents, kernel included as far as it runs on their behalf.
    agents: Duration,
    /// Of the whole machine.
    machine: Duration,
}

/// Measures and prints.
///
/// # Errors
/// If something does not start or fails under load.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if !host::is_root() {
        bail!("needs root: it makes network namespaces and loads eBPF programs");
    }
    match arguments.what {
        Subject::Relay => relay(arguments.seconds)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn relay(seconds: u64) -> Result<()> {
    host::require(&["ip"])?;
    build::ebpf_programs()?;
    build::agent_and_peer()?;
    programs::use_agent(build::release_agent()?);

    let mut mesh = Mesh::new("bench")?;
    let wire: SocketAddr = (mesh.lab.b.address(), 0).into();
    let at = |port| SocketAddr::new(wire.ip(), port);
    for (index, mode, port) in [(1, "sink", 8081), (2, "echo", 8082)] {
        let place = mesh.place(mode, mode, Kind::Cgroup)?;
        mesh.register(mode, mode, vip(index, 80), local(port));
        mesh.keep(services::peer(&place, mode, local(port), "")?);
        // The same without Sidestep: straight over the wire, in the clear.
        mesh.keep(services::peer(&place, mode, at(port), "")?);
    }
    for node in [&mesh.lab.a, &mesh.lab.b] {
        // Ports of closed connections are searched for by the next ones: a row would depend on those before.
        node.namespace().set_ipv4("tcp_max_tw_buckets", "100")?;
    }
    mesh.start()?;

    let mut rows = vec![];
    for threads in [1, 8] {
        let connections = if threads == 1 {
            "1 connection"
        } else {
            "8 connections"
        };
        for (way, address) in [("mesh", vip(1, 80)), ("direct", at(8081))] {
            let what = format!("bytes, {connections}, {way}");
            let load = format!("pour {address} {threads} {seconds}");
            rows.push(measure(&mesh, what, &load, "bytes", "GB", 1e9, seconds)?);
        }
    }
    for threads in [1, 8] {
        for (way, address) in [("mesh", vip(2, 80)), ("direct", at(8082))] {
            let what = format!("connect, 8 bytes each way, close; {threads} at once, {way}");
            let load = format!("cycle {address} {threads} {seconds}");
            rows.push(measure(
                &mesh,
                what,
                &load,
                "connections",
                "connections",
                1.0,
                seconds,
            )?);
        }
    }
    print(&rows);
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "a row has that many facts")]
fn measure(
    mesh: &Mesh,
    what: String,
    load: &str,
    key: &str,
    unit: &'static str,
    scale: f64,
    seconds: u64,
) -> Result<Row> {
    let step = Step::begin(what.clone());
    let agents = || -> Result<Duration> {
        Ok(mesh.lab.a.agent_processor_time()? + mesh.lab.b.agent_processor_time()?)
    };
    let (agents_before, machine_before) = (agents()?, machine_busy()?);
    let clock = Stopwatch::start();
    let report = mesh
        .shop
        .ask_peer(load, Duration::from_secs(seconds) + SOON * 3)?;
    let row = Row {
        amount: report
            .get(key)
            .and_then(Value::as_f64)
            .with_context(|| format!("no {key} in {report}"))?
            / scale,
        what,
        unit,
        elapsed: clock.elapsed(),
        agents: agents()?.saturating_sub(agents_before),
        machine: machine_busy()?.saturating_sub(machine_before),
    };
    step.done();
    Ok(row)
}

/// Processor time that the machine has spent on anything, from /proc/stat.
fn machine_busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let first = text.lines().next().unwrap_or_default();
    let ticks: u64 = first
        .split_whitespace()
        .skip(1)
        .enumerate()
        // All but idle and iowait, and guest time, which is in user time already.
        .filter(|(index, _ticks)| !matches!(index, 3 | 4 | 8 | 9))
        .filter_map(|(_index, ticks)| ticks.parse::<u64>().ok())
        .sum();
    // USER_HZ is 100 on every architecture that Sidestep runs on.
    Ok(Duration::from_millis(ticks * 10))
}

fn print(rows: &[Row]) {
    let heading = [
        "what",
        "per second",
        "per CPU second of the agents",
        "per CPU second of the machine",
    ];
    let per = |row: &Row, time: Duration| {
        if time < Duration::from_millis(50) {
            return "-".to_owned();
        }
        format!("{:.2} {}", row.amount / time.as_secs_f64(), row.unit)
    };
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    cells.push(vec!["-".repeat(4); heading.len()]);
    cells.extend(rows.iter().map(|row| {
        vec![
            row.what.clone(),
            per(row, row.elapsed),
            per(row, row.agents),
            per(row, row.machine),
        ]
    }));
    for row in &mut cells {
        for cell in row.iter_mut() {
            cell.insert_str(0, "| ");
        }
        row.push("|".to_owned());
    }
    say(format_args!("\n{}", table(&cells)));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    say(format_args!(
        "\nLinux {}, {cores} cores, both nodes, clients and servers on one machine",
        kernel.trim()
    ));
}
