//! One direction of a relay: read, write, flush, and pass the end of the stream on.
//!
//! A way holds at most one buffer or pipe and reads again only when that has been written, which is all the
//! back-pressure there is. [`super::relay`] joins two of them.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

use tokio::io::{AsyncWrite, ReadBuf};

use super::{
    Endpoint,
    buffer::{Buffer, Size},
    pipe::Pipe,
};
use crate::workers::give_way;

/// Bytes that one way moves before other tasks get their turn, looked at whenever a buffer is written: a large one alone is
/// more.
const BUDGET_BYTES: usize = 128 << 10;

/// Buffers that may still go when a connection is aborted.
const LAST_BUFFERS: usize = 32;

/// Which side of a way failed.
#[derive(Debug)]
pub(super) enum Broken {
    Reader(io::Error),
    Writer(io::Error),
}

/// Where a way stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WayState {
    /// Waits for the reader.
    Reading,
    /// Waits for the writer to take what has been read.
    Writing,
    /// The reader has ended; the writer is being told.
    Ending,
    /// The writer knows that nothing more comes.
    Done,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Way<'a> {
    count: &'a AtomicU64,
    /// There from the first byte read until the last byte written.
    held: Option<Held>,
    state: WayState,
    /// The reader has said that nothing more comes.
    ended: bool,
    /// The writer may keep bytes back until it is flushed.
    unflushed: bool,
    moved: bool,
    size: Size,
}

/// Bytes that are read and not written yet.
#[derive(Debug)]
enum Held {
    Copied {
        buffer: Buffer,
        written: usize,
        filled: usize,
    },
    /// Between two plain sockets.
    Piped(Pipe),
}

impl Held {
    fn is_empty(&self) -> bool {
        match self {
            Self::Copied {
                written, filled, ..
            } => written >= filled,
            Self::Piped(pipe) => pipe.filled() == 0,
        }
    }

    /// Writes some of it.
    fn poll_write<W: Endpoint>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Copied {
                buffer,
                written,
                filled,
            } => {
                let rest = buffer.as_slice().get(*written..*filled);
                let poll = Pin::new(writer).poll_write(cx, rest.unwrap_or_default());
                if let Poll::Ready(Ok(bytes)) = poll {
                    *written += bytes;
                }
                poll
            }
            Self::Piped(pipe) => match writer.plain() {
                Some(socket) => pipe.poll_drain(cx, socket),
                // It was plain when the bytes were taken.
                None => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
            },
        }
    }
}

/// What one attempt to read brought.
enum Fill {
    /// Bytes, and perhaps the news of what follows them.
    Bytes(Option<Broken>),
    /// No byte yet.
    Nothing,
    /// No byte any more.
    End,
}

impl<'a> Way<'a> {
    pub(super) fn new(count: &'a AtomicU64) -> Self {
        Self {
            count,
            held: None,
            state: WayState::Reading,
            ended: false,
            unflushed: false,
            moved: false,
            size: Size::default(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == WayState::Done
    }

    pub(super) fn state(&self) -> WayState {
        self.state
    }

    #[cfg(test)]
    pub(super) fn holds_buffer(&self) -> bool {
        self.held.is_some()
    }

    /// Whether bytes have moved since the last call.
    pub(super) fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// Moves what can be moved now and registers for more.
    pub(super) fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
    ) -> Result<(), Broken>
    where
        R: Endpoint,
        W: Endpoint,
    {
        let mut budget = BUDGET_BYTES;
        loop {
            match self.state {
                WayState::Done => return Ok(()),
                WayState::Ending => return self.poll_end(cx, writer),
                WayState::Writing => {
                    let Poll::Ready(written) = self.poll_write(cx, writer)? else {
                        return Ok(());
                    };
                    if self.ended {
                        self.state = WayState::Ending;
                        continue;
                    }
                    self.state = WayState::Reading;
                    budget = budget.saturating_sub(written);
                    if budget == 0 {
                        give_way(cx);
                        return Ok(());
                    }
                }
                WayState::Reading => match self.fill(cx, reader, writer)? {
                    Fill::Nothing => return self.poll_flush(cx, writer),
                    Fill::End => self.state = WayState::Ending,
                    Fill::Bytes(None) => self.state = WayState::Writing,
                    Fill::Bytes(Some(broken)) => {
                        // What came before the failure goes on, if it can go at once.
                        let _blocked = self.poll_write(cx, writer)?;
                        let _blocked = self.poll_flush(cx, writer);
                        return Err(broken);
                    }
                },
            }
        }
    }

    /// Moves what can be moved at once, before the connection is aborted. No end of stream is passed on.
    pub(super) fn last_words<R, W>(&mut self, cx: &mut Context<'_>, reader: &mut R, writer: &mut W)
    where
        R: Endpoint,
        W: Endpoint,
    {
        for _ in 0..LAST_BUFFERS {
            if self.state == WayState::Reading {
                match self.fill(cx, reader, writer) {
                    Ok(Fill::Bytes(_)) => self.state = WayState::Writing,
                    Ok(Fill::Nothing | Fill::End) | Err(_) => break,
                }
            }
            if self.state != WayState::Writing
                || !matches!(self.poll_write(cx, writer), Ok(Poll::Ready(_)))
            {
                break;
            }
            self.state = WayState::Reading;
        }
        // A failure changes nothing any more: the connection is on its way out.
        let _failed = self.poll_flush(cx, writer);
    }

    /// Takes what the reader has: without a copy if much comes, and neither side seals or opens it.
    fn fill<R: Endpoint, W: Endpoint>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &W,
    ) -> Result<Fill, Broken> {
        if self.size == Size::Large
            && let (Some(socket), Some(_)) = (reader.plain(), writer.plain())
            && let Some(mut pipe) = Pipe::take()
        {
            match pipe.poll_fill(cx, socket) {
                Poll::Pending => return Ok(Fill::Nothing),
                // Nothing more, the end, or what a pipe does not take.
                Poll::Ready(Ok(0)) => {}
                Poll::Ready(Ok(filled)) => {
                    self.adapt(filled, Size::Large.bytes());
                    self.held = Some(Held::Piped(pipe));
                    return Ok(Fill::Bytes(None));
                }
                Poll::Ready(Err(error)) => return Err(Broken::Reader(error)),
            }
        }
        self.fill_buffer(cx, reader)
    }

    /// Reads until the buffer is full or the reader has nothing more at once, so that a writer that
    /// seals records gets whole ones.
    fn fill_buffer<R: Endpoint>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
    ) -> Result<Fill, Broken> {
        let mut buffer = Buffer::take(self.size);
        let capacity = buffer.as_slice().len();
        let mut into = ReadBuf::new(buffer.as_mut_slice());
        let mut failure = None;
        while into.remaining() > 0 {
            let before = into.filled().len();
            match Pin::new(&mut *reader).poll_read(cx, &mut into) {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if into.filled().len() > before => {}
                Poll::Ready(Ok(())) => {
                    self.ended = true;
                    break;
                }
                Poll::Ready(Err(error)) => {
                    failure = Some(Broken::Reader(error));
                    break;
                }
            }
        }
        let filled = into.filled().len();
        if filled > 0 {
            self.adapt(filled, capacity);
            self.held = Some(Held::Copied {
                buffer,
                written: 0,
                filled,
            });
            return Ok(Fill::Bytes(failure));
        }
        match failure {
            Some(failure) => Err(failure),
            None if self.ended => Ok(Fill::End),
            None => Ok(Fill::Nothing),
        }
    }

    /// A full buffer asks for a larger one, a nearly empty one for a smaller.
    fn adapt(&mut self, filled: usize, capacity: usize) {
        if filled == capacity {
            self.size = self.size.larger();
        } else if filled < capacity / 8 {
            self.size = self.size.smaller();
        }
    }

    /// Writes what is held; ready with the bytes of this call when nothing is left.
    fn poll_write<W: Endpoint>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Result<Poll<usize>, Broken> {
        let mut total = 0;
        while let Some(held) = &mut self.held {
            if held.is_empty() {
                self.held = None;
                break;
            }
            match held.poll_write(cx, writer) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Ok(0)) => {
                    return Err(Broken::Writer(io::ErrorKind::WriteZero.into()));
                }
                Poll::Ready(Ok(bytes)) => {
                    total += bytes;
                    self.unflushed = true;
                    self.moved = true;
                    self.count
                        .fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
                }
                Poll::Ready(Err(error)) => return Err(Broken::Writer(error)),
            }
        }
        Ok(Poll::Ready(total))
    }

    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Result<(), Broken> {
        if !self.unflushed {
            return Ok(());
        }
        match Pin::new(writer).poll_flush(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                self.unflushed = false;
                Ok(())
            }
            Poll::Ready(Err(error)) => Err(Broken::Writer(error)),
        }
    }

    fn poll_end<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Result<(), Broken> {
        match Pin::new(writer).poll_shutdown(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                self.state = WayState::Done;
                Ok(())
            }
            Poll::Ready(Err(error)) => Err(Broken::Writer(error)),
        }
    }
}
