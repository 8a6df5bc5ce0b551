//! docs/performance.md between its marks, and the plots, from docs/bench/*.json.

use std::{fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    compare, plot,
    summary::{Figure, Interval, Summary},
};
use crate::{build, progress::say};

/// The benches that have a section.
const BENCHES: [&str; 2] = ["capture", "mesh"];

/// Fewer rounds are for a look, not for the record.
const ROUNDS: usize = 10;

/// See [`super::Command::Publish`].
#[derive(Debug, clap::Args)]
pub(super) struct PublishArguments {
    /// Files with every sample, as `bench capture` and `bench mesh` name them; those of the last runs if none is given.
    files: Vec<PathBuf>,
    /// Takes nothing that was measured, only writes the record from what docs/bench has.
    #[arg(long)]
    render: bool,
}

/// Takes figures into docs/bench, and writes the record anew.
///
/// # Errors
/// If a file is none of ours, or has too few rounds.
pub(super) fn publish(arguments: &PublishArguments) -> Result<()> {
    let mut files = arguments.files.clone();
    if files.is_empty() && !arguments.render {
        for bench in BENCHES {
            files.push(compare::kept(bench)?);
        }
        files.retain(|file| file.is_file());
        ensure!(
            !files.is_empty(),
            "nothing was measured: `cargo xtask bench capture`, `bench mesh`"
        );
    }
    let docs = build::workspace().join("docs");
    fs::create_dir_all(docs.join("bench")).context("creating docs/bench")?;
    for file in files {
        let text =
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let raw: Value =
            serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
        let summary = Summary::of(&raw).with_context(|| format!("reading {}", file.display()))?;
        ensure!(
            summary.rounds >= ROUNDS,
            "{} has {} rounds; the record takes {ROUNDS} or more",
            file.display(),
            summary.rounds
        );
        let name = format!("bench/{}.json", summary.bench);
        let text = serde_json::to_string_pretty(&summary).context("writing JSON")?;
        fs::write(docs.join(&name), text + "\n").with_context(|| format!("writing {name}"))?;
        say(format_args!("docs/{name} from {}", file.display()));
    }
    for (name, text) in rendered(&docs)? {
        fs::write(docs.join(&name), text).with_context(|| format!("writing docs/{name}"))?;
        say(format_args!("docs/{name}"));
    }
    Ok(())
}

/// What is generated, by name below `docs`.
fn rendered(docs: &std::path::Path) -> Result<Vec<(String, String)>> {
    let page = docs.join("performance.md");
    let mut text =
        fs::read_to_string(&page).with_context(|| format!("reading {}", page.display()))?;
    let mut files = vec![];
    for bench in BENCHES {
        let file = docs.join(format!("bench/{bench}.json"));
        let content = if file.is_file() {
            let json =
                fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            let summary: Summary = serde_json::from_str(&json)
                .with_context(|| format!("reading {}", file.display()))?;
            files.extend(plots(&summary));
            let mut content = section(&summary);
            for (name, _) in plots(&summary) {
                content += &format!("\n![{bench}]({name})\n");
            }
            content
        } else {
            format!("Not measured yet: `cargo xtask bench {bench}` does it.\n")
        };
        text = between_marks(&text, bench, &content)?;
    }
    files.push(("performance.md".to_owned(), text));
    Ok(files)
}

fn between_marks(page: &str, bench: &str, content: &str) -> Result<String> {
    let begin = format!("<!-- begin: bench {bench}, written by `cargo xtask bench publish` -->\n");
    let end = format!("<!-- end: bench {bench} -->");
    let parts = page
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) = parts.with_context(|| format!("no marks for bench {bench}"))?;
    Ok(format!("{before}{begin}\n{content}\n{end}{after}"))
}

/// A summary for people, as Markdown.
pub(super) fn section(summary: &Summary) -> String {
    let mut text = heading(summary);
    if summary.bench == "mesh" {
        text += &by_way(summary);
    } else {
        text += &by_services(summary);
    }
    let behind = behind(summary);
    text +=
        "\nWhere Sidestep is behind, by more than the intervals (of a single sample a tenth):\n\n";
    if behind.is_empty() {
        text += "- nowhere in what was measured\n";
    }
    for line in behind {
        text += &format!("- {line}\n");
    }
    if !summary.gaps.is_empty() {
        text += "\nNot measured:\n\n";
        for gap in &summary.gaps {
            let why = gap.why.lines().next().unwrap_or_default();
            text += &format!("- {}{}: {why}\n", gap.of.variant, services(gap.of.services));
        }
    }
    text
}

fn heading(summary: &Summary) -> String {
    let word = |map: &serde_json::Map<String, Value>, key: &str| {
        map.get(key)
            .and_then(Value::as_str)
            .unwrap_or("?")
            .to_owned()
    };
    let machine = |key| word(&summary.machine, key);
    let mut text = format!(
        "Linux {}, {}, {} cores, {} GiB; {} rounds of {} s for each load, seed {}.\n",
        machine("kernel"),
        machine("processor"),
        machine("cores"),
        machine("memory_gib"),
        summary.rounds,
        summary.seconds,
        summary.seed,
    );
    let versions = summary.versions.keys();
    let versions: Vec<String> = versions
        .map(|key| format!("{key}: {}", word(&summary.versions, key)))
        .collect();
    // Writing to a string does not fail.
    let _written = writeln!(text, "Versions: {}.\n", versions.join("; "));
    text
}

/// A table for each measure: variants and numbers of services.
fn by_services(summary: &Summary) -> String {
    let mut counts: Vec<u32> = summary
        .figures
        .iter()
        .filter_map(|it| it.of.services)
        .collect();
    counts.sort_unstable();
    counts.dedup();
    let mut text =
        "Each cell: ratio to no capture, where there is one; median (95 % interval).\n".to_owned();
    for measure in measures(summary) {
        let all: Vec<&Figure> = summary
            .figures
            .iter()
            .filter(|it| it.measure == measure)
            .collect();
        let unit = all.first().map_or("", |it| it.unit.as_str());
        let present = |count: &&u32| all.iter().any(|it| it.of.services == Some(**count));
        let counts: Vec<&u32> = counts.iter().filter(present).collect();
        let of = |count: &&u32| named(**count);
        let mut rows = vec![
            std::iter::once(String::new())
                .chain(counts.iter().map(of))
                .collect(),
        ];
        for variant in variants(summary)
            .iter()
            .filter(|it| all.iter().any(|f| f.of.variant == **it))
        {
            let cell = |count: &&u32| cell(summary.find(measure, variant, Some(**count)), false);
            rows.push(
                std::iter::once((*variant).to_owned())
                    .chain(counts.iter().map(cell))
                    .collect(),
            );
        }
        // Writing to a string does not fail.
        let _written = write!(
            text,
            "\n**{}** ({unit})\n\n{}",
            capitalised(measure),
            markdown(&rows)
        );
    }
    text
}

/// One table: measures and ways.
fn by_way(summary: &Summary) -> String {
    let variants = variants(summary);
    let mut rows = vec![
        std::iter::once(String::new())
            .chain(variants.iter().map(|it| (*it).to_owned()))
            .collect(),
    ];
    for measure in measures(summary) {
        let cell = |variant: &&str| cell(summary.find(measure, variant, None), true);
        rows.push(
            std::iter::once(measure.to_owned())
                .chain(variants.iter().map(cell))
                .collect(),
        );
    }
    format!(
        "Each cell: ratio to direct (95 % interval); median.\n\n{}",
        markdown(&rows)
    )
}

/// With the interval of the ratio, or that of the median.
fn cell(figure: Option<&Figure>, of_ratio: bool) -> String {
    let Some(figure) = figure else {
        return String::new();
    };
    let with = |it: &Interval| {
        let alone = figure.samples < 2;
        let interval = format!(" ({} to {})", digits(it.low), digits(it.high));
        digits(it.value) + if alone { "" } else { &interval }
    };
    let median = digits(figure.median.value);
    match &figure.ratio {
        Some(ratio) if of_ratio => format!("{}; {median} {}", with(ratio), figure.unit),
        Some(ratio) => format!("{}; {}", digits(ratio.value), with(&figure.median)),
        None if of_ratio => format!("{} {}", with(&figure.median), figure.unit),
        None => with(&figure.median),
    }
}

/// How the names of measures begin, the most telling first.
const ORDER: [&str; 15] = [
    "added connect latency, p50",
    "added",
    "connect, ",
    "connect",
    "kernel time",
    "bulk",
    "requests",
    "new connections",
    "new connection",
    "round trip",
    "processor time",
    "processor",
    "load",
    "change",
    "memory",
];

/// Measures, the most telling first.
fn measures(summary: &Summary) -> Vec<&str> {
    let mut all: Vec<&str> = vec![];
    for figure in &summary.figures {
        if !all.contains(&figure.measure.as_str()) {
            all.push(&figure.measure);
        }
    }
    let rank = |measure: &str| {
        let place = ORDER.iter().position(|it| measure.starts_with(it));
        place.unwrap_or(ORDER.len())
    };
    all.sort_by_key(|measure| rank(measure));
    all
}

/// Variants: what all are compared with first, then Sidestep.
fn variants(summary: &Summary) -> Vec<&str> {
    let mut all: Vec<&str> = vec![];
    for figure in &summary.figures {
        if !all.contains(&figure.of.variant.as_str()) {
            all.push(&figure.of.variant);
        }
    }
    let rank = |name: &str| {
        let is_base = matches!(name, "none" | "direct");
        (!is_base, !is_ours(name))
    };
    all.sort_by_key(|name| (rank(name), *name));
    all
}

fn is_ours(variant: &str) -> bool {
    variant.starts_with("eBPF") || variant.starts_with("Sidestep")
}

/// Whether a variant is another way to the same end. The agent's own rules count as others': a user may choose.
fn is_other(variant: &str) -> bool {
    variant.contains("iptables") || variant.contains("nft")
}

fn more_is_better(measure: &str) -> bool {
    measure.contains("per second") || measure.starts_with("bulk")
}

/// In which a figure surely lies: a single sample is taken for good to a tenth.
fn range(figure: &Figure) -> Interval {
    let Interval { value, .. } = figure.median;
    if figure.samples > 1 {
        return figure.median;
    }
    Interval {
        value,
        low: value * 0.9,
        high: value * 1.1,
    }
}

/// Where another way has a better figure, and the intervals do not touch.
fn behind(summary: &Summary) -> Vec<String> {
    let mut lines = vec![];
    for ours in summary.figures.iter().filter(|it| is_ours(&it.of.variant)) {
        // Others are not tracked beside something, they track by themselves.
        let others = summary.figures.iter().filter(|it| {
            is_other(&it.of.variant)
                && it.measure == ours.measure
                && it.of.services == ours.of.services
        });
        for other in others {
            let (our, their) = (range(ours), range(other));
            let worse = if more_is_better(&ours.measure) {
                our.high < their.low
            } else {
                our.low > their.high
            };
            if worse && !ours.of.variant.contains("conntrack") {
                lines.push(format!(
                    "{}{}: {} {} {unit}, {} {} {unit}",
                    ours.measure,
                    services(ours.of.services),
                    ours.of.variant,
                    digits(ours.median.value),
                    other.of.variant,
                    digits(other.median.value),
                    unit = ours.unit,
                ));
            }
        }
    }
    lines
}

/// The plots of a summary, by name below `docs`.
fn plots(summary: &Summary) -> Vec<(String, String)> {
    let variants = variants(summary);
    if summary.bench == "mesh" {
        let measures = [
            "bulk, 1 stream",
            "bulk, 8 streams",
            "requests per second, 1 connection",
            "requests per second, 32 connections",
            "new connections per second, 1 client",
            "new connections per second, 32 clients",
        ];
        let ways: Vec<String> = variants
            .iter()
            .filter(|it| **it != "direct")
            .map(|it| (*it).to_owned())
            .collect();
        let groups: Vec<plot::Group> = measures
            .iter()
            .map(|measure| plot::Group {
                name: measure.replace(" per second", ""),
                bars: ways
                    .iter()
                    .map(|way| summary.find(measure, way, None)?.ratio)
                    .collect(),
            })
            .collect();
        let title = "Rates through the mesh: more is better";
        return vec![(
            "bench/mesh-rates.svg".to_owned(),
            plot::bars(title, "ratio to direct", &ways, &groups),
        )];
    }
    let added = bpf_tests::bench::capture::ADDED;
    let lines: Vec<plot::Line> = variants
        .iter()
        .map(|variant| {
            let of = |it: &&Figure| it.measure == added && it.of.variant == **variant;
            let found = summary.figures.iter().filter(of);
            let point = |it: &Figure| Some((f64::from(it.of.services?), it.median));
            plot::Line {
                name: (*variant).to_owned(),
                points: found.filter_map(point).collect(),
            }
        })
        .filter(|line| line.points.len() > 1)
        .collect();
    let title = "Added latency of connect(), median: less is better";
    vec![(
        "bench/capture-latency.svg".to_owned(),
        plot::lines(title, "services", "microseconds", &lines),
    )]
}

fn services(count: Option<u32>) -> String {
    count.map_or_else(String::new, |it| format!(", {}", named(it)))
}

fn named(services: u32) -> String {
    let plural = if services == 1 { "" } else { "s" };
    format!("{} service{plural}", grouped(f64::from(services)))
}

/// Three digits that say something.
fn digits(value: f64) -> String {
    let size = value.abs();
    if size >= 1_000.0 {
        grouped(value)
    } else if size >= 100.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

/// A whole number with separated thousands.
fn grouped(value: f64) -> String {
    let plain = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in plain.chars().enumerate() {
        let rest = plain.len() - index;
        if index > 0 && rest % 3 == 0 && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|it| it.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}

fn markdown(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text += &format!("| {} |\n", row.join(" | "));
        if index == 0 {
            text += &format!("|{}\n", "---|".repeat(row.len()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_what_the_figures_say() {
        let docs = build::workspace().join("docs");
        for (name, expected) in rendered(&docs).unwrap() {
            let text = fs::read_to_string(docs.join(&name)).unwrap_or_default();
            assert!(
                text == expected,
                "docs/{name} is not what docs/bench says: run `cargo xtask bench publish --render`"
            );
        }
    }

    fn mesh() -> Summary {
        Summary::of(&super::super::summary::tests::raw()).unwrap()
    }

    #[test]
    fn ratios_come_first() {
        let text = section(&mesh());
        assert!(
            text.contains("| bulk, 1 stream | 20.0 (19.0 to 21.0) Gbit/s | 0.500 ("),
            "{text}"
        );
        assert!(text.contains("); 10.0 Gbit/s |"), "{text}");
    }

    #[test]
    fn who_is_behind_is_said() {
        let mut summary = mesh();
        assert!(section(&summary).contains("- nowhere"));
        let mut other = summary.figures.last().unwrap().clone();
        other.of.variant = "iptables and HAProxy".to_owned();
        let faster = |value: f64| Interval {
            value,
            low: value - 0.1,
            high: value + 0.1,
        };
        other.median = faster(12.0);
        summary.figures.push(other.clone());
        let behind = section(&summary);
        let line =
            "- bulk, 1 stream: Sidestep, connect 10.0 Gbit/s, iptables and HAProxy 12.0 Gbit/s";
        assert!(behind.contains(line), "{behind}");
        // Within doubt.
        summary.figures.pop();
        other.median = faster(10.4);
        summary.figures.push(other);
        assert!(section(&summary).contains("- nowhere"));
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (1_234_567.0, "1,234,567"),
            (-1_234.0, "-1,234"),
            (123.4, "123"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.1234, "0.123"),
        ];
        for (value, expected) in cases {
            assert_eq!(digits(value), expected);
        }
    }

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = "a\n<!-- begin: bench mesh, written by `cargo xtask bench publish` -->\nold\n<!-- end: bench mesh -->\nb\n";
        let once = between_marks(page, "mesh", "new\n").unwrap();
        assert!(once.starts_with("a\n") && once.ends_with("\nb\n"));
        assert!(once.contains("\nnew\n") && !once.contains("old"));
        assert_eq!(between_marks(&once, "mesh", "new\n").unwrap(), once);
        between_marks("a\n", "mesh", "new").unwrap_err();
    }
}
