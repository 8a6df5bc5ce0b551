//! The table of names, the page and the documentation say the same.

use std::collections::BTreeSet;

use super::{super::series::PairLabels, *};
use crate::telemetry::{
    names::Kind,
    record::{Outcome, Side, Stage},
};

/// Metrics in which everything has happened once.
fn eventful() -> Metrics {
    let metrics = Metrics::new(SeriesLimits::default(), "1.2.3");
    let failure = Outcome::Failed {
        stage: Stage::Dial,
        side: Side::Upstream,
        error: String::new(),
    };
    let labels = PairLabels {
        direction: Direction::Outbound,
        source: None,
        destination: None,
    };
    metrics.connections().count(labels, failure.labels());
    metrics.connected(Direction::Outbound, Duration::from_millis(1));
    metrics.handshaken(Direction::Inbound, Duration::from_millis(1));
    metrics.uncaptured();
    metrics.accept_failed(Direction::Inbound);
    metrics.dns_query(DnsTransport::Udp, DnsOutcome::Forwarded);
    metrics.dns_forwarded(Duration::from_millis(1));
    metrics.observe(|| Observations {
        capture: vec![("rewritten", 5)],
        hand_over: vec![("published", 5)],
        longest_gap: Duration::from_millis(201),
        hangs: 1,
        effective: true,
        attached_programs: 6,
        hbone: (2, 9),
        catalog: Some(CatalogObservation {
            version: 3,
            loaded_at: SystemTime::now(),
            services: 2,
            instances: 4,
            problems: 0,
        }),
        authority: Some(AuthorityObservation {
            not_after: SystemTime::UNIX_EPOCH + Duration::from_hours(2),
            reload_failing: false,
        }),
        certificates: vec![CertificateObservation {
            service: "web".parse().unwrap(),
            not_after: Some(SystemTime::UNIX_EPOCH + Duration::from_hours(1)),
            failing: false,
        }],
    });
    metrics.dns_query(DnsTransport::Udp, DnsOutcome::Forwarded);
    metrics.dns_forwarded(Duration::from_millis(1));
    metrics
}

#[tokio::test]
async fn page_has_every_name_of_the_table_and_no_other() {
    let page = eventful().render();
    let scraped: BTreeSet<(&str, &str)> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .collect();
    let table: BTreeSet<(&str, &str)> = names::ALL
        .iter()
        .map(|metric| (metric.family(), metric.kind.as_str()))
        .collect();
    assert_eq!(scraped, table);
    for metric in names::ALL {
        let sample = match metric.kind {
            Kind::Histogram => format!("{}_bucket{{", metric.name),
            Kind::Counter | Kind::Gauge | Kind::Info => metric.name.to_owned(),
        };
        assert!(
            page.lines().any(|line| line.starts_with(&sample)),
            "no sample of {}",
            metric.name
        );
    }
    assert!(page.ends_with("# EOF\n"));
}

#[tokio::test]
async fn page_uses_only_the_labels_of_the_table() {
    let page = eventful().render();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, rest)) = line.split_once('{') else {
            continue;
        };
        let metric = names::ALL
            .iter()
            .find(|metric| name.starts_with(metric.name))
            .unwrap();
        let labels = rest.rsplit_once('}').unwrap().0;
        for label in labels
            .split(',')
            .map(|pair| pair.split_once('=').unwrap().0)
        {
            assert!(
                label == "le" || metric.labels.contains(&label),
                "{label} in {line}"
            );
        }
    }
}

#[test]
fn documentation_repeats_the_table() {
    let page = include_str!("../../../../docs/metrics.md");
    let documented: Vec<(String, String, String, String)> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let plain = |n: usize| cells[n].replace('`', "");
            (plain(0), plain(1), plain(2), plain(3))
        })
        .collect();
    let table: Vec<(String, String, String, String)> = names::ALL
        .iter()
        .map(|metric| {
            (
                metric.name.to_owned(),
                metric.kind.as_str().to_owned(),
                metric.labels.join(", "),
                format!("{}.", metric.help.replace('`', "")),
            )
        })
        .collect();
    assert_eq!(documented, table);
}

#[test]
fn names_follow_the_rules() {
    let mut seen = BTreeSet::new();
    for metric in names::ALL {
        let name = metric.name;
        assert!(seen.insert(name), "{name} is there twice");
        assert!(
            name.starts_with("sidestep_") || name.starts_with("process_"),
            "{name}"
        );
        assert_eq!(
            name.ends_with("_total"),
            metric.kind == Kind::Counter,
            "{name}"
        );
    }
}
