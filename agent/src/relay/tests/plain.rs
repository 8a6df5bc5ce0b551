//! Bulk between two plain sockets, which goes through pipes.

use super::{super::pipe::Pipe, *};

/// A socket that is not plain, as if it sealed what it carries.
struct Sealing(TcpStream);

impl Endpoint for Sealing {
    fn abort(&mut self) {
        self.0.abort();
    }
}

impl AsyncRead for Sealing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Sealing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Bulk both ways at once, relayed to an upstream that `seals` or not; returns how many pipes the thread keeps after.
async fn pipes_after_bulk(seals: bool) -> usize {
    const TOTAL: usize = 8 << 20;
    let (client, mut downstream) = tcp_pair().await;
    let (mut upstream, server) = tcp_pair().await;
    let counts = Counts::default();
    let carried = async {
        if seals {
            let mut upstream = Sealing(upstream);
            relay(&mut downstream, &mut upstream, &counts, None, pending()).await
        } else {
            relay(&mut downstream, &mut upstream, &counts, None, pending()).await
        }
    };
    let pumps = async { tokio::join!(pump(client, 1, TOTAL), pump(server, 2, TOTAL)) };
    let both = async { tokio::join!(carried, pumps) };
    let (end, (client, server)) = timeout(SOON, Box::pin(both)).await.unwrap();
    assert!(matches!(end, End::Finished), "{end:?}");
    assert_eq!(client.sent, server.received);
    assert_eq!(server.sent, client.received);
    Pipe::kept()
}

#[tokio::test]
async fn bulk_between_plain_sockets_goes_through_pipes_that_are_given_back() {
    assert_eq!(pipes_after_bulk(true).await, 0);
    let kept = pipes_after_bulk(false).await;
    assert!((1..=2).contains(&kept), "{kept}");
}

#[tokio::test]
async fn a_reset_after_bulk_is_a_reset() {
    const PART: usize = 4 << 20;
    let Ends {
        mut client,
        mut server,
        relay,
        ..
    } = over_tcp(None, pending()).await;
    let bytes = vec![1; PART];
    let mut received = vec![0; PART];
    let (sent, _read) = tokio::join!(client.write_all(&bytes), server.read_exact(&mut received));
    sent.unwrap();
    reset(client);
    let read = timeout(SOON, read_rest(&mut server)).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let end = Ends::<TcpStream>::end(relay).await;
    assert!(matches!(end, End::DownstreamReset(_)), "{end:?}");
}
