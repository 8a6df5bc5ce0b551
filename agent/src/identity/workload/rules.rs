//! The compiled rules of [`super`]: pure, from a cgroup's path or a user to a service.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::OsStr,
    fmt,
    path::{Component, Path, PathBuf},
};

use crate::{
    catalog::model::ServiceName,
    config::{WorkloadConfig, WorkloadRule},
};

/// Rules by kind.
#[derive(Debug, Default)]
pub(super) struct Rules {
    cgroups: BTreeMap<PathBuf, ServiceName>,
    units: BTreeMap<String, ServiceName>,
    users: BTreeMap<u32, ServiceName>,
    namespaces: BTreeMap<PathBuf, ServiceName>,
}

impl Rules {
    pub(super) fn compile(workloads: &[WorkloadConfig]) -> Result<Self, RuleConflict> {
        let mut rules = Self::default();
        for WorkloadConfig {
            service,
            rule,
            instance: _,
        } in workloads
        {
            match rule {
                WorkloadRule::Cgroup(path) => {
                    add(
                        &mut rules.cgroups,
                        normal(path),
                        service,
                        "cgroup",
                        |path| path.display().to_string(),
                    )?;
                }
                WorkloadRule::Unit(unit) => {
                    add(
                        &mut rules.units,
                        unit_name(unit),
                        service,
                        "unit",
                        Clone::clone,
                    )?;
                }
                WorkloadRule::User(uid) => {
                    add(&mut rules.users, *uid, service, "user", u32::to_string)?;
                }
                WorkloadRule::Netns(path) => {
                    add(
                        &mut rules.namespaces,
                        path.clone(),
                        service,
                        "netns",
                        |path| path.display().to_string(),
                    )?;
                }
            }
        }
        Ok(rules)
    }

    /// The service of the rule that names the longest part of `path`; at the same length a path beats a unit.
    pub(super) fn cgroup(&self, path: &Path) -> Option<&ServiceName> {
        let path = normal(path);
        let unit = self.unit(&path);
        let cgroup = path.ancestors().find_map(|ancestor| {
            let service = self.cgroups.get(ancestor)?;
            Some((ancestor.components().count(), service))
        });
        match (cgroup, unit) {
            (Some((cgroup, _)), Some((unit, service))) if unit > cgroup => Some(service),
            (Some((_, service)), _) | (None, Some((_, service))) => Some(service),
            (None, None) => None,
        }
    }

    /// The unit that `path` is in, if a rule names it, with the number of path components up to it.
    ///
    /// Only slices may stand before a unit: below one, systemd hands the tree to somebody else (a user's
    /// own manager, a container runtime), who could make a cgroup of any name.
    fn unit(&self, path: &Path) -> Option<(usize, &ServiceName)> {
        let mut found = None;
        for (depth, component) in path.components().enumerate() {
            let Component::Normal(name) = component else {
                continue;
            };
            // A name may be any bytes. One that is no text is no unit of a rule, but may be below one.
            if let Some(service) = name.to_str().and_then(|name| self.units.get(name)) {
                found = Some((depth + 1, service));
            }
            if Path::new(name).extension() != Some(OsStr::new("slice")) {
                break;
            }
        }
        found
    }

    /// Whether any rule takes something for `service`.
    pub(super) fn name(&self, service: &ServiceName) -> bool {
        let by_path = self.cgroups.values().chain(self.namespaces.values());
        let all = by_path
            .chain(self.units.values())
            .chain(self.users.values());
        all.into_iter().any(|named| named == service)
    }

    pub(super) fn user(&self, uid: u32) -> Option<&ServiceName> {
        self.users.get(&uid)
    }

    pub(super) fn namespace(&self, path: &Path) -> Option<&ServiceName> {
        self.namespaces.get(path)
    }

    pub(super) fn namespaces(&self) -> impl Iterator<Item = (&Path, &ServiceName)> {
        self.namespaces
            .iter()
            .map(|(path, service)| (path.as_path(), service))
    }
}

fn add<K: Ord>(
    rules: &mut BTreeMap<K, ServiceName>,
    key: K,
    service: &ServiceName,
    kind: &'static str,
    show: impl Fn(&K) -> String,
) -> Result<(), RuleConflict> {
    match rules.entry(key) {
        Entry::Vacant(free) => {
            free.insert(service.clone());
            Ok(())
        }
        Entry::Occupied(taken) if taken.get() == service => Ok(()),
        Entry::Occupied(taken) => Err(RuleConflict {
            kind,
            matched: show(taken.key()),
            services: [taken.get().clone(), service.clone()],
        }),
    }
}

/// The path from the root of the hierarchy, whether or not it was written with a leading or trailing `/`.
pub(super) fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    normal.extend(path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        Component::RootDir | Component::CurDir | Component::ParentDir | Component::Prefix(_) => {
            None
        }
    }));
    normal
}

/// A unit's full name: as for systemctl, `web` is `web.service`.
fn unit_name(unit: &str) -> String {
    const SUFFIXES: [&str; 3] = ["service", "scope", "slice"];
    match unit.rsplit_once('.') {
        Some((_, suffix)) if SUFFIXES.contains(&suffix) => unit.to_owned(),
        _other => format!("{unit}.service"),
    }
}

/// Two rules for the same thing: which service it is would be a matter of luck.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleConflict {
    kind: &'static str,
    matched: String,
    services: [ServiceName; 2],
}

impl fmt::Display for RuleConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            matched,
            services: [first, second],
        } = self;
        write!(
            f,
            "workload rule {kind} = {matched:?} is given for two services, {first} and {second}"
        )
    }
}

impl std::error::Error for RuleConflict {}
