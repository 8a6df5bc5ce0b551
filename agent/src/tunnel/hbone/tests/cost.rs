//! What the two tunnels cost, printed: `cargo test -p sidestep --lib hbone::tests::cost -- --nocapture`.
//!
//! CPU time of the thread on which both ends run, so that what else the machine does counts little. Both tunnels by
//! turns in one run; compare rows of one run only.

use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncRead, AsyncWrite};

use super::*;
use crate::tunnel::connect::dial;

/// Of this thread.
fn cpu_time() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        spent.tv_sec.try_into().unwrap(),
        spent.tv_nsec.try_into().unwrap(),
    )
}

/// A node that takes tunnels of the kind `connect` and echoes.
async fn serve_connect(node: &Node) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = node.certificates.for_identity(&id("db")).await.unwrap();
    let shutdown = node.shutdown.clone();
    let serving = async move {
        loop {
            let tcp = listener.accept().await.unwrap().0;
            let tls = Arc::clone(&tls);
            shutdown.spawn("connection", async move {
                let deadline = Instant::now() + SOON;
                let incoming = Incoming::read_hello(tcp, deadline).await.unwrap();
                let accepted = Box::pin(incoming.handshake(&tls, deadline)).await;
                echo(accepted.unwrap().0).await;
            });
        }
    };
    node.shutdown.spawn("listener", serving);
    address
}

async fn open_connect(pair: &Pair, address: SocketAddr) -> crate::tunnel::TunnelStream {
    let call = pair.caller.call(address, ECHO).await;
    let dialled = dial(address, SOON).await.unwrap();
    let handshake = dialled.handshake(call.server_name, &call.expected, &call.tls, SOON);
    Box::pin(handshake).await.unwrap()
}

/// Connects, exchanges a byte, closes in order.
async fn one_byte(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    stream.write_all(b"x").await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
}

/// Sends `bytes` in pieces as the relay does, while what comes back is read.
async fn bulk(stream: impl AsyncRead + AsyncWrite + Unpin, bytes: usize) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = async {
        let piece = vec![5; 256 << 10];
        for _ in 0..bytes / piece.len() {
            writer.write_all(&piece).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let receiving = async {
        let (mut received, mut into) = (0, vec![0; 256 << 10]);
        loop {
            match reader.read(&mut into).await.unwrap() {
                0 => return received,
                read => received += read,
            }
        }
    };
    let ((), received) = tokio::join!(sending, receiving);
    assert_eq!(received, bytes);
}

#[tokio::test]
async fn the_tunnels_are_compared() {
    const ROUNDS: u32 = 5;
    const CONNECTIONS: u32 = 100;
    const TRIPS: u32 = 500;
    const BYTES: usize = 32 << 20;
    let pair = Pair::new(1).await;
    let connect = serve_connect(&pair.called).await;
    one_byte(pair.open(ECHO).await.unwrap()).await;

    // By kind of load, each for `connect` and `hbone`.
    let mut spent = [[Duration::ZERO; 2]; 3];
    let clock = |spent: &mut Duration, since: Duration| {
        *spent += cpu_time().saturating_sub(since);
    };
    for _ in 0..ROUNDS {
        let since = cpu_time();
        for _ in 0..CONNECTIONS {
            one_byte(open_connect(&pair, connect).await).await;
        }
        clock(&mut spent[0][0], since);
        let since = cpu_time();
        for _ in 0..CONNECTIONS {
            one_byte(pair.open(ECHO).await.unwrap()).await;
        }
        clock(&mut spent[0][1], since);

        let mut stream = open_connect(&pair, connect).await;
        let since = cpu_time();
        for _ in 0..TRIPS {
            stream.write_u8(b'x').await.unwrap();
            stream.flush().await.unwrap();
            stream.read_u8().await.unwrap();
        }
        clock(&mut spent[1][0], since);
        let mut stream = pair.open(ECHO).await.unwrap();
        let since = cpu_time();
        for _ in 0..TRIPS {
            stream.write_u8(b'x').await.unwrap();
            stream.read_u8().await.unwrap();
        }
        clock(&mut spent[1][1], since);

        let since = cpu_time();
        bulk(open_connect(&pair, connect).await, BYTES).await;
        clock(&mut spent[2][0], since);
        let since = cpu_time();
        bulk(pair.open(ECHO).await.unwrap(), BYTES).await;
        clock(&mut spent[2][1], since);
    }
    for (what, number, [connect, hbone]) in [
        ("a connection with one byte each way", CONNECTIONS, spent[0]),
        ("one byte each way on a connection", TRIPS, spent[1]),
        ("32 MiB each way", 1, spent[2]),
    ] {
        let each = |spent: Duration| spent / (ROUNDS * number);
        println!(
            "{what}: connect {:?}, hbone {:?} of CPU, both ends together; ratio {:.2}",
            each(connect),
            each(hbone),
            hbone.as_secs_f64() / connect.as_secs_f64()
        );
    }
    let [connect, hbone] = spent[0];
    assert!(hbone < connect, "a stream costs less than a handshake");
}
