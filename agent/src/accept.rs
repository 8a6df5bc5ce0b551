//! Taking connections off a listener without ever spinning or giving up.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::{
    lifecycle::Shutdown,
    telemetry::{Telemetry, log::chain, record::Direction},
};

/// How long to pause when the process or the host is out of descriptors or memory: the first time, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// What connections are taken from.
pub trait Listener {
    /// A connection.
    type Stream;
    /// What the kernel tells of its other end.
    type Peer;

    /// The next connection. Cancel-safe.
    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    async fn next(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.accept().await
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;
    /// Clients of a Unix socket have no address.
    type Peer = ();

    async fn next(&self) -> io::Result<(UnixStream, ())> {
        let (stream, _unnamed) = self.accept().await?;
        Ok((stream, ()))
    }
}

/// Accepts until draining starts and hands each connection to `handle`, which must not wait.
///
/// Errors of one connection (`ECONNABORTED`) are passed over; exhaustion backs off, doubling up to a second,
/// for connections that end free what is missing.
pub async fn accept_all<L: Listener>(
    listener: L,
    direction: Direction,
    telemetry: &Telemetry,
    shutdown: &Shutdown,
    mut handle: impl FnMut(L::Stream, L::Peer),
) {
    let mut pause = BACK_OFF.0;
    while let Some(accepted) = until_draining(shutdown, listener.next()).await {
        match accepted {
            Ok((stream, peer)) => {
                pause = BACK_OFF.0;
                handle(stream, peer);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                telemetry.metrics().accept_failed(direction);
                tracing::warn!(direction = direction.as_str(), error = %chain(&error), "accept failed, backing off");
                if until_draining(shutdown, tokio::time::sleep(pause))
                    .await
                    .is_none()
                {
                    return;
                }
                pause = pause.saturating_mul(2).min(BACK_OFF.1);
            }
        }
    }
}

async fn until_draining<T>(shutdown: &Shutdown, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        // Shutdown first: a busy listener must not hold up draining.
        biased;
        () = shutdown.draining() => None,
        done = work => Some(done),
    }
}

/// accept(2): errors already pending on the new socket are reported by accept and mean that one only.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
