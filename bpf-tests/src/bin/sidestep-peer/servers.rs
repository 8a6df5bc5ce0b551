//! Servers: each tells by its answer what reached it.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::{
    event::epoll,
    net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt},
};
use sha2::{Digest as _, Sha256};

use crate::{say, say_listening};

/// Bursts of thousands of connections are what some tests are about: std's 128 would drop them.
const BACKLOG: i32 = 4096;

pub(crate) fn listener(address: SocketAddr) -> Result<TcpListener> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        Some(ipproto::TCP),
    )?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address).with_context(|| format!("binding {address}"))?;
    listen(&socket, BACKLOG).with_context(|| format!("listening on {address}"))?;
    Ok(TcpListener::from(socket))
}

/// Answers every connection to the `i`-th port with `prefix` and `i`, then closes.
pub(crate) fn names(first: SocketAddr, count: u16, prefix: &str) -> Result<()> {
    for index in 0..count {
        let mut address = first;
        address.set_port(first.port() + index);
        let listener = listener(address)?;
        let answer = format!("{prefix}{index}\n");
        thread::Builder::new()
            .stack_size(64 * 1024)
            .spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    // The client says if it did not get it.
                    let _sent = stream.write_all(answer.as_bytes());
                }
            })?;
    }
    say_listening(first)?;
    loop {
        thread::park();
    }
}

/// Greets first and holds the connection until the client closes it.
pub(crate) fn banner(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    say_listening(address)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        say(format_args!("accepted {}", stream.peer_addr()?))?;
        thread::spawn(move || -> Result<()> {
            stream.write_all(b"220 this banner is for friends\r\n")?;
            discard(&mut stream)
        });
    }
    Ok(())
}

/// Reads each connection to its end and answers with the SHA-256 and the count of what came.
pub(crate) fn hash(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    say_listening(address)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || -> Result<()> {
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; 256 * 1024];
            let mut total = 0_u64;
            loop {
                let count = stream.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                hasher.update(buffer.get(..count).unwrap_or_default());
                total += u64::try_from(count)?;
            }
            let digest = hex(&hasher.finalize());
            Ok(stream.write_all(format!("{digest} {total}\n").as_bytes())?)
        });
    }
    Ok(())
}

/// Reads one byte of each connection and resets it.
pub(crate) fn reset(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    say_listening(address)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || -> Result<()> {
            stream.read_exact(&mut [0])?;
            // Lingering for no time is what makes close() send RST instead of FIN.
            Ok(sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?)
        });
    }
    Ok(())
}

/// Reads and forgets.
pub(crate) fn sink(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    say_listening(address)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || discard(&mut stream));
    }
    Ok(())
}

fn discard(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Sends without end on each connection, and reads what comes.
pub(crate) fn talk(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    say_listening(address)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut writer = stream.try_clone()?;
        thread::spawn(move || send_forever(&mut writer));
        thread::spawn(move || discard(&mut stream));
    }
    Ok(())
}

/// Until that fails; returns why.
pub(crate) fn send_forever(stream: &mut TcpStream) -> std::io::Error {
    let buffer = vec![0x5a; 64 * 1024];
    loop {
        if let Err(error) = stream.write_all(&buffer) {
            return error;
        }
    }
}

/// Sends everything back, for any number of connections, in one thread.
pub(crate) fn echo(address: SocketAddr) -> Result<()> {
    let listener = listener(address)?;
    listener.set_nonblocking(true)?;
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let listening = number_of(&listener)?;
    epoll::add(
        &poller,
        &listener,
        epoll::EventData::new_u64(listening),
        epoll::EventFlags::IN,
    )?;
    say_listening(address)?;
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
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
                    let number = number_of(&stream)?;
                    epoll::add(
                        &poller,
                        &stream,
                        epoll::EventData::new_u64(number),
                        epoll::EventFlags::IN,
                    )?;
                    streams.insert(number, stream);
                }
            } else if let Some(stream) = streams.get_mut(&number)
                && !echo_once(stream)
            {
                streams.remove(&number);
            }
        }
    }
}

/// Sends back what is there; false if the connection is over. Clients send a few bytes and wait for
/// them, so that writing never blocks.
fn echo_once(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => false,
        Ok(count) => stream
            .write_all(buffer.get(..count).unwrap_or_default())
            .is_ok(),
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

fn number_of(socket: &impl AsFd) -> Result<u64> {
    Ok(u64::try_from(socket.as_fd().as_raw_fd())?)
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _written = write!(text, "{byte:02x}");
        text
    })
}
