//! Which queries have a line, and that no query makes anything else of it.

use std::{fs, path::Path};

use hickory_proto::op::{Message, MessageType, OpCode, Query as Question};
use proptest::prelude::*;
use tokio::sync::mpsc;

use super::*;
use crate::{
    config::{WorkloadConfig, WorkloadRule},
    datapath::{CgroupId, Maker, NetnsCookie},
    dns::{
        Resolver, Step, Transport, fair::Slots, forward::Upstreams, testing, zone::ServiceAnswers,
    },
    telemetry::{
        access_log::{Destination, LineFormat},
        metrics::DroppedLines,
    },
};

const SOON: Duration = Duration::from_secs(20);

/// The documentation of the log.
const PAGE: &str = include_str!("../../../../docs/dns.md");

#[test]
fn a_share_of_the_queries_is_drawn_and_always_the_same() {
    let drawn = |share| {
        let sampling = Sampling::new(share).unwrap();
        let numbers = 0..100_000_u64;
        numbers.filter(|n| sampling.has(*n)).collect::<Vec<_>>()
    };
    assert_eq!(drawn(0.0).len(), 0);
    assert_eq!(drawn(1.0).len(), 100_000);
    let some = drawn(0.01);
    assert!(some.len().abs_diff(1000) < 150, "{}", some.len());
    assert_eq!(some, drawn(0.01));
    // Not only every second query, whatever those are.
    let odd = drawn(0.5).iter().filter(|n| **n % 2 == 1).count();
    assert!(odd.abs_diff(25_000) < 1000, "{odd}");
    assert!(!Sampling::new(1e-12).unwrap().is_none());
    for wrong in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        assert_eq!(Sampling::new(wrong), None, "{wrong}");
    }
}

/// A resolver that logs, and where.
struct Logged {
    directory: tempfile::TempDir,
    lines: Arc<AccessLog>,
    resolver: Resolver,
}

fn logged(share: f64, format: LineFormat) -> Logged {
    let directory = tempfile::tempdir().unwrap();
    let destination = Destination::File(directory.path().join("log"));
    let lines = AccessLog::start(&destination, format, DroppedLines::default()).unwrap();
    let lines = Arc::new(lines);
    let file = Path::new("/run/netns/box");
    let shop = WorkloadConfig {
        service: "shop".parse().unwrap(),
        instance: None,
        rule: WorkloadRule::Netns(file.to_owned()),
    };
    let workloads = WorkloadResolver::new(&[shop], |_cgroup: CgroupId| None).unwrap();
    assert!(workloads.enrol_namespace(file, NetnsCookie(7)));
    let log = QueryLog::new(Sampling::new(share).unwrap(), Arc::clone(&lines));
    let log = log.with_workloads(Arc::new(workloads));
    let nowhere = Upstreams::Configured(vec![]);
    let resolver = testing::resolver(ServiceAnswers::Virtual, nowhere).with_log(log);
    Logged {
        directory,
        lines,
        resolver,
    }
}

impl Logged {
    /// The lines after `ask` was called with each of `messages`.
    async fn lines_of(&self, messages: &[&[u8]], original: Option<&Original>) -> Vec<String> {
        for message in messages {
            let query = Query {
                message,
                transport: Transport::Udp,
                client: ([127, 0, 0, 1], 40_000).into(),
                original,
                drawn: self.resolver.draw(),
            };
            if self.resolver.decide(&query) == Step::Forward {
                let (replies, _answers) = mpsc::channel(1);
                self.resolver.forward(&query, &replies).await;
            }
        }
        assert!(self.lines.flush(SOON));
        let text = fs::read_to_string(self.directory.path().join("log")).unwrap();
        text.lines().map(ToOwned::to_owned).collect()
    }
}

fn asking(name: Name, query_type: RecordType) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Question::query(name, query_type));
    message.to_vec().unwrap()
}

/// A line without what differs each time.
fn lasting(line: &str) -> &str {
    let (_time, rest) = line.split_once(' ').unwrap();
    rest.rsplit_once(" duration_ms=").unwrap().0
}

#[tokio::test]
async fn a_line_says_who_asked_what_and_what_became_of_it() {
    let log = logged(1.0, LineFormat::Text);
    let own = asking(
        Name::from_ascii("Web.virtual.consul.").unwrap(),
        RecordType::A,
    );
    let none = asking("no.virtual.consul.".parse().unwrap(), RecordType::AAAA);
    let other = asking("example.test.".parse().unwrap(), 65_280.into());
    let lines = log.lines_of(&[&own, &none, &other, b"?"], None).await;
    let lasting: Vec<&str> = lines.iter().map(|line| lasting(line)).collect();
    let client = "transport=udp client=127.0.0.1:40000";
    assert_eq!(
        lasting,
        [
            format!("{client} name=Web.virtual.consul. type=A outcome=answered rcode=NOERROR"),
            format!("{client} name=no.virtual.consul. type=AAAA outcome=no_name rcode=NXDOMAIN"),
            format!("{client} name=example.test. type=TYPE65280 outcome=refused rcode=REFUSED"),
            format!("{client} outcome=malformed"),
        ]
    );
}

#[tokio::test]
async fn a_line_of_a_captured_query_names_its_workload_and_its_server() {
    let log = logged(1.0, LineFormat::Json);
    // Nobody listens there.
    let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let server = closed.local_addr().unwrap();
    drop(closed);
    let mut original = testing::captured(server, Slots::new(2).share());
    let other = asking("example.test.".parse().unwrap(), RecordType::A);
    log.lines_of(&[&other], Some(&original)).await;
    // By TCP the kernel says who it was, whom no rule names here; a rule for the namespace is stronger.
    original.maker = Some(Maker {
        cgroup: CgroupId(3),
        netns: NetnsCookie(7),
        uid: 0,
        process: 1,
    });
    let lines = log.lines_of(&[&other], Some(&original)).await;
    assert_eq!(lines.len(), 2);
    for line in lines {
        let mut line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let fields = line.as_object_mut().unwrap();
        let (time, took) = (fields.remove("time"), fields.remove("duration_ms"));
        assert!(time.is_some() && took.unwrap().as_f64().unwrap() < 5000.0);
        let expected = serde_json::json!({
            "transport": "udp", "client": "127.0.0.1:40000", "namespace": "/run/netns/box",
            "workload": "shop", "name": "example.test.", "type": "A",
            "original_destination": server, "upstream": server,
            "outcome": "upstream_failed", "rcode": "SERVFAIL",
        });
        assert_eq!(line, expected);
    }
}

#[tokio::test]
async fn queries_that_are_not_drawn_have_no_line() {
    let own = asking("web.virtual.consul.".parse().unwrap(), RecordType::A);
    let all = vec![own.as_slice(); 1000];
    assert_eq!(
        logged(0.0, LineFormat::Text)
            .lines_of(&all, None)
            .await
            .len(),
        0
    );
    let some = logged(0.1, LineFormat::Text).lines_of(&all, None).await;
    let expected = Sampling::new(0.1).unwrap();
    let expected = (0..1000).filter(|n| expected.has(*n)).count();
    assert!(some.len() == expected && expected > 50, "{expected}");
}

#[test]
fn documentation_names_every_field_in_order() {
    let (_, section) = PAGE.split_once("\n## Query log\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let documented: Vec<&str> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(field, _)| field)
        .collect();
    let full = QueryLine {
        time: Timestamp::now(),
        transport: "udp",
        client: ([127, 0, 0, 1], 40_000).into(),
        namespace: Some("host".to_owned()),
        workload: Some("shop".to_owned()),
        name: Some("a.".to_owned()),
        query_type: Some("A".to_owned()),
        original_destination: Some(([192, 0, 2, 53], 53).into()),
        upstream: Some(([192, 0, 2, 53], 53).into()),
        outcome: "answered",
        rcode: Some("NOERROR".to_owned()),
        duration: Duration::from_micros(1500),
    };
    let text = full.format(LineFormat::Text);
    let written: Vec<&str> = text
        .split_whitespace()
        .map(|pair| pair.split_once('=').unwrap().0)
        .collect();
    assert_eq!(documented, written);
    let json: serde_json::Value = serde_json::from_str(&full.format(LineFormat::Json)).unwrap();
    assert!(documented.iter().all(|field| json.get(field).is_some()));
    assert_eq!(json.as_object().unwrap().len(), documented.len());
}

proptest! {
    #[test]
    fn names_are_presented_in_plain_ascii_and_can_be_read_back(
        labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 0..7),
    ) {
        let name = Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap();
        let text = presented(&name);
        prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
        // Read back as zone files are.
        let mut bytes = text.bytes();
        let mut read = vec![vec![]];
        while let Some(byte) = bytes.next() {
            match byte {
                b'.' => read.push(vec![]),
                b'\\' => {
                    let next = bytes.next().unwrap();
                    let digit = |byte: u8| byte.is_ascii_digit().then(|| byte - b'0');
                    read.last_mut().unwrap().push(match digit(next) {
                        Some(hundreds) => {
                            let mut digit = || bytes.next().and_then(digit).unwrap();
                            hundreds * 100 + digit() * 10 + digit()
                        }
                        None => next,
                    });
                }
                other => read.last_mut().unwrap().push(other),
            }
        }
        read.retain(|label| !label.is_empty());
        let asked: Vec<Vec<u8>> = name.iter().map(<[u8]>::to_vec).collect();
        prop_assert_eq!(read, asked);
    }
}
