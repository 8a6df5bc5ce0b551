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
    by_port: HashMap<u16, Vec<Arc<Target>>>,
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

impl Targets {
    /// Of these instances, each with its service, all of this node.
    pub fn new<'a>(
        instances: impl IntoIterator<Item = (&'a ServiceName, &'a Arc<Instance>)>,
        local: &LocalDomain,
    ) -> Self {
        let mut by_port: HashMap<u16, Vec<Arc<Target>>> = HashMap::new();
        for (service, instance) in instances {
            let target = Target {
                service: service.clone(),
                instance: Arc::clone(instance),
                service_sni: local.service_sni(service).to_ascii_lowercase(),
                instance_sni: local
                    .instance_sni(service, &instance.id)
                    .to_ascii_lowercase(),
            };
            by_port
                .entry(instance.tunnel.port())
                .or_default()
                .push(Arc::new(target));
        }
        Self { by_port }
    }

    /// The ports that tunnels for this node come in by.
    pub fn ports(&self) -> BTreeSet<u16> {
        self.by_port.keys().copied().collect()
    }

    /// Every local instance.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.by_port.values().flatten()
    }

    /// The instance a tunnel is for.
    ///
    /// A peer of Sidestep names the instance. Envoy names the service and Consul's built-in proxy nothing,
    /// which is enough where the port has one instance or one service.
    ///
    /// # Errors
    /// See [`TargetError`]: the tunnel must then be closed, never guessed about.
    pub fn choose(&self, port: u16, sni: Option<&str>) -> Result<Arc<Target>, TargetError> {
        let candidates = self.by_port.get(&port).map_or(&[][..], Vec::as_slice);
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
