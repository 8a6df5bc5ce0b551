//! The steps of an outbound connection, in order. Each says by its types what must have come before.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpStream;

use super::{Asked, Outbound, OutboundSettings, Wanted, balance::Choice, destinations::DialError};
use crate::{
    catalog::{
        model::{Instance, IntentionAction, Service, ServiceName},
        store::{Catalog, id_of},
    },
    datapath::{Captured, Maker},
    identity::{LocalDomain, spiffe::SpiffeId, workload_tls::WorkloadTls},
    telemetry::{
        log::chain,
        rate::OncePer,
        record::{ConnectionRecord, Outcome, Side, Stage},
    },
    tunnel::{self, OpenTunnel, connect::TunnelError, hbone},
};

/// Who calls, proved by the kernel, with the certificate to show for it.
pub(super) struct Caller {
    pub(super) identity: SpiffeId,
    tls: Arc<WorkloadTls>,
}

/// What is called: a service in one version of the catalog.
pub(super) struct Callee {
    pub(super) service: Arc<Service>,
    /// The instance that was called by its own address.
    instance: Option<Arc<Instance>>,
    catalog: Arc<Catalog>,
}

/// Proof that an intention (or the default) allows this caller to call this service.
pub(super) struct Permit<'a> {
    caller: &'a Caller,
    callee: &'a Callee,
}

/// What carries a connection on.
#[derive(Debug)]
pub(super) enum Upstream {
    /// To another node of the mesh.
    Tunnel(OpenTunnel),
    /// To a host outside it, as it is.
    Plain(TcpStream),
}

/// There is no [`Upstream`].
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    #[error(transparent)]
    Plain(#[from] DialError),
}

impl OpenError {
    fn stage(&self) -> Stage {
        match self {
            Self::Tunnel(error) => error.stage(),
            Self::Plain(DialError::Dial { .. } | DialError::Timeout { .. }) => Stage::Dial,
            Self::Plain(DialError::Own(_) | DialError::InMesh { .. }) => Stage::Route,
        }
    }
}

/// Unknown workloads may call in a loop; once an hour per cgroup says it.
static UNKNOWN_LOG: OncePer = OncePer::new(Duration::from_secs(3600));

/// Dials at most this many instances: the chosen one and one retry, both before any byte was sent.
const ATTEMPTS: usize = 2;

/// Opens connections ahead of use to at most this many nodes of a service.
const WARM: usize = 16;

impl Outbound {
    /// Step 3: what the eBPF programs recorded for this socket, or what the kernel tells of one that a rule redirected.
    ///
    /// No record means that somebody connected straight to the listener, and is refused.
    pub(super) fn capture(
        &self,
        downstream: &TcpStream,
        client: SocketAddr,
    ) -> Result<Asked<'static>, Outcome> {
        use std::os::fd::AsFd as _;
        let failed = |side, error| Outcome::Failed {
            stage: Stage::Capture,
            side,
            error,
        };
        match self.datapath.captured(downstream.as_fd()) {
            Ok(Some(captured)) => Ok(Asked {
                maker: captured.maker,
                address: Some(captured.destination),
                wanted: Wanted::Captured(captured),
            }),
            Ok(None) => {
                self.telemetry.metrics().uncaptured();
                let error = format!(
                    "not captured: a direct connection from {client} to the capture listener"
                );
                Err(failed(Side::Downstream, error))
            }
            Err(error) => {
                let side = if error.is_of_caller() {
                    Side::Downstream
                } else {
                    Side::Internal
                };
                Err(failed(side, chain(&error).to_string()))
            }
        }
    }

    /// Step 4: workload -> service -> identity and certificate.
    pub(super) async fn identify(&self, maker: &Maker) -> Result<Caller, Outcome> {
        let failed = |side, error| Outcome::Failed {
            stage: Stage::Identity,
            side,
            error,
        };
        let service = self.workloads.resolve(maker).map_err(|unknown| {
            if UNKNOWN_LOG.pass(&unknown.cgroup.to_string()).is_some() {
                tracing::warn!(error = %chain(&unknown), "connection of an unknown workload refused");
            }
            failed(Side::Downstream, chain(&unknown).to_string())
        })?;
        let identity = self.local.identity_of(&service);
        let tls = self
            .certificates
            .for_identity(&identity)
            .await
            .map_err(|error| failed(Side::Internal, chain(&error).to_string()))?;
        Ok(Caller { identity, tls })
    }

    /// Which service is called, and which instance, if one was called by its own address. The owner of an original
    /// destination must be the one that the kernel saw at `connect()`.
    pub(super) async fn destination(&self, wanted: &Wanted<'_>) -> Result<Callee, Outcome> {
        let find = |catalog: &Catalog| match wanted {
            Wanted::Captured(captured) => called(catalog, captured),
            Wanted::Service(name) => catalog.service(name).map(|it| (Arc::clone(it), None)),
            Wanted::Found(found) => found.service().map(|it| (it, None)),
        };
        let mut catalog = self.catalog.current();
        let mut found = find(&catalog);
        if let (Some((service, _)), Some(source)) = (&found, &self.freshness)
            && !matches!(wanted, Wanted::Found(_))
            && service.destination().is_none()
        {
            source.wanted(&service.name).await;
            catalog = self.catalog.current();
            found = find(&catalog);
        }
        if let Some((service, instance)) = found {
            return Ok(Callee {
                service,
                instance,
                catalog,
            });
        }
        let error = match wanted {
            Wanted::Captured(captured) => {
                format!("{} changed its owner since connect()", captured.destination)
            }
            Wanted::Service(name) => format!(
                "the catalog (version {}) has no service {name}, for which this upstream stands",
                catalog.version
            ),
            Wanted::Found(found) => format!(
                "Consul has not told what {} leads to, for which this upstream stands",
                found.destination()
            ),
        };
        Err(Outcome::Failed {
            stage: Stage::Route,
            side: Side::Internal,
            error,
        })
    }

    /// Why there is no callee, if intentions say so: what no service of this node may call is in no catalog here.
    pub(super) fn denied(
        &self,
        caller: &Caller,
        wanted: &Wanted<'_>,
        record: &mut ConnectionRecord,
    ) -> Option<Outcome> {
        let Wanted::Service(name) = wanted else {
            return None;
        };
        let decision = self.policy.current().decide(&caller.identity, name);
        if decision.action == IntentionAction::Allow {
            return None;
        }
        record.service(name);
        record.enter(Stage::Policy);
        record.decision(decision.reason.to_string());
        Some(Outcome::Denied)
    }

    /// Step 5: intentions.
    pub(super) fn authorise<'a>(
        &self,
        caller: &'a Caller,
        callee: &'a Callee,
        record: &mut ConnectionRecord,
    ) -> Result<Permit<'a>, Outcome> {
        let decision = self
            .policy
            .current()
            .decide(&caller.identity, &callee.service.name);
        record.decision(decision.reason.to_string());
        match decision.action {
            IntentionAction::Allow => Ok(Permit { caller, callee }),
            IntentionAction::Deny => Err(Outcome::Denied),
        }
    }

    /// Steps 6 and 7: choose an instance and open a tunnel to its node, as the caller; or a plain connection, if the
    /// service is outside the mesh.
    ///
    /// Another instance is tried once if the first cannot be dialled; nothing was sent by then. One that was called by
    /// its own address is dialled as it is, and no other.
    pub(super) async fn open(
        &self,
        permit: Permit<'_>,
        wanted: &Wanted<'_>,
        settings: OutboundSettings,
        record: &mut ConnectionRecord,
    ) -> Result<(Choice, Upstream), Outcome> {
        let Permit { caller, callee } = permit;
        let (service, balancer) = if callee.service.destination().is_some() {
            let service = self.endpoints(callee, wanted, settings).await?;
            (service, &*self.destinations.balancer)
        } else {
            (Arc::clone(&callee.service), &self.balancer)
        };
        let kept = callee.instance.as_ref();
        let attempts = if kept.is_some() { 1 } else { ATTEMPTS };
        let choose = |tried: &[Choice]| match kept {
            Some(instance) => Some(balancer.keep(&service.name, instance)),
            None => balancer.choose(&service, tried),
        };
        let mut tried: Vec<Choice> = Vec::new();
        let mut last_error = None;
        while tried.len() < attempts
            && let Some(choice) = choose(&tried)
        {
            let opened = self.open_to(caller, callee, &choice, settings, record);
            match opened.await {
                Ok(stream) => {
                    choice.succeeded();
                    return Ok((choice, stream));
                }
                // The instance is well, and others of the service would say the same.
                Err(error @ OpenError::Tunnel(TunnelError::Denied(_))) => {
                    last_error = Some(error);
                    break;
                }
                Err(error) => {
                    let ejected = choice.failed(settings.ejection);
                    tracing::debug!(
                        instance = %choice.instance.id, ejected, error = %chain(&error),
                        "no connection to this instance"
                    );
                    last_error = Some(error);
                    tried.push(choice);
                }
            }
        }
        Err(match last_error {
            Some(error) => Outcome::Failed {
                stage: error.stage(),
                side: Side::Upstream,
                error: chain(&error).to_string(),
            },
            None => Outcome::Failed {
                stage: Stage::Route,
                side: Side::Upstream,
                error: format!(
                    "no instance of {} takes traffic (catalog version {})",
                    callee.service.name, callee.catalog.version
                ),
            },
        })
    }

    /// The service with the endpoints of its destination as instances.
    async fn endpoints(
        &self,
        callee: &Callee,
        wanted: &Wanted<'_>,
        settings: OutboundSettings,
    ) -> Result<Arc<Service>, Outcome> {
        let dialled = match wanted {
            Wanted::Captured(captured) => Some(captured.destination.ip()),
            Wanted::Service(_) | Wanted::Found(_) => None,
        };
        let endpoints =
            self.destinations
                .endpoints(&callee.service, dialled, settings.connect_timeout);
        endpoints.await.map_err(|error| Outcome::Failed {
            stage: Stage::Route,
            side: Side::Upstream,
            error,
        })
    }

    async fn open_to(
        &self,
        caller: &Caller,
        callee: &Callee,
        choice: &Choice,
        settings: OutboundSettings,
        record: &mut ConnectionRecord,
    ) -> Result<Upstream, OpenError> {
        let Choice { instance, .. } = choice;
        record.instance(&instance.id);
        if callee.service.destination().is_some() {
            let address = instance.tunnel;
            record.peer(address);
            record.enter(Stage::Dial);
            let limit = settings.connect_timeout;
            let dialled = self.destinations.dial(address, &callee.catalog, limit);
            let stream = dialled.await?;
            record.connected();
            return Ok(Upstream::Plain(stream));
        }
        let tunnel = self.open_tunnel(caller, callee, instance, settings, record);
        Ok(Upstream::Tunnel(tunnel.await?))
    }

    async fn open_tunnel(
        &self,
        caller: &Caller,
        callee: &Callee,
        instance: &Instance,
        settings: OutboundSettings,
        record: &mut ConnectionRecord,
    ) -> Result<OpenTunnel, TunnelError> {
        if let Some(address) = hbone::address_of(instance, settings.hbone_port) {
            record.peer(address);
            record.enter(Stage::Handshake);
            let call = self.hbone_call(caller, callee, instance, address, settings);
            let is_first = !self.hbone.is_open(&call);
            let stream = self.hbone.open(&call).await?;
            record.handshaken();
            if is_first {
                self.warm(caller, callee, settings);
            }
            return Ok(stream.into());
        }
        record.peer(instance.tunnel);
        record.enter(Stage::Dial);
        let dialled = tunnel::connect::dial(instance.tunnel, settings.connect_timeout).await?;
        record.connected();

        record.enter(Stage::Handshake);
        let (expected, sni) = expected_server(&self.local, &callee.service.name, instance);
        let stream = dialled
            .handshake(sni, &expected, &caller.tls, settings.handshake_timeout)
            .await?;
        record.handshaken();
        Ok(stream.into())
    }

    fn hbone_call(
        &self,
        caller: &Caller,
        callee: &Callee,
        instance: &Instance,
        address: SocketAddr,
        settings: OutboundSettings,
    ) -> hbone::Call {
        let service = &callee.service.name;
        hbone::Call {
            tls: Arc::clone(&caller.tls),
            expected: self.local.identity_of(service),
            address,
            server_name: self.local.service_sni(service),
            instance: SocketAddr::new(instance.tunnel.ip(), instance.port),
            connect_timeout: settings.connect_timeout,
            handshake_timeout: settings.handshake_timeout,
        }
    }

    /// Opens connections to the other nodes of a service that came into use, so that later calls wait for none.
    fn warm(&self, caller: &Caller, callee: &Callee, settings: OutboundSettings) {
        let usable = callee.service.instances.iter().filter(|i| i.weight() > 0);
        let reached = usable.filter_map(|instance| {
            let address = hbone::address_of(instance, settings.hbone_port)?;
            Some((instance, address))
        });
        for (instance, address) in reached.take(WARM) {
            let call = self.hbone_call(caller, callee, instance, address, settings);
            self.hbone.warm(&call);
        }
    }
}

/// Who is at the address that was called, and is who the kernel saw there.
fn called(catalog: &Catalog, captured: &Captured) -> Option<(Arc<Service>, Option<Arc<Instance>>)> {
    let is_same = |service: &Arc<Service>| id_of(&service.name) == captured.service;
    let at = captured.destination;
    if let Some(service) = catalog.service_at(at).filter(|service| is_same(service)) {
        return Some((Arc::clone(service), None));
    }
    let (service, instance) = catalog.instance_at(at)?;
    is_same(service).then(|| (Arc::clone(service), Some(Arc::clone(instance))))
}

/// Who must answer at `instance` of `service`, and the name to ask for there.
fn expected_server(
    local: &LocalDomain,
    service: &ServiceName,
    instance: &Instance,
) -> (SpiffeId, String) {
    let Some(target) = &instance.target else {
        return (
            local.identity_of(service),
            local.instance_sni(service, &instance.id),
        );
    };
    let domain = local.in_datacenter(&target.datacenter);
    let sni = target.sni.as_deref().map(str::to_owned);
    (
        domain.identity_of(&target.service),
        sni.unwrap_or_else(|| domain.instance_sni(&target.service, &instance.id)),
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::{
        catalog::{
            model::{Health, Ports, ServiceDefaults, Snapshot, Target, Weights},
            store::CatalogStore,
            vip::{VipAllocator, VipPools},
        },
        datapath::{CgroupId, NetnsCookie},
    };

    fn instance(id: &str, address: [u8; 4], target: Option<Target>) -> Instance {
        Instance {
            id: id.parse().unwrap(),
            node: "a".parse().unwrap(),
            tunnel: (address, 21000).into(),
            local: ([127, 0, 0, 1], 5432).into(),
            port: 5432,
            tags: vec![],
            meta: BTreeMap::new(),
            health: Health::Passing,
            weights: Weights::default(),
            target,
        }
    }

    #[test]
    fn who_is_called_is_who_the_kernel_saw_at_the_address() {
        let pools = VipPools {
            ipv4: "240.0.0.0/4".parse().unwrap(),
            ipv6: "fd00::/64".parse().unwrap(),
        };
        let (allocator, _no_file) = VipAllocator::new(pools, None, Duration::ZERO);
        let store = CatalogStore::new(allocator).with_instances(pools);
        let services = [("db", 1), ("web", 3)].map(|(name, first)| {
            let instances = [first, first + 1].map(|host| {
                let id = format!("{name}-{host}");
                Arc::new(instance(&id, [192, 0, 2, host], None))
            });
            let service = Service {
                name: name.parse().unwrap(),
                instances: instances.to_vec(),
                explicit_addresses: [[240, 0, 0, first].into()].into(),
                ports: Ports::Listed([5432].into()),
                defaults: ServiceDefaults::default(),
            };
            (service.name.clone(), Arc::new(service))
        });
        let problems = store.publish(Snapshot {
            services: services.into(),
            ..Snapshot::default()
        });
        assert!(problems.is_empty());
        let table = [
            ("240.0.0.1:5432", "db", Some("db")),
            ("192.0.2.1:5432", "db", Some("db/db-1")),
            ("192.0.2.2:5432", "db", Some("db/db-2")),
            ("[::ffff:192.0.2.2]:5432", "db", Some("db/db-2")),
            ("192.0.2.4:5432", "web", Some("web/web-4")),
            // It was another's at connect().
            ("192.0.2.4:5432", "db", None),
            ("240.0.0.1:5432", "web", None),
            // It was somebody's.
            ("192.0.2.2:5433", "db", None),
            ("192.0.2.9:5432", "db", None),
        ];
        for (destination, service, expected) in table {
            let captured = Captured {
                destination: destination.parse().unwrap(),
                service: id_of(&service.parse().unwrap()),
                maker: Maker {
                    cgroup: CgroupId(1),
                    netns: NetnsCookie(1),
                    uid: 0,
                    process: 0,
                },
                socket_cookie: 1,
            };
            let found = called(&store.current(), &captured).map(|(service, instance)| {
                let instance = instance.map(|instance| format!("/{}", instance.id));
                format!("{}{}", service.name, instance.unwrap_or_default())
            });
            assert_eq!(found.as_deref(), expected, "{destination} {service}");
        }
    }

    #[test]
    fn an_instance_that_stands_in_must_be_who_it_is() {
        let local = LocalDomain::new("td.test".parse().unwrap(), "dc1".to_owned());
        let instance = |target| instance("db-1", [192, 0, 2, 1], target);
        let target = |sni: Option<&str>| Target {
            service: "db-standby".parse().unwrap(),
            datacenter: "dc2".into(),
            sni: sni.map(Arc::from),
        };
        let table = [
            (
                None,
                "spiffe://td.test/ns/default/dc/dc1/svc/db",
                "db.default.dc1.internal.td.test",
            ),
            (
                Some(target(None)),
                "spiffe://td.test/ns/default/dc/dc2/svc/db-standby",
                "db-standby.default.dc2.internal.td.test",
            ),
            (
                Some(target(Some("gateway.test"))),
                "spiffe://td.test/ns/default/dc/dc2/svc/db-standby",
                "gateway.test",
            ),
        ];
        for (target, identity, name) in table {
            let (expected, sni) =
                expected_server(&local, &"db".parse().unwrap(), &instance(target));
            assert_eq!(expected.to_string(), identity);
            assert!(sni.ends_with(name), "{sni}");
        }
    }
}
