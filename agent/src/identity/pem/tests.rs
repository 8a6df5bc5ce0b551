//! Tests with what OpenSSL makes, put to use in real handshakes.

use std::{fs, path::PathBuf, process::Command, sync::Arc, time::Duration};

use tempfile::{TempDir, tempdir};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::Instant,
};

use super::*;
use crate::{
    identity::{
        clock::SystemClock,
        provider::{IssueError, TrustBundle},
        spiffe::SpiffeId,
        testing::{id, trust_domain},
        workload_tls::WorkloadTls,
    },
    telemetry::log::chain,
    tunnel::connect::{Incoming, dial},
};

/// A kind of key, made by `openssl genpkey` with these options and written in this form.
struct Kind {
    algorithm: &'static str,
    option: &'static str,
    /// `openssl pkey`'s option for the old form, SEC1 or PKCS#1; `None` is PKCS#8.
    form: Option<&'static str>,
    begins: &'static str,
}

const KINDS: [Kind; 6] = [
    Kind {
        algorithm: "EC",
        option: "ec_paramgen_curve:P-256",
        form: Some("-traditional"),
        begins: "-----BEGIN EC PRIVATE KEY",
    },
    Kind {
        algorithm: "EC",
        option: "ec_paramgen_curve:P-384",
        form: Some("-traditional"),
        begins: "-----BEGIN EC PRIVATE KEY",
    },
    Kind {
        algorithm: "EC",
        option: "ec_paramgen_curve:P-384",
        form: None,
        begins: "-----BEGIN PRIVATE KEY",
    },
    Kind {
        algorithm: "EC",
        option: "ec_paramgen_curve:P-521",
        form: None,
        begins: "-----BEGIN PRIVATE KEY",
    },
    Kind {
        algorithm: "RSA",
        option: "rsa_keygen_bits:2048",
        form: Some("-traditional"),
        begins: "-----BEGIN RSA PRIVATE KEY",
    },
    Kind {
        algorithm: "RSA",
        option: "rsa_keygen_bits:3072",
        form: None,
        begins: "-----BEGIN PRIVATE KEY",
    },
];

/// CAs without a SPIFFE URI, made by OpenSSL as Vault's are: only a name.
struct Authorities(TempDir);

impl Authorities {
    fn new() -> Self {
        Self(tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn openssl(&self, arguments: &[&str]) {
        let output = Command::new("openssl")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
    }

    fn key(&self, name: &str, kind: &Kind) {
        let file = format!("{name}.key");
        let (algorithm, option) = (kind.algorithm, kind.option);
        self.openssl(&[
            "genpkey",
            "-algorithm",
            algorithm,
            "-pkeyopt",
            option,
            "-out",
            &file,
        ]);
        if let Some(form) = kind.form {
            self.openssl(&["pkey", form, "-in", &file, "-out", "traditional"]);
            fs::rename(self.path("traditional"), self.path(&file)).unwrap();
        }
        assert!(self.read(&file).starts_with(kind.begins), "{algorithm}");
    }

    fn root(&self, name: &str, kind: &Kind) {
        self.key(name, kind);
        let (key, certificate) = (format!("{name}.key"), format!("{name}.pem"));
        let subject = format!("/CN={name}");
        self.openssl(&[
            "req",
            "-x509",
            "-new",
            "-key",
            &key,
            "-out",
            &certificate,
            "-subj",
            &subject,
            "-days",
            "2",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        ]);
    }

    /// Certifies the key of `name` by `issuer`, into `file`.
    fn sign(&self, name: &str, issuer: &str, extensions: &str, file: &str) {
        fs::write(self.path("extensions"), extensions).unwrap();
        let (key, subject) = (format!("{name}.key"), format!("/CN={name}"));
        let [ca, ca_key] = [format!("{issuer}.pem"), format!("{issuer}.key")];
        self.openssl(&[
            "req", "-new", "-key", &key, "-subj", &subject, "-out", "request",
        ]);
        self.openssl(&[
            "x509",
            "-req",
            "-in",
            "request",
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-extfile",
            "extensions",
            "-days",
            "1",
            "-out",
            file,
        ]);
    }

    fn intermediate(&self, name: &str, issuer: &str, kind: &Kind) {
        self.key(name, kind);
        self.cross_sign(name, issuer, &format!("{name}.pem"));
    }

    /// Another certificate for the CA `name`, by `issuer`.
    fn cross_sign(&self, name: &str, issuer: &str, file: &str) {
        let extensions = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign";
        self.sign(name, issuer, extensions, file);
    }

    /// What an authority would answer for `service`: a leaf by `issuer`, then the certificates `above`.
    fn leaf(&self, service: &str, issuer: &str, kind: &Kind, above: &[&str]) -> Leaf {
        self.key(service, kind);
        let extensions = format!(
            "subjectAltName=URI:{}\nextendedKeyUsage=clientAuth,serverAuth\n\
             basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature",
            id(service)
        );
        let file = format!("{service}.pem");
        self.sign(service, issuer, &extensions, &file);
        let mut text = self.read(&file);
        for further in above {
            text.push_str(&self.read(&format!("{further}.pem")));
        }
        let read = leaf(&text, &self.read(&format!("{service}.key"))).unwrap();
        assert_eq!(read.chain.len(), 1 + above.len(), "sent whole");
        assert_eq!(read.issuer, format!("CN={issuer}"));
        read
    }

    fn bundle(&self, roots: &[&str]) -> Arc<TrustBundle> {
        let read = |name: &&str| certificates(&self.read(&format!("{name}.pem"))).unwrap();
        let roots = roots.iter().flat_map(read);
        Arc::new(TrustBundle::new(trust_domain(), roots).unwrap())
    }

    fn workload(
        &self,
        service: &str,
        leaf: &Leaf,
        roots: &[&str],
    ) -> Result<WorkloadTls, IssueError> {
        let roots = self.bundle(roots);
        WorkloadTls::new(id(service), leaf, roots, Arc::new(SystemClock))
            .map_err(IssueError::unusable)
    }
}

/// Has `client` call `server`, and a byte come back. Returns whom the server saw.
async fn call(client: &WorkloadTls, server: &WorkloadTls) -> Result<SpiffeId, String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limit = Duration::from_secs(10);
    let calling = async {
        let dialled = dial(address, limit).await.unwrap();
        let name = "db.default.dc1.internal.example.org".to_owned();
        let opened = dialled.handshake(name, server.identity(), client, limit);
        let mut stream = opened.await.map_err(|error| chain(&error).to_string())?;
        let mut byte = [0];
        let read = stream.read_exact(&mut byte).await;
        read.map(|_| ()).map_err(|error| error.to_string())
    };
    let serving = async {
        let (stream, _) = listener.accept().await.unwrap();
        let deadline = Instant::now() + limit;
        let incoming = Incoming::read_hello(stream, deadline).await.unwrap();
        let taken = incoming.handshake(server, deadline).await;
        let (mut stream, peer) = taken.map_err(|error| chain(&error).to_string())?;
        stream.write_all(b"!").await.unwrap();
        stream.shutdown().await.unwrap();
        Ok(peer)
    };
    let (called, served) = tokio::join!(calling, serving);
    called?;
    served
}

#[tokio::test]
async fn every_kind_of_key_and_chain_makes_a_tunnel() {
    for (index, kind) in KINDS.iter().enumerate() {
        let authorities = Authorities::new();
        authorities.root("root", kind);
        // Each kind certifies the next one too.
        let next = &KINDS[(index + 1) % KINDS.len()];
        authorities.intermediate("upper", "root", next);
        authorities.intermediate("lower", "upper", kind);
        let db = authorities.leaf("db", "lower", kind, &["lower", "upper"]);
        let web = authorities.leaf("web", "root", next, &[]);
        let db = authorities.workload("db", &db, &["root"]).unwrap();
        let web = authorities.workload("web", &web, &["root"]).unwrap();
        assert_eq!(call(&web, &db).await, Ok(id("web")), "{}", kind.option);
        assert_eq!(call(&db, &web).await, Ok(id("db")), "{}", kind.option);
    }
}

#[tokio::test]
async fn a_peer_that_knows_the_old_root_only_follows_the_cross_signed_one() {
    let authorities = Authorities::new();
    let [p256, rsa] = [&KINDS[0], &KINDS[4]];
    authorities.root("old", p256);
    authorities.root("new", rsa);
    authorities.cross_sign("new", "old", "new-by-old.pem");

    let late = authorities.leaf("late", "old", p256, &[]);
    let late = authorities.workload("late", &late, &["old"]).unwrap();
    let crossed = authorities.leaf("db", "new", p256, &["new-by-old"]);
    let crossed = authorities
        .workload("db", &crossed, &["old", "new"])
        .unwrap();
    assert_eq!(call(&late, &crossed).await, Ok(id("late")));
    assert_eq!(call(&crossed, &late).await, Ok(id("db")));

    // Without it they do not meet: it is the intermediate that does it.
    let alone = authorities.leaf("db", "new", p256, &[]);
    let alone = authorities.workload("db", &alone, &["old", "new"]).unwrap();
    let error = call(&late, &alone).await.unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
}

#[test]
fn what_peers_would_refuse_is_not_taken_into_use() {
    let authorities = Authorities::new();
    let kind = &KINDS[0];
    authorities.root("root", kind);
    authorities.root("other", kind);
    authorities.intermediate("middle", "root", kind);
    let refusal = |service: &str, leaf: &Leaf, roots: &[&str]| {
        let refused = authorities.workload(service, leaf, roots).unwrap_err();
        chain(&refused).to_string()
    };
    let whole = authorities.leaf("db", "middle", kind, &["middle"]);
    authorities
        .workload("db", &whole, &["other", "root"])
        .unwrap();
    let said = refusal("db", &whole, &["other"]);
    assert!(said.contains("UnknownIssuer"), "{said}");
    let said = refusal("web", &whole, &["root"]);
    assert!(said.contains("svc/db, expected spiffe://"), "{said}");

    let cut = authorities.leaf("db", "middle", kind, &[]);
    let said = refusal("db", &cut, &["root"]);
    assert!(said.contains("UnknownIssuer"), "{said}");

    // The key of another certificate.
    let chain_text = authorities.read("db.pem");
    let other_key = authorities.read("middle.key");
    let swapped = leaf(&chain_text, &other_key).unwrap();
    let said = refusal("db", &swapped, &["root"]);
    assert!(
        said.contains("the issued certificate cannot be used"),
        "{said}"
    );
}

#[test]
fn what_is_no_leaf_is_told() {
    let authorities = Authorities::new();
    authorities.root("root", &KINDS[0]);
    let [certificate, key] = ["root.pem", "root.key"].map(|name| authorities.read(name));
    let said = |chain: &str, key: &str| leaf(chain, key).unwrap_err().to_string();
    let no_certificate = "there is no certificate (-----BEGIN CERTIFICATE-----)";
    let no_key = "there is no private key in PEM (PKCS#8, SEC1 or PKCS#1)";
    assert_eq!(said("", &key), no_certificate);
    assert_eq!(said(&key, &key), no_certificate);
    assert_eq!(said(&certificate, ""), no_key);
    assert_eq!(said(&certificate, &certificate), no_key);
    let cut: String = certificate.chars().take(certificate.len() / 2).collect();
    assert_eq!(said(&cut, &key), "the certificates are not PEM");
    let not_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert_eq!(said(not_der, &key), "the certificate is malformed");

    // As `openssl ecparam -genkey` writes keys.
    let parameters =
        "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n";
    leaf(&certificate, &format!("{parameters}{key}")).unwrap();
}
