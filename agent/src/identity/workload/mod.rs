//! From what the kernel says of a connection's maker to the service that it is.
//!
//! Rules come from the configuration. What a rule matches is set by the kernel (network namespace, cgroup,
//! user), never by an address or a port, which a process can choose. The order of strength: a network
//! namespace, then the most specific cgroup or unit, then the user, and last what was [`discovered`].

mod rules;
pub mod discovered;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
};

use parking_lot::{Mutex, RwLock};

use discovered::{Assignments, Discovered};
pub use rules::RuleConflict;
use rules::Rules;

use crate::{
    catalog::model::ServiceName,
    config::WorkloadConfig,
    datapath::{CgroupId, Maker, NetnsCookie},
};

/// How many cgroups are remembered. A node runs hundreds; past this the memory is emptied and refilled.
const REMEMBERED_CGROUPS: usize = 4096;

/// Finds a cgroup's path by its id.
pub trait CgroupPaths: Send + Sync + 'static {
    /// The path below the mount of cgroup2, `/system.slice/web.service`; `None` if the cgroup is gone or
    /// outside what this process can see.
    fn path_of(&self, cgroup: CgroupId) -> Option<PathBuf>;
}

impl<F: Fn(CgroupId) -> Option<PathBuf> + Send + Sync + 'static> CgroupPaths for F {
    fn path_of(&self, cgroup: CgroupId) -> Option<PathBuf> {
        self(cgroup)
    }
}

/// Answers which service made a connection.
pub struct WorkloadResolver {
    cgroups: Box<dyn CgroupPaths>,
    state: RwLock<State>,
    /// Services by cgroup. Only answers, no failures: a cgroup whose path cannot be read now may be readable
    /// later. The kernel never gives an id to a second cgroup (it has a generation), so answers stay true.
    remembered: Mutex<HashMap<CgroupId, Answer>>,
}

/// Who a cgroup is, and how strong that is.
#[derive(Debug, Clone)]
enum Answer {
    /// A rule names it.
    Rule(ServiceName),
    /// It was discovered: a rule for the user is stronger.
    Discovered(ServiceName),
}

#[derive(Debug, Default)]
struct State {
    rules: Rules,
    namespaces: HashMap<NetnsCookie, ServiceName>,
    discovered: Discovered,
}

impl WorkloadResolver {
    /// Compiles the rules.
    ///
    /// # Errors
    /// [`RuleConflict`] if two of them match the same thing and name different services.
    pub fn new(
        workloads: &[WorkloadConfig],
        cgroups: impl CgroupPaths,
    ) -> Result<Self, RuleConflict> {
        Ok(Self {
            cgroups: Box::new(cgroups),
            state: RwLock::new(State {
                rules: Rules::compile(workloads)?,
                namespaces: HashMap::new(),
                discovered: Discovered::default(),
            }),
            remembered: Mutex::default(),
        })
    }

    /// Takes new rules, forgets every answer. Namespaces stay enrolled as far as the rules still name them.
    ///
    /// # Errors
    /// As [`WorkloadResolver::new`]; the old rules stay.
    pub fn reload(&self, workloads: &[WorkloadConfig]) -> Result<(), RuleConflict> {
        let rules = Rules::compile(workloads)?;
        let mut state = self.state.write();
        state
            .namespaces
            .retain(|_cookie, service| rules.namespaces().any(|(_path, named)| named == service));
        state.rules = rules;
        // Under the write lock, so that no reader can put back an answer of the old rules.
        self.remembered.lock().clear();
        Ok(())
    }

    /// The network namespaces that rules name, by the path to open, with their services.
    pub fn namespaces(&self) -> Vec<(PathBuf, ServiceName)> {
        let state = self.state.read();
        let named = state.rules.namespaces();
        named
            .map(|(path, service)| (path.to_owned(), service.clone()))
            .collect()
    }

    /// The namespace at `path`, which a rule names, turned out to be `netns`. False if no rule names it.
    pub fn enrol_namespace(&self, path: &Path, netns: NetnsCookie) -> bool {
        let mut state = self.state.write();
        let Some(service) = state.rules.namespace(path).cloned() else {
            return false;
        };
        state.namespaces.insert(netns, service);
        true
    }

    /// The service that everybody in a namespace is, if a rule names that.
    pub fn of_namespace(&self, netns: NetnsCookie) -> Option<ServiceName> {
        self.state.read().namespaces.get(&netns).cloned()
    }

    /// The namespace is gone.
    pub fn dismiss_namespace(&self, netns: NetnsCookie) {
        self.state.write().namespaces.remove(&netns);
    }

    /// Whether a rule takes something on this node for `service`.
    pub fn rules_name(&self, service: &ServiceName) -> bool {
        self.state.read().rules.name(service)
    }

    /// Puts what was discovered in force, instead of what was before.
    pub fn discover(&self, assignments: &Assignments) {
        let discovered = Discovered::new(assignments);
        let mut state = self.state.write();
        if state.discovered != discovered {
            state.discovered = discovered;
            // As when reloading.
            self.remembered.lock().clear();
        }
    }

    /// Finds a cgroup's path by its id.
    pub fn cgroups(&self) -> &dyn CgroupPaths {
        &*self.cgroups
    }

    /// The service that `maker` is.
    ///
    /// Reads the cgroup's path on the first connection of each cgroup; a system call that does not wait.
    ///
    /// # Errors
    /// [`UnknownWorkload`] if no rule matches and nothing was discovered. The connection must then be refused.
    pub fn resolve(&self, maker: &Maker) -> Result<ServiceName, UnknownWorkload> {
        let state = self.state.read();
        if let Some(service) = state.namespaces.get(&maker.netns) {
            return Ok(service.clone());
        }
        let remembered = self.remembered.lock().get(&maker.cgroup).cloned();
        let (answer, path) = match remembered {
            Some(answer) => (Some(answer), None),
            None => self.look_up(&state, maker.cgroup),
        };
        let user = || state.rules.user(maker.uid).cloned();
        let service = match answer {
            Some(Answer::Rule(service)) => Some(service),
            Some(Answer::Discovered(service)) => user().or(Some(service)),
            None => user(),
        };
        service.ok_or(UnknownWorkload {
            cgroup: maker.cgroup,
            path,
            netns: maker.netns,
            uid: maker.uid,
            process: maker.process,
        })
    }

    /// Who a cgroup is, and its path if that could be read. Remembers an answer.
    fn look_up(&self, state: &State, cgroup: CgroupId) -> (Option<Answer>, Option<PathBuf>) {
        let Some(path) = self.cgroups.path_of(cgroup) else {
            return (None, None);
        };
        let by_rule = || state.rules.cgroup(&path).cloned().map(Answer::Rule);
        let discovered = || {
            let service = state.discovered.service_of(cgroup, &path, self.cgroups());
            service.cloned().map(Answer::Discovered)
        };
        let answer = by_rule().or_else(discovered);
        if let Some(answer) = &answer {
            let mut remembered = self.remembered.lock();
            if remembered.len() >= REMEMBERED_CGROUPS {
                remembered.clear();
            }
            remembered.insert(cgroup, answer.clone());
        }
        (answer, Some(path))
    }
}

impl fmt::Debug for WorkloadResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadResolver")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// A process that no rule names and that was not discovered: its connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no [[workload]] names process {process}: cgroup {}, user {uid}, network namespace {netns}",
    CgroupName(*.cgroup, .path.as_deref())
)]
pub struct UnknownWorkload {
    /// Its cgroup.
    pub cgroup: CgroupId,
    /// The path of the cgroup, if it could be found.
    pub path: Option<PathBuf>,
    /// Its network namespace.
    pub netns: NetnsCookie,
    /// Its user.
    pub uid: u32,
    /// Its process id.
    pub process: u32,
}

struct CgroupName<'a>(CgroupId, Option<&'a Path>);

impl fmt::Display for CgroupName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Some(path) => fmt::Display::fmt(&path.display(), f),
            None => write!(f, "{} (gone or not visible)", self.0),
        }
    }
}

#[cfg(test)]
mod tests;
