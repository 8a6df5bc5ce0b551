//! What can go wrong between the agent and Consul.

use std::{io, path::PathBuf, time::Duration};

use hyper::StatusCode;

use super::ConsulAddress;

/// A request that brought no answer to use. Says what was tried where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConsulError {
    /// No connection.
    #[error("connect to Consul at {address}: is it running, and is this consul.address?")]
    Connect {
        /// Where.
        address: ConsulAddress,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file for TLS cannot be used.
    #[error("{}: {key} cannot be used", path.display())]
    TlsFile {
        /// The key of the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An https address without its settings, or a name that is none.
    #[error("{0}")]
    TlsSettings(&'static str),
    /// The token cannot be read, and never could.
    #[error("{}: consul.token_file cannot be used", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("{request} at {address}: no answer within {} s", limit.as_secs())]
    Timeout {
        /// Method and path.
        request: String,
        /// Where.
        address: ConsulAddress,
        /// How long was waited.
        limit: Duration,
    },
    /// The connection broke.
    #[error("{request} at {address}: the connection to Consul broke")]
    Exchange {
        /// Method and path.
        request: String,
        /// Where.
        address: ConsulAddress,
        /// How.
        #[source]
        source: hyper::Error,
    },
    /// The request cannot be made.
    #[error("{request} at {address} cannot be asked")]
    Request {
        /// Method and path.
        request: String,
        /// Where.
        address: ConsulAddress,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer did not come whole, or is larger than any answer is taken.
    #[error(
        "{request} at {address}: the answer could not be read, or is larger than {bytes_max} bytes"
    )]
    Body {
        /// Method and path.
        request: String,
        /// Where.
        address: ConsulAddress,
        /// The most that is taken.
        bytes_max: usize,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Consul says no.
    #[error("{request} at {address}: Consul answers {}: {text}{}", status.as_u16(), advice(*status, text))]
    Status {
        /// Method and path.
        request: String,
        /// Where.
        address: ConsulAddress,
        /// The status code.
        status: StatusCode,
        /// What it says: the first line, at most 256 characters.
        text: String,
    },
    /// The answer is not what this version of the agent understands.
    #[error("{request} at {address}: the answer is not understood; is this Consul's HTTP API?")]
    Decode {
        /// Method and path.
        request: String,
        /// Where.
        address: ConsulAddress,
        /// Which field.
        #[source]
        source: serde_path_to_error::Error<serde_json::Error>,
    },
}

impl ConsulError {
    /// Whether Consul refuses for lack of rights: the token is unknown to it, or may not do this.
    pub fn is_refused(&self) -> bool {
        matches!(
            self,
            Self::Status {
                status: StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED,
                ..
            }
        )
    }

    /// Whether there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Status {
                status: StatusCode::NOT_FOUND,
                ..
            }
        )
    }

    /// Whether the server is too old to know this kind of config entry. It says so with status 500.
    pub fn is_unknown_kind(&self) -> bool {
        matches!(self, Self::Status { text, .. } if text.contains("invalid config entry kind"))
    }
}

fn advice(status: StatusCode, text: &str) -> &'static str {
    if text.contains("ACL not found") {
        "; the token in consul.token_file is not known to Consul (any more)"
    } else if status == StatusCode::FORBIDDEN || status == StatusCode::UNAUTHORIZED {
        "; does the token in consul.token_file have the rights that the agent needs?"
    } else if text.contains("HTTP request to an HTTPS server") {
        "; consul.address must begin with https://"
    } else if status == StatusCode::TOO_MANY_REQUESTS {
        "; Consul limits connections per client with limits.http_max_conns_per_client"
    } else {
        ""
    }
}
