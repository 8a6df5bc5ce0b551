//! What the task of one HTTP/2 connection and its streams know of each other: how many there are, how fast bytes
//! move, and which streams are to be reset.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::mpsc, time::Instant};

use super::stream::{Halves, RESET};

/// How often the meter looks at the clock.
const METER_BYTES: u64 = 4 << 20;

/// A connection that moves more than this is busy: a stream beside these bytes would wait for them.
const BUSY_BYTES_PER_SECOND: u64 = 64 << 20;

/// One connection's streams. Shared by them, by the task that drives the connection, and by the pool.
#[derive(Debug)]
pub(super) struct Link {
    streams: AtomicUsize,
    bytes: AtomicU64,
    /// When the last whole [`METER_BYTES`] had moved, and how long they took.
    meter: Mutex<Option<(Instant, Duration)>>,
    abandoned: mpsc::UnboundedSender<Halves>,
}

/// The streams that a connection's task is to reset.
#[derive(Debug)]
pub(super) struct Abandoned(mpsc::UnboundedReceiver<Halves>);

/// One stream's share of a connection, given back when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Link>);

impl Link {
    pub(super) fn new() -> (Arc<Self>, Abandoned) {
        let (abandoned, receiver) = mpsc::unbounded_channel();
        let link = Self {
            streams: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            meter: Mutex::default(),
            abandoned,
        };
        (Arc::new(link), Abandoned(receiver))
    }

    /// Counts one stream more.
    pub(super) fn place(self: &Arc<Self>) -> Place {
        self.streams.fetch_add(1, Ordering::Relaxed);
        Place(Arc::clone(self))
    }

    /// Streams in flight, also those not answered yet.
    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Bytes have moved, in whichever direction.
    pub(super) fn moved(&self, bytes: usize) {
        let bytes = bytes as u64;
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before / METER_BYTES != (before + bytes) / METER_BYTES {
            let now = Instant::now();
            let mut meter = self.meter.lock();
            let since = meter.map_or(Duration::MAX, |(then, _)| now.duration_since(then));
            *meter = Some((now, since));
        }
    }

    /// Whether so many bytes move that another stream is better off elsewhere.
    pub(super) fn is_busy(&self) -> bool {
        let slowest = Duration::from_secs(1) * whole(METER_BYTES) / whole(BUSY_BYTES_PER_SECOND);
        let meter = *self.meter.lock();
        // Twice: what is on its way to the next full measure is not seen yet.
        meter.is_some_and(|(then, took)| took <= slowest && then.elapsed() <= slowest * 2)
    }

    /// Leaves a stream to the connection's task, to be reset.
    pub(super) fn abandon(&self, halves: Halves) {
        // If the task has ended, the connection is closed, and with it this stream.
        drop(self.abandoned.send(halves));
    }
}

fn whole(constant: u64) -> u32 {
    u32::try_from(constant).unwrap_or(u32::MAX)
}

impl Abandoned {
    /// Resets the streams abandoned so far; true if there was one, so that the connection has something to write.
    ///
    /// To be called after the connection was polled: what was written to a stream before is then on its way, as it
    /// is when a socket is reset, and not thrown away by HTTP/2's own queue.
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        while let Poll::Ready(Some(mut halves)) = self.0.poll_recv(cx) {
            halves.send.send_reset(RESET);
            any = true;
        }
        any
    }
}

impl Place {
    pub(super) fn link(&self) -> &Arc<Link> {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_busy_while_many_bytes_move() {
        let (link, _abandoned) = Link::new();
        assert!(!link.is_busy());
        for _ in 0..4 {
            link.moved(4 << 20);
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        assert!(link.is_busy(), "400 MiB/s");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!link.is_busy(), "nothing for a second");
        for _ in 0..4 {
            link.moved(4 << 20);
            tokio::time::advance(Duration::from_millis(500)).await;
        }
        assert!(!link.is_busy(), "8 MiB/s");
    }

    #[test]
    fn a_place_is_given_back() {
        let (link, _abandoned) = Link::new();
        let places = [link.place(), link.place()];
        assert_eq!(link.streams(), 2);
        drop(places);
        assert_eq!(link.streams(), 0);
    }
}
