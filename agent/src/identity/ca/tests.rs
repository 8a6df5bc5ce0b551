//! Tests of the built-in CA: its files, its certificates, what OpenSSL says of both.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Output},
};

use proptest::prelude::*;
use rustls_pki_types::pem::PemObject as _;
use tempfile::{TempDir, tempdir};
use x509_parser::{extensions::ParsedExtension, prelude::FromDer as _};

use super::*;
use crate::{
    identity::{
        clock::SystemClock,
        testing::{DAY, builtin_ca, files, id, trust_domain},
    },
    telemetry::log::chain,
};

fn with_passphrase(mut files: CaFiles, passphrase: &str) -> CaFiles {
    let path = files.key.with_extension("passphrase");
    fs::write(&path, passphrase).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    files.passphrase_file = Some(path);
    files
}

fn new_root(directory: &TempDir, name: &str) -> CaFiles {
    let files = files(directory.path(), name);
    init(&trust_domain(), &files, &SystemClock).unwrap();
    files
}

fn new_node(directory: &TempDir, root: &CaFiles, name: &str, life: Duration) -> CaFiles {
    let mut node = files(directory.path(), name);
    node.roots = vec![root.certificate.clone()];
    let name = name.parse().unwrap();
    intermediate(&trust_domain(), root, &name, &node, life, &SystemClock).unwrap();
    node
}

fn load(files: &CaFiles) -> Result<BuiltinCa, CaError> {
    BuiltinCa::load(files, trust_domain(), DAY, Arc::new(SystemClock))
}

/// The whole error of a load that must fail.
fn refusal(files: &CaFiles) -> String {
    chain(&load(files).unwrap_err()).to_string()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn openssl(arguments: &[&str]) -> Output {
    Command::new("openssl").args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_new_root_is_protected_and_is_never_overwritten() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    assert_eq!(mode(&root.key), 0o600);
    assert_eq!(mode(&root.certificate), 0o644);
    let summary = show(&root.certificate).unwrap().remove(0);
    assert_eq!(summary.uri.as_deref(), Some("spiffe://example.org"));
    assert!(summary.is_ca && summary.is_self_issued());
    let life = summary.not_after - summary.not_before;
    assert_eq!(life.whole_days(), 3650);

    let key = fs::read(&root.key).unwrap();
    let again = init(&trust_domain(), &root, &SystemClock).unwrap_err();
    assert!(
        matches!(again, CaError::File(CaFileError::Exists { .. })),
        "{again:?}"
    );
    // Neither a key alone nor a certificate alone is touched, and no half of a pair is left.
    fs::remove_file(&root.key).unwrap();
    init(&trust_domain(), &root, &SystemClock).unwrap_err();
    assert!(!root.key.exists());
    fs::write(&root.key, &key).unwrap();
    fs::remove_file(&root.certificate).unwrap();
    init(&trust_domain(), &root, &SystemClock).unwrap_err();
    assert_eq!(fs::read(&root.key).unwrap(), key);
    assert!(!root.certificate.exists());
}

#[test]
fn an_encrypted_key_needs_its_passphrase_and_opens_in_openssl() {
    let directory = tempdir().unwrap();
    let root = with_passphrase(files(directory.path(), "root"), "correct horse\n");
    init(&trust_domain(), &root, &SystemClock).unwrap();
    let pem = fs::read_to_string(&root.key).unwrap();
    assert!(pem.starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----"));
    load(&root).unwrap();

    let checked = openssl(&[
        "pkey",
        "-in",
        text(&root.key),
        "-passin",
        "pass:correct horse",
        "-check",
    ]);
    assert!(checked.status.success(), "{checked:?}");

    let without = CaFiles {
        passphrase_file: None,
        ..root.clone()
    };
    assert!(refusal(&without).contains("is encrypted: set identity.ca.passphrase_file"));
    let wrong = with_passphrase(root.clone(), "wrong");
    assert!(refusal(&wrong).contains("wrong passphrase"));
    let empty = with_passphrase(root, "\n");
    assert!(refusal(&empty).contains("holds no passphrase"));
}

#[test]
fn keys_of_openssl_load_whatever_their_form() {
    let directory = tempdir().unwrap();
    let root = files(directory.path(), "root");
    let (key, certificate) = (text(&root.key), text(&root.certificate));
    for make in [
        &[
            "ecparam",
            "-name",
            "prime256v1",
            "-genkey",
            "-noout",
            "-out",
            key,
        ][..],
        &[
            "genpkey",
            "-algorithm",
            "RSA",
            "-pkeyopt",
            "rsa_keygen_bits:2048",
            "-out",
            key,
        ],
        &["genrsa", "-traditional", "-out", key, "2048"],
    ] {
        let made = openssl(make);
        assert!(made.status.success(), "{made:?}");
        fs::set_permissions(&root.key, fs::Permissions::from_mode(0o600)).unwrap();
        let signed = openssl(&[
            "req",
            "-x509",
            "-new",
            "-key",
            key,
            "-out",
            certificate,
            "-subj",
            "/CN=made by openssl",
            "-days",
            "10",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ]);
        assert!(signed.status.success(), "{signed:?}");
        load(&root).unwrap().issue_now(&id("web")).unwrap();
    }
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    for exposed in [0o640, 0o604, 0o660, 0o602] {
        fs::set_permissions(&root.key, fs::Permissions::from_mode(exposed)).unwrap();
        let refusal = refusal(&root);
        let advice =
            format!("mode {exposed:04o}, so others than its owner can use it: run `chmod 600");
        assert!(refusal.contains(&advice), "{refusal}");
    }
    fs::set_permissions(&root.key, fs::Permissions::from_mode(0o400)).unwrap();
    load(&root).unwrap();
    let exposed = with_passphrase(root, "secret");
    let passphrase = exposed.passphrase_file.as_deref().unwrap();
    fs::set_permissions(passphrase, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(refusal(&exposed).contains("passphrase has mode 0644"));
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let other = new_root(&directory, "other");
    let node = new_node(&directory, &root, "node-a", DAY);

    let mixed = CaFiles {
        key: other.key.clone(),
        ..root.clone()
    };
    assert!(refusal(&mixed).contains("is not the one of the certificate"));
    let foreign = CaFiles {
        roots: vec![other.certificate.clone()],
        ..node.clone()
    };
    assert!(refusal(&foreign).contains("is its root among identity.ca.roots?"));
    let unrooted = CaFiles {
        roots: vec![],
        ..node
    };
    assert!(refusal(&unrooted).contains("is an intermediate: name its root"));

    let leaf = load(&root).unwrap().issue_now(&id("web")).unwrap();
    let pem = certificate::to_pem(&leaf.chain[0]).unwrap();
    fs::write(directory.path().join("leaf.pem"), pem).unwrap();
    let not_a_ca = CaFiles {
        certificate: directory.path().join("leaf.pem"),
        ..root.clone()
    };
    assert!(refusal(&not_a_ca).contains("not a CA's"));
    fs::write(&root.certificate, "nothing").unwrap();
    assert!(refusal(&root).contains("holds no certificate"));
    fs::remove_file(&root.certificate).unwrap();
    assert!(refusal(&root).ends_with("No such file or directory (os error 2)"));
}

#[test]
fn leaves_have_the_shape_of_consuls() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let node = new_node(&directory, &root, "node-a", DAY * 30);
    let leaf = load(&node).unwrap().issue_now(&id("web")).unwrap();
    assert_eq!(leaf.chain.len(), 2, "the leaf and the node's CA, no root");

    let (_, parsed) = x509_parser::parse_x509_certificate(&leaf.chain[0]).unwrap();
    let extensions: Vec<_> = parsed
        .iter_extensions()
        .map(|extension| (extension.critical, extension.parsed_extension()))
        .collect();
    assert!(extensions.iter().any(|(critical, extension)| *critical
        && matches!(extension, ParsedExtension::KeyUsage(usage) if usage.flags == 0b1_1101)));
    assert!(extensions.iter().any(|(_, extension)| matches!(extension,
        ParsedExtension::ExtendedKeyUsage(usage)
            if usage.client_auth && usage.server_auth && !usage.any && usage.other.is_empty())));
    assert!(extensions.iter().any(|(critical, extension)| *critical
        && matches!(extension, ParsedExtension::BasicConstraints(basic) if !basic.ca)));
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
    let summary = CertificateSummary::of(Path::new("leaf"), &leaf.chain[0]).unwrap();
    assert_eq!(summary.uri, Some(id("web").to_string()));
    assert_eq!(summary.subject, "CN=web.svc.default.example.org");

    let pair = ["leaf.pem", "node.pem"].map(|name| directory.path().join(name));
    for (path, certificate) in pair.iter().zip(&leaf.chain) {
        fs::write(path, certificate::to_pem(certificate).unwrap()).unwrap();
    }
    for purpose in ["sslclient", "sslserver"] {
        let verified = openssl(&[
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            text(&root.certificate),
            "-untrusted",
            text(&pair[1]),
            text(&pair[0]),
        ]);
        assert!(verified.status.success(), "{verified:?}");
    }
}

#[test]
fn a_leaf_is_backdated_and_ends_no_later_than_its_issuer() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let node = new_node(&directory, &root, "node-a", Duration::from_hours(1));
    let ca = load(&node).unwrap();
    let now = SystemTime::now();
    let leaf = ca.issue_now(&id("web")).unwrap();
    let backdate = now.duration_since(leaf.not_before).unwrap();
    assert!((59..=61).contains(&backdate.as_secs()), "{backdate:?}");
    let summary = CertificateSummary::of(Path::new("leaf"), &leaf.chain[0]).unwrap();
    assert_eq!(SystemTime::from(summary.not_after), leaf.not_after);
    assert_eq!(summary.not_after, ca.summary().not_after);
}

#[test]
fn a_nodes_ca_signs_no_further_ca() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let node = new_node(&directory, &root, "node-a", DAY);
    let mut below = new_node(&directory, &node, "node-b", DAY);
    below.roots = vec![root.certificate];
    assert!(refusal(&below).contains("is its root among identity.ca.roots?"));
}

#[tokio::test]
async fn an_expired_ca_issues_nothing() {
    let directory = tempdir().unwrap();
    let start = SystemTime::now();
    let clock = crate::identity::clock::TokioClock::starting_at(start);
    let ca = builtin_ca(directory.path(), DAY, clock);
    tokio::time::pause();
    tokio::time::advance(ROOT_LIFE + DAY).await;
    let error = ca.issue(&id("web")).await.unwrap_err();
    assert!(
        matches!(error, IssueError::AuthorityNotValid { .. }),
        "{error:?}"
    );
}

#[test]
fn a_foreign_trust_domain_is_not_served() {
    let directory = tempdir().unwrap();
    let ca = builtin_ca(directory.path(), DAY, Arc::new(SystemClock));
    let foreign = "spiffe://example.com/ns/default/dc/dc1/svc/web"
        .parse()
        .unwrap();
    let error = ca.issue_now(&foreign).unwrap_err();
    assert!(
        matches!(error, IssueError::ForeignTrustDomain { .. }),
        "{error:?}"
    );
}

/// Reads `files` again as the agent does on SIGHUP.
fn reload(ca: &BuiltinCa, files: &CaFiles) -> Result<(), CaError> {
    ca.reload(files, DAY)
}

#[test]
fn roots_are_reloaded_and_kept_if_the_new_ones_are_bad() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let next = new_root(&directory, "next");
    let ca = load(&root).unwrap();
    let mut trust = ca.trust();
    let both = CaFiles {
        roots: vec![
            root.certificate.clone(),
            next.certificate.clone(),
            root.certificate.clone(),
        ],
        ..root.clone()
    };
    reload(&ca, &both).unwrap();
    assert!(trust.has_changed().unwrap());
    let seen = trust.borrow_and_update().clone();
    assert_eq!(seen.roots.certificates().len(), 2);
    assert_eq!(seen.issuer, 0, "the same authority issues");
    reload(&ca, &both).unwrap();
    assert!(
        !trust.has_changed().unwrap(),
        "nothing changed, nobody is told"
    );
    let without_own = CaFiles {
        roots: vec![next.certificate],
        ..root
    };
    reload(&ca, &without_own).unwrap_err();
    assert_eq!(trust.borrow().roots.certificates().len(), 2);
}

#[test]
fn a_new_intermediate_signs_after_a_reload() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let old = new_node(&directory, &root, "node-a", DAY);
    let new = new_node(&directory, &root, "node-a-2", DAY * 2);
    let ca = load(&old).unwrap();
    let mut trust = ca.trust();
    ca.reload(&new, Duration::from_hours(36)).unwrap();
    assert_eq!(trust.borrow_and_update().issuer, 1);
    let new_subject = show(&new.certificate).unwrap().remove(0).subject;
    assert_eq!(ca.summary().subject, new_subject);
    let leaf = ca.issue_now(&id("web")).unwrap();
    assert_eq!(leaf.issuer, new_subject);
    let life = leaf.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(life > DAY, "{life:?} is not the new life of leaves");
    // The same files again, and only another life of leaves, are no new authority.
    reload(&ca, &new).unwrap();
    assert!(!trust.has_changed().unwrap());
}

#[test]
fn the_files_may_be_replaced_in_place() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let node = new_node(&directory, &root, "node-a", DAY);
    let new = new_node(&directory, &root, "new", DAY);
    let ca = load(&node).unwrap();
    let old_subject = ca.summary().subject;

    // Caught between the two, the agent stays as it was.
    fs::rename(&new.certificate, &node.certificate).unwrap();
    let error = reload(&ca, &node).unwrap_err();
    assert!(matches!(error, CaError::KeyMismatch { .. }), "{error:?}");
    assert_eq!(ca.issue_now(&id("web")).unwrap().issuer, old_subject);
    fs::rename(&new.key, &node.key).unwrap();
    reload(&ca, &node).unwrap();
    assert_ne!(ca.issue_now(&id("web")).unwrap().issuer, old_subject);
}

#[test]
fn a_bad_authority_is_not_taken_over() {
    let directory = tempdir().unwrap();
    let root = new_root(&directory, "root");
    let node = new_node(&directory, &root, "node-a", DAY);
    let other_root = new_root(&directory, "other");
    let other = new_node(&directory, &other_root, "other-a", DAY);
    let exposed = new_node(&directory, &root, "exposed", DAY);
    fs::set_permissions(&exposed.key, fs::Permissions::from_mode(0o644)).unwrap();
    let ca = load(&node).unwrap();
    let trust = ca.trust();
    let before = ca.summary();

    let of_another_root = CaFiles {
        roots: node.roots.clone(),
        ..other
    };
    let missing = files(directory.path(), "missing");
    let expired = new_node(&directory, &root, "expired", Duration::ZERO);
    for (files, part) in [
        (of_another_root, "is its root among identity.ca.roots?"),
        (missing, "No such file or directory"),
        (exposed, "so others than its owner can use it"),
        (expired, "is valid only from"),
    ] {
        let error = reload(&ca, &files).unwrap_err();
        let text = chain(&error).to_string();
        assert!(text.contains(part), "{text}");
    }
    assert!(!trust.has_changed().unwrap());
    assert_eq!(ca.summary(), before);
    assert_eq!(ca.issue_now(&id("web")).unwrap().issuer, before.subject);
}

#[test]
fn a_root_is_replaced_in_three_reloads() {
    let directory = tempdir().unwrap();
    let old_root = new_root(&directory, "old");
    let new_root = new_root(&directory, "new");
    let old = new_node(&directory, &old_root, "old-a", DAY);
    let new = new_node(&directory, &new_root, "new-a", DAY);
    let both = vec![old_root.certificate.clone(), new_root.certificate.clone()];
    let ca = load(&old).unwrap();
    let names = || {
        let mut roots: Vec<_> = ca.roots().into_iter().map(|root| root.subject).collect();
        roots.sort();
        roots
    };
    let [old_name, new_name] =
        [&old_root, &new_root].map(|root| show(&root.certificate).unwrap().remove(0).subject);

    let old_with_both = CaFiles {
        roots: both.clone(),
        ..old
    };
    reload(&ca, &old_with_both).unwrap();
    let mut both_names = [old_name, new_name.clone()];
    both_names.sort();
    assert_eq!(names(), both_names);
    let new_with_both = CaFiles {
        roots: both,
        ..new.clone()
    };
    reload(&ca, &new_with_both).unwrap();
    assert_eq!(names(), both_names);
    reload(&ca, &new).unwrap();
    assert_eq!(names(), [new_name]);
    assert_eq!(ca.trust().borrow().issuer, 1);
}

proptest! {
    #[test]
    fn any_file_is_answered(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        label in "(CERTIFICATE|PRIVATE KEY|EC PRIVATE KEY|ENCRYPTED PRIVATE KEY|[A-Z ]{0,12})",
        cut in 0_usize..700,
    ) {
        let directory = tempdir().unwrap();
        let root = with_passphrase(files(directory.path(), "root"), "x");
        let mut pem = pkcs8::der::pem::encode_string("CERTIFICATE", pkcs8::LineEnding::LF, &bytes).unwrap();
        pem = pem.replace("CERTIFICATE", &label);
        pem.truncate(cut);
        fs::write(&root.key, &pem).unwrap();
        fs::set_permissions(&root.key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&root.certificate, &pem).unwrap();
        let _ = show(&root.certificate);
        let passphrase = root.passphrase().unwrap();
        let _ = files::read_key(&root.key, passphrase.as_ref());
        let _ = CertificateDer::from_pem_slice(&bytes).map(|certificate| {
            crate::identity::verify::certificate_identity(&certificate)
        });
        let _ = crate::identity::verify::certificate_identity(&bytes.as_slice().into());
        let _ = x509_parser::certificate::X509Certificate::from_der(&bytes);
    }
}
