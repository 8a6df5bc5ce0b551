//! The calling end: one HTTP/2 connection, and `CONNECT` on it.

use std::{
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use hyper::http::{Method, Request, StatusCode, Uri, uri::Authority};
use tokio::time::timeout;

use super::{
    connection::{self, Replaced, Trust},
    link::{Abandoned, Link, Place},
    stream::HboneStream,
    turns::InTurns,
};
use crate::{
    identity::{certificates::Certificates, spiffe::SpiffeId, workload_tls::WorkloadTls},
    lifecycle::Shutdown,
    tunnel::connect::{self, TunnelError},
};

/// Whom to open a connection to, and for how long to try.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    pub(super) server_name: String,
    pub(super) expected: SpiffeId,
    pub(super) connect_timeout: Duration,
    pub(super) handshake_timeout: Duration,
}

/// A connection that takes requests as long as its driver runs.
pub(super) struct Opened {
    pub(super) requests: SendRequest<Bytes>,
    pub(super) link: Arc<Link>,
    pub(super) driver: Driver,
}

/// Dials, shakes hands, and speaks HTTP/2, as the workload that `tls` belongs to.
pub(super) async fn open(
    target: &Target,
    tls: &Arc<WorkloadTls>,
    certificates: &Certificates,
) -> Result<Opened, TunnelError> {
    let dialled = connect::dial(target.address, target.connect_timeout).await?;
    let handshake = async {
        let config = tls.hbone_client_config(&target.expected);
        let stream = dialled.secure(target.server_name.clone(), config).await?;
        let session = stream.session();
        if session.alpn_protocol() != Some(b"h2") {
            return Err(TunnelError::NotHttp2);
        }
        let trust = Trust {
            certificates: certificates.clone(),
            own: Arc::clone(tls),
            peer: session.peer_certificates().unwrap_or_default().to_vec(),
            expected: Some(target.expected.clone()),
            since: tls.now(),
        };
        let (requests, connection) = Builder::new()
            .enable_push(false)
            .initial_window_size(connection::STREAM_WINDOW)
            .initial_connection_window_size(connection::CONNECTION_WINDOW)
            .max_frame_size(connection::MAX_FRAME)
            .max_header_list_size(connection::MAX_HEADERS)
            .max_send_buffer_size(connection::SEND_BUFFER)
            .data_frame_budget(connection::FRAME_BUDGET)
            .handshake(InTurns::from(stream))
            .await
            .map_err(TunnelError::Http2)?;
        let (link, abandoned) = Link::new();
        let driver = Driver {
            connection,
            abandoned,
            trust,
        };
        Ok(Opened {
            requests,
            link,
            driver,
        })
    };
    timeout(target.handshake_timeout, handshake)
        .await
        .map_err(|_elapsed| TunnelError::HandshakeTimeout)?
}

/// Moves the bytes of one connection.
pub(super) struct Driver {
    connection: Connection<InTurns>,
    abandoned: Abandoned,
    trust: Trust,
}

impl Driver {
    /// Runs until the connection is closed: by the peer, because no more requests can come and the last stream has
    /// ended, or at once because the peer is gone, not trusted any more, or the agent ends.
    ///
    /// `tick` is called every few seconds; `retire` when no new stream should be opened.
    pub(super) async fn run(
        self,
        shutdown: &Shutdown,
        tick: impl FnMut(),
        retire: impl Fn(&'static str),
    ) {
        let Self {
            mut connection,
            mut abandoned,
            mut trust,
        } = self;
        let mut dead = pin!(connection::unanswered_ping(connection.ping_pong(), tick));
        let mut forced = pin!(shutdown.forced());
        loop {
            tokio::select! {
                // What moves bytes first: the others seldom have something to say.
                biased;
                end = moving(&mut connection, &mut abandoned) => {
                    if let Err(error) = end {
                        tracing::debug!(%error, "tunnel failed");
                    }
                    return;
                }
                () = &mut dead => {
                    tracing::info!("tunnel closed: its peer does not answer");
                    return;
                }
                replaced = trust.replaced() => match replaced {
                    Replaced::Newer => retire("another certificate"),
                    Replaced::Distrusted => return,
                },
                () = &mut forced => return,
            }
        }
    }
}

/// Moves bytes until the connection is closed. Cancel-safe.
async fn moving(
    connection: &mut Connection<InTurns>,
    abandoned: &mut Abandoned,
) -> Result<(), h2::Error> {
    std::future::poll_fn(|cx| {
        loop {
            if let Poll::Ready(end) = Pin::new(&mut *connection).poll(cx) {
                return Poll::Ready(end);
            }
            if !abandoned.poll_reset(cx) {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Why there is no stream.
pub(super) enum NoStream {
    /// The connection takes none any more, and has not looked at this one: another connection may.
    Stale(h2::Error),
    /// The peer said no, or nothing.
    Failed(TunnelError),
}

/// Asks for a stream to `authority` and waits for the answer, at most for `limit`.
pub(super) async fn request(
    requests: SendRequest<Bytes>,
    place: Place,
    authority: &Authority,
    limit: Duration,
) -> Result<HboneStream, NoStream> {
    let asking = async {
        let mut requests = requests.ready().await.map_err(NoStream::Stale)?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = Uri::from(authority.clone());
        let (answer, send) = requests
            .send_request(request, false)
            .map_err(NoStream::Stale)?;
        // Not kept: a connection ends when its pool has let go of it.
        drop(requests);
        let answer = answer.await.map_err(|error| {
            if was_not_looked_at(&error) {
                NoStream::Stale(error)
            } else {
                NoStream::Failed(TunnelError::Http2(error))
            }
        })?;
        match answer.status() {
            StatusCode::OK => Ok(HboneStream::new(send, answer.into_body(), place)),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Err(NoStream::Failed(TunnelError::Denied(status)))
            }
            status => Err(NoStream::Failed(TunnelError::Refused(status))),
        }
    };
    timeout(limit, asking)
        .await
        .unwrap_or(Err(NoStream::Failed(TunnelError::AnswerTimeout)))
}

/// Whether the peer promises that it did nothing about a request. Source: RFC 9113, sections 6.8 and 8.7.
fn was_not_looked_at(error: &h2::Error) -> bool {
    let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    error.is_remote() && (refused || error.is_go_away())
}
