//! Queries that are not ours: to their server and back, unchanged but for the id.
//!
//! Each goes from a socket of its own, with a port and an id that nobody can guess, and only what comes from its
//! server and repeats its question counts as the answer (RFC 5452).

#[cfg(test)]
mod tests;

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use hickory_proto::{op::ResponseCode, rr::Name};
use parking_lot::Mutex;
use rustls::crypto::SecureRandom;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{
    Query, Transport,
    fair::{Share, Slots},
    message, sockets,
};

/// How long a server has. Two tries end before resolvers give up: glibc after 5 s.
const TRY: Duration = Duration::from_secs(2);

/// How long the server has that a captured query was sent to: what glibc waits for it.
const CAPTURED_TRY: Duration = Duration::from_secs(5);

/// Tries of a query: the second at the next server, if there is one.
const TRIES: usize = 2;

/// How long a server may be silent within the transfer of a zone.
const TRANSFER_PAUSE: Duration = Duration::from_secs(10);

/// Queries on their way at once, of all that the agent answers; see [`super::fair`]. It also bounds a loop between
/// resolvers.
pub const IN_FLIGHT_MAX: usize = 4096;

/// As many servers as resolv.conf(5) has.
const SERVERS_MAX: usize = 3;

/// How often `resolv.conf` is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where queries go that are not ours.
#[derive(Debug)]
pub enum Upstreams {
    /// To these, in this order.
    Configured(Vec<SocketAddr>),
    /// To those that a `resolv.conf` names, as it is now.
    ResolvConf(ResolvConf),
}

/// A `resolv.conf` that is read again when it changes.
#[derive(Debug)]
pub struct ResolvConf {
    path: PathBuf,
    /// Our own listeners, which would make a loop.
    own: Vec<SocketAddr>,
    read: Mutex<Option<ReadConf>>,
}

#[derive(Debug)]
struct ReadConf {
    looked_at: Instant,
    modified: Option<SystemTime>,
    servers: Vec<SocketAddr>,
}

impl ResolvConf {
    /// The servers in `path` but for `own`.
    pub fn new(path: PathBuf, own: Vec<SocketAddr>) -> Self {
        Self {
            path,
            own,
            read: Mutex::default(),
        }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        let mut read = self.read.lock();
        if let Some(read) = &*read
            && read.looked_at.elapsed() < LOOK
        {
            return read.servers.clone();
        }
        let modified = fs::metadata(&self.path)
            .and_then(|file| file.modified())
            .ok();
        let same = read.as_ref().filter(|read| read.modified == modified);
        let servers = match same {
            Some(same) => same.servers.clone(),
            None => read_resolv_conf(&self.path, &self.own),
        };
        *read = Some(ReadConf {
            looked_at: Instant::now(),
            modified,
            servers: servers.clone(),
        });
        servers
    }
}

/// One that cannot be read names no server, and the log says why.
fn read_resolv_conf(path: &Path, own: &[SocketAddr]) -> Vec<SocketAddr> {
    match fs::read_to_string(path) {
        Ok(text) => name_servers(&text, own),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "name servers not read");
            vec![]
        }
    }
}

/// The servers of a `resolv.conf` (resolv.conf(5)), but for `own`.
pub(crate) fn name_servers(text: &str, own: &[SocketAddr]) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver").then_some(())?;
            let address: IpAddr = words.next()?.parse().ok()?;
            Some(SocketAddr::new(address, 53))
        })
        .take(SERVERS_MAX)
        .filter(|server| !own.contains(server))
        .collect()
}

/// A query got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// It is for nobody: no upstream is configured, nor does `resolv.conf` name one besides ourselves.
    #[error("no upstream to ask")]
    NoUpstream,
    /// As many of the same asker wait as others may have still.
    #[error("too many queries wait for upstreams")]
    TooMany,
    /// The server was silent.
    #[error("no answer from {server} over {}", .transport.as_str())]
    NoAnswer {
        /// The last that was asked.
        server: SocketAddr,
        /// How.
        transport: Transport,
    },
    /// The server could not be asked.
    #[error("ask {server} over {}", .transport.as_str())]
    Exchange {
        /// The last that was asked.
        server: SocketAddr,
        /// How.
        transport: Transport,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A query was brought to a server, and what that said to who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Brought {
    /// The server.
    pub(super) server: SocketAddr,
    /// The code of its first message.
    pub(super) code: ResponseCode,
}

/// Brings queries to servers.
#[derive(Debug)]
pub struct Forwarder {
    upstreams: Upstreams,
    /// A domain that others answer for, and who does.
    elsewhere: Option<(Name, Vec<SocketAddr>)>,
    /// Of those that were not captured.
    in_flight: Arc<Share>,
    random: &'static dyn SecureRandom,
}

impl Forwarder {
    /// Asks `upstreams` what was not captured on its way to another.
    pub fn new(upstreams: Upstreams) -> Self {
        Self {
            upstreams,
            elsewhere: None,
            in_flight: Slots::new(IN_FLIGHT_MAX).share(),
            random: rustls::crypto::aws_lc_rs::default_provider().secure_random,
        }
    }

    /// Asks `servers` instead for names below `domain`, if there are any.
    #[must_use]
    pub fn with_domain(mut self, domain: Name, servers: Vec<SocketAddr>) -> Self {
        self.elsewhere = (!servers.is_empty()).then_some((domain, servers));
        self
    }

    /// Takes no more than a share of `slots` for what was not captured.
    #[must_use]
    pub fn sharing(mut self, slots: &Arc<Slots>) -> Self {
        self.in_flight = slots.share();
        self
    }

    /// Whether there is anybody to ask.
    pub fn has_upstreams(&self) -> bool {
        match &self.upstreams {
            Upstreams::Configured(servers) => !servers.is_empty(),
            Upstreams::ResolvConf(file) => !file.servers().is_empty(),
        }
    }

    /// Asks, and brings what comes to `replies`. An error means that nothing was brought.
    pub(super) async fn exchange(
        &self,
        query: &Query<'_>,
        replies: &mpsc::Sender<Vec<u8>>,
    ) -> Result<Brought, ForwardError> {
        // Who was captured asks again by itself, as often and as late as it did before.
        let (servers, tries, limit) = match query.original {
            Some(original) => (vec![original.server], 1, CAPTURED_TRY),
            None => (self.servers(query.message), TRIES, TRY),
        };
        let share = query.original.map(|o| &o.namespace.in_flight);
        let _slot = share
            .unwrap_or(&self.in_flight)
            .take()
            .ok_or(ForwardError::TooMany)?;
        let mut error = ForwardError::NoUpstream;
        for server in servers.into_iter().cycle().take(tries) {
            let transport = query.transport;
            let tried = match transport {
                Transport::Udp => self.over_udp(query, server, limit, replies).await,
                Transport::Tcp => self.over_tcp(query, server, limit, replies).await,
            };
            match tried {
                Ok(code) => return Ok(Brought { server, code }),
                Err(source) if source.kind() == io::ErrorKind::TimedOut => {
                    error = ForwardError::NoAnswer { server, transport };
                }
                Err(source) => {
                    error = ForwardError::Exchange {
                        server,
                        transport,
                        source,
                    };
                }
            }
        }
        Err(error)
    }

    /// Who is to be asked what was not captured on its way to another.
    fn servers(&self, query: &[u8]) -> Vec<SocketAddr> {
        if let Some((domain, servers)) = &self.elsewhere
            && message::question(query).is_some_and(|question| domain.zone_of(&question.name))
        {
            return servers.clone();
        }
        match &self.upstreams {
            Upstreams::Configured(servers) => servers.clone(),
            Upstreams::ResolvConf(file) => file.servers(),
        }
    }

    async fn over_udp(
        &self,
        asking: &Query<'_>,
        server: SocketAddr,
        patience: Duration,
        replies: &mpsc::Sender<Vec<u8>>,
    ) -> io::Result<ResponseCode> {
        let query = asking.message;
        // The kernel picks the port at random. Connected, the socket takes only what comes from the server.
        let socket = sockets::datagrams(asking.original, server).await?;
        socket.connect(server).await?;
        let (asked, sent) = self.renumbered(query)?;
        socket.send(&sent).await?;
        // One byte more shows what is too long.
        let limit = usize::from(message::udp_size(query));
        let mut buffer = vec![0; limit + 1];
        let answered = async {
            loop {
                let length = socket.recv(&mut buffer).await?;
                let answer = buffer.get(..length).unwrap_or_default();
                if is_answer(answer, &sent) {
                    return Ok::<_, io::Error>(length);
                }
            }
        };
        let length = timeout(patience, answered).await??;
        let answer = if length > limit {
            // No more than the client can take: it comes again over TCP.
            message::truncated(query, true).ok_or(io::ErrorKind::InvalidData)?
        } else {
            buffer.truncate(length);
            message::with_id(buffer, asked)
        };
        let code = message::code(&answer);
        // Nobody is left to take it: nobody waits for it.
        let _gone = replies.send(answer).await;
        Ok(code)
    }

    async fn over_tcp(
        &self,
        asking: &Query<'_>,
        server: SocketAddr,
        patience: Duration,
        replies: &mpsc::Sender<Vec<u8>>,
    ) -> io::Result<ResponseCode> {
        let query = asking.message;
        let (asked, sent) = self.renumbered(query)?;
        let first = async {
            let socket = sockets::stream(asking.original, server).await?;
            let mut stream = socket.connect(server).await?;
            stream.set_nodelay(true)?;
            stream.write_all(&framed(&sent)?).await?;
            loop {
                let answer = read_message(&mut stream).await?;
                if is_answer(&answer, &sent) {
                    return Ok::<_, io::Error>((stream, answer));
                }
            }
        };
        let (mut stream, answer) = timeout(patience, first).await??;
        let code = message::code(&answer);
        let mut transfer = message::transfer(query, &answer);
        let _gone = replies.send(message::with_id(answer, asked)).await;
        while let Some(going) = &mut transfer {
            // What was brought cannot be taken back: a transfer that breaks off ends here.
            let next = timeout(TRANSFER_PAUSE, read_message(&mut stream)).await;
            let Ok(Ok(next)) = next else { break };
            let is_last = going.is_last(&next);
            let sent = replies.send(message::with_id(next, asked)).await;
            if is_last || sent.is_err() {
                break;
            }
        }
        Ok(code)
    }

    /// The id that the client chose, and the query under one of our own.
    fn renumbered(&self, query: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let asked = message::id(query).ok_or(io::ErrorKind::InvalidInput)?;
        let mut id = [0; 2];
        let filled = self.random.fill(&mut id);
        filled.map_err(|_no_random| io::Error::other("no random numbers"))?;
        let sent = message::with_id(query.to_vec(), u16::from_be_bytes(id));
        Ok((asked, sent))
    }
}

/// Whether `answer` is one to `sent`: a response of its id with its question. An error may leave the question out.
fn is_answer(answer: &[u8], sent: &[u8]) -> bool {
    if !message::is_response(answer) || message::id(answer) != message::id(sent) {
        return false;
    }
    match (
        message::question_bytes(answer),
        message::question_bytes(sent),
    ) {
        // Some servers write names in another case.
        (Some(said), Some(asked)) => said.eq_ignore_ascii_case(asked),
        (None, _) => message::is_error(answer) || message::question_bytes(sent).is_none(),
        (Some(_), None) => false,
    }
}

/// RFC 1035, section 4.2.2: two bytes of length before each message.
pub(super) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    Ok([&length.to_be_bytes(), message].concat())
}

/// The next message. Not cancel-safe: a length that was read is lost.
pub(super) async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}
