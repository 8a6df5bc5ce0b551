//! Other names, with dnsmasq as the server that answered them before.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::{dig, dns};
use crate::{
    claims::{Finding, Size},
    lab::Lab,
    namespace::Namespace,
    node::Node,
    program::Running,
    wait::{SOON, wait_for_value},
};

/// Where dnsmasq answers.
pub(super) const UPSTREAM: &str = "127.0.0.53";

pub(super) const COMPARE: &str = include_str!("compare.py");

pub(super) fn other_names_are_answered_as_before(size: Size) -> Result<Finding> {
    let queries = size.pick(1000, 10_000);
    let (lab, _upstream) = with_upstream("names-upstream")?;
    let said = lab
        .a
        .tool("python3")?
        .args(["-c", COMPARE, &queries.to_string()])
        .args([UPSTREAM, "53", super::LISTENER, "53"])
        .run(Duration::from_mins(5))?;
    let last = said.lines().last().unwrap_or_default();
    let numbers: Vec<usize> = last
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [same, truncated, over_tcp, largest] = numbers.as_slice() else {
        bail!("{said}");
    };
    let holds = *same == queries && *truncated > 0 && *over_tcp > 0 && !said.contains("DIFFERENT");
    Ok(Finding::new(
        holds,
        format!(
            "{same} of {queries} answers are the same, {over_tcp} of them over TCP, {truncated} cut, the largest of {largest} bytes{}",
            if holds {
                String::new()
            } else {
                format!(": {said}")
            }
        ),
    ))
}

pub(super) fn a_lost_upstream_denies_no_name(_size: Size) -> Result<Finding> {
    let (lab, mut upstream) = with_upstream("names-lost")?;
    let asked = |words: &str| dig(&lab.a, words);
    let before = asked("+short host1.example.test")?;
    upstream.kill();
    let mut codes = vec![];
    for words in [
        "host1.example.test",
        "+tcp host1.example.test",
        "nothing.example.test",
    ] {
        let said = asked(words)?;
        let code = said
            .split("status: ")
            .nth(1)
            .and_then(|rest| rest.split(',').next());
        codes.push(code.context("no status")?.to_owned());
    }
    let own = asked("+short web.virtual.consul")?;
    let failed = lab.a.metric(
        "sidestep_dns_queries_total",
        &["outcome=\"upstream_failed\""],
    )?;
    let holds = before.trim() == "192.0.2.1"
        && codes.iter().all(|code| code == "SERVFAIL")
        && own.trim() == "240.9.0.1"
        && failed >= 3.0;
    Ok(Finding::new(
        holds,
        format!(
            "before {before:?}, then {codes:?} and {failed} counted; web.virtual.consul is at {own:?}"
        ),
    ))
}

/// A node with dnsmasq, an agent that forwards to it, and a service `web`.
pub(super) fn with_upstream(purpose: &str) -> Result<(Lab, Running)> {
    start_with_upstream(Lab::new(purpose)?)
}

/// The same, in a lab that has more.
pub(super) fn start_with_upstream(mut lab: Lab) -> Result<(Lab, Running)> {
    lab.catalog.write(
        "web.yaml",
        "node: { name: b, address: 10.77.0.2 }\nservice:\n  name: web\n  port: 80\n  \
         tagged_addresses: { virtual: { address: 240.9.0.1, port: 80 } }\n",
    )?;
    dns(
        &mut lab.a,
        &format!("listen = \"127.0.0.1:53\"\nupstreams = [\"{UPSTREAM}\"]\nqueries_per_second = 0"),
    );
    let upstream = dnsmasq(&lab.a, lab.a.namespace(), 53, "")?;
    lab.a.start_agent()?;
    lab.a.wait_until_ready()?;
    Ok((lab, upstream))
}

/// dnsmasq at this port, in one of the namespaces of `node`, with `more` in its configuration.
pub(super) fn dnsmasq(
    node: &Node,
    namespace: &Namespace,
    port: u16,
    more: &str,
) -> Result<Running> {
    let name = format!("dnsmasq-{}-{port}", namespace.name());
    let file = node.directory().join(format!("{name}.conf"));
    let mut text = format!(
        "no-daemon\nuser=root\nno-resolv\nno-hosts\nlisten-address={UPSTREAM}\nbind-interfaces\n\
         pid-file=\nlocal=/test/\nlocal-ttl=60\nport={port}\n{more}\nedns-packet-max=4096\n\
         txt-record=text.example.test,some text\n\
         mx-host=example.test,mail.example.test,10\nhost-record=mail.example.test,192.0.2.200\n\
         cname=alias.example.test,host1.example.test\n\
         srv-host=_sip._tcp.example.test,host1.example.test,5060,1,2\n\
         ptr-record=5.2.0.192.in-addr.arpa,host5.example.test\n\
         address=/blocked.test/192.0.2.66\n"
    );
    for n in 0..50 {
        text.push_str(&format!(
            "host-record=host{n}.example.test,192.0.2.{n},2001:db8::{n:x}\n"
        ));
    }
    // Larger than most answers over UDP may be.
    for n in 0..20 {
        text.push_str(&format!(
            "txt-record=long.example.test,\"{n} {}\"\n",
            "x".repeat(200)
        ));
    }
    fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
    let log = node.directory().join(format!("{name}.log"));
    let running = node
        .tool("dnsmasq")?
        .arg(format!("--conf-file={}", file.display()))
        .in_namespace(namespace)
        .log(&log)
        .spawn()?;
    wait_for_value("dnsmasq to answer", SOON, || {
        let said = node
            .tool("dig")?
            .args([&format!("@{UPSTREAM}"), "+short", "+tries=1", "+timeout=1"])
            .args(["-p", &port.to_string()])
            .in_namespace(namespace)
            .arg("host1.example.test")
            .output(SOON)?;
        Ok(said.succeeded().then_some(()))
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    Ok(running)
}
