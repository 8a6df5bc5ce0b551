//! The called end: takes an HTTP/2 connection and hands out its streams.
//!
//! Knows nothing of services: which instance a stream is for and whether it may be opened is decided in
//! [`crate::inbound`], which then accepts or refuses it.

use std::{io, net::SocketAddr, pin::pin, sync::Arc, task::Poll};

use bytes::Bytes;
use h2::{
    RecvStream,
    server::{Builder, Connection, SendResponse},
};
use hyper::http::{Method, Request, Response, StatusCode, uri::Authority};
use tokio::time::Instant;

use super::{
    connection::{self, Replaced, Trust},
    link::{Abandoned, Link, Place},
    stream::HboneStream,
    turns::InTurns,
};
use crate::{
    identity::{certificates::Certificates, spiffe::SpiffeId, workload_tls::WorkloadTls},
    lifecycle::Shutdown,
    tunnel::{
        connect::{Incoming, TunnelError},
        tls,
    },
};

/// A peer that has proved who it is, before its first stream.
pub struct Accepted {
    /// Who calls on every stream.
    pub peer: SpiffeId,
    connection: Connection<InTurns, Bytes>,
    trust: Trust,
}

impl std::fmt::Debug for Accepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accepted")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Accepted {
    /// Finishes both handshakes as the workload that `tls` belongs to.
    ///
    /// # Errors
    /// See [`TunnelError`].
    pub async fn handshake(
        incoming: Incoming,
        tls: &Arc<WorkloadTls>,
        certificates: &Certificates,
        deadline: Instant,
    ) -> Result<Self, TunnelError> {
        let config = tls.hbone_server_config();
        let stream = incoming.secure(config, deadline).await?;
        let session = stream.session();
        let peer = tls::peer_identity(session)?;
        let trust = Trust {
            certificates: certificates.clone(),
            own: Arc::clone(tls),
            peer: session.peer_certificates().unwrap_or_default().to_vec(),
            expected: None,
            since: tls.now(),
        };
        // Without a word of ALPN it is taken for HTTP/2, as ztunnel takes it; another protocol was refused.
        let handshake = Builder::new()
            .initial_window_size(connection::STREAM_WINDOW)
            .initial_connection_window_size(connection::CONNECTION_WINDOW)
            .max_frame_size(connection::MAX_FRAME)
            .max_header_list_size(connection::MAX_HEADERS)
            .max_concurrent_streams(connection::MAX_STREAMS)
            .max_send_buffer_size(connection::SEND_BUFFER)
            .data_frame_budget(connection::FRAME_BUDGET)
            .handshake(InTurns::from(stream));
        let connection = tokio::time::timeout_at(deadline, handshake)
            .await
            .map_err(|_elapsed| TunnelError::HandshakeTimeout)?
            .map_err(TunnelError::Http2)?;
        Ok(Self {
            peer,
            connection,
            trust,
        })
    }

    /// Hands each stream to `take`, until the connection is closed and every stream has ended.
    ///
    /// While the agent drains, and once our certificate is another, the peer is asked to open its streams
    /// elsewhere (GOAWAY); those that are open go on.
    pub async fn serve(self, shutdown: &Shutdown, mut take: impl FnMut(Requested)) {
        let Self {
            mut connection,
            mut trust,
            ..
        } = self;
        let (link, mut abandoned) = Link::new();
        let mut dead = pin!(connection::unanswered_ping(connection.ping_pong(), || {}));
        let (mut draining, mut forced) = (pin!(shutdown.draining()), pin!(shutdown.forced()));
        let mut is_leaving = false;
        loop {
            tokio::select! {
                // What moves bytes first: the others seldom have something to say.
                biased;
                next = next(&mut connection, &mut abandoned) => match next {
                    Some(Ok((request, answer))) => take(Requested {
                        request,
                        answer,
                        place: link.place(),
                    }),
                    Some(Err(error)) => {
                        tracing::debug!(%error, "tunnel failed");
                        return;
                    }
                    None => return,
                },
                () = &mut dead => {
                    tracing::info!("tunnel closed: its peer does not answer");
                    return;
                }
                replaced = trust.replaced() => match replaced {
                    Replaced::Newer => {
                        is_leaving = true;
                        connection.graceful_shutdown();
                    }
                    Replaced::Distrusted => return,
                },
                () = &mut draining, if !is_leaving => {
                    is_leaving = true;
                    connection.graceful_shutdown();
                }
                () = &mut forced => return,
            }
        }
    }
}

type Next = Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>>;

/// The next stream; moves the bytes of all others meanwhile. Cancel-safe.
async fn next(connection: &mut Connection<InTurns, Bytes>, abandoned: &mut Abandoned) -> Next {
    std::future::poll_fn(|cx| {
        loop {
            if let Poll::Ready(next) = connection.poll_accept(cx) {
                return Poll::Ready(next);
            }
            if !abandoned.poll_reset(cx) {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// A stream that a peer asks for. Dropped, it is reset.
pub struct Requested {
    request: Request<RecvStream>,
    answer: SendResponse<Bytes>,
    place: Place,
}

impl std::fmt::Debug for Requested {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requested")
            .field("authority", &self.request.uri().authority())
            .finish_non_exhaustive()
    }
}

/// A request that asks for no tunnel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RequestError {
    /// Another method than CONNECT.
    #[error("{0}: expected CONNECT")]
    NotConnect(Method),
    /// The authority does not say which instance is meant.
    #[error("authority {0:?}: expected the address and port of an instance")]
    Authority(String),
}

impl Requested {
    /// The address and port asked for.
    ///
    /// # Errors
    /// See [`RequestError`]; the answer to them is 400.
    pub fn destination(&self) -> Result<SocketAddr, RequestError> {
        if self.request.method() != Method::CONNECT {
            return Err(RequestError::NotConnect(self.request.method().clone()));
        }
        let authority = self.request.uri().authority().map(Authority::as_str);
        let authority = authority.unwrap_or_default();
        authority
            .parse()
            .map_err(|_invalid| RequestError::Authority(authority.to_owned()))
    }

    /// Resolves when the peer does not want the stream any more.
    pub async fn given_up(&mut self) {
        // Both a reset and an error of the whole connection say so.
        drop(std::future::poll_fn(|cx| self.answer.poll_reset(cx)).await);
    }

    /// Answers 200; from now on the stream carries bytes.
    ///
    /// # Errors
    /// If the peer has gone.
    pub fn accept(mut self) -> io::Result<HboneStream> {
        let answer = Response::new(());
        let gone = |error| io::Error::new(io::ErrorKind::ConnectionReset, error);
        let send = self.answer.send_response(answer, false).map_err(gone)?;
        Ok(HboneStream::new(send, self.request.into_body(), self.place))
    }

    /// Answers `status` and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        // If the peer has gone there is nobody to tell.
        drop(self.answer.send_response(answer, true));
    }
}
