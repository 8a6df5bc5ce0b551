//! Capture listeners: one in the host's network namespace and one in each namespace of a workload.
//!
//! The programs rewrite only to sockets that are enrolled; the kernel dismisses them as they are closed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{Capture, Outbound};
use crate::{
    accept::Acceptor,
    datapath::{
        DatapathError, NetnsCookie,
        listener::{self, CaptureListeners},
        netns::{Netns, NetnsError},
    },
    sockets::{Kept, ListeningSockets},
    telemetry::log::chain,
};

/// The namespaces in which this agent captures.
#[derive(Debug)]
pub struct CaptureNamespaces {
    outbound: Arc<Outbound>,
    port: u16,
    sockets: ListeningSockets,
    open: Mutex<BTreeMap<Place, OpenNamespace>>,
}

/// Which namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The one that the agent runs in.
    Host,
    /// The one that a file refers to.
    File(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

#[derive(Debug)]
struct OpenNamespace {
    /// Device and inode of the namespace: a file of the same name may come to mean another.
    identity: (u64, u64),
    cookie: NetnsCookie,
    closed: CancellationToken,
    _kept: Vec<Kept>,
}

/// A namespace that cannot be captured in.
#[derive(Debug, thiserror::Error)]
pub enum CaptureListenError {
    /// It cannot be opened or entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// Its capture port cannot be opened.
    #[error("open the capture port {port} on loopback")]
    Listen {
        /// `capture.port`.
        port: u16,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The datapath did not take it.
    #[error("enrol the namespace")]
    Enrol(#[source] DatapathError),
}

impl CaptureNamespaces {
    /// Nothing is open yet; see [`Self::open_host`] and [`Self::follow`].
    pub fn new(outbound: Arc<Outbound>, port: u16, sockets: ListeningSockets) -> Self {
        Self {
            outbound,
            port,
            sockets,
            open: Mutex::default(),
        }
    }

    /// Opens the host's namespace, without which nothing on the host can be captured.
    ///
    /// # Errors
    /// If it cannot be opened or enrolled.
    pub fn open_host(&self) -> Result<(), CaptureListenError> {
        let netns = Netns::current()?;
        self.start(Place::Host, &netns)
    }

    /// Opens and closes namespaces to match the files that workload rules name.
    ///
    /// A file that is missing or cannot be opened is tried again at the next call. Returns the cookies by
    /// file, for the workload rules, whether or not they changed.
    pub fn follow(&self, files: &BTreeSet<PathBuf>) -> BTreeMap<PathBuf, NetnsCookie> {
        let mut present = BTreeMap::new();
        for file in files {
            match Netns::open(file).and_then(|netns| Ok((netns.identity()?, netns))) {
                Ok((identity, netns)) => {
                    present.insert(Place::File(file.clone()), (identity, netns));
                }
                Err(error) => {
                    tracing::debug!(netns = %file.display(), error = %chain(&error), "namespace away");
                }
            }
        }
        self.close_unless(|place, open| match place {
            Place::Host => true,
            Place::File(_) => present
                .get(place)
                .is_some_and(|(id, _)| *id == open.identity),
        });
        for (place, (_, netns)) in &present {
            if self.open.lock().contains_key(place) {
                continue;
            }
            if let Err(error) = self.start(place.clone(), netns) {
                tracing::error!(%place, error = %chain(&error), "namespace not captured");
            }
        }
        self.cookies()
    }

    /// The namespaces captured in, and their cookies.
    pub fn list(&self) -> Vec<(Place, NetnsCookie)> {
        self.open
            .lock()
            .iter()
            .map(|(place, open)| (place.clone(), open.cookie))
            .collect()
    }

    fn cookies(&self) -> BTreeMap<PathBuf, NetnsCookie> {
        let file = |(place, cookie)| match place {
            Place::Host => None,
            Place::File(path) => Some((path, cookie)),
        };
        self.list().into_iter().filter_map(file).collect()
    }

    fn close_unless(&self, keep: impl Fn(&Place, &OpenNamespace) -> bool) {
        self.open.lock().retain(|place, open| {
            let keep = keep(place, open);
            if !keep {
                // The programs stop rewriting to it before its listener goes.
                if let Err(error) = self.outbound.datapath.dismiss_netns(open.cookie) {
                    tracing::warn!(%place, error = %chain(&error), "namespace not dismissed");
                }
                if let Some(queries) = &self.outbound.queries {
                    queries.close(open.cookie);
                }
                open.closed.cancel();
                tracing::info!(%place, "stopped capturing in namespace");
            }
            keep
        });
    }

    fn start(&self, place: Place, netns: &Netns) -> Result<(), CaptureListenError> {
        let port = self.port;
        let failed = |source| CaptureListenError::Listen { port, source };
        let listeners = listener::listen(netns, port, &self.sockets).map_err(failed)?;
        let (identity, cookie) = (netns.identity()?, netns.cookie()?);
        let datapath = &self.outbound.datapath;
        datapath
            .enrol_netns(cookie, netns, &listeners)
            .map_err(CaptureListenError::Enrol)?;
        let CaptureListeners { v4, v6, kept } = listeners;
        let closed = CancellationToken::new();
        if let Some(queries) = &self.outbound.queries
            && let Err(error) = queries.open(netns, cookie, port, closed.clone())
        {
            tracing::error!(%place, error = %chain(&error), "DNS queries in datagrams are not captured");
        }
        for listener in std::iter::once(v4).chain(v6) {
            let shutdown = &self.outbound.shutdown;
            let acceptor = Acceptor::new(listener, shutdown.workers().in_turn()).map_err(failed)?;
            let runtime = acceptor.runtime().clone();
            let (outbound, closed) = (Arc::clone(&self.outbound), closed.clone());
            shutdown.spawn_on(&runtime, "capture listener", async move {
                tokio::select! {
                    () = closed.cancelled() => {}
                    () = outbound.serve(acceptor, Capture) => {}
                }
            });
        }
        tracing::info!(%place, %cookie, port, "capturing in namespace");
        self.open.lock().insert(
            place,
            OpenNamespace {
                identity,
                cookie,
                closed,
                _kept: kept,
            },
        );
        Ok(())
    }
}
