//! Answering names at the configured addresses.

use std::sync::Arc;

use super::{Node, NodeError, consul::ConsulParts};
use crate::{
    config::DnsConfig,
    dns::{
        Resolver,
        forward::{Forwarder, ResolvConf, Upstreams},
        limit::RateLimit,
        server::{DnsListener, Gate},
        zone::ZoneSettings,
    },
};

/// Answers at `dns.listen`, if that is anywhere.
///
/// # Errors
/// If it cannot be listened on.
pub(super) fn serve(node: &Arc<Node>) -> Result<(), NodeError> {
    let config = node.config.load();
    let dns = &config.dns;
    if dns.listen.is_empty() {
        return Ok(());
    }
    let settings = ZoneSettings {
        domain: dns.domain.clone(),
        ttl: dns.ttl,
        service_answers: dns.service_answers,
        datacenter: node.local.datacenter().to_owned(),
        ranges: (config.capture.ipv4_range, config.capture.ipv6_range),
        name_servers: dns.listen.iter().map(std::net::SocketAddr::ip).collect(),
        shared: node.consul.is_some(),
    };
    // With Consul, its own DNS says what does not lead to virtual addresses.
    let consuls = node.consul.as_ref().map(ConsulParts::dns_servers);
    let forwarder = Forwarder::new(upstreams(dns))
        .with_domain(dns.domain.clone(), consuls.unwrap_or_default().to_vec());
    let metrics = Arc::clone(node.telemetry.metrics());
    let resolver = Resolver::new(
        settings,
        Arc::clone(&node.in_kernel.borrow()),
        forwarder,
        metrics,
    );
    let resolver = Arc::new(match &node.consul {
        Some(consul) => resolver.with_source(consul.source.clone()),
        None => resolver,
    });
    resolver.follow(node.in_kernel.subscribe(), &node.shutdown);
    let gate = Arc::new(Gate {
        allowed: dns.allow.clone(),
        limit: RateLimit::new(dns.queries_per_second),
    });
    for address in &dns.listen {
        let listener = DnsListener::bind(
            *address,
            Arc::clone(&resolver),
            Arc::clone(&gate),
            node.telemetry.clone(),
            node.shutdown.clone(),
            &node.sockets,
        );
        listener.map_err(NodeError::when("answer names"))?.start();
        tracing::info!(%address, domain = %dns.domain, "answering names");
    }
    Ok(())
}

fn upstreams(dns: &DnsConfig) -> Upstreams {
    match &dns.upstreams {
        Some(servers) => Upstreams::Configured(servers.clone()),
        None => Upstreams::ResolvConf(ResolvConf::new(
            "/etc/resolv.conf".into(),
            dns.listen.clone(),
        )),
    }
}
