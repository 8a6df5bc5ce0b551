//! Programs of others at `connect()`, in the same cgroup and above it.

use anyhow::{Context as _, Result, ensure};

use super::web;
use crate::{
    cgroup::Cgroup,
    claims::{Finding, Size},
    foreign::{ForeignProgram, Sharing, Verdict},
    node::Node,
    wait::SOON,
};

const NAME: &str = "somebody_else";

/// Where the program of somebody else is, seen from where connections are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    Above,
}

impl Place {
    fn cgroup(self, node: &Node) -> Result<Cgroup> {
        match self {
            Self::Here => node.attach_point(),
            Self::Above => Ok(node.cgroup().clone()),
        }
    }
}

const EVERYWHERE: [(Place, Sharing); 6] = [
    (Place::Here, Sharing::Exclusive),
    (Place::Here, Sharing::Override),
    (Place::Here, Sharing::Multi),
    (Place::Above, Sharing::Exclusive),
    (Place::Above, Sharing::Override),
    (Place::Above, Sharing::Multi),
];

/// Whether the kernel lets another program in beside (or below) it: `hierarchy_allows_attach()`.
fn lets_us_in(place: Place, sharing: Sharing) -> bool {
    match sharing {
        Sharing::Exclusive => false,
        Sharing::Override => place == Place::Above,
        Sharing::Multi => true,
    }
}

pub(super) fn an_agent_starts_beside_others_or_says_why_not(_size: Size) -> Result<Finding> {
    let mut seen = vec![];
    let mut holds = true;
    for (place, sharing) in EVERYWHERE {
        let mut mesh = web::mesh("beside")?;
        let foreign = ForeignProgram::load(NAME, Verdict::Pass)?;
        foreign.attach(&place.cgroup(&mesh.lab.a)?, sharing)?;
        let expected = lets_us_in(place, sharing);
        let started = if expected {
            mesh.start()?;
            web::serves(&mesh)?
        } else {
            holds &= refuses_to_start(&mut mesh.lab.a)?;
            false
        };
        let check = Check::of(&mesh.lab.a)?;
        holds &= started == expected && check.names_it && check.accepts == expected;
        seen.push(format!(
            "{place:?} {sharing:?}: {}, `check` {}",
            if started { "works" } else { "does not start" },
            if check.accepts { "warns" } else { "fails" },
        ));
    }
    Ok(Finding::new(holds, seen.join("; ")))
}

pub(super) fn others_that_come_later_take_nothing_away(_size: Size) -> Result<Finding> {
    let mut seen = vec![];
    let mut holds = true;
    for sharing in [Sharing::Exclusive, Sharing::Override, Sharing::Multi] {
        let mut mesh = web::mesh("later")?;
        mesh.start()?;
        for place in [Place::Here, Place::Above] {
            let foreign = ForeignProgram::load(NAME, Verdict::Pass)?;
            let attached = foreign.attach(&place.cgroup(&mesh.lab.a)?, sharing).is_ok();
            let running = web::serves(&mesh)?;
            mesh.lab.a.kill_agent();
            let away = web::connect(&mesh)?;
            mesh.lab.a.start_agent()?;
            mesh.lab.a.wait_until_ready()?;
            let restarted = web::serves(&mesh)?;
            let named = Check::of(&mesh.lab.a)?.names_it;
            holds &= running && away == "ECONNREFUSED" && restarted && named == attached;
            seen.push(format!(
                "{place:?} {sharing:?} {}: served {running}, while no agent runs {away}, by the next agent {restarted}",
                if attached { "attached" } else { "kept out" },
            ));
        }
    }
    Ok(Finding::new(holds, seen.join("; ")))
}

/// Starts the agent of a node on which it cannot work. Returns whether it ends and says what to do.
fn refuses_to_start(node: &mut Node) -> Result<bool> {
    node.start_agent()?;
    let code = node.wait_for_agent_end(SOON)?;
    let said = node.agent_said();
    let helps = ["exclusively", "sidestep check"];
    Ok(code.is_some_and(|code| code != 0) && helps.iter().all(|word| said.contains(word)))
}

/// What `sidestep check` says of the programs of others.
struct Check {
    names_it: bool,
    accepts: bool,
}

impl Check {
    fn of(node: &Node) -> Result<Self> {
        let output = node.sidestep(&["check", "--json"])?.output(SOON)?;
        let findings: Vec<serde_json::Value> = serde_json::from_str(&output.stdout)
            .with_context(|| format!("reading {:?}{}", output.stdout, output.stderr))?;
        ensure!(!findings.is_empty(), "nothing was checked");
        let is_about = |finding: &&serde_json::Value| {
            let detail = finding.get("detail").and_then(serde_json::Value::as_str);
            detail.is_some_and(|detail| detail.contains(NAME))
        };
        Ok(Self {
            names_it: findings.iter().any(|finding| is_about(&finding)),
            accepts: output.succeeded(),
        })
    }
}
