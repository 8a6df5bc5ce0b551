//! `sidestep check`

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Args;

use super::{block_on, load_config, output};
use crate::{
    config::{Config, ConsulConfig, FilesConfig, SourceConfig},
    consul::{Client, rights},
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
    match config.as_ref().map(|config| &config.source) {
        Some(SourceConfig::Files(files)) => findings.push(certificate_authority(files)),
        Some(SourceConfig::Consul(consul)) => match block_on(consul_rights(consul)) {
            Ok(found) => findings.extend(found),
            Err(code) => return code,
        },
        None => {}
    }
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
    let tunnel = |port| SocketAddr::new(config.tunnel.listen, port);
    let addresses = [
        Some(SocketAddr::from(([127, 0, 0, 1], config.capture.port))),
        Some(tunnel(config.tunnel.port)),
        config.tunnel.hbone_port.map(tunnel),
        config.telemetry.metrics,
    ];
    let addresses = addresses.into_iter().flatten();
    Scope {
        iptables: node::iptables_choice(config.capture.mode),
        cgroups: config.capture.cgroups.clone(),
        agent_cgroup: config.agent.cgroup.clone(),
        pin_directory: config.capture.pin_directory.clone(),
        addresses: addresses.chain(config.dns.listen.clone()).collect(),
    }
}

fn certificate_authority(files: &FilesConfig) -> Finding {
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

/// Whether Consul answers, and with a token that may do what the agent needs.
async fn consul_rights(consul: &ConsulConfig) -> Vec<Finding> {
    let client = Client::new(consul.client.clone());
    let found = rights::check(&client).await.into_iter();
    found
        .map(|right| Finding {
            name: format!("Consul: {}", right.needed_for),
            status: if right.problem.is_none() {
                Status::Ok
            } else if right.is_vital {
                Status::Fail
            } else {
                Status::Warn
            },
            detail: right.problem.unwrap_or_else(|| right.rule.to_owned()),
            advice: String::new(),
        })
        .collect()
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
