//! Tunnels with OpenSSL's command line at the other end, as a stand-in for what is not ours.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdout, Command, Stdio},
};

use pkcs8::{Document, LineEnding, SecretDocument};
use tempfile::{TempDir, tempdir};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::spawn_blocking,
};

use super::*;
use crate::telemetry::{log::chain, record::Stage};

/// The files of one service for OpenSSL.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new(root: &TestCa, identity: &SpiffeId) -> Self {
        let directory = tempdir().unwrap();
        let leaf = root.good_leaf(identity);
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let certificate = |der: &[u8]| {
            Document::try_from(der)
                .unwrap()
                .to_pem("CERTIFICATE", LineEnding::LF)
                .unwrap()
        };
        write("leaf.pem", &certificate(&leaf.chain[0]));
        write("root.pem", &certificate(&root.certificate()));
        let key = SecretDocument::try_from(leaf.key.secret_der()).unwrap();
        write(
            "leaf.key",
            &key.to_pem("PRIVATE KEY", LineEnding::LF).unwrap(),
        );
        Self { directory }
    }

    fn openssl(&self, arguments: &[&str]) -> Running {
        let mut child = Command::new("openssl")
            .args(arguments)
            .current_dir(self.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Running { child, output }
    }
}

/// A running `openssl`, ended when dropped.
struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Running {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    /// What stands behind `start` on the first line that begins so.
    fn line_after(&mut self, start: &str) -> String {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "{}", self.complaints());
            if let Some(rest) = line.trim().strip_prefix(start) {
                return rest.to_owned();
            }
        }
    }

    fn say(&mut self, text: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        input.flush().unwrap();
    }

    fn complaints(&mut self) -> String {
        let mut text = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

const OWN: [&str; 6] = [
    "-cert", "leaf.pem", "-key", "leaf.key", "-CAfile", "root.pem",
];

#[tokio::test]
async fn openssl_clients_are_served() {
    let root = TestCa::root("root");
    let server = root.workload(&id("db"), &[&root]);
    // As Envoy (1.2 only, server name, no ALPN), as Consul's built-in proxy (h2 offered on raw TCP, no
    // server name), and 1.2 with the other suites that both have.
    for options in [
        &["-tls1_2", "-servername", SERVER_NAME][..],
        &["-alpn", "h2", "-noservername"],
        &["-tls1_3", "-alpn", "h2,http/1.1"],
        &[
            "-tls1_2",
            "-cipher",
            "ECDHE-ECDSA-CHACHA20-POLY1305",
            "-noservername",
        ],
        &[
            "-tls1_2",
            "-cipher",
            "ECDHE-ECDSA-AES256-GCM-SHA384",
            "-groups",
            "P-256",
        ],
    ] {
        let (listener, address) = listen().await;
        let files = Files::new(&root, &id("web"));
        let address = address.to_string();
        let client = spawn_blocking(move || {
            let mut all = vec!["s_client", "-quiet", "-no_ign_eof", "-verify_return_error"];
            all.extend(["-connect", &address]);
            all.extend(OWN.iter().chain(options));
            let mut client = files.openssl(&all);
            client.say("ping\n");
            let answer = client.line();
            drop(client.child.stdin.take());
            let ended = client.child.wait().unwrap();
            (answer, ended.success())
        });
        let incoming = greet(listener.accept().await.unwrap().0).await.unwrap();
        let named = options.contains(&"-servername");
        let silent = options.contains(&"-noservername");
        assert!(!named || incoming.server_name().as_deref() == Some(SERVER_NAME));
        assert!(!silent || incoming.server_name().is_none());
        let (mut stream, peer) = finish(incoming, &server).await.unwrap();
        assert_eq!(peer, id("web"));
        let mut ping = [0; 5];
        stream.read_exact(&mut ping).await.unwrap();
        stream.write_all(b"pong\n").await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
        stream.shutdown().await.unwrap();
        assert_eq!(
            client.await.unwrap(),
            ("pong\n".to_owned(), true),
            "{options:?}"
        );
    }
}

#[tokio::test]
async fn old_and_weak_clients_are_not_served() {
    let root = TestCa::root("root");
    let server = root.workload(&id("db"), &[&root]);
    for options in [
        &["-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0"][..],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"],
        &["-tls1_2", "-cipher", "AES128-GCM-SHA256"],
    ] {
        let (listener, address) = listen().await;
        let files = Files::new(&root, &id("web"));
        let address = address.to_string();
        let client = spawn_blocking(move || {
            let mut all = vec!["s_client", "-connect", &address];
            all.extend(OWN.iter().chain(options));
            let mut client = files.openssl(&all);
            let complaints = client.complaints();
            (client.child.wait().unwrap().success(), complaints)
        });
        let taken = take(&listener, &server).await;
        assert!(taken.is_err(), "{options:?}");
        let (served, complaints) = client.await.unwrap();
        assert!(
            !served && complaints.contains("alert"),
            "{options:?}: {complaints}"
        );
    }
}

#[tokio::test]
async fn openssl_servers_are_called() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    // As Envoy, which picks its certificate by the name asked for, and as Consul's built-in proxy.
    let picks_by_name = [
        "-servername",
        SERVER_NAME,
        "-servername_fatal",
        "-cert2",
        "leaf.pem",
        "-key2",
        "leaf.key",
    ];
    for options in [
        &["-tls1_2"][..],
        &["-tls1_3", "-alpn", "h2"],
        &picks_by_name,
    ] {
        let options = options.to_vec();
        let said = format!("{options:?}");
        let by_name = options.contains(&"-servername");
        let files = Files::new(&root, &id("db"));
        let server = spawn_blocking(move || {
            let mut all = vec!["s_server", "-accept", "127.0.0.1:0", "-rev"];
            all.extend(["-Verify", "3", "-verify_return_error"]);
            all.extend(OWN);
            all.extend(options);
            let mut server = files.openssl(&all);
            let address = server.line_after("ACCEPT ");
            (server, files, address)
        });
        let (_server, _files, address) = server.await.unwrap();
        let address = address.parse().unwrap();
        let mut stream = open(address, &client, &id("db")).await.unwrap();
        stream.write_all(b"stressed\n").await.unwrap();
        let mut answer = [0; 9];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"desserts\n", "{said}");
        stream.shutdown().await.unwrap();

        if by_name {
            let other = "other.default.dc1.internal.example.org";
            let error = open_by_name(address, &client, &id("db"), other).await;
            let text = chain(&error.unwrap_err()).to_string();
            assert!(text.ends_with("UnrecognisedName"), "{text}");
        }

        let strangers = TestCa::root("strangers");
        let stranger = strangers.workload(&id("web"), &[&strangers, &root]);
        // It is refused either at once (1.2) or at the first read (1.3).
        match open(address, &stranger, &id("db")).await {
            Ok(stream) => drop(refusal(stream).await),
            Err(error) => assert_eq!(error.stage(), Stage::Handshake),
        }
    }
}
