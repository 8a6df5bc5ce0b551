//! Taking connections off a listener without ever spinning or giving up.

use std::{
    future::Future,
    io,
    marker::PhantomData,
    net::{self, SocketAddr},
    os::{fd::OwnedFd, unix},
    time::Duration,
};

use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{TcpStream, UnixStream},
    runtime::Handle,
};

use crate::{
    lifecycle::Shutdown,
    telemetry::{Telemetry, log::chain, record::Direction},
};

/// How long to pause when the process or the host is out of descriptors or memory: the first time, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// What connections are taken from.
pub trait Listener: Into<OwnedFd> + Send + Sync + 'static {
    /// A connection.
    type Stream: Send + Sync + 'static;
    /// What the kernel tells of its other end.
    type Peer: Send + Sync + 'static;

    /// Makes a connection of a socket that does not block, for the runtime of the caller.
    ///
    /// # Errors
    /// If the runtime cannot wait for it: there is no memory.
    fn stream(socket: OwnedFd) -> io::Result<Self::Stream>;

    /// The other end, of the address that accept(2) gave; `None` if it is none.
    fn peer(address: Option<SocketAddrAny>) -> Option<Self::Peer>;
}

impl Listener for net::TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    fn stream(socket: OwnedFd) -> io::Result<TcpStream> {
        TcpStream::from_std(socket.into())
    }

    fn peer(address: Option<SocketAddrAny>) -> Option<SocketAddr> {
        address?.try_into().ok()
    }
}

impl Listener for unix::net::UnixListener {
    type Stream = UnixStream;
    /// Clients of a Unix socket have no address.
    type Peer = ();

    fn stream(socket: OwnedFd) -> io::Result<UnixStream> {
        UnixStream::from_std(socket.into())
    }

    fn peer(_unnamed: Option<SocketAddrAny>) -> Option<()> {
        Some(())
    }
}

/// A listener, and the runtime that accepts from it.
#[derive(Debug)]
pub struct Acceptor<L: Listener> {
    listener: AsyncFd<OwnedFd>,
    runtime: Handle,
    kind: PhantomData<L>,
}

/// An accepted socket, before it is known which runtime will wait for it.
#[derive(Debug)]
pub struct Accepted<L: Listener> {
    socket: OwnedFd,
    peer: L::Peer,
}

impl<L: Listener> Acceptor<L> {
    /// Accepts on `runtime` from a listener that does not block.
    ///
    /// # Errors
    /// If the runtime cannot wait for it.
    pub fn new(listener: L, runtime: Handle) -> io::Result<Self> {
        let listener = {
            let _entered = runtime.enter();
            watched(listener.into())?
        };
        Ok(Self {
            listener,
            runtime,
            kind: PhantomData,
        })
    }

    /// Where to run [`accept_all`] for it.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The next connection. Cancel-safe.
    async fn next(&self) -> io::Result<Accepted<L>> {
        let accept = |listener: &OwnedFd| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            Ok(acceptfrom_with(listener, flags)?)
        };
        let (socket, address) = self.listener.async_io(Interest::READABLE, accept).await?;
        let peer = L::peer(address).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Accepted { socket, peer })
    }
}

impl<L: Listener> Accepted<L> {
    /// The other end.
    pub fn peer(&self) -> &L::Peer {
        &self.peer
    }

    /// The connection, for the runtime of the caller; `None` if that is not possible, which is said here. It closes
    /// then.
    pub fn stream(
        self,
        direction: Direction,
        telemetry: &Telemetry,
    ) -> Option<(L::Stream, L::Peer)> {
        match L::stream(self.socket) {
            Ok(stream) => Some((stream, self.peer)),
            Err(error) => {
                telemetry.metrics().accept_failed(direction);
                tracing::warn!(direction = direction.as_str(), error = %chain(&error), "connection not taken");
                None
            }
        }
    }
}

/// Accepts until draining starts and hands each connection to `handle`, which must not wait.
///
/// Errors of one connection (`ECONNABORTED`) are passed over; exhaustion backs off, doubling up to a second,
/// for connections that end free what is missing.
pub async fn accept_all<L: Listener>(
    acceptor: Acceptor<L>,
    direction: Direction,
    telemetry: &Telemetry,
    shutdown: &Shutdown,
    mut handle: impl FnMut(Accepted<L>),
) {
    let mut pause = BACK_OFF.0;
    while let Some(accepted) = until_draining(shutdown, acceptor.next()).await {
        match accepted {
            Ok(accepted) => {
                pause = BACK_OFF.0;
                handle(accepted);
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

/// The newer `AsyncFd::register` is unsafe for types whose descriptor may change; this one's cannot.
#[expect(deprecated, reason = "safe for an OwnedFd")]
fn watched(listener: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(listener, Interest::READABLE)
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

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::mpsc,
    };

    use super::*;
    use crate::{
        telemetry::{access_log::AccessLog, metrics::Metrics, series::SeriesLimits},
        workers::{WorkerId, Workers},
    };

    const SOON: Duration = Duration::from_secs(20);

    async fn echo(
        accepted: Accepted<net::TcpListener>,
        telemetry: Telemetry,
        carried: mpsc::UnboundedSender<Option<WorkerId>>,
    ) {
        let stream = accepted.stream(Direction::Inbound, &telemetry);
        let (mut stream, _peer) = stream.unwrap();
        carried.send(WorkerId::here()).unwrap();
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_goes_on_at_the_worker_that_it_is_handed_to() {
        let metrics = Arc::new(Metrics::new(SeriesLimits::default(), "0"));
        let telemetry = Telemetry::new(metrics, Arc::new(AccessLog::off()));
        let (workers, _threads) = Workers::start(2, Handle::current()).unwrap();
        let shutdown = Shutdown::with(workers.clone());
        let listener = net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Acceptor::new(listener, workers.in_turn()).unwrap();
        let (carried, mut carriers) = mpsc::unbounded_channel();
        let runtime = acceptor.runtime().clone();
        let inner = shutdown.clone();
        shutdown.spawn_on(&runtime, "listener", async move {
            let handle = |accepted: Accepted<net::TcpListener>| {
                let (carried, telemetry) = (carried.clone(), telemetry.clone());
                inner.spawn_connection("echo", echo(accepted, telemetry, carried));
            };
            accept_all(acceptor, Direction::Inbound, &telemetry, &inner, handle).await;
        });
        let mut clients = vec![];
        let mut seen = BTreeSet::new();
        for _ in 0..8 {
            clients.push(TcpStream::connect(address).await.unwrap());
            let carrier = tokio::time::timeout(SOON, carriers.recv()).await;
            seen.insert(format!("{:?}", carrier.unwrap().unwrap()));
        }
        assert_eq!(seen.len(), 2, "{seen:?}");
        for client in &mut clients {
            client.write_all(b"hello").await.unwrap();
            let mut back = [0; 5];
            let answered = tokio::time::timeout(SOON, client.read_exact(&mut back)).await;
            answered.unwrap().unwrap();
        }
        drop(clients);
        assert_eq!(shutdown.run("test", SOON).await, 0);
    }
}
