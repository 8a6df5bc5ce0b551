//! Asks a running agent, over its Unix socket.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// For the whole exchange. The agent answers from memory; it is slow only if it is in trouble.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer: 100,000 connections at 400 bytes, with room to spare.
const ANSWER_BYTES_MAX: usize = 128 << 20;

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("no agent answers on {}: is it running, and may you reach the socket?", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The exchange broke.
    #[error("the exchange with the agent failed")]
    Exchange(#[source] hyper::Error),
    /// The path is none.
    #[error("{path:?} cannot be asked for")]
    Path {
        /// What was given.
        path: String,
        /// Why.
        #[source]
        source: hyper::http::Error,
    },
    /// The answer did not come whole.
    #[error("the agent's answer could not be read")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It took too long.
    #[error("the agent did not answer within {} seconds", TIMEOUT.as_secs())]
    Timeout,
    /// The agent answers with an error.
    #[error("the agent answers {status}: {}", message.trim_end())]
    Refused {
        /// The status code.
        status: StatusCode,
        /// What it says.
        message: String,
    },
}

/// Gets `path` from the agent at `socket`.
///
/// # Errors
/// [`ClientError`]: one variant per step.
pub async fn get(socket: &Path, path: &str) -> Result<Bytes, ClientError> {
    ask(socket, Method::GET, path).await
}

/// Asks the agent at `socket` to do what `path` names.
///
/// # Errors
/// As [`get`].
pub async fn post(socket: &Path, path: &str) -> Result<Bytes, ClientError> {
    ask(socket, Method::POST, path).await
}

/// Asks the agent at `socket` to change what `path` names.
///
/// # Errors
/// As [`get`].
pub async fn put(socket: &Path, path: &str) -> Result<Bytes, ClientError> {
    ask(socket, Method::PUT, path).await
}

async fn ask(socket: &Path, method: Method, path: &str) -> Result<Bytes, ClientError> {
    tokio::time::timeout(TIMEOUT, exchange(socket, method, path))
        .await
        .unwrap_or(Err(ClientError::Timeout))
}

async fn exchange(socket: &Path, method: Method, path: &str) -> Result<Bytes, ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Connect {
            socket: socket.to_owned(),
            source,
        })?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "sidestep")
        .body(Empty::<Bytes>::new())
        .map_err(|source| ClientError::Path {
            path: path.to_owned(),
            source,
        })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(ClientError::Exchange)?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(ClientError::Exchange)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(ClientError::Answer)?
            .to_bytes();
        Ok((status, body))
    };
    let (status, body) = drive(answer, connection).await?;
    if status.is_success() {
        return Ok(body);
    }
    Err(ClientError::Refused {
        status,
        message: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// Runs the connection until the answer is there. The connection may end first and leave the answer
/// complete; what is wrong with it the answer tells too.
async fn drive<T>(
    answer: impl Future<Output = Result<T, ClientError>>,
    connection: impl Future<Output = Result<(), hyper::Error>>,
) -> Result<T, ClientError> {
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        biased; // an answer that is there counts, whatever becomes of the connection
        result = &mut answer => return result,
        ended = connection => {
            if let Err(error) = ended {
                tracing::debug!(
                    error = %crate::telemetry::log::chain(&error),
                    "connection to the agent failed"
                );
            }
        }
    }
    answer.await
}
