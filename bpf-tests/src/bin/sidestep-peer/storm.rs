//! A steady load that goes on while agents come and go.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bpf_tests::wait::{Stopwatch, monotonic_ms, pause};
use parking_lot::Mutex;
use serde_json::json;

use crate::{
    clients::{name_of, targets},
    load::ask_name,
    say,
};

/// Asks every target in turn for its name, `rate` times a second in all, until the file of targets is gone.
///
/// Every failure is told with the time on the host's monotonic clock when the attempt began and ended.
pub(crate) fn storm(file: &str, threads: u64, rate: u64) -> Result<()> {
    let targets = targets(file)?;
    let over = AtomicBool::new(false);
    let (begun, right, wrong) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let failures = Mutex::new(vec![]);
    let clock = Stopwatch::start();
    let one = || -> Result<()> {
        let number = begun.fetch_add(1, Ordering::Relaxed);
        let due = Duration::from_micros(number.saturating_mul(1_000_000) / rate.max(1));
        pause(due.saturating_sub(clock.elapsed()));
        let index = usize::try_from(number)?.checked_rem(targets.len());
        let (address, expected) = index.and_then(|i| targets.get(i)).context("no target")?;
        let from = monotonic_ms();
        let end = match ask_name(*address) {
            Ok(name) if name.trim() == expected => {
                right.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Ok(name) if name.is_empty() => "closed without an answer".to_owned(),
            Ok(_other) => {
                wrong.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Err(error) => name_of(&error),
        };
        failures.lock().push(json!([from, monotonic_ms(), end]));
        Ok(())
    };
    thread::scope(|scope| -> Result<()> {
        let work = || -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                one()?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while Path::new(file).exists() {
            pause(Duration::from_millis(20));
        }
        over.store(true, Ordering::Relaxed);
        for worker in workers {
            let ended = worker.join();
            ended.map_err(|_panic| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    say(json!({
        "right": right, "wrong": wrong, "failures": *failures.lock(),
        "ms": clock.elapsed().as_millis(),
    }))
}
