//! Explicit upstreams: a local port or Unix socket that stands for a service, as Consul's sidecars offer it.
//!
//! Who connects is found out by what the kernel knows of the client: of its socket, as for captured connections, or at
//! a Unix socket of its process ([`unix_client`]). The address only says whom the client wants; that it can be reached
//! gives nobody an identity.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixListener,
    sync::Arc,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

use super::{
    Asked, Door, Outbound, Wanted,
    unix_client::{self, UnixClients},
    unix_socket::{self, BoundFile},
};
use crate::{
    accept::{Acceptor, Listener},
    catalog::{
        consul::found::{Finder, Found},
        model::ServiceName,
    },
    consul::upstreams::{Destination, Offer},
    datapath::{Maker, NetnsCookie},
    relay::Endpoint,
    sock_diag::SockDiag,
    sockets::{Kept, ListenAddress, ListeningSockets, SocketKey},
    telemetry::{
        log::chain,
        record::{Outcome, Side, Stage},
    },
};

/// The kernel cuts this to `net.core.somaxconn`.
pub(super) const BACKLOG: i32 = 1024;

/// The listeners of explicit upstreams, in the network namespace of the agent.
#[derive(Debug)]
pub struct UpstreamListeners {
    outbound: Arc<Outbound>,
    sockets: ListeningSockets,
    clients: Arc<SockDiag>,
    /// Made for the first Unix socket.
    unix_clients: Option<Arc<UnixClients>>,
    finder: Finder,
    open: BTreeMap<ListenAddress, OpenUpstream>,
}

#[derive(Debug)]
struct OpenUpstream {
    offer: Offer,
    closed: CancellationToken,
    _kept: Kept,
    file: Option<BoundFile>,
}

/// An upstream that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("listen at {address} for the upstream {destination}")]
pub struct UpstreamError {
    address: ListenAddress,
    destination: Destination,
    #[source]
    source: io::Error,
}

impl UpstreamListeners {
    /// Nothing is open yet; see [`Self::follow`].
    ///
    /// # Errors
    /// If the kernel cannot be asked whose a socket is.
    pub fn new(
        outbound: Arc<Outbound>,
        sockets: ListeningSockets,
        finder: Finder,
    ) -> io::Result<Self> {
        Ok(Self {
            outbound,
            sockets,
            clients: Arc::new(SockDiag::open()?),
            unix_clients: None,
            finder,
            open: BTreeMap::new(),
        })
    }

    /// Opens and closes listeners to match `wanted`: what is reached where. Returns what could not be opened; it is
    /// tried again at the next call. Connections of a closed listener live on.
    pub fn follow(&mut self, wanted: &BTreeMap<ListenAddress, Offer>) -> Vec<UpstreamError> {
        self.finder
            .follow(wanted.values().map(|offer| &offer.destination));
        self.open.retain(|address, open| {
            let is_found = open.file.as_ref().is_none_or(BoundFile::is_in_place);
            let keep = wanted.get(address) == Some(&open.offer) && is_found;
            if !keep {
                open.closed.cancel();
                tracing::info!(%address, destination = %open.offer.destination, "upstream closed");
            }
            keep
        });
        let mut failed = Vec::new();
        for (address, offer) in wanted {
            if self.open.contains_key(address) {
                continue;
            }
            match self.start(address, offer) {
                Ok(open) => {
                    tracing::info!(%address, destination = %offer.destination, "upstream open");
                    self.open.insert(address.clone(), open);
                }
                Err(source) => failed.push(UpstreamError {
                    address: address.clone(),
                    destination: offer.destination.clone(),
                    source,
                }),
            }
        }
        failed
    }

    /// What is open.
    pub fn list(&self) -> impl Iterator<Item = (&ListenAddress, &Destination)> {
        self.open
            .iter()
            .map(|(address, open)| (address, &open.offer.destination))
    }

    /// What open ones lead to beside the catalog.
    pub fn found(&self) -> impl Iterator<Item = &Found> {
        self.finder.all()
    }

    fn start(&mut self, address: &ListenAddress, offer: &Offer) -> io::Result<OpenUpstream> {
        let leads_to = match (self.finder.found(&offer.destination), &offer.destination) {
            (Some(found), _) => LeadsTo::Found(found),
            (None, Destination::Service(name)) => LeadsTo::Service(name.clone()),
            (None, Destination::Query(_) | Destination::Elsewhere { .. }) => {
                return Err(io::Error::other("nobody asks Consul for it"));
            }
        };
        let key = SocketKey::here(address.clone())?;
        let closed = CancellationToken::new();
        let (kept, file) = match address {
            ListenAddress::Tcp(address) => {
                let upstream = TcpUpstream {
                    leads_to,
                    netns: key.netns,
                    clients: Arc::clone(&self.clients),
                };
                let (listener, kept) = self.sockets.listen(key, || listen(*address))?;
                self.serve(listener, upstream, closed.clone())?;
                (kept, None)
            }
            ListenAddress::Unix(path) => {
                let clients = self.unix_clients()?;
                let (listener, kept, file) =
                    unix_socket::listen(&self.sockets, key, path, offer.mode)?;
                let upstream = UnixUpstream { leads_to, clients };
                self.serve(listener, upstream, closed.clone())?;
                (kept, Some(file))
            }
        };
        Ok(OpenUpstream {
            offer: offer.clone(),
            closed,
            _kept: kept,
            file,
        })
    }

    fn unix_clients(&mut self) -> io::Result<Arc<UnixClients>> {
        if let Some(clients) = &self.unix_clients {
            return Ok(Arc::clone(clients));
        }
        let clients = UnixClients::new().map_err(io::Error::other)?;
        Ok(Arc::clone(self.unix_clients.insert(Arc::new(clients))))
    }

    fn serve<L>(
        &self,
        listener: L,
        upstream: impl Door<L>,
        closed: CancellationToken,
    ) -> io::Result<()>
    where
        L: Listener,
        L::Stream: Endpoint,
    {
        let outbound = Arc::clone(&self.outbound);
        let acceptor = Acceptor::new(listener, outbound.shutdown.workers().in_turn())?;
        let runtime = acceptor.runtime().clone();
        let serving = async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = outbound.serve(acceptor, upstream) => {}
            }
        };
        let shutdown = &self.outbound.shutdown;
        shutdown.spawn_on(&runtime, "upstream listener", serving);
        Ok(())
    }
}

#[derive(Debug)]
enum LeadsTo {
    /// By the catalog.
    Service(ServiceName),
    /// What Consul is asked for beside.
    Found(Arc<Found>),
}

impl LeadsTo {
    fn wanted(&self) -> Wanted<'_> {
        match self {
            Self::Service(name) => Wanted::Service(name),
            Self::Found(found) => Wanted::Found(found),
        }
    }
}

/// The door of an upstream at a port.
#[derive(Debug)]
struct TcpUpstream {
    leads_to: LeadsTo,
    netns: NetnsCookie,
    clients: Arc<SockDiag>,
}

impl Door<TcpListener> for TcpUpstream {
    fn asked(
        &self,
        _outbound: &Outbound,
        downstream: &TcpStream,
        client: &SocketAddr,
    ) -> Result<Asked<'_>, Outcome> {
        let internal = |error: &dyn std::error::Error| not_told(Side::Internal, &chain(error));
        let local = downstream.local_addr().map_err(|error| internal(&error))?;
        let owner = self.clients.socket_of(*client, local);
        let Some(owner) = owner.map_err(|error| internal(&error))? else {
            let error = format!(
                "the kernel does not tell whose socket {client} is: it is of another network namespace, or closed"
            );
            return Err(not_told(Side::Downstream, &error));
        };
        Ok(Asked {
            maker: Maker {
                cgroup: owner.cgroup,
                netns: self.netns,
                uid: owner.uid,
                // The kernel does not say, and it decides nothing.
                process: 0,
            },
            address: Some(local),
            wanted: self.leads_to.wanted(),
        })
    }
}

/// The door of an upstream at a Unix socket.
#[derive(Debug)]
struct UnixUpstream {
    leads_to: LeadsTo,
    clients: Arc<UnixClients>,
}

impl Door<UnixListener> for UnixUpstream {
    fn asked(
        &self,
        outbound: &Outbound,
        downstream: &UnixStream,
        (): &(),
    ) -> Result<Asked<'_>, Outcome> {
        let by_namespace = !outbound.workloads.namespaces().is_empty();
        let maker = self.clients.maker_of(downstream, by_namespace);
        let maker = maker.map_err(|error| {
            let side = if matches!(error, unix_client::UnixClientError::Gone) {
                Side::Downstream
            } else {
                Side::Internal
            };
            not_told(side, &chain(&error))
        })?;
        Ok(Asked {
            maker,
            address: None,
            wanted: self.leads_to.wanted(),
        })
    }
}

fn not_told(side: Side, error: &dyn std::fmt::Display) -> Outcome {
    Outcome::Failed {
        stage: Stage::Capture,
        side,
        error: error.to_string(),
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
