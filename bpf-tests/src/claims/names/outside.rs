//! Services outside the mesh: hosts with names of their own, called from a container that has no route to them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::{dig, dns, with_resolv_conf};
use crate::{
    claims::{Finding, Size},
    lab::{DEVICE, Lab},
    program::{Output, Program, Running},
    services::{self, Service},
    wait::{SOON, Stopwatch, wait_for, wait_for_value},
    workload::{Kind, Workload},
};

/// Where dnsmasq answers on node `a`.
const UPSTREAM: &str = "127.0.0.53";

/// The node's side of the container's network, where the agent answers names.
const LISTENER: &str = "10.77.100.1";

/// The addresses of two servers, on node `b`, which runs no agent.
const SERVERS: [&str; 2] = ["10.77.0.2", "10.77.0.3"];

/// The host that both may be.
const HOST: &str = "api.example.test";

/// A host outside behind an upstream of the agent on `a`, and who may call it.
struct Outside {
    /// In a container: it has no route but to its node.
    shop: Workload,
    /// On the node, with a route to the servers.
    guest: Workload,
    resolv_conf: PathBuf,
    certificate: PathBuf,
    upstream: Running,
    hosts: PathBuf,
    /// Ended before the lab goes.
    _servers: Vec<Service>,
    /// What each server has answered.
    requests: Vec<PathBuf>,
    lab: Lab,
}

impl Outside {
    fn new(purpose: &str) -> Result<Self> {
        let mut lab = Lab::new(purpose)?;
        let shop = lab.a.add_workload("shop", "shop", Kind::Netns)?;
        let guest = lab.a.add_workload("guest", "guest", Kind::Cgroup)?;
        let second = SERVERS[1].parse()?;
        lab.b.namespace().add_address(DEVICE, second)?;
        let certificate = make_certificate(lab.b.directory())?;
        let (mut servers, mut requests) = (vec![], vec![]);
        for (number, address) in SERVERS.iter().enumerate() {
            let place = lab.b.add_stranger(&format!("server{number}"))?;
            let files = place.directory().join("files");
            fs::create_dir_all(&files)?;
            // More than all sockets on the way take; a file without blocks.
            fs::File::create(files.join("large"))?.set_len(1 << 30)?;
            let address = SocketAddr::new(address.parse()?, 443);
            let text = format!("server {number}");
            requests.push(place.directory().join("requests.log"));
            servers.push(services::nginx_tls(&place, address, &text, &certificate)?);
        }
        lab.catalog.write(
            "outside.yaml",
            &format!(
                "kind: service-defaults\nname: api\nprotocol: tcp\n\
                 destination: {{ addresses: [{HOST}], port: 443 }}\n---\n\
                 kind: service-defaults\nname: legacy\n\
                 destination: {{ addresses: [{}], port: 443 }}\n",
                SERVERS[1]
            ),
        )?;
        lab.catalog.write_intentions("api", &[("shop", "allow")])?;
        lab.catalog
            .write_intentions("legacy", &[("shop", "allow")])?;
        dns(
            &mut lab.a,
            &format!(
                "listen = [\"127.0.0.1:53\", \"{LISTENER}:53\"]\n\
                 allow = [\"127.0.0.0/8\", \"10.77.100.0/24\"]\nupstreams = [\"{UPSTREAM}\"]"
            ),
        );
        let hosts = lab.a.directory().join("hosts");
        fs::write(&hosts, format!("{} {HOST}\n", SERVERS[0]))?;
        let upstream = dnsmasq(&lab, &hosts)?;
        lab.a.start_agent()?;
        lab.a.wait_until_ready()?;
        let resolv_conf = shop.directory().join("resolv.conf");
        fs::write(&resolv_conf, format!("nameserver {LISTENER}\n"))?;
        Ok(Self {
            shop,
            guest,
            resolv_conf,
            certificate,
            upstream,
            hosts,
            _servers: servers,
            requests,
            lab,
        })
    }

    /// curl in `workload`, which verifies the server's certificate and finds names as `resolv.conf` says.
    fn curl(&self, workload: &Workload, arguments: &[&str]) -> Program {
        let certificate = self.certificate.display().to_string();
        let mut command = vec!["curl", "--silent", "--show-error", "--fail"];
        command.extend(["--max-time", "60", "--cacert", &certificate]);
        command.extend(arguments);
        with_resolv_conf(workload, &self.resolv_conf, &command)
    }

    fn page(&self, workload: &Workload, place: &str) -> Result<Output> {
        self.curl(workload, &[&format!("https://{place}/")])
            .output(SOON)
    }

    /// Where the host is, as the status says.
    fn endpoints(&self) -> Result<Vec<String>> {
        let api = self.lab.a.service("api")?;
        let endpoints = api.pointer("/destination/endpoints");
        let endpoints = endpoints.and_then(Value::as_array).into_iter().flatten();
        Ok(endpoints
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect())
    }

    /// What is wrong with that, as the status says.
    fn problem(&self) -> Result<Option<String>> {
        let api = self.lab.a.service("api")?;
        let problem = api.pointer("/destination/problem").and_then(Value::as_str);
        Ok(problem.map(str::to_owned))
    }

    /// How many requests the servers have answered.
    fn served(&self) -> Result<usize> {
        let mut served = 0;
        for requests in &self.requests {
            served += fs::read_to_string(requests)?.lines().count();
        }
        Ok(served)
    }
}

pub(super) fn a_host_outside_is_called_by_its_name(_size: Size) -> Result<Finding> {
    let mut run = Outside::new("outside")?;
    let a = &run.lab.a;
    // The address itself is out of reach for the container.
    let direct = run.curl(
        &run.shop,
        &["--insecure", &format!("https://{}/", SERVERS[0])],
    );
    let direct = direct.output(SOON)?;
    ensure!(!direct.succeeded(), "the container has a route: {direct:?}");

    let address = dig(a, &format!("+short {HOST}"))?;
    let by_mesh = dig(a, "+short api.virtual.consul")?;
    ensure!(
        address.trim().parse::<Ipv4Addr>()?.octets()[0] >= 240 && address == by_mesh,
        "{HOST} is at {address:?}, api.virtual.consul at {by_mesh:?}"
    );
    let page = run.page(&run.shop, HOST)?;
    ensure!(page.stdout == "server 0\n", "{page:?} {}", a.agent_said());
    let line = a.wait_for_access_log(0, &["svc/shop", "service=api", "outcome=completed"])?;
    let counted = a.metric(
        "sidestep_connections_total",
        &["destination=\"api\"", "outcome=\"completed\""],
    )?;
    // An address outside is captured as it is, also where there is no route.
    let legacy = run.page(&run.shop, SERVERS[1])?;
    a.wait_for_access_log(0, &["svc/shop", "service=legacy", "outcome=completed"])?;

    // Who may not is refused, by the name and by the address, also with a route, by which the host's own address is not
    // held: see docs/limits.md.
    let around = run.curl(
        &run.guest,
        &["--insecure", &format!("https://{}/", SERVERS[0])],
    );
    ensure!(around.run(SOON)? == "server 0\n", "the guest has no route");
    let served = run.served()?;
    let denied = [HOST, SERVERS[1]].map(|place| run.page(&run.guest, place));
    for denied in denied {
        let denied = denied?;
        ensure!(
            !denied.succeeded() && denied.stdout.is_empty(),
            "{denied:?}"
        );
    }
    a.wait_for_access_log(0, &["svc/guest", "service=api", "outcome=denied"])?;
    a.wait_for_access_log(0, &["svc/guest", "service=legacy", "outcome=denied"])?;
    // What is at other ports of that address is nobody's business.
    let place = run.lab.b.add_stranger("plain")?;
    let at = SocketAddr::new(SERVERS[1].parse()?, 80);
    let _plain = services::nginx(&place, at, "another port")?;
    let plain = run.guest.curl(&format!("http://{at}/")).run(SOON)?;
    ensure!(plain == "another port\n", "{plain:?}");
    let explained = a.sidestep(&["intention", "check", "guest", "api"])?;
    let explained = explained.output(SOON)?.code();
    let holds = legacy.stdout == "server 1\n"
        && line.contains(&format!("peer={}:443", SERVERS[0]))
        && counted >= 1.0
        && served == 3
        && served == run.served()?
        && explained == Some(2);
    Ok(Finding::new(
        holds,
        format!(
            "{:?} over TLS by name, {:?} by address, from a container without a route; refused to another workload, \
             and the servers saw {served} requests before and {} after; {line}",
            page.stdout.trim(),
            legacy.stdout.trim(),
            run.served()?,
        ),
    ))
}

pub(super) fn the_addresses_of_a_host_are_followed_and_kept(_size: Size) -> Result<Finding> {
    let mut run = Outside::new("outside-moves")?;
    let first = run.page(&run.shop, HOST)?;
    fs::write(&run.hosts, format!("{} {HOST}\n", SERVERS[1]))?;
    run.upstream.signal(Signal::HUP)?;
    let clock = Stopwatch::start();
    let second_server = [format!("{}:443", SERVERS[1])];
    wait_for_value("the agent to follow the host", SOON, || {
        Ok((run.endpoints()? == second_server).then_some(()))
    })?;
    let moved = clock.elapsed();
    let second = run.page(&run.shop, HOST)?;

    run.upstream.kill();
    let problem = wait_for_value("the agent to miss its upstream", SOON, || run.problem())?;
    let kept = run.page(&run.shop, HOST)?;
    let pages = [&first, &second, &kept].map(|page| page.stdout.trim().to_owned());
    let told = run.lab.a.status()?;
    let told = told.pointer("/catalog/problems").cloned();
    let is_told = told.is_some_and(|all| all.to_string().contains(HOST));

    run.upstream = dnsmasq(&run.lab, &run.hosts)?;
    wait_for_value("the agent to find its upstream", SOON, || {
        Ok(run.problem()?.is_none().then_some(()))
    })?;
    Ok(Finding::new(
        pages == ["server 0", "server 1", "server 1"] && is_told,
        format!(
            "pages {pages:?}: before, {} ms after the host moved, and with the upstream lost ({problem})",
            moved.as_millis()
        ),
    ))
}

pub(super) fn a_new_denial_ends_what_goes_outside(_size: Size) -> Result<Finding> {
    let run = Outside::new("outside-cut")?;
    let url = format!("https://{HOST}/files/large");
    let curl = run.curl(
        &run.shop,
        &["--limit-rate", "4M", "--output", "large", &url],
    );
    let log = run.shop.directory().join("curl.log");
    let mut download = curl.log(&log).spawn()?;
    wait_for("the download to have begun", SOON, || {
        let connections = run.lab.a.sidestep(&["connections"]);
        let connections = connections.and_then(|it| it.run(SOON)).unwrap_or_default();
        connections.contains("api") && connections.contains(SERVERS[0])
    })?;
    let clock = Stopwatch::start();
    run.lab
        .catalog
        .write_intentions("api", &[("shop", "deny")])?;
    let ended = download.wait(SOON)?.context("it goes on")?;
    let time = clock.elapsed();
    let line = run
        .lab
        .a
        .wait_for_access_log(0, &["service=api", "outcome=cut"])?;
    Ok(Finding::new(
        !ended.success() && time < Duration::from_secs(5) && line.contains("intention deny"),
        format!(
            "a download ended {} ms after it was denied: {line}",
            time.as_millis()
        ),
    ))
}

/// A certificate for the host and for the address that is called as it is, `outside.pem` and `outside-key.pem`.
fn make_certificate(directory: &Path) -> Result<PathBuf> {
    let names = format!("subjectAltName=DNS:{HOST},IP:{}", SERVERS[1]);
    Program::new("openssl")
        .in_directory(directory)
        .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
        .args([
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-subj",
            "/CN=outside",
        ])
        .args(["-addext", &names])
        .args(["-keyout", "outside-key.pem", "-out", "outside.pem"])
        .run(SOON)?;
    Ok(directory.join("outside.pem"))
}

/// dnsmasq on node `a`, which answers for a second what `hosts` says, and reads that again on SIGHUP.
fn dnsmasq(lab: &Lab, hosts: &Path) -> Result<Running> {
    let log = lab.a.directory().join("dnsmasq.log");
    let running = lab
        .a
        .tool("dnsmasq")?
        .args(["--no-daemon", "--conf-file=/dev/null", "--user=root"])
        .args([
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--pid-file=",
        ])
        .args(["--local=/test/", "--local-ttl=1"])
        .arg(format!("--listen-address={UPSTREAM}"))
        .arg(format!("--addn-hosts={}", hosts.display()))
        .log(&log)
        .spawn()?;
    wait_for_value("dnsmasq to answer", SOON, || {
        let dig = lab.a.tool("dig")?;
        let dig = dig.args([&format!("@{UPSTREAM}"), "+short", "+tries=1", "+timeout=1"]);
        Ok(dig.arg(HOST).output(SOON)?.succeeded().then_some(()))
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    Ok(running)
}
