//! One way, set up: a client on node `a`, servers on node `b`, and what is between them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Load, Way, proxies, wrk};
use crate::{
    bench::{
        capture::number,
        machine::{self, Busy},
        recording::Sample,
    },
    cgroup::Cgroup,
    daemon::Daemon,
    mesh::{Mesh, local, vip},
    node::Node,
    services,
    wait::{SOON, wait_for},
    workload::{Kind, Workload},
};

/// Where the servers listen on their node.
pub(super) const HTTP: u16 = 8081;
/// The server for everything else.
pub(super) const SERVE: u16 = 8082;

/// So many idle connections are held for the memory of one.
const IDLE: u64 = 1_000;

/// See the module. Proxies end before the nodes are removed.
#[derive(Debug)]
pub(super) struct Path {
    pub(super) way: Way,
    proxies: Vec<Daemon>,
    _http: Daemon,
    /// Where the client calls the web server.
    http: SocketAddr,
    /// Where it calls the other one.
    serve: SocketAddr,
    mesh: Mesh,
}

impl Path {
    /// Sets it up, and tries it.
    ///
    /// # Errors
    /// If something does not start, or a call does not come through.
    pub(super) fn new(way: Way, other: Option<&std::path::Path>) -> Result<Self> {
        let mut mesh = Mesh::new("mesh")?;
        for node in [&mesh.lab.a, &mesh.lab.b] {
            // Ports of closed connections are searched for by the next ones: a figure would depend on those before.
            node.namespace().set_ipv4("tcp_max_tw_buckets", "100")?;
        }
        let place = mesh.place("serve", "serve", Kind::Cgroup)?;
        let at_all = (Ipv4Addr::UNSPECIFIED, SERVE).into();
        mesh.keep(services::peer(&place, "serve", at_all, "")?);
        let place = mesh.place("http", "http", Kind::Cgroup)?;
        let web = web_server(&place)?;
        let (http, serve) = match way {
            Way::Direct => {
                let node = mesh.lab.b.address();
                ((node, HTTP).into(), (node, SERVE).into())
            }
            Way::Connect
            | Way::Hbone
            | Way::Envoy
            | Way::Haproxy
            | Way::OtherConnect
            | Way::OtherHbone => (vip(1, 80), vip(2, 80)),
        };
        let proxies = match way {
            Way::Direct => vec![],
            Way::Connect | Way::Hbone => {
                start_agents(&mut mesh, way == Way::Hbone)?;
                vec![]
            }
            Way::OtherConnect | Way::OtherHbone => {
                let other = other.context("no other agent was named")?;
                mesh.lab.a.use_agent(other.to_owned());
                mesh.lab.b.use_agent(other.to_owned());
                start_agents(&mut mesh, way == Way::OtherHbone)?;
                vec![]
            }
            Way::Envoy => proxies::envoys(&mesh.lab)?,
            Way::Haproxy => proxies::haproxies(&mesh.lab)?,
        };
        let path = Self {
            way,
            proxies,
            _http: web,
            http,
            serve,
            mesh,
        };
        path.ask(&format!("turns {serve} 1 0.1 1"), SOON)
            .context("a first call")
            .with_context(|| path.proxies.iter().map(Daemon::said).collect::<String>())?;
        Ok(path)
    }

    /// Puts `load` on it for `time`.
    ///
    /// # Errors
    /// If something fails under it.
    pub(super) fn measure(&self, load: Load, time: Duration) -> Result<Vec<Sample>> {
        match load {
            Load::Calls(clients) => self.calls(clients, time),
            Load::Turns(bytes) => self.turns(bytes, time),
            Load::Requests(connections) => self.requests(connections, time),
            Load::Bulk(streams) => self.bulk(streams, time),
            Load::Beside(streams) => self.beside(streams, time),
        }
    }

    fn calls(&self, clients: u64, time: Duration) -> Result<Vec<Sample>> {
        let before = Busy::now()?;
        let report = self.ask(
            &format!("calls {} {clients} {}", self.serve, time.as_secs_f64()),
            time,
        )?;
        let busy = Busy::now()?.since(before).all().as_secs_f64();
        let (rate, p50, p99, cost) = if clients == 1 {
            (
                "new connections per second, 1 client",
                "new connection with a byte each way, 1 client, p50",
                "new connection with a byte each way, 1 client, p99",
                "processor time per 1,000 connections, 1 client",
            )
        } else {
            (
                "new connections per second, 32 clients",
                "new connection with a byte each way, 32 clients, p50",
                "new connection with a byte each way, 32 clients, p99",
                "processor time per 1,000 connections, 32 clients",
            )
        };
        let each = busy * 1e3 / number(&report, "count")?;
        Ok(vec![
            Sample::new(rate, "1/s", number(&report, "per_second")?),
            Sample::new(p50, "us", number(&report, "p50_us")?),
            Sample::new(p99, "us", number(&report, "p99_us")?),
            Sample::new(cost, "s", each),
        ])
    }

    fn turns(&self, bytes: usize, time: Duration) -> Result<Vec<Sample>> {
        let report = self.ask(
            &format!("turns {} 1 {} {bytes}", self.serve, time.as_secs_f64()),
            time,
        )?;
        let (p50, p99) = match bytes {
            ..1024 => ("round trip of 1 byte, p50", "round trip of 1 byte, p99"),
            1024..4096 => ("round trip of 1 KiB, p50", "round trip of 1 KiB, p99"),
            _ => ("round trip of 16 KiB, p50", "round trip of 16 KiB, p99"),
        };
        Ok(vec![
            Sample::new(p50, "us", number(&report, "p50_us")?),
            Sample::new(p99, "us", number(&report, "p99_us")?),
        ])
    }

    fn requests(&self, connections: u64, time: Duration) -> Result<Vec<Sample>> {
        let program =
            self.mesh
                .shop
                .program("wrk")
                .args(wrk::arguments(self.http, connections, time));
        let said = program.run(time + SOON)?;
        let rate = wrk::requests_per_second(&said)
            .with_context(|| format!("wrk saw errors, or nothing:\n{said}"))?;
        let measure = if connections == 1 {
            "requests per second, 1 connection"
        } else {
            "requests per second, 32 connections"
        };
        Ok(vec![Sample::new(measure, "1/s", rate)])
    }

    fn bulk(&self, streams: u64, time: Duration) -> Result<Vec<Sample>> {
        let before = Busy::now()?;
        let report = self.ask(
            &format!("bulk {} {streams} {}", self.serve, time.as_secs_f64()),
            time,
        )?;
        let busy = Busy::now()?.since(before).all().as_secs_f64();
        let (rate, cost) = if streams == 1 {
            ("bulk, 1 stream", "processor time per GB, 1 stream")
        } else {
            ("bulk, 8 streams", "processor time per GB, 8 streams")
        };
        let gigabytes = number(&report, "bytes")? * 1e-9;
        Ok(vec![
            Sample::new(rate, "Gbit/s", number(&report, "per_second")? * 8e-9),
            Sample::new(cost, "s", busy / gigabytes),
        ])
    }

    fn beside(&self, streams: u64, time: Duration) -> Result<Vec<Sample>> {
        let report = self.ask(
            &format!(
                "beside {} {streams} {} 1024",
                self.serve,
                time.as_secs_f64()
            ),
            time,
        )?;
        let (p50, p99) = (
            "round trip of 1 KiB beside 8 streams of bulk, p50",
            "round trip of 1 KiB beside 8 streams of bulk, p99",
        );
        let part = |name: &str| {
            let part = report.get(name);
            part.with_context(|| format!("nothing {name} in {report}"))
        };
        let (asked, sent) = (part("asked")?, part("sent")?);
        let rate = "bulk, 8 streams, beside a question";
        Ok(vec![
            Sample::new(p50, "us", number(asked, "p50_us")?),
            Sample::new(p99, "us", number(asked, "p99_us")?),
            Sample::new(rate, "Gbit/s", number(sent, "per_second")? * 8e-9),
        ])
    }

    /// The processor time of agents or proxies so far.
    ///
    /// # Errors
    /// If their cgroups are gone.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        self.cgroups()?.iter().map(Cgroup::processor_time).sum()
    }

    /// What `spent` within `time` is, and the memory. Nothing for a way without agents or proxies.
    ///
    /// # Errors
    /// If their cgroups are gone.
    pub(super) fn idle(&self, spent: Duration, time: Duration) -> Result<Vec<Sample>> {
        if self.way == Way::Direct {
            return Ok(vec![]);
        }
        let share = spent.as_secs_f64() / time.as_secs_f64() * 100.0;
        let [calling, called] = self.resident()?;
        Ok(vec![
            Sample::new("processor while idle, both nodes", "% of a core", share),
            Sample::new("memory while idle, calling node", "MiB", calling / MIB),
            Sample::new("memory while idle, called node", "MiB", called / MIB),
        ])
    }

    /// What an idle connection takes on each node. Nothing for a way without agents or proxies.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub(super) fn hold(&self) -> Result<Vec<Sample>> {
        if self.way == Way::Direct {
            return Ok(vec![]);
        }
        let before = self.resident()?;
        let directory = self.mesh.shop.directory();
        let (file, log) = (directory.join("hold"), directory.join("hold.log"));
        fs::write(&file, "").with_context(|| format!("writing {}", file.display()))?;
        let words = format!("idle {} {IDLE} {}", self.serve, file.display());
        let mut holder = self.mesh.shop.peer(&words)?.log(&log).spawn()?;
        let said = || fs::read_to_string(&log).unwrap_or_default();
        wait_for("idle connections", 3 * SOON, || said().contains("open")).with_context(said)?;
        let after = self.resident()?;
        fs::remove_file(&file)?;
        let ended = holder.wait(SOON)?;
        ensure!(ended.is_some_and(|status| status.success()), "{}", said());
        let count = f64::from(u32::try_from(IDLE)?);
        let each = |node: usize| {
            let of = |all: &[f64; 2]| all.get(node).copied().unwrap_or_default();
            (of(&after) - of(&before)) / count / 1024.0
        };
        Ok(vec![
            Sample::new("memory per idle connection, calling node", "KiB", each(0)),
            Sample::new("memory per idle connection, called node", "KiB", each(1)),
        ])
    }

    /// Resident memory of what is between client and server, in bytes, on each node.
    fn resident(&self) -> Result<[f64; 2]> {
        let mut each = [0.0; 2];
        for (cgroup, slot) in self.cgroups()?.iter().zip(&mut each) {
            #[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 bytes")]
            let bytes = machine::resident(cgroup.directory())? as f64;
            *slot = bytes;
        }
        Ok(each)
    }

    /// Where agents or proxies run, on each node.
    fn cgroups(&self) -> Result<[Cgroup; 2]> {
        let child = |node: &Node| match self.way {
            Way::Direct | Way::Connect | Way::Hbone | Way::OtherConnect | Way::OtherHbone => {
                node.cgroup().child("agent")
            }
            Way::Envoy | Way::Haproxy => proxies::cgroup(node),
        };
        Ok([child(&self.mesh.lab.a)?, child(&self.mesh.lab.b)?])
    }

    fn ask(&self, arguments: &str, time: Duration) -> Result<Value> {
        self.mesh.shop.ask_peer(arguments, time + SOON * 3)
    }
}

const MIB: f64 = 1_048_576.0;

fn start_agents(mesh: &mut Mesh, by_hbone: bool) -> Result<()> {
    mesh.register("http", "http", vip(1, 80), local(HTTP));
    mesh.register("serve", "serve", vip(2, 80), local(SERVE));
    if by_hbone {
        for instance in mesh.instances() {
            instance.meta = vec![("sidestep-tunnel", "hbone")];
        }
        mesh.lab.b.add_setting("[tunnel]\nhbone_port = 15008");
    }
    mesh.start()
}

/// nginx, in one process, that never closes a connection by itself.
fn web_server(place: &Workload) -> Result<Daemon> {
    let directory = place.directory().display();
    let file = place.directory().join("nginx.conf");
    let configuration = format!(
        "\
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    server {{
        listen {HTTP};
        location = / {{ return 200 \"ok\\n\"; }}
    }}
}}
"
    );
    fs::write(&file, configuration).with_context(|| format!("writing {}", file.display()))?;
    let program = place
        .program("nginx")
        .args(["-e", "stderr", "-c"])
        .arg(&file);
    let log = place.directory().join("nginx.log");
    Daemon::start("nginx", &program, &log, place.namespace(), &[local(HTTP)])
}
