//! The registrar against the real Consul.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};
use tokio::{net::TcpListener, time::sleep};

use super::*;
use crate::{
    config::{WorkloadConfig, WorkloadRule},
    consul::{
        answers::{HealthEntry, List},
        testing::{RealConsul, register},
    },
    datapath::{CgroupId, cgroup::Cgroup2},
    identity::{consul_ca::ConsulAgent, workload::CgroupPaths},
};

/// For how long a test waits. Consul's agent tries a refused synchronisation again within 15 to 30 seconds
/// (agent/ae, `retryFailIntv`).
const PATIENCE: Duration = Duration::from_secs(60);

/// A registrar that runs, and its surroundings.
struct Scene {
    local: LocalServices,
    workloads: Arc<WorkloadResolver>,
    shutdown: Shutdown,
}

/// How a [`Scene`] is set up; ports come from the ephemeral range, so that listeners may be made at them.
struct Setup {
    rules: Vec<WorkloadConfig>,
    discovery: Option<Bounds>,
    cgroups: Box<dyn CgroupPaths>,
    ports: RangeInclusive<u16>,
    is_replaced: bool,
}

impl Setup {
    fn with_rules(services: &[&str], port: u16) -> Self {
        let rule = |service: &&str| WorkloadConfig {
            service: service.parse().unwrap(),
            rule: WorkloadRule::Cgroup(format!("/{service}").into()),
            instance: None,
        };
        Self {
            rules: services.iter().map(rule).collect(),
            discovery: None,
            cgroups: Box::new(|_: CgroupId| None),
            ports: port..=port,
            is_replaced: false,
        }
    }

    fn run(self, client: Client) -> Scene {
        let is_replaced = self.is_replaced;
        let (registrar, local) = self.registrar(client);
        let workloads = Arc::clone(&registrar.workloads);
        let shutdown = Shutdown::default();
        let running = registrar.run(shutdown.clone(), move || is_replaced);
        shutdown.spawn("registrar", running);
        Scene {
            local,
            workloads,
            shutdown,
        }
    }

    fn registrar(self, client: Client) -> (Registrar, LocalServices) {
        let workloads = WorkloadResolver::new(&self.rules, Boxed(self.cgroups)).unwrap();
        let settings = RegistrarSettings {
            node: node(),
            datacenter: "dc1".to_owned(),
            register: true,
            inbound_ports: self.ports,
            state_file: None,
            discovery: self.discovery,
        };
        Registrar::new(client, settings, Arc::new(workloads))
    }
}

struct Boxed(Box<dyn CgroupPaths>);

impl CgroupPaths for Boxed {
    fn path_of(&self, cgroup: CgroupId) -> Option<PathBuf> {
        self.0.path_of(cgroup)
    }
}

fn node() -> OwnNode {
    OwnNode {
        name: "node-a".parse().unwrap(),
        address: Ipv4Addr::LOCALHOST.into(),
        version: "1.2.3".to_owned(),
    }
}

async fn services(client: &Client) -> AgentServices {
    let request = Request::to(&["v1", "agent", "services"]);
    client.get(&request).await.unwrap().body
}

/// Waits until `condition` holds of what Consul's agent has.
async fn until(client: &Client, what: &str, condition: impl Fn(&AgentServices) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = services(client).await;
        if condition(&now) {
            return;
        }
        assert!(Instant::now() < deadline, "not {what}: {now:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn deregister(client: &Client, id: &str) {
    let request = Request::to(&["v1", "agent", "service", "deregister", id]);
    client.put_nothing(&request).await.unwrap();
}

fn web(port: u16, version: &str) -> Value {
    json!({"ID": "web-1", "Name": "web", "Port": port, "Address": "127.0.0.1", "Tags": ["blue"],
        "Meta": {"version": version}})
}

fn proxy(id: &str, node: Option<&str>) -> Value {
    let meta = node.map_or(
        json!({}),
        |node| json!({"sidestep": "1.0.0", "sidestep-node": node}),
    );
    json!({"ID": id, "Name": "x-proxy", "Kind": "connect-proxy", "Port": 1, "Meta": meta,
        "Proxy": {"DestinationServiceName": "x"}})
}

/// Takes tunnels as far as a health check can tell.
async fn open_port() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test]
async fn an_instance_is_registered_followed_and_deregistered() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    let (_application, app_port) = open_port().await;
    let (_tunnels, port) = open_port().await;
    for service in [
        web(app_port, "1"),
        json!({"ID": "other-1", "Name": "other", "Port": app_port}),
        proxy("web-1-sidecar-proxy", None),
        proxy("sidestep-of-b", Some("node-b")),
        proxy("sidestep-_stale/task 1", Some("node-a")),
    ] {
        register(&client, &service).await;
    }
    let scene = Setup::with_rules(&["web"], port).run(client.clone());

    // What is to be opened is known before anybody is told of it.
    let mut instances = scene.local.instances();
    instances.wait_for(|all| !all.is_empty()).await.unwrap();
    let (service, instance) = instances.borrow()[0].clone();
    assert_eq!((service.as_str(), instances.borrow().len()), ("web", 1));
    assert_eq!(instance.tunnel, (Ipv4Addr::LOCALHOST, port).into());
    assert_eq!(instance.local, (Ipv4Addr::LOCALHOST, app_port).into());
    until(&client, "clean", |now| {
        !now.0.contains_key("sidestep-_stale/task 1")
    })
    .await;
    assert!(!services(&client).await.0.contains_key("sidestep-web-1"));

    scene.local.listening_at([port].into());
    until(&client, "registered", |now| {
        now.0.contains_key("sidestep-web-1")
    })
    .await;
    let all = services(&client).await;
    assert!(all.0.contains_key("web-1-sidecar-proxy") && all.0.contains_key("sidestep-of-b"));
    assert!(
        !all.0.contains_key("sidestep-other-1"),
        "no workload of this node"
    );
    let ours = &all.0["sidestep-web-1"];
    assert_eq!(ours.proxy.destination_service_id, "");
    assert_eq!(ours.meta["sidestep-instance"], "web-1");
    assert_eq!(ours.meta["sidestep"], "1.2.3");

    // Callers find it as soon as both of its checks pass.
    let healthy = Request::to(&["v1", "health", "connect", "web"]).with("passing", "");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = client.get::<List<HealthEntry>>(&healthy).await.unwrap();
        let ids = found.body.0.iter().map(|entry| entry.service.id.as_str());
        if ids.clone().any(|id| id == "sidestep-web-1") {
            break;
        }
        assert!(Instant::now() < deadline, "not found by callers");
        sleep(Duration::from_millis(50)).await;
    }

    register(&client, &web(app_port, "2")).await;
    until(&client, "updated", |now| {
        let ours = now.0.get("sidestep-web-1");
        ours.is_some_and(|ours| ours.meta["version"] == "2" && ours.port == port)
    })
    .await;

    // As after a restart of Consul's agent, which forgot it.
    deregister(&client, "sidestep-web-1").await;
    until(&client, "back", |now| now.0.contains_key("sidestep-web-1")).await;
    assert_eq!(scene.local.status().problems, BTreeSet::new());
    assert_eq!(scene.local.status().registered.len(), 1);

    deregister(&client, "web-1").await;
    until(&client, "gone", |now| !now.0.contains_key("sidestep-web-1")).await;
    wait_for("empty", || scene.local.instances().borrow().is_empty()).await;

    register(&client, &web(app_port, "3")).await;
    until(&client, "registered", |now| {
        now.0.contains_key("sidestep-web-1")
    })
    .await;
    scene.shutdown.run("test", PATIENCE).await;
    let left = services(&client).await.0;
    assert!(!left.contains_key("sidestep-web-1"), "it said farewell");
    assert!(left.contains_key("web-1-sidecar-proxy") && left.contains_key("sidestep-of-b"));
}

#[tokio::test]
async fn an_agent_that_is_replaced_leaves_its_registrations_to_the_next() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    register(&client, &web(8080, "1")).await;
    let mut setup = Setup::with_rules(&["web"], 21_500);
    setup.is_replaced = true;
    let scene = setup.run(client.clone());
    scene.local.listening_at([21_500].into());
    until(&client, "registered", |now| {
        now.0.contains_key("sidestep-web-1")
    })
    .await;
    scene.shutdown.run("test", PATIENCE).await;
    assert!(services(&client).await.0.contains_key("sidestep-web-1"));
}

#[tokio::test]
async fn missing_and_lost_rights_are_told_and_nothing_is_dropped() {
    let acl =
        json!({"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "root"}}});
    let Some(consul) = RealConsul::start(acl).await else {
        return;
    };
    let root = consul.client_with("root", "root");
    let of_service = r#"service "web" { policy = "write" }"#;
    // As docs/consul.md has it.
    let documented = r#"
        agent_prefix "" { policy = "read" }
        service "web" { policy = "write" }
        service "web-sidestep-proxy" { policy = "write" }
    "#;
    let policy = json!({"Name": "service", "Rules": of_service});
    let deadline = Instant::now() + PATIENCE;
    let request = Request::to(&["v1", "acl", "policy"]);
    while root.put(&request, &policy).await.is_err() {
        assert!(Instant::now() < deadline, "no ACLs");
        sleep(Duration::from_millis(50)).await;
    }
    let policy = json!({"Name": "documented", "Rules": documented});
    root.put(&request, &policy).await.unwrap();
    let [secret, sufficient] = [2, 3].map(|n| format!("6d09d5e2-0000-4000-8000-00000000000{n}"));
    for (secret, policy) in [(&secret, "service"), (&sufficient, "documented")] {
        let token = json!({"SecretID": secret, "Policies": [{"Name": policy}]});
        let request = Request::to(&["v1", "acl", "token"]);
        root.put(&request, &token).await.unwrap();
    }
    register(&root, &web(8080, "1")).await;

    // It may see and write web, and not the name of its proxy.
    let scene = Setup::with_rules(&["web"], 21_500).run(consul.client_with("agent", &secret));
    scene.local.listening_at([21_500].into());
    let has = |text: &str| {
        let status = scene.local.status();
        status.problems.iter().any(|problem| problem.contains(text))
    };
    wait_for("refused", || has("service:write")).await;
    assert!(has("<service>-sidestep-proxy") && has("sidestep-web-1"));
    assert_eq!(scene.local.instances().borrow().len(), 1);

    // The anonymous token may see nothing, which Consul says with status 200 and nothing.
    let use_token =
        |secret: &str| fs::write(consul.directory.path().join("agent"), secret).unwrap();
    for (secret, said) in [
        (
            "anonymous",
            "empty or filtered as for a token without rights",
        ),
        ("6d09d5e2-0000-4000-8000-00000000000f", "ACL not found"),
    ] {
        use_token(secret);
        wait_for("told", || has(said)).await;
        assert_eq!(
            scene.local.instances().borrow().len(),
            1,
            "nothing is dropped"
        );
    }
    use_token(&sufficient);
    wait_for("well", || scene.local.status().problems.is_empty()).await;
    until(&root, "registered", |now| {
        now.0.contains_key("sidestep-web-1")
    })
    .await;
    let client = consul.client_with("agent", &sufficient);
    let agent = ConsulAgent::ask(&client).await.unwrap();
    assert_eq!(agent.node, "node1");
    // Consul's agent told the servers, which takes rights too.
    let proxies = Request::to(&["v1", "catalog", "service", "web-sidestep-proxy"]);
    let deadline = Instant::now() + PATIENCE;
    let none_yet = async || {
        let answer = root.get::<List<Value>>(&proxies).await.unwrap();
        answer.body.0.is_empty()
    };
    while none_yet().await {
        assert!(Instant::now() < deadline, "not in the catalog");
        sleep(Duration::from_millis(50)).await;
    }
    scene.shutdown.run("test", PATIENCE).await;
    let left = services(&root).await.0;
    assert!(!left.contains_key("sidestep-web-1"));
}

/// A process that listens in a cgroup of its own, which goes with it.
struct Listening {
    child: Child,
    port: u16,
    directory: PathBuf,
    _files: TempDir,
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        let _removed = fs::remove_dir(&self.directory);
    }
}

impl Listening {
    /// `None`, with a word, without the right to make a cgroup.
    fn start(parent: &Path, name: &str) -> Option<Self> {
        let directory = parent.join(name);
        if let Err(error) = fs::create_dir(&directory) {
            println!("skipped: no cgroup can be made: {error}");
            return None;
        }
        let files = tempdir().unwrap();
        let script = "echo 0 > \"$1/cgroup.procs\" && \
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k -out c -subj /CN=x \
            2>/dev/null && exec openssl s_server -accept 127.0.0.1:0 -key k -cert c";
        let mut child = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(&directory)
            .current_dir(files.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut ports = said.lines().filter_map(|line| {
            let line = line.unwrap();
            let address = line.strip_prefix("ACCEPT ")?.to_owned();
            Some(address.parse::<SocketAddr>().unwrap().port())
        });
        let port = ports.next().unwrap();
        Some(Self {
            child,
            port,
            directory,
            _files: files,
        })
    }
}

/// Removes a cgroup when dropped, after those that are declared later.
struct Parent(PathBuf);

impl Drop for Parent {
    fn drop(&mut self) {
        let _removed = fs::remove_dir(&self.0);
    }
}

#[tokio::test]
async fn the_process_that_listens_for_a_service_is_the_service() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    let cgroups = Arc::new(Cgroup2::find().unwrap());
    let attach_point = format!("/sidestep-registrar-test-{}", std::process::id());
    let parent = Parent(cgroups.directory(Path::new(&attach_point)));
    if let Err(error) = fs::create_dir(&parent.0) {
        println!("skipped: no cgroup can be made: {error}");
        return;
    }
    let Some(application) = Listening::start(&parent.0, "web.service") else {
        return;
    };
    let id = cgroups
        .id_of(&Path::new(&attach_point).join("web.service"))
        .unwrap();
    let paths = Arc::clone(&cgroups);
    let mut setup = Setup::with_rules(&[], 21_500);
    setup.cgroups = Box::new(move |id: CgroupId| paths.path_of(id));
    let own = cgroups.own().unwrap();
    let bounds = Bounds::new(&[attach_point.clone().into()], &own.join("agent"), None);
    setup.discovery = Some(bounds);
    let scene = setup.run(client.clone());
    register(&client, &web(application.port, "1")).await;

    scene.local.listening_at([21_500].into());
    until(&client, "registered", |now| {
        now.0.contains_key("sidestep-web-1")
    })
    .await;
    let maker = |cgroup| crate::datapath::Maker {
        cgroup,
        netns: crate::datapath::NetnsCookie(1),
        uid: 0,
        process: 1,
    };
    let resolved = scene.workloads.resolve(&maker(id)).unwrap();
    assert_eq!(resolved.as_str(), "web");
    let discovered = scene.local.status().discovered;
    let path = PathBuf::from(attach_point).join("web.service");
    assert_eq!(discovered, [(path, "web".parse().unwrap())]);

    // Another service at the same port makes it unclear who the process is.
    let mut second = web(application.port, "1");
    second["ID"] = json!("admin-1");
    second["Name"] = json!("admin");
    register(&client, &second).await;
    wait_for("refused", || scene.workloads.resolve(&maker(id)).is_err()).await;
    let refused = scene.local.status().refused;
    assert!(
        refused
            .iter()
            .any(|why| why.contains("several services (admin, web)")),
        "{refused:?}"
    );
    deregister(&client, "admin-1").await;
    wait_for("clear again", || {
        scene.workloads.resolve(&maker(id)).is_ok()
    })
    .await;

    // It goes with its cgroup; the instance stays known, and its checks tell callers.
    drop(application);
    wait_for("gone", || scene.workloads.resolve(&maker(id)).is_err()).await;
    wait_for("told", || scene.local.status().discovered.is_empty()).await;
    assert!(services(&client).await.0.contains_key("sidestep-web-1"));
    scene.shutdown.run("test", PATIENCE).await;
}

#[tokio::test]
async fn a_restarted_agent_knows_what_to_listen_for_before_it_begins_and_deregisters_nothing() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    register(&client, &web(8080, "1")).await;
    let mut setup = Setup::with_rules(&["web"], 21_500);
    setup.is_replaced = true;
    let first = setup.run(client.clone());
    first.local.listening_at([21_500].into());
    until(&client, "registered", |now| {
        now.0.contains_key("sidestep-web-1")
    })
    .await;
    first.shutdown.run("test", PATIENCE).await;

    let (mut registrar, local) = Setup::with_rules(&["web"], 21_500).registrar(client.clone());
    assert!(registrar.look().await);
    let instances = local.instances().borrow().clone();
    assert_eq!(instances[0].1.tunnel.port(), 21_500);
    assert!(services(&client).await.0.contains_key("sidestep-web-1"));

    drop(consul);
    assert!(!registrar.look().await, "Consul is away");
    assert_eq!(
        *local.instances().borrow(),
        instances,
        "what was known stays"
    );
}

#[tokio::test]
async fn a_socket_of_this_host_says_nothing_of_instances_that_are_elsewhere() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    // Takes what comes for any address of this host.
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut setup = Setup::with_rules(&["here", "outside"], 21_500);
    setup.rules.push(WorkloadConfig {
        service: "inside".parse().unwrap(),
        rule: WorkloadRule::Netns("/run/netns/inside".into()),
        instance: None,
    });
    setup.ports = 21_500..=21_502;
    for (service, address) in [
        ("here", "127.0.0.5"),
        ("outside", "192.0.2.77"),
        ("inside", ""),
    ] {
        let registration = json!({"Name": service, "Port": port, "Address": address});
        register(&client, &registration).await;
    }
    let (mut registrar, local) = setup.registrar(client);
    assert!(registrar.look().await);
    let instances = local.instances().borrow().clone();
    let delivered = instances
        .iter()
        .map(|(service, instance)| (service.to_string(), instance.local.to_string()));
    let expected = [
        ("here", "127.0.0.5"),
        ("inside", "127.0.0.1"),
        ("outside", "192.0.2.77"),
    ]
    .map(|(service, ip)| (service.to_owned(), format!("{ip}:{port}")));
    assert_eq!(delivered.collect::<Vec<_>>(), expected);
}

#[test]
fn addresses_of_this_host_are_told_from_others() {
    for (address, expected) in [
        ("127.0.0.1", true),
        ("127.9.9.9", true),
        ("::1", true),
        ("192.0.2.77", false),
        ("2001:db8::77", false),
    ] {
        assert_eq!(
            is_of_this_host(address.parse().unwrap()),
            expected,
            "{address}"
        );
    }
}

#[tokio::test]
async fn what_failed_waits_alone() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    register(&client, &web(8080, "1")).await;
    let mut setup = Setup::with_rules(&["web"], 21_500);
    setup.ports = 21_500..=21_501;
    let (mut registrar, local) = setup.registrar(client.clone());
    assert!(registrar.look().await);
    local.listening_at([21_500, 21_501].into());
    let (service, instance) = local.instances().borrow()[0].clone();
    let failed = Plan {
        register: vec![node().registration(&service, &instance)],
        ..Plan::default()
    };
    registrar.failed = Some((Instant::now() + Duration::from_hours(1), failed));
    registrar.look().await;
    assert!(!services(&client).await.0.contains_key("sidestep-web-1"));

    let mut second = web(8081, "1");
    second["ID"] = json!("web-2");
    register(&client, &second).await;
    registrar.look().await;
    let now = services(&client).await.0;
    assert!(now.contains_key("sidestep-web-1") && now.contains_key("sidestep-web-2"));
    assert!(registrar.failed.is_none());
}
