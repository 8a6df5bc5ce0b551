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

/// The id in a certificate: its first URI.
///
/// Says nothing about who signed it: the caller has verified the path, or made the certificate.
///
/// # Errors
/// Each variant of [`PeerIdentityError`] but the two that compare.
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
