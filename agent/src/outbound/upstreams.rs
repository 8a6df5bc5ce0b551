//! Explicit upstreams: a local port that stands for a service, as Consul's sidecars offer it.
//!
//! Who connects is found out as for captured connections, by what the kernel knows of the client's socket. The port
//! only says whom the client wants; that it can be reached gives nobody an identity.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::{Asked, Outbound, Wanted};
use crate::{
    catalog::{
        consul::found::{Finder, Found},
        model::ServiceName,
    },
    consul::upstreams::Destination,
    datapath::{Maker, NetnsCookie},
    sock_diag::SockDiag,
    sockets::{Kept, ListeningSockets, SocketKey},
    telemetry::{
        log::chain,
        record::{Outcome, Side, Stage},
    },
};

/// The kernel cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// The listeners of explicit upstreams, in the network namespace of the agent.
#[derive(Debug)]
pub struct UpstreamListeners {
    outbound: Arc<Outbound>,
    sockets: ListeningSockets,
    clients: Arc<SockDiag>,
    finder: Finder,
    open: BTreeMap<SocketAddr, OpenUpstream>,
}

#[derive(Debug)]
struct OpenUpstream {
    destination: Destination,
    closed: CancellationToken,
    _kept: Kept,
}

/// An upstream whose port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("listen at {address} for the upstream {destination}")]
pub struct UpstreamError {
    address: SocketAddr,
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
            finder,
            open: BTreeMap::new(),
        })
    }

    /// Opens and closes listeners to match `wanted`: what is reached where. Returns what could not be opened; it is
    /// tried again at the next call. Connections of a closed listener live on.
    pub fn follow(&mut self, wanted: &BTreeMap<SocketAddr, Destination>) -> Vec<UpstreamError> {
        self.finder.follow(wanted.values());
        self.open.retain(|address, open| {
            let keep = wanted.get(address) == Some(&open.destination);
            if !keep {
                open.closed.cancel();
                tracing::info!(%address, destination = %open.destination, "upstream closed");
            }
            keep
        });
        let mut failed = Vec::new();
        for (address, destination) in wanted {
            if !self.open.contains_key(address)
                && let Err(source) = self.start(*address, destination)
            {
                failed.push(UpstreamError {
                    address: *address,
                    destination: destination.clone(),
                    source,
                });
            }
        }
        failed
    }

    /// What is open.
    pub fn list(&self) -> impl Iterator<Item = (SocketAddr, &Destination)> {
        self.open
            .iter()
            .map(|(address, open)| (*address, &open.destination))
    }

    /// What open ones lead to beside the catalog.
    pub fn found(&self) -> impl Iterator<Item = &Found> {
        self.finder.all()
    }

    fn start(&mut self, address: SocketAddr, destination: &Destination) -> io::Result<()> {
        let leads_to = match (self.finder.found(destination), destination) {
            (Some(found), _) => LeadsTo::Found(found),
            (None, Destination::Service(name)) => LeadsTo::Service(name.clone()),
            (None, Destination::Query(_)) => {
                return Err(io::Error::other("nobody asks Consul for it"));
            }
        };
        let key = SocketKey::here(address)?;
        let (listener, kept) = self.sockets.listen(key, || listen(address))?;
        let listener = TcpListener::from_std(listener)?;
        let closed = CancellationToken::new();
        let upstream = Arc::new(Upstream {
            leads_to,
            netns: key.netns,
            clients: Arc::clone(&self.clients),
        });
        let (outbound, ended) = (Arc::clone(&self.outbound), closed.clone());
        self.outbound
            .shutdown
            .spawn("upstream listener", async move {
                tokio::select! {
                    () = ended.cancelled() => {}
                    () = outbound.serve(listener, Some(upstream)) => {}
                }
            });
        tracing::info!(%address, %destination, "upstream open");
        let open = OpenUpstream {
            destination: destination.clone(),
            closed,
            _kept: kept,
        };
        self.open.insert(address, open);
        Ok(())
    }
}

/// What a connection to one of the listeners asks for.
#[derive(Debug)]
pub(super) struct Upstream {
    leads_to: LeadsTo,
    netns: NetnsCookie,
    clients: Arc<SockDiag>,
}

#[derive(Debug)]
enum LeadsTo {
    /// By the catalog.
    Service(ServiceName),
    /// What Consul is asked for beside.
    Found(Arc<Found>),
}

impl Upstream {
    fn wanted(&self) -> Wanted<'_> {
        match &self.leads_to {
            LeadsTo::Service(name) => Wanted::Service(name),
            LeadsTo::Found(found) => Wanted::Found(found),
        }
    }

    /// Step 3 for a connection to the listener: who its maker is, as the programs would have recorded it.
    pub(super) fn asked(
        &self,
        downstream: &TcpStream,
        client: SocketAddr,
    ) -> Result<Asked<'_>, Outcome> {
        let failed = |side, error| Outcome::Failed {
            stage: Stage::Capture,
            side,
            error,
        };
        let internal =
            |error: &dyn std::error::Error| failed(Side::Internal, chain(error).to_string());
        let local = downstream.local_addr().map_err(|error| internal(&error))?;
        let owner = self.clients.socket_of(client, local);
        let Some(owner) = owner.map_err(|error| internal(&error))? else {
            let error = format!(
                "the kernel does not tell whose socket {client} is: it is of another network namespace, or closed"
            );
            return Err(failed(Side::Downstream, error));
        };
        Ok(Asked {
            maker: Maker {
                cgroup: owner.cgroup,
                netns: self.netns,
                uid: owner.uid,
                // The kernel does not say, and it decides nothing.
                process: 0,
            },
            address: local,
            wanted: self.wanted(),
        })
    }
}

fn listen(address: SocketAddr) -> io::Result<StdListener> {
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
