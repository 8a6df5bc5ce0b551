//! Series go away when nobody uses them, and there is a most.

use prometheus_client::{encoding::text::encode, registry::Registry};

use super::*;

const HOUR: Duration = Duration::from_hours(1);
const COMPLETED: OutcomeLabels = OutcomeLabels {
    outcome: "completed",
    stage: None,
    side: None,
};

fn with_max(max: usize) -> Arc<ConnectionSeries> {
    Arc::new(ConnectionSeries::new(SeriesLimits { idle: HOUR, max }))
}

fn pair(source: &str, destination: &str) -> PairLabels {
    PairLabels {
        direction: Direction::Outbound,
        source: Some(source.parse().unwrap()),
        destination: Some(destination.parse().unwrap()),
    }
}

/// The page's samples, without comments.
fn scrape(series: &Arc<ConnectionSeries>) -> Vec<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Arc::clone(series)));
    let mut page = String::new();
    encode(&mut page, &registry).unwrap();
    page.lines()
        .filter(|line| !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

fn mentions(series: &Arc<ConnectionSeries>, text: &str) -> bool {
    scrape(series).iter().any(|line| line.contains(text))
}

#[tokio::test(start_paused = true)]
async fn idle_pairs_go_and_live_ones_stay() {
    let series = with_max(1000);
    series.count(pair("gone", "db"), COMPLETED);
    let live = series.begin(pair("stays", "db"), Arc::default());
    tokio::time::advance(HOUR / 2).await;
    series.count(pair("used", "db"), COMPLETED);
    assert!(mentions(&series, "gone"));
    tokio::time::advance(HOUR / 2).await;
    assert!(!mentions(&series, "gone"));
    assert!(mentions(&series, "stays") && mentions(&series, "used"));
    tokio::time::advance(HOUR * 3).await;
    assert!(mentions(&series, "stays"));
    live.finish(COMPLETED);
    assert!(mentions(&series, "stays"), "its end is news for an hour");
    tokio::time::advance(HOUR).await;
    assert_eq!(scrape(&series).len(), 1, "{:?}", scrape(&series));
    assert_eq!(series.series.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn beyond_the_cap_connections_count_under_other() {
    const MAX: usize = 100;
    let series = with_max(MAX);
    for n in 0..1000 {
        let live = series.begin(pair(&format!("s{n}"), "db"), Arc::default());
        live.counts.to_upstream.fetch_add(1, Ordering::Relaxed);
        live.finish(COMPLETED);
    }
    let page = scrape(&series);
    // 3 and an outcome of `other`, and the overflow counter itself.
    assert!(page.len() <= MAX + 5, "{} samples", page.len());
    let sum = |metric: &str| -> u64 {
        page.iter()
            .filter(|line| line.starts_with(metric))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    };
    assert_eq!(sum("sidestep_connections_total"), 1000);
    assert_eq!(sum("sidestep_connection_bytes_total"), 1000);
    assert!(sum("sidestep_series_overflowed_total") >= 970);

    // Room comes back when pairs have become idle.
    tokio::time::advance(HOUR).await;
    series.count(pair("late", "db"), COMPLETED);
    assert!(mentions(&series, r#"source="late""#));
}

#[tokio::test(start_paused = true)]
async fn services_named_like_fixed_labels_make_no_duplicates() {
    let series = with_max(4);
    let unknown = PairLabels {
        direction: Direction::Outbound,
        source: None,
        destination: None,
    };
    series.count(unknown, COMPLETED);
    series.count(pair("unknown", "unknown"), COMPLETED);
    series.count(pair("other", "other"), COMPLETED);
    series.count(pair("too", "many"), COMPLETED);
    let mut names: Vec<String> = scrape(&series)
        .iter()
        .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
        .collect();
    let samples = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), samples, "{names:?}");
}

#[tokio::test]
async fn bytes_of_live_connections_are_there_before_they_end() {
    let series = with_max(1000);
    let counts = Arc::<Counts>::default();
    let live = series.begin(pair("web", "db"), Arc::clone(&counts));
    counts.to_downstream.store(7, Ordering::Relaxed);
    let received = r#"sidestep_connection_bytes_total{direction="outbound",source="web",destination="db",way="received"} 7"#;
    assert!(mentions(&series, received));
    live.finish(COMPLETED);
    assert!(mentions(&series, received));
}
