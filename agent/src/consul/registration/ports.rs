//! The port at which each local instance takes tunnels: one of its own, the same across restarts.
//!
//! It follows from the instance's id; where ids collide the first one has it. What was given is kept in a state file,
//! also for instances that are gone: one that comes back finds its port, and callers with an old answer of Consul's
//! meet nobody there. Only when the range runs out does a new instance get the port of the one that went away first.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::RangeInclusive,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{catalog::model::InstanceId, stable_hash::fnv1a, state_file};

const STATE_VERSION: u32 = 1;

/// Gives out ports. One per agent.
#[derive(Debug)]
pub struct InboundPorts {
    range: RangeInclusive<u16>,
    state_file: Option<PathBuf>,
    given: BTreeMap<InstanceId, Given>,
    /// The state file says something else than `given`.
    is_unsaved: bool,
}

/// What one instance has, or had until `freed_at`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Given {
    port: u16,
    /// Seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    freed_at: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    version: u32,
    instances: BTreeMap<InstanceId, Given>,
}

/// Something is wrong with inbound ports; the rest holds.
#[derive(Debug, thiserror::Error)]
pub enum PortProblem {
    /// No port is left.
    #[error("no free inbound port for {instance} in {}-{}: widen consul.inbound_ports", range.start(), range.end())]
    Exhausted {
        /// Who goes without.
        instance: InstanceId,
        /// The range.
        range: RangeInclusive<u16>,
    },
    /// What was given out could not be remembered; it holds until the agent ends.
    #[error("remember inbound ports in {}", path.display())]
    NotSaved {
        /// The state file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state file was damaged; it was moved aside and ports follow from ids again.
    #[error("state file {} is damaged and was moved to {}", path.display(), aside.display())]
    Damaged {
        /// The state file.
        path: PathBuf,
        /// Where it is now.
        aside: PathBuf,
        /// What was wrong with it.
        #[source]
        source: io::Error,
    },
}

impl InboundPorts {
    /// Reads the state file, if there is one. A damaged one is moved aside and reported, not fatal.
    pub fn new(
        range: RangeInclusive<u16>,
        state_file: Option<PathBuf>,
    ) -> (Self, Option<PortProblem>) {
        let read = state_file.as_deref().map(state_file::read).transpose();
        let parsed = read.and_then(|bytes| bytes.flatten().as_deref().map(parse).transpose());
        let (given, problem) = match parsed {
            Ok(given) => (given.unwrap_or_default(), None),
            Err(source) => {
                let path = state_file.clone().unwrap_or_default();
                let aside = state_file::move_aside(&path);
                let problem = PortProblem::Damaged {
                    path,
                    aside,
                    source,
                };
                (BTreeMap::new(), Some(problem))
            }
        };
        let ports = Self {
            range,
            state_file,
            given,
            is_unsaved: false,
        };
        (ports, problem)
    }

    /// Gives each of `instances` its port.
    pub fn assign(
        &mut self,
        instances: &BTreeSet<InstanceId>,
        now: SystemTime,
    ) -> (BTreeMap<InstanceId, u16>, Vec<PortProblem>) {
        let before = self.given.clone();
        self.mark(instances, now);
        let mut problems = Vec::new();
        for instance in instances {
            if !self.given.contains_key(instance) {
                match self.free_port(instance) {
                    Some(port) => {
                        let given = Given {
                            port,
                            freed_at: None,
                        };
                        self.given.insert(instance.clone(), given);
                    }
                    None => problems.push(PortProblem::Exhausted {
                        instance: instance.clone(),
                        range: self.range.clone(),
                    }),
                }
            }
        }
        self.is_unsaved |= before != self.given;
        problems.extend(self.save());
        let of = |instance: &InstanceId| Some((instance.clone(), self.given.get(instance)?.port));
        (instances.iter().filter_map(of).collect(), problems)
    }

    /// Notes who is gone since when, and drops what a new range leaves out or a damaged file gave to two.
    fn mark(&mut self, instances: &BTreeSet<InstanceId>, now: SystemTime) {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let range = self.range.clone();
        let mut taken = BTreeSet::new();
        self.given.retain(|instance, given| {
            given.freed_at = if instances.contains(instance) {
                None
            } else {
                given.freed_at.or(Some(now))
            };
            range.contains(&given.port) && taken.insert(given.port)
        });
    }

    /// A port that nobody has, tried from the one that the id falls on; else that of whoever is gone longest.
    fn free_port(&mut self, instance: &InstanceId) -> Option<u16> {
        let taken: BTreeSet<u16> = self.given.values().map(|given| given.port).collect();
        let (first, last) = (*self.range.start(), *self.range.end());
        let count = u64::from(last.checked_sub(first)?) + 1;
        let offset = u16::try_from(fnv1a(instance.as_str().as_bytes()) % count).ok()?;
        let start = first + offset;
        let free = (start..=last)
            .chain(first..start)
            .find(|port| !taken.contains(port));
        free.or_else(|| {
            let gone = self.given.iter().filter_map(|(id, given)| {
                let freed_at = given.freed_at?;
                Some((freed_at, id.clone(), given.port))
            });
            let (_, longest, port) = gone.min()?;
            self.given.remove(&longest);
            Some(port)
        })
    }

    /// Writes the state file if it says something else. What could not be written is tried again next time.
    fn save(&mut self) -> Option<PortProblem> {
        let path = self.state_file.clone().filter(|_| self.is_unsaved)?;
        let state = StateFile {
            version: STATE_VERSION,
            instances: self.given.clone(),
        };
        let bytes = serde_json::to_vec_pretty(&state).map_err(io::Error::from);
        let written = bytes.and_then(|bytes| state_file::write(&path, &bytes));
        self.is_unsaved = written.is_err();
        let source = written.err()?;
        Some(PortProblem::NotSaved { path, source })
    }
}

fn parse(bytes: &[u8]) -> io::Result<BTreeMap<InstanceId, Given>> {
    let state: StateFile = serde_json::from_slice(bytes)?;
    if state.version != STATE_VERSION {
        let message = format!("version {}: expected {STATE_VERSION}", state.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(state.instances)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;

    fn ids(names: &[&str]) -> BTreeSet<InstanceId> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn without_problems(
        ports: &mut InboundPorts,
        names: &[&str],
        now: SystemTime,
    ) -> BTreeMap<InstanceId, u16> {
        let (given, problems) = ports.assign(&ids(names), now);
        assert!(problems.is_empty(), "{problems:?}");
        given
    }

    #[test]
    fn each_has_its_own_and_keeps_it_across_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("state/ports.json");
        let (mut ports, problem) = InboundPorts::new(21_500..=21_509, Some(file.clone()));
        assert!(problem.is_none());
        let all = ["a", "b", "c", "d", "e", "f"];
        let given = without_problems(&mut ports, &all, at(1));
        let different: BTreeSet<u16> = given.values().copied().collect();
        assert_eq!(different.len(), all.len());
        assert!(
            different
                .iter()
                .all(|port| (21_500..=21_509).contains(port))
        );

        // Another life, in another order, with fewer and then all of them.
        let (mut ports, problem) = InboundPorts::new(21_500..=21_509, Some(file));
        assert!(problem.is_none());
        for names in [&["f"][..], &["e", "b"], &all] {
            for (id, port) in without_problems(&mut ports, names, at(2)) {
                assert_eq!(given.get(&id), Some(&port), "{id}");
            }
        }
    }

    #[test]
    fn the_one_gone_longest_makes_room() {
        let (mut ports, _) = InboundPorts::new(5000..=5002, None);
        let given = without_problems(&mut ports, &["a", "b", "c"], at(1));
        let of = |name: &str| given[&name.parse::<InstanceId>().unwrap()];
        without_problems(&mut ports, &["a", "c"], at(2));
        without_problems(&mut ports, &["a"], at(3));
        let with_d = without_problems(&mut ports, &["a", "d"], at(4));
        assert_eq!(
            with_d.values().copied().collect::<BTreeSet<_>>(),
            [of("a"), of("b")].into()
        );
        let (given, problems) = ports.assign(&ids(&["a", "d", "e", "f"]), at(5));
        assert_eq!(given.len(), 3);
        assert_eq!(
            problems[0].to_string(),
            "no free inbound port for f in 5000-5002: widen consul.inbound_ports"
        );
    }

    #[test]
    fn a_new_range_moves_those_that_it_leaves_out() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ports.json");
        let (mut ports, _) = InboundPorts::new(5000..=5009, Some(file.clone()));
        let before = without_problems(&mut ports, &["a", "b", "c", "d"], at(1));
        let (mut ports, _) = InboundPorts::new(5005..=5020, Some(file));
        let after = without_problems(&mut ports, &["a", "b", "c", "d"], at(2));
        for (id, port) in &after {
            assert!((5005..=5020).contains(port));
            assert!(before[id] < 5005 || before[id] == *port);
        }
    }

    #[test]
    fn damaged_state_is_moved_aside() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ports.json");
        for damage in ["{", r#"{"version": 7, "instances": {}}"#] {
            fs::write(&file, damage).unwrap();
            let (mut ports, problem) = InboundPorts::new(5000..=5009, Some(file.clone()));
            assert!(matches!(problem, Some(PortProblem::Damaged { .. })));
            assert!(!file.exists() && directory.path().join("ports.damaged").exists());
            without_problems(&mut ports, &["a"], at(1));
            assert!(file.exists());
        }
        let twice = r#"{"version": 1, "instances": {"a": {"port": 5001}, "b": {"port": 5001}}}"#;
        fs::write(&file, twice).unwrap();
        let (mut ports, _) = InboundPorts::new(5000..=5009, Some(file));
        let given = without_problems(&mut ports, &["a", "b"], at(1));
        assert_eq!(given[&"a".parse::<InstanceId>().unwrap()], 5001);
        assert_ne!(given[&"b".parse::<InstanceId>().unwrap()], 5001);
    }
}
