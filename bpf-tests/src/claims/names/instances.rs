//! Instances that are called by their own addresses, by programs that find them themselves.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{LISTENER, dns, with_resolv_conf, write_resolv_conf};
use crate::{
    claims::{Finding, Size, dependable::web},
    consul::ConsulMesh,
    lab::DEVICE,
    mesh::{Mesh, vip},
    mode::Mode,
    node::Node,
    services,
    wait::{SOON, wait_for, wait_for_value},
    wire::Capture,
    workload::{Kind, Workload},
};

/// In each request.
const MARKER: &str = "seen-on-the-wire-4712";

/// The ports of `web-1` and `web-2`.
const PORTS: [u16; 2] = [8081, 8082];

/// Two instances of `web` on `b` which listen at its outside address and say who they are and who called: by the mesh
/// that is the agent of their own node, around it the caller's node.
fn mesh(purpose: &str) -> Result<Mesh> {
    let mut mesh = Mesh::new(purpose)?;
    for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
        node.set_capture("instances = true");
    }
    for (index, port) in PORTS.into_iter().enumerate() {
        let id = format!("web-{}", index + 1);
        let place = mesh.place("web", &id, Kind::Cgroup)?;
        let files = place.directory().join("files");
        fs::create_dir_all(&files)?;
        // A file without blocks.
        fs::File::create(files.join("large"))?.set_len(1 << 30)?;
        let address = real(&mesh, port);
        mesh.register("web", &id, vip(1, 80), address);
        mesh.keep(services::nginx(
            &place,
            address,
            &format!("{id} $remote_addr"),
        )?);
    }
    Ok(mesh)
}

/// The outside address of `b`.
fn real(mesh: &Mesh, port: u16) -> SocketAddr {
    SocketAddr::new(mesh.lab.b.address(), port)
}

/// The page that the instance at `address` gives, and an empty one without an answer.
fn page(client: &Workload, address: SocketAddr) -> Result<String> {
    let url = format!("http://{address}/?{MARKER}");
    Ok(client.curl(&url).output(SOON)?.stdout.trim().to_owned())
}

/// The page of an instance that `caller` called.
fn expected(number: usize, caller: &Node) -> String {
    format!("web-{number} {}", caller.address())
}

/// Waits until the instance `number`, called by its address, says that `caller` called.
fn wait_until_called_by(mesh: &Mesh, number: usize, caller: &Node) -> Result<()> {
    let address = real(mesh, *PORTS.get(number - 1).context("no such instance")?);
    let what = format!("web-{number} to be called by node {}", caller.name());
    wait_for_value(&what, SOON, || {
        let page = page(&mesh.shop, address)?;
        Ok((page == expected(number, caller)).then_some(()))
    })
}

pub(super) fn an_instance_called_by_its_address_is_kept(size: Size) -> Result<Finding> {
    let calls = size.pick(10_usize, 200);
    let mut mesh = mesh("instances")?;
    let mut clients = vec![mesh.shop.clone()];
    // It has no route to the other node, which a rule needs.
    if Mode::chosen() == Mode::Ebpf {
        clients.push(mesh.lab.a.add_workload("shop", "pod", Kind::Netns)?);
    }
    let near = mesh.lab.b.add_workload("shop", "near", Kind::Cgroup)?;
    clients.push(near);
    mesh.start()?;

    let capture = Capture::start(&mesh.lab.a, "tcp")?;
    for client in &clients {
        for (number, port) in (1..).zip(PORTS) {
            for _ in 0..calls {
                let page = page(client, real(&mesh, port))?;
                let kept = page == expected(number, &mesh.lab.b);
                let name = client.name();
                ensure!(kept, "{name} called web-{number} and got {page:?}");
            }
        }
    }
    let wire = capture.stop()?;
    let (records, is_clear) = (wire.tls_records()?, wire.contains(MARKER));
    let called = format!("original_destination={}", real(&mesh, PORTS[1]));
    let words = [
        called.as_str(),
        "service=web",
        "instance=web-2",
        "outcome=completed",
    ];
    for node in [&mesh.lab.a, &mesh.lab.b] {
        node.wait_for_access_log(0, &words)?;
    }
    let script = format!(
        "import socket; print(socket.create_connection(('{}', {})).getpeername())",
        real(&mesh, PORTS[0]).ip(),
        PORTS[0]
    );
    let peer = mesh.shop.program("python3").args(["-c", &script]);
    let peer = peer.run(SOON)?.trim().to_owned();
    let is_shown = peer == format!("('{}', {})", mesh.lab.b.address(), PORTS[0]);

    let denied = page(&mesh.guest, real(&mesh, PORTS[0]))?;
    let line = mesh
        .lab
        .a
        .wait_for_access_log(0, &["svc/guest", "service=web", "outcome=denied"])?;
    Ok(Finding::new(
        !is_clear && records > 1 && is_shown && denied.is_empty(),
        format!(
            "{calls} calls to each of two instances by {} clients, on the same node too, reach that one; \
             {records} TLS records and no plaintext on the wire; getpeername() shows {peer}; denied: {line}",
            clients.len()
        ),
    ))
}

pub(super) fn instances_that_come_and_go_are_followed(_size: Size) -> Result<Finding> {
    let mut mesh = mesh("instances-change")?;
    mesh.start()?;
    wait_until_called_by(&mesh, 2, &mesh.lab.b)?;
    if let Some(second) = mesh.instances().last_mut() {
        second.health = "critical";
    }
    mesh.publish()?;
    let failing = page(&mesh.shop, real(&mesh, PORTS[1]))?;
    let is_kept = failing == expected(2, &mesh.lab.b);

    let url = format!("http://{}/files/large", real(&mesh, PORTS[1]));
    let curl = mesh.shop.program("curl").args(["--silent", "--fail"]);
    let curl = curl.args(["--limit-rate", "4M", "--output", "large", &url]);
    let mut download = curl.spawn()?;
    let saved = mesh.shop.directory().join("large");
    let so_far = || fs::metadata(&saved).map_or(0, |file| file.len());
    wait_for("the download to have begun", SOON, || so_far() > 0)?;
    let second = mesh.instances().pop().context("there is none")?;
    mesh.publish()?;
    wait_until_called_by(&mesh, 2, &mesh.lab.a)?;
    let before = so_far();
    wait_for("the download to go on", SOON, || so_far() > before)?;
    ensure!(download.ended()?.is_none(), "the download ended");
    drop(download);
    let first = page(&mesh.shop, real(&mesh, PORTS[0]))?;
    mesh.instances().push(second);
    mesh.publish()?;
    wait_until_called_by(&mesh, 2, &mesh.lab.b)?;

    let contested = real(&mesh, PORTS[0]);
    mesh.register("other", "other-1", vip(2, 80), contested);
    mesh.publish()?;
    wait_for_value("calls to be refused", SOON, || {
        let end = web::connect_to(&mesh, contested)?;
        Ok((end == "ECONNREFUSED").then_some(()))
    })?;
    let problems = web::problems(&mesh.lab.a)?;
    mesh.instances().pop();
    mesh.publish()?;
    wait_until_called_by(&mesh, 1, &mesh.lab.b)?;

    mesh.lab.a.kill_agent();
    let away = web::connect_to(&mesh, contested)?;
    let is_told = matches!(problems.as_slice(), [one] if one.contains("other and web both"));
    let stays = first == expected(1, &mesh.lab.b);
    Ok(Finding::new(
        is_kept && stays && is_told && away == "ECONNREFUSED",
        format!(
            "one that fails its checks is reached ({failing}); one that left is called around the mesh until it is back, \
             but for the connection that it had, and the other by it ({first}); two services at one address: {problems:?}; without an agent: {away}"
        ),
    ))
}

pub(super) fn srv_records_lead_to_instances_in_the_mesh(_size: Size) -> Result<Finding> {
    let mut mesh = mesh("instances-srv")?;
    dns(
        &mut mesh.lab.a,
        "listen = \"127.0.0.1:53\"\nservice_answers = \"instances\"\nupstreams = []",
    );
    mesh.start()?;
    let resolv_conf = write_resolv_conf(mesh.shop.directory(), LISTENER)?;
    let pages = pages_by_srv(&mesh.shop, &resolv_conf, "_web._tcp.service.consul")?;
    let wanted = (1..).zip(PORTS);
    let wanted = wanted.map(|(number, port)| (port, expected(number, &mesh.lab.b)));
    Ok(Finding::new(
        pages == wanted.collect(),
        format!("by port, curl gets {pages:?}"),
    ))
}

/// The page that curl gets from each host and port that dig finds, by port.
fn pages_by_srv(
    client: &Workload,
    resolv_conf: &Path,
    name: &str,
) -> Result<BTreeMap<u16, String>> {
    let run = |command: &[&str]| with_resolv_conf(client, resolv_conf, command).run(SOON);
    let said = run(&["dig", "+short", name, "SRV"])?;
    let mut pages = BTreeMap::new();
    for line in said.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_priority, _weight, port, host] = words.as_slice() else {
            anyhow::bail!("dig said {said:?}");
        };
        let url = format!("http://{}:{port}/", host.trim_end_matches('.'));
        let page = run(&["curl", "--silent", "--show-error", "--fail", &url])?;
        pages.insert(port.parse()?, page.trim().to_owned());
    }
    Ok(pages)
}

pub(super) fn instances_of_consul_are_captured(_size: Size) -> Result<Finding> {
    const OWN: &str = "10.78.0.3";
    let mut mesh = ConsulMesh::dev("instances-consul")?;
    mesh.lab.b.namespace().add_address(DEVICE, OWN.parse()?)?;
    for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
        node.set_capture("instances = true");
    }
    let address = |ip: IpAddr, port: u16| SocketAddr::new(ip, port);
    let web = address(mesh.lab.b.address(), 8080);
    let db = address(OWN.parse()?, 8090);
    for (service, at, more) in [
        ("web", web, Value::Null),
        ("db", db, json!({ "Address": OWN })),
    ] {
        let place = mesh.place(service)?;
        mesh.keep(services::nginx(
            &place,
            at,
            &format!("{service} $remote_addr"),
        )?);
        mesh.register(service, service, at.port(), more)?;
    }
    dns(
        &mut mesh.lab.a,
        "listen = \"127.0.0.1:53\"\nservice_answers = \"instances\"\nupstreams = []",
    );
    mesh.start()?;
    let through = |service: &str, at: SocketAddr| format!("{service} {}", at.ip());
    for (service, at) in [("web", web), ("db", db)] {
        wait_for_value(&format!("{service} to be called by the mesh"), SOON, || {
            Ok((page(&mesh.shop, at)? == through(service, at)).then_some(()))
        })
        .with_context(|| mesh.said())?;
    }
    let resolv_conf = write_resolv_conf(mesh.shop.directory(), LISTENER)?;
    let mut pages = vec![];
    for (service, at) in [("web", web), ("db", db)] {
        let name = format!("{service}.service.consul");
        let found = pages_by_srv(&mesh.shop, &resolv_conf, &name)?;
        let wanted = BTreeMap::from([(at.port(), through(service, at))]);
        ensure!(found == wanted, "{name} leads to {found:?}");
        pages.extend(found.into_values());
    }

    // Nobody on the node may call it then, and it is known still.
    mesh.api().intend("*", "web", "deny")?;
    let mut denied = 0;
    wait_for_value("calls to be denied", SOON, || {
        let page = page(&mesh.shop, web)?;
        let by_mesh = page == through("web", web);
        ensure!(page.is_empty() || by_mesh, "a denied call got {page:?}");
        denied = if by_mesh { 0 } else { denied + 1 };
        Ok((denied >= 50).then_some(()))
    })
    .with_context(|| mesh.said())?;
    Ok(Finding::new(
        true,
        format!("by Consul's SRV records curl gets {pages:?}; denied, nothing {denied} times"),
    ))
}
