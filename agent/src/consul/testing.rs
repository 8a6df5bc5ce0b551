//! A real Consul for tests, on ports of its own.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{Client, ClientSettings, ConsulAddress, Request};

/// A Consul in development mode; ends when dropped.
pub(crate) struct RealConsul {
    child: Child,
    program: PathBuf,
    pub(crate) port: u16,
    pub(crate) directory: TempDir,
}

impl Drop for RealConsul {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program: where `PATH` has it, or where `cargo xtask` puts it.
pub(crate) fn program() -> Option<PathBuf> {
    let unpacked = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/fetched/consul");
    let installed = ["/usr/local/bin/consul", "/usr/bin/consul", unpacked];
    installed
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

impl RealConsul {
    /// `None`, with a word, if this machine has no Consul. `extra` is configuration in JSON.
    pub(crate) async fn start(extra: serde_json::Value) -> Option<Self> {
        let Some(program) = program() else {
            println!("skipped: no program `consul`");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        // Held together, so that they differ; free again when Consul takes them.
        let held: Vec<TcpListener> = (0..5)
            .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
            .collect();
        let ports: Vec<u16> = held
            .iter()
            .map(|listener| listener.local_addr().unwrap().port())
            .collect();
        drop(held);
        let mut config = serde_json::json!({
            "node_name": "node1",
            "bind_addr": "127.0.0.1",
            "ports": {"http": ports[0], "server": ports[1], "serf_lan": ports[2], "serf_wan": ports[3],
                "grpc": ports[4], "dns": -1, "https": -1},
            "limits": {"http_max_conns_per_client": 1000},
        });
        let all = config.as_object_mut().unwrap();
        all.extend(extra.as_object().unwrap().clone());
        let file = directory.path().join("consul.json");
        fs::write(&file, config.to_string()).unwrap();
        let consul = Self {
            child: spawn(&program, &directory),
            program,
            port: ports[0],
            directory,
        };
        consul.leads().await;
        Some(consul)
    }

    /// As a machine that goes down.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Another one in the place of one that was killed. It knows nothing.
    pub(crate) async fn restart(&mut self) {
        self.child = spawn(&self.program, &self.directory);
        self.leads().await;
    }

    /// Waits until it serves.
    async fn leads(&self) {
        let client = self.client();
        let leads = || async {
            let leader = client
                .get::<String>(&Request::to(&["v1", "status", "leader"]))
                .await;
            leader.is_ok_and(|answer| !answer.body.is_empty())
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !leads().await {
            let log = fs::read_to_string(self.directory.path().join("log")).unwrap();
            assert!(Instant::now() < deadline, "Consul has no leader:\n{log}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn settings(&self) -> ClientSettings {
        ClientSettings::anonymous(ConsulAddress::Http {
            host: "127.0.0.1".to_owned(),
            port: self.port,
        })
    }

    /// Without a token.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.settings())
    }

    /// With a token of its own file, named `name`.
    pub(crate) fn client_with(&self, name: &str, token: &str) -> Client {
        let token_file = self.directory.path().join(name);
        fs::write(&token_file, token).unwrap();
        Client::new(ClientSettings {
            token_file: Some(token_file),
            ..self.settings()
        })
    }
}

fn spawn(program: &Path, directory: &TempDir) -> Child {
    let log = fs::File::create(directory.path().join("log")).unwrap();
    Command::new(program)
        .args(["agent", "-dev", "-config-file"])
        .arg(directory.path().join("consul.json"))
        .stdout(log)
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// A service with a proxy, as `connect { sidecar_service {} }` makes it.
pub(crate) fn with_sidecar(name: &str, port: u16, sidecar_port: u16) -> serde_json::Value {
    serde_json::json!({
        "Name": name, "ID": format!("{name}-1"), "Port": port, "Meta": {"version": "1"},
        "Connect": {"SidecarService": {"Port": sidecar_port, "Checks": [{"TTL": "1h", "Status": "passing"}]}},
    })
}

/// Registers it.
pub(crate) async fn register(client: &Client, service: &serde_json::Value) {
    let request = Request::to(&["v1", "agent", "service", "register"]);
    client.put(&request, service).await.unwrap();
}
