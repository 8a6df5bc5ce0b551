//! One certificate made ready for handshakes: the rustls configurations of one service.
//!
//! Built once per pair of leaf and roots and shared by every connection of the service until one of the
//! two changes. Sessions are never resumed: a resumed session skips the certificate, so it would carry an old
//! verdict past a rotation of roots, past the end of a leaf, or from one expected peer to another.

use std::{fmt, net::Ipv4Addr, sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig, ServerConfig,
    client::{Resumption, danger::ServerCertVerifier as _},
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, danger::ClientCertVerifier as _},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{
    clock::{Clock, TlsClock},
    provider::{Leaf, TrustBundle},
    spiffe::SpiffeId,
    verify::{ExpectedServer, PeerIdentityError, TrustDomainClients, certificate_identity},
};

/// What a service needs to call and to be called: its certificate, and whom it trusts.
pub struct WorkloadTls {
    identity: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    certified: Arc<CertifiedKey>,
    bundle: Arc<TrustBundle>,
    clock: Arc<dyn Clock>,
    client: ClientConfig,
    server: Arc<ServerConfig>,
    hbone_client: Arc<ClientConfig>,
    hbone_server: Arc<ServerConfig>,
}

impl WorkloadTls {
    /// Checks `leaf` as a peer would, then builds the configurations.
    ///
    /// # Errors
    /// rustls' own error if the key is not the certificate's, the chain reaches no root of `bundle`, the
    /// certificate does not name `identity`, or is not valid at this time.
    pub(crate) fn new(
        identity: SpiffeId,
        leaf: &Leaf,
        bundle: Arc<TrustBundle>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, rustls::Error> {
        let key = aws_lc_rs::sign::any_supported_type(&leaf.key)?;
        let certified = Arc::new(CertifiedKey::new(leaf.chain.clone(), key));
        certified.keys_match()?;
        let tls = Self::build(
            identity,
            (leaf.not_before, leaf.not_after),
            certified,
            bundle,
            clock,
        )?;
        tls.check_own_chain()?;
        Ok(tls)
    }

    /// The same leaf with other roots. It may no longer reach any of them: ask [`Self::check_own_chain`].
    pub(crate) fn with_roots(&self, bundle: Arc<TrustBundle>) -> Result<Self, rustls::Error> {
        Self::build(
            self.identity.clone(),
            (self.not_before, self.not_after),
            Arc::clone(&self.certified),
            bundle,
            Arc::clone(&self.clock),
        )
    }

    fn build(
        identity: SpiffeId,
        (not_before, not_after): (SystemTime, SystemTime),
        certified: Arc<CertifiedKey>,
        bundle: Arc<TrustBundle>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, rustls::Error> {
        // aws-lc-rs' own choice of suites: all of them ECDHE with AES-GCM or ChaCha20.
        let crypto = Arc::new(aws_lc_rs::default_provider());
        let clients = Arc::new(clients_of(&bundle, &crypto)?);
        let own = || Arc::new(SingleCertAndKey::from(Arc::clone(&certified)));
        let tls_clock = || Arc::new(TlsClock(Arc::clone(&clock)));
        let client = |versions| -> Result<ClientConfig, rustls::Error> {
            let server = Arc::new(expected_server(&bundle, &identity, &crypto));
            let mut client = ClientConfig::builder_with_details(Arc::clone(&crypto), tls_clock())
                .with_protocol_versions(versions)?
                .dangerous()
                .with_custom_certificate_verifier(server)
                .with_client_cert_resolver(own());
            client.resumption = Resumption::disabled();
            Ok(client)
        };
        let server = |versions| -> Result<ServerConfig, rustls::Error> {
            let clients = Arc::<TrustDomainClients>::clone(&clients);
            let mut server = ServerConfig::builder_with_details(Arc::clone(&crypto), tls_clock())
                .with_protocol_versions(versions)?
                .with_client_cert_verifier(clients)
                .with_cert_resolver(own());
            server.session_storage = Arc::new(NoServerSessionStorage {});
            server.send_tls13_tickets = 0;
            Ok(server)
        };
        // No ALPN on purpose: Consul's built-in proxy offers `h2` on raw TCP, and rustls ignores what a
        // client offers only as long as we name nothing ourselves.
        let (plain_client, plain_server) = (client(PROTOCOLS)?, server(PROTOCOLS)?);
        let (mut hbone_client, mut hbone_server) =
            (client(HBONE_PROTOCOLS)?, server(HBONE_PROTOCOLS)?);
        hbone_client.alpn_protocols = vec![b"h2".to_vec()];
        hbone_server.alpn_protocols = vec![b"h2".to_vec()];

        Ok(Self {
            identity,
            not_before,
            not_after,
            certified,
            bundle,
            clock,
            client: plain_client,
            server: Arc::new(plain_server),
            hbone_client: Arc::new(hbone_client),
            hbone_server: Arc::new(hbone_server),
        })
    }

    /// Verifies the own certificate as both a client and a server would.
    pub(crate) fn check_own_chain(&self) -> Result<(), rustls::Error> {
        let leaf = self.leaf().ok_or(rustls::Error::NoCertificatesPresented)?;
        let presented = certificate_identity(leaf)?;
        if presented != self.identity {
            return Err(PeerIdentityError::Mismatch {
                presented: Box::new(presented),
                expected: Box::new(self.identity.clone()),
            }
            .into());
        }
        let now = self.clock.now();
        self.verify_again(&self.certified.cert, Some(&self.identity), now)?;
        self.verify_again(&self.certified.cert, None, now)
    }

    fn crypto(&self) -> &Arc<CryptoProvider> {
        self.client.crypto_provider()
    }

    /// Whose certificate this is.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// By the clock that handshakes with it are judged by.
    pub(crate) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    /// The certificate itself, without what leads to a root.
    pub(crate) fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.certified.cert.first()
    }

    /// From when the certificate is valid.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Until when the certificate is valid.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The roots that peers are checked against.
    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// The configuration to call `expected` with, and nobody else.
    ///
    /// Made for each call: a handful of reference counts and two allocations, nothing beside a handshake,
    /// and there is no cache whose entries could outlive what they were made from.
    pub fn client_config(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        self.calling(&self.client, expected)
    }

    /// As [`Self::client_config`], for HTTP/2 over TLS 1.3.
    pub(crate) fn hbone_client_config(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        self.calling(&self.hbone_client, expected)
    }

    fn calling(&self, config: &ClientConfig, expected: &SpiffeId) -> Arc<ClientConfig> {
        let mut config = config.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(expected_server(
                &self.bundle,
                expected,
                self.crypto(),
            )));
        Arc::new(config)
    }

    /// The configuration to be called with: a client certificate of the trust domain is mandatory.
    pub fn server_config(&self) -> &Arc<ServerConfig> {
        &self.server
    }

    /// As [`Self::server_config`], for HTTP/2 over TLS 1.3.
    pub(crate) fn hbone_server_config(&self) -> &Arc<ServerConfig> {
        &self.hbone_server
    }

    /// Whether a peer whose chain was good at the time `at` is trusted under the roots of now: as the server
    /// `expected`, or else as a client.
    pub(crate) fn verify_again(
        &self,
        chain: &[CertificateDer<'static>],
        expected: Option<&SpiffeId>,
        at: SystemTime,
    ) -> Result<(), rustls::Error> {
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or(rustls::Error::NoCertificatesPresented)?;
        let at = unix_time(at)?;
        let Some(expected) = expected else {
            let clients = clients_of(&self.bundle, self.crypto())?;
            let verdict = clients.verify_client_cert(leaf, intermediates, at);
            return verdict.map(|_verified| ());
        };
        // The verifier ignores the name; rustls' interface wants one.
        let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
        expected_server(&self.bundle, expected, self.crypto())
            .verify_server_cert(leaf, intermediates, &name, &[], at)
            .map(|_verified| ())
    }
}

impl fmt::Debug for WorkloadTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadTls")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn unix_time(at: SystemTime) -> Result<UnixTime, rustls::Error> {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .map(UnixTime::since_unix_epoch)
        .or(Err(rustls::Error::FailedToGetCurrentTime))
}

fn expected_server(
    bundle: &TrustBundle,
    expected: &SpiffeId,
    crypto: &CryptoProvider,
) -> ExpectedServer {
    ExpectedServer {
        expected: expected.clone(),
        roots: Arc::clone(bundle.store()),
        algorithms: crypto.signature_verification_algorithms,
    }
}

fn clients_of(
    bundle: &TrustBundle,
    crypto: &Arc<CryptoProvider>,
) -> Result<TrustDomainClients, rustls::Error> {
    TrustDomainClients::new(bundle, crypto)
        .map_err(|error| rustls::Error::Other(rustls::OtherError(Arc::new(error))))
}

/// Envoy sidecars dial with TLS 1.2 only, so both.
const PROTOCOLS: &[&rustls::SupportedProtocolVersion] =
    &[&rustls::version::TLS13, &rustls::version::TLS12];

/// HBONE is TLS 1.3 only.
const HBONE_PROTOCOLS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
