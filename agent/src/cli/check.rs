//! `sidestep check`

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Args;

use super::{load_config, output};
use crate::{
    config::{Config, SourceConfig},
    datapath::probe::{self, Finding, Scope, Status},
    node,
    telemetry::{log::chain, timestamp::Timestamp},
};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Also check what this configuration needs: its cgroups, ports and certificates.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Looks at this host. Fails if the agent could not run.
pub(super) fn check(args: &CheckArgs) -> ExitCode {
    let config = match args.config.as_deref().map(load_config).transpose() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let mut findings = probe::run(&config.as_ref().map(scope).unwrap_or_default());
    findings.extend(config.as_ref().map(certificate_authority));
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

fn scope(config: &Config) -> Scope {
    let addresses = [
        Some(SocketAddr::from(([127, 0, 0, 1], config.capture.port))),
        Some(SocketAddr::new(config.tunnel.listen, config.tunnel.port)),
        config.telemetry.metrics,
    ];
    Scope {
        cgroups: config.capture.cgroups.clone(),
        agent_cgroup: config.agent.cgroup.clone(),
        pin_directory: config.capture.pin_directory.clone(),
        addresses: addresses.into_iter().flatten().collect(),
    }
}

fn certificate_authority(config: &Config) -> Finding {
    let SourceConfig::Files(files) = &config.source;
    let path = files.identity.ca.certificate.display();
    let (status, detail) = match node::builtin_ca(files) {
        Ok(ca) => {
            let until = Timestamp(ca.summary().not_after.into());
            (Status::Ok, format!("{path}, valid until {until}"))
        }
        Err(error) => (Status::Fail, chain(&error).to_string()),
    };
    Finding {
        name: "certificate authority".to_owned(),
        status,
        detail,
        advice: String::new(),
    }
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
