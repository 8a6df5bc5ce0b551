//! Talking to Consul: its HTTP API, as a client that waits, doubts and never gives up.
//!
//! [`client`] makes one request, [`watch`] follows an answer as it changes by blocking queries, [`judge`] tells an
//! answer from the look of one, [`answers`] has the types of what is read. What the answers mean for the catalog is in
//! [`crate::catalog::consul`].

pub mod client;
pub mod connection;
pub mod error;
pub mod judge;
pub mod position;
pub mod rights;
pub mod upstreams;
pub mod watch;
pub mod answers;
pub mod registration;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf};

pub use client::{Answer, Client, Request};
pub use error::ConsulError;
pub use watch::{Event, Watch, WatchSettings};

/// How to reach Consul, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientSettings {
    /// Where.
    pub address: ConsulAddress,
    /// Holds the ACL token and nothing else. Read before each request, so that a new token counts at once.
    pub token_file: Option<PathBuf>,
    /// Needed with [`ConsulAddress::Https`].
    pub tls: Option<TlsSettings>,
    /// Sent as `ns`; only Consul Enterprise takes one.
    pub namespace: Option<String>,
    /// Sent as `partition`; only Consul Enterprise takes one.
    pub partition: Option<String>,
    /// Sent as `dc`; the agent's own if it is not set.
    pub datacenter: Option<String>,
}

impl ClientSettings {
    /// Without a token, at `address`.
    pub fn anonymous(address: ConsulAddress) -> Self {
        Self {
            address,
            token_file: None,
            tls: None,
            namespace: None,
            partition: None,
            datacenter: None,
        }
    }
}

/// Where Consul's HTTP API is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsulAddress {
    /// `http://host:port`
    Http {
        /// A name or an address, the latter without brackets.
        host: String,
        /// Consul's `ports.http`.
        port: u16,
    },
    /// `https://host:port`
    Https {
        /// A name or an address, the latter without brackets.
        host: String,
        /// Consul's `ports.https`.
        port: u16,
    },
    /// Consul's `addresses.http = "unix://..."`
    Unix(PathBuf),
}

impl fmt::Display for ConsulAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Http { host, port } => ("http", host, port),
            Self::Https { host, port } => ("https", host, port),
            Self::Unix(path) => return write!(f, "unix://{}", path.display()),
        };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

/// Files and names for TLS. The files are read again for each new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// PEM: the certificates of the authorities that may have signed Consul's.
    pub ca_file: PathBuf,
    /// To show to a Consul with `verify_incoming`.
    pub client_certificate: Option<ClientCertificate>,
    /// The name in Consul's certificate, for example `server.dc1.consul`; the address's host if it is not set.
    pub server_name: Option<String>,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// PEM: the certificate, and what lies between it and its root.
    pub certificate: PathBuf,
    /// PEM: the key.
    pub key: PathBuf,
}
