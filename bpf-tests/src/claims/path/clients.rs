//! Real clients and real servers.

use std::{fmt::Write as _, fs, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    services,
    wait::SOON,
    workload::Kind,
};

pub(super) fn curl_reaches_nginx(size: Size) -> Result<Finding> {
    let requests = size.pick(20_usize, 200);
    let megabytes = size.pick(4_usize, 64);
    let mut mesh = Mesh::new("curl")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    let files = place.directory().join("files");
    fs::create_dir_all(&files)?;
    let pattern: Vec<u8> = (0..=250).cycle().take(megabytes << 20).collect();
    fs::write(files.join("big"), &pattern)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::nginx(&place, local(8080), "page of web-1")?);
    mesh.start()?;

    let url = format!("http://{}/", vip(1, 80));
    for _ in 0..requests {
        let page = mesh.shop.curl(&url).run(SOON)?;
        ensure!(page == "page of web-1\n", "another page: {page:?}");
    }
    let copy = mesh.shop.directory().join("copy");
    mesh.shop
        .curl(&format!("{url}files/big"))
        .arg("--output")
        .arg(&copy)
        .run(Duration::from_mins(2))?;
    let same = fs::read(&copy)? == pattern;
    Ok(Finding::new(
        same,
        format!(
            "{requests} pages, a file of {megabytes} MiB {}",
            equal(same)
        ),
    ))
}

pub(super) fn psql_reaches_postgresql(size: Size) -> Result<Finding> {
    let rows = size.pick(50_000_usize, 1_000_000);
    let mut mesh = Mesh::new("psql")?;
    let place = mesh.place("db", "db-1", Kind::Cgroup)?;
    mesh.register("db", "db-1", vip(1, 5432), local(5432));
    mesh.keep(services::postgres(&place, local(5432))?);
    mesh.start()?;

    let psql = mesh
        .shop
        .program("psql")
        .env("PGPASSWORD", services::POSTGRES_PASSWORD)
        .env("PGCONNECT_TIMEOUT", "15")
        .args(["--no-psqlrc", "--tuples-only", "--no-align"])
        .args(["--host", &vip(1, 5432).ip().to_string()])
        .args([
            "--username",
            services::POSTGRES_USER,
            "--dbname",
            "postgres",
        ])
        .arg("--command");
    let result = psql
        .clone()
        .arg(format!(
            "select md5(i::text) from generate_series(1, {rows}) i"
        ))
        .run(Duration::from_mins(2))?;
    let wrong = psql
        .env("PGPASSWORD", "wrong")
        .arg("select 1")
        .output(SOON)?;
    let got = result.lines().count();
    let refused = wrong.stderr.contains("password authentication failed");
    Ok(Finding::new(
        got == rows && refused,
        format!(
            "{got} of {rows} rows; a wrong password {}",
            if refused {
                "is refused by the server"
            } else {
                "gave another error"
            }
        ),
    ))
}

pub(super) fn redis_cli_pipelines(size: Size) -> Result<Finding> {
    let commands = size.pick(10_000_usize, 500_000);
    let mut mesh = Mesh::new("redis")?;
    let place = mesh.place("cache", "cache-1", Kind::Cgroup)?;
    mesh.register("cache", "cache-1", vip(1, 6379), local(6379));
    mesh.keep(services::redis(&place, local(6379))?);
    mesh.start()?;

    let mut input = String::new();
    for number in 0..commands {
        write!(input, "SET key:{number} value:{number}\r\n")?;
    }
    let address = vip(1, 6379);
    let redis_cli = mesh
        .shop
        .program("redis-cli")
        .args(["-h", &address.ip().to_string()])
        .args(["-p", &address.port().to_string()]);
    let said = redis_cli
        .clone()
        .arg("--pipe")
        .input(input)
        .run(Duration::from_mins(2))?;
    let answered = said.contains(&format!("errors: 0, replies: {commands}"));
    let stored: usize = redis_cli.arg("dbsize").run(SOON)?.trim().parse()?;
    Ok(Finding::new(
        answered && stored == commands,
        format!("{stored} of {commands} keys stored"),
    ))
}

pub(super) fn an_upload_arrives_whole(size: Size) -> Result<Finding> {
    let bytes = size.pick(64_u64, 1024) << 20;
    let mut mesh = Mesh::new("upload")?;
    let place = mesh.place("store", "store-1", Kind::Cgroup)?;
    mesh.register("store", "store-1", vip(1, 80), local(8080));
    mesh.keep(services::peer(&place, "hash", local(8080), "")?);
    mesh.start()?;

    let report = mesh.shop.ask_peer(
        &format!("upload {} {bytes}", vip(1, 80)),
        Duration::from_mins(5),
    )?;
    let same =
        report.get("sent").context("no hash")? == report.get("answer").context("no answer")?;
    Ok(Finding::new(
        same,
        format!("{} MiB, SHA-256 {}", bytes >> 20, equal(same)),
    ))
}

pub(super) fn a_reset_stays_a_reset(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("reset")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::peer(&place, "reset", local(8080), "")?);
    mesh.start()?;

    let report = mesh.shop.ask_peer(&format!("read {}", vip(1, 80)), SOON)?;
    let end = report
        .get("end")
        .and_then(|end| end.as_str())
        .unwrap_or("?");
    Ok(Finding::new(
        end == "ECONNRESET",
        format!("the client reads {end}"),
    ))
}

fn equal(same: bool) -> &'static str {
    if same { "equal" } else { "different" }
}
