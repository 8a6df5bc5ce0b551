//! Who is let in, who is not, and what is said about it.

use std::{sync::Arc, time::SystemTime};

use proptest::prelude::*;
use rcgen::{ExtendedKeyUsagePurpose, KeyPair, RsaKeySize};
use rustls::{ClientConfig, RootCertStore, client::danger::ServerCertVerifier};
use rustls_pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    identity::{
        clock::{SystemClock, TokioClock},
        testing::{DAY, LeafSpec, workload_of},
        verify::ExpectedServer,
    },
    telemetry::{log::chain, record::Stage},
    tunnel::OpenTunnel,
};

#[tokio::test]
async fn both_sides_know_each_other() {
    let root = TestCa::root("root");
    let (web, db) = (id("web"), id("db"));
    let (listener, address) = listen().await;
    let client = root.workload(&web, &[&root]);
    let server = root.workload(&db, &[&root]);
    let (opened, taken) = tokio::join!(open(address, &client, &db), async {
        let incoming = greet(listener.accept().await.unwrap().0).await.unwrap();
        assert_eq!(incoming.server_name().as_deref(), Some(SERVER_NAME));
        finish(incoming, &server).await.unwrap()
    });
    opened.unwrap();
    assert_eq!(taken.1, web);
}

#[tokio::test]
async fn a_client_accepts_the_expected_service_only() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let mut elsewhere = id("db");
    elsewhere.datacenter = "dc2".into();
    for expected in [id("cache"), elsewhere] {
        let (opened, taken) = meet(&client, &server, &expected).await;
        let error = opened.unwrap_err();
        assert_eq!(error.stage(), Stage::Handshake);
        let text = chain(&error).to_string();
        let said = format!("the peer is {}, expected {expected}", id("db"));
        assert!(text.ends_with(&said), "{text}");
        assert!(taken.is_err(), "the server must not take it for a tunnel");
    }
}

/// A service with this leaf calls one of `root` that trusts `roots`; what the server says.
async fn call_with(
    ca: &TestCa,
    spec: LeafSpec<'_>,
    own_name: &SpiffeId,
    roots: &[&TestCa],
) -> Result<SpiffeId, String> {
    let own = TestCa::root("own eyes");
    let client = workload_of(
        &own.good_leaf(own_name),
        own_name,
        &[&own],
        Arc::new(SystemClock),
    );
    let mut config = ClientConfig::clone(&client.client_config(own_name, NOWHERE));
    let leaf = ca.leaf(spec);
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&leaf.key).unwrap();
    let certified = rustls::sign::CertifiedKey::new(leaf.chain.clone(), key);
    config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified));
    let db = TestCa::root("db's");
    let all: Vec<_> = roots.iter().copied().chain([&db]).collect();
    let server = db.workload(&id("db"), &all);
    config
        .dangerous()
        .set_certificate_verifier(trusting(&db, &id("db")));
    served(config, &server).await
}

/// What a server makes of a client with `config`.
async fn served(config: ClientConfig, server: &WorkloadTls) -> Result<SpiffeId, String> {
    let (listener, address) = listen().await;
    let client = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("db.example").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
    };
    let (_client, served) = tokio::join!(Box::pin(client), Box::pin(take(&listener, server)));
    served
        .map(|(_stream, peer)| peer)
        .map_err(|error| chain(&error).to_string())
}

pub(super) fn trusting(root: &TestCa, expected: &SpiffeId) -> Arc<dyn ServerCertVerifier> {
    let mut roots = RootCertStore::empty();
    roots.add(root.certificate()).unwrap();
    Arc::new(ExpectedServer {
        expected: expected.clone(),
        roots: Arc::new(roots),
        algorithms: rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms,
    })
}

#[tokio::test]
async fn clients_are_let_in_by_their_certificate_alone() {
    let root = TestCa::root("root");
    let web = id("web");
    let uri = web.to_string();
    let spec = || LeafSpec {
        uris: vec![],
        ..LeafSpec::default()
    };
    let now = SystemTime::now();
    let named = |uris: Vec<&'static str>| LeafSpec { uris, ..spec() };
    let own = || LeafSpec {
        uris: vec![&uri],
        ..spec()
    };
    let second = LeafSpec {
        uris: vec!["spiffe://example.org/other", &uri],
        ..spec()
    };
    let expired = LeafSpec {
        valid: (now - DAY, now - DAY / 24),
        ..own()
    };
    let early = LeafSpec {
        valid: (now + DAY / 24, now + DAY),
        ..own()
    };
    let server_only = LeafSpec {
        purposes: vec![ExtendedKeyUsagePurpose::ServerAuth],
        ..own()
    };
    let other_domain = named(vec!["spiffe://example.com/ns/default/dc/dc1/svc/web"]);
    let gateway = named(vec!["spiffe://example.org/gateway/mesh/dc/dc1"]);
    for (what, spec, part) in [
        ("second URI", second, "which is no SPIFFE id of a service"),
        ("no URI", spec(), "has no URI, so no SPIFFE id"),
        (
            "other domain",
            other_domain,
            "outside the trust domain example.org",
        ),
        ("gateway", gateway, "which is no SPIFFE id of a service"),
        ("expired", expired, "certificate expired"),
        ("early", early, "not valid yet"),
        ("server only", server_only, "client"),
    ] {
        let error = call_with(&root, spec, &web, &[&root]).await;
        let error = error.expect_err(what);
        assert!(error.contains(part), "{what}: {error}");
    }
    for uris in [vec![uri.as_str()], vec![&uri, "spiffe://example.org/other"]] {
        let spec = LeafSpec { uris, ..spec() };
        assert_eq!(
            call_with(&root, spec, &web, &[&root]).await,
            Ok(web.clone())
        );
    }
}

#[tokio::test]
async fn a_client_of_a_foreign_root_is_refused() {
    let (root, foreign) = (TestCa::root("root"), TestCa::root("foreign"));
    let web = id("web");
    let uri = web.to_string();
    let spec = LeafSpec {
        uris: vec![&uri],
        ..LeafSpec::default()
    };
    let error = call_with(&foreign, spec, &web, &[&root]).await.unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let root = TestCa::root("root");
    let server = root.workload(&id("db"), &[&root]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = ClientConfig::builder_with_protocol_versions(&[version])
            .dangerous()
            .with_custom_certificate_verifier(trusting(&root, &id("db")))
            .with_no_client_auth();
        let error = served(config, &server).await.unwrap_err();
        assert!(error.ends_with("peer sent no certificates"), "{error}");
    }
}

#[tokio::test]
async fn a_refused_client_learns_it_from_its_first_read() {
    let root = TestCa::root("root");
    let other = TestCa::root("other");
    let client = other.workload(&id("web"), &[&other, &root]);
    let server = root.workload(&id("db"), &[&root]);
    let (opened, taken) = meet(&client, &server, &id("db")).await;
    taken.unwrap_err();
    let refusal = refusal(opened.unwrap()).await;
    assert!(refusal.to_string().contains("UnknownCA"), "{refusal}");
}

#[tokio::test]
async fn an_expired_server_is_refused() {
    let root = TestCa::root("root");
    let now = SystemTime::now();
    let db = id("db");
    let leaf = root.leaf(LeafSpec {
        uris: vec![&db.to_string()],
        valid: (now - DAY, now - DAY / 24),
        ..LeafSpec::default()
    });
    // In its own eyes it is still yesterday.
    let server = workload_of(&leaf, &db, &[&root], TokioClock::starting_at(now - DAY / 2));
    let client = root.workload(&id("web"), &[&root]);
    let error = meet(&client, &server, &db).await.0.unwrap_err();
    assert!(
        chain(&error).to_string().contains("certificate expired"),
        "{error:?}"
    );
}

#[tokio::test]
async fn while_roots_rotate_old_and_new_leaves_meet() {
    let (old, new) = (TestCa::root("old"), TestCa::root("new"));
    let both = [&old, &new];
    let (web, db) = (id("web"), id("db"));
    for client in [old.workload(&web, &both), new.workload(&web, &both)] {
        for server in [old.workload(&db, &both), new.workload(&db, &both)] {
            let (opened, taken) = meet(&client, &server, &db).await;
            opened.unwrap();
            assert_eq!(taken.unwrap().1, web);
        }
    }
    // A node that does not know the new root yet takes new leaves that come with the cross-signed one.
    let above = vec![new.cross_signed_by(&old, "new")];
    let leaf = new.leaf(LeafSpec {
        uris: vec![&web.to_string()],
        above,
        ..LeafSpec::default()
    });
    let client = workload_of(&leaf, &web, &both, Arc::new(SystemClock));
    let behind = old.workload(&db, &[&old]);
    let (opened, taken) = meet(&client, &behind, &db).await;
    opened.unwrap();
    assert_eq!(taken.unwrap().1, web);
    // Without it, it cannot.
    let plain = new.workload(&web, &both);
    meet(&plain, &behind, &db).await.1.unwrap_err();
}

#[tokio::test]
async fn rsa_roots_and_leaves_work() {
    let rsa = || KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    let root = TestCa::root_with("rsa", rsa());
    let (web, db) = (id("web"), id("db"));
    let leaf = root.leaf(LeafSpec {
        uris: vec![&web.to_string()],
        key: Some(rsa()),
        ..LeafSpec::default()
    });
    let client = workload_of(&leaf, &web, &[&root], Arc::new(SystemClock));
    let server = root.workload(&db, &[&root]);
    let (opened, taken) = meet(&client, &server, &db).await;
    opened.unwrap();
    assert_eq!(taken.unwrap().1, web);
}

#[tokio::test]
async fn a_port_check_is_told_from_an_attempt() {
    for reset in [false, true] {
        let (client, server) = raw().await;
        if reset {
            socket2::SockRef::from(&client)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
        }
        drop(client);
        let error = greet(server).await.unwrap_err();
        assert!(matches!(error, TunnelError::Silent), "{error:?}");
    }
    let (mut client, server) = raw().await;
    client.write_all(&[22, 3, 1, 2]).await.unwrap();
    drop(client);
    let error = greet(server).await.unwrap_err();
    assert!(matches!(error, TunnelError::Handshake(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_dawdles_is_cut_off() {
    for drip in [false, true] {
        let (mut client, server) = raw().await;
        // Says one byte, or none, and then nothing: no record of this type ever completes.
        let dawdle = async {
            if drip {
                client.write_all(&[22]).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        let accepted = tokio::select! {
            accepted = greet(server) => accepted,
            () = dawdle => panic!("the peer gave up first"),
        };
        let error = accepted.unwrap_err();
        assert!(matches!(error, TunnelError::HandshakeTimeout), "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_dawdles_is_given_up() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let (_listener, address) = listen().await;
    let error = open(address, &client, &id("db")).await.unwrap_err();
    assert!(matches!(error, TunnelError::HandshakeTimeout), "{error:?}");
}

#[tokio::test]
async fn a_closed_port_is_an_error_of_the_dial() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let (listener, address) = listen().await;
    drop(listener);
    let error = open(address, &client, &id("db")).await.unwrap_err();
    assert_eq!(error.stage(), Stage::Dial);
    assert_eq!(
        chain(&error).to_string(),
        format!("connect to {address}: Connection refused (os error 111)")
    );
}

#[tokio::test]
async fn a_name_that_nothing_here_has_is_refused_with_an_alert() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let (listener, address) = listen().await;
    let db = id("db");
    let (opened, ()) = tokio::join!(open(address, &client, &db), async {
        let incoming = greet(listener.accept().await.unwrap().0).await.unwrap();
        incoming.refuse();
    });
    let text = chain(&opened.unwrap_err()).to_string();
    assert_eq!(
        text,
        "TLS handshake: received fatal alert: UnrecognisedName"
    );
}

#[tokio::test]
async fn a_name_that_tls_cannot_carry_is_never_sent() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let (_listener, address) = listen().await;
    let name = "a b.default.dc1.internal.example.org";
    let error = open_by_name(address, &client, &id("db"), name).await;
    assert_eq!(
        chain(&error.unwrap_err()).to_string(),
        format!("{name:?} cannot be sent as a TLS server name")
    );
}

#[tokio::test]
async fn what_speaks_no_tls_is_told_so() {
    let (mut client, server) = raw().await;
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = greet(server).await.unwrap_err();
    let text = chain(&error).to_string();
    assert!(text.contains("corrupt message"), "{text}");
}

#[test]
fn tunnels_and_errors_stay_small() {
    assert!(
        size_of::<OpenTunnel>() <= 128,
        "{} {}",
        size_of::<TunnelStream>(),
        size_of::<OpenTunnel>()
    );
    assert!(size_of::<TunnelError>() <= 128);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_greeting_is_answered(bytes in proptest::collection::vec(any::<u8>(), 1..600), tls_like in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut greeting = bytes;
        if tls_like {
            let body = u16::try_from(greeting.len() + 4).unwrap().to_be_bytes();
            let inner = u16::try_from(greeting.len()).unwrap().to_be_bytes();
            let head = [22, 3, 1, body[0], body[1], 1, 0, inner[0], inner[1]];
            greeting.splice(0..0, head);
        }
        runtime.block_on(async {
            let (mut client, server) = raw().await;
            client.write_all(&greeting).await.unwrap();
            client.shutdown().await.unwrap();
            greet(server).await.unwrap_err();
        });
    }
}
