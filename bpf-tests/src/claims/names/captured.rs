//! Programs that were told nothing: their queries are captured on the way to the server that they know.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    upstream::{COMPARE, UPSTREAM, dnsmasq},
    with_resolv_conf, write_resolv_conf,
};
use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    services,
    wait::SOON,
    workload::{Kind, Workload},
};

/// A server that exists nowhere.
const NOWHERE: &str = "192.0.2.53";

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
