//! Serves the admin API. What it serves comes from a [`StatusSource`].

use std::{
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper::{Method, StatusCode, Uri};
use tokio::net::{UnixListener, UnixStream};

use super::status::{ConnectionStatus, IntentionStatus, Status, Upgrading};
use crate::{
    catalog::model::{NameError, ServiceName},
    socket_file::SocketFile,
    telemetry::{
        http::{self, Answer, answer, plain},
        log::{LogError, chain},
    },
};

/// Root and the socket's group.
const MODE: u32 = 0o660;

/// What the API says and does. Called on runtime threads: nothing here may block.
pub trait StatusSource: Send + Sync {
    /// The agent's state.
    fn status(&self) -> Status;

    /// The live connections.
    fn connections(&self) -> Vec<ConnectionStatus>;

    /// May `source` call `destination` by the intentions in force?
    fn decide(&self, source: &ServiceName, destination: &ServiceName) -> IntentionStatus;

    /// The metrics page.
    fn metrics(&self) -> String;

    /// Starts another agent that takes over from this one, out of the program file as it is now. Returns its
    /// process id.
    ///
    /// # Errors
    /// If it cannot be started; that it serves is seen by the status.
    fn upgrade(&self) -> io::Result<u32>;

    /// Changes what is logged.
    ///
    /// # Errors
    /// If the directives are not understood.
    fn set_log(&self, directives: &str) -> Result<(), LogError>;
}

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Another agent answers on the socket.
    #[error("admin socket {} is in use by a running agent", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket is in its place.
    #[error("admin socket {}: there is something else in its place", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("admin socket {} cannot be made", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What to do about an agent that answers on the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is another agent: leave it its socket.
    Refuse,
    /// It hands over to this one.
    Replace,
}

/// The API's listener. The socket is removed when it is dropped.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    socket: SocketFile,
}

impl AdminServer {
    /// Makes the socket, in the place of one that nobody answers on.
    ///
    /// # Errors
    /// [`AdminError`]: one variant per step.
    pub async fn bind(path: &Path, existing: Existing) -> Result<Self, AdminError> {
        if existing == Existing::Refuse {
            refuse_if_taken(path).await?;
        }
        let (listener, socket) = SocketFile::put(path, MODE, |path| UnixListener::bind(path))
            .map_err(|source| AdminError::Bind {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self { listener, socket })
    }

    /// Serves until `until` resolves. Requests in progress are dropped then.
    pub async fn serve(self, source: Arc<dyn StatusSource>, until: impl Future<Output = ()>) {
        let Self { listener, socket } = self;
        let respond = move |method: &Method, uri: &Uri| respond(&*source, method, uri);
        http::serve(listener, "admin", Arc::new(respond), until).await;
        drop(socket);
    }
}

fn respond(source: &dyn StatusSource, method: &Method, uri: &Uri) -> Answer {
    match (method, uri.path()) {
        (&Method::GET, "/status") => json(&source.status()),
        (&Method::GET, "/connections") => json(&source.connections()),
        (&Method::GET, "/intention") => decide(source, uri.query()),
        (&Method::GET, "/metrics") => http::metrics_page(source.metrics()),
        (&Method::PUT, "/log") => set_log(source, uri.query()),
        (&Method::POST, "/upgrade") => upgrade(source),
        (_, "/status" | "/connections" | "/intention" | "/metrics" | "/log" | "/upgrade") => {
            plain(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
        }
        _ => plain(
            StatusCode::NOT_FOUND,
            "there are GET /status, /connections, /intention?source=&destination=, /metrics, \
             PUT /log?level= and POST /upgrade\n",
        ),
    }
}

fn upgrade(source: &dyn StatusSource) -> Answer {
    match source.upgrade() {
        Ok(process) => json(&Upgrading { process }),
        Err(error) => plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("start the next agent: {}\n", chain(&error)),
        ),
    }
}

/// No character of a service's name needs percent-encoding.
fn decide(status: &dyn StatusSource, query: Option<&str>) -> Answer {
    let sides = query
        .and_then(|query| query.strip_prefix("source="))
        .and_then(|rest| rest.split_once("&destination="));
    let Some((source, destination)) = sides else {
        return plain(
            StatusCode::BAD_REQUEST,
            "expected GET /intention?source=SERVICE&destination=SERVICE\n",
        );
    };
    let names = source.parse().and_then(|source| {
        let destination = destination.parse()?;
        Ok((source, destination))
    });
    let names: Result<(ServiceName, ServiceName), NameError> = names;
    match names {
        Ok((source, destination)) => json(&status.decide(&source, &destination)),
        Err(error) => plain(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

/// `level` is taken as it stands: no character of a directive needs percent-encoding.
fn set_log(source: &dyn StatusSource, query: Option<&str>) -> Answer {
    let Some(level) = query.and_then(|query| query.strip_prefix("level=")) else {
        return plain(StatusCode::BAD_REQUEST, "expected PUT /log?level=LEVEL\n");
    };
    match source.set_log(level) {
        Ok(()) => plain(StatusCode::OK, "\n"),
        Err(error) => plain(StatusCode::BAD_REQUEST, format!("{}\n", chain(&error))),
    }
}

fn json(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(body) => answer(StatusCode::OK, "application/json", body),
        Err(error) => plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{}\n", chain(&error)),
        ),
    }
}

/// A socket that answers belongs to a running agent; one that does not was left by a killed one.
async fn refuse_if_taken(path: &Path) -> Result<(), AdminError> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(()); // not there; if it is out of reach the bind will say so
    };
    if !metadata.file_type().is_socket() {
        return Err(AdminError::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(AdminError::InUse {
            path: path.to_owned(),
        }),
        Err(source) => Err(AdminError::Bind {
            path: path.to_owned(),
            source,
        }),
    }
}

impl http::Accept for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

#[cfg(test)]
mod tests;
