//! Keys that are used up: a tunnel goes on with new ones.

use std::sync::Arc;

use rcgen::CertifiedKey;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite, Tls13CipherSuite,
    crypto::{
        CipherSuiteCommon, CryptoProvider,
        aws_lc_rs::{self, cipher_suite::TLS13_AES_128_GCM_SHA256},
    },
};
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::tunnel::session::Session;

/// Records that one key seals here; in truth they are 2^24, which is 256 GiB.
const RECORDS_PER_KEY: u64 = 8;

/// For many keys each way.
const BYTES: usize = 8 << 20;

fn provider() -> Arc<CryptoProvider> {
    let SupportedCipherSuite::Tls13(usual) = TLS13_AES_128_GCM_SHA256 else {
        panic!("TLS 1.3");
    };
    let suite = Tls13CipherSuite {
        common: CipherSuiteCommon {
            suite: usual.common.suite,
            hash_provider: usual.common.hash_provider,
            confidentiality_limit: RECORDS_PER_KEY,
        },
        ..*usual
    };
    Arc::new(CryptoProvider {
        cipher_suites: vec![SupportedCipherSuite::Tls13(Box::leak(Box::new(suite)))],
        ..aws_lc_rs::default_provider()
    })
}

fn sessions() -> (Session, Session) {
    let CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let server = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let name = SERVER_NAME.try_into().unwrap();
    let calling = Session::calling(Arc::new(client), name).unwrap();
    (calling, Session::called(Arc::new(server)).unwrap())
}

/// Writes and reads at once, as a relay does.
async fn exchange(stream: TunnelStream, seed: u8) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = async {
        for piece in vec![seed; BYTES].chunks(100_000) {
            writer.write_all(piece).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let receiving = async {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        received
    };
    tokio::join!(sending, receiving).1
}

#[tokio::test]
async fn a_tunnel_outlives_its_keys() {
    let (listener, address) = listen().await;
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (calling, called) = sessions();
    let (opened, taken) = tokio::join!(
        TunnelStream::handshake(calling, dialled.unwrap(), vec![]),
        TunnelStream::handshake(called, accepted.unwrap().0, vec![]),
    );
    let both = async { tokio::join!(exchange(opened.unwrap(), 1), exchange(taken.unwrap(), 2)) };
    let (of_called, of_calling) = tokio::time::timeout(LIMIT * 3, both).await.unwrap();
    assert!(of_called == vec![2; BYTES], "{} bytes", of_called.len());
    assert!(of_calling == vec![1; BYTES], "{} bytes", of_calling.len());
}
