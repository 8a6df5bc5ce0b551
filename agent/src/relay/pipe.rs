//! Pipes through which bytes go from one TCP socket to another without being copied (splice(2)).
//!
//! Borrowed while they hold bytes, as buffers are, and only once a transfer has proved to be bulk: they cost a system call
//! or two more, and two descriptors. They only ever bring bytes. Whether the stream has ended or failed is said by recv(2)
//! alone: splice(2) does not go past urgent data, and takes what is left behind it for the end (Linux 6.18).

use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll, ready},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::{io::Interest, net::TcpStream};

use super::buffer::Size;

/// What a pipe may hold. The kernel may give less to one without privileges; then more system calls move the same.
const CAPACITY: usize = Size::Large.bytes();

/// How many there may be in the process: a stalled transfer keeps its pipe, and with it two descriptors.
pub(super) const MOST: usize = 256;

/// How many a thread keeps: two directions of one connection are in hand at a time.
const KEPT: usize = 2;

static PIPES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHELF: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, which holds nothing while it is kept.
#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    _counted: Counted,
}

impl Ends {
    fn new() -> io::Result<Self> {
        let counted = Counted::one_more().ok_or(io::ErrorKind::QuotaExceeded)?;
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The usual size does as well.
        let _refused = fcntl_setpipe_size(&write, CAPACITY);
        Ok(Self {
            read,
            write,
            _counted: counted,
        })
    }
}

/// One of [`MOST`].
#[derive(Debug)]
struct Counted;

impl Counted {
    fn one_more() -> Option<Self> {
        let one_more = |count: usize| (count < MOST).then_some(count + 1);
        let counted = PIPES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        counted.ok().map(|_before| Self)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
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
        let kept = SHELF.try_with(|shelf| shelf.borrow_mut().pop());
        let ends = kept.ok().flatten().or_else(|| Ends::new().ok())?;
        Some(Self {
            ends: Some(ends),
            filled: 0,
        })
    }

    /// How many bytes it holds.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// Moves what `from` has, once, into the empty pipe; ready with the number of bytes. None of them means that recv(2)
    /// is to be asked why.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
    ) -> Poll<io::Result<usize>> {
        let Some(ends) = &self.ends else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        ready!(from.poll_read_ready(cx))?;
        let moved = from.try_io(Interest::READABLE, || {
            match move_some(from, &ends.write, CAPACITY) {
                // An error would make tokio wait for more to come, which urgent data may be in the way of.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                moved => moved,
            }
        });
        self.filled += *moved.as_ref().unwrap_or(&0);
        Poll::Ready(moved)
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
        if self.filled > 0 {
            return;
        }
        // While a thread ends its shelf is gone already; the pipe is then closed.
        let _ended = SHELF.try_with(|shelf| {
            let mut shelf = shelf.borrow_mut();
            if shelf.len() < KEPT {
                shelf.extend(self.ends.take());
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::{
        super::tests::{SOON, tcp_pair},
        *,
    };

    #[tokio::test]
    async fn only_an_empty_pipe_is_lent_again() {
        let (mut sender, from) = tcp_pair().await;
        let (into, mut receiver) = tcp_pair().await;
        sender.write_all(b"bytes").await.unwrap();
        let mut pipe = Pipe::take().unwrap();
        let filled = poll_fn(|cx| pipe.poll_fill(cx, &from)).await.unwrap();
        assert_eq!((filled, pipe.filled()), (5, 5));
        drop(pipe);
        assert_eq!(Pipe::kept(), 0, "it held bytes");

        sender.write_all(b"bytes").await.unwrap();
        let mut pipe = Pipe::take().unwrap();
        poll_fn(|cx| pipe.poll_fill(cx, &from)).await.unwrap();
        let drained = poll_fn(|cx| pipe.poll_drain(cx, &into)).await.unwrap();
        assert_eq!((drained, pipe.filled()), (5, 0));
        drop(pipe);
        assert_eq!(Pipe::kept(), 1);
        let mut bytes = [0; 5];
        receiver.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"bytes");
    }

    #[tokio::test]
    async fn what_is_behind_urgent_data_is_left_to_recv_and_not_waited_for() {
        let (mut sender, mut from) = tcp_pair().await;
        sender.write_all(b"before").await.unwrap();
        socket2::SockRef::from(&sender)
            .send_out_of_band(b"!")
            .unwrap();
        sender.write_all(b"behind").await.unwrap();
        let mut before = 0;
        loop {
            let mut pipe = Pipe::take().unwrap();
            let filling = poll_fn(|cx| pipe.poll_fill(cx, &from));
            match tokio::time::timeout(SOON, filling).await.unwrap().unwrap() {
                0 => break,
                filled => before += filled,
            }
        }
        assert!(before <= 6, "{before}");
        let mut rest = vec![0; 12 - before];
        let reading = from.read_exact(&mut rest);
        tokio::time::timeout(SOON, reading).await.unwrap().unwrap();
        assert!(rest.ends_with(b"behind"), "{rest:?}");
    }

    /// In a process of its own under nextest: the count is that of the process.
    #[test]
    fn a_pipe_is_counted_as_long_as_it_is_open() {
        let before = PIPES.load(Ordering::Relaxed);
        let thread = std::thread::spawn(|| {
            let pipes: Vec<_> = (0..8).map(|_| Pipe::take().unwrap()).collect();
            drop(pipes);
            (Pipe::kept(), PIPES.load(Ordering::Relaxed))
        });
        let (kept, counted) = thread.join().unwrap();
        assert_eq!((kept, counted - before), (KEPT, KEPT));
        assert_eq!(
            PIPES.load(Ordering::Relaxed),
            before,
            "its thread has ended"
        );
    }

    #[test]
    fn there_is_a_bound() {
        let pipes: Vec<_> = std::iter::from_fn(Pipe::take).take(MOST + 1).collect();
        assert!(pipes.len() <= MOST, "{}", pipes.len());
    }
}
