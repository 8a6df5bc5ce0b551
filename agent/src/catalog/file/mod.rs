//! The file catalog: a directory of YAML, JSON and HCL files in Consul's terms.
//!
//! Each file is read whole or not at all: one that cannot be understood keeps what it said last, and so does a
//! directory that cannot be listed. `docs/catalog.md` is the reference of what files may say.

pub(crate) mod content;
mod entries;
mod expressions;
mod format;
mod scan;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use self::content::{Content, Registered};
use super::{
    destination::{Destination, HostName},
    model::{
        Instance, InstanceId, Intention, IntentionMatch, NodeName, Ports, Service, ServiceDefaults,
        ServiceName, Snapshot,
    },
};

/// What a file may leave out.
#[derive(Debug, Clone)]
pub struct FileContext {
    /// The node of services that name none.
    pub local_node: NodeName,
    /// Its address.
    pub local_address: Option<IpAddr>,
    /// The tunnel port of instances that declare none.
    pub tunnel_port: u16,
}

/// Reads the directory, again and again, remembering what each file last said.
#[derive(Debug)]
pub struct FileSource {
    directory: PathBuf,
    context: FileContext,
    last_good: BTreeMap<PathBuf, Content>,
    /// Whether everything could be read at once, ever.
    was_read_whole: bool,
}

/// What the directory says now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Everything, whole.
    pub snapshot: Snapshot,
    /// What is wrong or has no effect, by file.
    pub problems: Vec<Problem>,
}

/// Something to tell about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file or directory.
    pub file: PathBuf,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, and what was expected.
    pub message: String,
}

/// How bad a [`Problem`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Something that was meant to hold does not.
    Error,
    /// Something was read and has no effect.
    Note,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.message)
    }
}

impl FileSource {
    /// Nothing is read yet.
    pub fn new(directory: PathBuf, context: FileContext) -> Self {
        Self {
            directory,
            context,
            last_good: BTreeMap::new(),
            was_read_whole: false,
        }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads everything. What cannot be read keeps what it said last, and is among the problems.
    pub fn load(&mut self) -> Loaded {
        let mut problems = Vec::new();
        let scan = scan::scan(&self.directory);
        let unlisted: Vec<PathBuf> = scan.failed.iter().map(|(path, _)| path.clone()).collect();
        for (file, message) in scan.failed {
            problems.push(Problem {
                file,
                severity: Severity::Error,
                message,
            });
        }
        // A file is gone only if the directory it was in could be listed.
        self.last_good.retain(|file, _| {
            scan.files.contains_key(file) || unlisted.iter().any(|dir| file.starts_with(dir))
        });
        for (file, text) in scan.files {
            let read = text.and_then(|text| content::read(&file, &text, &self.context));
            match read {
                Ok(content) => {
                    self.last_good.insert(file, content);
                }
                Err(message) => {
                    let kept = if self.last_good.contains_key(&file) {
                        "; what it said before still holds"
                    } else {
                        "; nothing of it holds"
                    };
                    let message = format!("{message}{kept}");
                    problems.push(Problem {
                        file,
                        severity: Severity::Error,
                        message,
                    });
                }
            }
        }
        // Later, what cannot be read keeps what it said.
        self.was_read_whole |= problems.is_empty();
        let snapshot = self.combine(&mut problems);
        Loaded { snapshot, problems }
    }

    /// Puts the files together, in the order of their paths; the first to claim something has it.
    fn combine(&self, problems: &mut Vec<Problem>) -> Snapshot {
        let mut services: BTreeMap<ServiceName, Building> = BTreeMap::new();
        let mut instances: HashSet<(NodeName, InstanceId)> = HashSet::new();
        let mut nodes: BTreeMap<NodeName, IpAddr> = BTreeMap::new();
        let mut intentions: Vec<Intention> = Vec::new();
        let mut pairs: HashSet<(IntentionMatch, IntentionMatch)> = HashSet::new();
        let mut with_defaults: HashSet<&ServiceName> = HashSet::new();
        let mut outside = Outside::default();
        for (file, content) in &self.last_good {
            let mut tell = |severity, message| {
                problems.push(Problem {
                    file: file.clone(),
                    severity,
                    message,
                });
            };
            for registered in &content.instances {
                if let Some(address) = registered.node_address {
                    let node = registered.instance.node.clone();
                    nodes.entry(node).or_insert(address);
                }
                let Registered {
                    service, instance, ..
                } = registered;
                if instances.insert((instance.node.clone(), instance.id.clone())) {
                    services.entry(service.clone()).or_default().add(registered);
                } else {
                    let (id, node) = (&instance.id, &instance.node);
                    tell(
                        Severity::Error,
                        format!(
                            "id {id} on node {node} is taken by another service definition; this one is left out"
                        ),
                    );
                }
            }
            for intention in &content.intentions {
                let pair = (intention.source.clone(), intention.destination.clone());
                if pairs.insert(pair) {
                    intentions.push(Intention {
                        entry: file.display().to_string().into(),
                        ..intention.clone()
                    });
                } else {
                    tell(
                        Severity::Error,
                        format!(
                            "a second intention {} => {} is left out",
                            intention.source, intention.destination
                        ),
                    );
                }
            }
            for (name, defaults) in &content.defaults {
                if with_defaults.insert(name) {
                    services.entry(name.clone()).or_default().defaults = defaults.clone();
                    outside.add(file, name, defaults);
                } else {
                    tell(
                        Severity::Error,
                        format!("a second service-defaults for {name} is left out"),
                    );
                }
            }
            for note in &content.notes {
                tell(Severity::Note, note.clone());
            }
        }
        outside.check(&mut services, problems);
        let services = services
            .into_iter()
            .map(|(name, building)| (name.clone(), Arc::new(building.finish(name))))
            .collect();
        Snapshot {
            is_whole: self.was_read_whole,
            services,
            nodes,
            intentions,
            default_intention: None,
        }
    }
}

/// Destinations outside the mesh, in the order in which they are said.
#[derive(Debug, Default)]
struct Outside<'a> {
    destinations: Vec<(&'a PathBuf, &'a ServiceName, &'a Destination)>,
}

impl<'a> Outside<'a> {
    fn add(&mut self, file: &'a PathBuf, name: &'a ServiceName, defaults: &'a ServiceDefaults) {
        let destination = defaults.destination.as_deref();
        self.destinations
            .extend(destination.map(|destination| (file, name, destination)));
    }

    /// Leaves out what cannot be: a service that is both inside and outside, and one host of two services.
    fn check(&self, services: &mut BTreeMap<ServiceName, Building>, problems: &mut Vec<Problem>) {
        let mut hosts: BTreeMap<&HostName, &ServiceName> = BTreeMap::new();
        for (file, name, destination) in &self.destinations {
            let Some(service) = services.get_mut(*name) else {
                continue;
            };
            let conflict = if service.instances.is_empty() {
                let host = destination.host();
                let owner = host.map(|host| (host, *hosts.entry(host).or_insert(name)));
                owner
                    .filter(|(_, owner)| owner != name)
                    .map(|(host, owner)| format!("{host} is the destination of {owner}"))
            } else {
                Some("the service has instances".to_owned())
            };
            if let Some(conflict) = conflict {
                service.defaults.destination = None;
                problems.push(Problem {
                    file: (*file).clone(),
                    severity: Severity::Error,
                    message: format!(
                        "service-defaults {name}: {conflict}: its destination is left out"
                    ),
                });
            }
        }
    }
}

/// A service while its registrations are being collected.
#[derive(Debug, Default)]
struct Building {
    instances: Vec<Arc<Instance>>,
    explicit_addresses: BTreeSet<IpAddr>,
    virtual_ports: BTreeSet<u16>,
    defaults: ServiceDefaults,
}

impl Building {
    fn add(&mut self, registered: &Registered) {
        self.instances.push(Arc::clone(&registered.instance));
        self.explicit_addresses
            .extend(&registered.explicit_addresses);
        self.virtual_ports.extend(&registered.virtual_ports);
    }

    fn finish(mut self, name: ServiceName) -> Service {
        if let Some(destination) = self.defaults.destination.clone() {
            return Service::outside(name, &destination, self.defaults);
        }
        self.instances
            .sort_by(|a, b| (&a.id, &a.node).cmp(&(&b.id, &b.node)));
        let ports = if self.virtual_ports.is_empty() {
            self.instances
                .iter()
                .map(|instance| instance.port)
                .collect()
        } else {
            self.virtual_ports
        };
        Service {
            name,
            instances: self.instances,
            explicit_addresses: self.explicit_addresses,
            ports: Ports::Listed(ports),
            defaults: self.defaults,
        }
    }
}
