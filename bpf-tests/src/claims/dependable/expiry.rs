//! Certificates that run out.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::web;
use crate::{
    claims::{Finding, Size},
    lab::{TRUST_DOMAIN, make_intermediate},
    node::{Authority, Node},
    program::Program,
    wait::{SOON, Stopwatch, wait_for_value},
    wire::Capture,
};

/// How long the node's intermediate lasts. Starting two agents on a busy machine takes less.
const LIFE: Duration = Duration::from_secs(10);

pub(super) fn an_authority_that_ran_out_fails_closed(_size: Size) -> Result<Finding> {
    let mut mesh = web::mesh("expiry")?;
    let root = mesh.scratch().subdirectory("ca")?;
    let directory = mesh.scratch().subdirectory("short")?;
    // Certificates count whole seconds.
    let expiry = SystemTime::now() + LIFE;
    mesh.lab.a.set_authority(until(expiry, &root, &directory)?);
    mesh.start()?;
    let capture = Capture::start(&mesh.lab.a, "tcp")?;
    let mut calls = 0;
    while web::serves(&mesh)? {
        calls += 1;
        ensure!(
            SystemTime::now() < expiry + Duration::from_secs(2),
            "served after the authority ran out"
        );
    }
    ensure!(
        calls > 0,
        "no call is answered: {}",
        mesh.lab.a.agent_said()
    );
    let early = expiry.duration_since(SystemTime::now()).unwrap_or_default();
    let after = web::served(&mesh, 10)?;
    let told = wait_for_value("the status to say why", SOON, || problem(&mesh.lab.a))?;
    let wire = capture.stop()?;
    // As an error if anything is not TLS.
    let records = wire.tls_records()?;
    let clear = wire.contains("HTTP/1.1");

    let next = make_intermediate(&root, "a", &directory.join("next"))?;
    mesh.lab.a.set_authority(next);
    let clock = Stopwatch::start();
    mesh.lab.a.reload_agent()?;
    web::wait_until_served(&mesh)?;
    let back = clock.elapsed();
    Ok(Finding::new(
        early < Duration::from_secs(1) && after == 0 && !clear && records > 1,
        format!(
            "{calls} calls until it ran out, {after} of 10 after, plaintext on the wire: {clear}; status: {told}; with another authority served after {} ms",
            back.as_millis()
        ),
    ))
}

/// Why a certificate was not renewed, if one was not.
fn problem(node: &Node) -> Result<Option<String>> {
    let status = node.status()?;
    let certificates = status.get("certificates").and_then(Value::as_array);
    let mut certificates = certificates
        .context("no certificates in the status")?
        .iter();
    Ok(certificates.find_map(|it| it.get("last_error")?.as_str().map(str::to_owned)))
}

/// An intermediate of the node `a` that is good until `expiry`. `sidestep ca` counts days, OpenSSL seconds.
fn until(expiry: SystemTime, root: &Path, directory: &Path) -> Result<Authority> {
    let place = directory.display();
    let seconds = expiry.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let end = Program::new("date")
        .args(["-u", "-d", &format!("@{seconds}"), "+%Y%m%d%H%M%SZ"])
        .run(SOON)?;
    fs::write(directory.join("index"), "")?;
    let configuration = directory.join("openssl.cnf");
    fs::write(
        &configuration,
        format!(
            "\
[ca]
default_ca = short
[short]
database = {place}/index
new_certs_dir = {place}
rand_serial = yes
default_md = sha256
policy = any
x509_extensions = intermediate
[any]
commonName = supplied
[intermediate]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign, digitalSignature
subjectAltName = URI:spiffe://{TRUST_DOMAIN}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[req]
distinguished_name = name
[name]
"
        ),
    )?;
    openssl(
        directory,
        "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out a-key.pem",
    )?;
    openssl(
        directory,
        "req -new -config openssl.cnf -key a-key.pem -subj /CN=short -out a.csr",
    )?;
    let [certificate, key] = ["root.pem", "root-key.pem"].map(|file| root.join(file));
    openssl(
        directory,
        &format!(
            "ca -batch -notext -config openssl.cnf -cert {} -keyfile {} -enddate {} -in a.csr -out a.pem",
            certificate.display(),
            key.display(),
            end.trim()
        ),
    )?;
    Authority::in_directory(directory, "a", root)
}

fn openssl(directory: &Path, arguments: &str) -> Result<()> {
    let openssl = Program::new("openssl").in_directory(directory);
    openssl.args(arguments.split_whitespace()).run(SOON)?;
    Ok(())
}
