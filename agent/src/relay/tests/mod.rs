//! The relay against real sockets and in-memory pipes; [`scripted`] has streams of every behaviour.

use std::{
    future::{pending, ready},
    hash::{DefaultHasher, Hasher as _},
    sync::Arc,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::TcpListener,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::*;
use crate::workers::tests::gives_way;

mod plain;
mod scripted;

/// For what must happen; generous, since the machine may be busy.
pub(super) const SOON: Duration = Duration::from_secs(20);

/// The applications' ends of a relayed connection.
struct Ends<S> {
    client: S,
    server: S,
    counts: Arc<Counts>,
    relay: JoinHandle<End>,
}

impl<S> Ends<S> {
    async fn end(relay: JoinHandle<End>) -> End {
        timeout(SOON, relay).await.expect("relay ended").unwrap()
    }
}

pub(super) async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the test joins its tasks by itself"
)]
fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(task)
}

async fn over_tcp(
    idle: Option<Duration>,
    cut: impl Future<Output = ()> + Send + 'static,
) -> Ends<TcpStream> {
    let (client, mut downstream) = tcp_pair().await;
    let (mut upstream, server) = tcp_pair().await;
    let counts = Arc::<Counts>::default();
    let counted = Arc::clone(&counts);
    let relay =
        spawn(async move { relay(&mut downstream, &mut upstream, &counted, idle, cut).await });
    Ends {
        client,
        server,
        counts,
        relay,
    }
}

/// In memory. An abort cannot be told from an end of stream here, so it is recorded nowhere.
impl Endpoint for DuplexStream {
    fn abort(&mut self) {}
}

fn in_memory(
    capacity: usize,
    idle: Option<Duration>,
    cut: impl Future<Output = ()> + Send + 'static,
) -> Ends<DuplexStream> {
    let (client, mut downstream) = tokio::io::duplex(capacity);
    let (mut upstream, server) = tokio::io::duplex(capacity);
    let counts = Arc::<Counts>::default();
    let counted = Arc::clone(&counts);
    let relay =
        spawn(async move { relay(&mut downstream, &mut upstream, &counted, idle, cut).await });
    Ends {
        client,
        server,
        counts,
        relay,
    }
}

async fn read_exactly(stream: &mut (impl AsyncRead + Unpin), expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    timeout(SOON, stream.read_exact(&mut got))
        .await
        .expect("bytes arrived")
        .unwrap();
    assert_eq!(got, expected);
}

async fn read_rest(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut got = Vec::new();
    timeout(SOON, stream.read_to_end(&mut got))
        .await
        .expect("stream ended")?;
    Ok(got)
}

/// Resets the connection.
fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
    drop(stream);
}

#[tokio::test]
async fn client_that_ends_first_still_gets_the_answer() {
    let Ends {
        mut client,
        mut server,
        counts,
        relay,
    } = over_tcp(None, pending()).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_rest(&mut server).await.unwrap(), b"question");
    server.write_all(b"a longer answer").await.unwrap();
    read_exactly(&mut client, b"a longer answer").await;
    server.write_all(b"!").await.unwrap();
    drop(server);
    assert_eq!(read_rest(&mut client).await.unwrap(), b"!");
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::Finished), "{end:?}");
    assert_eq!(counts.snapshot(), (8, 16));
}

#[tokio::test]
async fn server_that_ends_first_still_gets_the_rest() {
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    server.write_all(b"banner").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_rest(&mut client).await.unwrap(), b"banner");
    client.write_all(b"the rest").await.unwrap();
    read_exactly(&mut server, b"the rest").await;
    drop(client);
    assert_eq!(read_rest(&mut server).await.unwrap(), b"");
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::Finished), "{end:?}");
}

#[tokio::test]
async fn connection_without_a_byte_finishes() {
    let Ends {
        client,
        mut server,
        counts,
        relay,
    } = over_tcp(None, pending()).await;
    drop(client);
    assert_eq!(read_rest(&mut server).await.unwrap(), b"");
    drop(server);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::Finished), "{end:?}");
    assert_eq!(counts.snapshot(), (0, 0));
}

#[tokio::test]
async fn server_may_speak_first() {
    let Ends {
        mut client,
        mut server,
        ..
    } = over_tcp(None, pending()).await;
    server.write_all(b"220 ready\r\n").await.unwrap();
    read_exactly(&mut client, b"220 ready\r\n").await;
}

#[tokio::test]
async fn reset_of_the_client_reaches_the_server() {
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    client.write_all(b"begin").await.unwrap();
    read_exactly(&mut server, b"begin").await;
    reset(client);
    let error = read_rest(&mut server).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::DownstreamReset(_)), "{end:?}");
}

#[tokio::test]
async fn reset_of_the_server_reaches_the_client_after_its_last_words() {
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    server.write_all(b"413 too large").await.unwrap();
    reset(server);
    read_exactly(&mut client, b"413 too large").await;
    let error = read_rest(&mut client).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::UpstreamReset(_)), "{end:?}");
}

#[tokio::test]
async fn refusal_reaches_a_client_that_is_still_sending() {
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    let mut first = [0];
    let body = vec![9; 100_000];
    client.write_all(&body).await.unwrap();
    server.read_exact(&mut first).await.unwrap();
    server.write_all(b"413 too large").await.unwrap();
    reset(server);
    while client.write(&body).await.is_ok() {}
    assert!(!matches!(
        Ends::<TcpStream>::end(relay).await,
        End::Finished
    ));
    read_exactly(&mut client, b"413 too large").await;
}

#[tokio::test]
async fn reset_after_the_end_of_stream_is_found() {
    // Nobody reads from a client that has ended its stream: only the probe can tell.
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    client.shutdown().await.unwrap();
    assert_eq!(read_rest(&mut server).await.unwrap(), b"");
    reset(client);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::DownstreamReset(_)), "{end:?}");
    let write = timeout(SOON, async {
        while server.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    write.await.expect("server saw the reset");
}

#[tokio::test]
async fn reset_of_a_client_is_found_while_the_server_reads_nothing() {
    let Ends {
        mut client,
        server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    let chunk = vec![7; 1 << 20];
    // Until neither the sockets nor the relay take any more.
    while timeout(Duration::from_millis(300), client.write(&chunk))
        .await
        .is_ok()
    {}
    reset(client);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::DownstreamReset(_)), "{end:?}");
    drop(server);
}

#[tokio::test(start_paused = true)]
async fn reader_that_stops_makes_the_writer_wait() {
    const CAPACITY: usize = 1 << 10;
    // Two pipes of a kilobyte and one buffer of the largest size.
    const MOST: usize = 2 * CAPACITY + (256 << 10);
    let Ends {
        mut client,
        mut server,
        ..
    } = in_memory(CAPACITY, None, pending());
    let chunk = [1; 1 << 10];
    let mut taken = 0;
    while timeout(Duration::from_secs(1), client.write_all(&chunk))
        .await
        .is_ok()
    {
        taken += chunk.len();
        assert!(taken <= MOST, "{taken} bytes taken with nobody reading");
    }
    let mut drained = vec![0; taken];
    server.read_exact(&mut drained).await.unwrap();
    client.write_all(&chunk).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn silence_for_the_idle_timeout_ends_it() {
    let idle = Duration::from_mins(1);
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = in_memory(1 << 10, Some(idle), pending());
    let started = Instant::now();
    for _ in 0..5 {
        sleep(idle * 3 / 4).await;
        client.write_all(b"x").await.unwrap();
        read_exactly(&mut server, b"x").await;
    }
    let last = Instant::now();
    let end = relay.await.unwrap();
    assert!(matches!(end, End::Idle), "{end:?}");
    assert!(started.elapsed() > idle * 4);
    let waited = last.elapsed();
    assert!(
        waited >= idle && waited < idle + Duration::from_secs(1),
        "{waited:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn idle_timeout_also_ends_half_closed_connections() {
    let idle = Duration::from_mins(1);
    let Ends {
        client,
        mut server,
        relay,
        ..
    } = in_memory(1 << 10, Some(idle), pending());
    let (_read, mut write) = tokio::io::split(client);
    write.shutdown().await.unwrap();
    assert_eq!(read_rest(&mut server).await.unwrap(), b"");
    let started = Instant::now();
    let end = relay.await.unwrap();
    assert!(matches!(end, End::Idle), "{end:?}");
    assert!(
        started.elapsed() < idle + PROBE_EVERY,
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn connection_without_timeout_stays() {
    let Ends {
        mut client,
        mut server,
        ..
    } = in_memory(1 << 10, None, pending());
    sleep(Duration::from_hours(100)).await;
    client.write_all(b"still here").await.unwrap();
    read_exactly(&mut server, b"still here").await;
}

#[tokio::test]
async fn cut_resets_both_sides() {
    let (cut, told) = tokio::sync::oneshot::channel::<()>();
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, async move {
        told.await.unwrap();
    })
    .await;
    client.write_all(b"x").await.unwrap();
    read_exactly(&mut server, b"x").await;
    cut.send(()).unwrap();
    for side in [&mut client, &mut server] {
        let error = read_rest(side).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::Cut), "{end:?}");
}

#[tokio::test]
async fn sixty_four_mebibytes_arrive_whole_both_ways_at_once() {
    const TOTAL: usize = 64 << 20;
    let Ends {
        client,
        server,
        counts,
        relay,
    } = over_tcp(None, pending()).await;
    let ends = [(client, 1), (server, 2)].map(|(stream, seed)| spawn(pump(stream, seed, TOTAL)));
    let [client, server] = ends;
    let (client, server) = (client.await.unwrap(), server.await.unwrap());
    assert_eq!(client.sent, server.received);
    assert_eq!(server.sent, client.received);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::Finished), "{end:?}");
    let total = u64::try_from(TOTAL).unwrap();
    assert_eq!(counts.snapshot(), (total, total));
}

struct Pumped {
    sent: (usize, u64),
    received: (usize, u64),
}

/// Sends `total` bytes in pieces of random size while it reads what comes, and returns both hashes.
async fn pump(stream: TcpStream, seed: u64, total: usize) -> Pumped {
    let (mut read, mut write) = stream.into_split();
    let sending = async {
        let mut random = Random(seed);
        let mut hash = DefaultHasher::new();
        let pool: Vec<u8> = (0..200_000).map(|_| random.byte()).collect();
        let mut left = total;
        while left > 0 {
            let length = (1 + random.below(150_000)).min(left);
            let start = random.below(pool.len() - 150_001);
            let piece = &pool[start..start + length];
            write.write_all(piece).await.unwrap();
            for byte in piece {
                hash.write_u8(*byte);
            }
            left -= length;
        }
        write.shutdown().await.unwrap();
        (total, hash.finish())
    };
    let receiving = async {
        let mut random = Random(!seed);
        let mut hash = DefaultHasher::new();
        let mut received = 0;
        let mut buffer = vec![0; 100_000];
        loop {
            let most = 1 + random.below(buffer.len());
            match read.read(&mut buffer[..most]).await.unwrap() {
                0 => return (received, hash.finish()),
                n => {
                    for byte in &buffer[..n] {
                        hash.write_u8(*byte);
                    }
                    received += n;
                }
            }
        }
    };
    let (sent, received) = tokio::join!(sending, receiving);
    Pumped { sent, received }
}

/// A small xorshift: reproducible, and no dependency.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 1).unwrap() % bound
    }
}

#[test]
fn relay_of_two_sockets_is_a_small_future() {
    fn size<F>(_: &impl FnOnce(&'static mut TcpStream, &'static mut TcpStream) -> F) -> usize {
        size_of::<F>()
    }
    static COUNTS: Counts = Counts {
        to_upstream: AtomicU64::new(0),
        to_downstream: AtomicU64::new(0),
    };
    let bytes = size(&|d, u| relay(d, u, &COUNTS, None, ready(())));
    assert!(bytes <= 448, "{bytes} bytes per idle connection");
}

#[tokio::test]
async fn bulk_gives_way_after_its_turn() {
    const TOTAL: usize = 4 << 20;
    let (mut client, mut downstream) = tokio::io::duplex(TOTAL);
    let (mut upstream, _server) = tokio::io::duplex(TOTAL);
    client.write_all(&vec![7; TOTAL]).await.unwrap();
    let counts = Counts::default();
    let mut relaying = pin!(relay(
        &mut downstream,
        &mut upstream,
        &counts,
        None,
        pending()
    ));
    let turn = |cx: &mut Context<'_>| assert!(relaying.as_mut().poll(cx).is_pending());
    assert!(gives_way(turn).await);
    let (moved, _) = counts.snapshot();
    assert!((64 << 10..512 << 10).contains(&moved), "{moved} bytes");
}

#[tokio::test]
async fn idle_connection_holds_no_buffer() {
    let count = AtomicU64::new(0);
    let mut way = Way::new(&count);
    let (_client, mut reader) = tokio::io::duplex(64);
    let (mut writer, _server) = tokio::io::duplex(64);
    std::future::poll_fn(|cx| {
        way.poll(cx, &mut reader, &mut writer).unwrap();
        Poll::Ready(())
    })
    .await;
    assert!(!way.holds_buffer());
}

/// As at the drain deadline: what was sent so far is not all there is.
#[tokio::test]
async fn a_relay_that_is_dropped_resets_both_sides() {
    let mut ends = over_tcp(None, pending()).await;
    ends.client.write_all(b"half of it").await.unwrap();
    let mut seen = [0; 10];
    ends.server.read_exact(&mut seen).await.unwrap();
    ends.relay.abort();
    for application in [&mut ends.client, &mut ends.server] {
        let read = timeout(SOON, application.read(&mut seen)).await.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

/// What a killed process leaves to the kernel: its sockets are closed, and nothing of it runs any more.
#[tokio::test]
async fn a_killed_relay_resets_both_sides() {
    let (mut client, mut downstream) = tcp_pair().await;
    let (mut upstream, mut server) = tcp_pair().await;
    let counts = Counts::default();
    let mut relay = Box::pin(relay(
        &mut downstream,
        &mut upstream,
        &counts,
        None,
        pending(),
    ));
    client.write_all(b"half of it").await.unwrap();
    let mut seen = [0; 10];
    tokio::select! {
        end = &mut relay => panic!("{end:?}"),
        read = server.read_exact(&mut seen) => read.unwrap(),
    };
    let _left_behind = std::mem::ManuallyDrop::new(relay);
    drop((downstream, upstream));
    for application in [&mut client, &mut server] {
        let read = timeout(SOON, application.read(&mut seen)).await.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
