//! The API through its own client, and what may be in the socket's place.

use std::os::unix::fs::PermissionsExt as _;
use std::{collections::BTreeMap, time::Duration};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    super::{
        client::{self, ClientError},
        status::{AuthorityStatus, CatalogStatus, ConnectionCounts, HeartbeatStatus},
    },
    *,
};
use crate::telemetry::{http::OPENMETRICS, timestamp::Timestamp};

#[derive(Default)]
struct Fake {
    log: Mutex<Vec<String>>,
}

fn example() -> Status {
    Status {
        version: "0.1.0".to_owned(),
        process: 1,
        predecessor: None,
        effects: vec![],
        heartbeat: HeartbeatStatus {
            hung_after_ms: Some(3000),
            longest_gap_ms: 201,
            hangs: 0,
        },
        hand_over: BTreeMap::from([("published".to_owned(), 7)]),
        node: "a".to_owned(),
        started_at: Timestamp(std::time::UNIX_EPOCH + Duration::from_millis(1_790_000_000_500)),
        uptime_seconds: 60,
        draining: false,
        kernel: "6.18.0".to_owned(),
        capture_mode: "ebpf".to_owned(),
        attachments: vec![],
        capture: BTreeMap::from([("rewritten".to_owned(), 3)]),
        queries: None,
        catalog: CatalogStatus {
            version: 2,
            kernel_version: 2,
            services: 3,
            instances: 4,
            age_seconds: 5,
            problems: vec!["web.hcl: line 3: expected }".to_owned()],
        },
        consul: None,
        services: vec![],
        authority: AuthorityStatus {
            subject: "CN=Sidestep CA 5ca1ab1e a".to_owned(),
            not_after: Timestamp(std::time::UNIX_EPOCH + Duration::from_secs(1_800_000_000)),
            roots: vec!["CN=Sidestep CA 00c0ffee root".to_owned()],
            problem: None,
        },
        certificates: vec![],
        connections: ConnectionCounts::default(),
        listeners: vec![],
        workloads: vec![],
    }
}

impl StatusSource for Fake {
    fn status(&self) -> Status {
        example()
    }

    fn connections(&self) -> Vec<ConnectionStatus> {
        let one = |id| ConnectionStatus {
            id,
            direction: "outbound".to_owned(),
            source: Some("spiffe://td/ns/default/dc/dc1/svc/web".to_owned()),
            destination: Some("db".to_owned()),
            instance: None,
            started: Timestamp::now(),
            bytes_sent: 1,
            bytes_received: 2,
        };
        (0..50_000).map(one).collect()
    }

    fn decide(&self, source: &ServiceName, destination: &ServiceName) -> IntentionStatus {
        IntentionStatus {
            allowed: source.as_str() == "web",
            reason: format!("{source} => {destination}"),
            entry: None,
        }
    }

    fn metrics(&self) -> String {
        "# EOF\n".to_owned()
    }

    fn upgrade(&self) -> io::Result<u32> {
        Err(io::Error::other("no next agent"))
    }

    fn set_log(&self, directives: &str) -> Result<(), LogError> {
        self.log.lock().push(directives.to_owned());
        Ok(())
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the test ends its tasks by itself"
)]
async fn with_server(test: impl AsyncFnOnce(&Path, &Fake)) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("run/sidestep/admin.sock");
    let server = AdminServer::bind(&socket, Existing::Refuse).await.unwrap();
    let source = Arc::new(Fake::default());
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(Arc::<Fake>::clone(&source), async {
        let _told_or_dropped = stopped.await;
    }));
    test(&socket, &source).await;
    stop.send(()).unwrap();
    serving.await.unwrap();
    assert!(!socket.exists(), "the socket is left behind");
}

#[tokio::test]
async fn status_survives_the_way() {
    with_server(async |socket, _| {
        let body = client::get(socket, "/status").await.unwrap();
        let status: Status = serde_json::from_slice(&body).unwrap();
        assert_eq!(status, example());
    })
    .await;
}

#[tokio::test]
async fn an_intention_is_asked_for_by_both_names() {
    with_server(async |socket, _| {
        let path = "/intention?source=web&destination=db-1.x_y";
        let body = client::get(socket, path).await.unwrap();
        let decided: IntentionStatus = serde_json::from_slice(&body).unwrap();
        assert!(decided.allowed);
        assert_eq!(decided.reason, "web => db-1.x_y");
        for wrong in ["", "?source=web", "?source=w%20b&destination=db"] {
            let asked = client::get(socket, &format!("/intention{wrong}")).await;
            assert!(
                matches!(&asked, Err(ClientError::Refused { status, .. }) if *status == StatusCode::BAD_REQUEST),
                "{wrong:?}: {asked:?}"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn long_lists_come_whole() {
    with_server(async |socket, _| {
        let body = client::get(socket, "/connections").await.unwrap();
        let list: Vec<ConnectionStatus> = serde_json::from_slice(&body).unwrap();
        assert_eq!(list.len(), 50_000);
        let page = client::get(socket, "/metrics").await.unwrap();
        assert_eq!(page, "# EOF\n", "{OPENMETRICS}");
    })
    .await;
}

#[tokio::test]
async fn log_level_is_passed_on() {
    with_server(async |socket, source| {
        client::put(socket, "/log?level=info,sidestep::relay=debug")
            .await
            .unwrap();
        assert_eq!(*source.log.lock(), ["info,sidestep::relay=debug"]);
    })
    .await;
}

#[tokio::test]
async fn what_is_not_understood_is_refused() {
    with_server(async |socket, _| {
        let refusal = |result: Result<_, ClientError>| {
            let error = result.unwrap_err();
            let ClientError::Refused { status, .. } = error else {
                panic!("{error}");
            };
            status.as_u16()
        };
        assert_eq!(refusal(client::get(socket, "/nothing").await), 404);
        assert_eq!(refusal(client::put(socket, "/status").await), 405);
        assert_eq!(refusal(client::put(socket, "/log").await), 400);
    })
    .await;
}

#[tokio::test]
async fn only_root_and_its_group_reach_the_socket() {
    with_server(async |socket, _| {
        let mode = fs::metadata(socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, MODE);
    })
    .await;
}

#[tokio::test]
async fn running_agent_keeps_its_socket() {
    with_server(async |socket, _| {
        let error = AdminServer::bind(socket, Existing::Refuse)
            .await
            .unwrap_err();
        assert!(matches!(error, AdminError::InUse { .. }), "{error}");
        client::get(socket, "/status").await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn socket_of_a_killed_agent_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let server = AdminServer::bind(&socket, Existing::Refuse).await.unwrap();
    // Made of one name and moved: nothing else is left in the directory.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    drop(server);
    assert!(!socket.exists());
}

#[tokio::test]
async fn other_files_are_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    fs::write(&path, "precious").unwrap();
    let error = AdminServer::bind(&path, Existing::Refuse)
        .await
        .unwrap_err();
    assert!(matches!(error, AdminError::NotASocket { .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn agent_that_is_not_there_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let error = client::get(&socket, "/status").await.unwrap_err();
    assert!(error.to_string().contains("none.sock"), "{error}");
}
