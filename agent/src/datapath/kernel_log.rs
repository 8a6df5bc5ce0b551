//! What programs with logging say of every connect, passed on to the agent's log.

use std::{
    fmt,
    os::fd::{AsRawFd, RawFd},
};

use aya::Ebpf;
use aya_log::EbpfLogger;

/// The log of the loaded programs. Keep it: without its map no program can be loaded.
pub(super) struct KernelLog(EbpfLogger<ToTracing>);

impl KernelLog {
    /// `None` if the programs were built without.
    pub(super) fn take(object: &mut Ebpf) -> Option<Self> {
        EbpfLogger::init_with_logger(object, ToTracing)
            .ok()
            .map(Self)
    }

    /// Passes on what was written so far.
    pub(super) fn flush(&mut self) {
        self.0.flush();
    }
}

impl AsRawFd for KernelLog {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl fmt::Debug for KernelLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KernelLog")
    }
}

/// The level is always that of ordinary messages: who does not want these has `capture.debug` off.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::info!(target: "sidestep::programs", "{}", record.args());
    }

    fn flush(&self) {}
}
