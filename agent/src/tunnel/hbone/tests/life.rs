//! How connections come, go and are replaced.

use super::*;

#[tokio::test]
async fn calls_share_a_connection_only_as_the_same_to_the_same() {
    let pair = Pair::new(1).await;
    assert!(pair.echoes().await);
    let mut call = pair.caller.call(pair.address, ECHO).await;
    let other = pair.caller.certificates.for_identity(&id("other")).await;
    call.tls = other.unwrap();
    soon(pair.pool.open(&call)).await.unwrap();
    assert_eq!(pair.pool.in_use().0, 2);
}

#[tokio::test]
async fn only_the_expected_service_is_accepted_and_everybody_who_waited_hears_why() {
    let pair = Pair::new(1).await;
    let mut call = pair.caller.call(pair.address, ECHO).await;
    call.expected = id("cache");
    let (first, second) = tokio::join!(pair.pool.open(&call), pair.pool.open(&call));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        let text = crate::telemetry::log::chain(&error).to_string();
        let said = format!("the peer is {}, expected {}", id("db"), id("cache"));
        assert!(text.ends_with(&said), "{text}");
        assert_eq!(error.stage(), crate::telemetry::record::Stage::Handshake);
    }
    assert_eq!(pair.pool.in_use().0, 0);
}

#[tokio::test]
async fn a_node_that_is_away_is_tried_anew_by_each_call() {
    let pair = Pair::new(1).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let call = pair.caller.call(address, ECHO).await;
    for _ in 0..2 {
        let error = soon(pair.pool.open(&call)).await.unwrap_err();
        assert_eq!(error.stage(), crate::telemetry::record::Stage::Dial);
    }
}

#[tokio::test]
async fn a_warm_pool_has_a_connection_before_the_first_call() {
    let pair = Pair::new(1).await;
    let call = pair.caller.call(pair.address, ECHO).await;
    pair.pool.warm(&call);
    pair.pool.warm(&call);
    until(|| pair.pool.in_use().0 == 1).await;
    assert!(pair.echoes().await);
    assert_eq!(pair.pool.in_use().0, 1);
}

/// Lets the connections' clocks run ahead, and with them that of [`soon`].
pub(super) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test]
async fn a_connection_that_nobody_uses_is_closed() {
    let pair = Pair::new(1).await;
    let mut stream = pair.open(ECHO).await.unwrap();
    for _ in 0..40 {
        pass(Duration::from_secs(11)).await;
        // Long after the idle time, but with a stream; its PINGs are answered.
        exchange(&mut stream, b"still there").await;
    }
    stream.shutdown().await.unwrap();
    assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
    drop(stream);
    for _ in 0..20 {
        pass(Duration::from_secs(11)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pair.pool.in_use().0, 1, "idle, but not for long");
    let mut passed = 0;
    while pair.pool.in_use().0 > 0 {
        pass(Duration::from_secs(11)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        passed += 1;
        assert!(passed < 20, "still open");
    }
    // Closed on both sides, so that nothing is left to drain.
    assert_eq!(pair.called.shutdown.run("test", SOON).await, 0);
    assert_eq!(pair.caller.shutdown.run("test", SOON).await, 0);
}

/// Calls until told to stop; how many calls there were. Each must succeed.
fn load(pair: &Arc<Pair>, stop: &watch::Receiver<bool>) -> tokio::task::JoinHandle<usize> {
    let (inner, stop) = (Arc::clone(pair), stop.clone());
    pair.caller.shutdown.spawn("load", async move {
        let mut calls = 0;
        while !*stop.borrow() {
            assert!(inner.echoes().await);
            calls += 1;
        }
        calls
    })
}

/// Does `change` while calls come and go and one stream stays open; nothing of it may fail.
async fn under_load<T>(change: impl AsyncFnOnce(&Pair) -> T) -> T {
    let pair = Arc::new(Pair::new(2).await);
    let mut lasting = pair.open(ECHO).await.unwrap();
    let (stop, stopped) = watch::channel(false);
    let callers: Vec<_> = (0..20).map(|_| load(&pair, &stopped)).collect();
    let answer = change(&pair).await;
    exchange(&mut lasting, b"as if nothing had happened").await;
    stop.send_replace(true);
    for caller in callers {
        assert!(soon(caller).await.unwrap() > 0);
    }
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_certificates_of_both_sides_break_nothing() {
    under_load(async |pair: &Pair| {
        let other = Arc::new(TestCa::root("other"));
        for node in [&pair.caller, &pair.called] {
            // Other roots make another configuration, with which new connections are made.
            node.authority.trust_in(&[&pair.root, &other]);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_asks_to_go_elsewhere_loses_no_call() {
    under_load(async |pair: &Pair| {
        let roots = [
            &pair.root,
            &Arc::new(TestCa::root("one")),
            &Arc::new(TestCa::root("two")),
        ];
        for round in 0..30 {
            // Each change makes the called side send GOAWAY on all connections, in the middle of calls.
            pair.called.authority.trust_in(&roots[..=(round % 3)]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_new_certificate_takes_new_streams_and_leaves_the_old_ones() {
    let pair = Pair::new(1).await;
    let mut old = pair.open(ECHO).await.unwrap();
    exchange(&mut old, b"hello").await;
    let call = pair.caller.call(pair.address, ECHO).await;
    let other = Arc::new(TestCa::root("other"));
    pair.caller.authority.trust_in(&[&pair.root, &other]);
    until(|| pair.pool.in_use().0 == 0).await;
    let mut new = pair.open(ECHO).await.unwrap();
    assert_eq!(pair.pool.in_use().0, 1);
    exchange(&mut old, b"on the old connection").await;
    exchange(&mut new, b"on the new one").await;
    drop(call);
    for stream in [&mut old, &mut new] {
        stream.shutdown().await.unwrap();
        assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_peer_whose_root_is_revoked_is_cut_off() {
    for by_caller in [true, false] {
        let pair = Pair::new(1).await;
        let mut stream = pair.open(ECHO).await.unwrap();
        exchange(&mut stream, b"hello").await;
        let other = Arc::new(TestCa::root("other"));
        let node = if by_caller {
            &pair.caller
        } else {
            &pair.called
        };
        node.authority.trust_in(&[&other]);
        soon(stream.read(&mut [0; 1])).await.unwrap_err();
        until(|| pair.pool.in_use().0 == 0).await;
        let error = pair.open(ECHO).await.map(drop);
        error.expect_err("the roots have nothing in common");
    }
}

#[tokio::test]
async fn a_called_node_that_drains_lets_streams_end() {
    let pair = Pair::new(1).await;
    let mut stream = pair.open(ECHO).await.unwrap();
    let shutdown = pair.called.shutdown.clone();
    let drained = pair
        .caller
        .shutdown
        .spawn("drain", async move { shutdown.run("test", SOON).await });
    until(|| pair.called.shutdown.is_draining()).await;
    exchange(&mut stream, &vec![3; 3 << 20]).await;
    // Told to go elsewhere, and there is nowhere else.
    soon(async { while pair.open(ECHO).await.is_ok() {} }).await;
    exchange(&mut stream, b"still").await;
    stream.shutdown().await.unwrap();
    assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
    drop(stream);
    assert_eq!(soon(drained).await.unwrap(), 0, "nothing was cut");
}

#[tokio::test]
async fn a_calling_node_that_drains_lets_streams_end() {
    let pair = Pair::new(1).await;
    let mut stream = pair.open(ECHO).await.unwrap();
    let shutdown = pair.caller.shutdown.clone();
    let drained = pair
        .called
        .shutdown
        .spawn("drain", async move { shutdown.run("test", SOON).await });
    until(|| pair.caller.shutdown.is_draining()).await;
    exchange(&mut stream, b"still").await;
    // A connection accepted before may still need one.
    assert!(pair.echoes().await);
    stream.shutdown().await.unwrap();
    assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
    drop(stream);
    assert_eq!(soon(drained).await.unwrap(), 0, "nothing was cut");
}
