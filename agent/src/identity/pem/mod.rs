//! Leaves and roots as text, the way authorities on the network send them: PEM of any kind of key, chains of any
//! length.
//!
//! Reads only. Whether a leaf is good is for [`super::workload_tls`] to say, which checks it against the roots in
//! force.

use std::time::SystemTime;

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject as _},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};
use zeroize::Zeroizing;

use super::provider::Leaf;

/// A leaf from its chain and its key.
///
/// The chain is taken as it is, leaf first. The key may be PKCS#8, SEC1 (`EC PRIVATE KEY`) or PKCS#1 (`RSA PRIVATE
/// KEY`); other blocks beside it, `EC PARAMETERS` for example, do not count.
///
/// # Errors
/// One variant of [`PemError`] per thing that can be wrong.
pub fn leaf(chain: &str, key: &str) -> Result<Leaf, PemError> {
    let chain = certificates(chain)?;
    let first = chain.first().ok_or(PemError::NoCertificate)?;
    let parsed = parse(first)?;
    let validity = parsed.validity();
    let (not_before, not_after) = (time(validity.not_before), time(validity.not_after));
    let issuer = parsed.issuer().to_string();
    let key =
        PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|source| PemError::Key { source })?;
    Ok(Leaf {
        chain,
        key: Zeroizing::new(key),
        not_before,
        not_after,
        issuer,
    })
}

/// Until when a certificate is valid.
///
/// # Errors
/// [`PemError::Malformed`].
pub(crate) fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, PemError> {
    Ok(time(parse(certificate)?.validity().not_after))
}

fn time(at: x509_parser::time::ASN1Time) -> SystemTime {
    SystemTime::from(at.to_datetime())
}

/// Every certificate of a text, at least one.
///
/// # Errors
/// [`PemError::NotPem`], [`PemError::NoCertificate`].
pub fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let found = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| PemError::NotPem { source })?;
    if found.is_empty() {
        return Err(PemError::NoCertificate);
    }
    Ok(found)
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PemError> {
    use x509_parser::{error::X509Error, nom::Err};
    X509Certificate::from_der(certificate)
        .map(|(_rest, parsed)| parsed)
        .map_err(|error| PemError::Malformed {
            source: match error {
                Err::Error(source) | Err::Failure(source) => source,
                Err::Incomplete(_) => X509Error::InvalidCertificate,
            },
        })
}

/// What is wrong with a text.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// It is not PEM.
    #[error("the certificates are not PEM")]
    NotPem {
        /// Why not.
        source: pem::Error,
    },
    /// PEM, but without a certificate.
    #[error("there is no certificate (-----BEGIN CERTIFICATE-----)")]
    NoCertificate,
    /// The first certificate does not parse.
    #[error("the certificate is malformed")]
    Malformed {
        /// What is wrong.
        source: x509_parser::error::X509Error,
    },
    /// No private key in PEM.
    #[error("there is no private key in PEM (PKCS#8, SEC1 or PKCS#1)")]
    Key {
        /// What was found.
        source: pem::Error,
    },
}

#[cfg(test)]
mod tests;
