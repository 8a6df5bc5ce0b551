//! Reading a connection in turns with its streams.
//!
//! HTTP/2 takes frames for as long as there are any. The tasks of its streams run on the same thread: they would have
//! their turn only when the peer has used up their windows, and the peer would stand still meanwhile.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{tunnel::TunnelStream, workers::give_way};

/// What is read before the streams have their turn. Measured: docs/decisions/0025.
const TURN_BYTES: usize = 64 << 10;

/// The bytes of a connection, some at a time.
#[derive(Debug)]
pub(super) struct InTurns {
    stream: TunnelStream,
    /// What was read since the streams had their turn.
    read: usize,
}

impl From<TunnelStream> for InTurns {
    fn from(stream: TunnelStream) -> Self {
        Self { stream, read: 0 }
    }
}

impl AsyncRead for InTurns {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read >= TURN_BYTES {
            self.read = 0;
            give_way(cx);
            return Poll::Pending;
        }
        let before = into.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, into);
        self.read = match read {
            Poll::Ready(_) => self.read + into.filled().len() - before,
            Poll::Pending => 0,
        };
        read
    }
}

impl AsyncWrite for InTurns {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::{tunnel::tests::tunnel, workers::tests::gives_way};

    const BYTES: usize = 4 << 20;

    /// How many bytes each turn brings.
    async fn turns(mut stream: InTurns) -> Vec<usize> {
        let mut piece = vec![0; 16 << 10];
        let (mut turns, mut all) = (vec![], 0);
        poll_fn(|cx| {
            let mut turn = 0;
            while all < BYTES {
                let mut into = ReadBuf::new(&mut piece);
                let read = Pin::new(&mut stream).poll_read(cx, &mut into);
                if read?.is_pending() {
                    turns.push(turn);
                    return Poll::Pending;
                }
                turn += into.filled().len();
                all += into.filled().len();
            }
            turns.push(turn);
            Poll::Ready(io::Result::Ok(()))
        })
        .await
        .unwrap();
        turns
    }

    #[tokio::test]
    async fn who_reads_much_gives_way_and_goes_on() {
        let (mut sender, receiver) = tunnel().await;
        let sending = async { sender.write_all(&vec![7; BYTES]).await.unwrap() };
        let both = async { tokio::join!(sending, turns(receiver.into())) };
        let both = tokio::time::timeout(Duration::from_secs(20), both);
        let ((), turns) = both.await.unwrap();
        let longest = turns.iter().copied().max().unwrap_or_default();
        let rule = TURN_BYTES..TURN_BYTES + (16 << 10);
        assert!(rule.contains(&longest), "{turns:?}");
    }

    #[tokio::test]
    async fn the_streams_have_their_turn_before_it_is_read_again() {
        let (_sender, stream) = tunnel().await;
        let read = TURN_BYTES;
        let mut receiver = InTurns { stream, read };
        let over = |cx: &mut Context<'_>| {
            let read = Pin::new(&mut receiver).poll_read(cx, &mut ReadBuf::new(&mut [0]));
            assert!(read.is_pending());
        };
        assert!(gives_way(over).await);
    }
}
