//! Plots as SVG. Two kinds, a page each: a crate for plotting would bring more code than the measuring has. Pure.

use std::fmt::Write as _;

use super::summary::Interval;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 60.0;

/// Told apart by those who see few colours (Okabe and Ito 2008).
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999",
];

/// A line: its name, and points with x and y.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, Interval)>,
}

/// Bars that stand together: a name, and for each way a bar or a gap.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) bars: Vec<Option<Interval>>,
}

/// Lines over two logarithmic axes. What is not above 0.1 is drawn there.
pub(super) fn lines(title: &str, x_label: &str, y_label: &str, lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let decade = |value: f64| value.max(0.1).log10();
    let xs = Axis::over(points().map(|(x, _)| decade(*x)), LEFT, WIDTH - RIGHT);
    let ys = Axis::over(
        points().flat_map(|(_, y)| [decade(y.low), decade(y.high)]),
        HEIGHT - BOTTOM,
        TOP,
    );
    let mut svg = head(title, x_label, y_label);
    for exponent in xs.whole() {
        let text = short(10_f64.powf(exponent));
        label(
            &mut svg,
            xs.at(exponent),
            HEIGHT - BOTTOM + 18.0,
            "middle",
            &text,
        );
    }
    for exponent in ys.whole() {
        let y = ys.at(exponent);
        rule(&mut svg, y);
        label(
            &mut svg,
            LEFT - 8.0,
            y + 4.0,
            "end",
            &short(10_f64.powf(exponent)),
        );
    }
    for (index, line) in lines.iter().enumerate() {
        let colour = colour(index);
        let at = |(x, y): &(f64, Interval)| (xs.at(decade(*x)), ys.at(decade(y.value)));
        let path: Vec<String> = line
            .points
            .iter()
            .map(at)
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let path = path.join(" ");
        put(
            &mut svg,
            &format!(
                "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
            ),
        );
        for point in &line.points {
            let (x, y) = at(point);
            let (low, high) = (ys.at(decade(point.1.low)), ys.at(decade(point.1.high)));
            put(
                &mut svg,
                &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"),
            );
            whisker(&mut svg, x, low, high, colour);
        }
        key(&mut svg, index, &line.name);
    }
    svg + "</svg>\n"
}

/// Groups of bars from zero, one for each of `ways`.
pub(super) fn bars(title: &str, y_label: &str, ways: &[String], groups: &[Group]) -> String {
    let highs = groups.iter().flat_map(|group| group.bars.iter().flatten());
    let ys = Axis::over(
        highs.map(|bar| bar.high).chain([0.0, 0.1]),
        HEIGHT - BOTTOM,
        TOP,
    );
    let mut svg = head(title, "", y_label);
    for tick in ys.ticks() {
        let y = ys.at(tick);
        rule(&mut svg, y);
        label(&mut svg, LEFT - 8.0, y + 4.0, "end", &format!("{tick:.1}"));
    }
    let wide = (WIDTH - RIGHT - LEFT) / count(groups.len().max(1));
    let bar_wide = wide * 0.8 / count(ways.len().max(1));
    for (position, group) in groups.iter().enumerate() {
        let start = LEFT + wide * count(position) + wide * 0.1;
        for (index, bar) in group.bars.iter().enumerate() {
            let Some(bar) = bar else {
                continue;
            };
            let (x, y) = (start + bar_wide * count(index), ys.at(bar.value));
            let (high, colour) = (ys.at(0.0) - y, colour(index));
            put(
                &mut svg,
                &format!(
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{bar_wide:.1}\" height=\"{high:.1}\" fill=\"{colour}\"/>"
                ),
            );
            whisker(
                &mut svg,
                x + bar_wide / 2.0,
                ys.at(bar.low),
                ys.at(bar.high),
                "#333333",
            );
        }
        // Long names go on two lines.
        for (line, part) in group.name.split(", ").enumerate() {
            let y = HEIGHT - BOTTOM + 18.0 + 14.0 * count(line);
            label(&mut svg, start + wide * 0.4, y, "middle", part);
        }
    }
    for (index, way) in ways.iter().enumerate() {
        key(&mut svg, index, way);
    }
    svg + "</svg>\n"
}

/// From values to pixels.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Wide enough for all of `values`.
    fn over(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let high = if high > low { high } else { low + 1.0 };
        Self {
            low,
            high,
            from,
            to,
        }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Whole numbers on it: of a logarithmic axis the powers of ten.
    fn whole(&self) -> impl Iterator<Item = f64> {
        let high = self.high;
        std::iter::successors(Some(self.low.ceil()), |it| Some(it + 1.0))
            .take_while(move |it| *it <= high)
    }

    /// Every tenth of one, or every half if that were too many.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let high = self.high;
        let step = if high > 1.5 { 0.5 } else { 0.1 };
        (0..)
            .map(move |it| f64::from(it) * step)
            .take_while(move |it| *it <= high)
    }
}

fn head(title: &str, x_label: &str, y_label: &str) -> String {
    let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    label(&mut svg, middle, 22.0, "middle", title);
    label(&mut svg, middle, HEIGHT - 12.0, "middle", x_label);
    let y = f64::midpoint(TOP, HEIGHT - BOTTOM);
    put(
        &mut svg,
        &format!(
            "<text transform=\"translate(18,{y}) rotate(-90)\" text-anchor=\"middle\" fill=\"#333333\">{y_label}</text>"
        ),
    );
    svg
}

fn put(svg: &mut String, element: &str) {
    // Writing to a string does not fail.
    let _written = writeln!(svg, "{element}");
}

fn label(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    put(
        svg,
        &format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#333333\">{text}</text>"
        ),
    );
}

fn rule(svg: &mut String, y: f64) {
    let right = WIDTH - RIGHT;
    put(
        svg,
        &format!(
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>"
        ),
    );
}

fn whisker(svg: &mut String, x: f64, low: f64, high: f64, colour: &str) {
    put(
        svg,
        &format!(
            "<line x1=\"{x:.1}\" y1=\"{low:.1}\" x2=\"{x:.1}\" y2=\"{high:.1}\" stroke=\"{colour}\"/>"
        ),
    );
}

fn key(svg: &mut String, index: usize, name: &str) {
    let (x, y) = (WIDTH - RIGHT + 16.0, TOP + 10.0 + 20.0 * count(index));
    let colour = colour(index);
    put(
        svg,
        &format!(
            "<rect x=\"{x}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>",
            y - 10.0
        ),
    );
    label(svg, x + 18.0, y, "start", name);
}

fn colour(index: usize) -> &'static str {
    COLOURS
        .iter()
        .copied()
        .cycle()
        .nth(index)
        .unwrap_or("#000000")
}

fn count(number: usize) -> f64 {
    bpf_tests::bench::statistics::as_float(number)
}

/// A power of ten.
fn short(value: f64) -> String {
    if value >= 1_000.0 {
        format!("{:.0},000", value / 1_000.0)
    } else if value >= 1.0 {
        format!("{value:.0}")
    } else {
        format!("{value}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(value: f64) -> Interval {
        Interval {
            value,
            low: value * 0.9,
            high: value * 1.1,
        }
    }

    #[test]
    fn a_line_has_all_its_points_within_the_frame() {
        let line = Line {
            name: "eBPF".to_owned(),
            points: vec![(1.0, at(5.0)), (10_000.0, at(0.0))],
        };
        let svg = lines("title", "services", "us", &[line]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("10,000") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_gap_has_no_bar() {
        let group = Group {
            name: "bulk, 1 stream".to_owned(),
            bars: vec![Some(at(0.5)), None, Some(at(0.2))],
        };
        let ways = ["a", "b", "c"].map(str::to_owned);
        let svg = bars("title", "ratio", &ways, &[group]);
        // The paper, three keys and two bars.
        assert_eq!(svg.matches("<rect").count(), 1 + 3 + 2);
    }

    #[test]
    fn nothing_measured_is_an_empty_frame() {
        let svg = lines("title", "x", "y", &[]);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
