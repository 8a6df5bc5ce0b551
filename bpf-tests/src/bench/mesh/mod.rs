//! What the whole way costs, between two nodes that are joined by veth: straight, through Sidestep by either tunnel, and
//! through iptables REDIRECT and a proxy on both sides that does mutual TLS.
//!
//! Each way has two nodes of its own, so that nobody's rules and programs are in the way of others. All of it, clients and
//! servers too, shares the machine.

mod path;
mod proxies;
mod wrk;

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use fastrand::Rng;

use self::path::Path;
use super::{
    recording::{Progress, Recording, Subject, Tell},
    statistics::orders,
};
use crate::wait::pause;

/// How a client reaches a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By its address, in the clear.
    Direct,
    /// Through Sidestep, a tunnel for each connection.
    Connect,
    /// Through Sidestep, many connections in one tunnel.
    Hbone,
    /// By REDIRECT through Envoy on both nodes, as Consul's transparent proxy does.
    Envoy,
    /// By REDIRECT through HAProxy on both nodes.
    Haproxy,
    /// As [`Way::Connect`], by the agent of [`Plan::against`].
    OtherConnect,
    /// As [`Way::Hbone`], by the agent of [`Plan::against`].
    OtherHbone,
}

impl Way {
    /// All of them, but those of another agent.
    pub const ALL: [Self; 5] = [
        Self::Direct,
        Self::Connect,
        Self::Hbone,
        Self::Envoy,
        Self::Haproxy,
    ];

    /// Those of another agent.
    pub const OTHER: [Self; 2] = [Self::OtherConnect, Self::OtherHbone];

    /// Its name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Connect => "Sidestep, connect",
            Self::Hbone => "Sidestep, hbone",
            Self::Envoy => "iptables and Envoy",
            Self::Haproxy => "iptables and HAProxy",
            Self::OtherConnect => "the other agent, connect",
            Self::OtherHbone => "the other agent, hbone",
        }
    }

    /// Programs that it takes.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Direct | Self::Connect | Self::Hbone | Self::OtherConnect | Self::OtherHbone => {
                &["ip", "nginx", "wrk"]
            }
            Self::Envoy => &[
                "ip",
                "nginx",
                "wrk",
                "iptables-nft-save",
                "openssl",
                "envoy",
            ],
            Self::Haproxy => &[
                "ip",
                "nginx",
                "wrk",
                "iptables-nft-save",
                "openssl",
                "haproxy",
            ],
        }
    }

    /// What its figures are of.
    pub fn subject(self) -> Subject {
        Subject {
            variant: self.name().to_owned(),
            services: None,
        }
    }
}

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// New connections with one byte each way, by so many clients at once.
    Calls(u64),
    /// Questions of so many bytes on one connection.
    Turns(usize),
    /// HTTP requests over so many connections that stay.
    Requests(u64),
    /// Bytes over so many connections.
    Bulk(u64),
    /// Questions on one connection, while bytes go over so many others to the same service.
    Beside(u64),
}

impl Load {
    /// All that is measured.
    pub const ALL: [Self; 10] = [
        Self::Calls(1),
        Self::Calls(32),
        Self::Turns(1),
        Self::Turns(1024),
        Self::Turns(16 * 1024),
        Self::Requests(1),
        Self::Requests(32),
        Self::Bulk(1),
        Self::Bulk(8),
        Self::Beside(8),
    ];
}

/// What to measure, and how long.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to compare.
    pub ways: Vec<Way>,
    /// The agent of [`Way::OTHER`].
    pub against: Option<PathBuf>,
    /// Under which loads.
    pub loads: Vec<Load>,
    /// How often.
    pub rounds: usize,
    /// For how long each load.
    pub time: Duration,
    /// Of the order of each round.
    pub seed: u64,
    /// For how long to watch what is idle, in seconds; 0 leaves it and memory out.
    pub idle_seconds: u64,
}

/// Sets everything up, measures by turns, and tells `tell` what it is at. A way that cannot be set up, or that fails, is left
/// out of what follows, and noted as a gap.
///
/// # Errors
/// If the machine cannot be read, and those of `tell`.
pub fn run(plan: &Plan, tell: &mut Tell<'_>) -> Result<Recording> {
    let mut recording = Recording::default();
    let mut paths = vec![];
    for way in &plan.ways {
        tell(Progress::At(&format!("setting up {}", way.name())))?;
        match Path::new(*way, plan.against.as_deref()) {
            Ok(path) => paths.push(Some(path)),
            Err(error) => recording.gap(&way.subject(), format!("{error:#}")),
        }
    }
    if plan.idle_seconds > 0 {
        idle(plan, &mut paths, &mut recording, tell)?;
    }
    let random = &mut Rng::with_seed(plan.seed);
    for round in 1..=plan.rounds {
        let all = orders(plan.loads.len(), paths.len(), random);
        for (load, order) in plan.loads.iter().zip(all) {
            let at = format!("round {round} of {}, {load:?}", plan.rounds);
            for index in order {
                if let Some(slot) = paths.get_mut(index) {
                    measure(slot, *load, plan.time, &at, &mut recording, tell)?;
                }
            }
        }
        tell(Progress::Rounds(round, &recording))?;
    }
    Ok(recording)
}

/// One way under one load; a way that fails is taken down.
fn measure(
    slot: &mut Option<Path>,
    load: Load,
    time: Duration,
    at: &str,
    recording: &mut Recording,
    tell: &mut Tell<'_>,
) -> Result<()> {
    let Some(path) = slot else {
        return Ok(());
    };
    let subject = path.way.subject();
    tell(Progress::At(&format!("{at}, {}", subject.variant)))?;
    match path.measure(load, time) {
        Ok(samples) => recording.extend(&subject, samples),
        Err(error) => {
            recording.gap(&subject, format!("in {at}: {error:#}"));
            *slot = None;
        }
    }
    Ok(())
}

/// What is spent while nothing happens, by all at the same time, and what connections that are open and idle take.
fn idle(
    plan: &Plan,
    paths: &mut [Option<Path>],
    recording: &mut Recording,
    tell: &mut Tell<'_>,
) -> Result<()> {
    tell(Progress::At("watching what is idle"))?;
    let spent = |paths: &[Option<Path>]| -> Result<Vec<Duration>> {
        let spent = |path: &Path| path.processor_time();
        paths.iter().flatten().map(spent).collect()
    };
    let before = spent(paths)?;
    pause(Duration::from_secs(plan.idle_seconds));
    let after = spent(paths)?;
    let spent = before.into_iter().zip(after);
    for (path, (before, after)) in paths.iter().flatten().zip(spent) {
        let time = Duration::from_secs(plan.idle_seconds);
        let samples = path.idle(after.saturating_sub(before), time)?;
        recording.extend(&path.way.subject(), samples);
    }
    for slot in paths {
        let Some(path) = slot else {
            continue;
        };
        let way = path.way;
        tell(Progress::At(&format!(
            "holding idle connections, {}",
            way.name()
        )))?;
        match path.hold() {
            Ok(samples) => recording.extend(&way.subject(), samples),
            Err(error) => {
                recording.gap(&way.subject(), format!("holding connections: {error:#}"));
                *slot = None;
            }
        }
    }
    Ok(())
}
