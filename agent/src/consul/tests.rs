//! The client and watches against a scripted Consul, and against the real one.

use std::{collections::VecDeque, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    time::timeout,
};

use super::{
    answers::{HealthEntry, List},
    judge::Doubt,
    position::{PaceLimits, Position},
    testing::{RealConsul, register, with_sidecar},
    *,
};
use crate::{lifecycle::Shutdown, telemetry::log::chain};

/// Answers one request after the other with what the test wrote down; keeps what was asked.
struct Script {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Script {
    fn new(answers: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let seen = Arc::clone(&asked);
        let mut answers: VecDeque<String> = answers.iter().map(|text| (*text).to_owned()).collect();
        let shutdown = Shutdown::default();
        shutdown.spawn("script", async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                while answer_one(&mut stream, &seen, &mut answers).await {}
            }
        });
        Self {
            _directory: directory,
            socket,
            asked,
        }
    }

    fn client(&self) -> Client {
        let address = ConsulAddress::Unix(self.socket.clone());
        Client::new(ClientSettings::anonymous(address))
    }

    fn watch(&self) -> Watch<List<u32>> {
        let settings = WatchSettings {
            pace: PaceLimits {
                pause_min: Duration::from_millis(1),
                ..PaceLimits::default()
            },
            ..WatchSettings::default()
        };
        Watch::new(self.client(), Request::to(&["v1", "x"]), settings)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }
}

/// Whether the connection goes on.
async fn answer_one(
    stream: &mut tokio::net::UnixStream,
    seen: &Mutex<Vec<String>>,
    answers: &mut VecDeque<String>,
) -> bool {
    let Some(request) = head(stream).await else {
        return false;
    };
    let line = request.lines().next().unwrap_or_default().to_owned();
    seen.lock().push(line);
    let Some(answer) = answers.pop_front() else {
        return std::future::pending().await;
    };
    stream.write_all(answer.as_bytes()).await.unwrap();
    !answer.contains("close")
}

async fn head(stream: &mut tokio::net::UnixStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}

fn ok(index: u64, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\nX-Consul-Index: {index}\r\nX-Consul-Knownleader: true\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

fn error(status: u16, text: &str) -> String {
    let length = text.len();
    format!("HTTP/1.1 {status} No\r\nX-Consul-Index: 1\r\nContent-Length: {length}\r\n\r\n{text}")
}

fn changed<T>(event: Event<T>) -> Arc<T> {
    match event {
        Event::Changed(answer) => answer.body,
        Event::Doubtful(doubt) => panic!("{doubt}"),
        Event::Failed(error) => panic!("{}", chain(&error)),
    }
}

#[tokio::test]
async fn an_error_with_an_index_is_asked_again_without_one() {
    let script = Script::new(&[
        &ok(7, "[1]"),
        &error(500, "rpc error making call: EOF"),
        &ok(7, "[1]"),
        &ok(8, "[1,2]"),
    ]);
    let mut watch = script.watch();
    assert_eq!(changed(watch.next().await).0, [1]);
    assert!(matches!(watch.next().await, Event::Failed(_)));
    assert!(watch.status().lock().problem.is_some());
    // The third answer says what is known: no event.
    assert_eq!(changed(watch.next().await).0, [1, 2]);
    assert_eq!(watch.status().lock().problem, None);
    assert_eq!(
        script.asked(),
        [
            "GET /v1/x?stale= HTTP/1.1",
            "GET /v1/x?wait=1000ms&index=7&stale= HTTP/1.1",
            "GET /v1/x?stale= HTTP/1.1",
            "GET /v1/x?wait=1000ms&index=7&stale= HTTP/1.1",
        ]
    );
}

#[tokio::test]
async fn an_index_far_ahead_is_not_waited_on_before_it_is_confirmed() {
    let script = Script::new(&[
        &ok(7, "[1]"),
        &ok(8, "[1,2]"),
        &ok(999_999_999, "[1]"),
        // What a query that ran out is answered with: the index that Consul has.
        &ok(9, "[1]"),
        &ok(10, "[]"),
    ]);
    let mut watch = script.watch();
    assert_eq!(changed(watch.next().await).0, [1]);
    assert_eq!(changed(watch.next().await).0, [1, 2]);
    assert_eq!(changed(watch.next().await).0, [1]);
    assert_eq!(changed(watch.next().await).0, [0_u32; 0]);
    assert_eq!(
        script.asked(),
        [
            "GET /v1/x?stale= HTTP/1.1",
            "GET /v1/x?wait=1000ms&index=7&stale= HTTP/1.1",
            "GET /v1/x?wait=300000ms&index=8&stale= HTTP/1.1",
            "GET /v1/x?wait=1000ms&index=999999999&stale= HTTP/1.1",
            "GET /v1/x HTTP/1.1",
        ]
    );
}

#[tokio::test]
async fn what_a_server_that_lags_says_is_asked_of_the_leader() {
    let script = Script::new(&[
        &ok(7, "[1]"),
        &error(500, "rpc error making call: EOF"),
        // A server that has just begun, and has not yet read all that it wrote down before.
        &ok(3, "[]"),
        &ok(7, "[1]"),
        &ok(8, "[1,2]"),
    ]);
    let mut watch = script.watch();
    assert_eq!(changed(watch.next().await).0, [1]);
    assert!(matches!(watch.next().await, Event::Failed(_)));
    assert_eq!(changed(watch.next().await).0, [1, 2]);
    assert_eq!(
        script.asked(),
        [
            "GET /v1/x?stale= HTTP/1.1",
            "GET /v1/x?wait=1000ms&index=7&stale= HTTP/1.1",
            "GET /v1/x?stale= HTTP/1.1",
            "GET /v1/x HTTP/1.1",
            "GET /v1/x?wait=1000ms&index=7&stale= HTTP/1.1",
        ]
    );
}

#[tokio::test]
async fn an_index_that_went_back_for_the_leader_too_is_followed() {
    let script = Script::new(&[&ok(7, "[1]"), &ok(3, "[2]"), &ok(3, "[2]")]);
    let mut watch = script.watch();
    assert_eq!(changed(watch.next().await).0, [1]);
    assert_eq!(changed(watch.next().await).0, [2]);
}

#[tokio::test]
async fn after_an_answer_without_a_leader_the_leader_is_asked() {
    let lost = "HTTP/1.1 200 OK\r\nX-Consul-Index: 1\r\nX-Consul-Knownleader: false\r\nContent-Length: 2\r\n\r\n[]";
    let script = Script::new(&[&ok(7, "[1]"), lost, &ok(9, "[]")]);
    let mut watch = script.watch();
    assert_eq!(changed(watch.next().await).0, [1]);
    assert!(matches!(
        watch.next().await,
        Event::Doubtful(Doubt::LostRights)
    ));
    assert_eq!(changed(watch.next().await).0, [0_u32; 0]);
    assert_eq!(script.asked().last().unwrap(), "GET /v1/x HTTP/1.1");
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_is_replaced() {
    let close = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[]";
    let script = Script::new(&[&ok(7, "[1]"), close, &ok(9, "[2]")]);
    let client = script.client();
    for _ in 0..3 {
        let request = Request::to(&["v1", "x"]);
        client.get::<List<u32>>(&request).await.unwrap();
    }
    assert_eq!(script.asked().len(), 3);
}

#[tokio::test]
async fn errors_say_what_was_tried_where_and_what_to_do() {
    let script = Script::new(&[
        &error(403, "ACL not found"),
        &error(500, "invalid config entry kind: mesh"),
        &ok(1, "{\"a\":1}"),
    ]);
    let client = script.client();
    let at = format!("GET /v1/x at unix://{}: ", script.socket.display());
    let request = Request::to(&["v1", "x"]);
    let get = || client.get::<List<u32>>(&request);
    let error = get().await.unwrap_err();
    assert!(error.is_refused());
    let advice = "Consul answers 403: ACL not found; the token in consul.token_file is not known to Consul (any more)";
    assert_eq!(error.to_string(), format!("{at}{advice}"));
    assert!(get().await.unwrap_err().is_unknown_kind());
    let error = chain(&get().await.unwrap_err()).to_string();
    assert!(error.contains("is this Consul's HTTP API?"), "{error}");
    let nowhere = Client::new(ClientSettings::anonymous(ConsulAddress::Unix(
        "/nowhere".into(),
    )));
    let error = nowhere.get::<List<u32>>(&request).await.unwrap_err();
    assert!(matches!(error, ConsulError::Connect { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_stalls_is_not_waited_for_as_a_change_is() {
    let stalled = "HTTP/1.1 200 OK\r\nX-Consul-Index: 9\r\nContent-Length: 200\r\n\r\n[1,";
    let script = Script::new(&[&ok(7, "[1]"), &ok(8, "[2]"), stalled]);
    let mut watch = script.watch();
    changed(watch.next().await);
    changed(watch.next().await);
    let asked_at = tokio::time::Instant::now();
    let Event::Failed(error) = watch.next().await else {
        panic!("half an answer was taken");
    };
    assert!(matches!(error, ConsulError::Timeout { .. }), "{error}");
    assert!(asked_at.elapsed() < Duration::from_secs(60));
}

fn health(name: &str) -> Request {
    Request::to(&["v1", "health", "connect", name])
}

#[tokio::test]
async fn real_changes_arrive_and_an_index_of_the_future_is_left() {
    let Some(consul) = RealConsul::start(json!({})).await else {
        return;
    };
    let client = consul.client();
    let mut watch = Watch::<List<HealthEntry>>::new(
        client.clone(),
        health("db"),
        WatchSettings {
            wait: Duration::from_secs(2),
            ..WatchSettings::default()
        },
    );
    assert!(changed(watch.next().await).0.is_empty());
    // Waits first, then is told.
    let registered = async {
        tokio::task::yield_now().await;
        register(&client, &with_sidecar("db", 5432, 21000)).await;
        tokio::time::Instant::now()
    };
    let (found, at) = tokio::join!(
        async { (changed(watch.next().await), tokio::time::Instant::now()) },
        registered
    );
    assert_eq!(found.0.0[0].service.proxy.destination_service_id, "db-1");
    println!("change seen after {:?}", found.1 - at);
    // An index that this Consul never had: it waits all the time and answers with a lower one.
    watch.set_position(Position::Index(999_999));
    let gone = Request::to(&["v1", "agent", "service", "deregister", "db-1"]);
    let (seen, removed) = tokio::join!(
        async {
            // What is seen first may be older than the change.
            let mut seen = changed(watch.next().await);
            while !seen.0.is_empty() {
                seen = changed(watch.next().await);
            }
            seen
        },
        client.put_nothing(&gone),
    );
    removed.unwrap();
    assert!(seen.0.is_empty());
    // Selectors that do not exist: status 500 and index 1.
    let wrong = health("db").with("filter", "Bad == 1");
    let mut watch =
        Watch::<List<HealthEntry>>::new(client.clone(), wrong, WatchSettings::default());
    let Event::Failed(error) = watch.next().await else {
        panic!("a bad filter was answered");
    };
    assert!(error.to_string().contains("answers 500"), "{error}");
    assert!(matches!(watch.next().await, Event::Failed(_)));
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Policy {
    #[serde(rename = "ID")]
    id: String,
    name: String,
}

#[tokio::test]
async fn real_answers_to_a_token_without_rights_do_not_empty_anything() {
    let acl = json!({"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "root-token"}}});
    let Some(consul) = RealConsul::start(acl).await else {
        return;
    };
    let root = consul.client_with("root", "root-token");
    let policies = Request::to(&["v1", "acl", "policy"]);
    let policy = json!({"Name": "p", "Rules": "service_prefix \"\" {policy=\"read\"}\nnode_prefix \"\" {policy=\"read\"}"});
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while let Err(error) = root.put(&policies, &policy).await {
        assert!(tokio::time::Instant::now() < deadline, "{}", chain(&error));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    register(&root, &with_sidecar("db", 5432, 21000)).await;
    let token =
        json!({"SecretID": "11111111-2222-3333-4444-555555555555", "Policies": [{"Name": "p"}]});
    root.put(&Request::to(&["v1", "acl", "token"]), &token)
        .await
        .unwrap();
    let client = consul.client_with("token", "11111111-2222-3333-4444-555555555555");
    let mut watch =
        Watch::<List<HealthEntry>>::new(client.clone(), health("db"), WatchSettings::default());
    while changed(watch.next().await).0.is_empty() {}
    // Its policy loses the right: the answer is empty, index 1, no leader known.
    let none = json!({"Name": "p", "Rules": "node_prefix \"\" {policy=\"read\"}"});
    let all = root
        .get::<Vec<Policy>>(&Request::to(&["v1", "acl", "policies"]))
        .await
        .unwrap();
    let id = &all
        .body
        .iter()
        .find(|policy| policy.name == "p")
        .unwrap()
        .id;
    root.put(&Request::to(&["v1", "acl", "policy", id]), &none)
        .await
        .unwrap();
    let lost = async {
        loop {
            // The next answer, by a change of what is watched.
            register(&root, &with_sidecar("db", 5433, 21000)).await;
            let event = timeout(Duration::from_millis(500), watch.next()).await;
            match event {
                Ok(Event::Doubtful(Doubt::LostRights)) => return,
                Ok(Event::Changed(answer)) => assert!(!answer.body.0.is_empty()),
                Ok(Event::Doubtful(_) | Event::Failed(_)) | Err(_) => {}
            }
        }
    };
    timeout(Duration::from_secs(60), lost).await.unwrap();
    assert!(!watch.last().unwrap().body.0.is_empty());
    // Anonymous: the same answer from the beginning.
    let mut stranger =
        Watch::<List<HealthEntry>>::new(consul.client(), health("db"), WatchSettings::default());
    assert!(matches!(
        stranger.next().await,
        Event::Doubtful(Doubt::LostRights)
    ));
    // A token that does not exist is told so.
    let mut unknown = Watch::<List<HealthEntry>>::new(
        consul.client_with("unknown", "99999999-2222-3333-4444-555555555555"),
        health("db"),
        WatchSettings::default(),
    );
    let Event::Failed(error) = unknown.next().await else {
        panic!("an unknown token was served");
    };
    assert!(error.is_refused(), "{error}");
}
