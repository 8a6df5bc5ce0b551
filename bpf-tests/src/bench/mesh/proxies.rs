//! The proxies that are compared with: redirected to by iptables on the calling node, with mutual TLS to the called one.
//!
//! They are configured as Consul's transparent proxy configures Envoy, and else as they come: as many threads as the machine
//! has processors, TLS 1.2, sessions resumed. HAProxy could have TLS 1.3; it then opens less than half as many connections.

#![expect(
    clippy::indexing_slicing,
    reason = "a JSON object that was made here takes every key"
)]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::path::{HTTP, SERVE};
use crate::{
    bench::capture::rules,
    cgroup::Cgroup,
    daemon::Daemon,
    lab::{Lab, TRUST_DOMAIN},
    mesh::{local, vip},
    node::Node,
    program::Program,
    wait::SOON,
};

/// Where connections are redirected to, on the calling node.
const OUTBOUND: u16 = 15001;

/// What is called: its name, its virtual address, where the proxy takes TLS for it, and where it listens.
fn services(lab: &Lab) -> [(&'static str, SocketAddr, SocketAddr, SocketAddr); 2] {
    let b = lab.b.address();
    [
        ("http", vip(1, 80), (b, 20001).into(), local(HTTP)),
        ("serve", vip(2, 80), (b, 20002).into(), local(SERVE)),
    ]
}

/// Where they run on a node.
pub(super) fn cgroup(node: &Node) -> Result<Cgroup> {
    node.cgroup().child("proxy")
}

/// Envoy on both nodes.
pub(super) fn envoys(lab: &Lab) -> Result<Vec<Daemon>> {
    let services = services(lab);
    let mut inbound = (vec![], vec![]);
    let mut outbound = (vec![], vec![]);
    let called = Certificate::make(&lab.b, "called")?;
    let calling = Certificate::make(&lab.a, "calling")?;
    for (name, address, tunnel, application) in services {
        let mut context = json!({ "require_client_certificate": true });
        context["common_tls_context"] = called.for_envoy(&[]);
        let mut chain = json!({ "filters": [tcp_proxy(name)] });
        chain["transport_socket"] = tls("DownstreamTlsContext", context);
        inbound.0.push(listener(name, tunnel, &[chain]));
        inbound.1.push(cluster(name, application));
        outbound.0.push(json!({
            "filter_chain_match": {
                "prefix_ranges": [{ "address_prefix": address.ip(), "prefix_len": 32 }],
                "destination_port": address.port(),
            },
            "filters": [tcp_proxy(name)],
        }));
        let mut to = cluster(name, tunnel);
        let context = json!({ "common_tls_context": calling.for_envoy(&[identity("called")]) });
        to["transport_socket"] = tls("UpstreamTlsContext", context);
        outbound.1.push(to);
    }
    let mut redirected = listener("outbound", local(OUTBOUND), &outbound.0);
    redirected["listener_filters"] = json!([{
        "name": "envoy.filters.listener.original_dst",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
        },
    }]);
    redirect(lab)?;
    let tunnels = services.map(|(_, _, tunnel, _)| tunnel);
    Ok(vec![
        envoy(&lab.b, &inbound.0, &inbound.1, &tunnels)?,
        envoy(&lab.a, &[redirected], &outbound.1, &[local(OUTBOUND)])?,
    ])
}

fn envoy(
    node: &Node,
    listeners: &[Value],
    clusters: &[Value],
    listens: &[SocketAddr],
) -> Result<Daemon> {
    let directory = directory(node)?;
    let file = directory.join("envoy.json");
    let bootstrap = json!({
        "node": { "id": node.name(), "cluster": node.name() },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    });
    fs::write(&file, bootstrap.to_string())
        .with_context(|| format!("writing {}", file.display()))?;
    let threads = threads().to_string();
    let program = proxy(node, "envoy")?
        .arg("--config-path")
        .arg(&file)
        .args(["--concurrency", &threads, "--disable-hot-restart"])
        .args(["--log-level", "warning"]);
    let log = directory.join("envoy.log");
    Daemon::start("Envoy", &program, &log, node.namespace(), listens)
}

fn listener(name: &str, listen: SocketAddr, chains: &[Value]) -> Value {
    json!({ "name": name, "address": socket_address(listen), "filter_chains": chains })
}

fn cluster(name: &str, endpoint: SocketAddr) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        // Envoy's own limit of 1,024 connections is not what is measured.
        "circuit_breakers": { "thresholds": [{
            "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
        }] },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket_address(endpoint) } }] }],
        },
    })
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
        },
    })
}

fn tls(context: &str, mut configuration: Value) -> Value {
    configuration["@type"] =
        format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context}").into();
    json!({ "name": "tls", "typed_config": configuration })
}

fn socket_address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } })
}

/// HAProxy on both nodes.
pub(super) fn haproxies(lab: &Lab) -> Result<Vec<Daemon>> {
    let services = services(lab);
    let called = Certificate::make(&lab.b, "called")?;
    let calling = Certificate::make(&lab.a, "calling")?;
    let (mut inbound, mut outbound) = (haproxy_head(), haproxy_head());
    outbound += &format!("frontend outbound\n  bind {}\n", local(OUTBOUND));
    for (name, address, ..) in services {
        outbound += &format!("  use_backend {name} if {{ dst {} }}\n", address.ip());
    }
    for (name, _, tunnel, application) in services {
        let (pem, roots) = (called.joined.display(), called.roots.display());
        inbound += &format!(
            "listen {name}\n  bind {tunnel} ssl crt {pem} ca-file {roots} verify required\n  server it {application}\n"
        );
        let (pem, roots) = (calling.joined.display(), calling.roots.display());
        outbound += &format!(
            "backend {name}\n  server it {tunnel} ssl ssl-max-ver TLSv1.2 crt {pem} ca-file {roots} verify required\n"
        );
    }
    redirect(lab)?;
    let tunnels = services.map(|(_, _, tunnel, _)| tunnel);
    Ok(vec![
        haproxy(&lab.b, &inbound, &tunnels)?,
        haproxy(&lab.a, &outbound, &[local(OUTBOUND)])?,
    ])
}

fn haproxy_head() -> String {
    format!(
        "\
global
  maxconn 4000
  nbthread {}
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
",
        threads()
    )
}

fn haproxy(node: &Node, configuration: &str, listens: &[SocketAddr]) -> Result<Daemon> {
    let directory = directory(node)?;
    let file = directory.join("haproxy.cfg");
    fs::write(&file, configuration).with_context(|| format!("writing {}", file.display()))?;
    let program = proxy(node, "haproxy")?.args(["-db", "-f"]).arg(&file);
    let log = directory.join("haproxy.log");
    Daemon::start("HAProxy", &program, &log, node.namespace(), listens)
}

/// Sends what is aimed at virtual addresses to the proxy of the calling node. The called node has the rule by which
/// transparent proxies keep others from going around them; nothing here meets it, but for its being there.
fn redirect(lab: &Lab) -> Result<()> {
    lab.a
        .namespace()
        .ip("route add 240.0.0.0/4 dev lo src 127.0.0.1")?;
    let out = format!("-t nat -A OUTPUT -p tcp -d 240.0.0.0/4 -j REDIRECT --to-ports {OUTBOUND}");
    let back =
        format!("-t nat -A PREROUTING -p tcp --dport {HTTP}:{SERVE} -j REDIRECT --to-ports 20001");
    for (node, rule) in [(&lab.a, out), (&lab.b, back)] {
        let iptables = Program::new("iptables-nft").args(rule.split(' '));
        iptables.in_namespace(node.namespace()).run(SOON)?;
        rules::forget_fast(node.namespace())?;
    }
    Ok(())
}

fn proxy(node: &Node, name: &str) -> Result<Program> {
    Ok(Program::new(name)
        .in_cgroup(&cgroup(node)?)
        .in_namespace(node.namespace()))
}

fn directory(node: &Node) -> Result<PathBuf> {
    let directory = node.directory().join("proxy");
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    Ok(directory)
}

fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn identity(name: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{name}")
}

/// A certificate of P-256 as Consul's authority gives them, of the lab's authority.
struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    roots: PathBuf,
    /// Certificate and key in one file.
    joined: PathBuf,
}

impl Certificate {
    fn make(node: &Node, name: &str) -> Result<Self> {
        let directory = directory(node)?;
        let file = |end: &str| directory.join(format!("{name}{end}"));
        let authority = node.authority();
        let roots = authority.roots.first().context("no root")?.clone();
        let (chain, key, joined) = (file(".pem"), file("-key.pem"), file("-joined.pem"));
        Program::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
            .args(["-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-subj", &format!("/CN={name}")])
            .args(["-addext", &format!("subjectAltName=URI:{}", identity(name))])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-CA")
            .arg(&authority.certificate)
            .arg("-CAkey")
            .arg(&authority.key)
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&chain)
            .run(SOON)
            .context("making a certificate")?;
        let read = |path: &Path| {
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        };
        fs::write(&joined, read(&chain)? + &read(&key)?)
            .with_context(|| format!("writing {}", joined.display()))?;
        Ok(Self {
            chain,
            key,
            roots,
            joined,
        })
    }

    /// As an Envoy shows it, which wants peers of these identities, or any of this authority.
    fn for_envoy(&self, identities: &[String]) -> Value {
        let mut validation = json!({ "trusted_ca": { "filename": self.roots } });
        if !identities.is_empty() {
            let exact = |it: &String| json!({ "san_type": "URI", "matcher": { "exact": it } });
            validation["match_typed_subject_alt_names"] = identities.iter().map(exact).collect();
        }
        json!({
            "tls_params": {},
            "tls_certificates": [{
                "certificate_chain": { "filename": self.chain },
                "private_key": { "filename": self.key },
            }],
            "validation_context": validation,
        })
    }
}
