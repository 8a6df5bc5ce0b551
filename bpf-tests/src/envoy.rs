//! Envoy as a sidecar, with the configuration that Consul would give it: static, as this Consul speaks only a version
//! of xDS that this Envoy has no longer. Its certificates are the leaf that Consul's agent has for the service.

#![expect(
    clippy::indexing_slicing,
    reason = "a JSON object that was made here takes every key"
)]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{
    consul::{Api, Leaf},
    daemon::Daemon,
    node::Node,
};

/// An Envoy that runs; ends when dropped.
#[derive(Debug)]
pub struct Envoy(Daemon);

/// What an Envoy is and whom it trusts.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its certificate.
    pub leaf: Leaf,
    /// The roots, as PEM.
    pub roots: String,
}

/// Who is refused by an inbound listener, as Consul writes it if everything else is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Denied<'a>(pub &'a [&'a str]);

/// What an outbound listener leads to.
#[derive(Debug, Clone)]
pub struct Upstream<'a> {
    /// The service.
    pub service: &'a str,
    /// Its trust domain.
    pub trust_domain: &'a str,
    /// Where its instances take tunnels.
    pub endpoints: &'a [SocketAddr],
}

impl Identity {
    /// That of `service` at this moment.
    ///
    /// # Errors
    /// If Consul's agent gives no certificate.
    pub fn of(api: &Api, service: &str) -> Result<Self> {
        Ok(Self {
            leaf: api.leaf(service)?,
            roots: api.roots()?,
        })
    }
}

impl Envoy {
    /// An Envoy called `name` on `node` that takes mutual TLS at `listen` and passes it on to `application`.
    ///
    /// # Errors
    /// If it does not start; with what it said.
    pub fn inbound(
        node: &Node,
        name: &str,
        identity: &Identity,
        listen: SocketAddr,
        application: SocketAddr,
        denied: Denied<'_>,
    ) -> Result<Self> {
        let directory = directory(node, name)?;
        let mut context = common_tls_context(&directory, identity)?;
        context["validation_context"] = trusted(&directory);
        let mut filters = vec![];
        if !denied.0.is_empty() {
            filters.push(access_control(denied));
        }
        filters.push(tcp_proxy("public_listener", "local_app"));
        let listener = json!({
            "name": "public_listener",
            "address": socket_address(listen),
            "filter_chains": [{
                "transport_socket": tls("DownstreamTlsContext", json!({
                    "common_tls_context": context,
                    "require_client_certificate": true,
                })),
                "filters": filters,
            }],
        });
        let cluster = cluster("local_app", &[application]);
        start(node, name, &directory, &listener, &cluster, listen)
    }

    /// An Envoy called `name` on `node` that takes plain connections at `listen` and passes them on in mutual TLS to
    /// `upstream`: TLS 1.2, with a server name, without ALPN.
    ///
    /// # Errors
    /// If it does not start; with what it said.
    pub fn outbound(
        node: &Node,
        name: &str,
        identity: &Identity,
        listen: SocketAddr,
        upstream: &Upstream<'_>,
    ) -> Result<Self> {
        let directory = directory(node, name)?;
        let Upstream {
            service,
            trust_domain,
            ..
        } = upstream;
        let mut validation = trusted(&directory);
        validation["match_typed_subject_alt_names"] = json!([{
            "san_type": "URI",
            "matcher": { "exact": format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/{service}") },
        }]);
        let mut context = common_tls_context(&directory, identity)?;
        context["validation_context"] = validation;
        let listener = json!({
            "name": service,
            "address": socket_address(listen),
            "filter_chains": [{ "filters": [tcp_proxy(service, service)] }],
        });
        let mut cluster = cluster(service, upstream.endpoints);
        cluster["transport_socket"] = tls(
            "UpstreamTlsContext",
            json!({
                "common_tls_context": context,
                "sni": format!("{service}.default.dc1.internal.{trust_domain}"),
            }),
        );
        start(node, name, &directory, &listener, &cluster, listen)
    }

    /// What it has said.
    pub fn said(&self) -> String {
        self.0.said()
    }
}

fn start(
    node: &Node,
    name: &str,
    directory: &Path,
    listener: &Value,
    cluster: &Value,
    listen: SocketAddr,
) -> Result<Envoy> {
    let file = directory.join("envoy.json");
    let bootstrap = json!({
        "node": { "id": name, "cluster": name },
        "static_resources": { "listeners": [listener], "clusters": [cluster] },
    });
    fs::write(&file, bootstrap.to_string())
        .with_context(|| format!("writing {}", file.display()))?;
    let program = node
        .tool("envoy")?
        .arg("--config-path")
        .arg(&file)
        .args(["--concurrency", "1", "--disable-hot-restart"])
        .args([
            "--log-level",
            "info",
            "--component-log-level",
            "rbac:debug,connection:debug",
        ]);
    let log = directory.join("envoy.log");
    let what = format!("Envoy {name}");
    Daemon::start(&what, &program, &log, node.namespace(), &[listen]).map(Envoy)
}

fn directory(node: &Node, name: &str) -> Result<PathBuf> {
    let directory = node.directory().join(format!("envoy-{name}"));
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    Ok(directory)
}

/// Certificate and key, from files that this writes. No ALPN: it is raw TCP.
fn common_tls_context(directory: &Path, identity: &Identity) -> Result<Value> {
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let file = directory.join(name);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    };
    let chain = write("leaf.pem", &identity.leaf.chain)?;
    let key = write("leaf-key.pem", &identity.leaf.key)?;
    write("roots.pem", &identity.roots)?;
    Ok(json!({
        "tls_params": {},
        "tls_certificates": [{
            "certificate_chain": { "filename": chain },
            "private_key": { "filename": key },
        }],
    }))
}

fn trusted(directory: &Path) -> Value {
    json!({ "trusted_ca": { "filename": directory.join("roots.pem") } })
}

fn tls(context: &str, mut configuration: Value) -> Value {
    configuration["@type"] =
        format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context}").into();
    json!({ "name": "tls", "typed_config": configuration })
}

/// The filter in front of a raw TCP service. Consul does not say when it decides: Envoy does with the first byte.
fn access_control(denied: Denied<'_>) -> Value {
    let principals: Vec<Value> = denied
        .0
        .iter()
        .map(|service| {
            let pattern = format!("^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{service}$");
            json!({ "authenticated": { "principal_name": {
                "safe_regex": { "regex": pattern },
            } } })
        })
        .collect();
    json!({
        "name": "envoy.filters.network.rbac",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
            "stat_prefix": "connect_authz",
            "rules": {
                "action": "DENY",
                "policies": { "consul-intentions-layer4": {
                    "permissions": [{ "any": true }],
                    "principals": principals,
                } },
            },
        },
    })
}

fn tcp_proxy(name: &str, cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": cluster,
        },
    })
}

fn cluster(name: &str, endpoints: &[SocketAddr]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| json!({ "endpoint": { "address": socket_address(*endpoint) } }))
        .collect();
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": endpoints }],
        },
    })
}

fn socket_address(address: SocketAddr) -> Value {
    json!({ "socket_address": {
        "address": address.ip(),
        "port_value": address.port(),
    } })
}
