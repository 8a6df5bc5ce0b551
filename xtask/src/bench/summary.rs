//! From every sample to medians, intervals and ratios. Pure.

use anyhow::{Context as _, Result};
use bpf_tests::bench::statistics::{self, Estimate};
use fastrand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is kept of a run: docs/bench/*.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Summary {
    /// `capture` or `mesh`.
    pub(super) bench: String,
    /// When, in seconds since 1970.
    pub(super) unix_time: u64,
    pub(super) seed: u64,
    pub(super) rounds: usize,
    /// For how long each load was put on in a round.
    pub(super) seconds: u64,
    pub(super) machine: serde_json::Map<String, Value>,
    pub(super) versions: serde_json::Map<String, Value>,
    pub(super) figures: Vec<Figure>,
    pub(super) gaps: Vec<Gap>,
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Figure {
    pub(super) measure: String,
    pub(super) unit: String,
    pub(super) of: Of,
    /// The median over this many samples.
    pub(super) samples: usize,
    pub(super) median: Interval,
    /// To the same of what everything is compared with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ratio: Option<Interval>,
}

/// What a figure is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Of {
    pub(super) variant: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) services: Option<u32>,
}

/// What could not be measured, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Gap {
    pub(super) of: Of,
    pub(super) why: String,
}

/// A figure with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Interval {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl From<Estimate> for Interval {
    fn from(it: Estimate) -> Self {
        Self {
            value: short(it.value),
            low: short(it.low),
            high: short(it.high),
        }
    }
}

/// Four digits: more than any of it is good for.
fn short(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// What a file with all samples has of a measure.
#[derive(Debug, Deserialize)]
struct Series {
    measure: String,
    unit: String,
    of: Of,
    values: Vec<f64>,
}

impl Summary {
    /// Of a file with all samples.
    ///
    /// # Errors
    /// If it is none.
    pub(super) fn of(raw: &Value) -> Result<Self> {
        let series = raw.get("series").context("no samples")?;
        let series: Vec<Series> =
            serde_json::from_value(series.clone()).context("reading the samples")?;
        let mut head = raw.clone();
        if let Some(head) = head.as_object_mut() {
            head.remove("series");
            head.insert("figures".to_owned(), Value::Array(vec![]));
        }
        let mut summary: Self = serde_json::from_value(head).context("reading the head")?;
        let base = |it: &Series| {
            let is_base = |other: &&Series| {
                other.measure == it.measure
                    && other.of.services == it.of.services
                    && other.of.variant == summary.base()
            };
            series.iter().find(is_base).filter(|base| base.of != it.of)
        };
        let random = &mut Rng::with_seed(summary.seed);
        let mut figures = vec![];
        for it in &series {
            let Some(median) = statistics::estimate(&it.values, random) else {
                continue;
            };
            let ratio =
                base(it).and_then(|base| statistics::ratio(&it.values, &base.values, random));
            figures.push(Figure {
                measure: it.measure.clone(),
                unit: it.unit.clone(),
                of: it.of.clone(),
                samples: it.values.len(),
                median: median.into(),
                ratio: ratio.map(Interval::from),
            });
        }
        summary.figures = figures;
        Ok(summary)
    }

    /// What everything is compared with.
    fn base(&self) -> &'static str {
        if self.bench == "mesh" {
            "direct"
        } else {
            "none"
        }
    }

    /// The figure of `measure`.
    pub(super) fn find(
        &self,
        measure: &str,
        variant: &str,
        services: Option<u32>,
    ) -> Option<&Figure> {
        self.figures.iter().find(|it| {
            it.measure == measure && it.of.variant == variant && it.of.services == services
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn raw() -> Value {
        json!({
            "bench": "mesh", "unix_time": 1, "seed": 7, "rounds": 3, "seconds": 1,
            "machine": { "kernel": "6.18" }, "versions": {}, "gaps": [],
            "series": [
                { "measure": "bulk, 1 stream", "unit": "Gbit/s", "of": { "variant": "direct" }, "values": [20.0, 21.0, 19.0] },
                { "measure": "bulk, 1 stream", "unit": "Gbit/s", "of": { "variant": "Sidestep, connect" }, "values": [10.0, 9.5, 10.5] },
            ],
        })
    }

    #[test]
    fn ratios_are_to_the_direct_way() {
        let summary = Summary::of(&raw()).unwrap();
        let figure = summary
            .find("bulk, 1 stream", "Sidestep, connect", None)
            .unwrap();
        let ratio = figure.ratio.unwrap();
        assert!((ratio.value - 0.5).abs() < 1e-9, "{ratio:?}");
        assert!(ratio.low < 0.5 && ratio.high > 0.5);
        assert_eq!(figure.samples, 3);
        let direct = summary.find("bulk, 1 stream", "direct", None).unwrap();
        assert_eq!(direct.ratio, None);
    }

    #[test]
    fn a_summary_is_read_as_it_was_written() {
        let summary = Summary::of(&raw()).unwrap();
        let text = serde_json::to_string(&summary).unwrap();
        assert_eq!(serde_json::from_str::<Summary>(&text).unwrap(), summary);
        assert_eq!(Summary::of(&raw()).unwrap(), summary);
    }

    #[test]
    fn four_digits_stay() {
        assert!((short(12_345.678) - 12_350.0).abs() < 1e-9);
        assert!((short(0.012_345) - 0.012_35).abs() < 1e-9);
    }
}
