//! Which local instance a tunnel is for, from the port it came in by and the server name it asks for. Pure.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    catalog::model::{Instance, ServiceName},
    identity::LocalDomain,
};

/// The instances that this node delivers to, in one version of the catalog.
#[derive(Debug, Default)]
pub struct Targets {
    by_port: HashMap<u16, AtPort>,
}

/// Who is reached at a port.
#[derive(Debug)]
enum AtPort {
    /// Several may be; the server name selects.
    Shared(Vec<Arc<Target>>),
    /// One alone, whatever its callers ask for: Consul's own servers do not look at the name either, and Envoy puts a
    /// subset into it.
    Own(Arc<Target>),
}

impl AtPort {
    fn all(&self) -> &[Arc<Target>] {
        match self {
            Self::Shared(several) => several,
            Self::Own(only) => std::slice::from_ref(only),
        }
    }
}

/// One local instance.
#[derive(Debug)]
pub struct Target {
    /// Its service.
    pub service: ServiceName,
    /// The instance.
    pub instance: Arc<Instance>,
    service_sni: String,
    instance_sni: String,
}

/// Why a tunnel is for nobody here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TargetError {
    /// Nothing of this node is reached through that port.
    #[error("no instance on this node takes tunnels at port {port}")]
    NoInstance {
        /// The port the tunnel came in by.
        port: u16,
    },
    /// The port is shared, and the peer did not say whom it wants.
    #[error(
        "{candidates} instances share port {port} and the peer sent no server name; \
         give each a `connect.sidecar_service.port` of its own if its callers cannot send one"
    )]
    Ambiguous {
        /// The port the tunnel came in by.
        port: u16,
        /// How many instances it could be for.
        candidates: usize,
    },
    /// The server name is that of no instance here.
    #[error("server name {sni:?} is that of no instance at port {port} of this node")]
    UnknownName {
        /// The port the tunnel came in by.
        port: u16,
        /// What the peer asked for.
        sni: String,
    },
}

impl Target {
    fn new(service: &ServiceName, instance: &Arc<Instance>, local: &LocalDomain) -> Arc<Self> {
        let sni = |name: String| name.to_ascii_lowercase();
        Arc::new(Self {
            service: service.clone(),
            instance: Arc::clone(instance),
            service_sni: sni(local.service_sni(service)),
            instance_sni: sni(local.instance_sni(service, &instance.id)),
        })
    }
}

impl Targets {
    /// These instances, each with its service. They may share ports.
    pub fn new<'a>(
        instances: impl IntoIterator<Item = (&'a ServiceName, &'a Arc<Instance>)>,
        local: &LocalDomain,
    ) -> Self {
        let mut by_port: HashMap<u16, Vec<Arc<Target>>> = HashMap::new();
        for (service, instance) in instances {
            let target = Target::new(service, instance, local);
            let port = instance.tunnel.port();
            by_port.entry(port).or_default().push(target);
        }
        let shared = |(port, targets)| (port, AtPort::Shared(targets));
        Self {
            by_port: by_port.into_iter().map(shared).collect(),
        }
    }

    /// These instances, each of which has its port for itself.
    pub fn at_own_ports<'a>(
        instances: impl IntoIterator<Item = &'a (ServiceName, Arc<Instance>)>,
        local: &LocalDomain,
    ) -> Self {
        let own = |(service, instance): &(ServiceName, Arc<Instance>)| {
            let target = Target::new(service, instance, local);
            (instance.tunnel.port(), AtPort::Own(target))
        };
        Self {
            by_port: instances.into_iter().map(own).collect(),
        }
    }

    /// The ports that tunnels for this node come in by.
    pub fn ports(&self) -> BTreeSet<u16> {
        self.by_port.keys().copied().collect()
    }

    /// Every local instance.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.by_port.values().flat_map(AtPort::all)
    }

    /// The instance a tunnel is for.
    ///
    /// A peer of Sidestep names the instance. Envoy names the service and Consul's built-in proxy nothing,
    /// which is enough where the port has one instance or one service. At a port that an instance has for itself any
    /// name is right: the certificate proves who answers.
    ///
    /// # Errors
    /// See [`TargetError`]: the tunnel must then be closed, never guessed about.
    pub fn choose(&self, port: u16, sni: Option<&str>) -> Result<Arc<Target>, TargetError> {
        let candidates = match self.by_port.get(&port) {
            Some(AtPort::Own(only)) => return Ok(Arc::clone(only)),
            Some(AtPort::Shared(several)) => several.as_slice(),
            None => &[],
        };
        let Some(sni) = sni else {
            return match candidates {
                [] => Err(TargetError::NoInstance { port }),
                [only] => Ok(Arc::clone(only)),
                several => Err(TargetError::Ambiguous {
                    port,
                    candidates: several.len(),
                }),
            };
        };
        let sni = sni.to_ascii_lowercase();
        let named = candidates.iter().find(|t| t.instance_sni == sni);
        let of_service = || {
            candidates
                .iter()
                .filter(|t| t.service_sni == sni)
                .max_by_key(|t| t.instance.weight())
        };
        named
            .or_else(of_service)
            .map(Arc::clone)
            .ok_or(TargetError::UnknownName { port, sni })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::model::{Health, Weights};

    fn local() -> LocalDomain {
        LocalDomain::new("example.org".parse().unwrap(), "dc1".to_owned())
    }

    fn instance(id: &str, port: u16) -> Arc<Instance> {
        Arc::new(Instance {
            id: id.parse().unwrap(),
            node: "a".parse().unwrap(),
            tunnel: ([192, 0, 2, 1], port).into(),
            local: ([127, 0, 0, 1], 80).into(),
            port: 80,
            tags: vec![],
            meta: std::collections::BTreeMap::new(),
            health: Health::Passing,
            weights: Weights::default(),
            target: None,
        })
    }

    #[test]
    fn at_a_port_of_its_own_an_instance_is_reached_by_any_name_and_by_none() {
        let instances = [("web", 21_500), ("db", 21_501)].map(|(name, port)| {
            let service: ServiceName = name.parse().unwrap();
            (service, instance(&format!("{name}-1"), port))
        });
        let targets = Targets::at_own_ports(&instances, &local());
        assert_eq!(targets.ports(), [21_500, 21_501].into());
        for sni in [
            None,
            Some("web.default.dc1.internal.example.org"),
            // Envoy's name of a subset.
            Some("v1.web.default.dc1.internal.example.org"),
            Some("db.default.dc1.internal.example.org"),
        ] {
            let chosen = targets.choose(21_500, sni).unwrap();
            assert_eq!(chosen.instance.id.as_str(), "web-1", "{sni:?}");
        }
        let nobody = targets.choose(21_502, None).unwrap_err();
        assert_eq!(nobody, TargetError::NoInstance { port: 21_502 });
    }

    #[test]
    fn at_a_shared_port_the_name_selects() {
        let service: ServiceName = "web".parse().unwrap();
        let both =
            ["web-1", "web-2"].map(|id| Target::new(&service, &instance(id, 15_443), &local()));
        let names = both.each_ref().map(|target| target.instance_sni.clone());
        let targets = Targets {
            by_port: [(15_443, AtPort::Shared(both.to_vec()))].into(),
        };
        for (name, id) in names.iter().zip(["web-1", "web-2"]) {
            let chosen = targets
                .choose(15_443, Some(&name.to_ascii_uppercase()))
                .unwrap();
            assert_eq!(chosen.instance.id.as_str(), id);
        }
        let ambiguous = TargetError::Ambiguous {
            port: 15_443,
            candidates: 2,
        };
        assert_eq!(targets.choose(15_443, None).unwrap_err(), ambiguous);
        let subset = targets.choose(15_443, Some("v1.web.default.dc1.internal.example.org"));
        assert!(
            matches!(subset, Err(TargetError::UnknownName { .. })),
            "{subset:?}"
        );
    }
}
