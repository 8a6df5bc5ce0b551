//! The tunnel `connect`: one TLS connection per application connection, authenticated as the workload.
//!
//! Compatible with Consul's built-in proxy and with Envoy as Consul configures it: TLS 1.2 and 1.3, a client
//! certificate, no ALPN asked for. Opening and taking both have a deadline for everything before the first byte.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, ServerConfig,
    server::{Accepted, Acceptor},
};
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, time::Instant};

use super::{TunnelStream, session::Session, tls};
use crate::{
    identity::{spiffe::SpiffeId, verify::PeerIdentityError, workload_tls::WorkloadTls},
    telemetry::record::Stage,
};

/// A peer that vanished without a word is noticed after idle + interval * retries.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);

/// A tunnel that did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The other node does not answer.
    #[error("connect to {address}")]
    Dial {
        /// Its tunnel address.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The other node does not answer in time.
    #[error("connect to {address}: no answer within {} ms; is its tunnel port reachable?", limit.as_millis())]
    DialTimeout {
        /// Its tunnel address.
        address: SocketAddr,
        /// How long was waited.
        limit: Duration,
    },
    /// The handshake failed: the certificates do not fit, or the peer does not speak TLS.
    #[error("TLS handshake")]
    Handshake(#[source] io::Error),
    /// The handshake took too long.
    #[error("TLS handshake not finished in time")]
    HandshakeTimeout,
    /// The peer connected and left without a byte, as TCP health checks do.
    #[error("closed by the peer before its first byte, as a health check does")]
    Silent,
    /// The name to ask for is no host name.
    #[error("{0:?} cannot be sent as a TLS server name")]
    ServerName(String),
    /// The peer's certificate leads to a root, but is not that of the right service.
    #[error("peer not accepted")]
    Peer(#[from] PeerIdentityError),
    /// The peer does TLS, but chose no HTTP/2 in it.
    #[error("the peer does not speak HTTP/2")]
    NotHttp2,
    /// HTTP/2 failed before there was a stream.
    #[error("HTTP/2 in the tunnel")]
    Http2(#[source] h2::Error),
    /// The peer's node does not let us call the instance.
    #[error("the other node denied the call (status {0})")]
    Denied(hyper::StatusCode),
    /// The peer's node cannot reach the instance, or does not know it.
    #[error("the other node did not reach the instance (status {0}); its access log says why")]
    Refused(hyper::StatusCode),
    /// The peer's node does not say whether it reached the instance.
    #[error("the other node did not answer in time whether it reached the instance")]
    AnswerTimeout,
    /// What ended the opening of a tunnel that several connections waited for.
    #[error(transparent)]
    Pooled(Arc<Self>),
}

impl TunnelError {
    /// The step at which it failed.
    pub fn stage(&self) -> Stage {
        match self {
            Self::Dial { .. } | Self::DialTimeout { .. } => Stage::Dial,
            Self::Handshake(_)
            | Self::HandshakeTimeout
            | Self::Silent
            | Self::ServerName(_)
            | Self::Peer(_)
            | Self::NotHttp2
            | Self::Http2(_) => Stage::Handshake,
            Self::Denied(_) => Stage::Policy,
            Self::Refused(_) | Self::AnswerTimeout => Stage::Deliver,
            Self::Pooled(error) => error.stage(),
        }
    }

    /// A peer that is refused after the handshake, as if within it.
    fn verdict(error: rustls::Error) -> Self {
        Self::handshake(io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// What a failed handshake says: if our own verifier ended it, its verdict, which rustls prints as code.
    pub(super) fn handshake(source: io::Error) -> Self {
        let verdict = source
            .get_ref()
            .and_then(|inner| inner.downcast_ref())
            .and_then(PeerIdentityError::within);
        match verdict {
            Some(verdict) => Self::Peer(verdict.clone()),
            None => Self::Handshake(source),
        }
    }
}

/// A connection to another node's tunnel port. Nothing was sent.
#[derive(Debug)]
pub struct Dialled {
    stream: TcpStream,
    /// Where it leads.
    address: SocketAddr,
}

/// Connects to another node's tunnel port.
///
/// # Errors
/// [`TunnelError::Dial`] or [`TunnelError::DialTimeout`]; another instance may be tried.
pub async fn dial(address: SocketAddr, limit: Duration) -> Result<Dialled, TunnelError> {
    let failed = |source| TunnelError::Dial { address, source };
    match tokio::time::timeout(limit, TcpStream::connect(address)).await {
        Ok(connected) => {
            let stream = connected.map_err(failed)?;
            prepare(&stream).map_err(failed)?;
            Ok(Dialled { stream, address })
        }
        Err(_) => Err(TunnelError::DialTimeout { address, limit }),
    }
}

impl Dialled {
    /// Opens the tunnel as the workload that `tls` belongs to, to the instance that `sni` selects. No byte of
    /// the application is sent before the peer has proved to be `expected`.
    ///
    /// # Errors
    /// See [`TunnelError`]; another instance may be tried after each.
    pub async fn handshake(
        self,
        sni: String,
        expected: &SpiffeId,
        tls: &WorkloadTls,
        limit: Duration,
    ) -> Result<TunnelStream, TunnelError> {
        let address = self.address;
        let config = tls.client_config(expected, address);
        let stream = match tokio::time::timeout(limit, self.secure(sni, config)).await {
            Ok(done) => done?,
            Err(_) => return Err(TunnelError::HandshakeTimeout),
        };
        if let Err(error) = tls.check_resumed(stream.session(), Some(expected)) {
            tls.forget_sessions(expected, address);
            return Err(TunnelError::verdict(error));
        }
        Ok(stream)
    }

    /// The TLS handshake alone; the caller sets the deadline.
    pub(super) async fn secure(
        self,
        sni: String,
        config: Arc<ClientConfig>,
    ) -> Result<TunnelStream, TunnelError> {
        let session = Session::calling(config, server_name(sni)?).map_err(TunnelError::verdict)?;
        let stream = TunnelStream::handshake(session, self.stream, vec![]).await;
        stream.map_err(TunnelError::handshake)
    }
}

fn server_name(sni: String) -> Result<ServerName<'static>, TunnelError> {
    ServerName::try_from(sni.clone()).map_err(|_invalid| TunnelError::ServerName(sni))
}

/// A tunnel whose first message was read, and nothing answered.
pub struct Incoming {
    stream: TcpStream,
    // On the heap, like the acceptor: both are large, and the connection's task would keep the room for them.
    hello: Box<Accepted>,
    /// The bytes of the hello, and what came with it.
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("server_name", &self.server_name())
            .finish()
    }
}

impl Incoming {
    /// Reads the `ClientHello`, until `deadline`.
    ///
    /// # Errors
    /// [`TunnelError::Silent`] if the peer leaves at once, else see [`TunnelError`].
    pub async fn read_hello(stream: TcpStream, deadline: Instant) -> Result<Self, TunnelError> {
        prepare(&stream).map_err(TunnelError::Handshake)?;
        match tokio::time::timeout_at(deadline, Self::read(stream)).await {
            Ok(read) => read,
            Err(_) => Err(TunnelError::HandshakeTimeout),
        }
    }

    async fn read(stream: TcpStream) -> Result<Self, TunnelError> {
        let mut acceptor = Box::new(Acceptor::default());
        let mut bytes = Vec::new();
        loop {
            let begun = bytes.len();
            stream.readable().await.map_err(TunnelError::Handshake)?;
            let mut piece = [0; 2048];
            let length = match stream.try_read(&mut piece) {
                Ok(0) if begun == 0 => return Err(TunnelError::Silent),
                Ok(0) => {
                    let error = io::ErrorKind::UnexpectedEof;
                    return Err(TunnelError::Handshake(error.into()));
                }
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset && begun == 0 => {
                    return Err(TunnelError::Silent);
                }
                Err(error) => return Err(TunnelError::Handshake(error)),
            };
            let mut piece = piece.get(..length).unwrap_or_default();
            bytes.extend_from_slice(piece);
            while !piece.is_empty() {
                acceptor
                    .read_tls(&mut piece)
                    .map_err(TunnelError::Handshake)?;
            }
            match acceptor.accept() {
                Ok(Some(hello)) => {
                    return Ok(Self {
                        stream,
                        hello: Box::new(hello),
                        bytes,
                    });
                }
                Ok(None) => {}
                Err((error, mut alert)) => {
                    let mut answer = Vec::new();
                    alert
                        .write_all(&mut answer)
                        .map_err(TunnelError::Handshake)?;
                    // Nothing was sent before it, so there is room; if the peer is gone there is nothing to tell.
                    drop(stream.try_write(&answer));
                    return Err(TunnelError::verdict(error));
                }
            }
        }
    }

    /// What the peer asks for.
    pub fn server_name(&self) -> Option<String> {
        self.hello.client_hello().server_name().map(str::to_owned)
    }

    /// Tells the peer that nothing here has the name that it asks for, and closes: without a word it could not
    /// tell this from a node that ended.
    pub fn refuse(self) {
        /// A fatal alert `unrecognized_name` in a plaintext record. Source: RFC 8446, sections 5.1 and 6.
        const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];
        // Nothing was sent before it, so there is room; if the peer is gone there is nothing to tell.
        drop(self.stream.try_write(&UNRECOGNIZED_NAME));
    }

    /// Finishes the handshake as the workload that `tls` belongs to; the peer must show an identity of its
    /// trust domain.
    ///
    /// # Errors
    /// See [`TunnelError`].
    pub async fn handshake(
        self,
        tls: &WorkloadTls,
        deadline: Instant,
    ) -> Result<(TunnelStream, SpiffeId), TunnelError> {
        let stream = self.secure(tls.server_config(), deadline).await?;
        tls.check_resumed(stream.session(), None)
            .map_err(TunnelError::verdict)?;
        let peer = tls::peer_identity(stream.session())?;
        Ok((stream, peer))
    }

    /// The rest of the TLS handshake alone.
    pub(super) async fn secure(
        self,
        config: &Arc<ServerConfig>,
        deadline: Instant,
    ) -> Result<TunnelStream, TunnelError> {
        let Self { stream, bytes, .. } = self;
        let session = Session::called(Arc::clone(config)).map_err(TunnelError::verdict)?;
        let handshake = TunnelStream::handshake(session, stream, bytes);
        match tokio::time::timeout_at(deadline, handshake).await {
            Ok(done) => done.map_err(TunnelError::handshake),
            Err(_) => Err(TunnelError::HandshakeTimeout),
        }
    }
}

/// No delay of small writes, and an end for connections whose peer vanished.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let (idle, interval, retries) = KEEPALIVE;
    let keepalive = TcpKeepalive::new()
        .with_time(idle)
        .with_interval(interval)
        .with_retries(retries);
    // No TCP_USER_TIMEOUT: it also ends a connection whose receiver only pauses reading (6.18, measured).
    socket.set_tcp_keepalive(&keepalive)
}
