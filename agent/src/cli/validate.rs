//! `sidestep validate`

use std::{path::Path, process::ExitCode, time::Duration};

use super::{load_config, output};
use crate::{
    catalog::{
        file::{FileSource, Severity},
        vip::VipAllocator,
    },
    config::SourceConfig,
    node,
    telemetry::log::chain,
};

/// Reads configuration and catalog as the agent would, and says what is wrong with them.
pub(super) fn validate(path: &Path) -> ExitCode {
    let config = match load_config(path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let SourceConfig::Files(files) = &config.source else {
        return output::print(&format!("{}: good\n", path.display()));
    };
    let mut source = FileSource::new(files.directory.clone(), node::file_context(&config, files));
    let loaded = source.load();
    let mut wrong = false;
    for problem in &loaded.problems {
        wrong |= problem.severity == Severity::Error;
        output::complain(&problem.to_string());
    }
    // The addresses of this catalog alone: those given out before are the running agent's.
    let (allocator, _no_file) = VipAllocator::new(node::vip_pools(&config), None, Duration::ZERO);
    let store = node::catalog_store(&config, allocator);
    for problem in store.publish(loaded.snapshot.clone()) {
        wrong = true;
        output::complain(&chain(&problem).to_string());
    }
    let pools = node::vip_pools(&config);
    let catalog = store.current();
    let away = node::away_problems(&config.away, &catalog, pools);
    for problem in away.into_iter().chain(catalog.instance_problems()) {
        wrong = true;
        output::complain(&problem);
    }
    if wrong {
        return ExitCode::FAILURE;
    }
    let instances: usize = loaded
        .snapshot
        .services
        .values()
        .map(|s| s.instances.len())
        .sum();
    output::print(&format!(
        "{}: good\n{}: good: {} services, {instances} instances, {} intentions\n",
        path.display(),
        files.directory.display(),
        loaded.snapshot.services.len(),
        loaded.snapshot.intentions.len(),
    ))
}
