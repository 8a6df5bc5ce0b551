//! Connections to Consul: made when needed, kept for the next request.
//!
//! A connection is driven by the request that uses it, not by a task: a request that is dropped takes its connection
//! with it, and with that Consul's end of a blocking query.

use std::{
    future::{Future, poll_fn},
    io,
    path::Path,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::{ConsulAddress, ConsulError, TlsSettings};
use crate::telemetry::log::chain;

/// For a connection with its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Kept beyond what requests use; each counts against Consul's `limits.http_max_conns_per_client`.
const KEPT_MAX: usize = 8;
/// How long one is kept without use.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// A Consul that vanished without a word is noticed within two minutes, also by a query that waits.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);

/// Makes and keeps connections.
#[derive(Debug)]
pub(super) struct Connections {
    address: ConsulAddress,
    tls: Option<TlsSettings>,
    kept: Mutex<Vec<(Instant, Connection)>>,
}

impl Connections {
    pub(super) fn new(address: ConsulAddress, tls: Option<TlsSettings>) -> Self {
        Self {
            address,
            tls,
            kept: Mutex::default(),
        }
    }

    /// One that was used before and seems to be alive.
    pub(super) fn kept(&self) -> Option<Connection> {
        let mut kept = self.kept.lock();
        let now = Instant::now();
        kept.retain(|(since, _)| now - *since < KEPT_FOR);
        while let Some((_, mut connection)) = kept.pop() {
            if connection.is_usable() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps one whose answer was read whole.
    pub(super) fn keep(&self, connection: Connection) {
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT_MAX {
            kept.remove(0);
        }
        kept.push((Instant::now(), connection));
    }

    /// A new one.
    pub(super) async fn open(&self) -> Result<Connection, ConsulError> {
        let failed = |source| ConsulError::Connect {
            address: self.address.clone(),
            source,
        };
        let opened = async {
            match &self.address {
                ConsulAddress::Unix(path) => {
                    let stream = UnixStream::connect(path).await.map_err(failed)?;
                    Connection::over(stream).await.map_err(failed)
                }
                ConsulAddress::Http { host, port } => {
                    let stream = tcp(host, *port).await.map_err(failed)?;
                    Connection::over(stream).await.map_err(failed)
                }
                ConsulAddress::Https { host, port } => {
                    let (config, name) = self.tls(host).await?;
                    let stream = tcp(host, *port).await.map_err(failed)?;
                    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream);
                    let stream = stream.await.map_err(failed)?;
                    Connection::over(stream).await.map_err(failed)
                }
            }
        };
        timeout(CONNECT_TIMEOUT, opened)
            .await
            .unwrap_or_else(|_elapsed| {
                let limit = CONNECT_TIMEOUT.as_secs();
                let text = format!("no connection within {limit} s");
                Err(failed(io::Error::new(io::ErrorKind::TimedOut, text)))
            })
    }

    async fn tls(&self, host: &str) -> Result<(ClientConfig, ServerName<'static>), ConsulError> {
        let Some(tls) = &self.tls else {
            return Err(ConsulError::TlsSettings(
                "consul.ca_file: not set, and needed with an https:// address",
            ));
        };
        let name = tls.server_name.clone().unwrap_or_else(|| host.to_owned());
        let name = ServerName::try_from(name).map_err(|_invalid| {
            ConsulError::TlsSettings("consul.server_name: expected a host name or an address")
        })?;
        Ok((client_config(tls).await?, name))
    }
}

/// Read for each new connection: a renewed certificate counts without a word to the agent.
async fn client_config(tls: &TlsSettings) -> Result<ClientConfig, ConsulError> {
    let ca = read("consul.ca_file", &tls.ca_file).await?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates("consul.ca_file", &tls.ca_file, &ca)? {
        roots
            .add(certificate)
            .map_err(|error| unusable("consul.ca_file", &tls.ca_file, error))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("consul.ca_file", &tls.ca_file, error))?
        .with_root_certificates(roots);
    let Some(own) = &tls.client_certificate else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = read("consul.certificate", &own.certificate).await?;
    let chain = certificates("consul.certificate", &own.certificate, &chain)?;
    let key = read("consul.key", &own.key).await?;
    let key = PrivateKeyDer::from_pem_slice(&key)
        .map_err(|error| unusable("consul.key", &own.key, error))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| unusable("consul.certificate", &own.certificate, error))
}

async fn read(key: &'static str, path: &Path) -> Result<zeroize::Zeroizing<Vec<u8>>, ConsulError> {
    let read = tokio::fs::read(path).await;
    read.map(zeroize::Zeroizing::new)
        .map_err(|error| unusable(key, path, error))
}

fn certificates(
    key: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, ConsulError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(key, path, error))?;
    if found.is_empty() {
        return Err(unusable(
            key,
            path,
            rustls_pki_types::pem::Error::NoItemsFound,
        ));
    }
    Ok(found)
}

fn unusable(
    key: &'static str,
    path: &Path,
    source: impl std::error::Error + Send + Sync + 'static,
) -> ConsulError {
    ConsulError::TlsFile {
        key,
        path: path.to_owned(),
        source: Box::new(source),
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    let (idle, interval, retries) = KEEPALIVE;
    let keepalive = TcpKeepalive::new()
        .with_time(idle)
        .with_interval(interval)
        .with_retries(retries);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    Ok(stream)
}

type Driver = Pin<Box<dyn Future<Output = Result<(), hyper::Error>> + Send>>;

/// An HTTP/1.1 connection, one request at a time.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// Reads and writes; `None` once it has ended.
    driver: Option<Driver>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("ended", &self.driver.is_none())
            .finish_non_exhaustive()
    }
}

impl Connection {
    async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, driver) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        Ok(Self {
            sender,
            driver: Some(Box::pin(driver)),
        })
    }

    /// Whether the other end is there and the last answer is done with. Does not wait.
    fn is_usable(&mut self) -> bool {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let ended = self
            .driver
            .as_mut()
            .is_none_or(|driver| driver.as_mut().poll(&mut context).is_ready());
        !ended && self.sender.is_ready()
    }

    /// Sends and waits for the head of the answer.
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let answer = self.sender.send_request(request);
        drive(&mut self.driver, answer).await
    }

    /// Keeps the connection going while `work` reads from it.
    pub(super) async fn drive<T>(&mut self, work: impl Future<Output = T>) -> T {
        drive(&mut self.driver, work).await
    }
}

/// The connection may end before the work does and leave what the work needs; what is wrong with it, the work tells.
async fn drive<T>(driver: &mut Option<Driver>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|context| {
        if let Some(running) = driver
            && let Poll::Ready(ended) = running.as_mut().poll(context)
        {
            *driver = None;
            if let Err(error) = ended {
                tracing::debug!(error = %chain(&error), "connection to Consul ended");
            }
        }
        work.as_mut().poll(context)
    })
    .await
}
