//! Lines of queries, as operators read them.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{
    LISTENER, NOWHERE, dig, dns,
    upstream::{UPSTREAM, dnsmasq},
};
use crate::{
    claims::{Finding, Size, dependable::replaced::upgrade},
    mesh::{Mesh, local, vip},
    wait::{SOON, wait_for, wait_for_value},
    workload::{Kind, Workload},
};

pub(super) fn queries_have_lines(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("names-log")?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    let container = mesh.lab.a.add_workload("guest", "box", Kind::Netns)?;
    mesh.lab.a.set_capture("dns = true");
    let keys = format!("listen = \"{LISTENER}:53\"\nupstreams = [\"{UPSTREAM}\"]\nquery_log = 0");
    dns(&mut mesh.lab.a, &keys);
    let _server = dnsmasq(&mesh.lab.a, mesh.shop.namespace(), 53, "")?;
    mesh.start()?;
    let lines = |mesh: &Mesh| {
        let mut lines = mesh.lab.a.access_log();
        lines.retain(|line| line.contains(" transport="));
        lines
    };
    dig(&mesh.lab.a, "web.virtual.consul")?;

    // Taken over by the next agent only, as the log says.
    mesh.lab.a.replace_setting("query_log = 0", "query_log = 1");
    mesh.lab.a.reload_agent()?;
    wait_for("word of the restart that it takes", SOON, || {
        let said = mesh.lab.a.agent_said();
        said.lines()
            .any(|l| l.contains("restart") && l.contains("dns"))
    })?;
    dig(&mesh.lab.a, "web.virtual.consul")?;
    ensure!(lines(&mesh).is_empty(), "{:?}", lines(&mesh));
    upgrade(&mesh.lab.a)?;
    wait_for_value("the agent before to end", SOON, || {
        let status = mesh.lab.a.status()?;
        let gone = status.get("predecessor").is_none_or(Value::is_null);
        Ok(gone.then_some(()))
    })?;

    let asked = |workload: &Workload, words: &[&str]| {
        let program = workload.program("dig").args(["+tries=1", "+timeout=5"]);
        program.args(words).run(SOON)
    };
    dig(&mesh.lab.a, "web.virtual.consul")?;
    dig(&mesh.lab.a, "AAAA host1.example.test")?;
    dig(&mesh.lab.a, "x\\032outcome=y\\010.virtual.consul")?;
    let [nowhere, upstream] = [NOWHERE, UPSTREAM].map(|server| format!("@{server}"));
    asked(&mesh.shop, &[&nowhere, "web.service.consul"])?;
    asked(&mesh.shop, &[&upstream, "+tcp", "nothing.example.test"])?;
    asked(&container, &[&nowhere, "web.virtual.consul"])?;
    let expected = expected(&container);
    wait_for("six lines", SOON, || lines(&mesh).len() >= expected.len())?;
    let lines = lines(&mesh);
    ensure!(lines.len() == expected.len(), "{lines:#?}");
    for (line, (transport, rest)) in lines.iter().zip(expected) {
        let client = line
            .split(' ')
            .find_map(|word| word.strip_prefix("client=")?.rsplit_once(':'));
        let from: Option<IpAddr> = client.and_then(|(address, _port)| address.parse().ok());
        let begins = line.contains(&format!(" transport={transport} client="));
        ensure!(
            begins && from.is_some() && line.contains(&format!(" {rest} duration_ms=")),
            "{line} should say {rest}"
        );
    }
    Ok(Finding::new(
        true,
        "six queries, captured or not, have a line each that names asker, name, server and code; none before an upgrade \
         took the key over",
    ))
}

/// The transport of each query, and what its line says between the client and the duration.
fn expected(container: &Workload) -> [(&'static str, String); 6] {
    let container = container.namespace().path().display();
    [
        (
            "udp",
            "name=web.virtual.consul. type=A outcome=answered rcode=NOERROR".to_owned(),
        ),
        (
            "udp",
            format!(
                "name=host1.example.test. type=AAAA upstream={UPSTREAM}:53 outcome=forwarded rcode=NOERROR"
            ),
        ),
        (
            "udp",
            "name=\"x\\\\032outcome=y\\\\010.virtual.consul.\" type=A outcome=no_name rcode=NXDOMAIN"
                .to_owned(),
        ),
        (
            "udp",
            format!(
                "namespace=host name=web.service.consul. type=A original_destination={NOWHERE}:53 outcome=answered \
                 rcode=NOERROR"
            ),
        ),
        (
            "tcp",
            format!(
                "namespace=host workload=shop name=nothing.example.test. type=A original_destination={UPSTREAM}:53 \
                 upstream={UPSTREAM}:53 outcome=forwarded rcode=NXDOMAIN"
            ),
        ),
        (
            "udp",
            format!(
                "namespace={container} workload=guest name=web.virtual.consul. type=A original_destination={NOWHERE}:53 \
                 outcome=answered rcode=NOERROR"
            ),
        ),
    ]
}
