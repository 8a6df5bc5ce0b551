//! What capture costs: the same connects with no capture at all, captured by the agent's programs, by its rules, and by
//! the best that nftables can do.
//!
//! Only capture differs. The agent sets it up and is then stopped (`SIGSTOP`); a plain server takes over the socket by
//! which it listens, and answers in its place. So no tunnel, no policy and no log is in these figures.

mod cell;
pub(super) mod rules;

use std::time::Duration;

use anyhow::{Context as _, Result};
use fastrand::Rng;

use self::cell::Cell;
use super::{
    recording::{Progress, Recording, Sample, Subject, Tell},
    statistics::orders,
};

/// What connects go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Nothing: straight to the server on loopback.
    None,
    /// Nothing, and connection tracking is on because somebody else's rule asks for it.
    NoneTracked,
    /// The agent's eBPF programs.
    Ebpf,
    /// The same, and connection tracking is on because somebody else's rule asks for it.
    EbpfTracked,
    /// The agent's rules by iptables-nft.
    IptablesNft,
    /// The agent's rules by iptables-legacy.
    IptablesLegacy,
    /// One rule of nftables with a map of all services, and no limit to any cgroup.
    Nft,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::None,
        Self::NoneTracked,
        Self::Ebpf,
        Self::EbpfTracked,
        Self::IptablesNft,
        Self::IptablesLegacy,
        Self::Nft,
    ];

    /// Its name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoneTracked => "none, conntrack on",
            Self::Ebpf => "eBPF",
            Self::EbpfTracked => "eBPF, conntrack on",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Nft => "nft map",
        }
    }

    /// Programs that it takes.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Self::None | Self::Ebpf => &["ip"],
            Self::NoneTracked | Self::EbpfTracked | Self::IptablesNft => {
                &["ip", "iptables-nft-save"]
            }
            Self::IptablesLegacy => &["ip", "iptables-legacy-save"],
            Self::Nft => &["ip", "nft"],
        }
    }

    /// Whether connects have an entry in the kernel's table of connections.
    fn is_tracked(self) -> bool {
        !matches!(self, Self::None | Self::Ebpf)
    }

    fn is_only_beside(self) -> bool {
        matches!(self, Self::NoneTracked | Self::EbpfTracked)
    }
}

/// What to measure, and how long.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to compare.
    pub variants: Vec<Variant>,
    /// With how many services.
    pub services: Vec<u32>,
    /// How often.
    pub rounds: usize,
    /// For how long each load.
    pub time: Duration,
    /// Of the order of each round, and of the services that are drawn.
    pub seed: u64,
    /// Whether to measure round trips and bulk on established connections.
    pub established: bool,
    /// Whether to measure how long a change takes, for which agents go on for a moment.
    pub changes: bool,
}

impl Plan {
    /// The number of services at which is measured what does not depend on it.
    fn reference(&self) -> Option<u32> {
        let usual = self.services.iter().find(|count| **count == 1_000);
        usual.or_else(|| self.services.iter().max()).copied()
    }

    /// What stands side by side.
    fn subjects(&self) -> Vec<(Variant, u32)> {
        let reference = self.reference();
        let every = |count: u32| {
            let fits =
                move |variant: &Variant| !variant.is_only_beside() || Some(count) == reference;
            let variants = self.variants.iter().copied().filter(fits);
            variants.map(move |variant| (variant, count))
        };
        self.services.iter().copied().flat_map(every).collect()
    }
}

/// The subject of a variant with so many services.
pub fn subject(variant: Variant, services: u32) -> Subject {
    Subject {
        variant: variant.name().to_owned(),
        services: Some(services),
    }
}

/// Median latency of `connect()`, in microseconds.
pub const CONNECT: &str = "connect, p50";
/// How much of it is due to capture: less that of [`Variant::None`] in the same round.
pub const ADDED: &str = "added connect latency, p50";
/// The same of connects to what is not captured.
pub const ADDED_OTHERS: &str = "added connect latency of what is not captured, p50";

/// With more services than this, a change takes so long that it is measured in the first rounds only.
const MANY: u32 = 10_000;
/// So many of them.
const FEW: u64 = 3;

/// Sets everything up, measures by turns, and tells `tell` what it is at. What cannot be set up or fails is left out of what
/// follows, and noted as a gap.
///
/// # Errors
/// If the machine cannot be read, and those of `tell`.
pub fn run(plan: &Plan, tell: &mut Tell<'_>) -> Result<Recording> {
    let mut recording = Recording::default();
    let mut cells = vec![];
    for (variant, services) in plan.subjects() {
        tell(Progress::At(&format!(
            "setting up {}, {services} services",
            variant.name()
        )))?;
        match Cell::new(variant, services) {
            Ok((cell, samples)) => {
                recording.extend(&cell.subject, samples);
                cells.push(Some(cell));
            }
            Err(error) => recording.gap(&subject(variant, services), format!("{error:#}")),
        }
    }
    let random = &mut Rng::with_seed(plan.seed);
    for (round, order) in (1..).zip(orders(plan.rounds, cells.len(), random)) {
        let before = recording.clone();
        for index in order {
            let Some(slot) = cells.get_mut(index) else {
                continue;
            };
            let Some(cell) = slot else {
                continue;
            };
            tell(Progress::At(&format!(
                "round {round} of {}, {}",
                plan.rounds,
                cell.what()
            )))?;
            match measure(cell, plan, round) {
                Ok(samples) => recording.extend(&cell.subject, samples),
                Err(error) => {
                    recording.gap(&cell.subject, format!("in round {round}: {error:#}"));
                    *slot = None;
                }
            }
        }
        let cells = cells.iter().flatten();
        let found: Vec<_> = cells
            .filter_map(|cell| Some((cell, added(&recording, &before, cell)?)))
            .collect();
        for (cell, samples) in found {
            recording.extend(&cell.subject, samples);
        }
        tell(Progress::Rounds(usize::try_from(round)?, &recording))?;
    }
    Ok(recording)
}

/// One cell in one round.
fn measure(cell: &mut Cell, plan: &Plan, round: u64) -> Result<Vec<Sample>> {
    // The same services for all.
    let seed = plan.seed.wrapping_add(round);
    let mut samples = cell.connects(plan.time, seed)?;
    samples.extend(cell.others(plan.time, seed)?);
    if plan.established && cell.subject.services == plan.reference() {
        samples.extend(cell.established(plan.time)?);
    }
    let is_soon = cell.subject.services <= Some(MANY) || round <= FEW;
    if plan.changes && is_soon {
        samples.extend(cell.change()?);
    }
    Ok(samples)
}

/// What a cell's connects took longer in this round than those without capture. `None` for these.
fn added(now: &Recording, before: &Recording, cell: &Cell) -> Option<Vec<Sample>> {
    let services = cell.subject.services?;
    let none = subject(Variant::None, services);
    let latest = |measure: &'static str, of: &Subject| {
        let values = now.values(measure, of);
        let is_new = values.len() > before.values(measure, of).len();
        values.last().copied().filter(|_| is_new)
    };
    let more = |measure| Some(latest(measure, &cell.subject)? - latest(measure, &none)?);
    if cell.subject == none {
        return None;
    }
    Some(vec![
        Sample::new(ADDED, "us", more(CONNECT)?),
        Sample::new(ADDED_OTHERS, "us", more(cell::OTHERS)?),
    ])
}

/// The figure of a report of `sidestep-peer`.
pub(super) fn number(report: &serde_json::Value, key: &str) -> Result<f64> {
    let number = report.get(key).and_then(serde_json::Value::as_f64);
    number.with_context(|| format!("no {key} in {report}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_beside_is_measured_once() {
        let plan = Plan {
            variants: Variant::ALL.to_vec(),
            services: vec![1, 1_000, 10_000],
            rounds: 1,
            time: Duration::from_secs(1),
            seed: 1,
            established: false,
            changes: false,
        };
        let subjects = plan.subjects();
        assert_eq!(subjects.len(), 5 * 3 + 2);
        assert!(subjects.contains(&(Variant::EbpfTracked, 1_000)));
        assert!(!subjects.contains(&(Variant::EbpfTracked, 1)));
    }
}
