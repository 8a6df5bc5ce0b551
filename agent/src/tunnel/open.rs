//! An open tunnel of either kind, as the relay wants it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{TunnelStream, hbone::HboneStream};
use crate::relay::Endpoint;

/// What carries one application connection to another node.
#[derive(Debug)]
pub enum OpenTunnel {
    /// A TLS connection of its own.
    Connect(TunnelStream),
    /// A stream of a shared one.
    Hbone(HboneStream),
}

impl From<TunnelStream> for OpenTunnel {
    fn from(stream: TunnelStream) -> Self {
        Self::Connect(stream)
    }
}

impl From<HboneStream> for OpenTunnel {
    fn from(stream: HboneStream) -> Self {
        Self::Hbone(stream)
    }
}

impl Endpoint for OpenTunnel {
    fn abort(&mut self) {
        match self {
            Self::Connect(stream) => stream.abort(),
            Self::Hbone(stream) => stream.abort(),
        }
    }

    fn reset_on_close(&mut self, reset: bool) {
        match self {
            Self::Connect(stream) => stream.reset_on_close(reset),
            Self::Hbone(stream) => stream.reset_on_close(reset),
        }
    }

    fn pending_error(&mut self) -> Option<io::Error> {
        match self {
            Self::Connect(stream) => stream.pending_error(),
            Self::Hbone(stream) => stream.pending_error(),
        }
    }
}

impl AsyncRead for OpenTunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Connect(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Hbone(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for OpenTunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Connect(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Hbone(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Connect(stream) => Pin::new(stream).poll_flush(cx),
            Self::Hbone(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Connect(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Hbone(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
