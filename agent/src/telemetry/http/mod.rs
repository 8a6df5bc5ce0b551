//! A small HTTP/1.1 server for pages of the agent: `/metrics` over TCP, [`crate::admin`] over a Unix socket.
//!
//! One request per connection, no request body, everything bounded: a client can be slow or many, and the
//! agent keeps its memory and its descriptors for connections that it carries.

use std::{convert::Infallible, future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tracing::Instrument as _;

use super::{log::chain, metrics::Metrics};
use crate::sockets::{Kept, ListeningSockets, SocketKey};

/// Connections served at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 16;
/// From the accept to the last byte of the answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// For the request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest head of a request (8 KiB is the least hyper takes).
const HEADER_BYTES_MAX: usize = 8 << 10;
/// Before the next accept after a failed one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The content type of `OpenMetrics` text.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An answer.
pub(crate) type Answer = Response<Full<Bytes>>;

/// Answers requests. Called on a runtime thread: it must not block.
pub(crate) type Respond = dyn Fn(&Method, &Uri) -> Answer + Send + Sync;

/// Something that accepts connections.
pub(crate) trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

/// The metrics page cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("metrics address {address} cannot be listened on")]
pub struct MetricsListenError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

/// A listener for `GET /metrics`.
#[derive(Debug)]
pub struct MetricsServer {
    listener: TcpListener,
    _kept: Kept,
}

impl MetricsServer {
    /// Listens on `address`.
    ///
    /// # Errors
    /// If it cannot be listened on.
    pub fn bind(
        address: SocketAddr,
        sockets: &ListeningSockets,
    ) -> Result<Self, MetricsListenError> {
        let listen = || {
            let key = SocketKey::here(address)?;
            let (listener, kept) = sockets.listen(key, || {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })?;
            Ok((TcpListener::from_std(listener)?, kept))
        };
        let (listener, kept) = listen().map_err(|source| MetricsListenError { address, source })?;
        Ok(Self {
            listener,
            _kept: kept,
        })
    }

    /// Where it listens; tells the port if 0 was asked for.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Serves until `until` resolves. Requests in progress are dropped then.
    pub async fn serve(self, metrics: Arc<Metrics>, until: impl Future<Output = ()>) {
        let respond = move |method: &Method, uri: &Uri| match (method, uri.path()) {
            (&Method::GET, "/metrics") => metrics_page(metrics.render()),
            (_, "/metrics") => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n"),
            _ => plain(StatusCode::NOT_FOUND, "there is only /metrics\n"),
        };
        serve(self.listener, "metrics", Arc::new(respond), until).await;
    }
}

/// A page of metrics.
pub(crate) fn metrics_page(page: String) -> Answer {
    answer(StatusCode::OK, OPENMETRICS, page)
}

/// A line of text.
pub(crate) fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", text)
}

/// An answer with a body.
pub(crate) fn answer(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Accepts and answers until `until` resolves.
///
/// Its tasks are not [`crate::lifecycle::Shutdown`]'s: they end with this future, so that status can be
/// asked while the agent drains, and no slow client delays the end.
pub(crate) async fn serve<A: Accept>(
    listener: A,
    name: &'static str,
    respond: Arc<Respond>,
    until: impl Future<Output = ()>,
) {
    let mut until = std::pin::pin!(until);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased; // the end comes first: a stream of clients must not hold it up
            () = &mut until => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => accepted,
        };
        match accepted {
            Ok(stream) => {
                let connection = serve_connection(stream, Arc::clone(&respond));
                let span = tracing::debug_span!("http", name);
                connections.spawn(connection.instrument(span));
            }
            Err(error) => {
                tracing::warn!(name, error = %chain(&error), "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection<S>(stream: S, respond: Arc<Respond>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = respond(request.method(), request.uri());
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(error = %chain(&error), "request failed"),
        Err(_) => tracing::debug!("request timed out"),
    }
}

#[cfg(test)]
mod tests;
