//! Consul, its built-in proxy and Envoy among themselves, without Sidestep: that claims about Sidestep rest on a
//! bench that works.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use std::{
    io::Read as _,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bpf_tests::{
    consul::{Api, BuiltInProxy, Consul, sidecar_for},
    envoy::{Denied, Envoy, Identity, Upstream},
    lab::Lab,
    mesh::local,
    services::{self, Service},
    tls_client::TlsClient,
    wait::{SOON, wait_for_value},
    workload::{Kind, Workload},
};
use serde_json::{Value, json};

/// Where the sidecar of `web` is, on node a, and where it leads to `db`.
const WEB: u16 = 21_001;
const TO_DB: u16 = 9_191;
/// Where the sidecar of `db` is, on node b, and where `db` is itself.
const DB: u16 = 21_002;
const APPLICATION: u16 = 9_000;

/// How long Consul's agents may take to renew a leaf after the root has changed.
const RENEWED: Duration = Duration::from_secs(60);

/// `web` on node a, `db` on node b: registered with sidecars that nobody has started yet.
struct Bench {
    _db: Service,
    consul: Consul,
    client: Workload,
    lab: Lab,
}

impl Bench {
    fn start(purpose: &str) -> Result<Self> {
        let mut lab = Lab::new(purpose)?;
        let client = lab.a.add_workload("web", "web", Kind::Cgroup)?;
        let place = lab.b.add_workload("db", "db", Kind::Cgroup)?;
        let consul = Consul::dev(&lab)?;
        let db = services::peer(&place, "banner", local(APPLICATION), "")?;
        let register = |api: &Api, name: &str, port: u16, connect: Value| {
            let id = format!("{name}-1");
            api.register(&json!({ "ID": id, "Name": name, "Port": port, "Connect": connect }))
        };
        let upstreams = [("db", TO_DB)];
        let web = sidecar_for(&lab.a, WEB, &upstreams);
        register(consul.a().api(), "web", 8_000, web)?;
        register(
            consul.b().api(),
            "db",
            APPLICATION,
            sidecar_for(&lab.b, DB, &[]),
        )?;
        Ok(Self {
            _db: db,
            consul,
            client,
            lab,
        })
    }

    fn sidecar_of_db(&self) -> SocketAddr {
        (self.lab.b.address(), DB).into()
    }

    fn built_in_db(&self) -> Result<BuiltInProxy> {
        let proxy = BuiltInProxy::start(
            &self.lab.b,
            self.consul.b().api(),
            "db-1",
            &[self.sidecar_of_db()],
        )?;
        self.wait_until_passing("db")?;
        Ok(proxy)
    }

    fn envoy_db(&self, denied: Denied<'_>) -> Result<Envoy> {
        let identity = Identity::of(self.consul.b().api(), "db")?;
        let listen = self.sidecar_of_db();
        let envoy = Envoy::inbound(
            &self.lab.b,
            "db",
            &identity,
            listen,
            local(APPLICATION),
            denied,
        )?;
        self.wait_until_passing("db")?;
        Ok(envoy)
    }

    fn built_in_web(&self) -> Result<BuiltInProxy> {
        let node = &self.lab.a;
        BuiltInProxy::start(node, self.consul.a().api(), "web-1", &[local(TO_DB)])
    }

    fn envoy_web(&self) -> Result<Envoy> {
        let api = self.consul.a().api();
        let upstream = Upstream {
            service: "db",
            trust_domain: &api.trust_domain()?,
            endpoints: &[self.sidecar_of_db()],
        };
        let identity = Identity::of(api, "web")?;
        Envoy::outbound(&self.lab.a, "web", &identity, local(TO_DB), &upstream)
    }

    fn wait_until_passing(&self, service: &str) -> Result<()> {
        wait_for_value(&format!("a healthy {service}"), SOON, || {
            let healthy = self
                .consul
                .a()
                .api()
                .get(&format!("health/connect/{service}?passing"))?;
            Ok(healthy
                .as_array()
                .is_some_and(|healthy| !healthy.is_empty())
                .then_some(()))
        })
    }

    /// How many bytes the client gets from `db` through its sidecar.
    fn bytes_from_db(&self) -> Result<u64> {
        let report = self
            .client
            .ask_peer(&format!("read {}", local(TO_DB)), SOON)?;
        let bytes = report.get("bytes").and_then(Value::as_u64);
        bytes.with_context(|| format!("no bytes in {report}"))
    }
}

#[test]
fn built_in_proxies_reach_each_other_and_obey_intentions() -> Result<()> {
    let bench = Bench::start("bench1")?;
    let _db = bench.built_in_db()?;
    let web = bench.built_in_web()?;
    assert!(bench.bytes_from_db()? > 0, "{}", web.said());
    let api = bench.consul.a().api();
    api.intend("web", "db", "deny")?;
    wait_for_value("the denial", SOON, || {
        Ok((bench.bytes_from_db()? == 0).then_some(()))
    })?;
    api.intend("web", "db", "allow")?;
    wait_for_value("the permission", SOON, || {
        Ok((bench.bytes_from_db()? > 0).then_some(()))
    })
}

#[test]
fn a_built_in_proxy_reaches_envoy() -> Result<()> {
    let bench = Bench::start("bench2")?;
    let db = bench.envoy_db(Denied(&[]))?;
    let web = bench.built_in_web()?;
    assert!(bench.bytes_from_db()? > 0, "{}{}", web.said(), db.said());
    Ok(())
}

#[test]
fn envoy_reaches_a_built_in_proxy() -> Result<()> {
    let bench = Bench::start("bench3")?;
    let db = bench.built_in_db()?;
    let web = bench.envoy_web()?;
    assert!(bench.bytes_from_db()? > 0, "{}{}", web.said(), db.said());
    Ok(())
}

/// What Consul with Envoy does, and Sidestep must not: Envoy decides with the first byte of the client.
#[test]
fn envoy_lets_a_denied_client_read_what_the_server_says_first() -> Result<()> {
    let bench = Bench::start("bench4")?;
    let db = bench.envoy_db(Denied(&["web"]))?;
    let _web = bench.envoy_web()?;
    let read = bench.client.namespace().run(|| {
        let mut client = TcpStream::connect(local(TO_DB))?;
        client.set_read_timeout(Some(SOON))?;
        Ok(client.read(&mut [0; 64])?)
    });
    assert!(read? > 0, "{}", db.said());
    Ok(())
}

#[test]
fn a_cluster_elects_another_leader_and_asks_for_tokens() -> Result<()> {
    let lab = Lab::new("bench5")?;
    let mut consul = Consul::cluster(&lab)?;
    let api = consul.b().api().clone();
    let none = api.clone().with_token("");
    assert_eq!(none.get("catalog/services")?, json!({}));
    let token = api.token("db", "node_prefix \"\" { policy = \"read\" }", &["db"])?;
    let own = api.clone().with_token(&token);
    wait_for_value("a token that counts", SOON, || {
        Ok(own.leaf("db").is_ok().then_some(()))
    })?;
    assert_eq!(
        own.ask("GET", "agent/connect/ca/leaf/web", None)?.status,
        403
    );

    let before = consul.leader()?;
    consul.servers()[before].kill();
    let after = consul.leader()?;
    assert_ne!(before, after);
    consul.servers()[before].start()?;
    consul.wait_until_ready()
}

#[test]
fn a_rotated_root_is_cross_signed() -> Result<()> {
    let lab = Lab::new("bench6")?;
    let consul = Consul::dev(&lab)?;
    let api = consul.a().api();
    let before = api.leaf("web")?;
    let old_roots = api.roots()?;
    api.rotate_root()?;
    let after = wait_for_value("a leaf under the new root", RENEWED, || {
        let leaf = api.leaf_after("web", before.index)?;
        Ok((leaf.chain != before.chain).then_some(leaf))
    })?;
    let certificates = |pem: &str| pem.matches("BEGIN CERTIFICATE").count();
    assert_eq!(certificates(&old_roots), 1);
    assert_eq!(certificates(&api.roots()?), 2);
    assert_eq!(certificates(&after.chain), 2, "{}", after.chain);
    Ok(())
}

#[test]
fn a_tls_client_is_who_its_leaf_says() -> Result<()> {
    let bench = Bench::start("bench7")?;
    let _db = bench.built_in_db()?;
    let api = bench.consul.a().api();
    let client = TlsClient::new(&bench.lab.a, "web", &Identity::of(api, "web")?)?;
    let db = format!("spiffe://{}/ns/default/dc/dc1/svc/db", api.trust_domain()?);
    for client in [client.clone(), client.clone().tls12().alpn("h2")] {
        let seen = client.read(bench.sidecar_of_db())?;
        assert_eq!(seen.uri.as_deref(), Some(db.as_str()), "{seen:?}");
        assert!(seen.said.starts_with("220 "), "{seen:?}");
    }
    api.intend("web", "db", "deny")?;
    wait_for_value("the denial", SOON, || {
        let seen = client.read(bench.sidecar_of_db())?;
        Ok((seen.said.is_empty() && seen.end != "TimeoutError").then_some(()))
    })
}
