//! Real clients, real servers, and nothing configured but where Consul is.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{
    claims::{Finding, Size},
    consul::{ConsulMesh, SOON},
    mesh::local,
    services,
    workload::Workload,
};

pub(super) fn services_in_consul_are_called(size: Size) -> Result<Finding> {
    let rows = size.pick(1_000_usize, 100_000);
    let mut mesh = ConsulMesh::dev("c-calls")?;
    let place = mesh.place("web")?;
    mesh.keep(services::nginx(&place, local(8080), "page of web")?);
    mesh.register("web", "web", 8080, Value::Null)?;
    let place = mesh.place("cache")?;
    mesh.keep(services::redis(&place, local(6379))?);
    mesh.register("cache", "cache", 6379, Value::Null)?;
    let place = mesh.place("db")?;
    mesh.keep(services::postgres(&place, local(5432))?);
    mesh.register("db", "db", 5432, Value::Null)?;
    mesh.start()?;

    let url = format!("http://{}:8080/", mesh.callable("web")?);
    let page = mesh.shop.curl(&url).run(SOON)?;
    let web = page.trim() == "page of web";
    let redis_cli = |command: &str, address: IpAddr| {
        let redis_cli = mesh.shop.program("redis-cli");
        let redis_cli = redis_cli.args(["-h", &address.to_string()]);
        redis_cli.args(command.split(' ')).run(SOON)
    };
    let cache = mesh.callable("cache")?;
    redis_cli("set greeting hello", cache)?;
    let hello = redis_cli("get greeting", cache)?;
    let cached = hello.trim() == "hello";
    let got = rows_of(&mesh.shop, mesh.callable("db")?, rows)?;
    let configuration = mesh.lab.b.configuration();
    ensure!(
        !configuration.contains("web")
            && !configuration.contains(&mesh.lab.b.address().to_string()),
        "something is configured: {configuration}"
    );
    Ok(Finding::new(
        web && cached && got == rows,
        format!(
            "curl got {:?}, redis-cli {:?}, psql {got} of {rows} rows",
            page.trim(),
            hello.trim()
        ),
    ))
}

/// Asks the database at `address` for so many rows. Returns how many came.
fn rows_of(client: &Workload, address: IpAddr, rows: usize) -> Result<usize> {
    let psql = client
        .program("psql")
        .env("PGPASSWORD", services::POSTGRES_PASSWORD)
        .env("PGCONNECT_TIMEOUT", "15")
        .args(["--no-psqlrc", "--tuples-only", "--no-align"])
        .args(["--host", &address.to_string()])
        .args(["--username", services::POSTGRES_USER])
        .args(["--dbname", "postgres", "--command"])
        .arg(format!("select i from generate_series(1, {rows}) i"));
    Ok(psql.run(SOON)?.lines().count())
}

pub(super) fn the_least_policy_is_enough(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::cluster("c-policy")?;
    let place = mesh.place("web")?;
    mesh.keep(services::nginx(&place, local(8080), "page of web")?);
    mesh.register("web", "web", 8080, Value::Null)?;
    mesh.start()?;
    let url = format!("http://{}:8080/", mesh.callable("web")?);
    let page = mesh.shop.curl(&url).run(SOON)?;
    let status = mesh.lab.b.status()?;
    let problems = status
        .pointer("/catalog/problems")
        .and_then(Value::as_array);
    let problems = problems.map_or(0, Vec::len);
    Ok(Finding::new(
        page.trim() == "page of web" && problems == 0,
        format!("curl got {:?}; {problems} problems", page.trim()),
    ))
}
