//! `cargo xtask bench relay`: bytes, connections and round trips through two agents, printed as rows, while one works on
//! them. `bench mesh` is the comparison.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bpf_tests::{
    bench::machine::Busy,
    lab::DEVICE,
    mesh::{Mesh, local, vip},
    services,
    wait::{SOON, Stopwatch},
    workload::Kind,
};
use serde_json::Value;

use crate::progress::{Step, say, table};

/// A second address of the called node, which stands for a host outside the mesh.
const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 3));

/// See [`super::Command::Relay`].
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// For how long each row is measured.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// How often, each way in turn.
    #[arg(long, default_value_t = 1)]
    rounds: u64,
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
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let (seconds, rounds) = (arguments.seconds, arguments.rounds);
    let mut mesh = Mesh::new("bench")?;
    let wire: SocketAddr = (mesh.lab.b.address(), 0).into();
    let at = |port| SocketAddr::new(wire.ip(), port);
    mesh.lab.b.namespace().add_address(DEVICE, OUTSIDE)?;
    let mut outside = vec![];
    for (index, mode, port) in [(1, "sink", 8081), (2, "echo", 8082)] {
        let place = mesh.place(mode, mode, Kind::Cgroup)?;
        mesh.register(mode, mode, vip(index, 80), local(port));
        // The same instance as a service of its own, which is reached by the other tunnel.
        let shared = format!("{mode}-hbone");
        mesh.register(&shared, &shared, vip(index + 2, 80), local(port));
        mesh.keep(services::peer(&place, mode, local(port), "")?);
        // The same without Sidestep: straight over the wire, in the clear.
        mesh.keep(services::peer(&place, mode, at(port), "")?);
        // The same as a service outside the mesh: the calling node alone, in the clear.
        mesh.keep(services::peer(&place, mode, (OUTSIDE, port).into(), "")?);
        outside.push(format!(
            "kind: service-defaults\nname: {mode}-outside\nprotocol: tcp\n\
             destination: {{ addresses: [{OUTSIDE}], port: {port} }}\n"
        ));
    }
    mesh.lab
        .catalog
        .write("outside.yaml", &outside.join("---\n"))?;
    for instance in mesh.instances() {
        if instance.service.ends_with("-hbone") {
            instance.meta = vec![("sidestep-tunnel", "hbone")];
        }
    }
    mesh.lab.b.add_setting("[tunnel]\nhbone_port = 15008");
    for node in [&mesh.lab.a, &mesh.lab.b] {
        // Ports of closed connections are searched for by the next ones: a row would depend on those before.
        node.namespace().set_ipv4("tcp_max_tw_buckets", "100")?;
    }
    mesh.start()?;

    let sinks = [
        ("connect", vip(1, 80)),
        ("hbone", vip(3, 80)),
        ("outside", (OUTSIDE, 8081).into()),
        ("direct", at(8081)),
    ];
    let echoes = [
        ("connect", vip(2, 80)),
        ("hbone", vip(4, 80)),
        ("outside", (OUTSIDE, 8082).into()),
        ("direct", at(8082)),
    ];
    let subjects = [
        Load::new("bytes", "pour", "bytes", "GB", 1e9, sinks),
        Load::new(
            "connect, 8 bytes each way, close",
            "cycle",
            "connections",
            "connections",
            1.0,
            echoes,
        ),
        Load::new(
            "8 bytes each way on a connection",
            "trips",
            "trips",
            "trips",
            1.0,
            echoes,
        ),
    ];
    let mut rows = vec![];
    for load in &subjects {
        for threads in [1, 8] {
            rows.extend(load.measure(&mesh, threads, seconds, rounds)?);
        }
    }
    print(&rows);
    Ok(())
}

/// One kind of load, to be put on every way.
struct Load {
    what: &'static str,
    command: &'static str,
    key: &'static str,
    unit: &'static str,
    scale: f64,
    ways: [(&'static str, SocketAddr); 4],
}

impl Load {
    fn new(
        what: &'static str,
        command: &'static str,
        key: &'static str,
        unit: &'static str,
        scale: f64,
        ways: [(&'static str, SocketAddr); 4],
    ) -> Self {
        Self {
            what,
            command,
            key,
            unit,
            scale,
            ways,
        }
    }

    /// A row for each way, measured by turns, so that what else the machine does falls on all of them.
    fn measure(&self, mesh: &Mesh, threads: u64, seconds: u64, rounds: u64) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = self
            .ways
            .iter()
            .map(|(way, _)| Row {
                what: format!("{}; {threads} at once, {way}", self.what),
                amount: 0.0,
                unit: self.unit,
                elapsed: Duration::ZERO,
                agents: Duration::ZERO,
                machine: Duration::ZERO,
            })
            .collect();
        for round in 1..=rounds {
            for ((_way, address), row) in self.ways.iter().zip(&mut rows) {
                let step = Step::begin(format!("{}, round {round}", row.what));
                let load = format!("{} {address} {threads} {seconds}", self.command);
                self.add(mesh, &load, seconds, row)?;
                step.done();
            }
        }
        Ok(rows)
    }

    fn add(&self, mesh: &Mesh, load: &str, seconds: u64, row: &mut Row) -> Result<()> {
        let agents = || -> Result<Duration> {
            Ok(mesh.lab.a.agent_processor_time()? + mesh.lab.b.agent_processor_time()?)
        };
        let (agents_before, machine_before) = (agents()?, machine_busy()?);
        let clock = Stopwatch::start();
        let report = mesh
            .shop
            .ask_peer(load, Duration::from_secs(seconds) + SOON * 3)?;
        let amount = report.get(self.key).and_then(Value::as_f64);
        let key = self.key;
        row.amount += amount.with_context(|| format!("no {key} in {report}"))? / self.scale;
        row.elapsed += clock.elapsed();
        row.agents += agents()?.saturating_sub(agents_before);
        row.machine += machine_busy()?.saturating_sub(machine_before);
        Ok(())
    }
}

/// Processor time that the machine has spent on anything.
fn machine_busy() -> Result<Duration> {
    Ok(Busy::now()?.all())
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
