//! A proxy between an agent and its Consul that can be told to lie, while it runs.
//!
//! It speaks HTTP/1.1 to the agent and asks Consul by HTTP/1.0, whose answers end with their connection. A fault also
//! takes hold of requests that wait in Consul for a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;

use crate::{
    namespace::Namespace,
    node::Node,
    wait::{monotonic_ms, pause},
};

/// Where the proxy listens on its node, and where Consul does.
const NEAR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8_499);
const CONSUL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8_500);

/// How often a request that waits looks for a fault, and for the end of who asked.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What becomes of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It comes at once, and once for each path, with this `X-Consul-Index`.
    Index(u64),
    /// This one comes, and Consul is not asked.
    Answer(Canned),
    /// This one comes, and Consul is not asked, if any server may answer: as one does that lags behind the leader.
    Lag(Canned),
    /// It ends in the middle of its body.
    Cut,
    /// It does not come, as long as the fault lasts.
    Stall,
}

/// An answer that is not Consul's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canned {
    /// The HTTP status.
    pub status: u16,
    /// Names and values.
    pub headers: &'static [(&'static str, &'static str)],
    /// All of it.
    pub body: &'static str,
}

/// What the paths begin with that it concerns, and what becomes of their answers.
pub type Rule = (&'static str, Fault);

/// The proxy of a node; ends when dropped.
#[derive(Debug)]
pub struct Faults(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    rules: Mutex<Vec<Rule>>,
    /// The paths at which a rule was applied since the rules were set.
    struck: Mutex<BTreeSet<String>>,
    asked: Mutex<Vec<(u64, String)>>,
    is_over: AtomicBool,
}

impl Faults {
    /// Begins to relay, on `node`, to its Consul agent of [`super::Consul::dev`].
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(node: &Node) -> Result<Self> {
        let listen = || Ok(TcpListener::bind(NEAR)?);
        let listener = node.namespace().run(listen);
        let listener = listener.with_context(|| format!("listening at {NEAR}"))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::<Shared>::default();
        let (namespace, relaying) = (node.namespace().clone(), Arc::clone(&shared));
        thread::spawn(move || {
            while !relaying.is_over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((near, _)) => serve_in_thread(near, &namespace, &relaying),
                    Err(_nobody_yet) => pause(LOOK_EVERY),
                }
            }
        });
        Ok(Self(shared))
    }

    /// Where the agent is to find its Consul: a URL.
    pub fn base() -> String {
        format!("http://{NEAR}")
    }

    /// From now on these are the faults; the first that fits counts.
    pub fn set(&self, rules: &[Rule]) {
        let mut current = self.0.rules.lock();
        self.0.struck.lock().clear();
        rules.clone_into(&mut current);
    }

    /// From now on there are none.
    pub fn clear(&self) {
        self.set(&[]);
    }

    /// Whether a fault was seen at a path that begins so, since the faults were set.
    pub fn has_struck(&self, path: &str) -> bool {
        let struck = self.0.struck.lock();
        struck.iter().any(|found| found.starts_with(path))
    }

    /// The most requests in any one second since `from`, on the clock of [`monotonic_ms`], and in all.
    pub fn busiest_second(&self, from: u64) -> (usize, usize) {
        let asked = self.0.asked.lock();
        let times = asked.iter().map(|(time, _)| *time);
        let times: Vec<u64> = times.filter(|time| *time >= from).collect();
        let within = |begin: u64| {
            let second = begin..begin + 1_000;
            times.iter().filter(|time| second.contains(time)).count()
        };
        let most = times.iter().map(|time| within(*time)).max();
        (most.unwrap_or(0), times.len())
    }

    /// What was asked since `from`: how often each path.
    pub fn asked(&self, from: u64) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for (time, path) in &*self.0.asked.lock() {
            if *time >= from {
                *counts.entry(path.clone()).or_default() += 1;
            }
        }
        counts
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    /// The fault that is to be seen now.
    fn fault(&self, request: &Request) -> Option<Fault> {
        let rules = self.rules.lock();
        let mut rules = rules.iter();
        let (_, fault) = rules.find(|(prefix, _)| request.path.starts_with(prefix))?;
        let applies = match fault {
            Fault::Index(_) => !self.struck.lock().contains(&request.path),
            Fault::Lag(_) => request.line.contains("stale="),
            Fault::Answer(_) | Fault::Cut | Fault::Stall => true,
        };
        applies.then_some(*fault)
    }

    fn strike(&self, request: &Request) {
        self.struck.lock().insert(request.path.clone());
    }
}

fn serve_in_thread(near: TcpStream, namespace: &Namespace, shared: &Arc<Shared>) {
    let (namespace, shared) = (namespace.clone(), Arc::clone(shared));
    thread::spawn(move || {
        // An error is the end of one of the two: the other is told by the end of its connection.
        let _ended = namespace
            .enter()
            .map_err(io::Error::other)
            .and_then(|()| serve(&near, &shared));
    });
}

fn serve(near: &TcpStream, shared: &Shared) -> io::Result<()> {
    near.set_nonblocking(false)?;
    let mut reader = BufReader::new(near.try_clone()?);
    while let Some(request) = Request::read(&mut reader)? {
        let asked = (monotonic_ms(), request.path.clone());
        shared.asked.lock().push(asked);
        let (answer, length) = loop {
            let fault = shared.fault(&request);
            if fault.is_some() {
                shared.strike(&request);
            }
            match fault {
                None => {
                    if let Some(answer) = ask(&request.line, &request, near, shared)? {
                        break (answer, usize::MAX);
                    }
                }
                Some(Fault::Index(index)) => {
                    let line = request.without_waiting();
                    if let Some(mut answer) = ask(&line, &request, near, shared)? {
                        answer.set_index(index);
                        break (answer, usize::MAX);
                    }
                }
                Some(Fault::Answer(canned) | Fault::Lag(canned)) => {
                    break (Answer::from(canned), usize::MAX);
                }
                Some(Fault::Cut) => {
                    let line = request.without_waiting();
                    if let Some(answer) = ask(&line, &request, near, &Shared::default())? {
                        let half = answer.body.len() / 2;
                        break (answer, half);
                    }
                }
                Some(Fault::Stall) => {
                    pause(LOOK_EVERY);
                    if shared.is_over.load(Ordering::Relaxed) || has_gone(near)? {
                        return Ok(());
                    }
                }
            }
        };
        answer.write(near, length)?;
        if length != usize::MAX {
            return Ok(());
        }
    }
    Ok(())
}

/// A request as it came.
#[derive(Debug)]
struct Request {
    /// Without the version.
    line: String,
    path: String,
    headers: String,
    body: Vec<u8>,
}

impl Request {
    /// `None` at the end of the connection.
    fn read(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Self>> {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(None);
        }
        let line = first.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        let target = line.split(' ').nth(1).unwrap_or_default();
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let (mut headers, mut length) = (String::new(), 0);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = value_of(&header, "content-length") {
                length = value.parse().map_err(io::Error::other)?;
            }
            headers += &header;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        Ok(Some(Self {
            line,
            path,
            headers,
            body,
        }))
    }

    /// Its first line without what makes Consul wait for a change.
    fn without_waiting(&self) -> String {
        let (target, query) = self.line.split_once('?').unwrap_or((&self.line, ""));
        let waits = |part: &&str| part.starts_with("index=") || part.starts_with("wait=");
        let rest: Vec<&str> = query.split('&').filter(|part| !waits(part)).collect();
        format!("{target}?{}", rest.join("&"))
    }
}

/// An answer as it is passed on.
#[derive(Debug)]
struct Answer {
    /// Status line and headers, without those of the framing.
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn parse(raw: &[u8]) -> io::Result<Self> {
        let end = raw.windows(4).position(|four| four == b"\r\n\r\n");
        let (head, body) = end
            .and_then(|end| Some((raw.get(..end)?, raw.get(end + 4..)?)))
            .ok_or_else(|| io::Error::other("an answer without a head"))?;
        let head = String::from_utf8_lossy(head).replacen("HTTP/1.0", "HTTP/1.1", 1);
        let framing = |line: &&str| {
            ["content-length", "connection", "transfer-encoding"]
                .iter()
                .any(|name| value_of(line, name).is_some())
        };
        let lines: Vec<&str> = head.lines().filter(|line| !framing(line)).collect();
        Ok(Self {
            head: lines.join("\r\n"),
            body: body.to_owned(),
        })
    }

    fn set_index(&mut self, index: u64) {
        let is_other = |line: &&str| value_of(line, "x-consul-index").is_none();
        let lines: Vec<&str> = self.head.lines().filter(is_other).collect();
        self.head = format!("{}\r\nX-Consul-Index: {index}", lines.join("\r\n"));
    }

    /// Writes it, and at most `length` bytes of its body.
    fn write(&self, mut to: &TcpStream, length: usize) -> io::Result<()> {
        let all = self.body.len();
        write!(to, "{}\r\nContent-Length: {all}\r\n\r\n", self.head)?;
        to.write_all(self.body.get(..length.min(all)).unwrap_or_default())
    }
}

impl From<Canned> for Answer {
    fn from(canned: Canned) -> Self {
        let mut head = format!("HTTP/1.1 {} Canned", canned.status);
        for (name, value) in canned.headers {
            head += &format!("\r\n{name}: {value}");
        }
        Self {
            head,
            body: canned.body.as_bytes().to_owned(),
        }
    }
}

/// Asks Consul with `line`, and all else as in `request`. `None` if there is to be a fault meanwhile; an error if
/// whoever asks has gone.
fn ask(
    line: &str,
    request: &Request,
    near: &TcpStream,
    shared: &Shared,
) -> io::Result<Option<Answer>> {
    let mut far = TcpStream::connect(CONSUL)?;
    write!(far, "{line} HTTP/1.0\r\n{}\r\n", request.headers)?;
    far.write_all(&request.body)?;
    far.set_read_timeout(Some(LOOK_EVERY))?;
    let (mut raw, mut part) = (vec![], [0; 8 << 10]);
    loop {
        match far.read(&mut part) {
            Ok(0) => return Answer::parse(&raw).map(Some),
            Ok(length) => raw.extend_from_slice(part.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if shared.is_over.load(Ordering::Relaxed) || has_gone(near)? {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                if shared.fault(request).is_some() {
                    return Ok(None);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether whoever asked has closed the connection.
fn has_gone(near: &TcpStream) -> io::Result<bool> {
    near.set_nonblocking(true)?;
    let peeked = near.peek(&mut [0]);
    near.set_nonblocking(false)?;
    Ok(match peeked {
        Ok(length) => length == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    })
}

fn value_of<'a>(header: &'a str, name: &str) -> Option<&'a str> {
    let (found, value) = header.split_once(':')?;
    found.eq_ignore_ascii_case(name).then(|| value.trim())
}
