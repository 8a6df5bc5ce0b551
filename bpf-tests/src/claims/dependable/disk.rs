//! What the agent reads from and writes to the disk.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, mount};
use serde_json::Value;

use super::web;
use crate::{
    claims::{Finding, Size},
    mesh::Mesh,
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
