//! Authorities and certificates for tests, right and wrong ones.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use super::{
    ca::{self, BuiltinCa, CaFiles},
    clock::{Clock, SystemClock},
    provider::{Leaf, TrustBundle},
    spiffe::{SpiffeId, TrustDomain},
    workload_tls::WorkloadTls,
};

pub(crate) const DAY: Duration = Duration::from_hours(24);

pub(crate) fn trust_domain() -> TrustDomain {
    "example.org".parse().unwrap()
}

/// The id of `service` in the test's trust domain.
pub(crate) fn id(service: &str) -> SpiffeId {
    SpiffeId::service(&trust_domain(), "dc1", &service.parse().unwrap())
}

/// Where a CA of `name` goes in `directory`.
pub(crate) fn files(directory: &Path, name: &str) -> CaFiles {
    CaFiles {
        certificate: directory.join(format!("{name}.pem")),
        key: directory.join(format!("{name}.key")),
        passphrase_file: None,
        roots: vec![],
    }
}

/// A root made and loaded as the command line does it.
pub(crate) fn builtin_ca(
    directory: &Path,
    leaf_life: Duration,
    clock: Arc<dyn Clock>,
) -> BuiltinCa {
    let files = files(directory, "root");
    ca::init(&trust_domain(), &files, &*clock).unwrap();
    BuiltinCa::load(&files, trust_domain(), leaf_life, clock).unwrap()
}

/// Any authority, for certificates that the built-in CA would not make.
pub(crate) struct TestCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl TestCa {
    pub(crate) fn root(name: &str) -> Self {
        Self::root_with(name, KeyPair::generate().unwrap())
    }

    pub(crate) fn root_with(name: &str, key: KeyPair) -> Self {
        Self {
            issuer: CertifiedIssuer::self_signed(ca_params(name), key).unwrap(),
        }
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    /// This root's key and name, certified by `other`: what Consul sends while roots rotate.
    pub(crate) fn cross_signed_by(&self, other: &Self, name: &str) -> CertificateDer<'static> {
        let issuer: &Issuer<'_, KeyPair> = &other.issuer;
        let key = self.issuer.key();
        ca_params(name)
            .signed_by(key, issuer)
            .unwrap()
            .der()
            .clone()
    }

    pub(crate) fn leaf(&self, spec: LeafSpec<'_>) -> Leaf {
        let key = match spec.key {
            Some(key) => key,
            None => KeyPair::generate().unwrap(),
        };
        let (not_before, not_after) = spec.valid;
        let mut params = CertificateParams::default();
        params.subject_alt_names = spec
            .uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.extended_key_usages = spec.purposes;
        params.is_ca = IsCa::ExplicitNoCa;
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let issuer: &Issuer<'_, KeyPair> = &self.issuer;
        let certificate = params.signed_by(&key, issuer).unwrap();
        let mut chain = vec![certificate.der().clone()];
        chain.extend(spec.above);
        Leaf {
            chain,
            key: Zeroizing::new(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(
                key.serialize_der(),
            ))),
            not_before,
            not_after,
            issuer: "a CA of the tests".to_owned(),
        }
    }

    /// A leaf as it should be.
    pub(crate) fn good_leaf(&self, identity: &SpiffeId) -> Leaf {
        self.leaf(LeafSpec {
            uris: vec![&identity.to_string()],
            ..LeafSpec::default()
        })
    }

    /// A service with a good leaf of this authority that trusts `roots`.
    pub(crate) fn workload(&self, identity: &SpiffeId, roots: &[&Self]) -> WorkloadTls {
        workload_of(
            &self.good_leaf(identity),
            identity,
            roots,
            Arc::new(SystemClock),
        )
    }
}

/// A service with `leaf`, which must be good in its own eyes, that trusts `roots`.
///
/// Peers that see a certificate as bad which its owner takes for good differ in clock or in roots.
pub(crate) fn workload_of(
    leaf: &Leaf,
    identity: &SpiffeId,
    roots: &[&TestCa],
    clock: Arc<dyn Clock>,
) -> WorkloadTls {
    let own_eyes = WorkloadTls::new(identity.clone(), leaf, bundle(roots), clock);
    own_eyes.unwrap()
}

pub(crate) fn bundle(roots: &[&TestCa]) -> Arc<TrustBundle> {
    let certificates = roots.iter().map(|root| root.certificate());
    Arc::new(TrustBundle::new(trust_domain(), certificates).unwrap())
}

pub(crate) struct LeafSpec<'a> {
    pub(crate) uris: Vec<&'a str>,
    pub(crate) purposes: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) valid: (SystemTime, SystemTime),
    pub(crate) key: Option<KeyPair>,
    pub(crate) above: Vec<CertificateDer<'static>>,
}

impl Default for LeafSpec<'_> {
    fn default() -> Self {
        let now = SystemTime::now();
        Self {
            uris: vec![],
            purposes: vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ],
            valid: (now - Duration::from_mins(1), now + DAY),
            key: None,
            above: vec![],
        }
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}
