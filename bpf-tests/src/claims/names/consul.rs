//! The real Consul's DNS beside ours, over the same services.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

use serde_json::json;

use super::{dns, with_resolv_conf, write_resolv_conf};
use crate::{
    claims::{Finding, Size},
    consul::ConsulMesh,
    lab::Lab,
    mesh::local,
    node::Node,
    services,
    wait::{SOON, wait_for, wait_for_value},
};

/// Service definitions that both read.
const SERVICES: &str = r#"[
{"id":"web-1","name":"web","port":8081,"tags":["v1","blue"],"checks":[{"name":"c","ttl":"1h","status":"passing"}],"weights":{"passing":5,"warning":2}},
{"id":"web-2","name":"web","port":8082,"address":"192.0.2.12","tags":["v2"],"checks":[{"name":"c","ttl":"1h","status":"passing"}]},
{"id":"web-3","name":"web","port":8083,"address":"192.0.2.13","tags":["v2"],"checks":[{"name":"c","ttl":"1h","status":"critical"}]},
{"id":"web-4","name":"web","port":8084,"address":"192.0.2.14","tags":["v4"],"checks":[{"name":"c","ttl":"1h","status":"warning"}],"weights":{"passing":7,"warning":3}},
{"id":"six-1","name":"six","port":9001,"address":"2001:db8::6","tags":["v1"]},
{"id":"both-1","name":"both","port":9002,"address":"192.0.2.21"},
{"id":"both-2","name":"both","port":9003,"address":"2001:db8::21"},
{"id":"down-1","name":"down","port":9004,"checks":[{"name":"c","ttl":"1h","status":"critical"}]},
{"id":"Big-1","name":"Big","port":9005,"tags":["Tag"]}
]"#;

/// What is asked, and whether answers are the same; if they differ on purpose, why.
const FORMS: &[(&str, Option<&str>)] = &[
    ("web.service.consul A", None),
    ("web.service.consul AAAA", None),
    ("web.service.consul SRV", None),
    ("web.service.consul ANY", None),
    ("web.service.consul MX", None),
    ("web.service.consul CNAME", None),
    ("WEB.Service.Consul A", None),
    ("web.service.dc1.consul A", None),
    ("web.service.dc1.consul SRV", None),
    (
        "web.service.dc9.consul A",
        Some("of other datacenters nothing is known, so that nothing is denied"),
    ),
    ("v1.web.service.consul A", None),
    ("V2.web.service.consul A", None),
    ("v2.web.service.dc1.consul SRV", None),
    ("blue.web.service.consul A", None),
    ("v3.web.service.consul A", None),
    ("v4.web.service.consul SRV", None),
    ("_web._tcp.service.consul SRV", None),
    ("_web._v1.service.consul SRV", None),
    ("_web._v2.service.dc1.consul SRV", None),
    ("_web._tcp.consul SRV", None),
    ("_web._tcp.service.consul A", None),
    ("_nope._tcp.service.consul SRV", None),
    ("six.service.consul A", None),
    ("six.service.consul AAAA", None),
    ("six.service.consul SRV", None),
    ("both.service.consul A", None),
    ("both.service.consul AAAA", None),
    ("both.service.consul SRV", None),
    ("down.service.consul A", None),
    ("down.service.consul SRV", None),
    ("big.service.consul A", None),
    ("tag.big.service.consul A", None),
    ("nope.service.consul A", None),
    (
        "web.connect.consul A",
        Some("every service is called through the mesh, also without a sidecar"),
    ),
    ("nope.query.consul A", None),
    (
        "nope.consul A",
        Some("may be a datacenter, with names below it"),
    ),
    ("c000020c.addr.dc1.consul A", None),
    (
        "20010db8000000000000000000000006.addr.dc1.consul AAAA",
        None,
    ),
    (
        "c000020c.addr.consul AAAA",
        Some("Consul answers with an A record"),
    ),
    ("zzz.addr.consul A", Some("is no address")),
    ("nope.node.consul A", None),
    ("consul SOA", Some("Consul adds its servers' addresses")),
    ("consul A", Some("has names below it")),
    ("service.consul A", Some("has names below it")),
];

pub(super) fn answers_are_consuls(_size: Size) -> Result<Finding> {
    let mut lab = Lab::new("names-consul")?;
    let address = lab.a.address();
    lab.catalog.write(
        "services.json",
        &format!(
            "{{\"node\": {{\"name\": \"a\", \"address\": \"{address}\"}}, \"services\": {SERVICES}}}"
        ),
    )?;
    dns(
        &mut lab.a,
        "listen = \"127.0.0.1:53\"\nupstreams = []\nservice_answers = \"instances\"\nttl = \"0s\"",
    );
    lab.a.start_agent()?;
    lab.a.wait_until_ready()?;

    let directory = lab.a.directory().join("consul");
    std::fs::create_dir_all(&directory)?;
    let services = directory.join("services.json");
    std::fs::write(&services, format!("{{\"services\": {SERVICES}}}"))?;
    let log = directory.join("log");
    let _consul = lab
        .a
        .tool("consul")?
        .args(["agent", "-dev", "-node=a", "-dns-port=8600"])
        .arg(format!("-bind={address}"))
        .arg("-config-file")
        .arg(&services)
        .in_directory(&directory)
        .log(&log)
        .spawn()?;
    wait_for_value("Consul to know the last service", SOON, || {
        let Ok(said) = ask(&lab.a, 8600, "tag.big.service.consul A") else {
            return Ok(None);
        };
        Ok(said
            .lines
            .iter()
            .any(|line| line.contains("answer"))
            .then_some(()))
    })
    .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;

    let (mut same, mut on_purpose, mut wrong) = (0, 0, vec![]);
    for (form, differs) in FORMS {
        let (ours, consuls) = (ask(&lab.a, 53, form)?, ask(&lab.a, 8600, form)?);
        match differs {
            None if ours == consuls => same += 1,
            Some(_why) if ours != consuls => on_purpose += 1,
            _ => wrong.push(format!("{form}: ours {ours:?}, Consul's {consuls:?}")),
        }
    }
    let all = FORMS.len();
    ensure!(all >= 40, "{all} forms");
    let mut figure =
        format!("{same} of {all} answers are the same, {on_purpose} differ on purpose");
    if !wrong.is_empty() {
        figure = [&[figure], wrong.as_slice()]
            .concat()
            .join("\n             ");
    }
    Ok(Finding::new(wrong.is_empty(), figure))
}

/// What Consul itself is to say, unchanged.
const CONSULS: &[&str] = &[
    "plain.service.consul A",
    "plain.service.consul SRV",
    "v1.web.service.consul SRV",
    "web.service.dc9.consul A",
    "consul.service.consul A",
    "a.node.consul A",
    "b.node.dc1.consul A",
    "consul SOA",
    "nope.service.consul A",
    "nope.query.consul A",
];

pub(super) fn names_of_consul_go_on(_size: Size) -> Result<Finding> {
    let mut mesh = ConsulMesh::dev("names-of-consul")?;
    let place = mesh.place("web")?;
    mesh.keep(services::nginx(&place, local(8080), "page of web")?);
    mesh.register("web", "web", 8080, json!({ "Tags": ["v1"] }))?;
    // On no node with Sidestep, and not for the mesh.
    mesh.api().put(
        "catalog/register",
        &json!({
            "Node": "elsewhere", "Address": "192.0.2.7",
            "Service": { "Service": "plain", "Port": 8090 },
        }),
    )?;
    dns(&mut mesh.lab.a, "listen = \"127.0.0.1:53\"\nupstreams = []");
    mesh.start()?;
    let address = mesh.callable("web")?;

    let resolv_conf = write_resolv_conf(mesh.shop.directory(), super::LISTENER)?;
    let names = [
        "web.service.consul",
        "web.virtual.consul",
        "web.connect.consul",
    ];
    for name in names {
        let said = ask(&mesh.lab.a, 53, &format!("{name} A"))?;
        let leads = said
            .lines
            .iter()
            .any(|line| line.ends_with(&address.to_string()));
        ensure!(leads, "{name} leads to {said:?}, not to {address}");
        let url = format!("http://{name}:8080/");
        let curl = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "20",
            &url,
        ];
        let page = with_resolv_conf(&mesh.shop, &resolv_conf, &curl)
            .run(SOON)
            .with_context(|| mesh.said())?;
        ensure!(page.trim() == "page of web", "{name}: {page:?}");
    }
    let mut wrong = vec![];
    for form in CONSULS {
        let (ours, consuls) = (ask(&mesh.lab.a, 53, form)?, ask(&mesh.lab.a, 8600, form)?);
        if ours != consuls {
            wrong.push(format!("{form}: ours {ours:?}, Consul's {consuls:?}"));
        }
    }
    // The comparison sees something.
    let plain = ask(&mesh.lab.a, 53, "plain.service.consul A")?;
    ensure!(
        plain.lines.iter().any(|line| line.ends_with("192.0.2.7")),
        "{plain:?}"
    );
    // Denied, a name leads into the mesh still, and not to the address that Consul knows.
    mesh.api().intend("*", "web", "deny")?;
    let is_gone = || mesh.lab.a.service("web").is_err();
    wait_for("the denial to be known", SOON, is_gone)?;
    let said = ask(&mesh.lab.a, 53, "web.service.consul A")?;
    let denied = mesh
        .shop
        .curl(&format!("http://{address}:8080/"))
        .output(SOON)?;
    ensure!(
        said.lines
            .iter()
            .any(|line| line.ends_with(&address.to_string())),
        "denied, the name leads to {said:?}"
    );
    // Reset while it connects or after that, by when curl looks.
    ensure!(
        matches!(denied.code(), Some(7 | 56)),
        "a denied call: {denied:?}"
    );
    let figure = format!(
        "{} pages by name, none once denied; {} of {} other names as Consul answers them",
        names.len(),
        CONSULS.len() - wrong.len(),
        CONSULS.len()
    );
    let figure = [&[figure], wrong.as_slice()]
        .concat()
        .join("\n             ");
    Ok(Finding::new(wrong.is_empty(), figure))
}

/// An answer as far as it does not depend on the moment and on who answers.
#[derive(Debug, PartialEq)]
struct Said {
    code: String,
    /// Answers, each with its section; names in lower case, for they may be spelled in several ways.
    lines: BTreeSet<String>,
}

fn ask(node: &Node, port: u16, form: &str) -> Result<Said> {
    let said = node
        .tool("dig")?
        .args(["@127.0.0.1", "-p", &port.to_string()])
        .args([
            "+tries=1",
            "+timeout=5",
            "+tcp",
            "+noall",
            "+comments",
            "+answer",
            "+additional",
        ])
        .args(form.split_whitespace())
        .output(SOON)?;
    let text = said.stdout.to_lowercase();
    let code = text
        .split("status: ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .with_context(|| format!("{form} at port {port}: {said:?}"))?;
    let mut section = "";
    let mut lines = BTreeSet::new();
    for line in text.lines() {
        if let Some(name) = line
            .strip_prefix(";; ")
            .and_then(|l| l.strip_suffix(" section:"))
        {
            section = if name == "answer" {
                "answer"
            } else {
                "additional"
            };
        } else if !line.starts_with(';') && !line.trim().is_empty() {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Consul's TXT records of nodes have nothing of ours beside them; a SOA record's serial is the time.
            match words.as_slice() {
                [_, _, _, "txt", ..] => {}
                [name, _, _, "soa", ..] => drop(lines.insert(format!("{section} {name} soa"))),
                _ => drop(lines.insert(format!("{section} {}", words.join(" ")))),
            }
        }
    }
    Ok(Said {
        code: code.to_owned(),
        lines,
    })
}
