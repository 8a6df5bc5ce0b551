//! How fast, beside the upstream alone.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::upstream::{UPSTREAM, start_with_upstream, with_upstream};
use crate::{
    claims::{Finding, Size},
    lab::Lab,
    program::Program,
    wait::{SOON, Stopwatch, wait_for_value},
    workload::Kind,
};

/// Queries per second at which single answers are looked at.
const RATE: u32 = 2000;

/// A name of ours, and one that the upstream knows.
const OWN: &str = "web.virtual.consul A\n";
const OTHER: &str = "host1.example.test A\n";

/// What is compared: what it is, the server that is asked, the name, and whether the query is captured.
const WAYS: [(&str, &str, &str, bool); 5] = [
    ("upstream alone", UPSTREAM, OTHER, false),
    ("own names, listener", super::LISTENER, OWN, false),
    ("own names, captured", super::NOWHERE, OWN, true),
    ("other names, listener", super::LISTENER, OTHER, false),
    ("other names, captured", UPSTREAM, OTHER, true),
];

/// What dnsperf measured of one way, or the medians of several rounds.
#[derive(Debug, Clone, Copy)]
struct Measured {
    /// Answers per second to clients that always have 32 queries waiting.
    per_second: f64,
    /// At [`RATE`].
    average_ms: f64,
    /// The same: 99 of 100 answers come within it.
    late_ms: f64,
    /// Of both.
    asked: f64,
    /// Of these, without an answer within five seconds.
    lost: f64,
}

impl Measured {
    /// Of forwarded ones: datagrams may get lost, and who asks does so again; but hardly ever.
    fn is_answered(&self) -> bool {
        self.lost <= (self.asked / 100_000.0).max(1.0)
    }
}

pub(super) fn own_names_are_answered_fast(size: Size) -> Result<Finding> {
    let (rounds, seconds) = size.pick((1, 1), (5, 3));
    let mut lab = Lab::new("names-load")?;
    let shop = lab.a.add_workload("shop", "shop", Kind::Cgroup)?;
    lab.a.set_capture("dns = true");
    let (lab, _upstream) = start_with_upstream(lab)?;
    let mut samples: [Vec<Measured>; WAYS.len()] = Default::default();
    for round in 0..rounds {
        for turn in 0..WAYS.len() {
            let index = (round + turn) % WAYS.len();
            let (Some((_, server, query, captured)), Some(samples)) =
                (WAYS.get(index), samples.get_mut(index))
            else {
                continue;
            };
            let dnsperf = if *captured {
                shop.program("dnsperf")
            } else {
                lab.a.tool("dnsperf")?
            };
            let file = lab.a.directory().join("queries");
            fs::write(&file, query)?;
            samples.push(measure(&dnsperf.arg("-d").arg(&file), server, seconds)?);
        }
    }
    let medians = samples.map(|samples| medians(&samples));
    let [alone, own, own_captured, other, other_captured] = medians;
    let forwarded = [other, other_captured];
    // The quick size is of an agent that was not optimised.
    let least = size.pick(5_000.0, 20_000.0);
    let fast = |way: &Measured| way.per_second >= least && way.lost == 0.0;
    let holds = [own, own_captured].iter().all(fast) && forwarded.iter().all(Measured::is_answered);
    let rows: Vec<String> = WAYS
        .iter()
        .zip(medians)
        .map(|((what, ..), median)| row(what, median, alone))
        .collect();
    let lost: Vec<f64> = medians.iter().map(|median| median.lost).collect();
    let unit = "ms at 2,000 per second";
    Ok(Finding::new(
        holds,
        format!(
            "medians of {rounds} rounds of {seconds} s, and their ratios to the upstream alone (dnsmasq); queries lost, in \
             this order: {lost:?}\n\
             | | queries per second | average, {unit} | p99, {unit} |\n|---|---|---|---|\n{}",
            rows.join("\n")
        ),
    ))
}

/// A row of a table in Markdown.
fn row(what: &str, median: Measured, alone: Measured) -> String {
    let ratio = |a: f64, b: f64| format!("{:.2}", a / b);
    format!(
        "| {what} | {:.0} ({}) | {:.3} ({}) | {:.3} ({}) |",
        median.per_second,
        ratio(median.per_second, alone.per_second),
        median.average_ms,
        ratio(median.average_ms, alone.average_ms),
        median.late_ms,
        ratio(median.late_ms, alone.late_ms),
    )
}

/// Each figure's median; of what was asked and lost all.
fn medians(samples: &[Measured]) -> Measured {
    let median = |figure: fn(&Measured) -> f64| {
        let mut sorted: Vec<f64> = samples.iter().map(figure).collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Measured {
        per_second: median(|sample| sample.per_second),
        average_ms: median(|sample| sample.average_ms),
        late_ms: median(|sample| sample.late_ms),
        asked: samples.iter().map(|sample| sample.asked).sum(),
        lost: samples.iter().map(|sample| sample.lost).sum(),
    }
}

pub(super) fn an_upgrade_loses_no_query(size: Size) -> Result<Finding> {
    let upgrades = size.pick(2_u64, 10);
    let (lab, _upstream) = with_upstream("names-upgrade")?;
    let file = lab.a.directory().join("queries");
    fs::write(&file, "web.virtual.consul A\nhost1.example.test A\n")?;
    let log = lab.a.directory().join("dnsperf.log");
    let mut load = lab
        .a
        .tool("dnsperf")?
        .args([
            "-s",
            super::LISTENER,
            "-p",
            "53",
            "-c",
            "8",
            "-Q",
            "2000",
            "-l",
            "600",
            "-d",
        ])
        .arg(&file)
        .log(&log)
        .spawn()?;
    let clock = Stopwatch::start();
    for _ in 0..upgrades {
        let before = lab.a.status()?.get("process").cloned();
        lab.a
            .sidestep(&["upgrade"])?
            .run(Duration::from_mins(1))
            .with_context(|| lab.a.agent_said())?;
        let after = lab.a.status()?.get("process").cloned();
        ensure!(before != after, "{before:?} goes on");
        // The agent before has let go when its last answers are out.
        wait_for_value("the agent before to end", SOON, || {
            let status = lab.a.status()?;
            let gone = status.get("predecessor").is_none_or(Value::is_null);
            Ok(gone.then_some(()))
        })?;
    }
    // Upgrades may take less time than so many queries.
    let loaded = || clock.elapsed() > Duration::from_secs(1);
    wait_for_value("a second of load", SOON, || Ok(loaded().then_some(())))?;
    load.signal(Signal::INT)?;
    load.wait(SOON)?.context("dnsperf does not end")?;
    let said = fs::read_to_string(&log)?;
    let completed = number(&said, "Queries completed:")?;
    let lost = number(&said, "Queries lost:")?;
    let right = said.contains("NOERROR") && !said.contains("SERVFAIL");
    Ok(Finding::new(
        lost == 0.0 && completed > 500.0 && right,
        format!("{upgrades} upgrades: {completed} queries answered, {lost} lost"),
    ))
}

/// The number behind a label of dnsperf's report.
fn number(said: &str, label: &str) -> Result<f64> {
    let line = said
        .lines()
        .find_map(|line| line.trim().strip_prefix(label));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    word.and_then(|word| word.parse().ok())
        .with_context(|| format!("no {label} in {said}"))
}

/// `dnsperf` for `seconds` as fast as it goes, and for as long at [`RATE`].
fn measure(dnsperf: &Program, server: &str, seconds: u64) -> Result<Measured> {
    let asking = dnsperf.clone().args(["-s", server, "-p", "53", "-l"]);
    let asking = asking.arg(seconds.to_string());
    let deadline = Duration::from_secs(seconds) + SOON;
    let load = asking.clone().args(["-c", "8", "-q", "32"]).run(deadline)?;
    let single = asking
        .args(["-v", "-Q"])
        .arg(RATE.to_string())
        .run(deadline)?;
    // `> NOERROR web.virtual.consul A 0.000123`
    let answers = single.lines().filter(|line| line.starts_with("> NOERROR"));
    let mut took: Vec<f64> = answers
        .filter_map(|line| line.split_whitespace().last()?.parse().ok())
        .collect();
    took.sort_by(f64::total_cmp);
    let late = took.get(took.len() * 99 / 100);
    Ok(Measured {
        per_second: number(&load, "Queries per second:")?,
        average_ms: number(&single, "Average Latency (s):")? * 1000.0,
        late_ms: late.with_context(|| format!("no answers in {single}"))? * 1000.0,
        asked: number(&load, "Queries sent:")? + number(&single, "Queries sent:")?,
        lost: number(&load, "Queries lost:")? + number(&single, "Queries lost:")?,
    })
}
