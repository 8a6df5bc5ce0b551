//! The built-in certificate authority: a root for a trust domain, an intermediate per node, short-lived leaves.
//!
//! Certificates have the shape of Consul's (a URI as the only name, P-256, both key purposes), so that
//! Consul's proxies and ours accept one another under the same roots. What runs on a node needs an
//! intermediate; the root's key can stay on a machine that is switched off. `docs/identity.md` is the guide.

mod certificate;
mod files;

use std::{
    fmt,
    path::{Path, PathBuf},
    slice,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SignatureAlgorithm, SigningKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use tokio::sync::watch;
use zeroize::{Zeroize as _, Zeroizing};

pub use certificate::CertificateSummary;
pub use files::{CaFileError, Passphrase};

use super::{
    clock::Clock,
    provider::{
        BoxFuture, CertificateProvider, IssueError, Leaf, Trust, TrustBundle, TrustBundleError,
    },
    spiffe::{SpiffeId, SpiffeIdError, TrustDomain},
    workload_tls::WorkloadTls,
};
use crate::{catalog::model::NodeName, telemetry::timestamp::Timestamp};

/// Ten years, as Consul's root.
const ROOT_LIFE: Duration = Duration::from_hours(10 * 365 * 24);

/// Certificates are valid from a little before they are made, for nodes whose clocks are behind: an hour for
/// CAs, which are made by hand, a minute for leaves, which are used at once.
const CA_BACKDATE: Duration = Duration::from_hours(1);
const LEAF_BACKDATE: Duration = Duration::from_mins(1);

/// X.520's upper bound of a common name.
const MAX_COMMON_NAME: usize = 64;

/// Where a CA's certificate and key are, and the roots to trust.
#[derive(Debug, Clone)]
pub struct CaFiles {
    /// The CA's certificate; for an intermediate, followed by those between it and the root.
    pub certificate: PathBuf,
    /// Its private key in PKCS#8, mode 0600.
    pub key: PathBuf,
    /// A file with the passphrase of the key, if it is encrypted.
    pub passphrase_file: Option<PathBuf>,
    /// PEM files with the roots to trust. Empty: the CA's certificate, which is then a root itself.
    pub roots: Vec<PathBuf>,
}

impl CaFiles {
    fn passphrase(&self) -> Result<Option<Passphrase>, CaError> {
        let read = self.passphrase_file.as_deref().map(Passphrase::read);
        Ok(read.transpose()?)
    }
}

/// Makes a new root and writes it: the certificate with mode 0644, the key with mode 0600.
///
/// With a passphrase the key is encrypted (PBES2 with scrypt and AES-256-CBC). `files.roots` is not used.
///
/// # Errors
/// [`CaFileError::Exists`] rather than overwrite anything; see [`CaError`] for the rest.
pub fn init(
    trust_domain: &TrustDomain,
    files: &CaFiles,
    clock: &dyn Clock,
) -> Result<CertificateSummary, CaError> {
    let key = WipedKey::generate()?;
    let mut params = ca_params(
        trust_domain,
        "root",
        &key.0,
        BasicConstraints::Unconstrained,
    )?;
    set_validity(&mut params, clock.now(), CA_BACKDATE, ROOT_LIFE);
    let certificate = params.self_signed(&key.0).map_err(sign)?;
    let pem = certificate.pem();
    write_ca(files, &pem, &key.0)?;
    CertificateSummary::of(&files.certificate, certificate.der())
}

/// Makes the intermediate of one node, signed by `issuer`, and writes it to `files` as [`init`] does.
///
/// It may sign leaves and no further CA. The certificate file also gets the issuer's chain, without the root.
///
/// # Errors
/// As [`init`], and what is wrong with the issuer's files.
pub fn intermediate(
    trust_domain: &TrustDomain,
    issuer: &CaFiles,
    node: &NodeName,
    files: &CaFiles,
    life: Duration,
    clock: &dyn Clock,
) -> Result<CertificateSummary, CaError> {
    let issuer = Authority::read(issuer)?;
    issuer.check_validity(clock.now())?;
    let key = WipedKey::generate()?;
    let mut params = ca_params(
        trust_domain,
        node.as_str(),
        &key.0,
        BasicConstraints::Constrained(0),
    )?;
    set_validity(&mut params, clock.now(), CA_BACKDATE, life);
    params.not_after = params.not_after.min(issuer.summary.not_after);
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key.0, &issuer.issuer).map_err(sign)?;
    let mut pem = certificate.pem();
    for further in &issuer.sent {
        pem.push_str(&certificate::to_pem(further)?);
    }
    write_ca(files, &pem, &key.0)?;
    CertificateSummary::of(&files.certificate, certificate.der())
}

/// What a PEM file's certificates say, in the order of the file: `sidestep ca show`.
///
/// # Errors
/// What is wrong with the file or one of its certificates.
pub fn show(path: &Path) -> Result<Vec<CertificateSummary>, CaError> {
    files::read_certificates(path)?
        .iter()
        .map(|certificate| CertificateSummary::of(path, certificate))
        .collect()
}

fn write_ca(files: &CaFiles, certificate_pem: &str, key: &KeyPair) -> Result<(), CaError> {
    let passphrase = files.passphrase()?;
    let key_pem = files::key_to_pem(key, passphrase.as_ref())
        .map_err(|source| CaError::EncodeKey { source })?;
    Ok(files::write_new_pair(
        (&files.certificate, certificate_pem),
        (&files.key, &key_pem),
    )?)
}

/// A root or an intermediate that issues the leaves of one node.
///
/// Files are read by [`BuiltinCa::load`], and again by [`BuiltinCa::reload`].
#[derive(Debug)]
pub struct BuiltinCa {
    issuing: ArcSwap<Issuing>,
    trust_domain: TrustDomain,
    clock: Arc<dyn Clock>,
    trust: watch::Sender<Trust>,
}

impl BuiltinCa {
    /// Reads the CA and checks all that can be checked before a certificate is needed.
    ///
    /// # Errors
    /// A key that others can read, that is not the certificate's or cannot be decrypted; a certificate that is no
    /// CA's or out of its validity; roots none of which the CA's chain reaches. See [`CaError`].
    pub fn load(
        files: &CaFiles,
        trust_domain: TrustDomain,
        leaf_life: Duration,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CaError> {
        let (issuing, roots) = Issuing::read(files, &trust_domain, leaf_life, &clock)?;
        Ok(Self {
            issuing: ArcSwap::from_pointee(issuing),
            trust_domain,
            clock,
            trust: watch::Sender::new(Trust {
                roots: Arc::new(roots),
                issuer: 0,
            }),
        })
    }

    /// Reads everything again. Certificates in use are put under the new roots at once; if another certificate
    /// signs from now on they are renewed soon. `leaf_life` is that of leaves to come.
    ///
    /// # Errors
    /// As [`BuiltinCa::load`]; all stays as it was.
    pub fn reload(&self, files: &CaFiles, leaf_life: Duration) -> Result<(), CaError> {
        let (new, roots) = Issuing::read(files, &self.trust_domain, leaf_life, &self.clock)?;
        let summary = new.authority.summary.clone();
        let replaced = new.authority.chain != self.issuing.load().authority.chain;
        // Before its number is published: who sees the number gets leaves of the new authority.
        self.issuing.store(Arc::new(new));
        self.trust.send_if_modified(|trust| {
            let changed = replaced || trust.roots.certificates() != roots.certificates();
            if changed {
                tracing::info!(
                    subject = summary.subject,
                    not_after = %Timestamp::from(summary.not_after),
                    roots = roots.certificates().len(),
                    replaced,
                    "certificate authority changed"
                );
                trust.issuer += u64::from(replaced);
                trust.roots = Arc::new(roots);
            }
            changed
        });
        Ok(())
    }

    /// What the certificate that signs now says.
    pub fn summary(&self) -> CertificateSummary {
        self.issuing.load().authority.summary.clone()
    }

    /// What the certificates of the roots that are trusted now say.
    pub fn roots(&self) -> Vec<CertificateSummary> {
        let trust = self.trust.borrow();
        let issuing = self.issuing.load();
        let summaries = trust.roots.certificates().iter();
        summaries
            // They were parsed when they were read.
            .filter_map(|root| CertificateSummary::of(&issuing.authority.path, root).ok())
            .collect()
    }

    fn issue_now(&self, identity: &SpiffeId) -> Result<Leaf, IssueError> {
        if identity.trust_domain != self.trust_domain {
            return Err(IssueError::ForeignTrustDomain {
                identity: identity.clone(),
                trust_domain: self.trust_domain.clone(),
            });
        }
        self.issuing.load().leaf(identity, self.clock.now())
    }
}

impl CertificateProvider for BuiltinCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Leaf, IssueError>> {
        // A fraction of a millisecond of arithmetic: not worth a blocking thread.
        Box::pin(std::future::ready(self.issue_now(identity)))
    }

    fn trust(&self) -> watch::Receiver<Trust> {
        self.trust.subscribe()
    }
}

/// What signs leaves, and for how long they live.
#[derive(Debug)]
struct Issuing {
    authority: Authority,
    leaf_life: Duration,
}

impl Issuing {
    /// Reads the CA and its roots, and checks that the one leads to the others.
    fn read(
        files: &CaFiles,
        trust_domain: &TrustDomain,
        leaf_life: Duration,
        clock: &Arc<dyn Clock>,
    ) -> Result<(Self, TrustBundle), CaError> {
        let authority = Authority::read(files)?;
        authority.check_validity(clock.now())?;
        let roots = authority.read_roots(files, trust_domain)?;
        let issuing = Self {
            authority,
            leaf_life,
        };
        issuing.check_leaves_verify(&roots, clock)?;
        Ok((issuing, roots))
    }

    /// Issues a leaf that nobody gets and checks it as a peer would that trusts `roots`.
    fn check_leaves_verify(
        &self,
        roots: &TrustBundle,
        clock: &Arc<dyn Clock>,
    ) -> Result<(), CaError> {
        let failed = |source| CaError::LeavesDoNotVerify {
            path: self.authority.path.clone(),
            source: Box::new(source),
        };
        let identity = format!(
            "{}/ns/default/dc/check/svc/check",
            roots.trust_domain().uri()
        )
        .parse::<SpiffeId>()
        .map_err(|source| CaError::TrustDomain { source })?;
        let leaf = self.leaf(&identity, clock.now()).map_err(failed)?;
        WorkloadTls::new(identity, &leaf, Arc::new(roots.clone()), Arc::clone(clock))
            .map(|_tls| ())
            .map_err(|source| failed(IssueError::unusable(source)))
    }

    fn leaf(&self, identity: &SpiffeId, now: SystemTime) -> Result<Leaf, IssueError> {
        let authority = &self.authority;
        let summary = &authority.summary;
        if !authority.is_valid(now) {
            return Err(IssueError::AuthorityNotValid {
                subject: summary.subject.clone(),
                not_before: summary.not_before,
                not_after: summary.not_after,
            });
        }
        let sign = |source| IssueError::Sign { source };
        let key = WipedKey::generate_with(sign)?;
        let mut params = leaf_params(identity).map_err(sign)?;
        set_validity(&mut params, now, LEAF_BACKDATE, self.leaf_life);
        // A leaf that outlives its issuer fails with it, and would be renewed too late.
        params.not_after = params.not_after.min(summary.not_after);
        let certificate = params.signed_by(&key.0, &authority.issuer).map_err(sign)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(authority.sent.iter().cloned());
        Ok(Leaf {
            chain,
            key: Zeroizing::new(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(
                key.0.serialized_der().to_vec(),
            ))),
            not_before: params.not_before.into(),
            not_after: params.not_after.into(),
            issuer: summary.subject.clone(),
        })
    }
}

/// A CA certificate with its key, and what goes with each leaf it signs.
struct Authority {
    path: PathBuf,
    issuer: Issuer<'static, WipedKey>,
    summary: CertificateSummary,
    /// The certificates of the file, its own first.
    chain: Vec<CertificateDer<'static>>,
    /// What a leaf's chain needs beside the leaf: this certificate and those above it, but no root.
    sent: Vec<CertificateDer<'static>>,
}

impl Authority {
    fn read(files: &CaFiles) -> Result<Self, CaError> {
        let path = &files.certificate;
        let chain = files::read_certificates(path)?;
        let key = WipedKey(files::read_key(&files.key, files.passphrase()?.as_ref())?);
        let certificate = chain
            .first()
            .cloned()
            .ok_or_else(|| CaError::NotACa { path: path.clone() })?;
        let summary = CertificateSummary::of(path, &certificate)?;
        if !summary.is_ca {
            return Err(CaError::NotACa { path: path.clone() });
        }
        if !certificate::has_key(path, &certificate, &key.0)? {
            return Err(CaError::KeyMismatch {
                certificate: path.clone(),
                key: files.key.clone(),
            });
        }
        let mut sent = Vec::new();
        for link in &chain {
            if !CertificateSummary::of(path, link)?.is_self_issued() {
                sent.push(link.clone());
            }
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(sign)?;
        Ok(Self {
            path: path.clone(),
            issuer,
            summary,
            chain,
            sent,
        })
    }

    fn is_valid(&self, now: SystemTime) -> bool {
        let now = OffsetDateTime::from(now);
        self.summary.not_before <= now && now < self.summary.not_after
    }

    fn check_validity(&self, now: SystemTime) -> Result<(), CaError> {
        if self.is_valid(now) {
            return Ok(());
        }
        Err(CaError::NotValid {
            path: self.path.clone(),
            not_before: self.summary.not_before,
            not_after: self.summary.not_after,
        })
    }

    fn read_roots(
        &self,
        files: &CaFiles,
        trust_domain: &TrustDomain,
    ) -> Result<TrustBundle, CaError> {
        let mut paths = files.roots.as_slice();
        if paths.is_empty() {
            // A node that trusted its own intermediate alone would start, and reach no other node.
            if !self.summary.is_self_issued() {
                return Err(CaError::RootsMissing {
                    path: self.path.clone(),
                });
            }
            paths = slice::from_ref(&files.certificate);
        }
        let mut roots = Vec::new();
        for path in paths {
            for root in files::read_certificates(path)? {
                if !CertificateSummary::of(path, &root)?.is_ca {
                    return Err(CaError::NotACa { path: path.clone() });
                }
                roots.push(root);
            }
        }
        TrustBundle::new(trust_domain.clone(), roots).map_err(|source| CaError::Roots { source })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("summary", &self.summary)
            .finish_non_exhaustive()
    }
}

fn ca_params(
    trust_domain: &TrustDomain,
    whose: &str,
    key: &KeyPair,
    constraints: BasicConstraints,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    // With a part of the key's id, so that the names of an old and a new root differ.
    let id = params.key_identifier(key);
    let id = id.first_chunk().copied().map(u32::from_be_bytes);
    let id = id.unwrap_or_default();
    params.distinguished_name = common_name_of(&format!("Sidestep CA {id:08x} {whose}"));
    params.subject_alt_names = vec![uri(&trust_domain.uri()).map_err(sign)?];
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    Ok(params)
}

/// As Consul's leaves: critical key usages, both purposes, the id as the only name.
fn leaf_params(identity: &SpiffeId) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name_of(&format!(
        "{}.svc.{}.{}",
        identity.service, identity.namespace, identity.trust_domain
    ));
    params.subject_alt_names = vec![uri(&identity.to_string())?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
        KeyUsagePurpose::DataEncipherment,
        KeyUsagePurpose::KeyAgreement,
    ];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn uri(text: &str) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(text.try_into()?))
}

fn common_name_of(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    let cut: String = name.chars().take(MAX_COMMON_NAME).collect();
    distinguished.push(DnType::CommonName, cut);
    distinguished
}

fn set_validity(
    params: &mut CertificateParams,
    now: SystemTime,
    backdate: Duration,
    life: Duration,
) {
    // Certificates count whole seconds; so do we, or a leaf would end later than its certificate says.
    let now = OffsetDateTime::from(now).replace_nanosecond(0);
    let now = now.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    params.not_before = now.saturating_sub(backdate.try_into().unwrap_or_default());
    params.not_after = now.saturating_add(life.try_into().unwrap_or(time::Duration::MAX));
}

/// A key whose bytes are wiped when it is dropped.
struct WipedKey(KeyPair);

impl WipedKey {
    fn generate() -> Result<Self, CaError> {
        Self::generate_with(sign)
    }

    fn generate_with<E>(error: impl FnOnce(rcgen::Error) -> E) -> Result<Self, E> {
        KeyPair::generate().map(Self).map_err(error)
    }
}

impl PublicKeyData for WipedKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.0.algorithm()
    }
}

impl SigningKey for WipedKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

impl Drop for WipedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn sign(source: rcgen::Error) -> CaError {
    CaError::Sign { source }
}

/// Why a CA could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Something about one of its files.
    #[error(transparent)]
    File(#[from] CaFileError),
    /// A certificate does not parse.
    #[error("a certificate in {} is malformed", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: x509_parser::error::X509Error,
    },
    /// A certificate that may not sign others.
    #[error("{} holds a certificate that is not a CA's", path.display())]
    NotACa {
        /// The file.
        path: PathBuf,
    },
    /// The CA's certificate is too old or too new.
    #[error("the CA certificate in {} is valid only from {} to {}", path.display(), Timestamp::from(*not_before), Timestamp::from(*not_after))]
    NotValid {
        /// The file.
        path: PathBuf,
        /// Start of its validity.
        not_before: OffsetDateTime,
        /// End of its validity.
        not_after: OffsetDateTime,
    },
    /// Key and certificate do not belong together.
    #[error("the key in {} is not the one of the certificate in {}", key.display(), certificate.display())]
    KeyMismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// Peers could not verify what this CA signs.
    #[error("no leaf of the CA in {} would be accepted: is its root among identity.ca.roots?", path.display())]
    LeavesDoNotVerify {
        /// The CA certificate's file.
        path: PathBuf,
        /// What issuing a leaf or path validation said.
        source: Box<IssueError>,
    },
    /// The trust domain makes no id of a service.
    #[error("the trust domain cannot be used")]
    TrustDomain {
        /// Why not.
        source: SpiffeIdError,
    },
    /// An intermediate, and no root is named.
    #[error("the CA certificate in {} is an intermediate: name its root in identity.ca.roots", path.display())]
    RootsMissing {
        /// The CA certificate's file.
        path: PathBuf,
    },
    /// The roots make no bundle.
    #[error("the roots cannot be used")]
    Roots {
        /// Why.
        source: TrustBundleError,
    },
    /// Making a key or a certificate failed.
    #[error("making the certificate failed")]
    Sign {
        /// Why.
        source: rcgen::Error,
    },
    /// A new key could not be put into its file's form.
    #[error("encoding the private key failed")]
    EncodeKey {
        /// Why.
        source: pkcs8::Error,
    },
}

#[cfg(test)]
mod tests;
