//! The relay: carries bytes between two connections until both have ended.
//!
//! The last step of [`crate::outbound`] and [`crate::inbound`]. What one side does, the other sees: an end
//! of stream in one direction ends that direction only, a reset is passed on as a reset. It looks at no
//! byte, so protocols in which the server speaks first work at once. It decides nothing and logs nothing.
//!
//! `way` is one direction, `buffer` lends the memory it needs while bytes are on their way, `pipe` what takes bulk from
//! one plain socket to another.

mod way;
mod buffer;
mod pipe;

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::{Instant, Sleep},
};

use crate::telemetry::log::chain;
use way::{Broken, Way, WayState};

/// How many descriptors pipes may take.
pub const PIPE_DESCRIPTORS: u64 = 2 * pipe::MOST as u64;

/// How often a side that nobody reads from is asked whether it was reset.
///
/// A reset shows itself to whoever reads or writes. A side that has ended its stream, or whose bytes the
/// other side does not take, may be gone without our noticing; one `getsockopt` at this pace tells.
const PROBE_EVERY: Duration = Duration::from_secs(2);

/// A connection that can be relayed.
pub trait Endpoint: AsyncRead + AsyncWrite + Unpin {
    /// Makes the next drop send a reset instead of an orderly end.
    ///
    /// Bytes that the kernel has not sent yet are discarded by that drop.
    fn abort(&mut self);

    /// Whether a close without [`abort`](Self::abort) sends a reset as well, as when the kernel closes what a
    /// killed process held. For connections whose peer could not tell such an end from one in order.
    fn reset_on_close(&mut self, _reset: bool) {}

    /// The socket, if what it carries is what the application says, and nothing of it is kept elsewhere.
    fn plain(&self) -> Option<&TcpStream> {
        None
    }

    /// The error that waits on the connection, taken without reading or writing (`SO_ERROR`).
    fn pending_error(&mut self) -> Option<io::Error> {
        None
    }
}

impl Endpoint for TcpStream {
    fn abort(&mut self) {
        if let Err(error) = self.set_zero_linger() {
            // Only a descriptor that is no socket can fail here; the connection still closes.
            tracing::debug!(error = %chain(&error), "reset could not be arranged");
        }
    }

    fn reset_on_close(&mut self, reset: bool) {
        let linger = reset.then_some(Duration::ZERO);
        if let Err(error) = SockRef::from(&*self).set_linger(linger) {
            tracing::debug!(error = %chain(&error), "reset on close not changed");
        }
    }

    fn plain(&self) -> Option<&TcpStream> {
        Some(self)
    }

    fn pending_error(&mut self) -> Option<io::Error> {
        self.take_error().ok().flatten()
    }
}

/// A Unix socket knows no reset: however it is closed, the other end reads an end of stream (unix(7)).
impl Endpoint for UnixStream {
    fn abort(&mut self) {}

    fn pending_error(&mut self) -> Option<io::Error> {
        self.take_error().ok().flatten()
    }
}

/// Bytes that a connection has carried so far. Readable by anyone while it lives.
#[derive(Debug, Default)]
pub struct Counts {
    /// Bytes written to the upstream.
    pub to_upstream: AtomicU64,
    /// Bytes written to the downstream.
    pub to_downstream: AtomicU64,
}

impl Counts {
    /// Bytes written to the upstream and to the downstream, in this order.
    pub fn snapshot(&self) -> (u64, u64) {
        (
            self.to_upstream.load(Ordering::Relaxed),
            self.to_downstream.load(Ordering::Relaxed),
        )
    }
}

/// How a relay ended.
#[derive(Debug)]
pub enum End {
    /// Both directions ended in order.
    Finished,
    /// The downstream failed; both sides are aborted.
    DownstreamReset(io::Error),
    /// The upstream failed; both sides are aborted.
    UpstreamReset(io::Error),
    /// No byte went either way for the idle timeout; both sides are aborted.
    Idle,
    /// The `cut` future resolved; both sides are aborted.
    Cut,
}

/// Carries bytes both ways until both directions have ended, a side fails, nothing has moved for `idle`,
/// or `cut` resolves.
///
/// On every end but [`End::Finished`] both endpoints are [aborted](Endpoint::abort): drop them soon, for
/// the drop sends the reset. That holds also if the future is dropped or panics: bytes on their way are lost
/// then, so neither side may take what it has for all there is. The kernel does the same if the process is
/// killed: [`Endpoint::reset_on_close`].
pub async fn relay<D: Endpoint, U: Endpoint>(
    downstream: &mut D,
    upstream: &mut U,
    counts: &Counts,
    idle: Option<Duration>,
    cut: impl Future<Output = ()>,
) -> End {
    let mut cut = pin!(cut);
    downstream.reset_on_close(true);
    upstream.reset_on_close(true);
    let mut relay = Relay {
        downstream,
        upstream,
        up: Way::new(&counts.to_upstream),
        down: Way::new(&counts.to_downstream),
        clock: Clock::new(idle),
        finished: false,
    };
    std::future::poll_fn(|cx| {
        if cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Cut);
        }
        relay.poll(cx)
    })
    .await
}

/// Both directions of one connection.
struct Relay<'a, D: Endpoint, U: Endpoint> {
    downstream: &'a mut D,
    upstream: &'a mut U,
    up: Way<'a>,
    down: Way<'a>,
    clock: Clock,
    /// Both directions have ended in order.
    finished: bool,
}

impl<D: Endpoint, U: Endpoint> Drop for Relay<'_, D, U> {
    fn drop(&mut self) {
        if !self.finished {
            self.downstream.abort();
            self.upstream.abort();
        }
    }
}

impl<D: Endpoint, U: Endpoint> Relay<'_, D, U> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        match self.up.poll(cx, self.downstream, self.upstream) {
            Ok(()) => {}
            Err(Broken::Reader(error)) => return Poll::Ready(End::DownstreamReset(error)),
            Err(Broken::Writer(error)) => {
                // What the upstream said before it went (a refusal, an alert) is waiting to be read.
                self.down.last_words(cx, self.upstream, self.downstream);
                return Poll::Ready(End::UpstreamReset(error));
            }
        }
        match self.down.poll(cx, self.upstream, self.downstream) {
            Ok(()) => {}
            Err(Broken::Reader(error)) => return Poll::Ready(End::UpstreamReset(error)),
            Err(Broken::Writer(error)) => {
                self.up.last_words(cx, self.downstream, self.upstream);
                return Poll::Ready(End::DownstreamReset(error));
            }
        }
        if self.up.is_done() && self.down.is_done() {
            self.finished = true;
            self.downstream.reset_on_close(false);
            self.upstream.reset_on_close(false);
            return Poll::Ready(End::Finished);
        }
        self.poll_clock(cx)
    }

    /// The idle timeout, and the search for resets on sides that nobody reads from.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let moved = self.up.take_moved() | self.down.take_moved();
        let unread = self.up.state() != WayState::Reading || self.down.state() != WayState::Reading;
        loop {
            match self.clock.poll(cx, moved, unread) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Alarm::Idle) => return Poll::Ready(End::Idle),
                Poll::Ready(Alarm::Probe) => {
                    if let Some(error) = self.downstream.pending_error() {
                        return Poll::Ready(End::DownstreamReset(error));
                    }
                    if let Some(error) = self.upstream.pending_error() {
                        return Poll::Ready(End::UpstreamReset(error));
                    }
                }
            }
        }
    }
}

/// What the clock asks for.
enum Alarm {
    Idle,
    Probe,
}

/// One timer for both purposes, made when the first of them needs it.
struct Clock {
    idle: Option<Duration>,
    last_moved: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    fn new(idle: Option<Duration>) -> Self {
        Self {
            idle,
            last_moved: idle.map(|_| Instant::now()),
            sleep: None,
        }
    }

    /// Registers for the next alarm. The timer is not moved on every byte: it fires, looks, and goes on.
    fn poll(&mut self, cx: &mut Context<'_>, moved: bool, unread: bool) -> Poll<Alarm> {
        if moved && self.idle.is_some() {
            self.last_moved = Some(Instant::now());
        }
        let Some(sleep) = &mut self.sleep else {
            return self.start(cx, unread);
        };
        if sleep.as_mut().poll(cx).is_pending() {
            // An idle timer may be further away than the probe that has become necessary.
            if unread && sleep.deadline() > Instant::now() + PROBE_EVERY {
                self.sleep = None;
                return self.start(cx, unread);
            }
            return Poll::Pending;
        }
        self.sleep = None;
        if let (Some(idle), Some(last)) = (self.idle, self.last_moved)
            && last.elapsed() >= idle
        {
            return Poll::Ready(Alarm::Idle);
        }
        if unread {
            return Poll::Ready(Alarm::Probe);
        }
        self.start(cx, unread)
    }

    fn start(&mut self, cx: &mut Context<'_>, unread: bool) -> Poll<Alarm> {
        let idle = self
            .idle
            .zip(self.last_moved)
            .map(|(idle, last)| last + idle);
        let probe = unread.then(|| Instant::now() + PROBE_EVERY);
        let Some(at) = idle.into_iter().chain(probe).min() else {
            return Poll::Pending;
        };
        let mut sleep = Box::pin(tokio::time::sleep_until(at));
        let due = sleep.as_mut().poll(cx).is_ready();
        self.sleep = Some(sleep);
        if due {
            // Already past: come again, so that one place decides what the alarm means.
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests;
