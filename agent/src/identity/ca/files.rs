//! The CA's files: certificates in PEM, the private key in PKCS#8, a passphrase, and who may read them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use pkcs8::{
    EncryptedPrivateKeyInfo, LineEnding, PrivateKeyInfo, SecretDocument,
    pkcs5::{pbes2, scrypt},
};
use rcgen::KeyPair;
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer,
    pem::PemObject as _,
};
use zeroize::Zeroizing;

/// The bits of a file mode that let anyone but the owner in.
const GROUP_AND_OTHERS: u32 = 0o077;

/// No PEM file of ours comes near; anything larger was given by mistake.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// scrypt's N (as a power of two), r and p: OWASP's choice for 16 MiB, which OpenSSL's default limit of 32 MiB
/// can still decrypt.
const SCRYPT: (u8, u32, u32) = (14, 8, 5);

/// A passphrase, wiped when dropped.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Reads a passphrase file; one line end at its end does not count.
    ///
    /// # Errors
    /// As for a key file, and [`CaFileError::EmptyPassphrase`].
    pub fn read(path: &Path) -> Result<Self, CaFileError> {
        let mut bytes = read_secret(path)?;
        if bytes.ends_with(b"\n") {
            bytes.pop();
            if bytes.ends_with(b"\r") {
                bytes.pop();
            }
        }
        if bytes.is_empty() {
            return Err(CaFileError::EmptyPassphrase { path: path.into() });
        }
        Ok(Self(bytes))
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// Reads all certificates of a PEM file, at least one.
///
/// # Errors
/// [`CaFileError::Read`], [`CaFileError::Pem`], [`CaFileError::NoCertificate`].
pub(super) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CaFileError> {
    let bytes = read(path)?;
    let certificates = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| CaFileError::Pem {
            path: path.into(),
            source,
        })?;
    if certificates.is_empty() {
        return Err(CaFileError::NoCertificate { path: path.into() });
    }
    Ok(certificates)
}

/// Reads a private key, decrypting it if it is encrypted.
///
/// # Errors
/// [`CaFileError::Exposed`] unless only the owner may read it, and what is wrong with its content.
pub(super) fn read_key(
    path: &Path,
    passphrase: Option<&Passphrase>,
) -> Result<KeyPair, CaFileError> {
    let bytes = read_secret(path)?;
    let not_a_key = || CaFileError::NotAKey { path: path.into() };
    let text = str::from_utf8(&bytes).ok().ok_or_else(not_a_key)?;
    let (label, document) = SecretDocument::from_pem(text).ok().ok_or_else(not_a_key)?;
    let document = match (label, passphrase) {
        ("ENCRYPTED PRIVATE KEY", Some(passphrase)) => decrypt(path, &document, passphrase)?,
        ("ENCRYPTED PRIVATE KEY", None) => {
            return Err(CaFileError::PassphraseMissing { path: path.into() });
        }
        _plain => document,
    };
    let der = document.as_bytes();
    let key = match label {
        "EC PRIVATE KEY" => PrivateKeyDer::Sec1(PrivateSec1KeyDer::from(der)),
        "RSA PRIVATE KEY" => PrivateKeyDer::Pkcs1(PrivatePkcs1KeyDer::from(der)),
        _pkcs8 => PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der)),
    };
    KeyPair::try_from(&key).map_err(|source| CaFileError::UnsupportedKey {
        path: path.into(),
        source,
    })
}

fn decrypt(
    path: &Path,
    document: &SecretDocument,
    passphrase: &Passphrase,
) -> Result<SecretDocument, CaFileError> {
    EncryptedPrivateKeyInfo::try_from(document.as_bytes())
        .and_then(|encrypted| encrypted.decrypt(passphrase.0.as_slice()))
        .map_err(|source| CaFileError::Decrypt {
            path: path.into(),
            source,
        })
}

/// The key as PEM, encrypted if there is a passphrase.
pub(super) fn key_to_pem(
    key: &KeyPair,
    passphrase: Option<&Passphrase>,
) -> Result<Zeroizing<String>, pkcs8::Error> {
    let info = PrivateKeyInfo::try_from(key.serialized_der())?;
    let Some(passphrase) = passphrase else {
        let document = SecretDocument::try_from(key.serialized_der())?;
        return Ok(document.to_pem("PRIVATE KEY", LineEnding::LF)?);
    };
    let mut random = [[0; 16]; 2];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    for part in &mut random {
        provider
            .secure_random
            .fill(part)
            .or(Err(pkcs8::Error::ParametersMalformed))?;
    }
    let [salt, iv] = &random;
    let (log_n, r, p) = SCRYPT;
    let cost = scrypt::Params::new(log_n, r, p, scrypt::Params::RECOMMENDED_LEN)
        .or(Err(pkcs8::Error::ParametersMalformed))?;
    let scheme = pbes2::Parameters::scrypt_aes256cbc(cost, salt, iv)?;
    let encrypted = info.encrypt_with_params(scheme, passphrase.0.as_slice())?;
    Ok(encrypted.to_pem("ENCRYPTED PRIVATE KEY", LineEnding::LF)?)
}

/// Writes a new key and a new certificate. If that fails, neither is left behind.
///
/// # Errors
/// [`CaFileError::Exists`] if either is there already: a CA is never overwritten. [`CaFileError::Write`].
pub(super) fn write_new_pair(
    (certificate, certificate_pem): (&Path, &str),
    (key, key_pem): (&Path, &str),
) -> Result<(), CaFileError> {
    write_new(key, 0o600, key_pem)?;
    write_new(certificate, 0o644, certificate_pem).inspect_err(|_error| {
        // Ours, made a moment ago, and useless without its certificate.
        if let Err(error) = fs::remove_file(key) {
            tracing::warn!(path = %key.display(), %error, "key left behind");
        }
    })
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), CaFileError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        // The umask may have taken bits from a certificate that all are to read.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| {
        let path = path.into();
        if source.kind() == io::ErrorKind::AlreadyExists {
            CaFileError::Exists { path }
        } else {
            CaFileError::Write { path, source }
        }
    })
}

/// Reads a file that nobody but its owner may read or write.
fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, CaFileError> {
    let file = open(path)?;
    let mode = file.metadata().map_err(reading(path))?.mode() & 0o7777;
    if mode & GROUP_AND_OTHERS != 0 {
        return Err(CaFileError::Exposed {
            path: path.into(),
            mode,
        });
    }
    read_open(path, file)
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, CaFileError> {
    read_open(path, open(path)?)
}

fn open(path: &Path) -> Result<File, CaFileError> {
    File::open(path).map_err(reading(path))
}

fn read_open(path: &Path, file: File) -> Result<Zeroizing<Vec<u8>>, CaFileError> {
    let length = file.metadata().map_err(reading(path))?.len();
    if length > MAX_FILE_BYTES {
        return Err(CaFileError::TooLarge {
            path: path.into(),
            bytes: length,
        });
    }
    // With the whole capacity at once, no reallocation leaves a copy of a secret behind.
    let capacity = usize::try_from(MAX_FILE_BYTES.min(length) + 1).unwrap_or_default();
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(reading(path))?;
    Ok(bytes)
}

fn reading(path: &Path) -> impl FnOnce(io::Error) -> CaFileError + '_ {
    move |source| CaFileError::Read {
        path: path.into(),
        source,
    }
}

/// What is wrong with a file of the CA.
#[derive(Debug, thiserror::Error)]
pub enum CaFileError {
    /// It cannot be read.
    #[error("reading {} failed", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("writing {} failed", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is there already and is not overwritten.
    #[error("{} exists already; move it away to make a new one", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Others than its owner may read or write it.
    #[error("{path} has mode {mode:04o}, so others than its owner can use it: run `chmod 600 {path}`", path = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Larger than any PEM file needs to be.
    #[error("{} has {bytes} bytes, expected a PEM file of at most {MAX_FILE_BYTES}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is not PEM.
    #[error("{} is not a PEM file", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls_pki_types::pem::Error,
    },
    /// PEM, but without a certificate.
    #[error("{} holds no certificate (-----BEGIN CERTIFICATE-----)", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// Not a private key in PEM.
    #[error("{} is not a private key in PEM (PKCS#8)", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// A private key of a kind that cannot sign here.
    #[error("the private key in {} cannot be used", path.display())]
    UnsupportedKey {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rcgen::Error,
    },
    /// Encrypted, but no passphrase was given.
    #[error("{} is encrypted: set identity.ca.passphrase_file", path.display())]
    PassphraseMissing {
        /// The file.
        path: PathBuf,
    },
    /// A passphrase file without a passphrase.
    #[error("{} holds no passphrase", path.display())]
    EmptyPassphrase {
        /// The file.
        path: PathBuf,
    },
    /// The passphrase does not fit, or the encryption is not one we know.
    #[error("decrypting {} failed: wrong passphrase, or not PBES2", path.display())]
    Decrypt {
        /// The file.
        path: PathBuf,
        /// What was found.
        source: pkcs8::Error,
    },
}
