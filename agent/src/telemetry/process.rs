//! The process's own figures, under the names that every Prometheus client library uses.

use std::{fmt, fs, time::SystemTime};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use rustix::{
    process::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
};

use super::{
    names::{self, Samples},
    timestamp::Timestamp,
};

/// Reads `/proc/self` at each scrape. What cannot be read is left out.
#[derive(Debug)]
pub(super) struct ProcessCollector {
    started: Timestamp,
}

impl ProcessCollector {
    pub(super) fn new(started: SystemTime) -> Self {
        Self {
            started: Timestamp(started),
        }
    }
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        Samples::begin(&mut encoder, &names::PROCESS_START)?
            .gauge_f64(&[], self.started.unix_seconds())?;
        Samples::begin(&mut encoder, &names::PROCESS_CPU)?.seconds(cpu_seconds())?;
        for (metric, value) in [
            (&names::PROCESS_RESIDENT, resident_bytes()),
            (&names::PROCESS_FDS, open_fds()),
            (&names::PROCESS_FDS_MAX, getrlimit(Resource::Nofile).current),
        ] {
            if let Some(value) = value {
                Samples::begin(&mut encoder, metric)?.gauge(&[], value)?;
            }
        }
        Ok(())
    }
}

fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    std::time::Duration::try_from(used)
        .unwrap_or_default()
        .as_secs_f64()
}

fn resident_bytes() -> Option<u64> {
    resident_in(&fs::read_to_string("/proc/self/status").ok()?)
}

/// `VmRSS` in `proc_pid_status(5)`, which is in units of 1024 bytes.
pub(crate) fn resident_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The descriptor that lists the directory is among them, and is taken off again.
fn open_fds() -> Option<u64> {
    let listed = fs::read_dir("/proc/self/fd").ok()?.count();
    u64::try_from(listed.saturating_sub(1)).ok()
}
