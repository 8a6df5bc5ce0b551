//! What the agent reads from and writes to the disk.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    net::SocketAddr,
    path::Path,
};

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, mount};
use serde_json::Value;

use super::web;
use crate::{
    catalog::Catalog,
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    wait::{SOON, wait_for_value},
};

/// The service without an address of its own in the catalog.
const FREE: &str = "free";

pub(super) fn a_full_disk_keeps_nobody_from_calling(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("disk")?;
    let state = mesh.lab.a.directory().join("state");
    fs::create_dir_all(&state)?;
    mount(
        "tmpfs",
        &state,
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=16k"),
    )
    .with_context(|| format!("mounting a tmpfs at {}", state.display()))?;
    let filler = state.join("filler");
    fill(&filler)?;
    write_free(&mesh)?;
    mesh.start()?;
    let told = web::problems(&mesh.lab.a)?;
    let answered = calls_free(&mesh)?;
    mesh.lab
        .change_catalog(|catalog| catalog.write_intentions("web", &[("shop", "allow")]))?;
    let still = web::problems(&mesh.lab.a)?;

    fs::remove_file(&filler)?;
    mesh.lab
        .change_catalog(|catalog| catalog.write_intentions("free", &[("shop", "allow")]))?;
    let after = wait_for_value("the catalog's problems", SOON, || {
        let problems = web::problems(&mesh.lab.a)?;
        Ok((problems != still).then_some(problems))
    })?;
    let saved = fs::read_to_string(state.join("virtual-addresses.json")).unwrap_or_default();
    let remembered = saved.contains(FREE);
    let told = told.join("; ");
    Ok(Finding::new(
        told.contains("No space left on device")
            && still.join("; ") == told
            && answered
            && after.is_empty()
            && remembered,
        format!(
            "calls answered: {answered}; status: {told}; with room again: {after:?}, addresses saved: {remembered}"
        ),
    ))
}

pub(super) fn a_replaced_catalog_directory_is_followed(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("moved")?;
    mesh.start()?;
    let directory = mesh.lab.catalog.directory().to_owned();
    let old = directory.with_file_name("catalog.old");
    let new = directory.with_file_name("catalog.new");
    fs::rename(&directory, &old)?;
    let gone = wait_for_value("the agent to miss its directory", SOON, || {
        Ok(web::problems(&mesh.lab.a)?.pop())
    })?;
    let meanwhile = web::served(&mesh, 10)?;

    fs::create_dir(&new)?;
    let next = Catalog::new(new.clone());
    next.write_intentions("*", &[("shop", "allow")])?;
    mesh.register("late", "late", vip(2, 80), local(8080));
    next.write_instances("services", mesh.instances())?;
    fs::rename(&new, &directory)?;
    wait_until_called(&mesh, vip(2, 80))?;
    // Into the directory that is there now, and into the one that was.
    fs::write(old.join("broken.yaml"), "service: {")?;
    mesh.register("later", "later", vip(3, 80), local(8080));
    mesh.publish()?;
    wait_until_called(&mesh, vip(3, 80))?;
    let after = web::problems(&mesh.lab.a)?;
    Ok(Finding::new(
        meanwhile == 10 && after.is_empty(),
        format!(
            "while there is none {meanwhile} of 10 calls, status: {gone}; then the new one is followed, and a change in it, problems: {after:?}"
        ),
    ))
}

fn wait_until_called(mesh: &Mesh, address: SocketAddr) -> Result<()> {
    wait_for_value("a new service to be called", SOON, || {
        let page = mesh.shop.curl(&format!("http://{address}/")).output(SOON)?;
        Ok((page.stdout.trim() == "web").then_some(()))
    })
}

/// Leaves no room where `file` is.
fn fill(file: &Path) -> Result<()> {
    let mut file = File::create(file)?;
    loop {
        match file.write(&[0; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error).context("filling the disk"),
        }
    }
}

/// Registers the web server under another name too, whose address the agent gives.
fn write_free(mesh: &Mesh) -> Result<()> {
    let node = &mesh.lab.b;
    mesh.lab.catalog.write(
        "free.yaml",
        &format!(
            "\
node: {{ name: {}, address: \"{}\" }}
service:
  name: {FREE}
  port: 8080
  connect: {{ sidecar_service: {{}} }}
",
            node.name(),
            node.address()
        ),
    )
}

/// Whether that is answered at the address that the agent says.
fn calls_free(mesh: &Mesh) -> Result<bool> {
    let status = mesh.lab.a.status()?;
    let services = status.get("services").and_then(Value::as_array);
    let address = services
        .into_iter()
        .flatten()
        .filter(|service| service.get("name").is_some_and(|name| name == FREE))
        .filter_map(|service| service.get("addresses").and_then(Value::as_array))
        .flatten()
        .filter_map(Value::as_str)
        .find(|address| !address.contains(':'))
        .with_context(|| format!("no address of {FREE} in {status}"))?;
    let call = mesh.shop.curl(&format!("http://{address}:8080/"));
    Ok(call.output(SOON)?.stdout.trim() == "web")
}
