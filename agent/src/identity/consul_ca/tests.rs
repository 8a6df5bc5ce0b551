//! Consul's authority: the real one, and one that says what a test wants it to.

use std::{
    collections::VecDeque,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::SystemTime,
};

use serde_json::json;
use tempfile::tempdir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    time::{Instant, sleep, timeout},
};

use super::*;
use crate::{
    consul::{
        ClientSettings, ConsulAddress, answers,
        testing::{RealConsul, program},
    },
    identity::{
        LocalDomain,
        certificates::{Certificates, Jitter},
        clock::SystemClock,
        testing::{DAY, LeafSpec, TestCa, id},
        workload_tls::WorkloadTls,
    },
};

async fn connect(client: Client) -> (Arc<ConsulCa>, RootsFollower) {
    ConsulCa::connect(client, Arc::new(SystemClock))
        .await
        .unwrap()
}

/// The certificates of a node whose authority is `ca`; its tasks end with the test.
fn certificates_of(
    ca: &Arc<ConsulCa>,
    follower: RootsFollower,
    shutdown: &Shutdown,
) -> Certificates {
    shutdown.spawn("roots", follower.run(shutdown.clone()));
    Certificates::new(
        Arc::<ConsulCa>::clone(ca),
        Arc::new(SystemClock),
        Jitter::seeded(1),
        shutdown.clone(),
    )
}

fn said(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error).to_string()
}

#[test]
fn consuls_dns_is_asked_where_it_can_be_reached() {
    let listed = [
        "tcp://127.0.0.1:8600",
        "udp://127.0.0.1:8600",
        "udp://0.0.0.0:53",
        "udp://[::]:8600",
        "udp://192.0.2.1:53",
        "unix:///run/dns",
    ];
    let asked: Vec<String> = dns_servers(&listed.map(str::to_owned))
        .iter()
        .map(ToString::to_string)
        .collect();
    let expected = [
        "127.0.0.1:8600",
        "127.0.0.1:53",
        "[::1]:8600",
        "192.0.2.1:53",
    ];
    assert_eq!(asked, expected);
}

#[tokio::test]
async fn leaves_of_the_real_consul_are_taken_into_use() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    let agent = ConsulAgent::ask(&client).await.unwrap();
    assert_eq!((&*agent.datacenter, &*agent.node), ("dc1", "node1"));
    assert!(!agent.version.is_empty());
    // The program is started without DNS.
    assert_eq!(
        (&*agent.dns_servers, &*agent.dns_domain),
        (&[][..], "consul.")
    );

    let (ca, follower) = connect(client).await;
    let trust_domain = ca.trust_domain().clone();
    assert!(trust_domain.as_str().ends_with(".consul"));
    let local = LocalDomain::new(trust_domain, agent.datacenter);
    let shutdown = Shutdown::default();
    let certificates = certificates_of(&ca, follower, &shutdown);
    let db = local.identity_of(&"db".parse().unwrap());
    let tls = certificates.for_identity(&db).await.unwrap();
    assert_eq!(*tls.identity(), db);
    let again = certificates.for_identity(&db).await.unwrap();
    assert!(Arc::ptr_eq(&tls, &again));

    // Consul's agent keeps one leaf per service: another caller gets the same.
    let other = certificates_of(&ca, connect(consul.client()).await.1, &shutdown);
    let same = other.for_identity(&db).await.unwrap();
    assert_eq!(same.leaf(), tls.leaf());

    let foreign = ca.issue(&id("db")).await.unwrap_err();
    assert!(
        matches!(foreign, IssueError::ForeignTrustDomain { .. }),
        "{foreign:?}"
    );
}

#[tokio::test]
async fn a_rotation_of_roots_is_followed_and_the_old_root_still_accepts() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    let (ca, follower) = connect(client.clone()).await;
    let shutdown = Shutdown::default();
    let certificates = certificates_of(&ca, follower, &shutdown);
    let local = LocalDomain::new(ca.trust_domain().clone(), "dc1".to_owned());
    let db = local.identity_of(&"db".parse().unwrap());
    let before = certificates.for_identity(&db).await.unwrap();
    let old_roots = Arc::clone(before.bundle());

    let key = Command::new("openssl")
        .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout"])
        .output()
        .unwrap();
    let key = String::from_utf8(key.stdout).unwrap();
    let configuration = Request::to(&["v1", "connect", "ca", "configuration"]);
    let rotated = json!({"Provider": "consul", "Config": {
        "PrivateKey": key, "RootCert": "", "LeafCertTTL": "72h", "IntermediateCertTTL": "8760h",
    }});
    client.put(&configuration, &rotated).await.unwrap();

    // The new root is trusted at once, beside the old one.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = certificates.for_identity(&db).await.unwrap();
        if now.bundle().certificates().len() == 2 {
            assert_eq!(now.leaf(), before.leaf(), "the old leaf serves on");
            break;
        }
        assert!(Instant::now() < deadline, "the new root is not trusted");
        sleep(Duration::from_millis(20)).await;
    }
    // Consul makes the new leaf within half a minute.
    let deadline = Instant::now() + Duration::from_secs(60);
    while certificates.for_identity(&db).await.unwrap().leaf() == before.leaf() {
        assert!(Instant::now() < deadline, "no new leaf");
        sleep(Duration::from_millis(50)).await;
    }
    let leaf = ca.leaf(&db).await.unwrap();
    assert_eq!(leaf.chain.len(), 2, "with the cross-signed root");
    WorkloadTls::new(db.clone(), &leaf, old_roots, Arc::new(SystemClock)).unwrap();
}

#[tokio::test]
async fn missing_rights_are_named() {
    let acl =
        json!({"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "root"}}});
    let Some(consul) = RealConsul::start(acl).await else {
        return;
    };
    let root = consul.client_with("root", "root");
    let policy = json!({"Name": "db", "Rules": "service \"db\" { policy = \"write\" }"});
    let deadline = Instant::now() + Duration::from_secs(20);
    // Until the ACLs are in force.
    while root
        .put(&Request::to(&["v1", "acl", "policy"]), &policy)
        .await
        .is_err()
    {
        assert!(Instant::now() < deadline);
        sleep(Duration::from_millis(50)).await;
    }
    let token =
        json!({"SecretID": "6d09d5e2-0000-4000-8000-000000000001", "Policies": [{"Name": "db"}]});
    root.put(&Request::to(&["v1", "acl", "token"]), &token)
        .await
        .unwrap();
    let client = consul.client_with("db", "6d09d5e2-0000-4000-8000-000000000001");

    let agent = said(&ConsulAgent::ask(&client).await.unwrap_err());
    assert!(agent.contains("needs `agent:read` on this node"), "{agent}");
    let (ca, _follower) = connect(client).await;
    let local = LocalDomain::new(ca.trust_domain().clone(), "dc1".to_owned());
    let of = |name: &str| local.identity_of(&name.parse().unwrap());
    ca.issue(&of("db")).await.unwrap();
    let refused = said(&ca.issue(&of("web")).await.unwrap_err());
    assert!(
        refused.contains("the agent's token needs `service:write` on \"web\"")
            && refused.contains("403"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_consul_without_connect_is_told_of_at_once() {
    let off = json!({"connect": {"enabled": false}});
    let Some(consul) = RealConsul::start(off).await else {
        return;
    };
    let connected = ConsulCa::connect(consul.client(), Arc::new(SystemClock));
    let error = timeout(Duration::from_secs(10), connected).await.unwrap();
    let error = said(&error.unwrap_err());
    assert!(error.contains("`connect { enabled = true }`"), "{error}");
}

/// A Consul that answers these bodies one after the other, and notes what it was asked.
struct Scripted {
    socket: tempfile::TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    fn new(bodies: &[String], shutdown: &Shutdown) -> Self {
        let socket = tempdir().unwrap();
        let listener = UnixListener::bind(socket.path().join("socket")).unwrap();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let noted = Arc::clone(&asked);
        let mut bodies = VecDeque::from(bodies.to_owned());
        shutdown.spawn("scripted", async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                noted.lock().push(head.lines().next().unwrap().to_owned());
                let Some(body) = bodies.pop_front() else {
                    std::future::pending().await
                };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nX-Consul-Index: 22\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Self { socket, asked }
    }

    fn client(&self) -> Client {
        let address = ConsulAddress::Unix(self.socket.path().join("socket"));
        Client::new(ClientSettings::anonymous(address))
    }
}

fn pem_of(certificate: &[u8]) -> String {
    let document = pkcs8::Document::try_from(certificate).unwrap();
    let text = document.to_pem("CERTIFICATE", pkcs8::LineEnding::LF);
    text.unwrap()
}

fn roots_of(trust_domain: &str, roots: &[&TestCa]) -> Roots {
    let root = |root: &&TestCa| answers::Root {
        id: "a1:b2".to_owned(),
        root_cert: pem_of(&root.certificate()),
    };
    Roots {
        active_root_id: "a1:b2".to_owned(),
        trust_domain: trust_domain.to_owned(),
        roots: roots.iter().map(root).collect(),
    }
}

fn roots_json(trust_domain: &str, roots: &[&TestCa]) -> String {
    let Roots { roots, .. } = roots_of(trust_domain, roots);
    let roots: Vec<_> = roots
        .iter()
        .map(|root| json!({"ID": root.id, "RootCert": root.root_cert}))
        .collect();
    json!({"ActiveRootID": "a1:b2", "TrustDomain": trust_domain, "Roots": roots}).to_string()
}

/// A leaf as Consul answers it, `age` into a life of a day.
fn leaf_json(root: &TestCa, age: Duration) -> String {
    let identity = id("db").to_string();
    let from = SystemTime::now() - age;
    let leaf = root.leaf(LeafSpec {
        uris: vec![&identity],
        valid: (from, from + DAY),
        ..LeafSpec::default()
    });
    let key = pkcs8::SecretDocument::try_from(leaf.key.secret_der()).unwrap();
    let key = key.to_pem("PRIVATE KEY", pkcs8::LineEnding::LF).unwrap();
    json!({"CertPEM": pem_of(&leaf.chain[0]), "PrivateKeyPEM": key.to_string(), "Service": "db"})
        .to_string()
}

#[tokio::test]
async fn a_leaf_that_lay_in_consuls_cache_for_too_long_is_waited_for() {
    let root = TestCa::root("root");
    let shutdown = Shutdown::default();
    let old = leaf_json(&root, DAY.mul_f64(0.95));
    let new = leaf_json(&root, Duration::from_secs(1));
    let answers = [roots_json("example.org", &[&root]), old, new];
    let consul = Scripted::new(&answers, &shutdown);
    let (ca, _follower) = connect(consul.client()).await;
    let leaf = ca.issue(&id("db")).await.unwrap();
    assert!(!certificates::is_overdue(&leaf, SystemTime::now()));
    let asked = consul.asked.lock().clone();
    let [_roots, first, second] = &asked[..] else {
        panic!("{asked:?}");
    };
    assert!(!first.contains("index="), "{first}");
    assert!(second.contains("/ca/leaf/db?index=22&wait=5s"), "{second}");
}

#[tokio::test]
async fn another_trust_domain_and_bad_roots_leave_all_as_it_was() {
    let (root, next) = (TestCa::root("root"), TestCa::root("next"));
    let shutdown = Shutdown::default();
    let consul = Scripted::new(&[roots_json("example.org", &[&root])], &shutdown);
    let (ca, _follower) = connect(consul.client()).await;
    let trusted = || ca.trust().borrow().roots.certificates().to_vec();
    let before = trusted();

    let other = ca.take(&roots_of("other.consul", &[&next])).unwrap_err();
    let expected = "Consul's trust domain is now other.consul, and was example.org: is this another cluster? \
                    Restart the agent to follow it";
    assert_eq!(other, expected);
    let none = ca.take(&roots_of("example.org", &[])).unwrap_err();
    assert!(none.contains("no root certificate"), "{none}");
    let mut bad = roots_of("example.org", &[&root, &next]);
    bad.roots[1].root_cert = "nonsense".to_owned();
    let bad = ca.take(&bad).unwrap_err();
    assert!(bad.contains("Consul's root a1:b2 cannot be used"), "{bad}");
    assert_eq!(trusted(), before);

    ca.take(&roots_of("example.org", &[&next, &root])).unwrap();
    assert_eq!(trusted(), [next.certificate(), root.certificate()]);
}

/// A Consul server whose data outlives it.
struct Persistent {
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Drop for Persistent {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Persistent {
    async fn start() -> Option<Self> {
        let program = program()?;
        let directory = tempdir().unwrap();
        let held: [_; 5] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let [http, server, lan, wan, grpc] =
            held.each_ref().map(|l| l.local_addr().unwrap().port());
        drop(held);
        let config = json!({
            "server": true, "bootstrap_expect": 1, "bind_addr": "127.0.0.1", "connect": {"enabled": true},
            "data_dir": directory.path().join("data"), "performance": {"raft_multiplier": 1},
            "ports": {"http": http, "server": server, "serf_lan": lan, "serf_wan": wan, "grpc": grpc, "dns": -1},
        });
        std::fs::write(directory.path().join("consul.json"), config.to_string()).unwrap();
        let consul = Self {
            child: Self::spawn(&program, directory.path()),
            port: http,
            directory,
        };
        consul.is_up().await;
        Some(consul)
    }

    fn spawn(program: &Path, directory: &Path) -> Child {
        Command::new(program)
            .args(["agent", "-config-file", "consul.json"])
            .current_dir(directory)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Kills it and starts it again with what it has on disk.
    async fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::spawn(&program().unwrap(), self.directory.path());
        self.is_up().await;
    }

    async fn is_up(&self) {
        let request = Request::to(&["v1", "agent", "connect", "ca", "roots"]);
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.client().get::<Roots>(&request).await.is_err() {
            assert!(Instant::now() < deadline, "Consul does not come up");
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn client(&self) -> Client {
        Client::new(ClientSettings::anonymous(ConsulAddress::Http {
            host: "127.0.0.1".to_owned(),
            port: self.port,
        }))
    }
}

#[tokio::test]
async fn a_restarted_agent_of_consul_makes_another_leaf_which_is_taken() {
    let Some(mut consul) = Persistent::start().await else {
        println!("skipped: no program `consul`");
        return;
    };
    let (ca, follower) = connect(consul.client()).await;
    let shutdown = Shutdown::default();
    let certificates = certificates_of(&ca, follower, &shutdown);
    let local = LocalDomain::new(ca.trust_domain().clone(), "dc1".to_owned());
    let db = local.identity_of(&"db".parse().unwrap());
    let before = certificates.for_identity(&db).await.unwrap();
    // Until the renewal is listened for.
    sleep(Duration::from_secs(2)).await;

    consul.restart().await;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = certificates.for_identity(&db).await.unwrap();
        if now.leaf() != before.leaf() {
            assert_eq!(now.bundle().certificates(), before.bundle().certificates());
            break;
        }
        assert!(Instant::now() < deadline, "no other leaf");
        sleep(Duration::from_millis(50)).await;
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Some(problem) = ca.problem() {
        assert!(Instant::now() < deadline, "{problem}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_consul_that_has_no_root_yet_is_waited_for() {
    let root = TestCa::root("root");
    let shutdown = Shutdown::default();
    let answers = [roots_json("", &[]), roots_json("example.org", &[&root])];
    let consul = Scripted::new(&answers, &shutdown);
    let (ca, _follower) = connect(consul.client()).await;
    assert_eq!(ca.trust_domain().as_str(), "example.org");
}
