//! The metrics page over a socket, and clients that misbehave.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::oneshot,
};

use super::*;
use crate::telemetry::series::SeriesLimits;

#[expect(
    clippy::disallowed_methods,
    reason = "the test ends its tasks by itself"
)]
async fn with_server(test: impl AsyncFnOnce(SocketAddr)) {
    let server =
        MetricsServer::bind("127.0.0.1:0".parse().unwrap(), &ListeningSockets::default()).unwrap();
    let address = server.local_addr().unwrap();
    let metrics = Arc::new(Metrics::new(SeriesLimits::default(), "1"));
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(metrics, async {
        let _told_or_dropped = stopped.await;
    }));
    test(address).await;
    stop.send(()).unwrap();
    serving.await.unwrap();
}

async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_are_served_as_openmetrics() {
    with_server(async |address| {
        let answer = exchange(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains(OPENMETRICS), "{answer}");
        assert!(answer.contains("sidestep_build_info{version=\"1\"} 1"));
        assert!(answer.ends_with("# EOF\n"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn what_is_not_there_is_refused() {
    with_server(async |address| {
        for (request, status) in [
            ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
            ("nonsense\r\n\r\n", "400"),
        ] {
            let answer = exchange(address, request).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{answer}"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn silent_clients_do_not_lock_others_out() {
    with_server(async |address| {
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX + 4 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // All places are taken: this waits until a silent one is thrown out.
        let asking = exchange(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
        let answer = tokio::time::timeout(HEADER_TIMEOUT * 4, asking)
            .await
            .unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    })
    .await;
}
