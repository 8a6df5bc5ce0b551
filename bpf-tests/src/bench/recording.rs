//! What was measured: every sample, by what it is of.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

/// Of a run that takes long.
#[derive(Debug)]
pub enum Progress<'a> {
    /// What it is at, for people.
    At(&'a str),
    /// So many rounds are over, with these samples so far.
    Rounds(usize, &'a Recording),
}

/// Is told of a run's progress; an error ends the run.
pub type Tell<'a> = dyn FnMut(Progress<'_>) -> Result<()> + 'a;

/// One sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// What was measured: `connect p50`.
    pub measure: &'static str,
    /// In which unit: `us`.
    pub unit: &'static str,
    /// How much.
    pub value: f64,
}

impl Sample {
    /// `value` `unit` of `measure`.
    pub fn new(measure: &'static str, unit: &'static str, value: f64) -> Self {
        Self {
            measure,
            unit,
            value,
        }
    }
}

/// What a sample was taken of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    /// Which of the ways that are compared: `ebpf`.
    pub variant: String,
    /// How many services there were, where that is varied.
    pub services: Option<u32>,
}

/// All samples of a run.
#[derive(Debug, Clone, Default)]
pub struct Recording {
    series: BTreeMap<(&'static str, Subject), (&'static str, Vec<f64>)>,
    gaps: Vec<(Subject, String)>,
}

impl Recording {
    /// Adds a sample.
    pub fn add(&mut self, subject: &Subject, sample: Sample) {
        let key = (sample.measure, subject.clone());
        let (_unit, values) = self
            .series
            .entry(key)
            .or_insert_with(|| (sample.unit, vec![]));
        values.push(sample.value);
    }

    /// Adds samples.
    pub fn extend(&mut self, subject: &Subject, samples: impl IntoIterator<Item = Sample>) {
        for sample in samples {
            self.add(subject, sample);
        }
    }

    /// Remembers that something could not be measured, and why.
    pub fn gap(&mut self, subject: &Subject, why: String) {
        self.gaps.push((subject.clone(), why));
    }

    /// The samples of a measure, in the order in which they were taken. Empty if there are none.
    pub fn values(&self, measure: &'static str, subject: &Subject) -> &[f64] {
        let found = self.series.get(&(measure, subject.clone()));
        found.map_or(&[], |(_unit, values)| values)
    }

    /// All of it.
    pub fn to_json(&self) -> Value {
        let subject = |subject: &Subject| {
            let mut json = json!({ "variant": subject.variant });
            if let (Some(services), Some(object)) = (subject.services, json.as_object_mut()) {
                object.insert("services".to_owned(), services.into());
            }
            json
        };
        let series = |((measure, of), (unit, values)): (&(&str, Subject), &(&str, Vec<f64>))| json!({ "measure": measure, "unit": unit, "of": subject(of), "values": values });
        let gap = |(of, why): &(Subject, String)| json!({ "of": subject(of), "why": why });
        json!({
            "series": self.series.iter().map(series).collect::<Vec<_>>(),
            "gaps": self.gaps.iter().map(gap).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stay_in_order_and_apart() {
        let subject = |variant: &str| Subject {
            variant: variant.to_owned(),
            services: Some(10),
        };
        let (ebpf, none) = (subject("ebpf"), subject("none"));
        let mut recording = Recording::default();
        for value in [3.0, 1.0] {
            recording.add(&ebpf, Sample::new("connect p50", "us", value));
        }
        recording.add(&none, Sample::new("connect p50", "us", 2.0));
        recording.gap(&none, "no time".to_owned());
        assert_eq!(recording.values("connect p50", &ebpf), [3.0, 1.0]);
        assert_eq!(recording.values("connect p99", &ebpf), [0.0; 0]);
        let json = recording.to_json();
        assert_eq!(json["series"][0]["values"], json!([3.0, 1.0]));
        assert_eq!(json["series"][1]["of"]["variant"], "none");
        assert_eq!(json["gaps"][0]["why"], "no time");
    }
}
