//! What the agent and systemd tell each other: `sd_notify(3)`, `sd_listen_fds(3)`. Without systemd, nothing.

#![expect(unsafe_code, reason = "descriptors passed by number become owned ones")]

use std::{
    os::fd::{FromRawFd as _, OwnedFd},
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::time::Instant;

/// Takes the descriptors that systemd passed: those of the store, from an agent that was killed. Once.
pub(super) fn inherited() -> Vec<OwnedFd> {
    match sd_notify::listen_fds() {
        // SAFETY: systemd passed them to this process, whose id it named; nobody else takes them.
        Ok(passed) => passed
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect(),
        Err(error) => {
            tracing::warn!(%error, "descriptors of systemd not taken over");
            vec![]
        }
    }
}

/// Waits for something before it can serve, at most for `longer` without saying so again.
pub(super) fn waiting(status: &str, longer: Duration) {
    let micros = u32::try_from(longer.as_micros()).unwrap_or(u32::MAX);
    tell(&[
        NotifyState::Status(status),
        NotifyState::ExtendTimeoutUsec(micros),
    ]);
}

/// Serves, as `status` says in a line.
pub(super) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reads its configuration; [`ready`] ends it.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "reload not announced to systemd"),
    }
}

/// Drains, and ends then.
pub(super) fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Another process is the service from now on.
pub(super) fn replaced_by(process: u32) {
    tell(&[NotifyState::MainPid(process)]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd not notified");
    }
}

/// Tells systemd that the agent lives, as often as it wants to hear it (`WatchdogSec=`).
#[derive(Debug)]
pub(super) struct Watchdog {
    every: Option<Duration>,
    last: Option<Instant>,
}

impl Watchdog {
    pub(super) fn new() -> Self {
        Self {
            // Half the time, as sd_watchdog_enabled(3) recommends.
            every: sd_notify::watchdog_enabled().map(|limit| limit / 2),
            last: None,
        }
    }

    /// To be called by what must not hang, at least twice as often as systemd waits.
    pub(super) fn alive(&mut self) {
        let Some(every) = self.every else { return };
        if self.last.is_none_or(|last| last.elapsed() >= every) {
            self.last = Some(Instant::now());
            tell(&[NotifyState::Watchdog]);
        }
    }
}
