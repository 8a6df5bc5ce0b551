//! `sidestep run`

use std::{io, process::ExitCode};

use clap::Args;
use tokio::runtime::{self, Runtime};

use super::{ConfigArgs, load_config, output};
use crate::{
    node, privileges, relay,
    telemetry::log,
    workers::{WorkerThreads, Workers},
};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Take over from the agent that runs with this admin socket, if there is one; it drains then.
    #[arg(long)]
    take_over: bool,
}

/// Runs the agent. What can be wrong is found before anything starts.
pub(super) fn run(args: &RunArgs) -> ExitCode {
    let path = &args.config.config;
    let config = match load_config(path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let log = match log::init(&config.telemetry.log, config.telemetry.log_format) {
        Ok(log) => log,
        Err(error) => return output::failed(&error),
    };
    match privileges::raise_open_files() {
        Ok(limit) => {
            // Two for each connection, in either direction.
            let needed = u64::from(config.limits.max_connections)
                .saturating_mul(4)
                .saturating_add(relay::PIPE_DESCRIPTORS);
            if limit < needed {
                tracing::warn!(
                    limit,
                    needed,
                    "the hard limit of open files is below what limits.max_connections may need: at the limit \
                     new connections wait (LimitNOFILE= in a unit raises it)"
                );
            }
        }
        Err(error) => tracing::warn!(error = %log::chain(&error), "limit of open files not raised"),
    }
    // Only root may make a cgroup at the top.
    if let Err(error) = node::enter_own_cgroup(&config) {
        return output::failed(&error);
    }
    // Before other threads exist: they inherit what is left.
    if let Err(error) = privileges::drop_unneeded(config.capture.mode) {
        tracing::warn!(error = %log::chain(&error), "capabilities not dropped");
    }
    let (runtime, workers, _threads) = match start(config.limits.workers) {
        Ok(started) => started,
        Err(error) => return output::failed(&error),
    };
    let running = node::run(path.clone(), config, log, workers, args.take_over);
    match runtime.block_on(Box::pin(running)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %log::chain(&error), "the agent did not start");
            ExitCode::FAILURE
        }
    }
}

/// The threads that carry connections, and as many for everything else: names may be asked as often.
fn start(workers: usize) -> io::Result<(Runtime, Workers, WorkerThreads)> {
    let runtime = runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(workers)
        .thread_name("sidestep")
        .build()?;
    let (workers, threads) = Workers::start(workers, runtime.handle().clone())?;
    Ok((runtime, workers, threads))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_workers_as_configured() {
        for count in [1, 3] {
            let (runtime, workers, _threads) = start(count).unwrap();
            assert_eq!(runtime.metrics().num_workers(), count);
            assert_eq!(workers.count(), count);
        }
    }
}
