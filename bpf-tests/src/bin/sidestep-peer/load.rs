//! Clients of many connections.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::Result;
use bpf_tests::wait::{Stopwatch, pause};
use parking_lot::Mutex;
use serde_json::json;

use crate::{
    clients::{name_of, targets},
    say,
};

/// For a single answer under full load.
const PATIENCE: Duration = Duration::from_mins(1);

/// Makes `count` connections in `threads` threads, in turn to every target, and compares the name that
/// answers with the expected one.
pub(crate) fn ask(file: &str, threads: u64, count: u64) -> Result<()> {
    let work = Work::new(file, count)?;
    let wrong = AtomicU64::new(0);
    let one = |address, expected: &str| match ask_name(address) {
        Ok(name) if name.trim() == expected => work.succeeded(),
        Ok(name) if name.is_empty() => work.failed("closed without an answer".to_owned()),
        Ok(_other) => {
            wrong.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => work.failed(name_of(&error)),
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((_number, address, expected)) = work.next() {
                    one(address, expected);
                }
            });
        }
    });
    say(json!({
        "right": work.successes, "wrong": wrong, "failed": work.failures,
        "errors": *work.errors.lock(), "targets": work.targets.len(),
        "ms": work.clock.elapsed().as_millis(),
    }))
}

pub(crate) fn ask_name(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut name = String::new();
    stream.read_to_string(&mut name)?;
    Ok(name)
}

/// Opens `count` connections, keeps them all, exchanges a number over each when all are open, then closes them.
pub(crate) fn hold(file: &str, threads: u64, count: u64) -> Result<()> {
    let work = Work::new(file, count)?;
    let answered = AtomicU64::new(0);
    let all_open = Barrier::new(usize::try_from(threads)?);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut streams = hold_some(&work);
                all_open.wait();
                for (number, stream) in &mut streams {
                    let answer = exchange(stream, !*number);
                    answered.fetch_add(u64::from(answer.is_ok()), Ordering::Relaxed);
                    answer.unwrap_or_else(|error| work.failed(name_of(&error)));
                }
                // Nobody closes before everybody has seen all of them alive.
                all_open.wait();
            });
        }
    });
    say(json!({
        "opened": work.successes, "answered": answered, "failed": work.failures,
        "errors": *work.errors.lock(), "ms": work.clock.elapsed().as_millis(),
    }))
}

/// One thread's share, each with its number and used once, so that it is known to go end to end.
fn hold_some(work: &Work) -> Vec<(u64, TcpStream)> {
    let mut streams = vec![];
    while let Some((number, address, _name)) = work.next() {
        let opened = TcpStream::connect(address)
            .and_then(|mut stream| exchange(&mut stream, number).map(|()| stream));
        match opened {
            Ok(stream) => {
                work.succeeded();
                streams.push((number, stream));
            }
            Err(error) => work.failed(name_of(&error)),
        }
    }
    streams
}

fn exchange(stream: &mut TcpStream, number: u64) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&number.to_be_bytes())?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    if answer == number.to_be_bytes() {
        Ok(())
    } else {
        Err(io::Error::other("another connection's answer"))
    }
}

/// Sends over `threads` connections as fast as they take it.
pub(crate) fn pour(address: SocketAddr, threads: u64, seconds: u64) -> Result<()> {
    let total = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let clock = Stopwatch::start();
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut stream = TcpStream::connect(address)?;
                    let buffer = vec![0x5a; 64 * 1024];
                    while !over.load(Ordering::Relaxed) {
                        stream.write_all(&buffer)?;
                        total.fetch_add(u64::try_from(buffer.len())?, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        pause(Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
        joined(workers)
    })?;
    say(json!({ "bytes": total, "ms": clock.elapsed().as_millis() }))
}

/// Connects, exchanges a number and closes, over and over.
pub(crate) fn cycle(address: SocketAddr, threads: u64, seconds: u64) -> Result<()> {
    let total = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let clock = Stopwatch::start();
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while !over.load(Ordering::Relaxed) {
                        exchange(&mut TcpStream::connect(address)?, 1)?;
                        total.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        pause(Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
        joined(workers)
    })?;
    say(json!({ "connections": total, "ms": clock.elapsed().as_millis() }))
}

/// Exchanges a number over each of `threads` connections, over and over.
pub(crate) fn trips(address: SocketAddr, threads: u64, seconds: u64) -> Result<()> {
    let total = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let clock = Stopwatch::start();
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut stream = TcpStream::connect(address)?;
                    stream.set_nodelay(true)?;
                    while !over.load(Ordering::Relaxed) {
                        exchange(&mut stream, 1)?;
                        total.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        pause(Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
        joined(workers)
    })?;
    say(json!({ "trips": total, "ms": clock.elapsed().as_millis() }))
}

fn joined(workers: Vec<thread::ScopedJoinHandle<'_, Result<()>>>) -> Result<()> {
    for worker in workers {
        worker
            .join()
            .map_err(|_panic| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(())
}

/// A number of connections to be made by several threads, and what became of them.
struct Work {
    targets: Vec<(SocketAddr, String)>,
    count: u64,
    clock: Stopwatch,
    begun: AtomicU64,
    successes: AtomicU64,
    failures: AtomicU64,
    errors: Mutex<BTreeMap<String, u64>>,
}

impl Work {
    fn new(file: &str, count: u64) -> Result<Self> {
        Ok(Self {
            targets: targets(file)?,
            count,
            clock: Stopwatch::start(),
            begun: AtomicU64::new(0),
            successes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            errors: Mutex::default(),
        })
    }

    /// The next connection: its number, where to and who answers there. Every target has its turn.
    fn next(&self) -> Option<(u64, SocketAddr, &str)> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let index = usize::try_from(number)
            .ok()?
            .checked_rem(self.targets.len())?;
        let (address, name) = self.targets.get(index)?;
        (number < self.count).then_some((number, *address, name))
    }

    fn succeeded(&self) {
        self.successes.fetch_add(1, Ordering::Relaxed);
    }

    fn failed(&self, kind: String) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        *self.errors.lock().entry(kind).or_default() += 1;
    }
}
