//! The queue never blocks, the file can be rotated, and no value breaks a line.

use std::{
    fs,
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
};

use super::*;
use crate::telemetry::{record::Direction, timestamp::Timestamp};

const SOON: Duration = Duration::from_secs(20);

fn line(reason: &str) -> Line {
    Line {
        time: Timestamp::now(),
        direction: Direction::Outbound,
        source: None,
        service: None,
        instance: None,
        original_destination: None,
        peer: None,
        outcome: "denied",
        stage: None,
        side: None,
        reason: Some(reason.to_owned()),
        bytes_sent: 0,
        bytes_received: 0,
        duration: Duration::from_micros(1500),
    }
}

fn to_file(path: &Path) -> AccessLog {
    let destination = Destination::File(path.to_owned());
    AccessLog::start(&destination, LineFormat::Text, DroppedLines::default()).unwrap()
}

/// A destination that takes a batch only when the test allows it.
struct Stuck {
    allowed: Receiver<()>,
    taken: Sender<usize>,
}

impl Output for Stuck {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let count = lines.split(|b| *b == b'\n').count() - 1;
        let _nobody_counts = self.taken.send(count);
        let _allowed_for_good = self.allowed.recv();
        Ok(())
    }

    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn stuck_destination_drops_lines_and_blocks_nobody() {
    const SENT: usize = QUEUE_LINES + 1000;
    let (allow, allowed) = channel();
    let (taken, batches) = channel();
    let dropped = DroppedLines::default();
    let output = Box::new(Stuck { allowed, taken });
    let log =
        AccessLog::start_with(output, LineFormat::Text, dropped.clone(), Duration::ZERO).unwrap();
    log.write(|| line("first"));
    assert_eq!(batches.recv_timeout(SOON), Ok(1));
    for _ in 0..SENT {
        log.write(|| line("x"));
    }
    assert!(!log.flush(Duration::from_millis(1)));
    drop(allow); // from now on it takes everything
    drop(log);
    let written: usize = batches.iter().sum();
    assert_eq!(written, QUEUE_LINES);
    assert_eq!(dropped.total(), 1000);
}

#[test]
fn lines_that_come_together_are_written_together() {
    const SENT: usize = 20;
    let (allow, allowed) = channel();
    let (taken, batches) = channel();
    drop(allow); // it takes everything
    let output = Box::new(Stuck { allowed, taken });
    let gather = Duration::from_secs(1);
    let log =
        AccessLog::start_with(output, LineFormat::Text, DroppedLines::default(), gather).unwrap();
    for _ in 0..SENT {
        log.write(|| line("x"));
    }
    assert_eq!(batches.recv_timeout(SOON), Ok(SENT));
}

struct Broken;

impl Output for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<()> {
        Err(io::Error::other("disk full"))
    }

    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn lines_that_cannot_be_written_are_counted() {
    let dropped = DroppedLines::default();
    let output = Box::new(Broken);
    let log = AccessLog::start_with(output, LineFormat::Text, dropped.clone(), GATHER).unwrap();
    for _ in 0..200 {
        log.write(|| line("x"));
    }
    assert!(log.flush(SOON));
    assert_eq!(dropped.total(), 200);
}

#[test]
fn rotated_file_is_left_after_reopen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let rotated = directory.path().join("access.log.1");
    let log = to_file(&path);
    log.write(|| line("before"));
    assert!(log.flush(SOON));
    fs::rename(&path, &rotated).unwrap();
    log.write(|| line("between"));
    assert!(log.flush(SOON));
    log.reopen();
    assert!(log.flush(SOON));
    assert!(path.exists(), "the new file is there before the next line");
    log.write(|| line("after"));
    assert!(log.flush(SOON));
    let (old, new) = (
        fs::read_to_string(&rotated).unwrap(),
        fs::read_to_string(&path).unwrap(),
    );
    assert!(old.contains("before") && old.contains("between"), "{old}");
    assert!(new.contains("after") && !new.contains("between"), "{new}");
}

#[test]
fn file_that_cannot_be_opened_is_named() {
    let destination = Destination::File("/nonexistent/access.log".into());
    let error = AccessLog::start(&destination, LineFormat::Text, DroppedLines::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/access.log"), "{error}");
}

#[test]
fn log_that_is_off_makes_no_line() {
    let log = AccessLog::off();
    log.write::<Line>(|| panic!("a line was made"));
    assert!(log.flush(Duration::ZERO));
}

#[test]
fn no_value_adds_a_field_or_a_line() {
    for hostile in [
        "a b",
        "x outcome=completed",
        "two\nlines",
        "quo\"te",
        "back\\slash",
        "escape \u{1b}[31m",
        "",
    ] {
        let text = line(hostile).format(LineFormat::Text);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        let (_, rest) = text.split_once(" reason=").unwrap();
        let (value, _) = rest.rsplit_once(" bytes_sent=").unwrap();
        assert_eq!(
            serde_json::from_str::<String>(value).unwrap(),
            hostile,
            "{text:?}"
        );
        let json: serde_json::Value =
            serde_json::from_str(&line(hostile).format(LineFormat::Json)).unwrap();
        assert_eq!(json["reason"], hostile);
        assert_eq!(json["duration_ms"], 1.5);
    }
    let text = line("plain").format(LineFormat::Text);
    assert!(
        text.contains(" reason=plain bytes_sent=0 bytes_received=0 duration_ms=1.500\n"),
        "{text}"
    );
}

#[test]
fn documentation_names_every_field_in_order() {
    let page = include_str!("../../../../docs/access-log.md");
    let documented: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(field, _)| field)
        .collect();
    let full = Line {
        source: Some("spiffe://td/x".to_owned()),
        service: Some("db".parse().unwrap()),
        instance: Some("db-1".parse().unwrap()),
        original_destination: Some("240.0.0.1:1".parse().unwrap()),
        peer: Some("192.0.2.1:1".parse().unwrap()),
        stage: Some(crate::telemetry::record::Stage::Dial),
        side: Some(crate::telemetry::record::Side::Upstream),
        ..line("x")
    };
    let text = full.format(LineFormat::Text);
    let written: Vec<&str> = text
        .split_whitespace()
        .map(|pair| pair.split_once('=').unwrap().0)
        .collect();
    assert_eq!(documented, written);
}
