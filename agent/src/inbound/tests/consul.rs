//! Consul's built-in proxy reaches an instance through its registration, with everything real but the capture.

use std::{
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::{Instant, sleep, timeout},
};

use super::*;
use crate::{
    config::{WorkloadConfig, WorkloadRule},
    consul::{
        Client, Request,
        answers::List,
        registration::{LocalServices, Registrar, RegistrarSettings, plan::OwnNode},
        testing::{RealConsul, program, register},
    },
    datapath::CgroupId,
    identity::{consul_ca::ConsulCa, workload::WorkloadResolver},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Speaks first, then repeats a line. Counts its connections.
async fn application(shutdown: &Shutdown) -> (u16, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&count);
    shutdown.spawn("application", async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let mut stream = BufReader::new(stream);
            stream.write_all(b"220 ready\n").await.unwrap();
            let mut line = String::new();
            let _read = stream.read_line(&mut line).await;
            let _written = stream.write_all(line.as_bytes()).await;
        }
    });
    (port, count)
}

/// `consul connect proxy` as `web`, with `db` at a port of loopback.
struct BuiltInProxy {
    child: Child,
    port: u16,
}

impl Drop for BuiltInProxy {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl BuiltInProxy {
    fn start(consul: &RealConsul) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let child = Command::new(program().unwrap())
            .args(["connect", "proxy", "-service", "web", "-log-level", "err"])
            .args(["-upstream", &format!("db:{port}")])
            .args(["-http-addr", &format!("127.0.0.1:{}", consul.port)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, port }
    }

    /// What the application says first and then to `ping`; empty if the connection ends before.
    async fn call(&self) -> std::io::Result<String> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
        let mut stream = BufReader::new(stream);
        let mut said = String::new();
        stream.read_line(&mut said).await?;
        if !said.is_empty() {
            stream.write_all(b"ping\n").await?;
            stream.read_line(&mut said).await?;
        }
        Ok(said)
    }
}

/// Registers what listens at `tunnels` for `db`, which is a workload by a rule.
fn registrar(client: &Client, tunnels: u16, shutdown: &Shutdown) -> LocalServices {
    let rule = WorkloadConfig {
        service: "db".parse().unwrap(),
        rule: WorkloadRule::Cgroup("/db".into()),
        instance: None,
    };
    let workloads = WorkloadResolver::new(&[rule], |_: CgroupId| None).unwrap();
    let settings = RegistrarSettings {
        node: OwnNode {
            name: "node-a".parse().unwrap(),
            address: Ipv4Addr::LOCALHOST.into(),
            version: "1.2.3".to_owned(),
        },
        datacenter: "dc1".to_owned(),
        register: true,
        inbound_ports: tunnels..=tunnels,
        state_file: None,
        discovery: None,
    };
    let (registrar, local) = Registrar::new(client.clone(), settings, Arc::new(workloads));
    shutdown.spawn("registrar", registrar.run(shutdown.clone(), || false));
    local
}

fn allow_all(inbound: &Inbound, default: IntentionAction) {
    inbound.policy.replace(Intentions::new(&[], default));
}

#[tokio::test]
async fn consuls_proxy_reaches_an_instance_by_its_registration() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    let (ca, _follower) = ConsulCa::connect(client.clone(), Arc::new(SystemClock))
        .await
        .unwrap();
    let log = consul.directory.path().join("access.log");
    let inbound = inbound(ca, &log);
    let (app_port, connections) = application(&inbound.shutdown).await;
    let db = json!({"ID": "db-1", "Name": "db", "Port": app_port, "Address": "127.0.0.1"});
    register(&client, &db).await;

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let local = registrar(&client, port, &inbound.shutdown);
    let mut instances = local.instances();
    let instances = instances
        .wait_for(|all| !all.is_empty())
        .await
        .unwrap()
        .clone();
    let targets = Targets::at_own_ports(instances.iter(), &inbound.local);
    assert_eq!(targets.ports(), [port].into());
    inbound.targets.store(Arc::new(targets));
    let serve = Arc::clone(&inbound).serve(acceptor(listener), port);
    inbound.shutdown.spawn("listener", serve);
    local.listening_at([port].into());
    let passing = Request::to(&["v1", "health", "connect", "db"]).with("passing", "");
    let deadline = Instant::now() + PATIENCE;
    while client
        .get::<List<Value>>(&passing)
        .await
        .unwrap()
        .body
        .0
        .is_empty()
    {
        assert!(Instant::now() < deadline, "not healthy");
        sleep(Duration::from_millis(50)).await;
    }

    allow_all(&inbound, IntentionAction::Allow);
    let proxy = BuiltInProxy::start(&consul);
    let deadline = Instant::now() + PATIENCE;
    let said = loop {
        match timeout(PATIENCE, proxy.call()).await.unwrap() {
            Ok(said) if !said.is_empty() => break said,
            // It is still starting.
            early => assert!(Instant::now() < deadline, "{early:?}"),
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(said, "220 ready\nping\n");

    // A denied caller gets no byte of a server that speaks first, and the server no connection.
    allow_all(&inbound, IntentionAction::Deny);
    let before = connections.load(Ordering::Relaxed);
    let denied = timeout(PATIENCE, proxy.call()).await.unwrap();
    assert!(denied.as_ref().map_or(true, String::is_empty), "{denied:?}");
    assert_eq!(connections.load(Ordering::Relaxed), before);

    assert!(inbound.telemetry.access_log().flush(PATIENCE));
    let lines = std::fs::read_to_string(&log).unwrap();
    let has = |parts: &[&str]| {
        lines
            .lines()
            .any(|line| parts.iter().all(|part| line.contains(part)))
    };
    assert!(
        has(&["/dc/dc1/svc/web ", "instance=db-1", "outcome=completed"]),
        "{lines}"
    );
    assert!(has(&["/dc/dc1/svc/web ", "outcome=denied"]), "{lines}");
    assert!(!lines.contains("health check"), "{lines}");
}
