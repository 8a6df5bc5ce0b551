//! `sidestep check`

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Args;

use super::{load_config, output};
use crate::datapath::probe::{self, Finding, Scope, Status};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Also check what this configuration needs: its cgroups and ports.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Looks at this host. Fails if the agent could not run.
pub(super) fn check(args: &CheckArgs) -> ExitCode {
    let scope = match &args.config {
        None => Scope::default(),
        Some(path) => match load_config(path) {
            Ok(config) => Scope {
                cgroups: config.capture.cgroups,
                agent_cgroup: config.agent.cgroup,
                pin_directory: config.capture.pin_directory,
                addresses: [
                    Some(SocketAddr::from(([127, 0, 0, 1], config.capture.port))),
                    Some(SocketAddr::new(config.tunnel.listen, config.tunnel.port)),
                    config.telemetry.metrics,
                ]
                .into_iter()
                .flatten()
                .collect(),
            },
            Err(code) => return code,
        },
    };
    let findings = probe::run(&scope);
    let printed = if args.json {
        output::print_json(&findings)
    } else {
        output::print(&render(&findings))
    };
    if findings
        .iter()
        .any(|finding| finding.status == Status::Fail)
    {
        return ExitCode::FAILURE;
    }
    printed
}

fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        text.push_str(&format!("{mark}  {}: {}\n", finding.name, finding.detail));
        if !finding.advice.is_empty() {
            text.push_str(&format!("      {}\n", finding.advice));
        }
    }
    text
}
