//! Who issues this node's certificates, as the node and its operators see it.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{NodeError, start::ca_files};
use crate::{
    admin::status::AuthorityStatus,
    config::{FilesConfig, IdentityConfig},
    identity::{
        ca::{BuiltinCa, CertificateSummary},
        clock::SystemClock,
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
        }
    }

    pub(super) fn status(&self) -> AuthorityStatus {
        let summary = self.summary();
        AuthorityStatus {
            subject: summary.subject,
            not_after: Timestamp(summary.not_after.into()),
            roots: self.roots().into_iter().map(|root| root.subject).collect(),
            problem: self.problem(),
        }
    }

    pub(super) fn observe(&self) -> AuthorityObservation {
        AuthorityObservation {
            not_after: self.summary().not_after.into(),
            reload_failing: self.problem().is_some(),
        }
    }

    fn summary(&self) -> CertificateSummary {
        match self {
            Self::Builtin { ca, .. } => ca.summary(),
        }
    }

    fn roots(&self) -> Vec<CertificateSummary> {
        match self {
            Self::Builtin { ca, .. } => ca.roots(),
        }
    }

    fn problem(&self) -> Option<String> {
        match self {
            Self::Builtin { problem, .. } => problem.lock().clone(),
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
