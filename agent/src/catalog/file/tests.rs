//! Directories of files and what becomes of them.

use std::{fs, time::Duration};

use tokio::sync::mpsc;

use super::*;
use crate::{
    catalog::model::{Health, IntentionAction, Ports, Weights},
    lifecycle::Shutdown,
};

struct Directory(tempfile::TempDir);

impl Directory {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = Self(tempfile::tempdir().unwrap());
        fs::create_dir(directory.path()).unwrap();
        for (name, text) in files {
            directory.write(name, text);
        }
        directory
    }

    /// Below the temporary directory, so that it can be replaced as a whole.
    fn path(&self) -> PathBuf {
        self.0.path().join("catalog")
    }

    fn write(&self, name: &str, text: &str) {
        let file = self.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        // As editors do: readers see the old file or the new one.
        let temporary = file.with_extension("tmp");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, file).unwrap();
    }

    fn source(&self) -> FileSource {
        FileSource::new(
            self.path(),
            FileContext {
                local_node: "here".parse().unwrap(),
                local_address: Some("192.0.2.1".parse().unwrap()),
                tunnel_port: 15_443,
            },
        )
    }
}

fn names(loaded: &Loaded) -> Vec<&str> {
    loaded
        .snapshot
        .services
        .keys()
        .map(ServiceName::as_str)
        .collect()
}

fn only_problem(loaded: &Loaded) -> &str {
    let [problem] = loaded.problems.as_slice() else {
        panic!("expected one problem: {:?}", loaded.problems)
    };
    &problem.message
}

const WEB: &str = "service: {name: web, port: 80}\n";

#[test]
fn a_definition_is_read_with_consuls_defaults() {
    let loaded = Directory::new(&[("web.yaml", WEB)]).source().load();
    assert_eq!(loaded.problems, []);
    let web = &loaded.snapshot.services[&"web".parse().unwrap()];
    let [instance] = web.instances.as_slice() else {
        panic!()
    };
    assert_eq!(instance.id.as_str(), "web");
    assert_eq!(instance.node.as_str(), "here");
    assert_eq!(instance.tunnel, "192.0.2.1:15443".parse().unwrap());
    assert_eq!(instance.local, "127.0.0.1:80".parse().unwrap());
    assert_eq!(
        (instance.health, instance.weights),
        (Health::Passing, Weights::default())
    );
    assert_eq!(web.ports, Ports::Listed(BTreeSet::from([80])));
}

#[test]
fn everything_a_definition_says_is_taken() {
    let text = r#"
node {
  name = "there"
  address = "192.0.2.2"
}
services = [
  {
    ID = "db-1"
    Name = "db"
    Port = 5432
    Tags = ["primary"]
    Meta = { Version = "15" }
    Weights = { Passing = 3 }
    Checks = [{ Status = "passing" }, { Status = "warning" }]
    TaggedAddresses = { virtual = { Address = "10.96.0.5", Port = 5433 } }
    Connect = {
      SidecarService = {
        Port = 21000
        Proxy = { LocalServiceAddress = "127.0.0.2", LocalServicePort = 5434 }
      }
    }
  }
]
"#;
    let loaded = Directory::new(&[("db.hcl", text)]).source().load();
    assert_eq!(loaded.problems, []);
    let db = &loaded.snapshot.services[&"db".parse().unwrap()];
    let instance = &db.instances[0];
    assert_eq!(instance.tunnel, "192.0.2.2:21000".parse().unwrap());
    assert_eq!(instance.local, "127.0.0.2:5434".parse().unwrap());
    assert_eq!(instance.health, Health::Warning);
    assert_eq!(
        instance.weights,
        Weights {
            passing: 3,
            warning: 1
        }
    );
    assert_eq!(instance.meta["Version"], "15");
    assert_eq!(
        db.explicit_addresses,
        BTreeSet::from(["10.96.0.5".parse().unwrap()])
    );
    assert_eq!(
        db.ports,
        Ports::Listed(BTreeSet::from([5433])),
        "a virtual port stands for the instance's"
    );
}

#[test]
fn intentions_are_read_in_the_new_and_the_old_form() {
    let new = "kind: service-intentions\nname: db\nsources:\n- {name: web, action: allow}\n- {name: '*', action: deny}\n";
    let old = r#"[{"SourceName":"web","DestinationName":"*","Action":"deny","ID":"x"}]"#;
    let directory = Directory::new(&[("new.yaml", new), ("old.json", old)]);
    let loaded = directory.source().load();
    assert_eq!(loaded.problems, []);
    let seen: Vec<String> = loaded
        .snapshot
        .intentions
        .iter()
        .map(|i| {
            format!(
                "{:?} {:?} {:?}",
                i.source.name, i.destination.name, i.action
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            "Some(\"web\") Some(\"db\") Allow",
            "None Some(\"db\") Deny",
            "Some(\"web\") None Deny"
        ]
    );
}

#[test]
fn permissions_of_requests_deny_and_say_so() {
    let text = "kind: service-intentions\nname: db\nsources:\n- {name: web, permissions: [{action: allow}]}\n";
    let loaded = Directory::new(&[("i.yaml", text)]).source().load();
    assert_eq!(loaded.snapshot.intentions[0].action, IntentionAction::Deny);
    assert!(only_problem(&loaded).contains("not supported: denied"));
    assert_eq!(loaded.problems[0].severity, Severity::Note);
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let table = [
        ("service: {name: web}", "document 1: services"),
        (
            "service: {name: web, prot: 80, port: 1}",
            "unknown field `prot`",
        ),
        (
            "service: {name: web, port: 0}",
            "service web: port: 0: expected 1 to 65535",
        ),
        (
            "service: {name: -web, port: 1}",
            "service name \"-web\": expected",
        ),
        (
            "service: {name: web, port: 1, address: web.example}",
            "host names are not resolved",
        ),
        (
            "node: {name: x}\nservice: {name: web, port: 1}",
            "the address of node x is not known",
        ),
        (
            "kind: serivce-defaults\nname: web",
            "kind: \"serivce-defaults\": expected",
        ),
        (
            "kind: service-intentions\nname: db\nsources: [{name: web}]",
            "either action or permissions",
        ),
        (
            "service: {name: web, port: 70000}",
            "service: port: invalid value: integer `70000`, expected a whole number from 0 to 65535",
        ),
        (
            "service: {name: web, port: 1, connect: {sidecar_service: {proxy: {local_service_port: 0}}}}",
            "local_service_port: 0: expected 1 to 65535",
        ),
        ("just text", "expected an object"),
        ("a: [", "; nothing of it holds"),
    ];
    for (text, expected) in table {
        let loaded = Directory::new(&[("x.yaml", text)]).source().load();
        let problem = only_problem(&loaded);
        let expected = if expected == "document 1: services" {
            "document 1: "
        } else {
            expected
        };
        assert!(problem.contains(expected), "{text:?} gave {problem:?}");
        assert!(loaded.snapshot.services.is_empty());
    }
}

#[test]
fn a_file_that_cannot_be_parsed_is_told_on_one_line() {
    let table = [
        (
            "x.yaml",
            "name: web\nservice: [",
            "unclosed bracket '[' at line 2, column 10; nothing of it holds",
        ),
        (
            "x.hcl",
            "service {\n  name = \"web\"\n",
            "invalid block body; expected `}`, newline or identifier at line 2, column 16; nothing of it holds",
        ),
        (
            "x.json",
            "{\n  \"service\": [",
            "EOF while parsing a list at line 2 column 14; nothing of it holds",
        ),
    ];
    for (name, text, expected) in table {
        let loaded = Directory::new(&[(name, text)]).source().load();
        assert_eq!(only_problem(&loaded), expected);
    }
}

#[test]
fn a_broken_file_keeps_what_it_held_and_leaves_others_alone() {
    let directory = Directory::new(&[
        ("web.yaml", WEB),
        ("db.yaml", "service: {name: db, port: 1}"),
    ]);
    let mut source = directory.source();
    source.load();
    directory.write("web.yaml", "service: {name: web");
    directory.write("db.yaml", "service: {name: db2, port: 1}");
    let loaded = source.load();
    assert_eq!(names(&loaded), ["db2", "web"]);
    assert!(only_problem(&loaded).ends_with("what it said before still holds"));
    fs::remove_file(directory.path().join("web.yaml")).unwrap();
    assert_eq!(names(&source.load()), ["db2"]);
}

#[test]
fn a_directory_that_cannot_be_listed_keeps_everything() {
    let directory = Directory::new(&[
        ("web.yaml", WEB),
        ("more/db.yaml", "service: {name: db, port: 1}"),
    ]);
    let mut source = directory.source();
    assert_eq!(names(&source.load()), ["db", "web"]);
    fs::remove_dir_all(directory.path()).unwrap();
    let loaded = source.load();
    assert_eq!(names(&loaded), ["db", "web"]);
    assert!(only_problem(&loaded).starts_with("cannot be listed"));
}

#[test]
fn files_of_editors_and_of_others_are_not_read() {
    let directory = Directory::new(&[
        (".web.yaml", "["),
        ("web.yaml~", "["),
        ("README.md", "["),
        (".git/x.yaml", "["),
        ("web.yaml", WEB),
    ]);
    let loaded = directory.source().load();
    assert_eq!(loaded.problems, []);
    assert_eq!(names(&loaded), ["web"]);
}

#[test]
fn the_first_file_to_claim_something_has_it() {
    let intentions = "kind: service-intentions\nname: web\nsources: [{name: a, action: ACTION}]\n";
    let directory = Directory::new(&[
        (
            "1.yaml",
            &format!("{WEB}---\n{}", intentions.replace("ACTION", "deny")),
        ),
        (
            "2.yaml",
            &format!("{WEB}---\n{}", intentions.replace("ACTION", "allow")),
        ),
    ]);
    let loaded = directory.source().load();
    assert_eq!(loaded.snapshot.intentions.len(), 1);
    assert_eq!(loaded.snapshot.intentions[0].action, IntentionAction::Deny);
    let messages: Vec<&str> = loaded.problems.iter().map(|p| p.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "id web on node here is taken by another service definition; this one is left out",
            "a second intention a => web is left out"
        ]
    );
    assert!(
        loaded
            .problems
            .iter()
            .all(|problem| problem.file.ends_with("2.yaml"))
    );
}

/// Publications of a watched directory.
struct Watched {
    published: mpsc::UnboundedReceiver<Loaded>,
    shutdown: Shutdown,
}

impl Watched {
    fn start(directory: &Directory) -> Self {
        let (send, published) = mpsc::unbounded_channel();
        let shutdown = Shutdown::default();
        let mut source = directory.source();
        let first = source.load();
        let publish = move |loaded: &Loaded| send.send(loaded.clone()).unwrap();
        shutdown.spawn_service("watch", source.watch(first, shutdown.clone(), publish));
        Self {
            published,
            shutdown,
        }
    }

    async fn next(&mut self) -> Loaded {
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, self.published.recv())
            .await
            .expect("nothing published")
            .unwrap()
    }

    async fn until(&mut self, expected: &[&str]) {
        while names(&self.next().await) != expected {}
    }
}

#[tokio::test]
async fn changes_are_published_and_the_watch_ends_at_shutdown() {
    let directory = Directory::new(&[("web.yaml", WEB)]);
    let mut watched = Watched::start(&directory);
    directory.write("db.yaml", "service: {name: db, port: 1}");
    watched.until(&["db", "web"]).await;
    directory.write("new/deep/x.yaml", "service: {name: x, port: 1}");
    watched.until(&["db", "web", "x"]).await;
    fs::remove_file(directory.path().join("db.yaml")).unwrap();
    watched.until(&["web", "x"]).await;
    assert_eq!(
        watched.shutdown.run("test", Duration::from_secs(20)).await,
        0
    );
}

#[tokio::test]
async fn a_directory_that_is_replaced_is_followed() {
    let directory = Directory::new(&[("web.yaml", WEB)]);
    let mut watched = Watched::start(&directory);
    fs::rename(directory.path(), directory.0.path().join("old")).unwrap();
    directory.write("db.yaml", "service: {name: db, port: 1}");
    watched.until(&["db"]).await;
    directory.write("web.yaml", WEB);
    watched.until(&["db", "web"]).await;
}

#[tokio::test]
async fn a_burst_of_changes_is_published_as_one_snapshot() {
    let directory = Directory::new(&[]);
    let mut watched = Watched::start(&directory);
    for n in 0..50 {
        directory.write(
            &format!("{n:02}.yaml"),
            &format!("service: {{name: s{n:02}, port: 1}}"),
        );
    }
    let mut publications = 0;
    loop {
        publications += 1;
        if watched.next().await.snapshot.services.len() == 50 {
            break;
        }
    }
    assert!(
        publications <= 2,
        "{publications} publications of one burst"
    );
}

const API: &str = "kind: service-defaults\nname: api\nprotocol: tcp\n\
                   destination: { addresses: [API.example.com.], port: 443 }\n";

fn destination(loaded: &Loaded, name: &str) -> Option<String> {
    let service = &loaded.snapshot.services[&name.parse().unwrap()];
    service.destination().map(ToString::to_string)
}

#[test]
fn a_service_outside_the_mesh_is_read_in_every_spelling() {
    let json = r#"{"Kind": "service-defaults", "Name": "api", "Protocol": "tcp",
                   "Destination": {"Addresses": ["api.example.com"], "Port": 443}}"#;
    let hcl = "Kind = \"service-defaults\"\nName = \"api\"\nProtocol = \"tcp\"\n\
               Destination {\n  Addresses = [\"api.example.com\"]\n  Port = 443\n}\n";
    for (file, text) in [("api.yaml", API), ("api.json", json), ("api.hcl", hcl)] {
        let loaded = Directory::new(&[(file, text)]).source().load();
        assert_eq!(loaded.problems, [], "{file}");
        let api = &loaded.snapshot.services[&"api".parse().unwrap()];
        assert_eq!(destination(&loaded, "api").unwrap(), "api.example.com:443");
        assert_eq!(api.ports, Ports::Listed([443].into()));
        assert!(api.explicit_addresses.is_empty() && api.instances.is_empty());
    }
    let addresses = "kind: service-defaults\nname: legacy\n\
                     destination: { addresses: [192.0.2.7, \"2001:db8::7\"], port: 5432 }\n";
    let loaded = Directory::new(&[("legacy.yaml", addresses)])
        .source()
        .load();
    let legacy = &loaded.snapshot.services[&"legacy".parse().unwrap()];
    let expected = ["192.0.2.7", "2001:db8::7"].map(|a| a.parse().unwrap());
    assert_eq!(legacy.explicit_addresses, expected.into());
    assert_eq!(legacy.ports, Ports::Listed([5432].into()));
}

#[test]
fn a_destination_that_cannot_be_is_told_with_its_place() {
    let table = [
        (
            "destination: { addresses: [\"*.example.com\"], port: 443 }",
            "document 1: service-defaults api: destination.addresses: \"*.example.com\"",
        ),
        (
            "destination: { addresses: [a.test, b.test], port: 443 }",
            "each host name is a service of its own",
        ),
        (
            "destination: { addresses: [127.0.0.1], port: 443 }",
            "127.0.0.1: expected a unicast address",
        ),
        (
            "destination: { addresses: [a.test], port: 0 }",
            "destination.port: 0: expected 1 to 65535",
        ),
        (
            "destination: { addresses: [a.test] }",
            "missing field `port`",
        ),
        (
            "destination: { adresses: [a.test], port: 443 }",
            "unknown field `adresses`",
        ),
    ];
    for (text, expected) in table {
        let file = format!("kind: service-defaults\nname: api\n{text}\n");
        let loaded = Directory::new(&[("api.yaml", &file)]).source().load();
        let problem = only_problem(&loaded);
        assert!(problem.contains(expected), "{text}: {problem}");
        assert!(loaded.snapshot.services.is_empty());
    }
}

#[test]
fn two_services_cannot_have_one_host_nor_one_be_inside_and_outside() {
    let other = API.replace("name: api", "name: other");
    let loaded = Directory::new(&[("a.yaml", API), ("b.yaml", &other)])
        .source()
        .load();
    assert!(loaded.problems[0].file.ends_with("b.yaml"));
    assert_eq!(
        only_problem(&loaded),
        "service-defaults other: api.example.com is the destination of api: its destination is left out"
    );
    assert!(destination(&loaded, "api").is_some());
    assert_eq!(destination(&loaded, "other"), None);

    let again = Directory::new(&[("a.yaml", API), ("b.yaml", API)])
        .source()
        .load();
    assert!(only_problem(&again).contains("a second service-defaults for api"));

    let inside = "service: {name: api, port: 80}\n";
    let loaded = Directory::new(&[("a.yaml", API), ("b.yaml", inside)])
        .source()
        .load();
    assert_eq!(
        only_problem(&loaded),
        "service-defaults api: the service has instances: its destination is left out"
    );
    assert_eq!(destination(&loaded, "api"), None);
    let api = &loaded.snapshot.services[&"api".parse().unwrap()];
    assert_eq!(api.ports, Ports::Listed([80].into()));
}
