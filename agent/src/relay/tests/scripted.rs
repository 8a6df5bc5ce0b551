//! Streams that follow a script: every interleaving of readiness that a socket could show.

use std::{collections::VecDeque, future::pending};

use proptest::prelude::*;
use tokio::{
    io::{AsyncWriteExt as _, ReadBuf},
    time::{sleep, timeout},
};

use super::{super::*, Random, SOON};

/// What a scripted stream does when it is asked.
#[derive(Debug, Clone)]
enum Step {
    /// Takes or gives up to this many bytes.
    Some(usize),
    /// Not now; ready at once after.
    Wait,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (1_usize..70_000).prop_map(Step::Some),
        2 => Just(Step::Wait),
    ];
    prop::collection::vec(step, 0..40)
}

/// A stream that gives `input`, takes into `output` and keeps it back until a flush, all by a script;
/// past the script's end it does all at once.
#[derive(Debug)]
struct Scripted {
    input: Vec<u8>,
    given: usize,
    reads: VecDeque<Step>,
    writes: VecDeque<Step>,
    kept_back: Vec<u8>,
    output: Vec<u8>,
    shutdowns: usize,
    aborts: usize,
}

impl Scripted {
    fn new(length: usize, seed: u64, reads: Vec<Step>, writes: Vec<Step>) -> Self {
        let mut random = Random(seed);
        Self {
            input: (0..length).map(|_| random.byte()).collect(),
            given: 0,
            reads: reads.into(),
            writes: writes.into(),
            kept_back: Vec::new(),
            output: Vec::new(),
            shutdowns: 0,
            aborts: 0,
        }
    }

    fn waits(steps: &mut VecDeque<Step>, cx: &Context<'_>) -> Result<usize, ()> {
        match steps.pop_front() {
            Some(Step::Wait) => {
                cx.waker().wake_by_ref();
                Err(())
            }
            Some(Step::Some(bytes)) => Ok(bytes),
            None => Ok(usize::MAX),
        }
    }

    fn release(&mut self) {
        let kept = std::mem::take(&mut self.kept_back);
        self.output.extend(kept);
    }
}

impl Endpoint for Scripted {
    fn abort(&mut self) {
        self.aborts += 1;
    }
}

impl AsyncRead for Scripted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Ok(most) = Self::waits(&mut this.reads, cx) else {
            return Poll::Pending;
        };
        let rest = &this.input[this.given..];
        let piece = &rest[..rest.len().min(most).min(into.remaining())];
        into.put_slice(piece);
        this.given += piece.len();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        assert_eq!(this.shutdowns, 0, "written after the end of stream");
        let Ok(most) = Self::waits(&mut this.writes, cx) else {
            return Poll::Pending;
        };
        let piece = &from[..from.len().min(most)];
        this.kept_back.extend(piece);
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if Self::waits(&mut self.writes, cx).is_err() {
            return Poll::Pending;
        }
        self.release();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if Self::waits(&mut self.writes, cx).is_err() {
            return Poll::Pending;
        }
        self.release();
        self.shutdowns += 1;
        Poll::Ready(Ok(()))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_byte_arrives_once_and_in_order(
        lengths in (0_usize..600_000, 0_usize..600_000),
        client_steps in (steps(), steps()),
        server_steps in (steps(), steps()),
    ) {
        let mut client = Scripted::new(lengths.0, 11, client_steps.0, client_steps.1);
        let mut server = Scripted::new(lengths.1, 13, server_steps.0, server_steps.1);
        let counts = Counts::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let end = runtime
            .block_on(async {
                timeout(SOON, relay(&mut client, &mut server, &counts, None, pending())).await
            })
            .expect("relay ended");
        prop_assert!(matches!(end, End::Finished));
        prop_assert!(server.output == client.input, "bytes to the upstream differ");
        prop_assert!(client.output == server.input, "bytes to the downstream differ");
        prop_assert_eq!((client.shutdowns, server.shutdowns), (1, 1));
        prop_assert_eq!((client.aborts, server.aborts), (0, 0));
        let sum = |n: usize| u64::try_from(n).unwrap();
        prop_assert_eq!(counts.snapshot(), (sum(lengths.0), sum(lengths.1)));
    }
}

#[tokio::test]
async fn bytes_are_flushed_when_nothing_more_comes() {
    // The client gives bytes, then is silent for good: the writer must not sit on them.
    let (mut client, mut downstream) = tokio::io::duplex(1 << 10);
    let mut upstream = Scripted::new(0, 1, vec![], vec![]);
    let counts = Counts::default();
    client.write_all(b"ping").await.unwrap();
    let silent = sleep(Duration::from_millis(50));
    relay(&mut downstream, &mut upstream, &counts, None, silent).await;
    assert_eq!(upstream.output, b"ping");
    assert_eq!(upstream.aborts, 1);
}
