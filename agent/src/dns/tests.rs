//! Queries as bytes in, answers as bytes out.

use std::sync::LazyLock;

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, Query as Question},
    rr::{Name, RecordType},
};
use proptest::prelude::*;

use super::{forward::Upstreams, zone::ServiceAnswers, *};

const CLIENT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 40_000);

fn resolver() -> &'static Resolver {
    static RESOLVER: LazyLock<Resolver> = LazyLock::new(|| {
        testing::resolver(ServiceAnswers::Instances, Upstreams::Configured(vec![]))
    });
    &RESOLVER
}

fn query(message: &[u8], transport: Transport) -> Query<'_> {
    Query {
        message,
        transport,
        client: CLIENT,
        original: None,
        drawn: None,
    }
}

fn asking(name: &str, query_type: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let name = Name::from_ascii(name).unwrap();
    message.add_query(Question::query(name, query_type));
    message
}

fn decided(resolver: &Resolver, message: &Message, transport: Transport) -> Message {
    let bytes = message.to_vec().unwrap();
    match resolver.decide(&query(&bytes, transport)) {
        Step::Answer(answer) => Message::from_vec(&answer).unwrap(),
        other @ (Step::Forward | Step::Ignore) => panic!("{other:?}"),
    }
}

#[test]
fn an_answer_repeats_id_flags_and_question() {
    let answer = decided(
        resolver(),
        &asking("wEb.ViRtual.Consul.", RecordType::A),
        Transport::Udp,
    );
    let Metadata {
        id,
        message_type,
        authoritative,
        recursion_desired,
        recursion_available,
        ..
    } = answer.metadata;
    assert_eq!((id, message_type), (77, MessageType::Response));
    // Without upstreams, other names are not looked up.
    assert!(authoritative && recursion_desired && !recursion_available);
    assert_eq!(answer.queries[0].name.to_ascii(), "wEb.ViRtual.Consul.");
    assert_eq!(answer.answers[0].name.to_ascii(), "wEb.ViRtual.Consul.");
    assert_eq!(answer.edns, None);
}

#[test]
fn what_is_not_done_here_is_said_properly() {
    let resolver = resolver();
    let code = |change: fn(&mut Message)| {
        let mut message = asking("web.virtual.consul.", RecordType::A);
        change(&mut message);
        decided(resolver, &message, Transport::Udp)
            .metadata
            .response_code
    };
    assert_eq!(
        code(|m| m.queries[0].query_class = DNSClass::CH),
        ResponseCode::Refused
    );
    assert_eq!(
        code(|m| m.queries[0].query_class = DNSClass::ANY),
        ResponseCode::Refused
    );
    assert_eq!(
        code(|m| m.metadata.op_code = OpCode::Notify),
        ResponseCode::NotImp
    );
    assert_eq!(
        code(|m| m.metadata.op_code = OpCode::Update),
        ResponseCode::NotImp
    );
    let second = |m: &mut Message| {
        let again = m.queries[0].clone();
        m.add_query(again);
    };
    assert_eq!(code(second), ResponseCode::FormErr);
    let version = |m: &mut Message| {
        let mut edns = Edns::new();
        edns.set_version(1);
        m.set_edns(edns);
    };
    // 16, which another code has as well.
    assert_eq!(u16::from(code(version)), u16::from(ResponseCode::BADVERS));
}

#[test]
fn what_is_not_ours_is_forwarded_whatever_it_is() {
    let resolver = resolver();
    for (name, op_code) in [
        ("example.org.", OpCode::Query),
        (".", OpCode::Query),
        ("example.org.", OpCode::Update),
    ] {
        let mut message = asking(name, RecordType::A);
        message.metadata.op_code = op_code;
        let bytes = message.to_vec().unwrap();
        assert_eq!(
            resolver.decide(&query(&bytes, Transport::Udp)),
            Step::Forward
        );
        // What is behind the question is not even looked at.
        let cut = [&bytes[..], &[1, 2, 3]].concat();
        assert_eq!(resolver.decide(&query(&cut, Transport::Udp)), Step::Forward);
    }
}

#[test]
fn responses_and_scraps_get_no_answer() {
    let resolver = resolver();
    let mut message = asking("web.virtual.consul.", RecordType::A);
    message.metadata.message_type = MessageType::Response;
    for bytes in [&message.to_vec().unwrap()[..], &[], &[0; 11]] {
        assert_eq!(resolver.decide(&query(bytes, Transport::Udp)), Step::Ignore);
    }
}

#[test]
fn answers_over_udp_are_no_larger_than_the_client_takes() {
    let resolver = testing::large_resolver(200);
    let sizes = |edns: Option<u16>, transport| {
        let mut message = asking("many.service.consul.", RecordType::A);
        if let Some(size) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(size).set_dnssec_ok(true);
            message.set_edns(edns);
        }
        let bytes = message.to_vec().unwrap();
        let Step::Answer(answer) = resolver.decide(&query(&bytes, transport)) else {
            panic!("no answer");
        };
        let read = Message::from_vec(&answer).unwrap();
        let edns = read
            .edns
            .as_ref()
            .map(|e| (e.max_payload(), e.flags().dnssec_ok));
        (
            answer.len(),
            read.metadata.truncation,
            read.answers.len(),
            edns,
        )
    };
    let (length, truncated, answers, edns) = sizes(None, Transport::Udp);
    assert!(
        length <= 512 && truncated && answers > 20,
        "{length} {answers}"
    );
    assert_eq!(edns, None);
    let (length, truncated, answers, edns) = sizes(Some(4096), Transport::Udp);
    assert!(
        length <= 1232 && truncated && answers > 70,
        "{length} {answers}"
    );
    assert_eq!(edns, Some((1232, true)));
    let (_, truncated, answers, _) = sizes(None, Transport::Tcp);
    assert_eq!((truncated, answers), (false, 200));
}

#[test]
fn additional_records_are_left_out_before_an_answer_is_cut() {
    let resolver = testing::large_resolver(9);
    let message = asking("many.service.consul.", RecordType::SRV);
    let over_udp = decided(&resolver, &message, Transport::Udp);
    assert!(!over_udp.metadata.truncation);
    assert_eq!((over_udp.answers.len(), over_udp.additionals.len()), (9, 0));
    let over_tcp = decided(&resolver, &message, Transport::Tcp);
    assert_eq!((over_tcp.answers.len(), over_tcp.additionals.len()), (9, 9));
}

/// A label of bytes as they come, half of them words that mean something.
fn label() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        "web", "WEB", "db", "service", "virtual", "connect", "node", "addr", "_web", "_tcp", "dc1",
        "dc", "ns", "v1", "a", "c0000201", "240", "0", "consul",
    ]);
    prop_oneof![
        word.prop_map(|word| word.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 1..20),
    ]
}

proptest! {
    #[test]
    fn answers_are_to_what_was_asked(
        labels in prop::collection::vec(label(), 0..7),
        ending in prop::sample::select(vec!["consul.", "CoNsul.", "in-addr.arpa.", "org."]),
        query_type: u16, class in prop::sample::select(vec![1_u16, 1, 1, 3, 255]),
        id: u16, size in prop::option::of(any::<u16>()),
    ) {
        let resolver = resolver();
        let name = Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap();
        let name = name.append_domain(&ending.parse().unwrap()).unwrap();
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        let mut question = Question::query(name.clone(), RecordType::from(query_type % 300));
        question.query_class = DNSClass::from(class);
        message.add_query(question);
        if let Some(size) = size {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            message.set_edns(edns);
        }
        let bytes = message.to_vec().unwrap();
        match resolver.decide(&query(&bytes, Transport::Udp)) {
            Step::Answer(answer) => {
                prop_assert_ne!(ending, "org.");
                prop_assert_eq!(message::question_bytes(&answer), message::question_bytes(&bytes));
                prop_assert_eq!(message::id(&answer), Some(id));
                prop_assert!(message::is_response(&answer));
                prop_assert!(answer.len() <= usize::from(size.unwrap_or(512).clamp(512, 1232)));
            }
            Step::Forward => prop_assert!(!ending.eq_ignore_ascii_case("consul.")),
            Step::Ignore => prop_assert!(false, "ignored"),
        }
    }

    #[test]
    fn any_bytes_are_borne(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let resolver = resolver();
        for transport in [Transport::Udp, Transport::Tcp] {
            if let Step::Answer(answer) = resolver.decide(&query(&bytes, transport)) {
                prop_assert!(message::is_response(&answer));
                prop_assert_eq!(message::id(&answer), message::id(&bytes));
            }
        }
    }
}
