//! Open connections to other nodes, shared by the streams of one service to another.
//!
//! A connection is authenticated as one workload and accepts one peer, so it is shared only by calls with the same
//! of both. Each is driven by the worker that opened it, which uses it first. [`super::load`] decides how many there
//! are; the task of each takes it out of the pool when nobody has used it for a while, when a certificate changed, or
//! when it is closed.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::client::SendRequest;
use hyper::http::uri::Authority;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{
    client::{self, NoStream, Opened, Target},
    connection::MAX_STREAMS,
    link::{Link, Place},
    load::{Load, plan},
    stream::HboneStream,
};
use crate::{
    identity::{certificates::Certificates, spiffe::SpiffeId, workload_tls::WorkloadTls},
    lifecycle::Shutdown,
    telemetry::log::chain,
    tunnel::connect::TunnelError,
    workers::WorkerId,
};

/// How many connections may turn out to be closing, one after the other, before a call fails. Each costs the peer
/// nothing: it has not looked at the call.
const ATTEMPTS: usize = 10;

/// Bounds of a pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// Connections per pair of services and node, unless their streams are used up.
    pub connections: usize,
    /// A connection without a stream for this long is closed.
    pub idle: Duration,
}

impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            connections: 4,
            idle: Duration::from_mins(5),
        }
    }
}

/// Connections to other nodes. Clones share them.
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    groups: Mutex<HashMap<Key, Arc<Group>>>,
    certificates: Certificates,
    shutdown: Shutdown,
    limits: PoolLimits,
}

/// What calls must have in common to share connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    source: SpiffeId,
    expected: SpiffeId,
    address: SocketAddr,
}

/// One call to an instance behind another node.
#[derive(Debug, Clone)]
pub struct Call {
    /// Who calls.
    pub tls: Arc<WorkloadTls>,
    /// Who must answer.
    pub expected: SpiffeId,
    /// Where the node takes this tunnel.
    pub address: SocketAddr,
    /// By which its node knows whose certificate to show.
    pub server_name: String,
    /// The instance, as the other node knows it.
    pub instance: SocketAddr,
    /// For the TCP connection, if there is none yet.
    pub connect_timeout: Duration,
    /// For both handshakes, if there is no connection yet; and again for the answer.
    pub handshake_timeout: Duration,
}

/// The connections for one [`Key`].
#[derive(Debug)]
struct Group {
    key: Key,
    state: Mutex<State>,
    waiting: AtomicUsize,
}

#[derive(Default)]
struct State {
    members: Vec<Member>,
    opening: Vec<watch::Receiver<Attempt>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("members", &self.members.len())
            .field("opening", &self.opening.len())
            .finish()
    }
}

#[derive(Clone)]
struct Member {
    requests: SendRequest<Bytes>,
    link: Arc<Link>,
    /// Which drives it.
    worker: Option<WorkerId>,
}

/// How opening a connection goes; `None` while it does.
type Attempt = Option<Result<(), Arc<TunnelError>>>;

/// What a call found.
enum Found {
    Member(SendRequest<Bytes>, Place),
    Opening(watch::Receiver<Attempt>),
}

impl Pool {
    /// An empty pool. Its connections end when `shutdown` does.
    pub fn new(certificates: Certificates, shutdown: Shutdown, limits: PoolLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                groups: Mutex::default(),
                certificates,
                shutdown,
                limits,
            }),
        }
    }

    /// Opens a stream to an instance: on a connection that is there, or on a new one.
    ///
    /// # Errors
    /// See [`TunnelError`]. No byte was sent then.
    pub async fn open(&self, call: &Call) -> Result<HboneStream, TunnelError> {
        let authority = Authority::try_from(call.instance.to_string())
            .map_err(|_invalid| TunnelError::ServerName(call.instance.to_string()))?;
        let mut stale = None;
        for _ in 0..ATTEMPTS {
            let (group, requests, place) = self.member(call).await?;
            let link = Arc::clone(place.link());
            match client::request(requests, place, &authority, call.handshake_timeout).await {
                Ok(stream) => return Ok(stream),
                Err(NoStream::Failed(error)) => return Err(error),
                Err(NoStream::Stale(error)) => {
                    self.shared.retire(&group, &link, "closing");
                    stale = Some(error);
                }
            }
        }
        Err(stale.map_or(TunnelError::AnswerTimeout, TunnelError::Http2))
    }

    /// Opens the first connection for calls like this one, so that the first does not wait for its handshakes.
    pub fn warm(&self, call: &Call) {
        let group = self.shared.group(&call.key());
        let mut state = group.state.lock();
        if state.members.is_empty() && state.opening.is_empty() {
            self.start(call, &group, &mut state);
        }
    }

    /// Whether there is a connection for calls like this one, or one is being opened.
    pub fn is_open(&self, call: &Call) -> bool {
        self.shared.groups.lock().contains_key(&call.key())
    }

    /// How many connections there are, and how many streams on them.
    pub fn in_use(&self) -> (usize, usize) {
        let groups: Vec<_> = self.shared.groups.lock().values().map(Arc::clone).collect();
        let each = groups.iter().map(|group| {
            let state = group.state.lock();
            let streams = state.members.iter().map(|member| member.link.streams());
            (state.members.len(), streams.sum::<usize>())
        });
        each.fold((0, 0), |all, it| (all.0 + it.0, all.1 + it.1))
    }

    /// A connection with room for a stream, and the room.
    async fn member(
        &self,
        call: &Call,
    ) -> Result<(Arc<Group>, SendRequest<Bytes>, Place), TunnelError> {
        loop {
            let group = self.shared.group(&call.key());
            let mut opening = match self.find(call, &group) {
                Found::Member(requests, place) => return Ok((group, requests, place)),
                Found::Opening(opening) => opening,
            };
            let _waiting = Waiting::begin(&group);
            // An error is a task that ended without a word: look again.
            if let Ok(done) = opening.wait_for(Option::is_some).await
                && let Some(Err(error)) = &*done
            {
                return Err(TunnelError::Pooled(Arc::clone(error)));
            }
        }
    }

    fn find(&self, call: &Call, group: &Arc<Group>) -> Found {
        let mut state = group.state.lock();
        let loads: Vec<Load> = state.members.iter().map(Member::load).collect();
        let waiting = group.waiting.load(Ordering::Relaxed);
        let most = self.shared.limits.connections;
        let plan = plan(&loads, state.opening.len(), waiting, most);
        let mut started = None;
        for _ in 0..plan.open {
            started = Some(self.start(call, group, &mut state));
        }
        if let Some(member) = plan.take.and_then(|index| state.members.get(index)) {
            return Found::Member(member.requests.clone(), member.link.place());
        }
        // One is being opened, or was just started: the plan gives no member only then.
        let opening = started.or_else(|| state.opening.first().cloned());
        Found::Opening(opening.unwrap_or_else(|| self.start(call, group, &mut state)))
    }

    /// Starts a task that opens a connection and then drives it.
    fn start(
        &self,
        call: &Call,
        group: &Arc<Group>,
        state: &mut State,
    ) -> watch::Receiver<Attempt> {
        let (done, opening) = watch::channel(None);
        state.opening.push(opening.clone());
        let shared = Arc::clone(&self.shared);
        let opener = Opener {
            group: Arc::clone(group),
            opening: opening.clone(),
        };
        let (target, tls) = (call.target(), Arc::clone(&call.tls));
        // Boxed: what the handshakes need is not kept for the life of the connection.
        let task = async move {
            let opened = Box::pin(client::open(&target, &tls, &shared.certificates)).await;
            match opened {
                Ok(opened) => {
                    let (link, driver) = opener.succeeded(opened);
                    drop(done.send(Some(Ok(()))));
                    Box::pin(shared.drive(&opener.group, &link, driver)).await;
                    shared.retire(&opener.group, &link, "closed");
                }
                Err(error) => {
                    tracing::debug!(address = %target.address, error = %chain(&error), "no tunnel");
                    opener.failed();
                    drop(done.send(Some(Err(Arc::new(error)))));
                    shared.forget_if_empty(&opener.group);
                }
            }
        };
        self.shared.shutdown.spawn("tunnel", task);
        opening
    }
}

/// A task that opens one connection of a group.
struct Opener {
    group: Arc<Group>,
    opening: watch::Receiver<Attempt>,
}

impl Opener {
    fn succeeded(&self, opened: Opened) -> (Arc<Link>, client::Driver) {
        let link = Arc::clone(&opened.link);
        let mut state = self.group.state.lock();
        state.members.push(Member {
            requests: opened.requests,
            link: opened.link,
            worker: WorkerId::here(),
        });
        self.not_opening(&mut state);
        (link, opened.driver)
    }

    fn failed(&self) {
        self.not_opening(&mut self.group.state.lock());
    }

    fn not_opening(&self, state: &mut State) {
        state
            .opening
            .retain(|opening| !opening.same_channel(&self.opening));
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        // Also if the task is dropped halfway: nobody may wait for it.
        self.failed();
    }
}

impl Shared {
    fn group(&self, key: &Key) -> Arc<Group> {
        let mut groups = self.groups.lock();
        let group = groups.entry(key.clone()).or_insert_with(|| {
            Arc::new(Group {
                key: key.clone(),
                state: Mutex::default(),
                waiting: AtomicUsize::new(0),
            })
        });
        Arc::clone(group)
    }

    async fn drive(&self, group: &Arc<Group>, link: &Arc<Link>, driver: client::Driver) {
        let mut used_at = Instant::now();
        let tick = || {
            if link.streams() > 0 {
                used_at = Instant::now();
            } else if used_at.elapsed() >= self.limits.idle {
                self.retire(group, link, "idle");
            }
        };
        let retire = |why| self.retire(group, link, why);
        let drained = async {
            self.shutdown.draining().await;
            // Whoever was about to use it has a moment to do so, and may need another one.
            loop {
                tokio::time::sleep(DRAIN_TICK).await;
                if link.streams() == 0 {
                    self.retire(group, link, "draining");
                    return;
                }
            }
        };
        let driven = driver.run(&self.shutdown, tick, retire);
        let mut driven = std::pin::pin!(driven);
        tokio::select! {
            biased;
            () = &mut driven => return,
            () = drained => {}
        }
        driven.await;
    }

    /// No new streams on this connection; it is closed when its last stream has ended.
    fn retire(&self, group: &Arc<Group>, link: &Arc<Link>, why: &'static str) {
        let mut state = group.state.lock();
        let before = state.members.len();
        state
            .members
            .retain(|member| !Arc::ptr_eq(&member.link, link));
        let was_member = state.members.len() < before;
        drop(state);
        if was_member {
            let Key {
                expected, address, ..
            } = &group.key;
            tracing::debug!(%address, to = %expected, why, "tunnel retired");
            self.forget_if_empty(group);
        }
    }

    /// Whoever has the group in hand may still open a connection in it, which then serves him alone.
    fn forget_if_empty(&self, group: &Arc<Group>) {
        let mut groups = self.groups.lock();
        let is_known = |known: &Arc<Group>| Arc::ptr_eq(known, group);
        let state = group.state.lock();
        let is_empty = state.members.is_empty() && state.opening.is_empty();
        drop(state);
        if is_empty && groups.get(&group.key).is_some_and(is_known) {
            groups.remove(&group.key);
        }
    }
}

/// How often a draining agent looks whether a connection has lost its last stream.
const DRAIN_TICK: Duration = Duration::from_millis(100);

impl Member {
    fn load(&self) -> Load {
        Load {
            streams: self.link.streams(),
            limit: self
                .requests
                .current_max_send_streams()
                .min(MAX_STREAMS as usize),
            is_busy: self.link.is_busy(),
            is_near: self.worker == WorkerId::here(),
        }
    }
}

impl Call {
    fn key(&self) -> Key {
        Key {
            source: self.tls.identity().clone(),
            expected: self.expected.clone(),
            address: self.address,
        }
    }

    fn target(&self) -> Target {
        Target {
            address: self.address,
            server_name: self.server_name.clone(),
            expected: self.expected.clone(),
            connect_timeout: self.connect_timeout,
            handshake_timeout: self.handshake_timeout,
        }
    }
}

/// One that waits for a connection, counted until dropped.
struct Waiting<'a>(&'a Group);

impl<'a> Waiting<'a> {
    fn begin(group: &'a Group) -> Self {
        group.waiting.fetch_add(1, Ordering::Relaxed);
        Self(group)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
