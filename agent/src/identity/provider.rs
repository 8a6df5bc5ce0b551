//! What issues certificates: the seam between [`super::certificates`] and an authority.
//!
//! The built-in [`super::ca`] is one, Consul's [`super::consul_ca`] another. A provider issues, tells the roots, and
//! says so if it renews by itself; keeping, checking and retrying is the caller's.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{
    consul_ca::ConsulCaError,
    spiffe::{SpiffeId, TrustDomain},
    verify::PeerIdentityError,
};
use crate::telemetry::timestamp::Timestamp;

/// A future as trait objects return it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// An authority that certifies identities of services.
pub trait CertificateProvider: fmt::Debug + Send + Sync + 'static {
    /// Makes a new key and a certificate for it. The caller sets the deadline and may drop the future.
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Leaf, IssueError>>;

    /// Whom to trust and who issues, now and after each rotation.
    fn trust(&self) -> watch::Receiver<Trust>;

    /// Ends when the authority has another leaf for `identity` than `in_use`, so that issuing gives that one.
    ///
    /// For authorities that renew by themselves. The default is that of one which does not: it never ends. What makes
    /// it fail is the authority's to wait out and log. Cancel-safe.
    fn renewed<'a>(
        &'a self,
        identity: &'a SpiffeId,
        in_use: &'a CertificateDer<'static>,
    ) -> BoxFuture<'a, ()> {
        let (_identity, _in_use) = (identity, in_use);
        Box::pin(std::future::pending())
    }
}

/// What an authority stands for at one moment.
#[derive(Debug, Clone)]
pub struct Trust {
    /// Every root to trust: during a rotation the old and the new.
    pub roots: Arc<TrustBundle>,
    /// The number of what issues now. Another one means that leaves are to be renewed soon, good as they may be.
    pub issuer: u64,
}

/// A certificate of a service with its key, which lives in memory only and is wiped when dropped.
pub struct Leaf {
    /// The leaf first, then the intermediates; a root is not sent.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the leaf.
    pub key: Zeroizing<PrivateKeyDer<'static>>,
    /// From when it is valid, as the certificate says.
    pub not_before: SystemTime,
    /// Until when it is valid, as the certificate says.
    pub not_after: SystemTime,
    /// The subject of the certificate that signed it, for people.
    pub issuer: String,
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf")
            .field("certificates", &self.chain.len())
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The anchors of one trust domain.
#[derive(Debug, Clone)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    certificates: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
}

impl TrustBundle {
    /// Takes `roots` as the anchors of `trust_domain`; the same certificate given twice counts once.
    ///
    /// # Errors
    /// [`TrustBundleError::Empty`] without a root, [`TrustBundleError::NotACertificate`] if one does not parse.
    pub fn new(
        trust_domain: TrustDomain,
        roots: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, TrustBundleError> {
        let mut certificates = Vec::new();
        let mut store = RootCertStore::empty();
        for root in roots {
            if certificates.contains(&root) {
                continue;
            }
            store
                .add(root.clone())
                .map_err(|source| TrustBundleError::NotACertificate {
                    index: certificates.len(),
                    source,
                })?;
            certificates.push(root);
        }
        if certificates.is_empty() {
            return Err(TrustBundleError::Empty);
        }
        Ok(Self {
            trust_domain,
            certificates,
            store: Arc::new(store),
        })
    }

    /// Whose identities the roots vouch for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The roots' certificates in the order given.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// The roots as rustls wants them.
    pub(crate) fn store(&self) -> &Arc<RootCertStore> {
        &self.store
    }
}

/// Roots that make no bundle.
#[derive(Debug, thiserror::Error)]
pub enum TrustBundleError {
    /// Not one root: nobody could be verified.
    #[error("no root certificate")]
    Empty,
    /// One is not a certificate that can be an anchor.
    #[error("root certificate number {index} cannot be used")]
    NotACertificate {
        /// Which, counted from 0, without duplicates.
        index: usize,
        /// Why not.
        source: rustls::Error,
    },
}

/// Why a certificate was not issued or not taken into use.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The identity is of another trust domain than the authority's.
    #[error("{identity} is not of the authority's trust domain {trust_domain}")]
    ForeignTrustDomain {
        /// Asked for.
        identity: SpiffeId,
        /// The authority's.
        trust_domain: TrustDomain,
    },
    /// The authority's own certificate has run out, or is not valid yet.
    #[error("the CA certificate {subject} is valid only from {} to {}", Timestamp::from(*not_before), Timestamp::from(*not_after))]
    AuthorityNotValid {
        /// Of the CA certificate.
        subject: String,
        /// Start of its validity.
        not_before: time::OffsetDateTime,
        /// End of its validity.
        not_after: time::OffsetDateTime,
    },
    /// The key could not be made or the certificate not signed.
    #[error("signing the certificate failed")]
    Sign {
        /// Why.
        source: rcgen::Error,
    },
    /// No answer in time.
    #[error("no certificate within {after:?}")]
    Timeout {
        /// How long it was waited for.
        after: Duration,
    },
    /// Consul did not give one.
    #[error(transparent)]
    Consul(#[from] ConsulCaError),
    /// The authority gives out the leaf in use, which should have been replaced by now.
    #[error("the authority still gives the certificate that expires at {}", Timestamp::from(*not_after))]
    NotRenewed {
        /// When that is.
        not_after: time::OffsetDateTime,
    },
    /// What was issued is for somebody else, or not as peers want it.
    #[error("peers would not accept the issued certificate")]
    NotAcceptable {
        /// What they would say.
        source: PeerIdentityError,
    },
    /// What was issued does not fit: its key, its chain or its time.
    #[error("the issued certificate cannot be used")]
    Unusable {
        /// Why.
        source: rustls::Error,
    },
}

impl IssueError {
    /// What [`super::workload_tls`] has against a leaf.
    pub(crate) fn unusable(source: rustls::Error) -> Self {
        match PeerIdentityError::within(&source) {
            Some(identity) => Self::NotAcceptable {
                source: identity.clone(),
            },
            None => Self::Unusable { source },
        }
    }
}
