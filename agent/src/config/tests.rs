//! Configuration files and what becomes of them.

use std::fs;

use super::*;

const LEAST: &str = r#"
[node]
name = "a"
[capture]
cgroups = ["/system.slice"]
[identity]
trust_domain = "example.test"
[identity.ca]
certificate = "/etc/sidestep/ca/ca.pem"
key = "/etc/sidestep/ca/ca-key.pem"
"#;

fn write(main: &str, drop_ins: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sidestep.toml");
    fs::write(&path, main).unwrap();
    for (name, text) in drop_ins {
        let file = directory.path().join("sidestep.d").join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    (directory, path)
}

fn problems(main: &str) -> Vec<String> {
    let (_directory, path) = write(main, &[]);
    let problems = load(&path)
        .expect_err("a wrong configuration was taken")
        .problems;
    problems
        .iter()
        .map(|p| format!("{}: {}", p.key, p.message))
        .collect()
}

#[test]
fn defaults_fill_the_least_configuration() {
    let (_directory, path) = write(LEAST, &[]);
    let config = load(&path).unwrap();
    let files = config.source.files().unwrap();
    assert_eq!(files.node.as_str(), "a");
    assert_eq!(config.capture.port, 15_001);
    assert_eq!(config.capture.ipv4_range.to_string(), "240.0.0.0/4");
    assert_eq!(files.default_intention, IntentionAction::Deny);
    assert_eq!(
        files.identity.ca.roots,
        [PathBuf::from("/etc/sidestep/ca/ca.pem")]
    );
    assert_eq!(config.limits.idle_timeout, None);
    assert_eq!(config.dns.listen, []);
    assert_eq!(config.dns.domain.to_string(), "consul.");
}

#[test]
fn rules_lead_to_a_port_that_only_root_may_take_unless_told_otherwise() {
    let by_rules = LEAST.replace("[capture]", "[capture]\nmode = \"iptables\"");
    for (text, port) in [
        (by_rules.clone(), 301),
        (by_rules.replace("mode =", "port = 4000\nmode ="), 4000),
    ] {
        assert_eq!(read_text(&text).unwrap().capture.port, port);
    }
}

#[test]
fn the_shipped_example_is_valid() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/sidestep.toml");
    load(&path).unwrap();
}

/// Each drop-in makes a problem that begins with the text behind it, and is itself named as its place.
fn assert_problems(table: &[(&str, &str)]) {
    for (drop_in, expected) in table {
        let (_directory, path) = write(LEAST, &[("10.toml", drop_in)]);
        let error = load(&path).expect_err(drop_in);
        let found: Vec<String> = error
            .problems
            .iter()
            .map(|p| format!("{}: {}", p.key, p.message))
            .collect();
        assert!(
            found.iter().any(|p| p.starts_with(expected)),
            "{drop_in:?} gave {found:?}"
        );
        let files = error
            .problems
            .iter()
            .all(|p| p.file.ends_with("sidestep.d/10.toml"));
        assert!(files, "{drop_in:?} blamed {:?}", error.problems);
    }
}

#[test]
fn a_value_of_the_wrong_kind_names_what_was_expected() {
    assert_problems(&[
        (
            "[capture]\nport = 70000",
            "capture.port: invalid value: integer `70000`, expected a whole number from 0 to 65535",
        ),
        (
            "[capture]\nmax_vips = -1",
            "capture.max_vips: invalid value: integer `-1`, expected a whole number from 0 to 4294967295",
        ),
        (
            "[capture]\nipv4_range = \"240.0.0.1\"",
            "capture.ipv4_range: \"240.0.0.1\": expected an IPv4 network",
        ),
        (
            "[capture]\nipv6_range = \"fd00::\"",
            "capture.ipv6_range: \"fd00::\": expected an IPv6 network",
        ),
        (
            "[node]\naddress = \"192.0.2\"",
            "node.address: \"192.0.2\": expected an IP address",
        ),
        (
            "[capture]\ncgroups = \"/mesh\"",
            "capture.cgroups: invalid type: string \"/mesh\", expected a list of paths in brackets",
        ),
        (
            "[workload]\nservice = \"web\"",
            "workload: invalid type: map, expected blocks that begin with [[workload]]",
        ),
        (
            "[tunnel]\nlisten = \"localhost\"",
            "tunnel.listen: \"localhost\": expected an IP address",
        ),
        (
            "[capture]\nprot = 1",
            "capture.prot: unknown field `prot`, expected one of",
        ),
        (
            "[tunnel]\nhbone_port = 15443",
            "tunnel.hbone_port: 15443: expected another port than tunnel.port",
        ),
        (
            "[tunnel]\nconnect_timeout = \"5\"",
            "tunnel.connect_timeout: \"5\": expected a duration",
        ),
        (
            "[limits]\nidle_timeout = 30",
            "limits.idle_timeout: invalid type: integer `30`, expected a duration in quotes",
        ),
        (
            "[telemetry]\nmetrics = \"here\"",
            "telemetry.metrics: \"here\": expected \"off\" or an address",
        ),
        (
            "[dns]\nlisten = \"8600\"",
            "dns.listen: \"8600\": expected \"off\", or an address and port",
        ),
        (
            "[dns]\nlisten = 8600",
            "dns.listen: invalid type: integer `8600`, expected \"off\", or an address and port",
        ),
        (
            "[dns]\nservice_answers = \"both\"",
            "dns.service_answers: unknown variant `both`, expected `virtual` or `instances`",
        ),
        (
            "[dns]\nupstreams = [\"dns.test\"]",
            "dns.upstreams: \"dns.test\": expected a list of name servers",
        ),
        (
            "[identity]\ntrust_domain = \"No Domain\"",
            "identity.trust_domain: ",
        ),
    ]);
}

#[test]
fn a_value_that_cannot_be_used_is_named_with_what_was_expected() {
    assert_problems(&[
        (
            "[capture]\ncgroups = []",
            "capture.cgroups: []: expected at least one cgroup",
        ),
        (
            "[capture]\ncgroups = [\"a/../b\"]",
            "capture.cgroups[0]: \"a/../b\": expected a cgroup's path",
        ),
        (
            "[capture]\ncgroups = [\"/a\\nb\"]",
            "capture.cgroups[0]: \"/a\\nb\": expected a cgroup's path",
        ),
        ("[capture]\nport = 0", "capture.port: 0: expected a port"),
        (
            "[capture]\nmode = \"nftables\"",
            "capture.mode: unknown variant `nftables`, expected one of `ebpf`",
        ),
        (
            "[capture]\nmode = \"iptables\"\ndebug = true",
            "capture.debug: true: expected false",
        ),
        (
            "[capture]\nmode = \"iptables\"\ndns = true",
            "capture.dns: true: expected false",
        ),
        (
            "[capture]\nmode = \"iptables-nft\"\nso_original_dst = true",
            "capture.so_original_dst: true: expected false",
        ),
        (
            "[node]\ndatacenter = \"d/c 1\"",
            "node.datacenter: \"d/c 1\": expected 1 to 63",
        ),
        (
            "[node]\ndatacenter = \"\"",
            "node.datacenter: \"\": expected 1 to 63",
        ),
        (
            "[capture]\nipv4_range = \"127.0.0.0/8\"",
            "capture.ipv4_range: 127.0.0.0/8: expected",
        ),
        (
            "[tunnel]\nport = 15001",
            "tunnel.port: 15001: expected another port than capture.port",
        ),
        (
            "[limits]\nworkers = 0",
            "limits.workers: 0: expected 1 to 1024",
        ),
        (
            "[limits]\nmax_connections = 0",
            "limits.max_connections: 0: expected 1 to",
        ),
        ("[telemetry]\nlog = \"=\"", "telemetry.log: \"=\": "),
        ("[telemetry]\nlog = \"loud\"", "telemetry.log: \"loud\": "),
        (
            "[telemetry]\nlog = \"info,sidestep::relay\"",
            "telemetry.log: \"info,sidestep::relay\": ",
        ),
        (
            "[node]\naddress = \"::\"",
            "node.address: ::: expected an address at which other nodes reach this one",
        ),
        (
            "[tunnel]\nlisten = \"224.0.0.1\"",
            "tunnel.listen: 224.0.0.1: expected an address of this node",
        ),
        (
            "[telemetry]\nmetrics = \"127.0.0.1:15443\"",
            "telemetry.metrics: 127.0.0.1:15443: expected another port than tunnel.port",
        ),
        (
            "[telemetry]\nmetrics = \"127.0.0.1:15001\"",
            "telemetry.metrics: 127.0.0.1:15001: expected another port than capture.port",
        ),
        (
            "[telemetry]\naccess_log = \"x\"",
            "telemetry.access_log: \"x\": expected \"off\"",
        ),
        (
            "[identity]\nleaf_ttl = \"1s\"",
            "identity.leaf_ttl: 1000 ms: expected at least",
        ),
        (
            "[agent]\ncgroup = \"/\"",
            "agent.cgroup: \"/\": expected a cgroup below the root",
        ),
    ]);
}

#[test]
fn names_that_cannot_be_answered_are_named() {
    assert_problems(&[
        (
            "[dns]\nlisten = \"0.0.0.0:53\"",
            "dns.listen: 0.0.0.0:53: expected one address of this node",
        ),
        (
            "[dns]\nlisten = \"127.0.0.1:8600\"\nupstreams = [\"127.0.0.1:8600\"]",
            "dns.upstreams: 127.0.0.1:8600: expected another name server",
        ),
        (
            "[dns]\ndomain = \".\"",
            "dns.domain: \".\": expected a domain",
        ),
        (
            "[dns]\nttl = \"2h\"",
            "dns.ttl: 7200 s: expected at most an hour",
        ),
        (
            "[dns]\nquery_log = 1.5",
            "dns.query_log: 1.5: expected a share of the queries from 0 to 1",
        ),
        (
            "[dns]\nquery_log = nan",
            "dns.query_log: NaN: expected a share of the queries from 0 to 1",
        ),
        (
            "[dns]\nquery_log = 1\n[telemetry]\naccess_log = \"off\"",
            "dns.query_log: expected telemetry.access_log to say where lines go",
        ),
    ]);
}

#[test]
fn a_rule_that_cannot_work_is_named() {
    assert_problems(&[
        (
            "[[workload]]\nservice = \"web\"",
            "workload[0]: 0 rules: expected exactly one",
        ),
        (
            "[[workload]]\nservice = \"web\"\nuser = 1\nnetns = \"/x\"",
            "workload[0]: 2 rules: expected exactly one",
        ),
        (
            "[[workload]]\nservice = \"web\"\nunit = \"a/web\"",
            "workload[0].unit: \"a/web\": expected a unit's name",
        ),
        (
            "[[workload]]\nservice = \"web\"\ncgroup = \"/mesh/web\"",
            "workload[0].cgroup: \"/mesh/web\": expected a cgroup that is or has or is below one of capture.cgroups",
        ),
        (
            "[[workload]]\nservice = \"a\"\nunit = \"web\"\n[[workload]]\nservice = \"b\"\nunit = \"web.service\"",
            "workload[1]: the same rule as workload[0]",
        ),
        (
            "[[workload]]\nservice = \"a\"\nuser = 1\n[[workload]]\nservice = \"b\"\nuser = 1",
            "workload[1]: the same rule as workload[0]",
        ),
    ]);
}

#[test]
fn what_becomes_of_calls_while_the_agent_is_away_is_read() {
    let text = "[capture]\nhung_after = \"5s\"
[[away]]\nservice = \"db\"\npolicy = \"fallback\"\nendpoint = \"192.0.2.9:5432\"
[[away]]\nservice = \"web\"\npolicy = \"open\"";
    let more = "[[away]]\nservice = \"api\"\npolicy = \"closed\"";
    let (_directory, path) = write(LEAST, &[("10.toml", text), ("20.toml", more)]);
    let config = load(&path).unwrap();
    assert_eq!(config.capture.hung_after, Some(Duration::from_secs(5)));
    let fallback = AwayPolicy::Fallback("192.0.2.9:5432".parse().unwrap());
    let expected = [
        ("db", fallback),
        ("web", AwayPolicy::Open),
        ("api", AwayPolicy::Closed),
    ];
    let expected = expected.map(|(service, policy)| (service.parse().unwrap(), policy));
    assert_eq!(config.away, expected.into());

    let off = ("10.toml", "[capture]\nhung_after = \"off\"");
    for (drop_ins, expected) in [(&[off][..], None), (&[], Some(Duration::from_secs(3)))] {
        let (_directory, path) = write(LEAST, drop_ins);
        assert_eq!(load(&path).unwrap().capture.hung_after, expected);
    }
}

#[test]
fn a_policy_that_cannot_be_is_named() {
    let fallback = |endpoint: &str| {
        format!("[[away]]\nservice = \"db\"\npolicy = \"fallback\"\nendpoint = \"{endpoint}\"")
    };
    for endpoint in [
        "240.0.0.1:80",
        "255.255.255.255:80",
        "224.0.0.1:80",
        "0.0.0.0:80",
        "[::]:80",
        "[ff02::1]:80",
        "[fe80::1]:80",
        "[::ffff:240.0.0.1]:80",
        "[fd6b:9c41:7e52::1]:80",
        "192.0.2.9:0",
        "127.0.0.1:15001",
    ] {
        let expected = format!("away[0].endpoint: {endpoint}: expected a host's address");
        assert_problems(&[(&fallback(endpoint), &expected)]);
    }
    assert_problems(&[
        (
            &fallback("db.example:80"),
            "away[0].endpoint: \"db.example:80\": expected an address and port",
        ),
        (
            "[[away]]\nservice = \"db\"\npolicy = \"fallback\"",
            "away[0]: no endpoint",
        ),
        (
            "[[away]]\nservice = \"db\"\npolicy = \"open\"\nendpoint = \"192.0.2.9:80\"",
            "away[0].endpoint: 192.0.2.9:80: expected only with",
        ),
        (
            "[[away]]\nservice = \"db\"\npolicy = \"shut\"",
            "away[0].policy: unknown variant `shut`, expected one of `closed`, `open`, `fallback`",
        ),
        (
            "[[away]]\nservice = \"db\"\npolicy = \"open\"\n[[away]]\nservice = \"db\"\npolicy = \"closed\"",
            "away[1].service: \"db\": given twice",
        ),
        (
            "[capture]\nhung_after = \"200ms\"",
            "capture.hung_after: 200 ms: expected at least 1000 ms",
        ),
        (
            "[capture]\nhung_after = \"never\"",
            "capture.hung_after: \"never\": expected \"off\" or a duration",
        ),
    ]);
}

#[test]
fn a_unit_may_be_named_in_short() {
    let rule = "[[workload]]\nservice = \"web\"\nunit = \"web\"";
    let (_directory, path) = write(LEAST, &[("10.toml", rule)]);
    let config = load(&path).unwrap();
    let rules: Vec<_> = config.workloads.into_iter().map(|w| w.rule).collect();
    assert_eq!(rules, [WorkloadRule::Unit("web.service".to_owned())]);
}

#[test]
fn everything_that_is_wrong_is_reported_at_once() {
    let text = LEAST.replace("[\"/system.slice\"]", "[]\nport = 0");
    assert_eq!(problems(&text).len(), 2);
}

#[test]
fn a_missing_file_and_bad_syntax_are_told() {
    let missing = load(Path::new("/nonexistent/sidestep.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        missing.starts_with("/nonexistent/sidestep.toml: cannot be read"),
        "{missing}"
    );
    let not_toml = problems("\n[node");
    let said = not_toml.first().unwrap();
    assert!(
        said.contains("is not TOML: line 2: ") && !said.contains('\n'),
        "{said}"
    );
}

#[test]
fn drop_ins_override_in_order_and_append_workloads() {
    let workload = |service: &str, user: u32| {
        format!("[[workload]]\nservice = \"{service}\"\nuser = {user}\n")
    };
    let (_directory, path) = write(
        &format!("{LEAST}{}", workload("web", 1)),
        &[
            ("20.toml", "[node]\ndatacenter = \"second\""),
            (
                "10.toml",
                &format!("[node]\ndatacenter = \"first\"\n{}", workload("db", 2)),
            ),
            (".hidden.toml", "nonsense"),
            ("notes.txt", "nonsense"),
        ],
    );
    let config = load(&path).unwrap();
    let files = config.source.files().unwrap();
    assert_eq!(files.datacenter, "second");
    assert_eq!(files.node.as_str(), "a");
    let services: Vec<_> = config
        .workloads
        .iter()
        .map(|w| w.service.as_str())
        .collect();
    assert_eq!(services, ["web", "db"]);
}

#[test]
fn only_what_cannot_be_reloaded_needs_a_restart() {
    let (_directory, path) = write(LEAST, &[]);
    let old = load(&path).unwrap();
    let changed = |drop_in: &str| {
        let (_directory, path) = write(LEAST, &[("10.toml", drop_in)]);
        old.needs_restart(&load(&path).unwrap())
    };
    assert_eq!(changed("[policy]\ndefault = \"allow\""), Vec::<&str>::new());
    assert_eq!(changed("[telemetry]\nlog = \"debug\""), Vec::<&str>::new());
    assert_eq!(
        changed("[identity]\nleaf_ttl = \"1h\"\n[identity.ca]\nkey = \"/new/key.pem\""),
        Vec::<&str>::new()
    );
    assert_eq!(
        changed("[identity]\ntrust_domain = \"other.test\""),
        ["identity.trust_domain"]
    );
    assert_eq!(changed("[capture]\nport = 15002"), ["capture"]);
    let away = "[capture]\nhung_after = \"off\"\n[[away]]\nservice = \"db\"\npolicy = \"open\"";
    assert_eq!(changed(away), Vec::<&str>::new());
    assert_eq!(changed("[limits]\nworkers = 77"), ["limits.workers"]);
    assert_eq!(
        changed("[limits]\nmax_connections = 7"),
        ["limits.max_connections"]
    );
}
