//! What a session that was resumed may leave out, and what not.

use std::{sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig,
    client::{ClientSessionMemoryCache, Resumption},
};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    identity::{
        clock::{Clock, SystemClock, TokioClock},
        provider::Leaf,
        testing::{DAY, LeafSpec, bundle, workload_of},
    },
    telemetry::log::chain,
};

/// A node that is called again and again.
pub(super) struct Node {
    listener: TcpListener,
    pub(super) address: SocketAddr,
}

impl Node {
    pub(super) async fn start() -> Self {
        let (listener, address) = listen().await;
        Self { listener, address }
    }

    /// One tunnel with a byte each way, so that a ticket arrives. Whether both ends resumed.
    pub(super) async fn call(
        &self,
        client: &WorkloadTls,
        server: &WorkloadTls,
    ) -> Result<bool, String> {
        let said = |error: TunnelError| chain(&error).to_string();
        let expected = server.identity();
        let open = Box::pin(open(self.address, client, expected));
        let take = Box::pin(take(&self.listener, server));
        let (opened, taken) = tokio::join!(open, take);
        let mut opened = opened.map_err(said)?;
        let (mut taken, peer) = taken.map_err(said)?;
        assert_eq!(&peer, client.identity());
        for stream in [&mut opened, &mut taken] {
            stream.write_all(b"x").await.unwrap();
            stream.flush().await.unwrap();
        }
        for stream in [&mut opened, &mut taken] {
            stream.read_exact(&mut [0]).await.unwrap();
        }
        assert_eq!(opened.is_resumed(), taken.is_resumed());
        Ok(opened.is_resumed())
    }
}

fn leaf_until(root: &TestCa, service: &str, end: SystemTime) -> Leaf {
    root.leaf(LeafSpec {
        uris: vec![&id(service).to_string()],
        valid: (SystemTime::now() - DAY, end),
        ..LeafSpec::default()
    })
}

#[tokio::test]
async fn the_second_tunnel_to_a_node_leaves_the_certificates_out() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let node = Node::start().await;
    assert_eq!(node.call(&client, &server).await, Ok(false));
    for _ in 0..3 {
        assert_eq!(node.call(&client, &server).await, Ok(true));
    }
}

#[tokio::test]
async fn calls_that_come_at_a_time_are_all_resumed() {
    const AT_A_TIME: usize = 32;
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let node = Node::start().await;
    let mut resumed = vec![];
    for _ in 0..2 {
        let mut opened = vec![];
        // None of them has read its ticket before the last has begun.
        for _ in 0..AT_A_TIME {
            let open = Box::pin(open(node.address, &client, server.identity()));
            let take = Box::pin(take(&node.listener, &server));
            let (opener, taker) = tokio::join!(open, take);
            opened.push((opener.unwrap(), taker.unwrap().0));
        }
        for (opener, taker) in &mut opened {
            taker.write_all(b"x").await.unwrap();
            taker.flush().await.unwrap();
            opener.read_exact(&mut [0]).await.unwrap();
        }
        resumed.push(
            opened
                .iter()
                .filter(|(opener, _)| opener.is_resumed())
                .count(),
        );
    }
    assert_eq!(resumed, [0, AT_A_TIME]);
}

#[tokio::test]
async fn each_caller_each_peer_and_each_node_have_sessions_of_their_own() {
    let root = TestCa::root("root");
    let [web, cron, db, cache] =
        ["web", "cron", "db", "cache"].map(|name| root.workload(&id(name), &[&root]));
    let (one, other) = (Node::start().await, Node::start().await);
    for (client, server, node) in [
        (&web, &db, &one),
        (&cron, &db, &one),
        (&web, &cache, &one),
        (&web, &db, &other),
    ] {
        assert_eq!(node.call(client, server).await, Ok(false));
        assert_eq!(node.call(client, server).await, Ok(true));
    }
}

#[tokio::test]
async fn other_roots_or_another_leaf_begin_anew() {
    let (root, next) = (TestCa::root("root"), TestCa::root("next"));
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let both = || bundle(&[&root, &next]);
    let node = Node::start().await;
    assert_eq!(node.call(&client, &server).await, Ok(false));
    for (client, server) in [
        (&client.with_roots(both()).unwrap(), &server),
        (&client, &server.with_roots(both()).unwrap()),
        (&root.workload(&id("web"), &[&root]), &server),
        (&client, &root.workload(&id("db"), &[&root])),
    ] {
        assert_eq!(node.call(client, server).await, Ok(false));
        assert_eq!(node.call(client, server).await, Ok(true));
    }
}

#[tokio::test]
async fn a_root_that_is_trusted_no_more_ends_what_could_be_resumed() {
    let (old, new) = (TestCa::root("old"), TestCa::root("new"));
    let client = old.workload(&id("web"), &[&old, &new]);
    let server = new.workload(&id("db"), &[&old, &new]);
    let node = Node::start().await;
    assert_eq!(node.call(&client, &server).await, Ok(false));
    assert_eq!(node.call(&client, &server).await, Ok(true));
    let strict = server.with_roots(bundle(&[&new])).unwrap();
    let refused = node.call(&client, &strict).await.unwrap_err();
    assert!(refused.contains("UnknownIssuer"), "{refused}");
    let strict = client.with_roots(bundle(&[&old])).unwrap();
    let refused = node.call(&strict, &server).await.unwrap_err();
    assert!(refused.contains("UnknownIssuer"), "{refused}");
}

#[tokio::test]
async fn a_certificate_that_has_run_out_is_refused_also_when_resumed() {
    let root = TestCa::root("root");
    let now = SystemTime::now();
    let clock = || TokioClock::starting_at(now);
    // Sooner than the twelve hours of a ticket.
    let short = now + DAY / 6;

    // The server's, as the client sees it.
    let clients = clock();
    let watched: Arc<dyn Clock> = Arc::<TokioClock>::clone(&clients);
    let client = workload_of(&root.good_leaf(&id("web")), &id("web"), &[&root], watched);
    let leaf = leaf_until(&root, "db", short);
    let server = workload_of(&leaf, &id("db"), &[&root], Arc::new(SystemClock));
    let node = Node::start().await;
    assert_eq!(node.call(&client, &server).await, Ok(false));
    assert_eq!(node.call(&client, &server).await, Ok(true));
    clients.jump_ahead(DAY / 4);
    // Resumed, then in full: what was remembered is forgotten.
    for _ in 0..2 {
        let refused = node.call(&client, &server).await.unwrap_err();
        assert!(refused.contains("expired"), "{refused}");
    }

    // The client's, as the server sees it.
    let servers = clock();
    let watched: Arc<dyn Clock> = Arc::<TokioClock>::clone(&servers);
    let server = workload_of(&root.good_leaf(&id("db")), &id("db"), &[&root], watched);
    let leaf = leaf_until(&root, "web", short);
    let client = workload_of(&leaf, &id("web"), &[&root], Arc::new(SystemClock));
    assert_eq!(node.call(&client, &server).await, Ok(false));
    assert_eq!(node.call(&client, &server).await, Ok(true));
    servers.jump_ahead(DAY / 4);
    let (opened, taken) = tokio::join!(
        Box::pin(open(node.address, &client, server.identity())),
        Box::pin(take(&node.listener, &server))
    );
    opened.unwrap();
    let refused = chain(&taken.unwrap_err()).to_string();
    assert!(refused.contains("expired"), "{refused}");
}

#[tokio::test]
async fn an_intermediate_beside_the_path_may_have_run_out() {
    let (root, old) = (TestCa::root("root"), TestCa::root("old"));
    let now = SystemTime::now();
    let beside = leaf_until(&old, "beside", now + DAY / 6);
    let leaf = root.leaf(LeafSpec {
        uris: vec![&id("db").to_string()],
        above: beside.chain,
        ..LeafSpec::default()
    });
    let clock = TokioClock::starting_at(now);
    let watched: Arc<dyn Clock> = Arc::<TokioClock>::clone(&clock);
    let client = workload_of(&root.good_leaf(&id("web")), &id("web"), &[&root], watched);
    let server = workload_of(&leaf, &id("db"), &[&root], Arc::new(SystemClock));
    let node = Node::start().await;
    assert_eq!(node.call(&client, &server).await, Ok(false));
    clock.jump_ahead(DAY / 4);
    assert_eq!(node.call(&client, &server).await, Ok(true));
}

/// Envoy as Consul configures it dials with TLS 1.2 and keeps sessions.
#[tokio::test]
async fn a_peer_may_resume_in_either_version() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let ours = client.client_config(&id("db"), NOWHERE);
    let node = Node::start().await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut config = ClientConfig::builder_with_protocol_versions(&[version])
            .dangerous()
            .with_custom_certificate_verifier(peers::trusting(&root, &id("db")))
            .with_client_cert_resolver(Arc::clone(&ours.client_auth_cert_resolver));
        config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(8)));
        let config = Arc::new(config);
        let mut resumed = vec![];
        for _ in 0..2 {
            let open = async {
                let tcp = TcpStream::connect(node.address).await.unwrap();
                let name = ServerName::try_from("db.example").unwrap();
                let connector = TlsConnector::from(Arc::clone(&config));
                connector.connect(name, tcp).await.unwrap()
            };
            let (mut opened, taken) =
                tokio::join!(Box::pin(open), Box::pin(take(&node.listener, &server)));
            let (mut taken, peer) = taken.unwrap();
            assert_eq!(peer, id("web"), "{version:?}");
            taken.write_all(b"x").await.unwrap();
            taken.flush().await.unwrap();
            opened.read_exact(&mut [0]).await.unwrap();
            resumed.push(taken.is_resumed());
        }
        assert_eq!(resumed, [false, true], "{version:?}");
    }
}
