//! Serves the admin API. What it serves comes from a [`StatusSource`].

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper::{Method, StatusCode, Uri};
use tokio::net::{UnixListener, UnixStream};

use super::status::{ConnectionStatus, Status};
use crate::telemetry::{
    http::{self, Answer, answer, plain},
    log::{LogError, chain},
};

/// Root and the socket's group.
const MODE: u32 = 0o660;

/// What the API says and does. Called on runtime threads: nothing here may block.
pub trait StatusSource: Send + Sync {
    /// The agent's state.
    fn status(&self) -> Status;

    /// The live connections.
    fn connections(&self) -> Vec<ConnectionStatus>;

    /// The metrics page.
    fn metrics(&self) -> String;

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
    /// The directory cannot be made.
    #[error("directory {} of the admin socket cannot be made", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
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
    pub async fn bind(path: &Path) -> Result<Self, AdminError> {
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            fs::create_dir_all(directory).map_err(|source| AdminError::Directory {
                path: directory.to_owned(),
                source,
            })?;
        }
        refuse_if_taken(path).await?;
        let bind_error = |source| AdminError::Bind {
            path: path.to_owned(),
            source,
        };
        // Made under another name, and moved when its mode is right: nobody connects in between.
        let unfinished = unfinished_name(path);
        remove_if_present(&unfinished).map_err(bind_error)?;
        let listener = UnixListener::bind(&unfinished).map_err(bind_error)?;
        let finished = fs::set_permissions(&unfinished, fs::Permissions::from_mode(MODE))
            .and_then(|()| fs::rename(&unfinished, path))
            .and_then(|()| SocketFile::of(path));
        let socket = match finished {
            Ok(socket) => socket,
            Err(error) => {
                // The first error is the one to report.
                let _left = remove_if_present(&unfinished);
                return Err(bind_error(error));
            }
        };
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
        (&Method::GET, "/metrics") => http::metrics_page(source.metrics()),
        (&Method::PUT, "/log") => set_log(source, uri.query()),
        (_, "/status" | "/connections" | "/metrics" | "/log") => {
            plain(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
        }
        _ => plain(
            StatusCode::NOT_FOUND,
            "there are GET /status, /connections, /metrics and PUT /log?level=\n",
        ),
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

fn unfinished_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The socket in the file system. Dropping removes it, if it is still the same.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity_of(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A newer agent may have put its own socket here.
        if identity_of(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(error = %chain(&error), "admin socket was not removed");
        }
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl http::Accept for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

#[cfg(test)]
mod tests;
