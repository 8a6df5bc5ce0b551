//! What an application's connection sees of a stream.

use std::io::ErrorKind;

use super::*;
use crate::{telemetry::record::Stage, workers::Workers};

#[tokio::test]
async fn many_streams_share_few_connections() {
    let pair = Pair::new(2).await;
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    let streams = (0..50_u8).map(|first| {
        let (pair, mut bytes) = (&pair, bytes.clone());
        async move {
            bytes[0] = first;
            let mut stream = pair.open(ECHO).await.unwrap();
            exchange(&mut stream, &bytes).await;
            stream
        }
    });
    let open = all(streams).await;
    assert_eq!(pair.pool.in_use().0, 2);
    drop(open);
    assert!(pair.echoes().await);
}

/// Runs them at the same time.
async fn all<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    let mut done: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        let mut is_pending = false;
        for (future, done) in futures.iter_mut().zip(&mut done) {
            if done.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *done = Some(value),
                    std::task::Poll::Pending => is_pending = true,
                }
            }
        }
        if is_pending {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(())
    })
    .await;
    done.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_are_open_at_once() {
    let pair = Pair::new(4).await;
    let open = (0..1000).map(|_| async {
        let mut stream = pair.open(ECHO).await.unwrap();
        exchange(&mut stream, b"x").await;
        stream
    });
    let mut streams = all(open).await;
    let connections = pair.pool.in_use().0;
    assert!(connections <= 6, "{connections} connections");
    for stream in &mut streams {
        exchange(stream, b"still there").await;
    }
    for stream in &mut streams {
        stream.shutdown().await.unwrap();
    }
    for stream in &mut streams {
        assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
    }
    drop(streams);
    // In order, so the connections are as good as before.
    assert!(pair.echoes().await);
    assert_eq!(pair.pool.in_use().0, connections);
}

#[tokio::test]
async fn each_worker_gets_a_connection_of_its_own() {
    let pair = Arc::new(Pair::new(4).await);
    let (workers, _threads) = Workers::start(2, tokio::runtime::Handle::current()).unwrap();
    let open_five = || {
        let pair = Arc::clone(&pair);
        workers.in_turn().spawn(async move {
            let mut streams = vec![];
            for _ in 0..5 {
                streams.push(pair.open(ECHO).await.unwrap());
            }
            streams
        })
    };
    let mut streams = soon(open_five()).await.unwrap();
    assert_eq!(pair.pool.in_use(), (1, 5));
    streams.extend(soon(open_five()).await.unwrap());
    until(|| pair.pool.in_use().0 == 2).await;
    streams.extend(soon(open_five()).await.unwrap());
    assert_eq!(pair.pool.in_use(), (2, 15), "both have one by now");
    for stream in &mut streams {
        exchange(stream, b"whichever drives it").await;
    }
}

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    let pair = Pair::new(1).await;
    // More often than HTTP/2 libraries tolerate empty frames that say nothing.
    for _ in 0..150 {
        let mut stream = pair.open(SPEAKS_FIRST).await.unwrap();
        let mut banner = String::new();
        soon(stream.read_to_string(&mut banner)).await.unwrap();
        assert_eq!(banner, "banner");
        stream.write_all(b"after the end").await.unwrap();
        stream.shutdown().await.unwrap();
    }
    let mut stream = pair.open(ANSWERS_LAST).await.unwrap();
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = vec![];
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer == vec![7; 3 << 20]);
    // An end is an end, however often asked.
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    stream.shutdown().await.unwrap();
    drop(stream);
    assert_eq!(pair.pool.in_use().0, 1, "the same connection all along");
}

#[tokio::test]
async fn a_reset_is_a_reset_and_what_came_before_it_arrives() {
    let pair = Pair::new(1).await;
    for _ in 0..50 {
        let mut stream = pair.open(RESETS).await.unwrap();
        let mut said = vec![];
        let error = soon(stream.read_to_end(&mut said)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error:?}");
        assert_eq!(said, b"last words");
        let error = stream.write_all(b"too late").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error:?}");
    }
    assert!(pair.echoes().await);
}

/// A stream to somebody who tells, and what he tells.
async fn watched(pair: &Pair) -> (HboneStream, HboneStream) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (certificates, shutdown) = (
        pair.called.certificates.clone(),
        pair.called.shutdown.clone(),
    );
    pair.called.shutdown.spawn("connection", async move {
        let deadline = Instant::now() + SOON;
        let tls = certificates.for_identity(&id("db")).await.unwrap();
        let tcp = listener.accept().await.unwrap().0;
        let incoming = Incoming::read_hello(tcp, deadline).await.unwrap();
        let accepted = Box::pin(Accepted::handshake(incoming, &tls, &certificates, deadline));
        let accepted = accepted.await.unwrap();
        assert_eq!(accepted.peer, id("web"));
        let mut sender = Some(sender);
        let take = |requested: Requested| {
            drop(sender.take().unwrap().send(requested.accept().unwrap()));
        };
        Box::pin(accepted.serve(&shutdown, take)).await;
    });
    let call = pair.caller.call(address, ECHO).await;
    let client = soon(pair.pool.open(&call)).await.unwrap();
    (client, soon(receiver).await.unwrap())
}

#[tokio::test]
async fn an_abort_by_either_side_resets_the_other() {
    let pair = Pair::new(1).await;
    for case in 0..8_u8 {
        let [client_first, is_dropped_only, after_shutdown] = [1, 2, 4].map(|bit| case & bit > 0);
        let (client, server) = watched(&pair).await;
        let (mut first, mut second) = if client_first {
            (client, server)
        } else {
            (server, client)
        };
        if after_shutdown {
            first.shutdown().await.unwrap();
            assert_eq!(soon(second.read(&mut [0; 8])).await.unwrap(), 0);
        }
        if !is_dropped_only {
            first.abort();
        }
        drop(first);
        let error = if after_shutdown {
            // Nobody reads any more: asking tells.
            until(|| second.pending_error().is_some()).await;
            second.pending_error().unwrap()
        } else {
            soon(second.read(&mut [0; 8])).await.unwrap_err()
        };
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error:?}");
    }
}

#[tokio::test]
async fn a_connection_that_dies_is_no_end_of_file() {
    let pair = Pair::new(1).await;
    let mut stream = pair.open(ECHO).await.unwrap();
    exchange(&mut stream, b"hello").await;
    let shutdown = pair.called.shutdown.clone();
    shutdown.run("test", Duration::ZERO).await;
    soon(stream.read(&mut [0; 8])).await.unwrap_err();
}

#[tokio::test]
async fn a_reader_that_pauses_holds_its_writer_back_and_nobody_else() {
    let pair = Pair::new(1).await;
    let mut stalled = vec![];
    for _ in 0..10 {
        let mut stream = pair.open(SLEEPS).await.unwrap();
        let mut written = 0;
        let chunk = vec![1; 64 << 10];
        // Fill everything there is between the two.
        while tokio::time::timeout(Duration::from_millis(100), stream.write_all(&chunk))
            .await
            .is_ok()
        {
            written += chunk.len();
            assert!(written < 8 << 20, "nothing held the writer back");
        }
        stalled.push(stream);
    }
    let bytes = vec![5; 20 << 20];
    let mut stream = pair.open(ECHO).await.unwrap();
    exchange(&mut stream, &bytes).await;
    assert_eq!(pair.pool.in_use().0, 1);
}

#[tokio::test]
async fn single_bytes_to_a_reader_that_pauses_do_not_end_the_connection() {
    let pair = Pair::new(1).await;
    let mut slow = pair.open(SLEEPS).await.unwrap();
    for _ in 0..50_000 {
        slow.write_all(b"x").await.unwrap();
        tokio::task::yield_now().await;
    }
    assert!(pair.echoes().await);
    assert!(slow.pending_error().is_none());
}

#[tokio::test]
async fn a_refusal_says_at_which_step() {
    let pair = Pair::new(1).await;
    for (port, stage, part) in [
        (DENIED, Stage::Policy, "denied the call (status 403"),
        (
            UNREACHABLE,
            Stage::Deliver,
            "did not reach the instance (status 503",
        ),
    ] {
        let error = pair.open(port).await.unwrap_err();
        assert_eq!(error.stage(), stage);
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(pair.echoes().await);
    assert_eq!(pair.pool.in_use().0, 1, "a refusal ends a stream only");
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_not_waited_for() {
    let pair = Pair::new(1).await;
    assert!(pair.echoes().await);
    let mut call = pair.caller.call(pair.address, SILENT).await;
    call.handshake_timeout = Duration::from_millis(50);
    let error = soon(pair.pool.open(&call)).await.unwrap_err();
    assert!(matches!(error, TunnelError::AnswerTimeout), "{error:?}");
    assert!(pair.echoes().await);
    // The other side was told: its task has ended, or this would cut it.
    let shutdown = pair.called.shutdown.clone();
    assert_eq!(shutdown.run("test", SOON).await, 0);
}
