//! Programs that were told nothing: their queries are captured on the way to the server that they know.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    NOWHERE,
    upstream::{COMPARE, UPSTREAM, dnsmasq},
    with_resolv_conf, write_resolv_conf,
};
use crate::{
    claims::{Finding, Size, dependable::replaced::upgrade},
    consul::ConsulMesh,
    mesh::{Mesh, local, vip},
    program::Program,
    programs, services,
    wait::{SOON, monotonic_ms, wait_for, wait_for_value},
    workload::{Kind, Workload},
};

/// Of dnsmasq beside the one that is asked through the agent: queries to it are not captured.
const DIRECT_PORT: u16 = 5353;

pub(super) fn names_are_known_without_being_told(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("names-captured")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::nginx(&place, local(8080), "page of web-1")?);
    let container = mesh.lab.a.add_workload("shop", "box", Kind::Netns)?;
    mesh.lab.a.set_capture("dns = true");
    mesh.start()?;
    let address = vip(1, 80).ip().to_string();
    let mut ways = 0;
    for workload in [&mesh.shop, &container] {
        let resolv_conf = write_resolv_conf(workload.directory(), NOWHERE)?;
        let run = |command: &[&str]| {
            with_resolv_conf(workload, &resolv_conf, command)
                .run(SOON)
                .with_context(|| mesh.lab.a.agent_said())
        };
        let python = "import socket; print(socket.gethostbyname('WEB.service.consul'))";
        for command in [
            &["getent", "ahostsv4", "web.virtual.consul"][..],
            &["python3", "-c", python],
            &["dig", "+short", "web.service.dc1.consul"],
            &["dig", "+short", "+tcp", "web.service.consul"],
        ] {
            let said = run(command)?;
            ensure!(said.starts_with(&address), "{command:?} said {said:?}");
            ways += 1;
        }
        // dig takes answers from nobody else, and says from whom.
        let said = run(&["dig", "web.virtual.consul"])?;
        ensure!(said.contains(&format!("SERVER: {NOWHERE}#53")), "{said}");
        let unknown = ["getent", "hosts", "nothing.virtual.consul"];
        let unknown = with_resolv_conf(workload, &resolv_conf, &unknown).output(SOON)?;
        ensure!(unknown.code() == Some(2), "{unknown:?}");
        let url = "http://web.virtual.consul/";
        let options = ["--silent", "--show-error", "--fail", "--max-time", "20"];
        let page = run(&[&["curl"], &options[..], &[url]].concat())?;
        ensure!(page == "page of web-1\n", "{page:?}");
    }
    Ok(Finding::new(
        true,
        format!("{ways} ways to resolve in two workloads, and a page by name in each"),
    ))
}

pub(super) fn other_names_come_from_their_server(size: Size) -> Result<Finding> {
    let queries = size.pick(500, 5000);
    let mut mesh = Mesh::new("names-passed")?;
    let container = mesh.lab.a.add_workload("shop", "box", Kind::Netns)?;
    mesh.lab.a.set_capture("dns = true");
    let mut servers = vec![];
    for (workload, here) in [(&mesh.shop, "192.0.2.71"), (&container, "192.0.2.72")] {
        for port in [53, DIRECT_PORT] {
            let more = format!("host-record=here.test,{here}");
            servers.push(dnsmasq(&mesh.lab.a, workload.namespace(), port, &more)?);
        }
    }
    mesh.start()?;
    let here = |workload: &Workload, transport: &str| {
        let server = format!("@{UPSTREAM}");
        let words = [
            &server,
            transport,
            "+short",
            "+tries=1",
            "+timeout=2",
            "here.test",
        ];
        let said = workload.program("dig").args(words).run(SOON)?;
        Ok::<_, anyhow::Error>(said.trim().to_owned())
    };
    let everywhere = || {
        let mut said = vec![];
        for workload in [&mesh.shop, &container] {
            for transport in ["+notcp", "+tcp"] {
                said.push(here(workload, transport)?);
            }
        }
        Ok::<_, anyhow::Error>(said)
    };
    let expected = ["192.0.2.71", "192.0.2.71", "192.0.2.72", "192.0.2.72"];
    let before = everywhere()?;
    let compared = mesh
        .shop
        .program("python3")
        .args(["-c", COMPARE, &queries.to_string()])
        .args([UPSTREAM, &DIRECT_PORT.to_string(), UPSTREAM, "53"])
        .run(Duration::from_mins(5))?;
    let last = compared.lines().last().unwrap_or_default();
    let Some(Ok(same)) = last.split(' ').next().map(str::parse::<usize>) else {
        bail!("{compared}");
    };
    let forwarded = mesh
        .lab
        .a
        .metric("sidestep_dns_queries_total", &["outcome=\"forwarded\""])?;
    mesh.lab.a.kill_agent();
    let after = everywhere()?;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let through_agent = forwarded >= (queries + expected.len()) as f64;
    let holds = before == expected && after == expected && same == queries && through_agent;
    Ok(Finding::new(
        holds,
        format!(
            "{same} of {queries} answers are the same, {forwarded} queries went through the agent; \
             before it was killed {before:?}, after {after:?}"
        ),
    ))
}

pub(super) fn captured_names_of_consul_go_on(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("names-captured-consul")?;
    let place = mesh.place("web")?;
    mesh.keep(services::nginx(&place, local(8080), "page of web")?);
    mesh.register("web", "web", 8080, json!({}))?;
    mesh.api().put(
        "catalog/register",
        &json!({
            "Node": "elsewhere", "Address": "192.0.2.7",
            "Service": { "Service": "plain", "Port": 8090 },
        }),
    )?;
    // As operators let their resolver forward the domain.
    let forwards = "server=/consul/127.0.0.1#8600";
    let _server = dnsmasq(&mesh.lab.a, mesh.lab.a.namespace(), 53, forwards)?;
    mesh.lab.a.set_capture("dns = true");
    mesh.start()?;
    let address = mesh.callable("web")?.to_string();
    let resolv_conf = write_resolv_conf(mesh.shop.directory(), UPSTREAM)?;
    let run = |command: &[&str]| {
        with_resolv_conf(&mesh.shop, &resolv_conf, command)
            .run(SOON)
            .with_context(|| mesh.said())
    };
    let names = [
        "web.service.consul",
        "web.virtual.consul",
        "web.connect.consul",
    ];
    for name in names {
        let said = run(&["dig", "+short", name])?;
        ensure!(
            said.trim() == address,
            "{name} leads to {said:?}, not to {address}"
        );
        let url = format!("http://{name}:8080/");
        let options = ["--silent", "--show-error", "--fail", "--max-time", "20"];
        let page = run(&[&["curl"], &options[..], &[&url]].concat())?;
        ensure!(page.trim() == "page of web", "{name}: {page:?}");
    }
    let mut others = vec![];
    for name in ["plain.service.consul", "host3.example.test"] {
        others.push(run(&["dig", "+short", name])?.trim().to_owned());
    }
    ensure!(others == ["192.0.2.7", "192.0.2.3"], "{others:?}");
    mesh.api().intend("*", "web", "deny")?;
    let is_gone = || mesh.lab.a.service("web").is_err();
    wait_for("the denial to be known", SOON, is_gone)?;
    let denied = run(&["dig", "+short", "web.service.consul"])?;
    ensure!(
        denied.trim() == address,
        "denied, the name leads to {denied:?}"
    );
    Ok(Finding::new(
        true,
        format!(
            "{} pages by name, once denied into the mesh still; other names as their server says: {others:?}",
            names.len()
        ),
    ))
}

const RESOLVE: &str = include_str!("resolve.c");

pub(super) fn resolvers_of_their_own_are_captured(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("names-resolvers")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::nginx(&place, local(8080), "page of web-1")?);
    let container = mesh.lab.a.add_workload("shop", "box", Kind::Netns)?;
    mesh.lab.a.set_capture("dns = true");
    let source = mesh.lab.a.directory().join("resolve.c");
    let resolve = mesh.lab.a.directory().join("resolve");
    fs::write(&source, RESOLVE)?;
    Program::new("musl-gcc")
        .args(["-static", "-O1", "-o"])
        .args([&resolve, &source])
        .run(SOON)?;
    mesh.start()?;
    let address = vip(1, 80).ip().to_string();
    let resolve = resolve.display().to_string();
    for workload in [&mesh.shop, &container] {
        // musl asks all of them at once, for both kinds of addresses, from one socket.
        let resolv_conf = workload.directory().join("resolv.conf");
        let servers = [NOWHERE, "192.0.2.54", "127.0.0.53"];
        let lines = servers.map(|server| format!("nameserver {server}\n"));
        fs::write(&resolv_conf, lines.concat())?;
        for name in ["web.virtual.consul", "web.service.dc1.consul"] {
            let said = with_resolv_conf(workload, &resolv_conf, &[&resolve, name]).run(SOON)?;
            ensure!(said.trim() == address, "musl: {said:?}");
        }
        let url = "-http-addr=http://web.virtual.consul";
        let consul = programs::find("consul").context("there is no program consul")?;
        let consul = consul.display().to_string();
        let consul = [&consul, "members", url];
        let said = with_resolv_conf(workload, &resolv_conf, &consul)
            // Go's own resolver, and a word about it.
            .env("GODEBUG", "netdns=go+2")
            .output(SOON)?;
        // nginx has no such page.
        let reached = said.stderr.contains("404") && said.stderr.contains("nginx");
        let by_go = said.stderr.contains("web.virtual.consul) = ");
        ensure!(reached && by_go, "Go: {said:?}");
    }
    Ok(Finding::new(
        true,
        "musl, with three servers at once, and Go resolve and reach the service, in two workloads",
    ))
}

pub(super) const LOOKUPS: &str = include_str!("lookups.py");

/// What lookups.py counted so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) at_once: u64,
    second: u64,
    failed: u64,
    /// When what is still looked up was begun, in milliseconds of the monotonic clock.
    oldest: u64,
}

impl Counts {
    pub(super) fn all(self) -> u64 {
        self.at_once + self.second + self.failed
    }
}

pub(super) fn counts(log: &Path) -> Counts {
    let said = fs::read_to_string(log).unwrap_or_default();
    let numbers = |line: &str| -> Option<Vec<u64>> {
        line.split(' ').map(|word| word.parse().ok()).collect()
    };
    let last = said.lines().rev().find_map(numbers).unwrap_or_default();
    match last.as_slice() {
        [at_once, second, failed, oldest] => Counts {
            at_once: *at_once,
            second: *second,
            failed: *failed,
            oldest: *oldest,
        },
        _ => Counts::default(),
    }
}

pub(super) fn queries_go_on_without_their_agent(size: Size) -> Result<Finding> {
    let rounds = size.pick(2, 10);
    let mut mesh = Mesh::new("names-survive")?;
    mesh.lab.a.set_capture("dns = true");
    let _server = dnsmasq(&mesh.lab.a, mesh.shop.namespace(), 53, "")?;
    mesh.start()?;
    let file = |name: &str| mesh.shop.directory().join(name);
    let (end, log) = (file("end"), file("lookups"));
    let mut lookups = mesh
        .shop
        .program("python3")
        .args(["-c", LOOKUPS, UPSTREAM, "host7.example.test", "192.0.2.7"])
        .arg(&end)
        .log(&log)
        .spawn()?;
    // More of them, and the end of those that are under way.
    let more = || {
        let (before, now) = (counts(&log).all(), monotonic_ms());
        wait_for("lookups to go on", SOON, || {
            let counts = counts(&log);
            counts.all() >= before + 100 && counts.oldest > now
        })?;
        Ok::<_, anyhow::Error>(counts(&log))
    };
    let through = |mesh: &Mesh| {
        let labels = ["outcome=\"forwarded\""];
        mesh.lab.a.metric("sidestep_dns_queries_total", &labels)
    };
    more()?;
    for _ in 0..rounds {
        ensure!(through(&mesh)? > 0.0, "nothing goes through the agent");
        mesh.lab.a.kill_agent();
        more()?;
        mesh.lab.a.start_agent()?;
        mesh.lab.a.wait_until_ready()?;
        more()?;
    }
    let killed = counts(&log);
    for _ in 0..rounds {
        upgrade(&mesh.lab.a)?;
        wait_for_value("the agent before to end", SOON, || {
            let status = mesh.lab.a.status()?;
            let gone = status.get("predecessor").is_none_or(Value::is_null);
            Ok(gone.then_some(()))
        })?;
        more()?;
        ensure!(through(&mesh)? > 0.0, "nothing goes through the next agent");
    }
    fs::write(&end, "")?;
    lookups.wait(SOON)?.context("the lookups do not end")?;
    let all = counts(&log);
    let said = fs::read_to_string(&log)?;
    let troubles: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("not"))
        .collect();
    // What the agent holds as it is killed is asked again: at most one query of each of four threads.
    let holds = all.failed == 0 && killed.second <= 4 * rounds && all.second == killed.second;
    Ok(Finding::new(
        holds,
        format!(
            "{} of {} names looked up at once, {} at the second try after {rounds} kills, {} more after {rounds} \
             upgrades, {} not; {troubles:?}",
            all.at_once,
            all.all(),
            killed.second,
            all.second - killed.second,
            all.failed,
        ),
    ))
}
