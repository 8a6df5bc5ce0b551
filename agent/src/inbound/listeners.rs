//! The ports at which this node takes tunnels: one shared, plus what local instances declare.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio_util::sync::CancellationToken;

use super::Inbound;
use crate::{
    accept::Acceptor,
    sockets::{Kept, ListeningSockets, SocketKey},
    telemetry::log::chain,
};

/// Handshakes arrive in bursts when a peer restarts; the kernel cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The tunnel listeners of the node.
#[derive(Debug)]
pub struct TunnelListeners {
    inbound: Arc<Inbound>,
    address: IpAddr,
    shared_port: u16,
    sockets: ListeningSockets,
    open: BTreeMap<u16, OpenPort>,
    /// Ports that are declared and could not be opened.
    failed: BTreeSet<u16>,
    hbone: Option<(u16, Kept)>,
    /// Of the ports that are open from the start: what comes in waits until the first [`Self::follow`], since before it
    /// is not known what is on this node.
    waiting: Vec<Waiting>,
}

/// A listener that nothing is accepted from yet.
#[derive(Debug)]
enum Waiting {
    Shared(Acceptor<TcpListener>),
    Hbone(u16, Acceptor<TcpListener>),
}

#[derive(Debug)]
struct OpenPort {
    closed: CancellationToken,
    _kept: Kept,
}

/// A tunnel port that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("listen for tunnels at {address}")]
pub struct TunnelListenError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

impl TunnelListeners {
    /// Opens the shared port, without which the node cannot be reached.
    ///
    /// # Errors
    /// If the port cannot be opened.
    pub fn open(
        inbound: Arc<Inbound>,
        address: IpAddr,
        shared_port: u16,
        sockets: ListeningSockets,
    ) -> Result<Self, TunnelListenError> {
        let mut listeners = Self {
            inbound,
            address,
            shared_port,
            sockets,
            open: BTreeMap::new(),
            failed: BTreeSet::new(),
            hbone: None,
            waiting: Vec::new(),
        };
        let acceptor = listeners.bind(shared_port)?;
        listeners.waiting.push(Waiting::Shared(acceptor));
        Ok(listeners)
    }

    /// Opens the port at which tunnels of the kind `hbone` are taken, for as long as the agent runs.
    ///
    /// # Errors
    /// If the port cannot be opened.
    pub fn open_hbone(&mut self, port: u16) -> Result<(), TunnelListenError> {
        let (acceptor, kept) = self.acceptor(port)?;
        self.hbone = Some((port, kept));
        self.waiting.push(Waiting::Hbone(port, acceptor));
        Ok(())
    }

    /// Opens and closes ports to match the instances of this node, which [`Inbound`] is to know already. What cannot be
    /// opened is tried again at the next call; connections of a closed port live on.
    pub fn follow(&mut self, declared: &BTreeSet<u16>) {
        let shared = self.shared_port;
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting {
                Waiting::Shared(acceptor) => self.serve(shared, acceptor),
                Waiting::Hbone(port, acceptor) => self.serve_hbone(port, acceptor),
            }
        }
        self.open.retain(|port, listener| {
            let keep = *port == shared || declared.contains(port);
            if !keep {
                listener.closed.cancel();
            }
            keep
        });
        self.failed.retain(|port| declared.contains(port));
        for port in declared {
            if self.open.contains_key(port) {
                continue;
            }
            match self.start(*port) {
                Ok(()) => drop(self.failed.remove(port)),
                // Told once: it may be tried again every second.
                Err(error) => {
                    if self.failed.insert(*port) {
                        tracing::error!(error = %chain(&error), "tunnel port not opened");
                    }
                }
            }
        }
    }

    /// Whether a declared port could not be opened.
    pub fn is_incomplete(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Where the node takes tunnels now.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let hbone = self.hbone.iter().map(|(port, _kept)| port);
        self.open
            .keys()
            .chain(hbone)
            .map(|port| SocketAddr::new(self.address, *port))
            .collect()
    }

    fn start(&mut self, port: u16) -> Result<(), TunnelListenError> {
        let acceptor = self.bind(port)?;
        self.serve(port, acceptor);
        Ok(())
    }

    fn bind(&mut self, port: u16) -> Result<Acceptor<TcpListener>, TunnelListenError> {
        let (acceptor, kept) = self.acceptor(port)?;
        let open = OpenPort {
            closed: CancellationToken::new(),
            _kept: kept,
        };
        self.open.insert(port, open);
        Ok(acceptor)
    }

    fn serve(&self, port: u16, acceptor: Acceptor<TcpListener>) {
        let Some(closed) = self.open.get(&port).map(|open| open.closed.clone()) else {
            return;
        };
        let inbound = Arc::clone(&self.inbound);
        let runtime = acceptor.runtime().clone();
        let shutdown = &self.inbound.shutdown;
        shutdown.spawn_on(&runtime, "tunnel listener", async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = inbound.serve(acceptor, port) => {}
            }
        });
        let address = SocketAddr::new(self.address, port);
        tracing::info!(%address, "taking tunnels");
    }

    fn serve_hbone(&self, port: u16, acceptor: Acceptor<TcpListener>) {
        let inbound = Arc::clone(&self.inbound);
        let runtime = acceptor.runtime().clone();
        let serve = Arc::clone(&inbound).serve_hbone(acceptor);
        inbound.shutdown.spawn_on(&runtime, "hbone listener", serve);
        let address = SocketAddr::new(self.address, port);
        tracing::info!(%address, "taking HBONE tunnels");
    }

    fn acceptor(&self, port: u16) -> Result<(Acceptor<TcpListener>, Kept), TunnelListenError> {
        let address = SocketAddr::new(self.address, port);
        let failed = |source| TunnelListenError { address, source };
        let key = SocketKey::here(address).map_err(failed)?;
        let listened = self.sockets.listen(key, || listen(address));
        let (listener, kept) = listened.map_err(failed)?;
        let runtime = self.inbound.shutdown.workers().in_turn();
        let acceptor = Acceptor::new(listener, runtime).map_err(failed)?;
        Ok((acceptor, kept))
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
