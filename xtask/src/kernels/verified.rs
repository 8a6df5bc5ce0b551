//! How many instructions the verifier looks at, as recorded: what grows unnoticed ends at the kernel's limit.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::machine::{Findings, Loaded};
use crate::build;

/// Growth by more than this many percent is to be looked at by a person.
const TOLERATED: u64 = 20;

/// By series of kernels ("6.1"), object and program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Record(BTreeMap<String, BTreeMap<String, u64>>);

/// How a number compares with the recorded one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Growth {
    /// The kernel does not tell, or nothing is recorded for its series.
    Unknown,
    /// What was recorded.
    Tolerated(u64),
    /// What was recorded.
    TooMuch(u64),
}

impl Record {
    /// What was recorded last.
    ///
    /// # Errors
    /// If the file is missing or damaged.
    pub(crate) fn read() -> Result<Self> {
        let path = path();
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let all: Value =
            serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        let numbers = |programs: &Value| -> BTreeMap<String, u64> {
            let programs = programs.as_object().into_iter().flatten();
            programs
                .filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)))
                .collect()
        };
        let all = all.as_object().into_iter().flatten();
        Ok(Self(
            all.map(|(series, programs)| (series.clone(), numbers(programs)))
                .collect(),
        ))
    }

    /// Takes what was found for what is right.
    pub(crate) fn replace(&mut self, found: &Findings) {
        let programs = found.programs.iter();
        let numbers: BTreeMap<String, u64> = programs
            .filter_map(|loaded| Some((key(loaded), loaded.verified?)))
            .collect();
        if !numbers.is_empty() {
            self.0.insert(found.series(), numbers);
        }
    }

    /// Writes it where [`Self::read`] finds it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(&self) -> Result<()> {
        let path = path();
        let mut text = serde_json::to_string_pretty(&self.0).context("writing numbers")?;
        text.push('\n');
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Compares one program of `found` with what was recorded for it.
    pub(crate) fn growth(&self, found: &Findings, loaded: &Loaded) -> Growth {
        let recorded = self.0.get(&found.series());
        let recorded = recorded.and_then(|programs| programs.get(&key(loaded)));
        match (loaded.verified, recorded) {
            (Some(now), Some(then)) if now * 100 > then * (100 + TOLERATED) => {
                Growth::TooMuch(*then)
            }
            (Some(_), Some(then)) => Growth::Tolerated(*then),
            _ => Growth::Unknown,
        }
    }
}

fn key(loaded: &Loaded) -> String {
    format!("{} {}", loaded.object, loaded.program)
}

fn path() -> PathBuf {
    build::workspace().join("xtask/src/kernels/verified.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(verified: Option<u64>) -> Findings {
        Findings {
            release: "6.1.0-50-cloud-amd64".to_owned(),
            programs: vec![Loaded {
                object: "o".to_owned(),
                program: "p".to_owned(),
                verified,
                error: None,
            }],
            ..Findings::default()
        }
    }

    #[test]
    fn a_fifth_more_is_tolerated_and_no_more() {
        let mut record = Record::default();
        record.replace(&found(Some(100)));
        let growth = |verified| {
            let found = found(verified);
            record.growth(&found, &found.programs[0])
        };
        assert_eq!(growth(Some(120)), Growth::Tolerated(100));
        assert_eq!(growth(Some(121)), Growth::TooMuch(100));
        assert_eq!(growth(Some(1)), Growth::Tolerated(100));
        assert_eq!(growth(None), Growth::Unknown);
    }

    #[test]
    fn a_series_that_was_never_recorded_is_unknown() {
        let found = found(Some(100));
        let growth = Record::default().growth(&found, &found.programs[0]);
        assert_eq!(growth, Growth::Unknown);
    }

    #[test]
    fn what_is_recorded_can_be_read() {
        assert!(!Record::read().unwrap().0.is_empty());
    }
}
