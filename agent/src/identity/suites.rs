//! Which cipher suites are offered, and in which order.

use std::sync::Arc;

use rustls::{
    CipherSuite, SupportedCipherSuite,
    crypto::{CryptoProvider, aws_lc_rs},
};

/// aws-lc-rs and its choice of suites, all of them ECDHE with an AEAD. First come those that this processor is fastest
/// at: with AES-128 and SHA-256 if it has instructions for AES, with `ChaCha20` if not.
///
/// The caller's order decides, and by default it would begin with AES-256 and SHA-384, which few processors have
/// instructions for: the key schedule alone then takes more time than X25519.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    let has_aes = has_aes();
    provider
        .cipher_suites
        .sort_by_key(|suite| !is_first(*suite, has_aes));
    Arc::new(provider)
}

fn is_first(suite: SupportedCipherSuite, has_aes: bool) -> bool {
    use CipherSuite as Suite;
    let first = if has_aes {
        [
            Suite::TLS13_AES_128_GCM_SHA256,
            Suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        ]
    } else {
        [
            Suite::TLS13_CHACHA20_POLY1305_SHA256,
            Suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        ]
    };
    first.contains(&suite.suite())
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{TestCa, id};

    #[test]
    fn handshakes_have_this_order() {
        let root = TestCa::root("root");
        let identity = id("db");
        let tls = root.workload(&identity, &[&root]);
        let node = ([127, 0, 0, 1], 1).into();
        let called = tls.client_config(&identity, node);
        let pooled = tls.hbone_client_config(&identity);
        for crypto in [
            called.crypto_provider(),
            pooled.crypto_provider(),
            tls.server_config().crypto_provider(),
            tls.hbone_server_config().crypto_provider(),
        ] {
            let order = |crypto: &CryptoProvider| {
                let suites = crypto.cipher_suites.iter();
                suites.map(SupportedCipherSuite::suite).collect::<Vec<_>>()
            };
            assert_eq!(order(crypto), order(&provider()));
            assert!(is_first(crypto.cipher_suites[0], has_aes()));
        }
    }

    #[test]
    fn no_suite_is_lost_and_the_fast_one_is_first() {
        let by_default = aws_lc_rs::default_provider().cipher_suites;
        for (has_aes, expected) in [
            (true, CipherSuite::TLS13_AES_128_GCM_SHA256),
            (false, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
        ] {
            let mut suites = by_default.clone();
            suites.sort_by_key(|suite| !is_first(*suite, has_aes));
            assert_eq!(
                suites.first().map(SupportedCipherSuite::suite),
                Some(expected)
            );
            assert_eq!(suites.len(), by_default.len());
        }
        assert_eq!(provider().cipher_suites.len(), by_default.len());
    }
}
