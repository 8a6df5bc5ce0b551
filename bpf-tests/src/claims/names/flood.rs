//! One who asks too much, and what is left to the others.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::{
    captured::{LOOKUPS, counts},
    upstream::{UPSTREAM, dnsmasq},
};
use crate::{
    claims::{Finding, Size},
    mesh::Mesh,
    wait::{SOON, wait_for, wait_for_value},
    workload::Kind,
};

/// Asks a server of its own that says nothing, at most 2,000 times a second over UDP and with 600 TCP connections at
/// once, until FILE exists.
const FLOOD: &str = "import os,socket,struct,sys,time\n\
    silent='127.0.0.54'\n\
    u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); u.bind((silent,53))\n\
    t=socket.socket(); t.bind((silent,53)); t.listen(2000)\n\
    q=struct.pack('>6H',7,256,1,0,0,0)+b'\\x05host1\\x07example\\x04test\\0'+struct.pack('>2H',1,1)\n\
    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); streams=[]\n\
    while not os.path.exists(sys.argv[1]):\n\
    \tfor _ in range(6): s.sendto(q,(silent,53))\n\
    \tc=socket.socket(); c.setblocking(False); c.connect_ex((silent,53)); streams=streams[-600:]+[c]\n\
    \ttime.sleep(0.003)\n";

pub(super) fn a_flood_leaves_others_their_share(size: Size) -> Result<Finding> {
    let enough = size.pick(300, 3000);
    let mut mesh = Mesh::new("names-flood")?;
    let container = mesh.lab.a.add_workload("guest", "box", Kind::Netns)?;
    mesh.lab.a.set_capture("dns = true");
    let _server = dnsmasq(&mesh.lab.a, mesh.shop.namespace(), 53, "")?;
    mesh.start()?;
    let end = mesh.scratch().directory().join("end");
    let said = container.directory().join("flood");
    let mut flood = container
        .program("python3")
        .args(["-c", FLOOD])
        .arg(&end)
        .log(&said)
        .spawn()?;
    let refused = |transport: &str| {
        let labels = ["outcome=\"overloaded\"", transport];
        mesh.lab.a.metric("sidestep_dns_queries_total", &labels)
    };
    for transport in ["transport=\"udp\"", "transport=\"tcp\""] {
        wait_for_value(
            &format!("the flood to be refused: {transport}"),
            SOON,
            || Ok((refused(transport)? > 0.0).then_some(())),
        )
        .with_context(|| fs::read_to_string(&said).unwrap_or_default())
        .with_context(|| mesh.lab.a.agent_said())?;
    }
    let log = mesh.shop.directory().join("lookups");
    let mut lookups = mesh
        .shop
        .program("python3")
        .args(["-c", LOOKUPS, UPSTREAM, "host7.example.test", "192.0.2.7"])
        .arg(&end)
        .log(&log)
        .spawn()?;
    let before = refused("udp")?;
    wait_for("lookups beside the flood", SOON * 3, || {
        counts(&log).all() >= enough
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let still = refused("udp")? > before;
    ensure!(flood.ended()?.is_none(), "the flood has ended");
    fs::write(&end, "")?;
    lookups.wait(SOON)?.context("the lookups do not end")?;
    let all = counts(&log);
    Ok(Finding::new(
        still && all.at_once == all.all(),
        format!(
            "{} of {} names looked up at once beside a flood from another namespace, of which {before} queries were \
             refused before",
            all.at_once,
            all.all(),
        ),
    ))
}
