//! Who issues this node's certificates, as the node and its operators see it.

use std::{path::Path, sync::Arc, time::SystemTime};

use parking_lot::Mutex;

use super::{NodeError, start::ca_files};
use crate::{
    admin::status::AuthorityStatus,
    config::{FilesConfig, IdentityConfig},
    identity::{
        ca::{BuiltinCa, CertificateSummary},
        clock::SystemClock,
        consul_ca::ConsulCa,
        provider::CertificateProvider,
    },
    telemetry::{log::chain, metrics::AuthorityObservation, timestamp::Timestamp},
};

/// The authority of this node.
#[derive(Debug)]
pub(super) enum Authority {
    /// The built-in one, from files.
    Builtin {
        ca: Arc<BuiltinCa>,
        /// Why its files were not taken over by the last reload.
        problem: Mutex<Option<String>>,
    },
    /// Consul's.
    Consul(Arc<ConsulCa>),
}

impl Authority {
    /// The built-in CA of `[identity.ca]`.
    ///
    /// # Errors
    /// If its files cannot be used.
    pub(super) fn builtin(config: &FilesConfig) -> Result<Self, NodeError> {
        Ok(Self::Builtin {
            ca: builtin_ca(config)?,
            problem: Mutex::default(),
        })
    }

    pub(super) fn provider(&self) -> Arc<dyn CertificateProvider> {
        match self {
            Self::Builtin { ca, .. } => Arc::<BuiltinCa>::clone(ca),
            Self::Consul(ca) => Arc::<ConsulCa>::clone(ca),
        }
    }

    /// Reads its files again. Says what is wrong with them, and whether they are in force now.
    pub(super) fn reload(&self, config: &IdentityConfig) -> bool {
        match self {
            Self::Builtin { ca, problem } => {
                let reloaded = ca.reload(&ca_files(&config.ca), config.leaf_ttl);
                let error = reloaded.err().map(|error| chain(&error).to_string());
                if let Some(error) = &error {
                    tracing::error!(
                        error,
                        "certificate authority not reloaded: the one from before stays"
                    );
                }
                let is_in_force = error.is_none();
                *problem.lock() = error;
                is_in_force
            }
            // It has no files.
            Self::Consul(_) => false,
        }
    }

    pub(super) fn status(&self) -> AuthorityStatus {
        let roots = self.roots();
        let subject = match self {
            Self::Builtin { ca, .. } => ca.summary().subject,
            Self::Consul(_) => "Consul".to_owned(),
        };
        AuthorityStatus {
            subject,
            not_after: Timestamp(self.not_after(&roots)),
            roots: roots.into_iter().map(|root| root.subject).collect(),
            problem: self.problem(),
        }
    }

    pub(super) fn observe(&self) -> AuthorityObservation {
        AuthorityObservation {
            not_after: self.not_after(&self.roots()),
            reload_failing: self.problem().is_some(),
        }
    }

    /// Until when it can issue. Of Consul's only the roots are known; it replaces them by itself.
    fn not_after(&self, roots: &[CertificateSummary]) -> SystemTime {
        match self {
            Self::Builtin { ca, .. } => ca.summary().not_after.into(),
            Self::Consul(_) => roots
                .iter()
                .map(|root| root.not_after.into())
                .max()
                .unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }

    fn roots(&self) -> Vec<CertificateSummary> {
        match self {
            Self::Builtin { ca, .. } => ca.roots(),
            Self::Consul(ca) => {
                let trust = ca.trust().borrow().clone();
                let certificates = trust.roots.certificates().iter();
                certificates
                    // What does not parse is no root.
                    .filter_map(|root| CertificateSummary::of(Path::new("Consul"), root).ok())
                    .collect()
            }
        }
    }

    fn problem(&self) -> Option<String> {
        match self {
            Self::Builtin { problem, .. } => problem.lock().clone(),
            Self::Consul(ca) => ca.problem(),
        }
    }
}

/// The CA of `[identity.ca]`, if its files can be used.
pub(crate) fn builtin_ca(config: &FilesConfig) -> Result<Arc<BuiltinCa>, NodeError> {
    let identity = &config.identity;
    let ca = BuiltinCa::load(
        &ca_files(&identity.ca),
        identity.trust_domain.clone(),
        identity.leaf_ttl,
        Arc::new(SystemClock),
    );
    ca.map(Arc::new)
        .map_err(NodeError::when("load the certificate authority"))
}
