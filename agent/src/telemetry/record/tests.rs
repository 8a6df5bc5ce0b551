//! Exactly one line and one outcome per connection, however it ends.

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use super::{
    super::{
        access_log::{AccessLog, Destination, LineFormat},
        metrics::Metrics,
        series::SeriesLimits,
    },
    *,
};

fn telemetry(log: &Path, format: LineFormat) -> Telemetry {
    let metrics = Arc::new(Metrics::new(SeriesLimits::default(), "0"));
    let destination = Destination::File(log.to_owned());
    let access_log = AccessLog::start(&destination, format, metrics.dropped_lines()).unwrap();
    Telemetry::new(metrics, Arc::new(access_log))
}

fn written(telemetry: &Telemetry, log: &Path) -> String {
    assert!(telemetry.access_log().flush(Duration::from_secs(20)));
    std::fs::read_to_string(log).unwrap()
}

fn full_record(telemetry: &Telemetry) -> ConnectionRecord {
    let mut record = ConnectionRecord::begin(telemetry, Direction::Outbound);
    record.original_destination("240.0.0.5:5432".parse().unwrap());
    record.source(
        "spiffe://td/ns/default/dc/dc1/svc/web",
        &"web".parse().unwrap(),
    );
    record.service(&"db".parse().unwrap());
    record.decision("intention allow web => db (precedence 9)");
    record.instance(&"db-1".parse().unwrap());
    record.peer("192.0.2.2:15443".parse().unwrap());
    record
}

/// Lines of the metrics page that begin with `metric`.
fn samples(telemetry: &Telemetry, metric: &str) -> Vec<String> {
    let page = telemetry.metrics().render();
    page.lines()
        .filter(|line| line.starts_with(metric))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn completed_connection_is_told_in_full() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let telemetry = telemetry(&log, LineFormat::Text);
    let mut record = full_record(&telemetry);
    let counts = Arc::<Counts>::default();
    record.counts(Arc::clone(&counts));
    counts.to_upstream.store(10, Ordering::Relaxed);
    counts.to_downstream.store(2000, Ordering::Relaxed);
    assert_eq!(
        samples(&telemetry, "sidestep_connections_live{"),
        [r#"sidestep_connections_live{direction="outbound",source="web",destination="db"} 1"#]
    );
    record.finish(Outcome::Completed);

    let line = written(&telemetry, &log);
    let (time, rest) = line.split_once(' ').unwrap();
    time.strip_prefix("time=")
        .unwrap()
        .parse::<Timestamp>()
        .unwrap();
    let (rest, duration) = rest.rsplit_once(" duration_ms=").unwrap();
    duration.trim_end().parse::<f64>().unwrap();
    assert_eq!(
        rest,
        "direction=outbound source=spiffe://td/ns/default/dc/dc1/svc/web service=db \
         instance=db-1 original_destination=240.0.0.5:5432 peer=192.0.2.2:15443 \
         outcome=completed reason=\"intention allow web => db (precedence 9)\" \
         bytes_sent=10 bytes_received=2000"
    );
    assert_eq!(
        samples(&telemetry, "sidestep_connections_total"),
        [
            r#"sidestep_connections_total{direction="outbound",source="web",destination="db",outcome="completed"} 1"#
        ]
    );
    assert_eq!(
        samples(&telemetry, "sidestep_connection_bytes_total"),
        [
            r#"sidestep_connection_bytes_total{direction="outbound",source="web",destination="db",way="sent"} 10"#,
            r#"sidestep_connection_bytes_total{direction="outbound",source="web",destination="db",way="received"} 2000"#,
        ]
    );
    assert_eq!(
        samples(&telemetry, "sidestep_connections_live{"),
        [r#"sidestep_connections_live{direction="outbound",source="web",destination="db"} 0"#]
    );
}

#[tokio::test]
async fn every_outcome_is_one_line_and_one_count() {
    let error = std::io::Error::other("no route");
    let cases = [
        (Outcome::Denied, r#""outcome":"denied""#, "precedence 9"),
        (Outcome::Idle, r#""outcome":"idle""#, "precedence 9"),
        (
            Outcome::Cut("intention changed".to_owned()),
            r#""outcome":"cut""#,
            r#""reason":"intention changed""#,
        ),
        (
            Outcome::failed(Stage::Dial, Side::Upstream, &error),
            r#""outcome":"failed","stage":"dial","side":"upstream""#,
            r#""reason":"no route""#,
        ),
    ];
    for (outcome, word, reason) in cases {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("access.log");
        let telemetry = telemetry(&log, LineFormat::Json);
        full_record(&telemetry).finish(outcome);
        let text = written(&telemetry, &log);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains(word) && text.contains(reason), "{text}");
        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(object["duration_ms"].is_number(), "{text}");
        assert_eq!(samples(&telemetry, "sidestep_connections_total").len(), 1);
    }
}

#[tokio::test]
async fn dropped_record_says_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let telemetry = telemetry(&log, LineFormat::Text);
    let mut record = ConnectionRecord::begin(&telemetry, Direction::Inbound);
    record.enter(Stage::Handshake);
    drop(record);
    let text = written(&telemetry, &log);
    assert!(
        text.contains("outcome=failed stage=handshake side=internal reason=cancelled"),
        "{text}"
    );
    assert_eq!(
        samples(&telemetry, "sidestep_connections_total"),
        [
            r#"sidestep_connections_total{direction="inbound",source="unknown",destination="unknown",outcome="failed",stage="handshake",side="internal"} 1"#
        ]
    );
}

#[tokio::test]
async fn panic_in_a_connection_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let telemetry = telemetry(&log, LineFormat::Text);
    let record = full_record(&telemetry);
    std::thread::spawn(move || {
        let _record = record;
        panic!("on purpose");
    })
    .join()
    .unwrap_err();
    let text = written(&telemetry, &log);
    assert!(text.contains("side=internal reason=panicked"), "{text}");
}

#[test]
fn end_of_a_relay_names_the_side() {
    let reset = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let cut = || "shutting down".to_owned();
    let of = |end: &End| Outcome::of_relay(end, cut).labels();
    assert_eq!(
        of(&End::DownstreamReset(reset())).side,
        Some(Side::Downstream)
    );
    assert_eq!(of(&End::UpstreamReset(reset())).side, Some(Side::Upstream));
    assert_eq!(of(&End::Finished).outcome, "completed");
    assert_eq!(of(&End::Idle).outcome, "idle");
    assert_eq!(
        Outcome::of_relay(&End::Cut, cut),
        Outcome::Cut("shutting down".to_owned())
    );
}
