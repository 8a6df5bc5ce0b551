//! Peers that do not keep to the protocol.

use bytes::Bytes;
use hyper::http::{Method, Request};
use rustls_pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use super::*;

/// A good handshake, and then whatever the test says.
async fn shake_hands(pair: &Pair) -> TlsStream<TcpStream> {
    let call = pair.caller.call(pair.address, ECHO).await;
    let tcp = TcpStream::connect(pair.address).await.unwrap();
    let connector = TlsConnector::from(call.tls.hbone_client_config(&call.expected));
    let name = ServerName::try_from(call.server_name).unwrap();
    Box::pin(connector.connect(name, tcp)).await.unwrap()
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame of HTTP/2. Source: RFC 9113, section 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_loses_its_connection_and_nobody_elses() {
    let pair = Pair::new(1).await;
    let mut bystander = pair.open(ECHO).await.unwrap();
    let settings = frame(4, 0, 0, &[]);
    let after = |more: Vec<u8>| [PREFACE, settings.as_slice(), more.as_slice()].concat();
    for (what, sent) in [
        ("HTTP/1", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("no settings", [PREFACE, &frame(0, 0, 1, b"x")].concat()),
        ("data on no stream", after(frame(0, 0, 0, b"x"))),
        ("data on an idle stream", after(frame(0, 0, 7, b"x"))),
        (
            "a frame too large",
            after(frame(0, 0, 1, &vec![0; 70 << 10])),
        ),
        ("an even stream", after(frame(1, 4, 2, &[]))),
        ("headers that never end", {
            let first = frame(1, 0, 1, &[0; 100]);
            let more = (0..100).flat_map(|_| frame(9, 0, 1, &[0; 16 << 10]));
            after(first.into_iter().chain(more).collect())
        }),
        ("a window beyond all bounds", {
            let most = (u32::MAX >> 1).to_be_bytes();
            after([frame(8, 0, 0, &most), frame(8, 0, 0, &most)].concat())
        }),
    ] {
        let mut stranger = shake_hands(&pair).await;
        // It may be closed while we are still sending.
        drop(stranger.write_all(&sent).await);
        drop(stranger.flush().await);
        let mut answer = vec![];
        let closed = tokio::time::timeout(SOON, stranger.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "{what}: not closed");
        exchange(&mut bystander, what.as_bytes()).await;
    }
}

#[tokio::test]
async fn a_client_that_opens_and_resets_without_end_is_stopped() {
    let pair = Pair::new(1).await;
    let stream = shake_hands(&pair).await;
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    pair.caller.shutdown.spawn("stranger", connection);
    let mut requests: h2::client::SendRequest<Bytes> = requests;
    let mut opened = 0;
    let stopped = soon(async {
        loop {
            requests = match requests.ready().await {
                Ok(requests) => requests,
                Err(error) => return error,
            };
            let mut request = Request::new(());
            *request.method_mut() = Method::CONNECT;
            *request.uri_mut() = "192.0.2.1:4".parse().unwrap();
            match requests.send_request(request, false) {
                Ok((_answer, mut send)) => send.send_reset(h2::Reason::CANCEL),
                Err(error) => return error,
            }
            opened += 1;
            assert!(opened < 100_000, "not stopped");
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(opened < 100_000, "{stopped}");
    assert!(pair.echoes().await);
}

#[tokio::test]
async fn a_client_may_leave_out_alpn_but_not_ask_for_something_else() {
    let pair = Pair::new(1).await;
    let call = pair.caller.call(pair.address, ECHO).await;
    for (alpn, is_taken) in [
        (vec![], true),
        (vec![b"http/1.1".to_vec(), b"h2".to_vec()], true),
        (vec![b"http/1.1".to_vec()], false),
    ] {
        let mut config = rustls::ClientConfig::clone(&call.tls.hbone_client_config(&call.expected));
        config.alpn_protocols = alpn.clone();
        let tcp = TcpStream::connect(pair.address).await.unwrap();
        let name = ServerName::try_from(call.server_name.clone()).unwrap();
        let connected = TlsConnector::from(Arc::new(config)).connect(name, tcp);
        let spoken = async {
            let stream = Box::pin(connected).await.ok()?;
            let (mut requests, connection) = h2::client::handshake(stream).await.ok()?;
            pair.caller.shutdown.spawn("stranger", connection);
            let mut request = Request::new(());
            *request.method_mut() = Method::CONNECT;
            *request.uri_mut() = "192.0.2.1:1".parse().unwrap();
            let (answer, _send) = requests.send_request(request, true).ok()?;
            answer.await.ok().map(|answer| answer.status())
        };
        let spoken = soon(Box::pin(spoken)).await;
        assert_eq!(
            spoken == Some(StatusCode::OK),
            is_taken,
            "{alpn:?}: {spoken:?}"
        );
    }
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let pair = Pair::new(1).await;
    let call = pair.caller.call(pair.address, ECHO).await;
    // The tunnel `connect` takes both versions; that server cannot know which one a client insists on.
    let config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS12])
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let tcp = TcpStream::connect(pair.address).await.unwrap();
    let name = ServerName::try_from(call.server_name).unwrap();
    let connected = TlsConnector::from(Arc::new(config)).connect(name, tcp);
    let error = Box::pin(connected).await.unwrap_err().to_string();
    assert!(error.contains("ProtocolVersion"), "{error}");
}

/// A server with a good certificate that speaks as the test says.
async fn server(
    pair: &Pair,
    alpn: bool,
    said: &'static [u8],
) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = pair
        .called
        .certificates
        .for_identity(&id("db"))
        .await
        .unwrap();
    let mut config = rustls::ServerConfig::clone(tls.hbone_server_config());
    if !alpn {
        config.alpn_protocols = vec![];
    }
    let task = pair.called.shutdown.spawn("stranger", async move {
        let tcp = listener.accept().await.unwrap().0;
        let accepted = TlsAcceptor::from(Arc::new(config)).accept(tcp);
        let mut stream = Box::pin(accepted).await.unwrap();
        // It may be closed while we are still sending.
        drop(stream.write_all(said).await);
        drop(stream.flush().await);
        let mut heard = vec![];
        drop(stream.read_to_end(&mut heard).await);
    });
    (address, task)
}

#[tokio::test]
async fn a_server_that_speaks_no_http2_is_an_error_and_not_a_wait() {
    let pair = Pair::new(1).await;
    for (alpn, said, part) in [
        (false, &b""[..], "does not speak HTTP/2"),
        (
            true,
            b"SSH-2.0-OpenSSH_9.2p1 and so on\r\n",
            "HTTP/2 in the tunnel",
        ),
    ] {
        let (address, ended) = server(&pair, alpn, said).await;
        let call = pair.caller.call(address, ECHO).await;
        let error = soon(pair.pool.open(&call)).await.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        soon(ended).await.unwrap();
    }
    assert_eq!(pair.pool.in_use().0, 0);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_left_after_a_while() {
    let pair = Pair::new(1).await;
    let (address, _ended) = server(&pair, true, b"").await;
    let mut call = pair.caller.call(address, ECHO).await;
    call.handshake_timeout = Duration::from_millis(200);
    let error = soon(pair.pool.open(&call)).await.unwrap_err();
    assert!(matches!(error, TunnelError::AnswerTimeout), "{error:?}");
}

#[tokio::test]
async fn a_server_that_answers_no_ping_is_left_with_all_its_streams() {
    let pair = Pair::new(1).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = pair
        .called
        .certificates
        .for_identity(&id("db"))
        .await
        .unwrap();
    let config = Arc::clone(tls.hbone_server_config());
    let (fall_silent, mut silent) = watch::channel(false);
    let _ended = pair.called.shutdown.spawn("stranger", async move {
        let tcp = listener.accept().await.unwrap().0;
        let accepted = TlsAcceptor::from(config).accept(tcp);
        let stream = Box::pin(accepted).await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (_request, mut answer) = connection.accept().await.unwrap().unwrap();
        let answered = answer.send_response(hyper::Response::new(()), false);
        let _send: h2::SendStream<Bytes> = answered.unwrap();
        tokio::select! {
            _ = connection.accept() => panic!("closed before its time"),
            _ = silent.changed() => {}
        }
        // The connection stays, but nobody looks at it.
        std::future::pending::<()>().await;
    });
    let call = pair.caller.call(address, ECHO).await;
    let mut stream = soon(pair.pool.open(&call)).await.unwrap();
    fall_silent.send_replace(true);
    let mut first = [0; 1];
    let mut read = std::pin::pin!(stream.read(&mut first));
    for passed in 0.. {
        assert!(passed < 20, "still open");
        tokio::select! {
            biased;
            end = &mut read => {
                end.unwrap_err();
                break;
            }
            () = life::pass(Duration::from_secs(11)) => {}
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until(|| pair.pool.in_use().0 == 0).await;
}
