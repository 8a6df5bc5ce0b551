//! `sidestep detach`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{load_config, output};
use crate::{
    config::{self, Config, DEFAULT_PIN_DIRECTORY, WorkloadRule},
    datapath::{
        VipRanges,
        iptables::{self, IptablesError},
        netns::Netns,
        pins::PinDirectory,
    },
    node,
    telemetry::log::chain,
};

#[derive(Debug, Args)]
pub(super) struct DetachArgs {
    /// Where the agent keeps its programs and maps.
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PIN_DIRECTORY)]
    pin_directory: PathBuf,
    /// The agent's configuration, which names the directory, and the namespaces and address ranges of iptables rules.
    #[arg(long, short, value_name = "FILE", conflicts_with = "pin_directory")]
    config: Option<PathBuf>,
}

/// Takes everything out of the kernel that an agent left there. Fails while an agent runs.
pub(super) fn detach(args: &DetachArgs) -> ExitCode {
    let config = match args.config.as_deref().map(load_config).transpose() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let directory = match &config {
        None => Some(args.pin_directory.clone()),
        Some(config) => config.capture.pin_directory.clone(),
    };
    let pins = match directory.map(|path| PinDirectory::open_existing(&path)) {
        Some(Ok(pins)) => pins,
        None => None,
        Some(Err(error)) => return output::failed(&error),
    };
    // Rules first, as long as the lock keeps an agent from starting.
    let mut lines = Vec::new();
    let mut failed = false;
    for (place, removed) in remove_rules(config.as_ref()) {
        match removed {
            Ok(true) => lines.push(format!("removed the iptables rules in {place}\n")),
            Ok(false) => {}
            // Where nobody said that there are rules, there need be no iptables that works.
            Err(error) if config.as_ref().is_some_and(captures_by_rules) => {
                failed = true;
                output::complain(&format!("{place}: {}", chain(&error)));
            }
            Err(_no_iptables) => {}
        }
    }
    match pins.map_or(Ok(vec![]), PinDirectory::remove_all) {
        Ok(links) => lines.extend(links.iter().map(|link| format!("detached {link}\n"))),
        Err(error) => return output::failed(&error),
    }
    if lines.is_empty() && !failed {
        lines.push("nothing was attached\n".to_owned());
    }
    let printed = output::print(&lines.concat());
    if failed { ExitCode::FAILURE } else { printed }
}

fn captures_by_rules(config: &Config) -> bool {
    node::iptables_choice(config.capture.mode).is_some()
}

/// Removes rules in this namespace and in those that the configuration names; says where there were some.
fn remove_rules(config: Option<&Config>) -> Vec<(String, Result<bool, IptablesError>)> {
    let ranges = config.map_or_else(
        || {
            let (ipv4, ipv6) = config::default_ranges();
            VipRanges { ipv4, ipv6 }
        },
        node::vip_ranges,
    );
    let own = Path::new("/proc/self/ns/net");
    let named = config.iter().flat_map(|config| &config.workloads);
    let named = named.filter_map(|workload| match &workload.rule {
        // Rules go with their namespace.
        WorkloadRule::Netns(path) => path.exists().then_some(path.as_path()),
        WorkloadRule::Cgroup(_) | WorkloadRule::Unit(_) | WorkloadRule::User(_) => None,
    });
    let remove = |path: &Path| iptables::remove(&Netns::open(path)?, ranges);
    let places = std::iter::once(("this network namespace".to_owned(), own))
        .chain(named.map(|path| (path.display().to_string(), path)));
    places.map(|(place, path)| (place, remove(path))).collect()
}
