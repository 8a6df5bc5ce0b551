//! Who answered in a handshake.

use rustls::CommonState;

use crate::identity::{
    spiffe::SpiffeId,
    verify::{PeerIdentityError, certificate_identity},
};

/// Who is on the other side of a finished handshake.
///
/// The handshake has verified the certificate; this reads the name in it.
///
/// # Errors
/// As [`certificate_identity`], and [`PeerIdentityError::NoCertificate`] before the handshake is done.
pub fn peer_identity(connection: &CommonState) -> Result<SpiffeId, PeerIdentityError> {
    let leaf = connection
        .peer_certificates()
        .and_then(<[_]>::first)
        .ok_or(PeerIdentityError::NoCertificate)?;
    certificate_identity(leaf)
}
