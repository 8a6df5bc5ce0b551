//! An open tunnel: bytes through TLS through TCP, ended in order or by a reset.
//!
//! It owns no buffer while it has nothing in hand: each thread has one that its tunnels read and seal in. What does not
//! fit is kept until it is asked for again: the start of a record, bytes that the reader had no room for, records that the
//! socket did not take.

use std::{
    cell::RefCell,
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustls::CommonState;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::session::{Received, SealError, Session};
use crate::relay::Endpoint;

/// The longest record on the wire. Source: RFC 5246, section 6.2.3; those of TLS 1.3 are shorter.
const RECORD: usize = 5 + (16 << 10) + 2048;

/// The most that is sealed into one record. Source: RFC 8446, section 5.1.
const FRAGMENT: usize = 16 << 10;

/// What is sealed at a time: four records.
const SEALED_AT_ONCE: usize = 4 * FRAGMENT;

/// What may come before that: the head of an HTTP/2 frame, after other frames.
const HEAD: usize = 1 << 10;

/// Room for both, and for the longest message of a handshake that rustls takes (64 KiB) in records.
const ROOM: usize = HEAD + SEALED_AT_ONCE + RECORD;

thread_local! {
    static WIRE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends the thread's buffer, of [`ROOM`] bytes.
fn with_wire<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    WIRE.with_borrow_mut(|wire| {
        wire.resize(ROOM, 0);
        work(wire)
    })
}

/// One side of a tunnel.
///
/// Shutting it down sends `close_notify` and then FIN; the other direction goes on. An end of the TCP
/// connection without `close_notify` is an error when reading: somebody may have cut the bytes short.
pub struct TunnelStream {
    tcp: TcpStream,
    // On the heap: it is large, and tasks keep room for each place that a tunnel is handed through.
    tls: Box<Tls>,
}

/// What is known and kept beside the socket.
struct Tls {
    session: Session,
    /// What came of records that are not whole.
    unread: Vec<u8>,
    /// What came for the reader, who had no room.
    plain: Kept,
    /// What the socket did not take.
    outgoing: Kept,
    /// Nothing more comes.
    end: Option<End>,
    /// `close_notify` is sent, or in `outgoing`.
    shut: bool,
}

/// How the peer's bytes ended.
enum End {
    InOrder,
    CutShort,
    Failed(rustls::Error),
}

/// Bytes that wait, from a position on.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    at: usize,
}

impl Kept {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// The first `count` are done with; gives the memory back with the last.
    fn advance(&mut self, count: usize) {
        self.at += count;
        if self.at >= self.bytes.len() {
            *self = Self::default();
        }
    }
}

impl TunnelStream {
    /// Does the handshake; `first` is what the peer has said already.
    ///
    /// # Errors
    /// Those of the socket, and rustls' own, as the inner one.
    pub(super) async fn handshake(
        session: Session,
        tcp: TcpStream,
        mut first: Vec<u8>,
    ) -> io::Result<Self> {
        let tls = Box::new(Tls {
            session,
            unread: vec![],
            plain: Kept::default(),
            outgoing: Kept::default(),
            end: None,
            shut: false,
        });
        let mut stream = Self { tcp, tls };
        stream.receive(&mut first, &mut ReadBuf::new(&mut []));
        std::future::poll_fn(|cx| stream.poll_handshake(cx)).await?;
        Ok(stream)
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let sent = self.poll_send(cx);
            match &self.tls.end {
                None => ready!(sent)?,
                Some(End::Failed(error)) => return Poll::Ready(Err(invalid(error))),
                Some(End::InOrder | End::CutShort) => {
                    let left = "the peer left in the TLS handshake";
                    let error = io::Error::new(io::ErrorKind::UnexpectedEof, left);
                    return Poll::Ready(Err(error));
                }
            }
            if !self.session().is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_receive(cx, &mut ReadBuf::new(&mut [])))?;
        }
    }

    /// What the handshake brought.
    pub(super) fn session(&self) -> &CommonState {
        self.tls.session.common()
    }

    /// Whether the handshake left the certificates out.
    #[cfg(test)]
    pub(super) fn is_resumed(&self) -> bool {
        self.session().handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    /// Reads from the socket, once; what that brings for the application goes into `into` as far as it fits.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        with_wire(|wire| {
            let begun = self.tls.unread.len();
            // What the reader has room for, and the rest of a record.
            let end = (begun + into.remaining() + RECORD).min(ROOM);
            let Some(free) = wire.get_mut(begun..end).filter(|free| !free.is_empty()) else {
                let error = "a TLS message is longer than 64 KiB";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
            };
            let mut read = ReadBuf::new(free);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut read))?;
            let read = read.filled().len();
            if read == 0 {
                self.tls.end = Some(End::CutShort);
                return Poll::Ready(Ok(()));
            }
            let incoming = wire.get_mut(..begun + read).unwrap_or_default();
            if let Some(kept) = incoming.get_mut(..begun) {
                kept.copy_from_slice(&self.tls.unread);
            }
            self.receive(incoming, into);
            // An alert, if anything. Else what is to be sent goes out with what is written next.
            let _blocked = self.poll_send(cx);
            Poll::Ready(Ok(()))
        })
    }

    fn receive(&mut self, incoming: &mut [u8], into: &mut ReadBuf<'_>) {
        let tls = &mut *self.tls;
        let plain = &mut tls.plain.bytes;
        let mut give = |bytes: &[u8]| {
            let (now, later) = bytes.split_at(bytes.len().min(into.remaining()));
            into.put_slice(now);
            plain.extend_from_slice(later);
        };
        let outgoing = &mut tls.outgoing.bytes;
        let Received { used, ended } = tls.session.receive(incoming, &mut give, outgoing);
        tls.end = match ended {
            Ok(false) => None,
            Ok(true) => Some(End::InOrder),
            Err(error) => Some(End::Failed(error)),
        };
        match incoming.get(used..) {
            Some(rest) if !rest.is_empty() && tls.end.is_none() => {
                tls.unread.clear();
                tls.unread.extend_from_slice(rest);
            }
            _ => tls.unread = vec![],
        }
    }

    /// Gives what was kept for the reader.
    fn give_kept(&mut self, into: &mut ReadBuf<'_>) {
        let rest = self.tls.plain.rest();
        let count = rest.len().min(into.remaining());
        into.put_slice(rest.get(..count).unwrap_or_default());
        self.tls.plain.advance(count);
    }

    /// Sends what the socket did not take before.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.tls.outgoing.bytes.is_empty() {
            let rest = self.tls.outgoing.rest();
            match ready!(Pin::new(&mut self.tcp).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.tls.outgoing.advance(sent),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Seals `plain` and sends of it what the socket takes; the rest is kept. Nothing may be kept before.
    fn seal_and_send(&mut self, cx: &mut Context<'_>, plain: &[u8]) -> io::Result<()> {
        with_wire(|wire| {
            let sealed = self.tls.seal(plain, wire)?;
            self.send_or_keep(cx, wire.get(..sealed).unwrap_or_default())
        })
    }

    /// The same for `pieces` that lie apart, as far as there is room; returns how many of their bytes.
    fn seal_and_send_pieces(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        with_wire(|wire| {
            let mut taken = 0;
            let mut sealed = 0;
            for piece in pieces {
                let records = wire.get_mut(sealed..).unwrap_or_default();
                // What records need beside their bytes, and a change of keys, fit into the room of one.
                let most = piece.len().min(records.len().saturating_sub(RECORD));
                let piece = piece.get(..most).unwrap_or_default();
                if !piece.is_empty() {
                    sealed += self.tls.seal(piece, records)?;
                    taken += piece.len();
                }
            }
            self.send_or_keep(cx, wire.get(..sealed).unwrap_or_default())?;
            Ok(taken)
        })
    }

    /// The same for `pieces` that make one record.
    fn seal_and_send_together(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        with_wire(|wire| {
            let (records, together) = wire.split_at_mut(ROOM - FRAGMENT);
            let mut into = ReadBuf::new(together);
            for piece in pieces {
                into.put_slice(piece);
            }
            let sealed = self.tls.seal(into.filled(), records)?;
            self.send_or_keep(cx, records.get(..sealed).unwrap_or_default())?;
            Ok(into.filled().len())
        })
    }

    /// Sends of `records` what the socket takes, and keeps the rest.
    fn send_or_keep(&mut self, cx: &mut Context<'_>, mut records: &[u8]) -> io::Result<()> {
        while !records.is_empty() {
            let sent = match Pin::new(&mut self.tcp).poll_write(cx, records)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(sent) => sent,
                Poll::Pending => {
                    self.tls.outgoing.bytes.extend_from_slice(records);
                    break;
                }
            };
            records = records.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// Sends what was kept; an error if the session takes nothing more.
    fn poll_ready_to_seal(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        match &self.tls.end {
            Some(End::Failed(error)) => Poll::Ready(Err(invalid(error))),
            Some(End::InOrder | End::CutShort) | None => Poll::Ready(Ok(())),
        }
    }

    /// Seals the end of the stream, once, unless the session has failed: then its alert was the end.
    fn seal_end(&mut self) -> io::Result<()> {
        let tls = &mut *self.tls;
        if !std::mem::replace(&mut tls.shut, true) && !matches!(tls.end, Some(End::Failed(_))) {
            // A record with an alert, and perhaps one before it with other keys.
            let mut records = [0; 256];
            let sealed = tls.session.seal_end(&mut tls.unread, &mut records);
            let sealed = sealed.map_err(not_sealed)?;
            let records = records.get(..sealed).unwrap_or_default();
            tls.outgoing.bytes.extend_from_slice(records);
        }
        Ok(())
    }
}

impl Tls {
    /// Seals `plain` into the start of `records`; returns their length.
    fn seal(&mut self, plain: &[u8], records: &mut [u8]) -> io::Result<usize> {
        let sealed = self.session.seal(&mut self.unread, plain, records);
        sealed.map_err(not_sealed)
    }
}

fn not_sealed(error: SealError) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, error)
}

fn invalid(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.clone())
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelStream")
            .field("tcp", &self.tcp)
            .finish_non_exhaustive()
    }
}

impl Endpoint for TunnelStream {
    fn abort(&mut self) {
        abort_tcp(&self.tcp);
    }

    fn pending_error(&mut self) -> Option<io::Error> {
        self.tcp.take_error().ok().flatten()
    }
}

/// Makes dropping the socket send RST: to the peer, this is what the application's reset would have been.
pub(crate) fn abort_tcp(stream: &TcpStream) {
    // The socket may be reset already; then there is nothing to do.
    drop(SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO)));
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        self.give_kept(into);
        while into.filled().len() == before && into.remaining() > 0 {
            match &self.tls.end {
                None => ready!(self.poll_receive(cx, into))?,
                Some(End::InOrder) => break,
                Some(End::Failed(error)) => return Poll::Ready(Err(invalid(error))),
                Some(End::CutShort) => {
                    let error = "the tunnel ended without a word (no close_notify): its other end was killed, or \
                                 somebody cut it";
                    let error = io::Error::new(io::ErrorKind::UnexpectedEof, error);
                    return Poll::Ready(Err(error));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_ready_to_seal(cx))?;
        let mut written = 0;
        for part in bytes.chunks(SEALED_AT_ONCE) {
            self.seal_and_send(cx, part)?;
            written += part.len();
            if !self.tls.outgoing.bytes.is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_ready_to_seal(cx))?;
        let all: usize = pieces.iter().map(|piece| piece.len()).sum();
        Poll::Ready(if all <= FRAGMENT {
            self.seal_and_send_together(cx, pieces)
        } else {
            self.seal_and_send_pieces(cx, pieces)
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seal_end()?;
        ready!(self.poll_send(cx))?;
        match ready!(Pin::new(&mut self.tcp).poll_shutdown(cx)) {
            // The peer has closed the connection, and needs no end any more.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            shut => Poll::Ready(shut),
        }
    }
}
