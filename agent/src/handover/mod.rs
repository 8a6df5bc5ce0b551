//! Replacing a running agent by another, of the same or a newer build, without losing a connection.
//!
//! ```text
//! next agent                              running agent
//!     TakeOver            ->              still serves
//!                         <-              Sockets: its listening sockets and the lock of its pins
//!   starts; both serve
//!     Ready               ->              takes nothing new
//!                         <-              Retiring
//!   serves alone          <-              Draining: how many connections it still carries, until it ends
//! ```
//!
//! Listening sockets are shared, so their queues lose nothing; programs are replaced behind pinned links. If the
//! next agent ends before it says `Ready`, the running one goes on as if nothing had happened. Messages are JSON,
//! so that builds of different ages understand each other; see [`Message`].

mod channel;

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use self::channel::{Channel, ChannelListener, DESCRIPTORS_MAX};
use crate::{socket_file::SocketFile, sockets::ListeningSockets, telemetry::log::chain};

/// For one answer of the other agent.
const ANSWER: Duration = Duration::from_secs(10);

/// For the next agent's start, from its first message to `Ready`.
const START: Duration = Duration::from_secs(60);

/// Nobody but root may take over.
const MODE: u32 = 0o600;

/// What agents say to each other. Unknown fields are ignored, unknown messages end the handover.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
enum Message {
    /// The next agent asks.
    TakeOver {
        /// Its version.
        version: String,
    },
    /// Descriptors: first the lock of the pins, if there are any, then listening sockets.
    Sockets {
        /// Whether the first descriptor is the lock.
        has_lock: bool,
        /// Whether another such message follows.
        more: bool,
    },
    /// The next agent serves.
    Ready,
    /// The running agent takes nothing new any more.
    Retiring,
    /// The running agent drains.
    Draining {
        /// Connections that it still carries.
        connections: usize,
    },
}

/// The handover did not happen.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The socket cannot be used.
    #[error("{doing} the handover socket {}", path.display())]
    Socket {
        /// What was tried.
        doing: &'static str,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The connection between the agents broke.
    #[error("talk to the other agent")]
    Talk(#[source] io::Error),
    /// It went away.
    #[error("the other agent ended")]
    Ended,
    /// It did not answer in time.
    #[error("the other agent did not answer within {} s", limit.as_secs())]
    Silent {
        /// How long was waited.
        limit: Duration,
    },
    /// It said something else than it should.
    #[error("the other agent said {said}, expected {expected}")]
    Unexpected {
        /// What it said.
        said: String,
        /// What was expected.
        expected: &'static str,
    },
    /// Somebody else than root asks.
    #[error("process {process} of user {user} asked to take over: only root may")]
    Forbidden {
        /// Its process id.
        process: u32,
        /// Its user id.
        user: u32,
    },
}

impl HandoverError {
    fn socket(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Socket {
            doing,
            path,
            source,
        }
    }

    fn unexpected(said: &Message, expected: &'static str) -> Self {
        Self::Unexpected {
            said: format!("{said:?}"),
            expected,
        }
    }
}

/// Where an agent with this admin socket is asked to hand over.
pub fn socket_path(admin_socket: &Path) -> PathBuf {
    let mut path = admin_socket.as_os_str().to_owned();
    path.push(".handover");
    path.into()
}

/// What the agent before gave.
#[derive(Debug, Default)]
pub struct Inheritance {
    /// Whether a running agent gave it, and not systemd for one that is gone.
    pub takes_over: bool,
    /// Its listening sockets.
    pub sockets: Vec<OwnedFd>,
    /// The lock of its pins.
    pub pin_lock: Option<OwnedFd>,
}

/// The running agent, as the next one sees it.
#[derive(Debug)]
pub struct Predecessor {
    channel: Channel,
    /// Its process id.
    pub process: u32,
}

impl Predecessor {
    /// Asks the agent that listens at `path` for what it has; `None` if none does.
    ///
    /// # Errors
    /// [`HandoverError`]; the running agent goes on then.
    pub async fn ask(path: &Path) -> Result<Option<(Self, Inheritance)>, HandoverError> {
        let channel = match Channel::connect(path) {
            Ok(channel) => channel,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(HandoverError::socket("connect to", path)(error)),
        };
        let (process, _user) = channel
            .peer()
            .map_err(HandoverError::socket("look at", path))?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        send(&channel, &Message::TakeOver { version }, &[]).await?;
        let mut inheritance = Inheritance {
            takes_over: true,
            ..Inheritance::default()
        };
        loop {
            let (message, descriptors) = receive(&channel, ANSWER).await?;
            let Message::Sockets { has_lock, more } = message else {
                return Err(HandoverError::unexpected(&message, "its sockets"));
            };
            let mut descriptors = descriptors.into_iter();
            if has_lock {
                inheritance.pin_lock = descriptors.next();
            }
            inheritance.sockets.extend(descriptors);
            if !more {
                return Ok(Some((Self { channel, process }, inheritance)));
            }
        }
    }

    /// Tells it that this agent serves, and waits until it takes nothing new any more.
    ///
    /// # Errors
    /// If it does not confirm; it may have ended, and this agent serves in any case.
    pub async fn retire(&self) -> Result<(), HandoverError> {
        send(&self.channel, &Message::Ready, &[]).await?;
        match receive(&self.channel, ANSWER).await? {
            (Message::Retiring, _) => Ok(()),
            (other, _) => Err(HandoverError::unexpected(&other, "that it retires")),
        }
    }

    /// How many connections it still carries, when it says so next; `None` once it has ended.
    pub async fn draining(&self) -> Option<usize> {
        loop {
            match self.channel.receive().await {
                Ok(Some((bytes, _))) => match serde_json::from_slice(&bytes) {
                    Ok(Message::Draining { connections }) => return Some(connections),
                    other => tracing::debug!(?other, "unexpected word of the agent before"),
                },
                Ok(None) | Err(_) => return None,
            }
        }
    }
}

/// Where the running agent waits for the next one. The socket is removed when it is dropped.
#[derive(Debug)]
pub struct HandoverServer {
    listener: ChannelListener,
    _file: SocketFile,
}

/// The next agent, which serves already.
#[derive(Debug)]
pub struct Successor {
    channel: Channel,
    /// Its process id.
    pub process: u32,
}

impl HandoverServer {
    /// Listens at `path`, in the place of whoever did before.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self, HandoverError> {
        let (listener, file) = SocketFile::put(path, MODE, ChannelListener::bind)
            .map_err(HandoverError::socket("make", path))?;
        Ok(Self {
            listener,
            _file: file,
        })
    }

    /// Waits for the next agent, gives it what it needs, and resolves when it serves. One that fails changes
    /// nothing. Cancel-safe.
    pub async fn next_agent(
        &self,
        sockets: &ListeningSockets,
        pin_lock: Option<BorrowedFd<'_>>,
    ) -> Successor {
        loop {
            let attempt = async {
                let channel = self.listener.accept().await.map_err(HandoverError::Talk)?;
                give(channel, sockets, pin_lock).await
            };
            match attempt.await {
                Ok(successor) => return successor,
                Err(error) => {
                    tracing::error!(error = %chain(&error), "not handed over: this agent goes on");
                    // Out of descriptors, accept fails at once and again.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn give(
    channel: Channel,
    sockets: &ListeningSockets,
    pin_lock: Option<BorrowedFd<'_>>,
) -> Result<Successor, HandoverError> {
    let (process, user) = channel.peer().map_err(HandoverError::Talk)?;
    if user != 0 {
        return Err(HandoverError::Forbidden { process, user });
    }
    match receive(&channel, ANSWER).await? {
        (Message::TakeOver { version }, _) => {
            tracing::info!(process, version, "another agent asks to take over");
        }
        (other, _) => return Err(HandoverError::unexpected(&other, "that it takes over")),
    }
    let listening = sockets.descriptors().map_err(HandoverError::Talk)?;
    let all: Vec<BorrowedFd<'_>> = pin_lock
        .into_iter()
        .chain(listening.iter().map(|socket| socket.as_fd()))
        .collect();
    let mut parts = all.chunks(DESCRIPTORS_MAX).peekable();
    let mut has_lock = pin_lock.is_some();
    loop {
        let part = parts.next().unwrap_or_default();
        let more = parts.peek().is_some();
        send(&channel, &Message::Sockets { has_lock, more }, part).await?;
        has_lock = false;
        if !more {
            break;
        }
    }
    match receive(&channel, START).await? {
        (Message::Ready, _) => Ok(Successor { channel, process }),
        (other, _) => Err(HandoverError::unexpected(&other, "that it serves")),
    }
}

impl Successor {
    /// Tells it that this agent takes nothing new any more.
    pub async fn confirm(&self) {
        self.tell(&Message::Retiring).await;
    }

    /// Tells it how many connections this agent still carries.
    pub async fn report(&self, connections: usize) {
        self.tell(&Message::Draining { connections }).await;
    }

    /// If it is gone, this agent drains all the same.
    async fn tell(&self, message: &Message) {
        if let Err(error) = send(&self.channel, message, &[]).await {
            tracing::debug!(error = %chain(&error), "the next agent was not told");
        }
    }
}

async fn send(
    channel: &Channel,
    message: &Message,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), HandoverError> {
    let bytes = serde_json::to_vec(message).map_err(|error| HandoverError::Talk(error.into()))?;
    timeout(ANSWER, channel.send(&bytes, descriptors))
        .await
        .map_err(|_elapsed| HandoverError::Silent { limit: ANSWER })?
        .map_err(HandoverError::Talk)
}

async fn receive(
    channel: &Channel,
    limit: Duration,
) -> Result<(Message, Vec<OwnedFd>), HandoverError> {
    let (bytes, descriptors) = timeout(limit, channel.receive())
        .await
        .map_err(|_elapsed| HandoverError::Silent { limit })?
        .map_err(HandoverError::Talk)?
        .ok_or(HandoverError::Ended)?;
    let message =
        serde_json::from_slice(&bytes).map_err(|error| HandoverError::Talk(error.into()))?;
    Ok((message, descriptors))
}

#[cfg(test)]
mod tests;
