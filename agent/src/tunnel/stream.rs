//! An open tunnel: bytes through TLS through TCP, ended in order or by a reset.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;

use crate::relay::Endpoint;

/// One side of a tunnel.
///
/// Shutting it down sends `close_notify` and then FIN; the other direction goes on. An end of the TCP
/// connection without `close_notify` is an error when reading: somebody may have cut the bytes short.
pub struct TunnelStream {
    tls: TlsStream<TcpStream>,
}

impl TunnelStream {
    pub(super) fn new(tls: TlsStream<TcpStream>) -> Self {
        Self { tls }
    }

    /// Whether the handshake left the certificates out.
    #[cfg(test)]
    pub(super) fn is_resumed(&self) -> bool {
        let (_tcp, connection) = self.tls.get_ref();
        connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelStream")
            .field("tcp", self.tls.get_ref().0)
            .finish_non_exhaustive()
    }
}

impl Endpoint for TunnelStream {
    fn abort(&mut self) {
        abort_tcp(self.tls.get_ref().0);
    }

    fn pending_error(&mut self) -> Option<io::Error> {
        self.tls.get_ref().0.take_error().ok().flatten()
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
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.tls).poll_read(cx, buf);
        read.map_err(|error| {
            if error.kind() != io::ErrorKind::UnexpectedEof {
                return error;
            }
            // What the library says of it explains itself by an address of its documentation.
            let said = "the tunnel ended without a word (no close_notify): its other end was killed, or somebody cut it";
            io::Error::new(io::ErrorKind::UnexpectedEof, said)
        })
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
