//! `cargo xtask prove`: re-runs what the project claims and says what holds.

use std::{fmt::Write as _, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use bpf_tests::{
    claims::{Claim, Size, TOPICS, Topic},
    mode::Mode,
    programs,
};

use crate::{
    build, host,
    progress::{Step, say, table},
};

/// See [`crate::Command::Prove`].
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to prove.
    topic: Option<String>,
    /// With less load: seconds for each claim.
    #[arg(long)]
    quick: bool,
    /// By what to capture: `ebpf`, `iptables-nft` or `iptables-legacy`.
    #[arg(long, default_value = "ebpf", value_parser = mode)]
    mode: Mode,
    /// Only the claims whose name contains this.
    #[arg(long)]
    only: Option<String>,
}

/// Exits with 0 only if every claim holds.
///
/// # Errors
/// If the claims cannot even be tried.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Some(name) = &arguments.topic else {
        list_topics();
        return Ok(ExitCode::SUCCESS);
    };
    let Some(topic) = TOPICS.iter().find(|topic| topic.name == name) else {
        list_topics();
        bail!("there is no topic {name}");
    };
    prepare(topic, arguments.mode)?;
    if !arguments.quick {
        // What users run.
        programs::use_agent(build::release_agent()?);
    }
    let size = if arguments.quick {
        Size::Quick
    } else {
        Size::Full
    };
    arguments.mode.choose();
    let only = arguments.only.as_deref().unwrap_or_default();
    let claims: Vec<&Claim> = topic
        .claims
        .iter()
        .filter(|claim| claim.name.contains(only))
        .collect();
    let mut broken = 0_usize;
    say("");
    for claim in &claims {
        broken += usize::from(!prove(claim, size));
    }
    let all = claims.len();
    say(format_args!("\n{} of {all} claims hold", all - broken));
    Ok(if broken == 0 && all > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn mode(name: &str) -> Result<Mode> {
    let mode = Mode::ALL.into_iter().find(|mode| mode.as_str() == name);
    mode.with_context(|| {
        let names = Mode::ALL.map(Mode::as_str).join(", ");
        format!("expected one of {names}")
    })
}

/// Tries one claim and prints its line. Returns whether it holds.
fn prove(claim: &Claim, size: Size) -> bool {
    let step = Step::begin(claim.says);
    let found = (claim.check)(size);
    let seconds = step.elapsed().as_secs_f64();
    drop(step);
    let (holds, figure) = match found {
        Ok(finding) => (finding.holds, finding.figure),
        Err(error) => (false, format!("{error:#}").replace('\n', "\n             ")),
    };
    let verdict = if holds {
        "holds       "
    } else {
        "falls short "
    };
    let mut line = format!("{verdict} {}\n", claim.says);
    // Writing to a string does not fail.
    let _written = write!(
        line,
        "             {figure} [{} {seconds:.1} s]",
        claim.name
    );
    say(line);
    holds
}

fn prepare(topic: &Topic, mode: Mode) -> Result<()> {
    if !host::is_root() {
        bail!("needs root: it makes network namespaces and loads eBPF programs");
    }
    host::require(topic.programs)?;
    match mode {
        Mode::Ebpf => {}
        Mode::IptablesNft => host::require(&["iptables-nft-save"])?,
        Mode::IptablesLegacy => host::require(&["iptables-legacy-save"])?,
    }
    build::ebpf_programs()?;
    build::agent_and_peer()
}

fn list_topics() {
    let row = |topic: &Topic| {
        let about = format!("{} ({} claims)", topic.about, topic.claims.len());
        vec![format!("  {}", topic.name), about]
    };
    say("topics:");
    say(table(&TOPICS.iter().map(row).collect::<Vec<_>>()));
    say("\ncargo xtask prove TOPIC [--quick]");
}
