//! One certificate made ready for handshakes: the rustls configurations of one service.
//!
//! Built once per pair of leaf and roots and shared by every connection of the service until one of the
//! two changes.
//!
//! A resumed session skips the certificate, so a verdict must not live on in one. What could be resumed is
//! therefore kept here: it ends with the leaf and the roots that it was judged by, and it is kept apart for each
//! expected peer. That the peer's own certificate has not run out since is for [`WorkloadTls::check_resumed`].

use std::{
    collections::HashMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use rustls::{
    ClientConfig, CommonState, HandshakeKind, ServerConfig,
    client::{Resumption, Tls12Resumption, danger::ServerCertVerifier as _},
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, danger::ClientCertVerifier as _},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{
    clock::{Clock, TlsClock},
    pem,
    provider::{Leaf, TrustBundle},
    sessions::Sessions,
    spiffe::SpiffeId,
    suites,
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
    /// With the sessions that can be resumed, so apart for each peer and each node that it was met on.
    called: Mutex<HashMap<(SpiffeId, SocketAddr), Arc<ClientConfig>>>,
    /// Until when the chains of peers are valid that resumed a session.
    resumed: Mutex<HashMap<Vec<CertificateDer<'static>>, SystemTime>>,
}

/// For so many peers and nodes sessions are kept.
const MAX_CALLED: usize = 1024;

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
        let crypto = suites::provider();
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
        let (plain_client, mut plain_server) = (client(PROTOCOLS)?, server(PROTOCOLS)?);
        // The session itself is in the ticket, sealed with a key that only this configuration knows.
        plain_server.ticketer = aws_lc_rs::Ticketer::new()?;
        plain_server.send_tls13_tickets = 1;
        // Connections of HBONE are few and live long: nothing is resumed.
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
            called: Mutex::default(),
            resumed: Mutex::default(),
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

    /// The configuration to call `expected` at `node` with, and nobody else. It resumes what it began before.
    pub fn client_config(&self, expected: &SpiffeId, node: SocketAddr) -> Arc<ClientConfig> {
        let mut called = self.called.lock();
        // Rare, and all that is lost is one full handshake each.
        if called.len() >= MAX_CALLED {
            called.clear();
        }
        let config = called.entry((expected.clone(), node)).or_insert_with(|| {
            let mut config = self.calling(&self.client, expected);
            config.resumption = Resumption::store(Arc::<Sessions>::default())
                .tls12_resumption(Tls12Resumption::Disabled);
            Arc::new(config)
        });
        Arc::clone(config)
    }

    /// As [`Self::client_config`], for HTTP/2 over TLS 1.3, and without resumption.
    pub(crate) fn hbone_client_config(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        Arc::new(self.calling(&self.hbone_client, expected))
    }

    fn calling(&self, config: &ClientConfig, expected: &SpiffeId) -> ClientConfig {
        let mut config = config.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(expected_server(
                &self.bundle,
                expected,
                self.crypto(),
            )));
        config
    }

    /// Ends what could be resumed of sessions with `expected` at `node`.
    pub(crate) fn forget_sessions(&self, expected: &SpiffeId, node: SocketAddr) {
        self.called.lock().remove(&(expected.clone(), node));
    }

    /// Judges a peer by the time of day, as every full handshake does. A resumed one leaves that out.
    ///
    /// # Errors
    /// As [`Self::verify_again`], if the peer's certificate has run out since it was shown.
    pub(crate) fn check_resumed(
        &self,
        connection: &CommonState,
        expected: Option<&SpiffeId>,
    ) -> Result<(), rustls::Error> {
        if connection.handshake_kind() != Some(HandshakeKind::Resumed) {
            return Ok(());
        }
        let chain = connection.peer_certificates().unwrap_or_default();
        let now = self.clock.now();
        if self.end_of(chain).is_some_and(|end| now < end) {
            return Ok(());
        }
        // What has run out need not be on the path that leads to a root.
        self.verify_again(chain, expected, now)
    }

    /// When the first of these certificates runs out. Read once for each chain.
    fn end_of(&self, chain: &[CertificateDer<'static>]) -> Option<SystemTime> {
        if let Some(end) = self.resumed.lock().get(chain) {
            return Some(*end);
        }
        let ends = chain.iter().map(|it| pem::not_after(it).ok());
        let end = ends.collect::<Option<Vec<_>>>()?.into_iter().min()?;
        let mut resumed = self.resumed.lock();
        if resumed.len() >= MAX_CALLED {
            resumed.clear();
        }
        resumed.insert(chain.to_vec(), end);
        Some(end)
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
