//! Java, which remembers what a name led to, for half a minute or for good.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{NOWHERE, with_resolv_conf, write_resolv_conf};
use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    program::{Program, Running},
    services,
    wait::{SOON, wait_for},
    workload::Kind,
};

const NAMES: &str = include_str!("Names.java");

/// Java keeps for ten seconds that a name does not exist.
const FORGOTTEN: Duration = Duration::from_secs(60);

pub(super) fn java_follows_names(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("names-java")?;
    let places = [("web", "web-1"), ("web", "web-2"), ("late", "late-1")];
    let mut pages = vec![];
    for ((service, id), port) in places.into_iter().zip(8080..) {
        let place = mesh.place(service, id, Kind::Cgroup)?;
        let page = services::nginx(&place, local(port), &format!("page of {id}"))?;
        pages.push(page);
    }
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    let container = mesh.lab.a.add_workload("shop", "box", Kind::Netns)?;
    mesh.lab.a.set_capture("dns = true");
    let classes = mesh.lab.a.directory().join("classes");
    let source = mesh.lab.a.directory().join("Names.java");
    fs::write(&source, NAMES)?;
    Program::new("javac")
        .arg("-d")
        .args([&classes, &source])
        .run(FORGOTTEN)?;
    mesh.start()?;
    let classes = classes.display().to_string();
    let java = ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp"];
    let (web, late) = (vip(1, 80).ip(), vip(2, 80).ip());
    let end = mesh.scratch().directory().join("end");
    let mut running = vec![];
    for workload in [&mesh.shop, &container] {
        let resolv_conf = write_resolv_conf(workload.directory(), NOWHERE)?;
        let ask = ["Names", "ask", NOWHERE, "web.virtual.consul"];
        let ask = [&java[..], &[&classes], &ask].concat();
        let said = with_resolv_conf(workload, &resolv_conf, &ask).run(SOON)?;
        ensure!(said.trim() == web.to_string(), "JNDI: {said:?}");

        for (name, keeps) in [
            ("web.virtual.consul", "-Dsun.net.inetaddr.ttl=-1"),
            ("late.service.consul", "-Dsun.net.inetaddr.ttl=30"),
        ] {
            let end = end.display().to_string();
            let call = ["Names", "call", name, "80", &end];
            let call = [&java[..], &[&classes, keeps], &call].concat();
            let log = workload.directory().join(name);
            let program = with_resolv_conf(workload, &resolv_conf, &call).log(&log);
            running.push((program.spawn()?, log));
        }
    }
    let called = Called { mesh, running };
    let (first, unknown) = (format!("{web} page of web-1"), "unknown");
    called.wait_for(&first, unknown, SOON)?;

    // The name stays with its address, behind which another instance takes over; and another name begins to exist.
    let Called { mut mesh, running } = called;
    mesh.instances().clear();
    mesh.register("web", "web-2", vip(1, 80), local(8081));
    mesh.register("late", "late-1", vip(2, 80), local(8082));
    mesh.publish()?;
    drop(pages.swap_remove(0));
    let called = Called { mesh, running };
    let (second, found) = (
        format!("{web} page of web-2"),
        format!("{late} page of late-1"),
    );
    called.wait_for(&second, &found, FORGOTTEN)?;
    fs::write(end, "")?;
    Ok(Finding::new(
        true,
        "in two workloads, by getaddrinfo and by JNDI: an address kept for good leads to the instance that took over, \
         and a name that did not exist is found later",
    ))
}

/// Programs that call `web` and `late`, in turn.
struct Called {
    mesh: Mesh,
    running: Vec<(Running, PathBuf)>,
}

impl Called {
    /// Waits for what they say last.
    fn wait_for(&self, of_web: &str, of_late: &str, deadline: Duration) -> Result<()> {
        let expected = [of_web, of_late].into_iter().cycle();
        for ((_, log), expected) in self.running.iter().zip(expected) {
            wait_for(&format!("{expected:?} in Java"), deadline, || {
                last_line(log) == expected
            })
            .with_context(|| fs::read_to_string(log).unwrap_or_default())
            .with_context(|| self.mesh.lab.a.agent_said())?;
        }
        Ok(())
    }
}

fn last_line(log: &Path) -> String {
    let said = fs::read_to_string(log).unwrap_or_default();
    said.lines().last().unwrap_or_default().to_owned()
}
