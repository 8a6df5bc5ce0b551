//! Upstreams that answer in every way they should not.

use std::future::Future;

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query as Question, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, SOA},
    },
};
use tokio::net::{TcpListener, UdpSocket};

use super::*;
use crate::dns::{Original, testing};

#[test]
fn servers_are_read_as_resolvers_read_them() {
    let text = "# nameserver 192.0.2.9\nsearch a.test\nnameserver 192.0.2.1\n\
                nameserver\t2001:db8::1\nnameserver nonsense\nnameserver 127.0.0.1\nnameserver 192.0.2.4\n";
    let own = ["127.0.0.1:53".parse().unwrap()];
    let servers: Vec<String> = name_servers(text, &own)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
}

#[test]
fn a_changed_resolv_conf_is_followed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let conf = ResolvConf::new(path.clone(), vec![]);
        assert_eq!(conf.servers(), []);
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        tokio::time::advance(LOOK).await;
        assert_eq!(conf.servers(), ["192.0.2.1:53".parse().unwrap()]);
    });
}

const ID: u16 = 0x1234;

fn asking(query_type: RecordType) -> Vec<u8> {
    let mut message = Message::new(ID, MessageType::Query, OpCode::Query);
    let name: Name = "host.example.test.".parse().unwrap();
    message.add_query(Question::query(name, query_type));
    message.to_vec().unwrap()
}

/// The answer to `query` with `count` addresses.
fn answer(query: &[u8], count: u8) -> Message {
    let query = Message::from_vec(query).unwrap();
    let mut message = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    let name = query.queries[0].name.clone();
    message.add_queries(query.queries);
    for n in 0..count {
        let address = RData::A(A::new(192, 0, 2, n));
        message.add_answer(Record::from_rdata(name.clone(), 60, address));
    }
    message
}

/// An upstream over UDP that sends what `answers` makes of each query.
async fn upstream(answers: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    in_background(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
            for answer in answers(&buffer[..length]) {
                socket.send_to(&answer, client).await.unwrap();
            }
        }
    });
    address
}

#[expect(
    clippy::disallowed_methods,
    reason = "ends with the runtime of its test"
)]
fn in_background(task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(task);
}

/// What comes back for `query`.
async fn ask(
    servers: Vec<SocketAddr>,
    query: &[u8],
    transport: Transport,
) -> Result<Vec<Vec<u8>>, ForwardError> {
    let forwarder = Forwarder::new(Upstreams::Configured(servers));
    let (replies, mut answers) = mpsc::channel(16);
    let query = Query {
        message: query,
        transport,
        client: ([127, 0, 0, 1], 40_000).into(),
        original: None,
        drawn: None,
    };
    forwarder.exchange(&query, &replies).await?;
    drop(replies);
    let mut all = vec![];
    while let Some(answer) = answers.recv().await {
        all.push(answer);
    }
    Ok(all)
}

#[tokio::test]
async fn only_the_answer_to_the_question_counts() {
    let server = upstream(|query| {
        let right = answer(query, 2);
        let mut other_id = right.clone();
        other_id.metadata.id ^= 1;
        let mut other_name = answer(query, 3);
        other_name.queries[0].name = "other.example.test.".parse().unwrap();
        let mut no_response = answer(query, 4);
        no_response.metadata.message_type = MessageType::Query;
        let mut no_question = answer(query, 5);
        no_question.queries.clear();
        [other_id, other_name, no_response, no_question, right]
            .map(|message| message.to_vec().unwrap())
            .into()
    });
    let query = asking(RecordType::A);
    let answers = ask(vec![server.await], &query, Transport::Udp)
        .await
        .unwrap();
    // Byte for byte, under the client's id.
    assert_eq!(answers, [answer(&query, 2).to_vec().unwrap()]);
}

#[tokio::test]
async fn an_error_may_leave_the_question_out() {
    let server = upstream(|query| {
        let mut message = answer(query, 0);
        message.queries.clear();
        message.metadata.response_code = ResponseCode::FormErr;
        vec![message.to_vec().unwrap()]
    });
    let answers = ask(vec![server.await], &asking(RecordType::A), Transport::Udp).await;
    let read = Message::from_vec(&answers.unwrap()[0]).unwrap();
    assert_eq!(
        (read.metadata.id, read.metadata.response_code),
        (ID, ResponseCode::FormErr)
    );
}

#[tokio::test]
async fn an_answer_that_is_too_long_becomes_a_cut_one() {
    let server = upstream(|query| vec![answer(query, 100).to_vec().unwrap()]);
    let query = asking(RecordType::A);
    let answers = ask(vec![server.await], &query, Transport::Udp)
        .await
        .unwrap();
    let read = Message::from_vec(&answers[0]).unwrap();
    assert!(answers[0].len() <= 512 && read.metadata.truncation);
    assert_eq!((read.metadata.id, read.answers.len()), (ID, 0));
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_fails() {
    let closed = UdpSocket::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let server = upstream(|query| vec![answer(query, 1).to_vec().unwrap()]).await;
    let query = asking(RecordType::A);
    let answers = ask(vec![closed, server], &query, Transport::Udp)
        .await
        .unwrap();
    assert_eq!(answers, [answer(&query, 1).to_vec().unwrap()]);
    for transport in [Transport::Udp, Transport::Tcp] {
        let error = ask(vec![closed], &query, transport).await.unwrap_err();
        assert!(matches!(error, ForwardError::Exchange { .. }), "{error}");
        let error = ask(vec![], &query, transport).await.unwrap_err();
        assert!(matches!(error, ForwardError::NoUpstream), "{error}");
    }
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let server = upstream(|_query| vec![]).await;
    let begun = Instant::now();
    let error = ask(vec![server], &asking(RecordType::A), Transport::Udp)
        .await
        .unwrap_err();
    assert!(matches!(error, ForwardError::NoAnswer { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_millis(4900));
}

#[tokio::test]
async fn a_zone_passes_in_all_its_messages() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    in_background(async move {
        let (mut stream, _client) = listener.accept().await.unwrap();
        let query = read_message(&mut stream).await.unwrap();
        let soa = || {
            let name: Name = "example.test.".parse().unwrap();
            let soa = SOA::new(name.clone(), name.clone(), 1, 2, 3, 4, 5);
            Record::from_rdata(name, 60, RData::SOA(soa))
        };
        let mut first = answer(&query, 0);
        first.add_answer(soa());
        let middle = answer(&query, 9);
        let mut last = answer(&query, 1);
        last.add_answer(soa());
        for message in [first, middle, last] {
            let framed = framed(&message.to_vec().unwrap()).unwrap();
            stream.write_all(&framed).await.unwrap();
        }
        // The server leaves the connection open: the zone itself says where it ends.
        std::future::pending::<()>().await;
    });
    let answers = ask(vec![server], &asking(RecordType::AXFR), Transport::Tcp)
        .await
        .unwrap();
    let counts: Vec<usize> = answers
        .iter()
        .map(|message| Message::from_vec(message).unwrap().answers.len())
        .collect();
    assert_eq!(counts, [1, 9, 2]);
    assert!(
        answers
            .iter()
            .all(|message| message::id(message) == Some(ID))
    );
}

#[tokio::test]
async fn names_of_a_domain_that_others_answer_for_go_to_them() {
    let of = |n| upstream(move |query| vec![answer(query, n).to_vec().unwrap()]);
    let (upstream, consul) = (of(1).await, of(2).await);
    let forwarder = Forwarder::new(Upstreams::Configured(vec![upstream]))
        .with_domain("consul.".parse().unwrap(), vec![consul]);
    for (name, server, expected) in [
        ("web.node.Consul.", None, 2),
        ("notconsul.", None, 1),
        ("www.example.test.", None, 1),
        // Where it was on its way to is stronger.
        ("web.node.consul.", Some(upstream), 1),
    ] {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Question::query(name.parse().unwrap(), RecordType::A));
        let message = message.to_vec().unwrap();
        let (replies, mut answers) = mpsc::channel(1);
        let share = Slots::new(2).share();
        let original = server.map(|server| testing::captured(server, share));
        let query = Query {
            message: &message,
            transport: Transport::Udp,
            client: ([127, 0, 0, 1], 40_000).into(),
            original: original.as_ref(),
            drawn: None,
        };
        forwarder.exchange(&query, &replies).await.unwrap();
        let answer = Message::from_vec(&answers.recv().await.unwrap()).unwrap();
        assert_eq!(answer.answers.len(), expected, "{name}");
    }
}

/// What becomes of a captured query.
async fn ask_captured(original: &Original, query: &[u8]) -> Result<Brought, ForwardError> {
    let forwarder = Forwarder::new(Upstreams::Configured(vec![]));
    let (replies, _answers) = mpsc::channel(1);
    let query = Query {
        message: query,
        transport: Transport::Udp,
        client: ([127, 0, 0, 1], 40_000).into(),
        original: Some(original),
        drawn: None,
    };
    forwarder.exchange(&query, &replies).await
}

#[tokio::test]
async fn who_floods_a_silent_server_leaves_others_their_share() {
    const FLOOD: usize = 50;
    let silent = upstream(|_query| vec![]).await;
    let server = upstream(|query| vec![answer(query, 1).to_vec().unwrap()]).await;
    let slots = Slots::new(20);
    let query = asking(RecordType::A);
    let flooding = Arc::new(testing::captured(silent, slots.share()));
    let (refused, mut refusals) = mpsc::channel(FLOOD);
    for _ in 0..FLOOD {
        let (flooding, query) = (Arc::clone(&flooding), query.clone());
        let refused = refused.clone();
        in_background(async move {
            let error = ask_captured(&flooding, &query).await.unwrap_err();
            if matches!(error, ForwardError::TooMany) {
                refused.send(()).await.unwrap();
            }
        });
    }
    // Half of what there is waits for the silent server, and no more.
    for _ in 0..FLOOD - 10 {
        refusals.recv().await.unwrap();
    }
    let brought = Brought {
        server,
        code: ResponseCode::NoError,
    };
    let other = testing::captured(server, slots.share());
    for _ in 0..FLOOD {
        assert_eq!(ask_captured(&other, &query).await.unwrap(), brought);
    }
    let error = ask_captured(&flooding, &query).await.unwrap_err();
    assert!(matches!(error, ForwardError::TooMany), "{error}");
    assert!(refusals.try_recv().is_err());
}
