//! How a tunnel ends: each direction on its own, cut short, or reset.

use std::io::{ErrorKind, IoSlice};

use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::*;
use crate::relay::Endpoint as _;

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    for client_first in [true, false] {
        let (client, server) = tunnel().await;
        let (mut first, mut second) = if client_first {
            (client, server)
        } else {
            (server, client)
        };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        let mut question = String::new();
        second.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");

        let answer = vec![7_u8; 1 << 20];
        let (sent, received) = tokio::join!(
            async {
                second.write_all(&answer).await?;
                second.shutdown().await
            },
            async {
                let mut received = Vec::new();
                first.read_to_end(&mut received).await.map(|_| received)
            }
        );
        sent.unwrap();
        assert!(received.unwrap() == answer);
        // Both ends are ends, however often asked.
        assert_eq!(first.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(second.read(&mut [0; 8]).await.unwrap(), 0);
        first.shutdown().await.unwrap();
    }
}

/// All that comes, read in pieces of at most `length` bytes.
async fn read_by(stream: &mut TunnelStream, length: usize) -> Vec<u8> {
    let (mut received, mut piece) = (vec![], vec![0; length]);
    loop {
        let count = stream.read(&mut piece).await.unwrap();
        if count == 0 {
            return received;
        }
        received.extend_from_slice(&piece[..count]);
    }
}

#[tokio::test]
async fn bytes_arrive_in_order_however_they_are_cut() {
    let bytes: Vec<u8> = (0..400_000_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    // Of a write and of a read: below, at and above a record, and what is sealed and read at a time.
    let lengths = [1, 100, 16 << 10, (16 << 10) + 1, 64 << 10, 100_000];
    for (written, read) in lengths.iter().flat_map(|w| lengths.map(|r| (*w, r))) {
        // Single bytes of all of it take long.
        let bytes = bytes.get(..written.min(read) * 4000).unwrap_or(&bytes);
        let (mut sender, mut receiver) = tunnel().await;
        let sending = async {
            for piece in bytes.chunks(written) {
                sender.write_all(piece).await.unwrap();
            }
            sender.shutdown().await.unwrap();
        };
        let ((), received) = tokio::join!(sending, read_by(&mut receiver, read));
        assert!(received == bytes, "{written} {read}");
    }
}

/// The start of `bytes`, cut into so many of these lengths as there are bytes for.
fn pieces<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<IoSlice<'a>> {
    let mut rest = bytes;
    let cut = lengths.iter().map(|length| {
        let (piece, after) = rest.split_at(*length.min(&rest.len()));
        rest = after;
        IoSlice::new(piece)
    });
    cut.collect()
}

#[tokio::test]
async fn bytes_that_lie_apart_arrive_in_order() {
    let bytes: Vec<u8> = (0..300_000_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    // A head and a frame as HTTP/2 has them: together below, at and above one record, and what is sealed at a time.
    let record = 16 << 10;
    let table: [&[usize]; 7] = [
        &[9, 100],
        &[9, record - 9],
        &[9, record - 8],
        &[256, 64 << 10],
        &[0, 9, 0, 90_000, 5],
        &[100_000],
        &[1; 300],
    ];
    for lengths in table {
        let (mut sender, mut receiver) = tunnel().await;
        let sending = async {
            assert!(AsyncWrite::is_write_vectored(&sender));
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let pieces = pieces(rest, lengths);
                let written = sender.write_vectored(&pieces).await.unwrap();
                let whole: usize = pieces.iter().map(|piece| piece.len()).sum();
                assert!(written == whole || written >= 64 << 10, "{written}");
                rest = rest.get(written..).unwrap();
            }
            sender.shutdown().await.unwrap();
        };
        let ((), received) = tokio::join!(sending, read_by(&mut receiver, 50_000));
        assert!(received == bytes, "{lengths:?}");
    }
}

#[tokio::test]
async fn a_peer_may_change_its_keys() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let (listener, address) = listen().await;
    let connector = TlsConnector::from(client.client_config(&id("db"), address));
    let tcp = TcpStream::connect(address).await.unwrap();
    let connecting = connector.connect(SERVER_NAME.try_into().unwrap(), tcp);
    let (client, taken) =
        Box::pin(async { tokio::join!(connecting, take(&listener, &server)) }).await;
    let (mut client, mut server) = (client.unwrap(), taken.unwrap().0);
    for round in 0..3 {
        // It asks the other end to do the same.
        client.get_mut().1.refresh_traffic_keys().unwrap();
        client.write_all(&[round]).await.unwrap();
        client.flush().await.unwrap();
        let mut heard = [9];
        server.read_exact(&mut heard).await.unwrap();
        server.write_all(&heard).await.unwrap();
        server.flush().await.unwrap();
        client.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, [round]);
    }
}

#[tokio::test]
async fn a_stream_cut_short_is_an_error_not_an_end() {
    let (mut client, mut server) = tunnel().await;
    // A socket that is closed with something unread sends a reset, and a ticket comes first of all.
    server.write_all(b"!").await.unwrap();
    server.flush().await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    client.write_all(b"half a messa").await.unwrap();
    client.flush().await.unwrap();
    drop(client);
    let mut received = Vec::new();
    let error = server.read_to_end(&mut received).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert_eq!(received, b"half a messa");
    assert!(error.to_string().contains("was killed"), "{error}");
    let again = server.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn an_abort_resets_the_peer() {
    for after_shutdown in [false, true] {
        let (mut client, mut server) = tunnel().await;
        if after_shutdown {
            client.shutdown().await.unwrap();
            assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        }
        client.abort();
        drop(client);
        let error = loop {
            // After an end the reset shows on writing.
            let step = if after_shutdown {
                server.write_all(b"x").await
            } else {
                server.read(&mut [0; 8]).await.map(|_| ())
            };
            if let Err(error) = step {
                break error;
            }
        };
        assert!(
            matches!(
                error.kind(),
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
            ),
            "{error:?}"
        );
        assert!(
            after_shutdown || error.kind() == ErrorKind::ConnectionReset,
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_reset_shows_to_one_who_does_not_read() {
    let (mut client, server) = tunnel().await;
    let mut server = server;
    assert!(server.pending_error().is_none());
    client.abort();
    drop(client);
    let seen = async {
        loop {
            if let Some(error) = server.pending_error() {
                return error;
            }
            tokio::task::yield_now().await;
        }
    };
    let error = tokio::time::timeout(LIMIT, seen).await.unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reader_that_pauses_holds_the_writer_back() {
    let (mut client, mut server) = tunnel().await;
    let chunk = vec![1_u8; 64 << 10];
    let mut written = 0;
    // Fill everything there is between the two.
    while tokio::time::timeout(Duration::from_millis(200), client.write_all(&chunk))
        .await
        .is_ok()
    {
        written += chunk.len();
        assert!(written < 64 << 20, "nothing held the writer back");
    }
    // What was taken is on its way once flushed, although the last write was given up.
    let mut received = 0;
    let mut into = vec![0; 64 << 10];
    let reading = async {
        while received < written {
            received += server.read(&mut into).await.unwrap();
        }
    };
    let ((), flushed) = tokio::join!(reading, client.flush());
    flushed.unwrap();
}
