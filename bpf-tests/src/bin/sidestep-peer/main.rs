//! The other side of tests: small servers and clients that check what arrives, and the janitor of a run.
//!
//! Servers say `listening` when they are; clients say what they saw as one line of JSON.

mod janitor;
mod servers;
mod clients;
mod load;
mod storm;
mod timed;

use std::{
    env,
    io::{self, Write as _},
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail};

/// One line per mode: its name and arguments.
const USAGE: &str = "\
usage: sidestep-peer MODE ARGUMENT...
  janitor RUN                      remove the run's traces when standard input ends
  scratch                          make a run with a process in it and wait to be killed
  names ADDRESS COUNT PREFIX       COUNT listeners from ADDRESS's port on; the i-th answers `PREFIXi`
  echo ADDRESS                     send everything back
  banner ADDRESS                   speak first; say `accepted` for every connection
  hash ADDRESS                     read to the end, then answer with the SHA-256
  reset ADDRESS                    read one byte, then reset the connection
  sink ADDRESS                     read and forget
  talk ADDRESS                     send without end, and read
  talk-to ADDRESS                  the same as a client, until it fails
  read ADDRESS                     connect and read to the end
  upload ADDRESS BYTES [FILE]      send, the second half once FILE is gone, close that direction, read the answer
  live ADDRESS                     exchange bytes until it fails
  ask FILE THREADS COUNT           COUNT connections to the targets in FILE, checking the names that answer
  storm FILE THREADS RATE          like ask, RATE connections a second, until FILE is gone; tells when each failed
  hold FILE THREADS COUNT          as many connections to echo servers at once, all used, then closed
  pour ADDRESS THREADS SECONDS     send as fast as it goes
  cycle ADDRESS THREADS SECONDS    connect, exchange one byte, close, again
  trips ADDRESS THREADS SECONDS    exchange over as many connections, again and again
  serve ADDRESS                    send questions (what begins with `?`) back, forget the rest
  serve-for PROCESS PORT           the same with the socket by which a stopped process listens
  connects FILE THREADS SECONDS SEED  connect to targets drawn out of FILE and reset, timed
  calls ADDRESS THREADS SECONDS    connect, ask a byte, close, timed
  turns ADDRESS THREADS SECONDS BYTES  ask over as many connections, timed
  bulk ADDRESS STREAMS SECONDS     send as fast as it goes, until all is read
  beside ADDRESS STREAMS SECONDS BYTES  ask over one connection, timed, while others send as fast as it goes
  idle ADDRESS COUNT FILE          as many connections, used once, until FILE is gone
  until ADDRESS SECONDS            try to connect until that succeeds";

fn main() -> ExitCode {
    match dispatch(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to be done if even this cannot be written.
            let _written = writeln!(io::stderr(), "sidestep-peer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["janitor", run] => janitor::wait_and_clean(run),
        ["scratch"] => janitor::make_run(),
        ["names", address, count, prefix] => {
            servers::names(parsed(address)?, parsed(count)?, prefix)
        }
        ["echo", address] => servers::echo(parsed(address)?),
        ["banner", address] => servers::banner(parsed(address)?),
        ["hash", address] => servers::hash(parsed(address)?),
        ["reset", address] => servers::reset(parsed(address)?),
        ["sink", address] => servers::sink(parsed(address)?),
        ["talk", address] => servers::talk(parsed(address)?),
        ["talk-to", address] => clients::talk_to(parsed(address)?),
        ["read", address] => clients::read(parsed(address)?),
        ["upload", address, bytes] => clients::upload(parsed(address)?, parsed(bytes)?, None),
        ["upload", address, bytes, hold] => {
            clients::upload(parsed(address)?, parsed(bytes)?, Some(Path::new(hold)))
        }
        ["live", address] => clients::live(parsed(address)?),
        ["ask", file, threads, count] => load::ask(file, parsed(threads)?, parsed(count)?),
        ["storm", file, threads, rate] => storm::storm(file, parsed(threads)?, parsed(rate)?),
        ["hold", file, threads, count] => load::hold(file, parsed(threads)?, parsed(count)?),
        ["pour", address, threads, seconds] => {
            load::pour(parsed(address)?, parsed(threads)?, parsed(seconds)?)
        }
        ["cycle", address, threads, seconds] => {
            load::cycle(parsed(address)?, parsed(threads)?, parsed(seconds)?)
        }
        ["trips", address, threads, seconds] => {
            load::trips(parsed(address)?, parsed(threads)?, parsed(seconds)?)
        }
        _ => timed(&arguments),
    }
}

/// Everything that is timed, and the server for it.
fn timed(arguments: &[&str]) -> Result<()> {
    match *arguments {
        ["serve", address] => timed::serve(parsed(address)?),
        ["serve-for", process, port] => timed::serve_for(parsed(process)?, parsed(port)?),
        ["connects", file, threads, seconds, seed] => {
            timed::connects(file, parsed(threads)?, parsed(seconds)?, parsed(seed)?)
        }
        ["calls", address, threads, seconds] => {
            timed::calls(parsed(address)?, parsed(threads)?, parsed(seconds)?)
        }
        ["turns", address, threads, seconds, bytes] => timed::turns(
            parsed(address)?,
            parsed(threads)?,
            parsed(seconds)?,
            parsed(bytes)?,
        ),
        ["bulk", address, streams, seconds] => {
            timed::bulk(parsed(address)?, parsed(streams)?, parsed(seconds)?)
        }
        ["beside", address, streams, seconds, bytes] => timed::beside(
            parsed(address)?,
            parsed(streams)?,
            parsed(seconds)?,
            parsed(bytes)?,
        ),
        ["idle", address, count, file] => timed::idle(parsed(address)?, parsed(count)?, file),
        ["until", address, seconds] => timed::until(parsed(address)?, parsed(seconds)?),
        _ => bail!("{USAGE}"),
    }
}

fn parsed<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> Result<T> {
    text.parse()
        .with_context(|| format!("{text:?} is no {}", std::any::type_name::<T>()))
}

/// Says one line, at once.
fn say(line: impl std::fmt::Display) -> Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

/// Says that a server takes connections now.
fn say_listening(address: SocketAddr) -> Result<()> {
    say(format_args!("listening on {address}"))
}
