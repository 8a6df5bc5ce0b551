//! Pipes through which bytes go from one TCP socket to another without being copied (splice(2)).
//!
//! Borrowed while they hold bytes, as buffers are, and only once a transfer has proved to be bulk: two sockets and a pipe
//! cost as many system calls as a buffer does, and three descriptors more.

use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::{io::Interest, net::TcpStream};

/// What a pipe may hold. The kernel may give less to one without privileges; then more system calls move the same.
const CAPACITY: usize = 256 << 10;

/// How many there may be in the process: a stalled transfer keeps its pipe, and with it two descriptors.
const MOST: usize = 256;

/// How many a thread keeps: two directions of one connection are in hand at a time.
const KEPT: usize = 2;

static PIPES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHELF: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
}

/// A pipe that holds nothing, or is about to be closed.
#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Ends {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The usual size does as well.
        let _refused = fcntl_setpipe_size(&write, CAPACITY);
        Ok(Self { read, write })
    }
}

/// A borrowed pipe. Goes back to the thread that drops it if it is empty, else what it holds is lost.
#[derive(Debug)]
pub(super) struct Pipe {
    /// There until it is dropped.
    ends: Option<Ends>,
    filled: usize,
}

impl Pipe {
    /// An empty pipe; `None` if there are too many, or the kernel has none to give.
    pub(super) fn take() -> Option<Self> {
        let kept = SHELF.with_borrow_mut(Vec::pop);
        let ends = kept.or_else(Self::open)?;
        Some(Self {
            ends: Some(ends),
            filled: 0,
        })
    }

    fn open() -> Option<Ends> {
        let one_more = |count: usize| (count < MOST).then_some(count + 1);
        PIPES
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()?;
        let ends = Ends::new();
        if ends.is_err() {
            PIPES.fetch_sub(1, Ordering::Relaxed);
        }
        ends.ok()
    }

    /// How many bytes it holds.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Moves what `from` has, once, into the empty pipe; ready with the number of bytes, which is zero at the end of the
    /// stream.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        let Some(ends) = &self.ends else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        loop {
            ready!(from.poll_read_ready(cx))?;
            match from.try_io(Interest::READABLE, || {
                move_some(from, &ends.write, CAPACITY)
            }) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => {
                    self.filled += *moved.as_ref().unwrap_or(&0);
                    return Poll::Ready(moved);
                }
            }
        }
    }

    /// Moves to `into` what it takes, once; ready with the number of bytes.
    pub(super) fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        into: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        let Some(ends) = &self.ends else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        loop {
            ready!(into.poll_write_ready(cx))?;
            match into.try_io(Interest::WRITABLE, || {
                move_some(&ends.read, into, self.filled)
            }) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => {
                    self.filled -= *moved.as_ref().unwrap_or(&0);
                    return Poll::Ready(moved);
                }
            }
        }
    }

    /// How many this thread keeps.
    #[cfg(test)]
    pub(super) fn kept() -> usize {
        SHELF.with_borrow(Vec::len)
    }
}

fn move_some(
    from: impl std::os::fd::AsFd,
    into: impl std::os::fd::AsFd,
    most: usize,
) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(splice(from, None, into, None, most, flags)?)
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut ends = self.ends.take();
        if self.filled == 0 {
            // While a thread ends its shelf is gone already; the pipe is then closed.
            let _ended = SHELF.try_with(|shelf| {
                let mut shelf = shelf.borrow_mut();
                if shelf.len() < KEPT {
                    shelf.extend(ends.take());
                }
            });
        }
        if ends.is_some() {
            PIPES.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
