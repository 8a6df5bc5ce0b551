//! One stream of an HTTP/2 connection, as the relay sees it: a connection of its own.
//!
//! `END_STREAM` is the end of one direction, `RST_STREAM` is a reset, and neither is ever taken for the other: an
//! end of the whole connection without `END_STREAM` is an error too. Source: RFC 9113, section 8.5.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::link::{Link, Place};
use crate::relay::Endpoint;

/// The most that one write hands to HTTP/2, which sends it as one frame if the peer takes such. Larger ones make other
/// streams wait; smaller ones cost more. Measured: docs/decisions/0025.
const WRITE_BYTES: usize = 32 << 10;

/// One application connection within a tunnel.
///
/// Dropped before both directions have ended, it is reset.
pub struct HboneStream {
    /// There until the stream is abandoned.
    halves: Option<Halves>,
    /// Received and not yet read.
    unread: Bytes,
    /// How long `unread` was, which its last byte gives back to the peer as window.
    unread_total: usize,
    received_end: bool,
    sent_end: bool,
    /// Who waits for room to write, so that asking for a reset does not take its place.
    writer: Option<Waker>,
    place: Place,
}

/// The two directions as HTTP/2 has them.
#[derive(Debug)]
pub(super) struct Halves {
    pub(super) send: SendStream<Bytes>,
    pub(super) receive: RecvStream,
}

impl HboneStream {
    pub(super) fn new(send: SendStream<Bytes>, receive: RecvStream, place: Place) -> Self {
        Self {
            halves: Some(Halves { send, receive }),
            unread: Bytes::new(),
            unread_total: 0,
            received_end: false,
            sent_end: false,
            writer: None,
            place,
        }
    }

    /// Leaves the reset to the connection's task, which sends it after what was written before.
    fn abandon(&mut self) {
        if let Some(halves) = self.halves.take() {
            self.place.link().abandon(halves);
        }
    }

    fn link(&self) -> &Arc<Link> {
        self.place.link()
    }
}

impl fmt::Debug for HboneStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HboneStream")
            .field("received_end", &self.received_end)
            .field("sent_end", &self.sent_end)
            .finish_non_exhaustive()
    }
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        if !(self.received_end && self.sent_end) {
            self.abandon();
        }
    }
}

/// What a stream's error is for a socket.
fn broken(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(aborted);
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

fn aborted() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

impl Endpoint for HboneStream {
    fn abort(&mut self) {
        self.abandon();
    }

    fn pending_error(&mut self) -> Option<io::Error> {
        let waker = self.writer.clone();
        let waker = waker.as_ref().unwrap_or(Waker::noop());
        let halves = self.halves.as_mut()?;
        match halves.send.poll_reset(&mut Context::from_waker(waker)) {
            Poll::Ready(Ok(reason)) => Some(broken(reason.into())),
            Poll::Ready(Err(error)) => Some(broken(error)),
            Poll::Pending => None,
        }
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(halves) = &mut this.halves else {
            return Poll::Ready(Err(aborted()));
        };
        while this.unread.is_empty() {
            match ready!(halves.receive.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    this.unread_total = bytes.len();
                    this.unread = bytes;
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => {
                    this.received_end = true;
                    return Poll::Ready(Ok(()));
                }
            }
        }
        let taken = this.unread.len().min(buf.remaining());
        buf.put_slice(this.unread.get(..taken).unwrap_or_default());
        this.unread.advance(taken);
        if this.unread.is_empty() {
            // The memory goes before the window that lets the peer send more.
            this.unread = Bytes::new();
            let returned = halves
                .receive
                .flow_control()
                .release_capacity(this.unread_total);
            returned.map_err(broken)?;
        }
        this.place.link().moved(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let Some(halves) = &mut this.halves else {
            return Poll::Ready(Err(aborted()));
        };
        let wanted = bytes.len().min(WRITE_BYTES);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        halves.send.reserve_capacity(wanted);
        while halves.send.capacity() == 0 {
            match halves.send.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_room))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(broken(error))),
                // Not to be written to any more: the reset says why, if the peer sent one.
                Poll::Ready(None) => {
                    let reset = this.pending_error();
                    let broken = || io::ErrorKind::BrokenPipe.into();
                    return Poll::Ready(Err(reset.unwrap_or_else(broken)));
                }
                Poll::Pending => {
                    match &mut this.writer {
                        Some(writer) => writer.clone_from(cx.waker()),
                        None => this.writer = Some(cx.waker().clone()),
                    }
                    return Poll::Pending;
                }
            }
        }
        let sent = wanted.min(halves.send.capacity());
        let piece = Bytes::copy_from_slice(bytes.get(..sent).unwrap_or_default());
        halves.send.send_data(piece, false).map_err(broken)?;
        this.link().moved(sent);
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task writes what it was given without being asked.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.sent_end {
            let halves = self.halves.as_mut().ok_or_else(aborted)?;
            halves.send.send_data(Bytes::new(), true).map_err(broken)?;
            self.sent_end = true;
        }
        Poll::Ready(Ok(()))
    }
}

/// What an abandoned stream tells the peer: the TCP connection behind it failed. Source: RFC 9113, section 8.5.
///
/// ztunnel takes `NO_ERROR` and `CANCEL` for an end of file, so it must be neither.
pub(super) const RESET: Reason = Reason::CONNECT_ERROR;
