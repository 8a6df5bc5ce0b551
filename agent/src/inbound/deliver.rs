//! Step 9: a connection to the application, made in the network namespace where the application is.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::oneshot,
};

use crate::datapath::netns::{Netns, NetnsError};

/// Dials applications on this node.
#[derive(Debug, Default)]
pub struct Deliverer {
    namespaces: Mutex<HashMap<PathBuf, Arc<SocketMaker>>>,
}

/// The application could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DeliverError {
    /// The namespace of the workload is away.
    #[error("make a socket in network namespace {}", path.display())]
    Namespace {
        /// The namespace's file.
        path: PathBuf,
        /// What failed.
        #[source]
        source: NamespaceSocketError,
    },
    /// The application does not answer there.
    #[error("connect to the application at {address}")]
    Connect {
        /// Where it was expected.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("connect to the application at {address}: no answer within {} ms", limit.as_millis())]
    Timeout {
        /// Where it was expected.
        address: SocketAddr,
        /// How long was waited.
        limit: Duration,
    },
}

/// Why there is no socket in another namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceSocketError {
    /// The namespace cannot be opened or entered.
    #[error(transparent)]
    Enter(#[from] NetnsError),
    /// socket(2) failed there.
    #[error("socket")]
    Socket(#[source] io::Error),
    /// The thread that makes the sockets is gone.
    #[error("the thread in that namespace ended")]
    ThreadEnded,
}

impl Deliverer {
    /// Connects to `address`, in the host's namespace or in the one at `netns`.
    ///
    /// # Errors
    /// See [`DeliverError`].
    pub async fn dial(
        &self,
        address: SocketAddr,
        netns: Option<&Path>,
        limit: Duration,
    ) -> Result<TcpStream, DeliverError> {
        let socket = match netns {
            None => {
                host_socket(address).map_err(|source| DeliverError::Connect { address, source })?
            }
            Some(path) => self.socket_in(path, address).await.map_err(|source| {
                self.namespaces.lock().remove(path);
                DeliverError::Namespace {
                    path: path.to_owned(),
                    source,
                }
            })?,
        };
        match tokio::time::timeout(limit, socket.connect(address)).await {
            Ok(Ok(stream)) => {
                // Delay is the application's to choose, not the mesh's to add.
                stream
                    .set_nodelay(true)
                    .map_err(|source| DeliverError::Connect { address, source })?;
                Ok(stream)
            }
            Ok(Err(source)) => Err(DeliverError::Connect { address, source }),
            Err(_) => Err(DeliverError::Timeout { address, limit }),
        }
    }

    async fn socket_in(
        &self,
        path: &Path,
        address: SocketAddr,
    ) -> Result<TcpSocket, NamespaceSocketError> {
        let netns = Netns::open(path)?;
        let maker = {
            let mut namespaces = self.namespaces.lock();
            match namespaces.get(path) {
                // A file of the same name may meanwhile be another namespace.
                Some(maker) if maker.identity == netns.identity()? => Arc::clone(maker),
                _ => {
                    let maker = Arc::new(SocketMaker::start(&netns)?);
                    namespaces.insert(path.to_owned(), Arc::clone(&maker));
                    maker
                }
            }
        };
        maker.make(address).await
    }
}

fn host_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
}

/// A thread that lives in a namespace and makes sockets there: setns(2) once, not once per connection,
/// and never on a thread that serves others.
#[derive(Debug)]
struct SocketMaker {
    identity: (u64, u64),
    orders: mpsc::Sender<Order>,
}

type Order = (Domain, oneshot::Sender<io::Result<Socket>>);

impl SocketMaker {
    fn start(netns: &Netns) -> Result<Self, NamespaceSocketError> {
        let (orders, queue) = mpsc::channel::<Order>();
        let identity = netns.identity()?;
        netns.spawn_thread("netns sockets", move || {
            for (domain, reply) in queue {
                let made = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP));
                // Nobody waits any more: the socket is closed by being dropped.
                drop(reply.send(made));
            }
        })?;
        Ok(Self { identity, orders })
    }

    async fn make(&self, address: SocketAddr) -> Result<TcpSocket, NamespaceSocketError> {
        let (reply, answer) = oneshot::channel();
        self.orders
            .send((Domain::for_address(address), reply))
            .map_err(|_closed| NamespaceSocketError::ThreadEnded)?;
        let socket = answer
            .await
            .map_err(|_closed| NamespaceSocketError::ThreadEnded)?
            .map_err(NamespaceSocketError::Socket)?;
        Ok(TcpSocket::from_std_stream(socket.into()))
    }
}
