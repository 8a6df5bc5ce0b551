//! The ports at which this node takes tunnels: one shared, plus what local instances declare.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::Inbound;
use crate::telemetry::log::chain;

/// Handshakes arrive in bursts when a peer restarts; the kernel cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The tunnel listeners of the node.
#[derive(Debug)]
pub struct TunnelListeners {
    inbound: Arc<Inbound>,
    address: IpAddr,
    shared_port: u16,
    open: BTreeMap<u16, CancellationToken>,
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
    ) -> Result<Self, TunnelListenError> {
        let mut listeners = Self {
            inbound,
            address,
            shared_port,
            open: BTreeMap::new(),
        };
        listeners.start(shared_port)?;
        Ok(listeners)
    }

    /// Opens and closes ports to match the instances of this node. What cannot be opened is tried again
    /// at the next call; connections of a closed port live on.
    pub fn follow(&mut self, declared: &BTreeSet<u16>) {
        let shared = self.shared_port;
        self.open.retain(|port, listener| {
            let keep = *port == shared || declared.contains(port);
            if !keep {
                listener.cancel();
            }
            keep
        });
        for port in declared {
            if !self.open.contains_key(port)
                && let Err(error) = self.start(*port)
            {
                tracing::error!(error = %chain(&error), "tunnel port not opened");
            }
        }
    }

    /// Where the node takes tunnels now.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.open
            .keys()
            .map(|port| SocketAddr::new(self.address, *port))
            .collect()
    }

    fn start(&mut self, port: u16) -> Result<(), TunnelListenError> {
        let address = SocketAddr::new(self.address, port);
        let listener = listen(address).map_err(|source| TunnelListenError { address, source })?;
        let closed = CancellationToken::new();
        self.open.insert(port, closed.clone());
        let inbound = Arc::clone(&self.inbound);
        self.inbound.shutdown.spawn("tunnel listener", async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = inbound.serve(listener, port) => {}
            }
        });
        tracing::info!(%address, "taking tunnels");
        Ok(())
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}
