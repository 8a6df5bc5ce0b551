//! Names within this node's own trust domain and datacenter.

use super::spiffe::{SpiffeId, TrustDomain};
use crate::catalog::model::{InstanceId, ServiceName};

/// The trust domain and datacenter that this node's workloads belong to.
#[derive(Debug, Clone)]
pub struct LocalDomain {
    trust_domain: TrustDomain,
    datacenter: String,
}

impl LocalDomain {
    /// From `identity.trust_domain` and `node.datacenter`.
    pub fn new(trust_domain: TrustDomain, datacenter: String) -> Self {
        Self {
            trust_domain,
            datacenter,
        }
    }

    /// The datacenter in the identities here.
    pub fn datacenter(&self) -> &str {
        &self.datacenter
    }

    /// The same trust domain in another datacenter.
    #[must_use]
    pub fn in_datacenter(&self, datacenter: &str) -> Self {
        Self {
            trust_domain: self.trust_domain.clone(),
            datacenter: datacenter.to_owned(),
        }
    }

    /// The identity of a service here.
    pub fn identity_of(&self, service: &ServiceName) -> SpiffeId {
        SpiffeId::service(&self.trust_domain, &self.datacenter, service)
    }

    /// The TLS server name by which Envoy asks for a service: Consul's
    /// `<service>.<namespace>.<datacenter>.internal.<trust domain>`.
    pub fn service_sni(&self, service: &ServiceName) -> String {
        format!(
            "{service}.default.{}.internal.{}",
            self.datacenter, self.trust_domain
        )
    }

    /// The TLS server name by which Sidestep asks for one instance, where several share a port:
    /// the service's name behind a label made from the instance's id.
    ///
    /// An id may hold what a DNS label cannot, hence the digest. It only selects; the certificate proves.
    pub fn instance_sni(&self, service: &ServiceName, instance: &InstanceId) -> String {
        let digest = crate::stable_hash::fnv1a(instance.as_str().as_bytes());
        format!("i-{digest:016x}.{}", self.service_sni(service))
    }
}
