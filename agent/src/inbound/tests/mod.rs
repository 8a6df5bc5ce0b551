//! A tunnel listener as strangers, health checks and Consul's own proxy meet it.

mod consul;

use std::{collections::BTreeSet, net::Ipv4Addr, path::Path};

use tempfile::tempdir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Handle,
    time::timeout,
};

use super::{listeners::TunnelListeners, *};
use crate::{
    catalog::vip::{VipAllocator, VipPools},
    identity::{
        certificates::Jitter,
        clock::SystemClock,
        provider::CertificateProvider,
        testing::{DAY, builtin_ca},
    },
    policy::Intentions,
    sockets::ListeningSockets,
    telemetry::{
        access_log::{AccessLog, Destination, LineFormat},
        metrics::Metrics,
        series::SeriesLimits,
    },
};

/// All that takes tunnels, with certificates of `ca` and an access log in `log`; allows nothing.
fn inbound(ca: Arc<dyn CertificateProvider>, log: &Path) -> Arc<Inbound> {
    let metrics = Arc::new(Metrics::new(SeriesLimits::default(), "0"));
    let destination = Destination::File(log.to_owned());
    let dropped = metrics.dropped_lines();
    let access_log = AccessLog::start(&destination, LineFormat::Text, dropped).unwrap();
    let pools = VipPools {
        ipv4: "240.0.0.0/8".parse().unwrap(),
        ipv6: "fd00::/64".parse().unwrap(),
    };
    let (allocator, _damaged) = VipAllocator::new(pools, None, Duration::ZERO);
    let shutdown = Shutdown::default();
    let trust_domain = ca.trust().borrow().roots.trust_domain().clone();
    let clock = Arc::new(SystemClock);
    Arc::new(Inbound {
        catalog: Arc::new(CatalogStore::new(allocator)),
        targets: arc_swap::ArcSwap::default(),
        namespaces: arc_swap::ArcSwap::default(),
        policy: Arc::new(PolicyStore::new(Intentions::new(
            &[],
            IntentionAction::Deny,
        ))),
        certificates: Certificates::new(ca, clock, Jitter::seeded(1), shutdown.clone()),
        deliverer: Deliverer::default(),
        connections: Connections::new(100),
        telemetry: Telemetry::new(metrics, Arc::new(access_log)),
        settings: arc_swap::ArcSwap::from_pointee(InboundSettings {
            handshake_timeout: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(20),
            idle_timeout: None,
        }),
        local: LocalDomain::new(trust_domain, "dc1".to_owned()),
        shutdown,
    })
}

fn acceptor(listener: TcpListener) -> Acceptor<TcpListener> {
    listener.set_nonblocking(true).unwrap();
    Acceptor::new(listener, Handle::current()).unwrap()
}

#[tokio::test]
async fn a_health_check_leaves_no_line_and_no_outcome() {
    let place = tempdir().unwrap();
    let log = place.path().join("access.log");
    let ca = Arc::new(builtin_ca(place.path(), DAY, Arc::new(SystemClock)));
    let inbound = inbound(ca, &log);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::clone(&inbound).serve(acceptor(listener), address.port());
    inbound.shutdown.spawn("listener", serve);

    for check in 0..20 {
        let stream = TcpStream::connect(address).await.unwrap();
        if check % 2 == 1 {
            stream.set_zero_linger().unwrap();
        }
        drop(stream);
    }
    // A stranger who says something is told of.
    let mut stranger = TcpStream::connect(address).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _reset_or_end = stranger.read_to_end(&mut answer).await;

    assert_eq!(
        inbound.shutdown.run("test", Duration::from_secs(20)).await,
        0
    );
    assert!(
        inbound
            .telemetry
            .access_log()
            .flush(Duration::from_secs(20))
    );
    let lines = std::fs::read_to_string(&log).unwrap();
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert!(lines.contains("stage=handshake"), "{lines}");
    let page = inbound.telemetry.metrics().render();
    let counted = page
        .lines()
        .filter(|line| line.starts_with("sidestep_connections_total{"));
    let counted: Vec<_> = counted.collect();
    assert!(
        counted.len() == 1 && counted[0].ends_with(" 1"),
        "{counted:?}"
    );
}

#[tokio::test]
async fn who_comes_before_it_is_known_what_is_here_waits() {
    let place = tempdir().unwrap();
    let ca = Arc::new(builtin_ca(place.path(), DAY, Arc::new(SystemClock)));
    let inbound = inbound(ca, &place.path().join("access.log"));
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let address = Ipv4Addr::LOCALHOST.into();
    let sockets = ListeningSockets::default();
    let mut listeners =
        TunnelListeners::open(Arc::clone(&inbound), address, port, sockets).unwrap();

    let mut early = TcpStream::connect((address, port)).await.unwrap();
    early.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let answered = timeout(Duration::from_millis(200), early.read_to_end(&mut answer)).await;
    assert!(answered.is_err(), "{answered:?} {answer:?}");

    listeners.follow(&BTreeSet::new());
    let answered = timeout(Duration::from_secs(20), early.read_to_end(&mut answer)).await;
    assert!(answered.is_ok(), "served as soon as it is known");
}
