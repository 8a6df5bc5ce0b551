//! `sidestep ca`

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};

use super::output;
use crate::{
    catalog::model::NodeName,
    identity::{
        ca::{self, CaFiles, CertificateSummary},
        clock::SystemClock,
        spiffe::TrustDomain,
    },
};

const DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Subcommand)]
pub(super) enum CaCommand {
    /// Make a root: `root.pem` and `root-key.pem`. Keep the key away from the nodes.
    Init(InitArgs),
    /// Make the intermediate that signs on one node: `NODE.pem` and `NODE-key.pem`.
    Intermediate(IntermediateArgs),
    /// Show the certificates in a PEM file.
    Show {
        /// The file.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// The trust domain that every identity begins with.
    #[arg(long)]
    trust_domain: TrustDomain,
    /// Where to write; made if it is missing.
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    directory: PathBuf,
    /// Encrypt the key with the passphrase in this file.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct IntermediateArgs {
    /// The node.
    #[arg(long)]
    node: NodeName,
    /// The trust domain, as at `ca init`.
    #[arg(long)]
    trust_domain: TrustDomain,
    /// Where `root.pem` and `root-key.pem` are, and where to write.
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    directory: PathBuf,
    /// The passphrase of the root's key, if it is encrypted.
    #[arg(long, value_name = "FILE")]
    root_passphrase_file: Option<PathBuf>,
    /// Encrypt the new key with the passphrase in this file.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// For how long it may sign.
    #[arg(long, value_name = "DAYS", default_value_t = 365)]
    days: u32,
}

/// Makes and shows certificate authorities.
pub(super) fn ca(command: CaCommand) -> ExitCode {
    let shown = match command {
        CaCommand::Init(args) => {
            if let Err(error) = std::fs::create_dir_all(&args.directory) {
                return output::failed(&error);
            }
            let files = files(&args.directory, "root", args.passphrase_file);
            ca::init(&args.trust_domain, &files, &SystemClock).map(|summary| vec![summary])
        }
        CaCommand::Intermediate(args) => {
            let issuer = files(&args.directory, "root", args.root_passphrase_file);
            let own = files(&args.directory, args.node.as_str(), args.passphrase_file);
            let life = DAY.saturating_mul(args.days);
            ca::intermediate(
                &args.trust_domain,
                &issuer,
                &args.node,
                &own,
                life,
                &SystemClock,
            )
            .map(|summary| vec![summary])
        }
        CaCommand::Show { file } => ca::show(&file),
    };
    match shown {
        Ok(summaries) => output::print(&summaries.iter().map(line).collect::<String>()),
        Err(error) => output::failed(&error),
    }
}

fn files(directory: &std::path::Path, name: &str, passphrase_file: Option<PathBuf>) -> CaFiles {
    CaFiles {
        certificate: directory.join(format!("{name}.pem")),
        key: directory.join(format!("{name}-key.pem")),
        passphrase_file,
        roots: vec![directory.join("root.pem")],
    }
}

fn line(summary: &CertificateSummary) -> String {
    let kind = if summary.is_ca { "CA" } else { "leaf" };
    format!(
        "{}\n  {kind}, signed by {}\n  serial {}\n  uri {}\n  valid from {} to {}\n",
        summary.subject,
        summary.issuer,
        summary.serial,
        summary.uri.as_deref().unwrap_or("-"),
        summary.not_before,
        summary.not_after,
    )
}
