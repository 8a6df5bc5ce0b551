//! Connections that come without pause, while something else happens.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Size;
use crate::{program::Running, workload::Workload};

/// A load that goes on until it is ended: it asks every target for its name.
pub(super) struct Storm {
    targets: PathBuf,
    log: PathBuf,
    running: Running,
}

/// What became of it.
pub(super) struct Report {
    /// How many connections reached whom they meant.
    pub(super) right: u64,
    /// How many reached another.
    pub(super) wrong: u64,
    ms: u64,
    /// When each failed attempt began and ended, and how.
    pub(super) failures: Vec<(u64, u64, String)>,
}

impl Storm {
    /// Begins to ask, as `client`, what the file `targets` has: a line with address and name for each.
    pub(super) fn begin(client: &Workload, targets: PathBuf, size: Size) -> Result<Self> {
        let log = client.directory().join("storm.log");
        let rate = size.pick(150, 2_000);
        let peer = client.peer(&format!("storm {} 16 {rate}", targets.display()))?;
        let running = peer.log(&log).spawn()?;
        Ok(Self {
            targets,
            log,
            running,
        })
    }

    /// Ends it.
    pub(super) fn end(mut self) -> Result<Report> {
        fs::remove_file(&self.targets)?;
        self.running
            .wait(Duration::from_mins(2))?
            .context("the load does not end")?;
        let said = fs::read_to_string(&self.log)?;
        let report: Value =
            serde_json::from_str(&said).with_context(|| format!("reading {said:?}"))?;
        let number = |value: Option<&Value>| value.and_then(Value::as_u64).unwrap_or(0);
        let failures = report.get("failures").and_then(Value::as_array);
        Ok(Report {
            right: number(report.get("right")),
            wrong: number(report.get("wrong")),
            ms: number(report.get("ms")),
            failures: failures
                .context("no failures in the report")?
                .iter()
                .map(|f| {
                    let end = f.get(2).and_then(Value::as_str).unwrap_or_default();
                    (number(f.get(0)), number(f.get(1)), end.to_owned())
                })
                .collect(),
        })
    }
}

impl Report {
    /// For people: how many, and how many a second.
    pub(super) fn load(&self) -> String {
        let rate = self.right * 1_000 / self.ms.max(1);
        format!("{} connections right ({rate} a second)", self.right)
    }

    /// Failed attempts that lie outside of all these times.
    pub(super) fn unexplained(&self, away: &[(u64, u64)]) -> Vec<&(u64, u64, String)> {
        let explained = |from: u64, to: u64| away.iter().any(|(a, b)| from <= *b && to >= *a);
        self.failures
            .iter()
            .filter(|(from, to, _)| !explained(*from, *to))
            .collect()
    }
}
