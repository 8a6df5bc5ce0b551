//! Authorities and certificates for tests, right and wrong ones.

use std::{path::Path, sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::CertificateDer;

use super::{
    ca::{self, BuiltinCa, CaFiles},
    clock::Clock,
    provider::TrustBundle,
    spiffe::{SpiffeId, TrustDomain},
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
}

pub(crate) fn bundle(roots: &[&TestCa]) -> Arc<TrustBundle> {
    let certificates = roots.iter().map(|root| root.certificate());
    Arc::new(TrustBundle::new(trust_domain(), certificates).unwrap())
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
