//! Clients that time what they do, and the server for them.
//!
//! Times are microseconds. What a client saw is told as percentiles of all that it did.

use std::{
    collections::HashMap,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    bench::statistics::{as_float, percentile, sorted},
    wait::{Stopwatch, pause},
};
use fastrand::Rng;
use rustix::{
    event::epoll,
    net::sockopt,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use serde_json::{Value, json};

use crate::{clients::targets, say, say_listening, servers::listener};

/// What begins with it is sent back, everything else is forgotten.
const QUESTION: u8 = b'?';

/// For a single answer under full load.
const PATIENCE: Duration = Duration::from_mins(1);

/// Sends questions back and forgets everything else, for any number of connections, in one thread.
pub(crate) fn serve(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    say_listening(address)?;
    serve_all(&listener)
}

/// The same in the place of the process `process`, which is to be stopped: takes the connections to the socket with which
/// it listens at `port`.
pub(crate) fn serve_for(process: u32, port: u16) -> Result<()> {
    let listener = listener_of(process, port)?;
    let address = listener.local_addr()?;
    say_listening(address)?;
    serve_all(&listener)
}

fn listener_of(process: u32, port: u16) -> Result<TcpListener> {
    // Fields: number, local address, remote address, state (0A is LISTEN), five more, inode (proc_net_tcp).
    let file = format!("/proc/{process}/net/tcp");
    let table = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    let end = format!(":{port:04X}");
    let inodes: Vec<String> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| {
            fields.get(1).is_some_and(|local| local.ends_with(&end)) && fields.get(3) == Some(&"0A")
        })
        .filter_map(|fields| Some(format!("socket:[{}]", fields.get(9)?)))
        .collect();
    let directory = format!("/proc/{process}/fd");
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {directory}"))?;
    let is_it = |path: &Path| {
        let leads_to = fs::read_link(path).unwrap_or_default();
        inodes.iter().any(|inode| leads_to == Path::new(inode))
    };
    let mut paths = entries.flatten().map(|entry| entry.path());
    let path = paths.find(|path| is_it(path));
    let path = path.with_context(|| format!("process {process} does not listen at {port}"))?;
    let number = path
        .file_name()
        .and_then(|name| name.to_str()?.parse().ok());
    let number = number.context("a descriptor without a number")?;
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
    let handle = pidfd_open(pid.context("no process id")?, PidfdFlags::empty())?;
    let socket = pidfd_getfd(&handle, number, PidfdGetfdFlags::empty())
        .with_context(|| format!("taking a socket of process {process}"))?;
    Ok(socket.into())
}

fn serve_all(listener: &TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let listening = watch(&poller, listener.as_fd())?;
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut events = Vec::with_capacity(1024);
    loop {
        events.clear();
        epoll::wait(&poller, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let number = event.data.u64();
            if number == listening {
                while let Ok((stream, _peer)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    streams.insert(watch(&poller, stream.as_fd())?, stream);
                }
            } else if let Some(stream) = streams.get_mut(&number)
                && !serve_once(stream, &mut buffer)
            {
                streams.remove(&number);
            }
        }
    }
}

/// Returns the number by which events tell of it.
fn watch(poller: &OwnedFd, socket: BorrowedFd<'_>) -> Result<u64> {
    let number = u64::try_from(socket.as_raw_fd())?;
    let data = epoll::EventData::new_u64(number);
    epoll::add(poller, socket, data, epoll::EventFlags::IN)?;
    Ok(number)
}

/// Takes what is there; false if the connection is over. Clients send a question and wait for all of it, so that writing
/// never blocks.
fn serve_once(stream: &mut TcpStream, buffer: &mut [u8]) -> bool {
    match stream.read(buffer) {
        Ok(0) => false,
        Ok(count) => match buffer.get(..count) {
            Some(question @ [QUESTION, ..]) => stream.write_all(question).is_ok(),
            _ => true,
        },
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// Connects to the targets in `file`, each time to one that is drawn with `seed`, and times `connect()` alone. Then it asks
/// a byte, so that it is never ahead of the server, and resets the connection, so that no port is waited for.
pub(crate) fn connects(file: &str, threads: u64, seconds: f64, seed: u64) -> Result<()> {
    let targets: Vec<SocketAddr> = targets(file)?.into_iter().map(|target| target.0).collect();
    ensure!(!targets.is_empty(), "{file} has no targets");
    let report = over_time(threads, seconds, |thread| {
        let mut random = Rng::with_seed(seed.wrapping_add(thread));
        let targets = &targets;
        Ok(move || {
            let target = targets
                .get(random.usize(..targets.len()))
                .context("no target")?;
            let clock = Stopwatch::start();
            let mut stream = TcpStream::connect(target)?;
            let time = clock.elapsed();
            prepare(&stream)?;
            ask(&mut stream, &[QUESTION], &mut [0])?;
            sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
            Ok(time)
        })
    })?;
    say(report)
}

/// Connects, asks a question of one byte and closes, over and over.
pub(crate) fn calls(address: SocketAddr, threads: u64, seconds: f64) -> Result<()> {
    let report = over_time(threads, seconds, |_thread| {
        Ok(move || {
            let clock = Stopwatch::start();
            let mut stream = TcpStream::connect(address)?;
            prepare(&stream)?;
            ask(&mut stream, &[QUESTION], &mut [0])?;
            Ok(clock.elapsed())
        })
    })?;
    say(report)
}

/// Asks questions of `bytes` over a connection in each thread, over and over.
pub(crate) fn turns(address: SocketAddr, threads: u64, seconds: f64, bytes: usize) -> Result<()> {
    say(over_time(threads, seconds, |_thread| {
        asking(address, bytes)
    })?)
}

/// Asks a question of `bytes` over a connection of its own, each time that it is called, and tells how long that took.
fn asking(address: SocketAddr, bytes: usize) -> Result<impl FnMut() -> Result<Duration>> {
    let mut stream = TcpStream::connect(address)?;
    prepare(&stream)?;
    let question = vec![QUESTION; bytes];
    let mut answer = vec![0; bytes];
    // What a path does once for a connection is not what is timed.
    ask(&mut stream, &question, &mut answer)?;
    Ok(move || {
        let clock = Stopwatch::start();
        ask(&mut stream, &question, &mut answer)?;
        Ok(clock.elapsed())
    })
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    Ok(stream.set_read_timeout(Some(PATIENCE))?)
}

fn ask(stream: &mut TcpStream, question: &[u8], answer: &mut [u8]) -> Result<()> {
    stream.write_all(question)?;
    stream.read_exact(answer)?;
    ensure!(question == answer, "another answer");
    Ok(())
}

fn seconds_of(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).context("no time")
}

/// Lets `threads` threads do, for some time and once at least, what `begin` returns for each, which returns how long it
/// took. The time begins when all have begun.
fn over_time<W: FnMut() -> Result<Duration>>(
    threads: u64,
    seconds: f64,
    begin: impl Fn(u64) -> Result<W> + Sync,
) -> Result<Value> {
    let time = seconds_of(seconds)?;
    let over = AtomicBool::new(false);
    let all_begin = Barrier::new(usize::try_from(threads)? + 1);
    let (times, elapsed) = thread::scope(|scope| -> Result<(Vec<f64>, Duration)> {
        let (over, begin, all_begin) = (&over, &begin, &all_begin);
        let work = |thread| {
            move || -> Result<Vec<f64>> {
                let begun = begin(thread);
                // Also if that failed: the others wait.
                all_begin.wait();
                let mut once = begun?;
                let mut times = vec![];
                while times.is_empty() || !over.load(Ordering::Relaxed) {
                    times.push(once()?.as_secs_f64() * 1e6);
                }
                Ok(times)
            }
        };
        let workers: Vec<_> = (0..threads).map(|it| scope.spawn(work(it))).collect();
        all_begin.wait();
        let clock = Stopwatch::start();
        pause(time);
        over.store(true, Ordering::Relaxed);
        let mut times = vec![];
        for worker in workers {
            let of_one = worker
                .join()
                .map_err(|_panic| anyhow!("a thread panicked"))??;
            times.extend(of_one);
        }
        Ok((times, clock.elapsed()))
    })?;
    let elapsed = elapsed.as_secs_f64();
    let times = sorted(&times);
    let at = |fraction| percentile(&times, fraction).context("nothing was done");
    Ok(json!({
        "count": times.len(), "per_second": as_float(times.len()) / elapsed,
        "p50_us": at(0.5)?, "p90_us": at(0.9)?, "p99_us": at(0.99)?, "max_us": at(1.0)?,
    }))
}

/// Sends over `streams` connections as fast as they take it, and waits until all of it was read.
pub(crate) fn bulk(address: SocketAddr, streams: u64, seconds: f64) -> Result<()> {
    let time = seconds_of(seconds)?;
    let ((), sent) = while_sending(address, streams, || {
        pause(time);
        Ok(())
    })?;
    say(sent)
}

/// The same as [`turns`] on one connection, while `streams` others send as fast as they take it.
pub(crate) fn beside(address: SocketAddr, streams: u64, seconds: f64, bytes: usize) -> Result<()> {
    let (asked, sent) = while_sending(address, streams, || {
        over_time(1, seconds, |_thread| asking(address, bytes))
    })?;
    say(json!({ "asked": asked, "sent": sent }))
}

/// What `work` returns, done while `streams` connections send and have begun to, and what those sent until all of it was
/// read.
fn while_sending<T>(
    address: SocketAddr,
    streams: u64,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Value)> {
    let clock = Stopwatch::start();
    let over = AtomicBool::new(false);
    let all_begin = Barrier::new(usize::try_from(streams)? + 1);
    let (done, sent) = thread::scope(|scope| {
        let one = || send(address, &all_begin, &over);
        let senders: Vec<_> = (0..streams).map(|_| scope.spawn(one)).collect();
        all_begin.wait();
        let done = work();
        over.store(true, Ordering::Relaxed);
        let sent = || -> Result<usize> {
            senders.into_iter().try_fold(0, |sum, sender| {
                let sent = sender.join();
                Ok(sum + sent.map_err(|_panic| anyhow!("a thread panicked"))??)
            })
        };
        (done, sent())
    });
    // What failed first, most likely: senders wait for whatever `work` waited for.
    let done = done?;
    let bytes = sent?;
    let per_second = as_float(bytes) / clock.elapsed().as_secs_f64();
    Ok((done, json!({ "bytes": bytes, "per_second": per_second })))
}

/// Sends until it is `over`, and waits until all of it was read. Returns how much that was.
fn send(address: SocketAddr, all_begin: &Barrier, over: &AtomicBool) -> Result<usize> {
    let buffer = vec![0x5a; 64 * 1024];
    let begin = || -> Result<TcpStream> {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(&buffer)?;
        Ok(stream)
    };
    let begun = begin();
    // Also if that failed: the others wait.
    all_begin.wait();
    let mut stream = begun?;
    let mut sent = buffer.len();
    while !over.load(Ordering::Relaxed) {
        stream.write_all(&buffer)?;
        sent += buffer.len();
    }
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // The server closes when it has read everything.
    stream.read_to_end(&mut vec![])?;
    Ok(sent)
}

/// Opens `count` connections, uses each once, says `open` and keeps them until `file` is gone.
pub(crate) fn idle(address: SocketAddr, count: u64, file: &str) -> Result<()> {
    let mut streams = vec![];
    for _ in 0..count {
        let mut stream = TcpStream::connect(address)?;
        prepare(&stream)?;
        ask(&mut stream, &[QUESTION], &mut [0])?;
        streams.push(stream);
    }
    say("open")?;
    while Path::new(file).exists() {
        pause(Duration::from_millis(20));
    }
    Ok(())
}

/// Tries to connect until that succeeds, and tells how long it took.
pub(crate) fn until(address: SocketAddr, seconds: f64) -> Result<()> {
    let clock = Stopwatch::start();
    say("trying")?;
    let deadline = seconds_of(seconds)?;
    while clock.elapsed() < deadline {
        // What nobody answers yet is not waited for: the kernel would try again after a second.
        if TcpStream::connect_timeout(&address, Duration::from_millis(10)).is_ok() {
            return say(json!({ "us": clock.elapsed().as_secs_f64() * 1e6 }));
        }
        pause(Duration::from_micros(200));
    }
    Err(anyhow!("no connection to {address} within {seconds} s"))
}
