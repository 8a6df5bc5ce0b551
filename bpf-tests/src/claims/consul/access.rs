//! How agents reach Consul, and with what rights.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{
    claims::{Finding, Size},
    consul::{ConsulMesh, HTTPS, SOON, narrow_policy},
    mesh::local,
    node::Node,
    services,
    wait::wait_for_value,
};

/// A cluster with `web` on node b, which answers with its name.
fn with_web(purpose: &str) -> Result<ConsulMesh> {
    let mut mesh = ConsulMesh::cluster(purpose)?;
    let place = mesh.place("web")?;
    mesh.keep(services::http(&place, local(8080), "page of web")?);
    mesh.register("web", "web", 8080, Value::Null)?;
    Ok(mesh)
}

/// What curl gets of `web` from node a.
fn page(mesh: &ConsulMesh) -> Result<String> {
    let url = format!("http://{}:8080/", mesh.callable("web")?);
    Ok(mesh.shop.curl(&url).run(SOON)?.trim().to_owned())
}

/// What a node's status has at `pointer`, as text.
fn status(node: &Node, pointer: &str) -> Result<String> {
    let status = node.status()?;
    let value = status.pointer(pointer).cloned().unwrap_or_default();
    Ok(value.as_str().map_or(value.to_string(), str::to_owned))
}

pub(super) fn every_form_of_address_is_taken(_size: Size) -> Result<Finding> {
    let mut mesh = with_web("c-forms")?;
    mesh.use_socket_on_a()?;
    mesh.start()?;
    let page = page(&mesh)?;
    let addresses = [&mesh.lab.a, &mesh.lab.b].map(|node| status(node, "/consul/address"));
    let [a, b] = addresses;
    let (a, b) = (a?, b?);
    let problems = [&mesh.lab.a, &mesh.lab.b].map(|node| status(node, "/consul/problems"));
    let [of_a, of_b] = problems;
    let problems = of_a? + &of_b?;
    // Without the certificate that node b's agent has, nobody is let in there.
    let stranger = mesh.lab.b.tool("curl")?;
    let stranger = stranger.args([
        "--insecure",
        "--tls-max",
        "1.2",
        "--silent",
        "--show-error",
        "--max-time",
        "20",
    ]);
    let stranger = stranger
        .arg(format!("{HTTPS}/v1/agent/self"))
        .output(SOON)?;
    Ok(Finding::new(
        page == "page of web"
            && a.starts_with("unix:///")
            && b == HTTPS
            && problems == "[][]"
            && !stranger.succeeded(),
        format!(
            "node a by {a}, node b by {b}: curl got {page:?}, problems: {problems}; without a certificate at b: {}",
            stranger.stderr.trim()
        ),
    ))
}

pub(super) fn a_token_for_one_service_is_enough_for_it(_size: Size) -> Result<Finding> {
    let mut mesh = with_web("c-narrow")?;
    let own = mesh.use_token_on_b("narrow", narrow_policy()?)?;
    mesh.start()?;
    let page = page(&mesh)?;
    // The other way: `web` calls `shop`, which echoes.
    let shop = wait_for_value("shop to be callable from b", SOON, || {
        let service = mesh.in_force(&mesh.lab.b, "shop").unwrap_or_default();
        let address = service.pointer("/addresses/0").and_then(Value::as_str);
        let available = service.get("available").and_then(Value::as_u64);
        Ok(address.filter(|_| available > Some(0)).map(str::to_owned))
    })?;
    let place = mesh.place("web")?;
    let call = "import socket, sys; s = socket.create_connection((sys.argv[1], 80), 15); s.sendall(b'from web'); print(s.recv(8).decode())";
    let python = place.program("python3").args(["-c", call, &shop]);
    let echo = python.run(SOON)?.trim().to_owned();
    let log = mesh
        .lab
        .b
        .wait_for_access_log(0, &["svc/web", "service=shop"])?;
    ensure!(log.contains("outcome=completed"), "{log}");
    let checked = mesh.lab.b.sidestep(&["check", "--json"])?.output(SOON)?;
    let findings: Vec<Value> = serde_json::from_str(&checked.stdout)?;
    let of_consul = findings.iter().filter(|finding| {
        let name = finding.get("name").and_then(Value::as_str);
        name.is_some_and(|name| name.starts_with("Consul"))
    });
    let missing: Vec<&Value> = of_consul
        .clone()
        .filter(|finding| finding.get("status") != Some(&json!("ok")))
        .collect();
    let rights = of_consul.count();
    let problems = status(&mesh.lab.b, "/consul/problems")?;
    let leaf = |name: &str| {
        let path = format!("agent/connect/ca/leaf/{name}");
        own.ask("GET", &path, None).map(|answer| answer.status)
    };
    let (for_web, for_shop) = (leaf("web")?, leaf("shop")?);
    Ok(Finding::new(
        page == "page of web"
            && echo == "from web"
            && rights > 0
            && missing.is_empty()
            && problems == "[]"
            && (for_web, for_shop) == (200, 403),
        format!(
            "called: {page:?}, calls: {echo:?}; `sidestep check`: {} of {rights} rights missing {missing:?}; problems: {problems}; asked for a certificate for web Consul answers {for_web}, for shop {for_shop}",
            missing.len()
        ),
    ))
}
