//! Consul's authority: roots and leaves from the node's Consul agent.
//!
//! The agent asked is the node's own: it makes the keys, renews leaves between 60 and 90 % of their life and after a
//! rotation of roots, and hands the same ones to every caller. Whichever CA Consul uses behind (its own, Vault, AWS),
//! all roots that it lists are trusted and a leaf's chain is sent whole. Nothing here is asked of the servers' leader,
//! so that certificates outlive a Consul without one, up to their end.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Deserializer};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{
    certificates,
    clock::Clock,
    pem::{self, PemError},
    provider::{
        BoxFuture, CertificateProvider, IssueError, Leaf, Trust, TrustBundle, TrustBundleError,
    },
    spiffe::{SpiffeId, TrustDomain, TrustDomainError},
};
use crate::{
    catalog::model::ServiceName,
    consul::{
        Answer, Client, ConsulError, Event, Request, Watch, WatchSettings,
        answers::{AgentSelf, LeafCertificate, Roots},
        judge::Content as _,
        watch::WatchStatus,
    },
    lifecycle::Shutdown,
    telemetry::log::chain,
};

/// How long to wait for the renewal of a leaf that Consul gave although it should have been replaced: an agent that
/// nobody asked for a while answers with what it has, and renews while a caller waits.
const RENEWAL_WAIT: Duration = Duration::from_secs(5);

/// Issues leaves of one Consul cluster. Made by [`ConsulCa::connect`].
#[derive(Debug)]
pub struct ConsulCa {
    client: Client,
    trust_domain: TrustDomain,
    trust: watch::Sender<Trust>,
    clock: Arc<dyn Clock>,
    watched: Arc<Mutex<WatchStatus>>,
    /// Why the roots that Consul told last are not in force.
    refused: Mutex<Option<String>>,
}

/// What follows the roots; to be run as long as the agent does.
#[derive(Debug)]
pub struct RootsFollower {
    ca: Arc<ConsulCa>,
    roots: Watch<Roots>,
}

/// What the node's Consul agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsulAgent {
    /// Its datacenter, which is a part of every identity.
    pub datacenter: String,
    /// Consul's name for this node.
    pub node: String,
    /// Where the members of its cluster reach it.
    pub address: Option<IpAddr>,
    /// Its version, for people.
    pub version: String,
    /// Where it answers DNS, over UDP and TCP.
    pub dns_servers: Vec<SocketAddr>,
    /// The domain of its names, such as `consul.`; empty if it does not say.
    pub dns_domain: String,
}

impl ConsulAgent {
    /// Asks the node's Consul agent who it is.
    ///
    /// # Errors
    /// [`ConsulCaError::AgentSelf`], which says what right is missing if it is that.
    pub async fn ask(client: &Client) -> Result<Self, ConsulCaError> {
        let request = Request::to(&["v1", "agent", "self"]);
        let answered = client.get::<AgentSelf>(&request).await;
        let AgentSelf {
            config,
            member,
            debug,
        } = answered.map_err(ConsulCaError::agent_self)?.body;
        Ok(Self {
            datacenter: config.datacenter,
            node: config.node_name,
            address: member.addr.parse().ok(),
            version: config.version,
            dns_servers: dns_servers(&debug.dns_addresses),
            dns_domain: debug.dns_domain,
        })
    }
}

/// Those of Consul's `DNSAddrs` that take datagrams. One that listens at every address is asked over loopback.
fn dns_servers(listed: &[String]) -> Vec<SocketAddr> {
    let over_udp = listed
        .iter()
        .filter_map(|text| text.strip_prefix("udp://")?.parse().ok());
    over_udp
        .map(|mut address: SocketAddr| {
            match address.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
                IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
                IpAddr::V4(_) | IpAddr::V6(_) => {}
            }
            address
        })
        .collect()
}

impl ConsulCa {
    /// Waits for the first roots, which also say the trust domain.
    ///
    /// While Consul is away it goes on waiting, and logs why. Drop the future to give up.
    ///
    /// # Errors
    /// [`ConsulCaError`] if waiting does not help: Consul refuses, or Connect is off.
    pub async fn connect(
        client: Client,
        clock: Arc<dyn Clock>,
    ) -> Result<(Arc<Self>, RootsFollower), ConsulCaError> {
        let request = Request::to(&["v1", "agent", "connect", "ca", "roots"]);
        let mut roots = Watch::<Roots>::new(client.clone(), request, of_the_agent());
        let first = loop {
            match roots.next().await {
                // A Consul that has just begun has none yet.
                Event::Changed(Answer { body, .. }) if body.is_empty() => {
                    tracing::warn!("waiting for Consul's CA to have a root");
                }
                Event::Changed(Answer { body, .. }) => break body,
                Event::Doubtful(doubt) => {
                    tracing::warn!(%doubt, "waiting for the roots of Consul's CA");
                }
                Event::Failed(source) if source.is_refused() || is_connect_off(&source) => {
                    return Err(ConsulCaError::Roots {
                        source: Box::new(source),
                    });
                }
                Event::Failed(error) => {
                    tracing::warn!(error = %chain(&error), "waiting for the roots of Consul's CA");
                }
            }
        };
        let bundle = bundle_of(&first)?;
        let trust_domain = bundle.trust_domain().clone();
        tracing::info!(%trust_domain, roots = bundle.certificates().len(), "roots of Consul's CA read");
        let ca = Arc::new(Self {
            client,
            trust_domain,
            trust: watch::Sender::new(Trust {
                roots: Arc::new(bundle),
                // Consul renews leaves by itself after a rotation.
                issuer: 0,
            }),
            clock,
            watched: roots.status(),
            refused: Mutex::default(),
        });
        let follower = RootsFollower {
            ca: Arc::clone(&ca),
            roots,
        };
        Ok((ca, follower))
    }

    /// That of every identity here; it does not change while the agent runs.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Why the roots are not those that Consul has now; for operators.
    pub fn problem(&self) -> Option<String> {
        let refused = self.refused.lock().clone();
        refused.or_else(|| self.watched.lock().problem.clone())
    }

    async fn leaf(&self, identity: &SpiffeId) -> Result<Leaf, IssueError> {
        if identity.trust_domain != self.trust_domain {
            return Err(IssueError::ForeignTrustDomain {
                identity: identity.clone(),
                trust_domain: self.trust_domain.clone(),
            });
        }
        let service = &identity.service;
        let first = self.ask(service, leaf_of(service)).await?;
        let leaf = first.body.read()?;
        match first.index {
            Some(index) if certificates::is_overdue(&leaf, self.clock.now()) => {
                let waiting = leaf_of(service)
                    .with("index", index.to_string())
                    .with("wait", format!("{}s", RENEWAL_WAIT.as_secs()));
                let second = self.ask(service, waiting).await?;
                Ok(second.body.read()?)
            }
            Some(_) | None => Ok(leaf),
        }
    }

    async fn ask(
        &self,
        service: &ServiceName,
        request: Request,
    ) -> Result<Answer<LeafAnswer>, ConsulCaError> {
        self.client.get(&request).await.map_err(|source| {
            let (service, source) = (service.clone(), Box::new(source));
            if source.is_refused() {
                ConsulCaError::NotAllowed { service, source }
            } else {
                ConsulCaError::Leaf { service, source }
            }
        })
    }

    /// Ends when Consul has another leaf than `in_use`.
    async fn other_leaf(&self, identity: &SpiffeId, in_use: &CertificateDer<'static>) {
        let request = leaf_of(&identity.service);
        let mut leaf = Watch::<LeafCertificate>::new(self.client.clone(), request, of_the_agent());
        let mut is_refused = false;
        loop {
            match leaf.next().await {
                Event::Changed(answer) => {
                    is_refused = false;
                    let now = pem::certificates(&answer.body.certificate);
                    // One that does not parse is another one, and is told of when it is issued.
                    if now.ok().and_then(|chain| chain.into_iter().next()).as_ref() != Some(in_use)
                    {
                        return;
                    }
                }
                // It is asked again, with growing pauses; that Consul is away is told by who follows the roots.
                Event::Failed(error) if error.is_refused() && !is_refused => {
                    is_refused = true;
                    tracing::warn!(
                        %identity, error = %chain(&error),
                        "renewals of the certificate are not heard of for now"
                    );
                }
                Event::Doubtful(_) | Event::Failed(_) => {}
            }
        }
    }
}

impl CertificateProvider for ConsulCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Leaf, IssueError>> {
        Box::pin(self.leaf(identity))
    }

    fn trust(&self) -> watch::Receiver<Trust> {
        self.trust.subscribe()
    }

    fn renewed<'a>(
        &'a self,
        identity: &'a SpiffeId,
        in_use: &'a CertificateDer<'static>,
    ) -> BoxFuture<'a, ()> {
        Box::pin(self.other_leaf(identity, in_use))
    }
}

impl RootsFollower {
    /// Brings every change of the roots to the certificates in use, until the agent ends.
    pub async fn run(mut self, shutdown: Shutdown) {
        let mut told = None;
        loop {
            let event = tokio::select! {
                biased;
                () = shutdown.stopped() => return,
                event = self.roots.next() => event,
            };
            let problem = match event {
                Event::Changed(answer) => {
                    let refused = self.ca.take(&answer.body).err();
                    if let Some(problem) = &refused {
                        tracing::error!(
                            problem,
                            "roots of Consul's CA not taken over: those from before stay"
                        );
                    }
                    *self.ca.refused.lock() = refused;
                    continue;
                }
                Event::Doubtful(doubt) => doubt.to_string(),
                Event::Failed(error) => chain(&error).to_string(),
            };
            // Once for each time that Consul is away.
            let good_at = self.ca.watched.lock().good_at;
            if told.replace(good_at) != Some(good_at) {
                tracing::warn!(problem, "roots of Consul's CA not followed for now");
            }
        }
    }
}

impl ConsulCa {
    /// Puts other roots in force. Else says what is wrong with them.
    fn take(&self, roots: &Roots) -> Result<(), String> {
        let bundle = bundle_of(roots).map_err(|error| chain(&error).to_string())?;
        if *bundle.trust_domain() != self.trust_domain {
            // Identities, server names and intentions of before would be of another cluster.
            return Err(format!(
                "Consul's trust domain is now {}, and was {}: is this another cluster? Restart the agent to follow it",
                bundle.trust_domain(),
                self.trust_domain
            ));
        }
        self.trust.send_if_modified(|trust| {
            let is_new = trust.roots.certificates() != bundle.certificates();
            if is_new {
                tracing::info!(
                    roots = bundle.certificates().len(),
                    active = roots.active_root_id,
                    "roots of Consul's CA changed"
                );
                trust.roots = Arc::new(bundle);
            }
            is_new
        });
        Ok(())
    }
}

/// Roots and leaves come from the cache of the node's own agent.
fn of_the_agent() -> WatchSettings {
    WatchSettings {
        stale: false,
        from_agent: true,
        ..WatchSettings::default()
    }
}

fn leaf_of(service: &ServiceName) -> Request {
    Request::to(&["v1", "agent", "connect", "ca", "leaf", service.as_str()])
}

fn is_connect_off(error: &ConsulError) -> bool {
    matches!(error, ConsulError::Status { text, .. } if text.contains("Connect must be enabled"))
}

fn bundle_of(roots: &Roots) -> Result<TrustBundle, ConsulCaError> {
    let trust_domain = roots
        .trust_domain
        .parse()
        .map_err(|source| ConsulCaError::TrustDomain { source })?;
    let mut certificates = Vec::new();
    for root in &roots.roots {
        let read = pem::certificates(&root.root_cert).map_err(|source| {
            let id = root.id.clone();
            ConsulCaError::Root { id, source }
        })?;
        certificates.extend(read);
    }
    TrustBundle::new(trust_domain, certificates).map_err(|source| ConsulCaError::Bundle { source })
}

/// `/v1/agent/connect/ca/leaf/:service`, with the key.
#[derive(Deserialize)]
struct LeafAnswer {
    #[serde(rename = "CertPEM")]
    certificate: String,
    #[serde(rename = "PrivateKeyPEM", deserialize_with = "wiped")]
    key: Zeroizing<String>,
}

impl LeafAnswer {
    fn read(&self) -> Result<Leaf, ConsulCaError> {
        pem::leaf(&self.certificate, &self.key).map_err(|source| ConsulCaError::NotALeaf { source })
    }
}

fn wiped<'de, D: Deserializer<'de>>(from: D) -> Result<Zeroizing<String>, D::Error> {
    String::deserialize(from).map(Zeroizing::new)
}

/// What Consul's authority did not give, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConsulCaError {
    /// The token may not have this certificate.
    #[error(
        "Consul refuses a certificate for {service}: the agent's token needs `service:write` on {service:?}"
    )]
    NotAllowed {
        /// Whose.
        service: ServiceName,
        /// What Consul says.
        source: Box<ConsulError>,
    },
    /// Consul could not be asked for it.
    #[error("no certificate for {service} from Consul")]
    Leaf {
        /// Whose.
        service: ServiceName,
        /// Why.
        source: Box<ConsulError>,
    },
    /// What Consul gave is none.
    #[error("what Consul gave is no certificate with its key")]
    NotALeaf {
        /// What is wrong.
        source: PemError,
    },
    /// The roots cannot be had.
    #[error("no roots from Consul: is `connect {{ enabled = true }}` set on its servers?")]
    Roots {
        /// What Consul says.
        source: Box<ConsulError>,
    },
    /// One of the roots cannot be read.
    #[error("Consul's root {id} cannot be used")]
    Root {
        /// Consul's id of it.
        id: String,
        /// What is wrong.
        source: PemError,
    },
    /// The roots make no bundle.
    #[error("Consul's roots cannot be used")]
    Bundle {
        /// Why.
        source: TrustBundleError,
    },
    /// Consul's trust domain is none.
    #[error("Consul's trust domain cannot be used")]
    TrustDomain {
        /// Why.
        source: TrustDomainError,
    },
    /// The agent does not say who it is.
    #[error(
        "the Consul agent does not say its node and datacenter{}",
        advice(source)
    )]
    AgentSelf {
        /// What it says.
        source: Box<ConsulError>,
    },
}

impl ConsulCaError {
    /// Whether Consul refuses for lack of rights, so that asking again does not help.
    pub fn is_refused(&self) -> bool {
        match self {
            Self::NotAllowed { .. } => true,
            Self::Leaf { source, .. } | Self::Roots { source } | Self::AgentSelf { source } => {
                source.is_refused()
            }
            Self::NotALeaf { .. }
            | Self::Root { .. }
            | Self::Bundle { .. }
            | Self::TrustDomain { .. } => false,
        }
    }

    fn agent_self(source: ConsulError) -> Self {
        Self::AgentSelf {
            source: Box::new(source),
        }
    }
}

fn advice(error: &ConsulError) -> &'static str {
    if error.is_refused() {
        ": the agent's token needs `agent:read` on this node"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests;
