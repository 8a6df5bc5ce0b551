//! Clients of one connection that report what the kernel and the other side told them.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::wait::{Stopwatch, pause};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    say,
    servers::{hex, send_forever},
};

/// Nothing that answers at all takes longer, even on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// Connects and reads to the end; says how far it got and how it ended.
pub(crate) fn read(address: SocketAddr) -> Result<()> {
    let clock = Stopwatch::start();
    let mut stream = match TcpStream::connect(address) {
        Ok(stream) => stream,
        Err(error) => {
            return say(json!({
                "connected": false,
                "end": name_of(&error),
                "bytes": 0,
                "ms": clock.elapsed().as_millis(),
            }));
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let peer = stream.peer_addr().map(|peer| peer.to_string());
    // Wakes a server that waits for us; no harm to one that speaks first. If it fails, it has taken the
    // error that the first read would have told.
    let sent = stream.write_all(b"?").map_err(|error| name_of(&error));
    let mut bytes = 0;
    let mut buffer = [0; 4096];
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break sent.err().unwrap_or_else(|| "end of stream".to_owned()),
            Ok(count) => bytes += count,
            Err(error) => break name_of(&error),
        }
        if bytes > 0 {
            // A banner was seen: all that matters. Half-closing lets the server end.
            let _closed = stream.shutdown(Shutdown::Write);
        }
    };
    say(json!({
        "connected": true,
        "peer": peer.unwrap_or_default(),
        "end": end,
        "bytes": bytes,
        "ms": clock.elapsed().as_millis(),
    }))
}

/// Sends `bytes` bytes, closes that direction and reads the answer to its end. With `hold`, says `up` after the first
/// half, and sends the second one when that file is gone.
pub(crate) fn upload(address: SocketAddr, bytes: u64, hold: Option<&Path>) -> Result<()> {
    let clock = Stopwatch::start();
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE * 10))?;
    let mut hasher = Sha256::new();
    let mut noise = Noise(bytes | 1);
    let mut buffer = vec![0; 256 * 1024];
    let mut left = bytes;
    let mut hold = hold;
    while left > 0 {
        if left <= bytes / 2
            && let Some(file) = hold.take()
        {
            say("up")?;
            while file.exists() {
                pause(Duration::from_millis(10));
            }
        }
        noise.fill(&mut buffer);
        let count = usize::try_from(left)?.min(buffer.len());
        let chunk = buffer.get(..count).unwrap_or_default();
        hasher.update(chunk);
        stream
            .write_all(chunk)
            .with_context(|| format!("sending, with {left} bytes to go"))?;
        left -= u64::try_from(count)?;
    }
    stream
        .shutdown(Shutdown::Write)
        .context("closing the sending direction")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("reading the answer after the half-close")?;
    say(json!({
        "sent": format!("{} {bytes}", hex(&hasher.finalize())),
        "answer": answer.trim(),
        "ms": clock.elapsed().as_millis(),
    }))
}

/// Exchanges bytes until that fails, and says `up` when it worked first and then how it ended.
pub(crate) fn live(address: SocketAddr) -> Result<()> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut exchange = || -> std::io::Result<()> {
        stream.write_all(b"!")?;
        let mut answer = [0];
        stream.read_exact(&mut answer)
    };
    exchange().context("the first exchange")?;
    say("up")?;
    loop {
        if let Err(error) = exchange() {
            return say(json!({ "end": name_of(&error) }));
        }
        pause(Duration::from_millis(20));
    }
}

/// Sends without end and reads, until that fails; says `up` once bytes came, and then how it ended.
pub(crate) fn talk_to(address: SocketAddr) -> Result<()> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut writer = stream.try_clone()?;
    let sending = thread::spawn(move || send_forever(&mut writer));
    let mut buffer = vec![0; 64 * 1024];
    let mut is_up = false;
    let end = loop {
        match stream.read(&mut buffer) {
            // The kernel tells a reset once, to who reads or to who writes.
            Ok(0) => match sending.join() {
                Ok(error) => break name_of(&error),
                Err(_panic) => bail!("the thread that sends panicked"),
            },
            Ok(_) if !is_up => {
                is_up = true;
                say("up")?;
            }
            Ok(_) => {}
            Err(error) => break name_of(&error),
        }
    };
    say(json!({ "end": end }))
}

/// The name that programmers know an error by.
pub(crate) fn name_of(error: &std::io::Error) -> String {
    let names = [
        (ErrorKind::ConnectionRefused, "ECONNREFUSED"),
        (ErrorKind::ConnectionReset, "ECONNRESET"),
        (ErrorKind::HostUnreachable, "EHOSTUNREACH"),
        (ErrorKind::NetworkUnreachable, "ENETUNREACH"),
        (ErrorKind::PermissionDenied, "EPERM"),
        (ErrorKind::BrokenPipe, "EPIPE"),
        (ErrorKind::TimedOut, "ETIMEDOUT"),
        (ErrorKind::WouldBlock, "no answer in time"),
        (ErrorKind::UnexpectedEof, "end of stream"),
    ];
    names
        .iter()
        .find(|(kind, _name)| *kind == error.kind())
        .map_or_else(|| error.to_string(), |(_kind, name)| (*name).to_owned())
}

/// Bytes that no compression and no repetition of a buffer can pass for (xorshift64).
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            for (to, from) in chunk.iter_mut().zip(self.0.to_be_bytes()) {
                *to = from;
            }
        }
    }
}

/// Lines of `address expected-answer`.
pub(crate) fn targets(file: &str) -> Result<Vec<(SocketAddr, String)>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    let targets = text
        .lines()
        .map(|line| {
            let (address, name) = line.split_once(' ').context("a line without a space")?;
            Ok((address.parse()?, name.to_owned()))
        })
        .collect::<Result<Vec<_>>>()
        .with_context(|| format!("reading {file}"))?;
    ensure!(!targets.is_empty(), "{file} has no target");
    Ok(targets)
}
