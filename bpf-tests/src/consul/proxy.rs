//! Consul's built-in proxy: `consul connect proxy`.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::{Value, json};

use super::Api;
use crate::{daemon::Daemon, node::Node};

/// A built-in proxy that runs for an instance; ends when dropped.
#[derive(Debug)]
pub struct BuiltInProxy(Daemon);

impl BuiltInProxy {
    /// The proxy of the instance `id`, which was registered with a sidecar. Ready when it listens at `addresses`.
    ///
    /// # Errors
    /// If it does not start; with what it said.
    pub fn start(node: &Node, api: &Api, id: &str, addresses: &[SocketAddr]) -> Result<Self> {
        let program = node
            .tool("consul")?
            .args(["connect", "proxy", "-sidecar-for", id])
            .args(["-http-addr", api.base(), "-log-level", "debug"]);
        let log = node.directory().join(format!("proxy-{id}.log"));
        let what = format!("the built-in proxy of {id}");
        Daemon::start(&what, &program, &log, node.namespace(), addresses).map(Self)
    }

    /// What it has said.
    pub fn said(&self) -> String {
        self.0.said()
    }
}

/// The value of `Connect` for a service whose sidecar listens at `port` of `node` and reaches each of `upstreams` at
/// a port of the node's loopback.
pub fn sidecar_for(node: &Node, port: u16, upstreams: &[(&str, u16)]) -> Value {
    let upstreams: Vec<Value> = upstreams
        .iter()
        .map(|(service, port)| json!({ "DestinationName": service, "LocalBindPort": port }))
        .collect();
    let listens = SocketAddr::new(node.address(), port);
    json!({ "SidecarService": {
        // Consul's own default asks every ten seconds.
        "Checks": [{ "TCP": listens, "Interval": "1s" }],
        "Port": port,
        "Address": node.address(),
        "Proxy": { "Upstreams": upstreams, "Config": { "bind_address": node.address() } },
    } })
}
