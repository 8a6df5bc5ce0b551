//! `sidestep detach`

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{load_config, output};
use crate::{config::DEFAULT_PIN_DIRECTORY, datapath::pins::PinDirectory};

#[derive(Debug, Args)]
pub(super) struct DetachArgs {
    /// Where the agent keeps its programs and maps.
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PIN_DIRECTORY)]
    pin_directory: PathBuf,
    /// The agent's configuration, which names the directory.
    #[arg(long, short, value_name = "FILE", conflicts_with = "pin_directory")]
    config: Option<PathBuf>,
}

/// Takes everything out of the kernel that an agent left there. Fails while an agent runs.
pub(super) fn detach(args: &DetachArgs) -> ExitCode {
    let directory = match &args.config {
        None => Some(args.pin_directory.clone()),
        Some(path) => match load_config(path) {
            Ok(config) => config.capture.pin_directory,
            Err(code) => return code,
        },
    };
    let removed = match directory.map(|path| PinDirectory::open_existing(&path)) {
        Some(Ok(Some(pins))) => pins.remove_all(),
        Some(Ok(None)) | None => Ok(vec![]),
        Some(Err(error)) => Err(error),
    };
    match removed {
        Ok(links) if links.is_empty() => output::print("nothing was attached\n"),
        Ok(links) => {
            let lines: Vec<String> = links
                .iter()
                .map(|link| format!("detached {link}\n"))
                .collect();
            output::print(&lines.concat())
        }
        Err(error) => output::failed(&error),
    }
}
