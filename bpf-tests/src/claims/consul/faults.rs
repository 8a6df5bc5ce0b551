//! A Consul that answers, and not with the truth: what was known stays, and the truth is followed when it comes back.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{changes::switch, intentions::allows, outage::until_followed, roots::certificates};
use crate::{
    claims::{Finding, Size, storm::Storm},
    consul::{Canned, ConsulMesh, Fault, Faults, Rule, SOON},
    mesh::local,
    node::Node,
    services,
    wait::{Stopwatch, monotonic_ms, pause, wait_for_value},
};

/// All of Consul's API.
const EVERYTHING: &str = "/v1/";

/// How soon a change is to be in force beside an index that nobody will reach: a second until that is doubted, and as
/// much again twice for a busy machine.
const UNDECEIVED: u64 = 3_000;

/// The most that both agents together may ask in any second while all that they ask fails. Each follows about fifteen
/// answers, and begins with six attempts in a second.
const STORM: usize = 200;

/// `names`, `pair` with two instances, and proxies that can be told to lie before Consul's agents on both nodes.
struct Bench {
    faults: [Faults; 2],
    mesh: ConsulMesh,
}

impl Bench {
    fn new(purpose: &str) -> Result<Self> {
        let mut mesh = ConsulMesh::dev(purpose)?;
        let access = format!("address = \"{}\"", Faults::base());
        for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
            node.use_consul(&access);
        }
        let faults = [Faults::start(&mesh.lab.a)?, Faults::start(&mesh.lab.b)?];
        let place = mesh.place("names")?;
        mesh.keep(services::peer(&place, "names", local(20_000), "1 name")?);
        mesh.register("names", "names", 20_000, Value::Null)?;
        for (id, port) in [("one", 20_001), ("two", 20_002)] {
            let place = mesh.place(id)?;
            let answer = format!("1 {id}");
            mesh.keep(services::peer(&place, "names", local(port), &answer)?);
            let check = json!({ "Check": { "TTL": "1h", "Status": "passing" } });
            mesh.register("pair", id, port, check)?;
        }
        mesh.start()?;
        mesh.callable("names")?;
        mesh.callable("pair")?;
        mesh.tunnel_of("names")?;
        Ok(Self { faults, mesh })
    }

    fn storm(&self, size: Size) -> Result<Storm> {
        let names = self.mesh.callable("names")?;
        let targets = self.mesh.write_targets(&[(names, "name0")])?;
        // The file is written again for other targets.
        let own = targets.with_extension("storm");
        std::fs::rename(&targets, &own)?;
        Storm::begin(&self.mesh.shop, own, size)
    }

    fn set(&self, rules: &[Rule]) {
        for faults in &self.faults {
            faults.set(rules);
        }
    }

    fn nodes(&self) -> [&Node; 2] {
        [&self.mesh.lab.a, &self.mesh.lab.b]
    }

    /// Waits until both proxies have lied at all of `paths`.
    fn until_struck(&self, paths: &[&str]) -> Result<()> {
        for faults in &self.faults {
            for path in paths {
                wait_for_value(&format!("a fault at {path}"), SOON, || {
                    Ok(faults.has_struck(path).then_some(()))
                })?;
            }
        }
        Ok(())
    }

    /// Waits until both agents report a problem that has `words` in it.
    fn until_reported(&self, words: &str) -> Result<String> {
        let mut said = String::new();
        for node in self.nodes() {
            said = wait_for_value(&format!("{words:?} to be reported"), SOON, || {
                let problems = problems(node)?;
                Ok(problems.into_iter().find(|problem| problem.contains(words)))
            })
            .with_context(|| format!("{:?}", problems(node)))?;
        }
        Ok(said)
    }

    /// Waits until neither agent reports a problem.
    fn until_content(&self) -> Result<()> {
        for node in self.nodes() {
            wait_for_value("no problem with Consul", SOON + SOON, || {
                Ok(problems(node)?.is_empty().then_some(()))
            })
            .with_context(|| format!("{:?}", problems(node)))?;
        }
        Ok(())
    }

    /// What was made known and must stay: endpoints, intentions, registration, certificates.
    fn known(&self) -> Result<Vec<String>> {
        let mesh = &self.mesh;
        let mut known = vec![mesh.tunnel_of("names")?.to_string()];
        for node in self.nodes() {
            for service in ["names", "pair"] {
                let available = node.service(service)?.get("available").cloned();
                known.push(format!("{}: {service} {available:?}", node.name()));
            }
            for caller in ["shop", "guest"] {
                let allowed = allows(node, caller, "names")?;
                known.push(format!("{}: {caller} {allowed}", node.name()));
            }
            let mut certificates = certificates(node)?.concat();
            certificates.sort();
            known.push(certificates.concat());
        }
        Ok(known)
    }
}

fn problems(node: &Node) -> Result<Vec<String>> {
    let status = node.status()?;
    let problems = status.pointer("/consul/problems");
    let problems = problems.and_then(Value::as_array).into_iter().flatten();
    Ok(problems
        .filter_map(|problem| problem.as_str().map(str::to_owned))
        .collect())
}

pub(super) fn an_index_of_the_future_does_no_harm(size: Size) -> Result<Finding> {
    let rounds = size.pick(1, 10);
    let bench = Bench::new("c-future")?;
    let storm = bench.storm(size)?;
    let pair = bench.mesh.callable("pair")?;
    let (mut instances, mut intentions) = (0, 0);
    for round in 0..rounds {
        // Far beyond what is written while the claim is tried, and not so far that it looks odd.
        let future = Fault::Index(100_000 + round);
        bench.set(&[(EVERYTHING, future)]);
        bench.until_struck(&["/v1/health/connect/pair"])?;
        for (gone, stays) in [("one", "two"), ("two", "one")] {
            instances = instances.max(switch(&bench.mesh, pair, gone, stays)?);
        }
        for action in ["deny", "allow"] {
            bench.set(&[(EVERYTHING, future)]);
            bench.until_struck(&["/v1/connect/intentions"])?;
            let time = until_followed(&bench.mesh, action)?;
            intentions = intentions.max(u64::try_from(time.as_millis())?);
        }
    }
    let report = storm.end()?;
    Ok(Finding::new(
        report.failures.is_empty() && report.right > 0 && instances.max(intentions) <= UNDECEIVED,
        format!(
            "an instance's change is in force {instances} ms after Consul's answer, an intention's within {intentions} ms; {}, failed: {:?}",
            report.load(),
            report.failures
        ),
    ))
}

pub(super) fn an_error_with_an_index_does_no_harm(size: Size) -> Result<Finding> {
    let lasts = Duration::from_secs(size.pick(3, 60));
    let bench = Bench::new("c-error")?;
    until_followed(&bench.mesh, "deny")?;
    let storm = bench.storm(size)?;
    let before = bench.known()?;
    let begun = monotonic_ms();
    let clock = Stopwatch::start();
    bench.set(&[(EVERYTHING, Fault::Answer(AWAY))]);
    let said = bench.until_reported("No cluster leader")?;
    pause(lasts.saturating_sub(clock.elapsed()));
    let during = bench.known()?;
    let asked = bench.faults.each_ref().map(|f| f.busiest_second(begun));
    let most: usize = asked.iter().map(|(most, _)| most).sum();
    let all: usize = asked.iter().map(|(_, all)| all).sum();
    bench.set(&[]);
    let clock = Stopwatch::start();
    until_followed(&bench.mesh, "allow")?;
    bench.until_content()?;
    let recovered = clock.elapsed().as_millis();
    let instance = switch(&bench.mesh, bench.mesh.callable("pair")?, "one", "two")?;
    let report = storm.end()?;
    Ok(Finding::new(
        report.failures.is_empty() && report.right > 0 && before == during && most <= STORM,
        format!(
            "{} s of errors: {all} requests of two agents, {most} in the busiest second; reported: {said}; what was known {}; {}, failed: {:?}; all is followed again after {recovered} ms, then an instance's change is in force within {instance} ms",
            lasts.as_secs(),
            if before == during {
                "stayed".to_owned()
            } else {
                format!("was {before:?} and is {during:?}")
            },
            report.load(),
            report.failures,
        ),
    ))
}

/// As Consul 1.8 answers who has no rights: nothing was looked up.
const NOTHING: Canned = Canned {
    status: 200,
    headers: &[
        ("X-Consul-Index", "1"),
        ("X-Consul-Knownleader", "false"),
        ("X-Consul-Lastcontact", "0"),
    ],
    body: "[]",
};
/// The same where names are keys.
const NO_NAMES: Canned = Canned {
    body: "{}",
    ..NOTHING
};
/// As Consul 1.11 and later do: what the token may not see was left out.
const FILTERED: Canned = Canned {
    status: 200,
    headers: &[
        ("X-Consul-Index", "1000"),
        ("X-Consul-Knownleader", "true"),
        ("X-Consul-Lastcontact", "0"),
        ("X-Consul-Results-Filtered-By-ACLs", "true"),
    ],
    body: "[]",
};
const NO_FILTERED_NAMES: Canned = Canned {
    body: "{}",
    ..FILTERED
};
const DENIED: Canned = Canned {
    status: 403,
    headers: &[],
    body: "Permission denied",
};
const GARBAGE: Canned = Canned {
    body: "{\"Roots\": [}",
    ..FILTERED
};
const AWAY: Canned = Canned {
    status: 500,
    headers: &[("X-Consul-Index", "1")],
    body: "No cluster leader",
};

/// What is asked for by name is refused, lists and maps are empty.
const fn empty(list: Canned, map: Canned) -> [Rule; 7] {
    [
        ("/v1/catalog/services", Fault::Answer(map)),
        ("/v1/agent/services", Fault::Answer(map)),
        ("/v1/agent/", Fault::Answer(DENIED)),
        ("/v1/connect/intentions/", Fault::Answer(DENIED)),
        ("/v1/connect/intentions", Fault::Answer(list)),
        ("/v1/config", Fault::Answer(DENIED)),
        (EVERYTHING, Fault::Answer(list)),
    ]
}

/// What it is called, the rules that make it, one set after the other, and what is in the report of it.
type Lie<'a> = (&'a str, &'a [&'a [Rule]], &'a str);

pub(super) fn a_lying_answer_takes_nothing_away(size: Size) -> Result<Finding> {
    let nothing = empty(NOTHING, NO_NAMES);
    let filtered = empty(FILTERED, NO_FILTERED_NAMES);
    let of_all = |fault| [(EVERYTHING, fault)];
    // While a query waits for a change, an answer that does not come is no sign: so what stalls is asked without
    // waiting.
    let (garbage, cut, away, stall) = (
        of_all(Fault::Answer(GARBAGE)),
        of_all(Fault::Cut),
        of_all(Fault::Answer(AWAY)),
        of_all(Fault::Stall),
    );
    let stalled = size.pick("No cluster leader", "no answer within 15 s");
    let lies: [Lie<'_>; 5] = [
        ("nothing", &[&nothing], "token"),
        ("filtered", &[&filtered], "token"),
        ("garbage", &[&garbage], "not understood"),
        ("cut", &[&cut], "could not be read"),
        ("stalled", &[&away, &stall], stalled),
    ];
    let bench = Bench::new("c-lies")?;
    until_followed(&bench.mesh, "deny")?;
    let storm = bench.storm(size)?;
    let before = bench.known()?;
    let (mut wrong, mut slowest) = (vec![], 0);
    // The real Consul does the first by itself, in the claim about a lost token.
    let lies = lies.get(size.pick(1, 0)..).unwrap_or_default();
    for (lie, steps, words) in lies.iter().copied() {
        for rules in steps {
            bench.set(rules);
            bench
                .until_struck(&[
                    "/v1/health/connect/pair",
                    "/v1/health/connect/names",
                    "/v1/connect/intentions",
                    "/v1/catalog/services",
                    "/v1/agent/services",
                    "/v1/agent/connect/ca/leaf",
                ])
                .with_context(|| lie.to_owned())?;
        }
        let said = bench
            .until_reported(words)
            .with_context(|| lie.to_owned())?;
        let during = bench.known()?;
        if during != before {
            wrong.push(format!("{lie} ({said}): {during:?} instead of {before:?}"));
        }
        bench.set(&[]);
        let clock = Stopwatch::start();
        until_followed(&bench.mesh, "allow").with_context(|| lie.to_owned())?;
        bench.until_content().with_context(|| lie.to_owned())?;
        slowest = slowest.max(clock.elapsed().as_millis());
        until_followed(&bench.mesh, "deny")?;
    }
    let instance = switch(&bench.mesh, bench.mesh.callable("pair")?, "one", "two")?;
    let report = storm.end()?;
    Ok(Finding::new(
        wrong.is_empty() && report.failures.is_empty() && report.right > 0,
        format!(
            "{} lies: {}; the truth is in force within {slowest} ms, then an instance's change within {instance} ms; {}, failed: {:?}",
            lies.len(),
            if wrong.is_empty() {
                "all reported, nothing lost".to_owned()
            } else {
                wrong.join("; ")
            },
            report.load(),
            report.failures,
        ),
    ))
}

/// What a server says that has just been started and knows a leader already.
const LAGGING: Canned = Canned {
    status: 200,
    headers: &[
        ("X-Consul-Index", "5"),
        ("X-Consul-Knownleader", "true"),
        ("X-Consul-Lastcontact", "0"),
    ],
    body: "[]",
};
const LAGGING_NAMES: Canned = Canned {
    body: "{}",
    ..LAGGING
};

pub(super) fn a_server_that_lags_takes_nothing_away(size: Size) -> Result<Finding> {
    let rounds = size.pick(1, 10);
    let bench = Bench::new("c-lag")?;
    until_followed(&bench.mesh, "deny")?;
    let storm = bench.storm(size)?;
    let before = bench.known()?;
    let mut wrong = vec![];
    for _ in 0..rounds {
        // After an error nothing is waited for: what is asked then is answered as of long ago.
        bench.set(&[(EVERYTHING, Fault::Answer(AWAY))]);
        bench.until_reported("No cluster leader")?;
        bench.set(&[
            ("/v1/catalog/services", Fault::Lag(LAGGING_NAMES)),
            (EVERYTHING, Fault::Lag(LAGGING)),
        ]);
        bench.until_struck(&[
            "/v1/health/connect/pair",
            "/v1/health/connect/names",
            "/v1/connect/intentions",
            "/v1/catalog/services",
        ])?;
        let during = bench.known()?;
        if during != before {
            wrong.push(format!("{during:?} instead of {before:?}"));
        }
        bench.set(&[]);
        bench.until_content()?;
    }
    let instance = switch(&bench.mesh, bench.mesh.callable("pair")?, "one", "two")?;
    let report = storm.end()?;
    Ok(Finding::new(
        wrong.is_empty() && report.failures.is_empty() && report.right > 0,
        format!(
            "empty answers of a lagging server: {}; then an instance's change is in force within {instance} ms; {}, failed: {:?}",
            if wrong.is_empty() {
                "nothing lost".to_owned()
            } else {
                wrong.join("; ")
            },
            report.load(),
            report.failures,
        ),
    ))
}
