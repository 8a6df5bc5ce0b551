//! The access log: one line per connection, in `key=value` or JSON, that never holds a connection up.
//!
//! A line goes through a bounded queue to a thread of its own. While the destination takes nothing the
//! queue fills, and what does not fit is dropped and counted: the data path does not wait for a disk.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    time::Duration,
};

use super::{log::chain, metrics::DroppedLines, rate::OncePer};

mod line;

pub(crate) use line::milliseconds;
pub use line::{Entry, Line, LineFormat, Pairs};

/// Lines that wait at most: about 4 MiB, and half a second of 20,000 connections per second.
const QUEUE_LINES: usize = 10_000;

/// Lines that one write takes.
const BATCH_LINES: u64 = 256;

/// How long the thread sleeps after it was woken, before it writes. Senders find nobody to wake meanwhile, so that many
/// lines cost one wake-up and one write together.
const GATHER: Duration = Duration::from_millis(10);

static FAILURE_LOG: OncePer = OncePer::new(Duration::from_mins(1));

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Destination {
    /// Nowhere.
    #[default]
    Off,
    /// Standard output.
    Stdout,
    /// Appended to a file.
    File(PathBuf),
}

/// Why there is no access log.
#[derive(Debug, thiserror::Error)]
pub enum AccessLogError {
    /// The file cannot be opened for appending.
    #[error("access log {} cannot be opened for appending", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No thread for it.
    #[error("the access log's thread cannot be started")]
    Thread(#[source] io::Error),
}

/// The running access log. Lines that are queued when it is dropped are still written, but not waited
/// for: see [`AccessLog::flush`].
#[derive(Debug)]
pub struct AccessLog {
    queue: Option<Queue>,
    format: LineFormat,
    dropped: DroppedLines,
}

#[derive(Debug)]
struct Queue {
    sender: SyncSender<Message>,
    reopen: Arc<AtomicBool>,
}

enum Message {
    Line(String),
    /// Only wakes the thread: a reopen must get through when the queue is full, so it is a flag.
    Reopen,
    Flush(SyncSender<()>),
}

impl AccessLog {
    /// Starts the log.
    ///
    /// # Errors
    /// [`AccessLogError::Open`] if the file cannot be opened, [`AccessLogError::Thread`] without a thread.
    pub fn start(
        destination: &Destination,
        format: LineFormat,
        dropped: DroppedLines,
    ) -> Result<Self, AccessLogError> {
        let output: Box<dyn Output> = match destination {
            Destination::Off => return Ok(Self::off()),
            Destination::Stdout => Box::new(Stdout),
            Destination::File(path) => Box::new(LogFile::open(path.clone())?),
        };
        Self::start_with(output, format, dropped, GATHER)
    }

    /// A log that writes nothing.
    pub fn off() -> Self {
        Self {
            queue: None,
            format: LineFormat::Text,
            dropped: DroppedLines::default(),
        }
    }

    fn start_with(
        output: Box<dyn Output>,
        format: LineFormat,
        dropped: DroppedLines,
        gather: Duration,
    ) -> Result<Self, AccessLogError> {
        let (sender, receiver) = mpsc::sync_channel(QUEUE_LINES);
        let reopen = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            receiver,
            output,
            reopen: Arc::clone(&reopen),
            dropped: dropped.clone(),
            gather,
        };
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || writer.run())
            .map_err(AccessLogError::Thread)?;
        Ok(Self {
            queue: Some(Queue { sender, reopen }),
            format,
            dropped,
        })
    }

    /// Queues a line; `line` is not called if the log is off.
    pub fn write<E: Entry>(&self, line: impl FnOnce() -> E) {
        let Some(queue) = &self.queue else { return };
        let text = line().format(self.format);
        match queue.sender.try_send(Message::Line(text)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.dropped.queue_full(),
        }
    }

    /// Opens the file anew before the next line, after it was rotated away.
    pub fn reopen(&self) {
        if let Some(queue) = &self.queue {
            queue.reopen.store(true, Ordering::Release);
            // A full queue needs no waking.
            let _full = queue.sender.try_send(Message::Reopen);
        }
    }

    /// Waits until what is queued now is written. Blocks the thread: for the end of the process.
    ///
    /// Returns whether that happened within `patience`.
    pub fn flush(&self, patience: Duration) -> bool {
        let Some(queue) = &self.queue else {
            return true;
        };
        let (done, written) = mpsc::sync_channel(1);
        // A full queue has a destination that takes nothing; there is no point in waiting for it.
        queue.sender.try_send(Message::Flush(done)).is_ok()
            && written.recv_timeout(patience).is_ok()
    }
}

/// The thread's side.
struct Writer {
    receiver: Receiver<Message>,
    output: Box<dyn Output>,
    reopen: Arc<AtomicBool>,
    dropped: DroppedLines,
    gather: Duration,
}

impl Writer {
    #[expect(
        clippy::disallowed_methods,
        reason = "it sleeps on a thread of its own"
    )]
    fn run(mut self) {
        let mut batch = String::new();
        let mut lines = 0;
        while let Ok(first) = self.receiver.recv() {
            // After a full batch there is more already.
            if matches!(first, Message::Line(_)) && lines < BATCH_LINES {
                std::thread::sleep(self.gather);
            }
            batch.clear();
            lines = 0;
            let mut waiting = None;
            let mut next = Some(first);
            while let Some(message) = next.take() {
                match message {
                    Message::Line(line) => {
                        batch.push_str(&line);
                        lines += 1;
                    }
                    Message::Reopen => {}
                    Message::Flush(done) => {
                        waiting = Some(done);
                        break;
                    }
                }
                if lines < BATCH_LINES {
                    next = self.receiver.try_recv().ok();
                }
            }
            self.write(&batch, lines);
            if let Some(done) = waiting {
                // Nobody waits any more if the patience ran out.
                let _gone = done.try_send(());
            }
        }
    }

    fn write(&mut self, batch: &str, lines: u64) {
        let result = if self.reopen.swap(false, Ordering::Acquire) {
            self.output.reopen()
        } else {
            Ok(())
        };
        if let Err(error) = result.and_then(|()| self.output.write(batch.as_bytes())) {
            self.dropped.write_failed(lines);
            if let Some(suppressed) = FAILURE_LOG.pass("") {
                tracing::error!(
                    error = %chain(&error),
                    suppressed,
                    "access log could not be written"
                );
            }
        }
    }
}

trait Output: Send {
    fn write(&mut self, lines: &[u8]) -> io::Result<()>;
    fn reopen(&mut self) -> io::Result<()>;
}

struct Stdout;

impl Output for Stdout {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(lines)?;
        stdout.flush()
    }

    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    fn open(path: PathBuf) -> Result<Self, AccessLogError> {
        match append_to(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(AccessLogError::Open { path, source }),
        }
    }
}

impl Output for LogFile {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.write_all(lines)
    }

    /// If the new file cannot be opened the old one goes on: a rotated line is better than none.
    fn reopen(&mut self) -> io::Result<()> {
        match append_to(&self.path) {
            Ok(file) => self.file = file,
            Err(error) => tracing::error!(
                path = %self.path.display(),
                error = %chain(&error),
                "access log could not be reopened; the old file is kept"
            ),
        }
        Ok(())
    }
}

fn append_to(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests;
