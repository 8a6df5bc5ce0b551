//! Reading certificates: what one says and whose key it has.

use std::path::Path;

use pkcs8::{Document, LineEnding};
use rcgen::{KeyPair, PublicKeyData as _};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

use super::CaError;

/// What a certificate says, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateSummary {
    /// Its subject.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
    /// Its serial number in hex, with colons.
    pub serial: String,
    /// Its first URI.
    pub uri: Option<String>,
    /// Start of its validity.
    pub not_before: OffsetDateTime,
    /// End of its validity.
    pub not_after: OffsetDateTime,
    /// Whether it may sign others.
    pub is_ca: bool,
}

impl CertificateSummary {
    /// Parses `certificate`, which was read from `path`.
    pub(crate) fn of(path: &Path, certificate: &CertificateDer<'_>) -> Result<Self, CaError> {
        let parsed = parse(path, certificate)?;
        let validity = parsed.validity();
        let names = parsed.subject_alternative_name().ok().flatten();
        let uri = names.and_then(|names| {
            let mut names = names.value.general_names.iter();
            names.find_map(|name| {
                if let GeneralName::URI(uri) = name {
                    Some((*uri).to_owned())
                } else {
                    None
                }
            })
        });
        Ok(Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            serial: parsed.raw_serial_as_string(),
            uri,
            not_before: validity.not_before.to_datetime(),
            not_after: validity.not_after.to_datetime(),
            is_ca: parsed.is_ca(),
        })
    }

    /// Whether it names itself as its issuer, as roots do.
    pub fn is_self_issued(&self) -> bool {
        self.subject == self.issuer
    }
}

/// Whether `key` is the private half of the key in `certificate`.
pub(super) fn has_key(
    path: &Path,
    certificate: &CertificateDer<'_>,
    key: &KeyPair,
) -> Result<bool, CaError> {
    Ok(parse(path, certificate)?.public_key().raw == key.subject_public_key_info())
}

pub(super) fn to_pem(certificate: &CertificateDer<'_>) -> Result<String, CaError> {
    Document::try_from(certificate.as_ref())
        .and_then(|document| document.to_pem("CERTIFICATE", LineEnding::LF))
        .map_err(|source| CaError::EncodeKey {
            source: source.into(),
        })
}

fn parse<'a>(
    path: &Path,
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, CaError> {
    X509Certificate::from_der(certificate)
        .map(|(_rest, parsed)| parsed)
        .map_err(|error| CaError::Malformed {
            path: path.into(),
            source: match error {
                x509_parser::nom::Err::Error(source) | x509_parser::nom::Err::Failure(source) => {
                    source
                }
                x509_parser::nom::Err::Incomplete(_) => {
                    x509_parser::error::X509Error::InvalidCertificate
                }
            },
        })
}
