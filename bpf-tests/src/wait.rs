//! Waiting for a condition up to a deadline: the only way in which tests wait.

#![expect(
    clippy::disallowed_types,
    reason = "real programs are waited for, with the real clock"
)]

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// A program on this machine that is started, answers or ends. Generous: busy machines are no failures.
pub const SOON: Duration = Duration::from_secs(20);

/// How often a condition is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Waits until `condition` holds, which is `what`.
///
/// # Errors
/// If it does not hold after `deadline`.
pub fn wait_for(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    wait_for_value(what, deadline, || {
        Ok(if condition() { Some(()) } else { None })
    })
}

/// Waits until `attempt` returns a value, which is `what`.
///
/// # Errors
/// If there is none after `deadline`, or at once if `attempt` fails: it is then pointless to go on.
pub fn wait_for_value<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let clock = Stopwatch::start();
    loop {
        if let Some(value) = attempt().with_context(|| format!("waiting for {what}"))? {
            return Ok(value);
        }
        if clock.elapsed() > deadline {
            bail!("waited {deadline:?} for {what} in vain");
        }
        pause(PERIOD);
    }
}

/// Time since a start.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since the start.
    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

/// Lets time pass between two looks at a condition, or while something else is measured.
#[expect(
    clippy::disallowed_methods,
    reason = "there is no async runtime to block"
)]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

/// Milliseconds on the clock that all processes of this host share, and that is never set.
pub fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let whole = |value: i64| u64::try_from(value).unwrap_or_default();
    whole(now.tv_sec) * 1_000 + whole(now.tv_nsec / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_holds_is_seen() {
        let mut looks = 0;
        wait_for("three looks", SOON, || {
            looks += 1;
            looks == 3
        })
        .unwrap();
        assert_eq!(looks, 3);
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let error = wait_for("never", Duration::from_millis(20), || false).unwrap_err();
        assert!(error.to_string().contains("never"), "{error}");
    }

    #[test]
    fn a_failed_attempt_ends_the_wait() {
        let error = wait_for_value::<()>("it", SOON, || bail!("broken")).unwrap_err();
        assert_eq!(format!("{error:#}"), "waiting for it: broken");
    }
}
