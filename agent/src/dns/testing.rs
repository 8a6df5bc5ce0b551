//! A small catalog with names, for tests and fuzz targets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use hickory_proto::rr::Name;

use super::{
    Resolver,
    forward::{Forwarder, Upstreams},
    zone::{ServiceAnswers, ZoneSettings},
};
use crate::{
    catalog::{
        model::{Health, Instance, Ports, Service, ServiceDefaults, Snapshot, Weights},
        store::{Catalog, CatalogStore},
        vip::{VipAllocator, VipPools},
    },
    telemetry::{metrics::Metrics, series::SeriesLimits},
};

/// A value that is right in the source.
#[expect(clippy::expect_used, reason = "of constants of this file")]
fn right<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a constant of the test catalog")
}

pub(crate) fn instance(
    id: &str,
    node: &str,
    tunnel: &str,
    port: u16,
    tag: &str,
    health: Health,
) -> Arc<Instance> {
    Arc::new(Instance {
        id: right(id),
        node: right(node),
        tunnel: right(tunnel),
        local: ([127, 0, 0, 1], port).into(),
        port,
        tags: vec![tag.to_owned()],
        meta: BTreeMap::new(),
        health,
        weights: Weights {
            passing: 1,
            warning: 3,
        },
        target: None,
    })
}

fn service(name: &str, addresses: &[&str], instances: Vec<Arc<Instance>>) -> Arc<Service> {
    Arc::new(Service {
        name: right(name),
        instances,
        explicit_addresses: addresses.iter().map(|a| right::<IpAddr>(a)).collect(),
        ports: Ports::Listed(BTreeSet::from([80, 443])),
        defaults: ServiceDefaults::default(),
    })
}

/// `web` on nodes a and b, of which only the address of a is known, `db` with an IPv6 address on b, `idle` without instances, `broken` with a failing one.
pub(crate) fn catalog(is_whole: bool) -> Arc<Catalog> {
    let web = vec![
        instance("web-1", "a", "192.0.2.1:21000", 8080, "V1", Health::Passing),
        instance("web-2", "b", "192.0.2.2:21001", 8081, "v2", Health::Warning),
        instance(
            "web-3",
            "b",
            "192.0.2.3:21002",
            8082,
            "v3",
            Health::Critical,
        ),
    ];
    let db = vec![instance(
        "db-1",
        "b",
        "[2001:db8::3]:21000",
        5432,
        "",
        Health::Passing,
    )];
    let broken = vec![instance(
        "b-1",
        "b",
        "192.0.2.3:21003",
        1,
        "",
        Health::Critical,
    )];
    let services = [
        service("web", &["240.0.0.10", "fd00::10"], web),
        service("db", &["240.0.0.11"], db),
        service("idle", &["240.0.0.12"], vec![]),
        service("broken", &["240.0.0.13"], broken),
    ];
    let pools = VipPools {
        ipv4: right("240.0.0.0/4"),
        ipv6: right("fd00::/64"),
    };
    let store = CatalogStore::new(VipAllocator::new(pools, None, Duration::ZERO).0);
    let problems = store.publish(Snapshot {
        is_whole,
        services: services.into_iter().map(|s| (s.name.clone(), s)).collect(),
        nodes: BTreeMap::from([(right("a"), right("192.0.2.1"))]),
        intentions: vec![],
        default_intention: None,
    });
    assert!(problems.is_empty(), "{problems:?}");
    store.current()
}

pub(crate) fn settings(service_answers: ServiceAnswers) -> ZoneSettings {
    ZoneSettings {
        domain: right::<Name>("consul."),
        ttl: Duration::from_secs(5),
        service_answers,
        datacenter: "dc1".to_owned(),
        ranges: (right("240.0.0.0/4"), right("fd00::/64")),
        name_servers: vec![right("127.0.0.1")],
        shared: false,
    }
}

#[cfg(test)]
pub(crate) fn zone(service_answers: ServiceAnswers, is_whole: bool) -> super::zone::Zone {
    super::zone::Zone::new(Arc::new(settings(service_answers)), catalog(is_whole))
}

/// Answers by that catalog; what is not ours goes to `upstreams`.
pub(crate) fn resolver(service_answers: ServiceAnswers, upstreams: Upstreams) -> Resolver {
    let metrics = Arc::new(Metrics::new(SeriesLimits::default(), "test"));
    Resolver::new(
        settings(service_answers),
        catalog(true),
        Forwarder::new(upstreams),
        metrics,
    )
}

/// Answers by a catalog with one service, `many`, of so many instances.
#[cfg(test)]
pub(crate) fn large_resolver(instances: u8) -> Resolver {
    let instances = (1..=instances).map(|n| {
        let tunnel = format!("192.0.2.{n}:21000");
        instance(
            &format!("many-{n}"),
            &format!("n{n}"),
            &tunnel,
            80,
            "",
            Health::Passing,
        )
    });
    let many = service("many", &["240.0.0.10"], instances.collect());
    let mut catalog = Catalog::default();
    catalog.snapshot.is_whole = true;
    catalog.snapshot.services.insert(many.name.clone(), many);
    let metrics = Arc::new(Metrics::new(SeriesLimits::default(), "test"));
    let nowhere = Forwarder::new(Upstreams::Configured(vec![]));
    Resolver::new(
        settings(ServiceAnswers::Instances),
        Arc::new(catalog),
        nowhere,
        metrics,
    )
}

/// A captured query to `server`, from a namespace that takes `share` of what there is.
#[cfg(test)]
pub(crate) fn captured(
    server: std::net::SocketAddr,
    share: Arc<super::fair::Share>,
) -> super::Original {
    super::Original {
        server,
        namespace: Arc::new(super::CapturedNamespace {
            cookie: crate::datapath::NetnsCookie(7),
            name: "/run/netns/box".to_owned(),
            sockets: None,
            in_flight: share,
        }),
        maker: None,
    }
}

/// Any bytes as a query, and as the answer to one: answers are responses to what was asked, and no larger than the
/// client takes; and a line in the query log is one.
pub(crate) fn bear(bytes: &[u8]) {
    use super::{Query, Step, Transport, message};

    static RESOLVER: std::sync::LazyLock<Resolver> = std::sync::LazyLock::new(|| {
        resolver(ServiceAnswers::Instances, Upstreams::Configured(vec![]))
    });
    for transport in [Transport::Udp, Transport::Tcp] {
        let query = Query {
            message: bytes,
            transport,
            client: ([127, 0, 0, 1], 40_000).into(),
            original: None,
            drawn: None,
        };
        super::query_log::bear(&query);
        let answer = match RESOLVER.decide(&query) {
            Step::Answer(answer) => answer,
            Step::Forward => {
                // What would be said if nobody answered.
                let code = hickory_proto::op::ResponseCode::ServFail;
                let Some(failed) = message::only_code(bytes, code, true) else {
                    continue;
                };
                failed
            }
            Step::Ignore => continue,
        };
        assert!(message::is_response(&answer));
        assert_eq!(message::id(&answer), message::id(bytes));
        let question = message::question(&answer);
        assert!(question.is_none() || question == message::question(bytes));
        if transport == Transport::Udp {
            assert!(answer.len() <= usize::from(message::udp_size(bytes).min(message::UDP_SIZE)));
        }
    }
    if let Some(mut transfer) = message::transfer(bytes, bytes) {
        transfer.is_last(bytes);
    }
    super::lookup::bear(bytes);
    super::forward::name_servers(&String::from_utf8_lossy(bytes), &[]);
}
