//! A peer that speaks TLS by itself, as a Connect-native application does, in every way that is allowed.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{
    envoy::Identity,
    node::Node,
    program::{Program, Running},
    wait::{SOON, wait_for},
};

const SCRIPT: &str = include_str!("tls_client.py");

/// A client on a node with a certificate of its own.
#[derive(Debug, Clone)]
pub struct TlsClient {
    program: Program,
    directory: PathBuf,
    version: &'static str,
    server_name: Option<String>,
    protocols: Vec<&'static str>,
}

/// What a client saw.
#[derive(Debug, Clone)]
pub struct Seen {
    /// How far it came: `connect`, `handshake`, `data`.
    pub stage: String,
    /// How that ended: `data`, `end of stream`, or an error's name.
    pub end: String,
    /// What the server said first.
    pub said: String,
    /// Who the server is by its certificate.
    pub uri: Option<String>,
    /// The version of TLS that was agreed on.
    pub version: Option<String>,
}

impl TlsClient {
    /// The client `name` on `node`, as `identity`: TLS 1.3 with neither server name nor ALPN.
    ///
    /// # Errors
    /// If its files cannot be written.
    pub fn new(node: &Node, name: &str, identity: &Identity) -> Result<Self> {
        let directory = node.directory().join(format!("tls-{name}"));
        fs::create_dir_all(&directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let files = [
            ("chain.pem", &identity.leaf.chain),
            ("key.pem", &identity.leaf.key),
            ("roots.pem", &identity.roots),
        ];
        for (file, text) in files {
            let file = directory.join(file);
            fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        }
        Ok(Self {
            program: node.tool("python3")?,
            directory,
            version: "1.3",
            server_name: None,
            protocols: vec![],
        })
    }

    /// The same with TLS 1.2 and nothing newer.
    #[must_use]
    pub fn tls12(mut self) -> Self {
        self.version = "1.2";
        self
    }

    /// The same with a server name.
    #[must_use]
    pub fn server_name(mut self, name: &str) -> Self {
        self.server_name = Some(name.to_owned());
        self
    }

    /// The same with an offer of ALPN.
    #[must_use]
    pub fn alpn(mut self, protocol: &'static str) -> Self {
        self.protocols.push(protocol);
        self
    }

    /// Connects to `address` and reads what the server says first, without a word before.
    ///
    /// # Errors
    /// If the client itself fails.
    pub fn read(&self, address: SocketAddr) -> Result<Seen> {
        let said = self.program(address, false).run(SOON + SOON)?;
        seen(&said)
    }

    /// Exchanges bytes with an echo server at `address` until that ends. Returns when it goes.
    ///
    /// # Errors
    /// If it does not come to an exchange.
    pub fn live(&self, address: SocketAddr) -> Result<Live> {
        let log = self.directory.join("live.log");
        let running = self.program(address, true).log(&log).spawn()?;
        wait_for("a live connection", SOON, || {
            fs::read_to_string(&log).is_ok_and(|said| said.starts_with("up"))
        })
        .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        Ok(Live { running, log })
    }

    fn program(&self, address: SocketAddr, live: bool) -> Program {
        let file = |name: &str| self.directory.join(name);
        let order = json!({
            "host": address.ip(),
            "port": address.port(),
            "chain": file("chain.pem"),
            "key": file("key.pem"),
            "roots": file("roots.pem"),
            "tls": self.version,
            "server_name": self.server_name,
            "alpn": self.protocols,
            "live": live,
        });
        let program = self.program.clone().args(["-c", SCRIPT]);
        program.arg(order.to_string())
    }
}

/// A connection that goes on; ended when dropped.
#[derive(Debug)]
pub struct Live {
    running: Running,
    log: PathBuf,
}

impl Live {
    /// Whether it goes on.
    ///
    /// # Errors
    /// If its process is lost.
    pub fn lives(&mut self) -> Result<bool> {
        Ok(self.running.ended()?.is_none())
    }

    /// Waits for its end. Returns what the client saw; `None` if it goes on.
    ///
    /// # Errors
    /// If its process is lost.
    pub fn end(&mut self) -> Result<Option<Seen>> {
        if self.running.wait(SOON)?.is_none() {
            return Ok(None);
        }
        last_line(&self.log).map(Some)
    }
}

fn last_line(log: &Path) -> Result<Seen> {
    let said = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    seen(said.lines().last().unwrap_or_default())
}

fn seen(said: &str) -> Result<Seen> {
    let report: Value = serde_json::from_str(said).with_context(|| format!("reading {said:?}"))?;
    let text = |key: &str| report.get(key).and_then(Value::as_str).map(str::to_owned);
    Ok(Seen {
        stage: text("stage").unwrap_or_default(),
        end: text("end").unwrap_or_default(),
        said: text("said").unwrap_or_default(),
        uri: text("uri"),
        version: text("version"),
    })
}
