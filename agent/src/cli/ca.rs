//! `sidestep ca`

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};

use super::output;
use crate::{
    catalog::model::NodeName,
    identity::{
        ca::{self, CaError, CaFileError, CaFiles, CertificateSummary},
        clock::SystemClock,
        spiffe::TrustDomain,
    },
    telemetry::timestamp::Timestamp,
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
    /// Where `root.pem` and `root-key.pem` are.
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    directory: PathBuf,
    /// Where to write; made if it is missing. Without it, beside the root.
    #[arg(long, value_name = "DIRECTORY")]
    output: Option<PathBuf>,
    /// The passphrase of the root's key, if it is encrypted.
    #[arg(long, value_name = "FILE")]
    root_passphrase_file: Option<PathBuf>,
    /// Encrypt the new key with the passphrase in this file.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// For how long it may sign; not longer than the root.
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
}

/// Makes and shows certificate authorities.
pub(super) fn ca(command: CaCommand) -> ExitCode {
    let shown = match command {
        CaCommand::Init(args) => init(args).map(|made| vec![made]).map_err(failed),
        CaCommand::Intermediate(args) => intermediate(args).map(|made| vec![made]),
        CaCommand::Show { file } => ca::show(&file).map_err(failed),
    };
    match shown {
        Ok(summaries) => output::print(&summaries.iter().map(line).collect::<String>()),
        Err(code) => code,
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form of map_err")]
fn failed(error: CaError) -> ExitCode {
    output::failed(&error)
}

fn init(args: InitArgs) -> Result<CertificateSummary, CaError> {
    std::fs::create_dir_all(&args.directory).map_err(|source| CaFileError::Write {
        path: args.directory.clone(),
        source,
    })?;
    let files = files(&args.directory, "root", args.passphrase_file);
    ca::init(&args.trust_domain, &files, &SystemClock)
}

fn intermediate(args: IntermediateArgs) -> Result<CertificateSummary, ExitCode> {
    let issuer = files(&args.directory, "root", args.root_passphrase_file);
    let root = ca::show(&issuer.certificate).map_err(failed)?;
    // A root that was made elsewhere may name no trust domain.
    if let Some(uri) = root.into_iter().find_map(|root| root.uri)
        && uri != format!("spiffe://{}", args.trust_domain)
    {
        output::complain(&format!(
            "--trust-domain {}: {} is the root of {uri}",
            args.trust_domain,
            issuer.certificate.display()
        ));
        return Err(ExitCode::from(super::USAGE));
    }
    let output = args.output.unwrap_or(args.directory);
    std::fs::create_dir_all(&output).map_err(|source| {
        let path = output.clone();
        failed(CaFileError::Write { path, source }.into())
    })?;
    let made = ca::intermediate(
        &args.trust_domain,
        &issuer,
        &args.node,
        &files(&output, args.node.as_str(), args.passphrase_file),
        DAY.saturating_mul(args.days),
        &SystemClock,
    );
    made.map_err(|error| {
        // The error speaks of the agent's configuration.
        let CaError::File(CaFileError::PassphraseMissing { path }) = &error else {
            return failed(error);
        };
        let path = path.display();
        output::complain(&format!("{path} is encrypted: give --root-passphrase-file"));
        ExitCode::FAILURE
    })
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
        Timestamp(summary.not_before.into()),
        Timestamp(summary.not_after.into()),
    )
}
