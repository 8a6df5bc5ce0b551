//! Answering names at the configured addresses.

use std::sync::Arc;

use super::{Node, NodeError, consul::ConsulParts, start::Common};
use crate::{
    catalog::consul::ConsulHandle,
    config::{Config, DnsConfig},
    datapath::Backend,
    dns::{
        Resolver,
        captured::CapturedQueries,
        forward::{Forwarder, ResolvConf, Upstreams},
        limit::RateLimit,
        lookup::Lookup,
        query_log::QueryLog,
        server::{DnsListener, Gate},
        zone::ZoneSettings,
    },
    identity::workload::WorkloadResolver,
    telemetry::Telemetry,
};

/// What serves captured queries, with `capture.dns`. `consul` knows services that the catalog has not.
pub(super) fn captured(
    config: &Config,
    common: &Common,
    datapath: &Arc<Backend>,
    workloads: &Arc<WorkloadResolver>,
    consul: Option<&ConsulHandle>,
) -> Option<Arc<CapturedQueries>> {
    if !config.capture.dns {
        return None;
    }
    // What was captured goes to its server, and to nobody else.
    let forwarder = Forwarder::new(Upstreams::Configured(vec![]));
    let resolver = Resolver::new(
        zone_settings(config, common.local.datacenter(), consul.is_some()),
        Arc::clone(&common.in_kernel.borrow()),
        forwarder,
        Arc::clone(common.telemetry.metrics()),
    );
    let log = query_log(config, &common.telemetry).with_workloads(Arc::clone(workloads));
    let resolver = Arc::new(looking_up(resolver.with_log(log), consul));
    resolver.follow(common.in_kernel.clone(), &common.shutdown);
    let queries = Arc::new(CapturedQueries::new(
        resolver,
        config.dns.queries_per_second,
        Arc::clone(datapath),
        common.telemetry.clone(),
        common.shutdown.clone(),
        Arc::clone(&common.replaced),
    ));
    queries.sweep(config.capture.port);
    Some(queries)
}

/// Looks services up in Consul that the catalog has not, if there is one.
fn looking_up(resolver: Resolver, consul: Option<&ConsulHandle>) -> Resolver {
    match consul {
        Some(source) => resolver.with_source(source.clone()),
        None => resolver,
    }
}

fn query_log(config: &Config, telemetry: &Telemetry) -> QueryLog {
    QueryLog::new(config.dns.query_log, Arc::clone(telemetry.query_log()))
}

fn zone_settings(config: &Config, datacenter: &str, shared: bool) -> ZoneSettings {
    let dns = &config.dns;
    ZoneSettings {
        domain: dns.domain.clone(),
        ttl: dns.ttl,
        service_answers: dns.service_answers,
        datacenter: datacenter.to_owned(),
        ranges: (config.capture.ipv4_range, config.capture.ipv6_range),
        name_servers: dns.listen.iter().map(std::net::SocketAddr::ip).collect(),
        shared,
    }
}

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
    let settings = zone_settings(&config, node.local.datacenter(), node.consul.is_some());
    // With Consul, its own DNS says what does not lead to virtual addresses.
    let consuls = node.consul.as_ref().map(ConsulParts::dns_servers);
    let mut forwarder = Forwarder::new(upstreams(dns))
        .with_domain(dns.domain.clone(), consuls.unwrap_or_default().to_vec());
    if let Some(captured) = &node.outbound.queries {
        forwarder = forwarder.sharing(captured.in_flight());
    }
    let metrics = Arc::clone(node.telemetry.metrics());
    let resolver = Resolver::new(
        settings,
        Arc::clone(&node.in_kernel.borrow()),
        forwarder,
        metrics,
    );
    let source = node.consul.as_ref().map(|consul| &consul.source);
    let resolver = resolver.with_log(query_log(&config, &node.telemetry));
    let resolver = Arc::new(looking_up(resolver, source));
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

/// Looks names up for the agent itself, at the same upstreams, whether or not it answers names.
pub(super) fn lookup(dns: &DnsConfig) -> Lookup {
    Lookup::new(Forwarder::new(upstreams(dns)))
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
