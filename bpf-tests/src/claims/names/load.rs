//! How fast, beside the upstream alone.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::upstream::{UPSTREAM, with_upstream};
use crate::{
    claims::{Finding, Size},
    lab::Lab,
    wait::{SOON, wait_for_value},
};

/// Queries per second at which single answers are looked at.
const RATE: u32 = 2000;

/// What dnsperf measured.
struct Measured {
    per_second: f64,
    lost: f64,
    average_ms: f64,
}

pub(super) fn own_names_are_answered_fast(size: Size) -> Result<Finding> {
    let seconds = size.pick(3, 15);
    let (lab, _upstream) = with_upstream("names-load")?;
    let own = measure(&lab, super::LISTENER, "web.virtual.consul A\n", seconds)?;
    let alone = measure(&lab, UPSTREAM, "host1.example.test A\n", seconds)?;
    let late = ninety_nine(&lab, super::LISTENER, "web.virtual.consul A\n")?;
    let late_alone = ninety_nine(&lab, UPSTREAM, "host1.example.test A\n")?;
    let through = measure(&lab, super::LISTENER, "host1.example.test A\n", seconds)?;
    let ratio = own.per_second / alone.per_second;
    // The quick size is of an agent that was not optimised.
    let least = size.pick(5_000.0, 20_000.0);
    let holds = own.per_second >= least && own.lost == 0.0 && through.lost == 0.0;
    Ok(Finding::new(
        holds,
        format!(
            "{:.0} per second, {:.3} ms on average; dnsmasq alone {:.0}, {:.3} ms (ratio {ratio:.2}); \
             through the agent to dnsmasq {:.0}, {:.3} ms; at {RATE} per second 99 of 100 within {late:.3} ms, \
             of dnsmasq {late_alone:.3} ms",
            own.per_second,
            own.average_ms,
            alone.per_second,
            alone.average_ms,
            through.per_second,
            through.average_ms,
        ),
    ))
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

fn measure(lab: &Lab, server: &str, query: &str, seconds: u64) -> Result<Measured> {
    let file = lab.a.directory().join("queries");
    fs::write(&file, query)?;
    let said = lab
        .a
        .tool("dnsperf")?
        .args(["-s", server, "-p", "53", "-c", "8", "-q", "32", "-l"])
        .arg(seconds.to_string())
        .arg("-d")
        .arg(&file)
        .run(Duration::from_secs(seconds + 30))?;
    Ok(Measured {
        per_second: number(&said, "Queries per second:")?,
        lost: number(&said, "Queries lost:")?,
        average_ms: number(&said, "Average Latency (s):")? * 1000.0,
    })
}

/// Milliseconds within which 99 of 100 answers come, at [`RATE`].
fn ninety_nine(lab: &Lab, server: &str, query: &str) -> Result<f64> {
    let file = lab.a.directory().join("queries");
    fs::write(&file, query)?;
    let said = lab
        .a
        .tool("dnsperf")?
        .args(["-v", "-s", server, "-p", "53", "-l", "3", "-Q"])
        .arg(RATE.to_string())
        .arg("-d")
        .arg(&file)
        .run(Duration::from_secs(30))?;
    // `> NOERROR web.virtual.consul A 0.000123`
    let answers = said.lines().filter(|line| line.starts_with("> NOERROR"));
    let mut seconds: Vec<f64> = answers
        .filter_map(|line| line.split_whitespace().last()?.parse().ok())
        .collect();
    seconds.sort_by(f64::total_cmp);
    let at = seconds.get(seconds.len() * 99 / 100);
    Ok(at.with_context(|| format!("no answers in {said}"))? * 1000.0)
}
