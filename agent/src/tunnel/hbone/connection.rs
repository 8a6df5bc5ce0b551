//! What both ends of an HTTP/2 connection share: its settings, whether the peer still answers, and whether it is
//! still trusted.

use std::{sync::Arc, time::SystemTime};

use h2::{Ping, PingPong};
use rustls_pki_types::CertificateDer;
use tokio::time::{Duration, timeout};

use crate::identity::{certificates::Certificates, spiffe::SpiffeId, workload_tls::WorkloadTls};

/// What a peer may send on one stream before it is read: 1 MiB carries 1 Gbit/s over 8 ms.
pub(super) const STREAM_WINDOW: u32 = 1 << 20;

/// What a peer may send on all streams of a connection. As good as none: only a stream's own window holds its bytes
/// back, so that one whose reader pauses takes nothing from the others. [`STREAM_WINDOW`] times [`MAX_STREAMS`] is
/// what a peer can make us hold.
pub(super) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Streams at a time on one connection.
pub(super) const MAX_STREAMS: u32 = 256;

/// The largest frame taken. A frame is handed on when it is there as a whole, and other streams wait meanwhile.
pub(super) const MAX_FRAME: u32 = 64 << 10;

/// A CONNECT has few headers; ztunnel's are below 1 KiB.
pub(super) const MAX_HEADERS: u32 = 16 << 10;

/// Bytes of one stream that wait to be sealed and written.
pub(super) const SEND_BUFFER: usize = 128 << 10;

/// What unread frames may cost beyond their bytes, at 256 each. An application may well write single bytes to one
/// that pauses, and the answer to too many of them is the end of the connection with all its streams.
pub(super) const FRAME_BUDGET: usize = 64 << 20;

/// Both as in ztunnel.
const PING_EVERY: Duration = Duration::from_secs(10);
const PONG_WITHIN: Duration = Duration::from_secs(20);

/// Sends a PING now and then; resolves when the peer does not answer, or the connection is closed.
///
/// `tick` is called before each.
pub(super) async fn unanswered_ping(pings: Option<PingPong>, mut tick: impl FnMut()) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_EVERY).await;
        tick();
        match timeout(PONG_WITHIN, pings.ping(Ping::opaque())).await {
            Ok(Ok(_pong)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// The peer's certificate and ours, for as long as a connection lives.
pub(super) struct Trust {
    pub(super) certificates: Certificates,
    pub(super) own: Arc<WorkloadTls>,
    /// Leaf first.
    pub(super) peer: Vec<CertificateDer<'static>>,
    /// Whom a client wants; a server takes everybody of its trust domain.
    pub(super) expected: Option<SpiffeId>,
    /// When the handshake was: a leaf that ends later does not end a connection.
    pub(super) since: SystemTime,
}

/// What became of the certificate that a connection was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replaced {
    /// There is another; the peer is trusted as before.
    Newer,
    /// The peer's root is trusted no more.
    Distrusted,
}

impl Trust {
    /// Resolves when our certificate or our roots have changed. Cancel-safe.
    pub(super) async fn replaced(&mut self) -> Replaced {
        self.own = self.certificates.replaced(&self.own).await;
        let verdict = self
            .own
            .verify_again(&self.peer, self.expected.as_ref(), self.since);
        match verdict {
            Ok(()) => Replaced::Newer,
            Err(error) => {
                tracing::warn!(identity = %self.own.identity(), %error, "tunnel closed: its peer is not trusted any more");
                Replaced::Distrusted
            }
        }
    }
}
