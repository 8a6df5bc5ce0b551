//! Checks who the other side of a handshake is: a path to a root, then the SPIFFE id in the leaf.
//!
//! Certificates of services have no DNS name, so rustls' own verifiers never pass. As in Consul only the
//! leaf's first URI counts, and nothing is asked of the names of CA certificates (Vault's and AWS's have
//! none). What an identity may do is decided in [`crate::policy`], not here.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    },
    server::{
        ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{
    provider::TrustBundle,
    spiffe::{SpiffeId, SpiffeIdError, TrustDomain},
};

/// How many certificates between leaf and root are looked at. Consul under a CA of four levels, while its roots
/// rotate, sends five.
///
/// Anybody can send certificates that all name one another, and the search for a path among these grows with
/// their factorial, up to webpki's own budget: twelve of them took 0.5 s of CPU, five take 0.5 ms, or 10 ms if
/// they bear the root's name and signatures are checked (measured, 2026).
const MAX_INTERMEDIATES: usize = 5;

/// Before any search: see [`MAX_INTERMEDIATES`].
fn check_length(intermediates: &[CertificateDer<'_>]) -> Result<(), PeerIdentityError> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(PeerIdentityError::ChainTooLong {
            intermediates: intermediates.len(),
        });
    }
    Ok(())
}

/// The id in a certificate: its first URI.
///
/// Says nothing about who signed it: the caller has verified the path, or made the certificate.
///
/// # Errors
/// [`PeerIdentityError::Malformed`], [`PeerIdentityError::NoUri`], [`PeerIdentityError::NotAService`].
pub fn certificate_identity(
    certificate: &CertificateDer<'_>,
) -> Result<SpiffeId, PeerIdentityError> {
    let certificate = webpki::EndEntityCert::try_from(certificate)
        .map_err(|source| PeerIdentityError::Malformed { source })?;
    let uri = certificate
        .valid_uri_names()
        .next()
        .ok_or(PeerIdentityError::NoUri)?;
    uri.parse()
        .map_err(|source| PeerIdentityError::NotAService {
            uri: uri.to_owned(),
            source,
        })
}

/// Why a certificate with a good path is still not the right one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdentityError {
    /// The peer sent no certificate.
    #[error("the peer sent no certificate")]
    NoCertificate,
    /// The certificate does not parse.
    #[error("the peer's certificate is malformed")]
    Malformed {
        /// What is wrong.
        source: webpki::Error,
    },
    /// It comes with more certificates than any real chain has.
    #[error(
        "the peer sent {intermediates} certificates above its own, at most {MAX_INTERMEDIATES} are looked at"
    )]
    ChainTooLong {
        /// How many certificates came beside the leaf.
        intermediates: usize,
    },
    /// It names no URI.
    #[error("the peer's certificate has no URI, so no SPIFFE id")]
    NoUri,
    /// Its URI is no id of a service.
    #[error("the peer's certificate names {uri:?}, which is no SPIFFE id of a service")]
    NotAService {
        /// The first URI of the certificate.
        uri: String,
        /// What is wrong with it.
        source: SpiffeIdError,
    },
    /// It is of another trust domain.
    #[error("the peer is {presented}, which is outside the trust domain {trust_domain}")]
    ForeignTrustDomain {
        /// The peer's id.
        presented: Box<SpiffeId>,
        /// Ours.
        trust_domain: TrustDomain,
    },
    /// It is somebody else.
    #[error("the peer is {presented}, expected {expected}")]
    Mismatch {
        /// Who answered.
        presented: Box<SpiffeId>,
        /// Who should have.
        expected: Box<SpiffeId>,
    },
}

impl PeerIdentityError {
    /// The verdict of one of our verifiers within what rustls made of it, which it prints as code.
    pub(crate) fn within(error: &rustls::Error) -> Option<&Self> {
        if let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) = error
        {
            inner.downcast_ref()
        } else {
            None
        }
    }
}

impl From<PeerIdentityError> for rustls::Error {
    fn from(error: PeerIdentityError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// Lets a client accept exactly one identity.
#[derive(Debug)]
pub(crate) struct ExpectedServer {
    pub(crate) expected: SpiffeId,
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        check_length(intermediates)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let presented = certificate_identity(end_entity)?;
        if presented == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(PeerIdentityError::Mismatch {
                presented: Box::new(presented),
                expected: Box::new(self.expected.clone()),
            }
            .into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Lets a server accept any service of its trust domain, and nobody without a certificate.
#[derive(Debug)]
pub(crate) struct TrustDomainClients {
    trust_domain: TrustDomain,
    path: Arc<dyn ClientCertVerifier>,
}

impl TrustDomainClients {
    pub(crate) fn new(
        bundle: &TrustBundle,
        crypto: &Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        let path = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(bundle.store()),
            Arc::clone(crypto),
        )
        .build()?;
        Ok(Self {
            trust_domain: bundle.trust_domain().clone(),
            path,
        })
    }
}

impl ClientCertVerifier for TrustDomainClients {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    /// None: while roots rotate, a client that picks by our hints may find that it has nothing to send.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        check_length(intermediates)?;
        let verified = self
            .path
            .verify_client_cert(end_entity, intermediates, now)?;
        let presented = certificate_identity(end_entity)?;
        if presented.trust_domain == self.trust_domain {
            Ok(verified)
        } else {
            Err(PeerIdentityError::ForeignTrustDomain {
                presented: Box::new(presented),
                trust_domain: self.trust_domain.clone(),
            }
            .into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.path
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.path
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.path.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::crypto::aws_lc_rs;
    use rustls_pki_types::IpAddr;

    use super::*;
    use crate::{
        identity::testing::{TestCa, bundle, id},
        telemetry::log::chain,
    };

    /// What a server and what a client that expects `web` say of a chain.
    fn both_verdicts(
        root: &TestCa,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> [Result<(), rustls::Error>; 2] {
        let crypto = Arc::new(aws_lc_rs::default_provider());
        let roots = bundle(&[root]);
        let server = TrustDomainClients::new(&roots, &crypto).unwrap();
        let client = ExpectedServer {
            expected: id("web"),
            roots: Arc::clone(roots.store()),
            algorithms: crypto.signature_verification_algorithms,
        };
        let name = ServerName::IpAddress(IpAddr::from(std::net::Ipv4Addr::LOCALHOST));
        let now = UnixTime::now();
        [
            server
                .verify_client_cert(leaf, intermediates, now)
                .map(|_verified| ()),
            client
                .verify_server_cert(leaf, intermediates, &name, &[], now)
                .map(|_verified| ()),
        ]
    }

    fn leaf_of(issuer: &TestCa) -> CertificateDer<'static> {
        issuer.good_leaf(&id("web")).chain.remove(0)
    }

    #[test]
    fn as_many_intermediates_as_are_allowed_are_followed() {
        let root = TestCa::root("root");
        let mut above = vec![];
        let mut issuer = None;
        for level in 0..MAX_INTERMEDIATES {
            let name = format!("level {level}");
            let next = TestCa::root(&name);
            above.insert(
                0,
                next.cross_signed_by(issuer.as_ref().unwrap_or(&root), &name),
            );
            issuer = Some(next);
        }
        let leaf = leaf_of(&issuer.unwrap());
        assert_eq!(both_verdicts(&root, &leaf, &above), [Ok(()), Ok(())]);
    }

    #[test]
    fn a_crowd_of_certificates_that_name_one_another_is_not_searched() {
        let root = TestCa::root("root");
        let crowd: Vec<_> = (0..12)
            .map(|_| TestCa::root("crowd").certificate())
            .collect();
        let leaf = leaf_of(&TestCa::root("crowd"));
        for verdict in both_verdicts(&root, &leaf, &crowd) {
            let error = verdict.unwrap_err();
            let said = PeerIdentityError::within(&error).map(|error| chain(error).to_string());
            let expected = "the peer sent 12 certificates above its own, at most 5 are looked at";
            assert_eq!(said.as_deref(), Some(expected), "{error:?}");
        }
        let few = &crowd[..MAX_INTERMEDIATES];
        for verdict in both_verdicts(&root, &leaf, few) {
            let unknown = CertificateError::UnknownIssuer.into();
            assert_eq!(verdict, Err(unknown), "searched to the end");
        }
    }
}
