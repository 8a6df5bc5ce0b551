//! What the commands that need no running agent say and return.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "an integration test is a test module, its support included"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use tempfile::{TempDir, tempdir};

/// Runs `sidestep` in `directory`.
fn sidestep(directory: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sidestep"))
        .args(arguments.split(' '))
        .current_dir(directory)
        .output()
        .unwrap()
}

fn good(directory: &Path, arguments: &str) -> String {
    let output = sidestep(directory, arguments);
    assert!(output.status.success(), "{arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// It ends with `status` and says `expected` on standard error.
#[track_caller]
fn bad(directory: &Path, arguments: &str, status: i32, expected: &str) {
    let output = sidestep(directory, arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments}: {said}");
    assert!(said.contains(expected), "{arguments}: {said}");
}

fn with_root() -> TempDir {
    let directory = tempdir().unwrap();
    good(directory.path(), "ca init --trust-domain example.test");
    directory
}

#[test]
fn an_intermediate_belongs_to_the_trust_domain_of_its_root() {
    let directory = with_root();
    bad(
        directory.path(),
        "ca intermediate --node a --trust-domain other.test",
        64,
        "--trust-domain other.test: ./root.pem is the root of spiffe://example.test",
    );
    assert!(!directory.path().join("a.pem").exists());
    let made = good(
        directory.path(),
        "ca intermediate --node a --trust-domain example.test",
    );
    assert!(made.contains("uri spiffe://example.test\n"), "{made}");
    assert_eq!(good(directory.path(), "ca show a.pem"), made);
}

#[test]
fn a_ca_command_that_fails_says_what_to_do() {
    let directory = with_root();
    let node = "ca intermediate --trust-domain example.test --node a";
    bad(directory.path(), &format!("{node} --days 0"), 64, "--days");
    bad(
        directory.path(),
        "ca init --trust-domain example.test --directory root.pem/x",
        1,
        "writing root.pem/x failed: Not a directory",
    );

    let passphrase = directory.path().join("passphrase");
    fs::write(&passphrase, "secret").unwrap();
    fs::set_permissions(&passphrase, fs::Permissions::from_mode(0o600)).unwrap();
    good(
        directory.path(),
        "ca init --trust-domain example.test --directory locked --passphrase-file passphrase",
    );
    bad(
        directory.path(),
        &format!("{node} --directory locked"),
        1,
        "locked/root-key.pem is encrypted: give --root-passphrase-file",
    );
    good(
        directory.path(),
        &format!("{node} --directory locked --root-passphrase-file passphrase"),
    );
}

/// A configuration whose files are all below `directory`.
fn with_configuration() -> TempDir {
    let directory = with_root();
    let place = directory.path().display();
    let text = format!(
        "[node]\nname = \"a\"\naddress = \"192.0.2.1\"\nstate_dir = \"{place}/state\"\n\
         [capture]\ncgroups = [\"/mesh\"]\n[catalog]\ndirectory = \"{place}/catalog\"\n\
         [identity]\ntrust_domain = \"example.test\"\n[identity.ca]\n\
         certificate = \"{place}/root.pem\"\nkey = \"{place}/root-key.pem\"\n"
    );
    fs::write(directory.path().join("sidestep.toml"), text).unwrap();
    fs::create_dir(directory.path().join("catalog")).unwrap();
    directory
}

#[test]
fn validate_finds_an_address_that_two_services_claim() {
    let directory = with_configuration();
    let service = |name: &str, address: &str| {
        let file = directory
            .path()
            .join("catalog")
            .join(format!("{name}.yaml"));
        let text = format!(
            "service: {{name: {name}, port: 80, tagged_addresses: {{virtual: {{address: {address}}}}}}}"
        );
        fs::write(file, text).unwrap();
    };
    service("api", "240.0.0.5");
    service("web", "240.0.0.6");
    good(directory.path(), "validate --config sidestep.toml");
    service("web", "240.0.0.5");
    bad(
        directory.path(),
        "validate --config sidestep.toml",
        1,
        "services api and web both claim the address 240.0.0.5: api has it",
    );
    assert!(!directory.path().join("state").exists());
}

#[test]
fn check_tries_the_certificates() {
    let directory = with_configuration();
    let finding = || {
        let output = sidestep(directory.path(), "check --config sidestep.toml");
        let said = String::from_utf8(output.stdout).unwrap();
        let line = said
            .lines()
            .find(|line| line.contains("certificate authority"));
        line.unwrap().to_owned()
    };
    let found = finding();
    assert!(
        found.starts_with("ok    certificate authority: "),
        "{found}"
    );
    let key = directory.path().join("root-key.pem");
    fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    let found = finding();
    assert!(
        found.starts_with("FAIL  certificate authority: "),
        "{found}"
    );
    assert!(found.contains("root-key.pem has mode 0644"), "{found}");
}
