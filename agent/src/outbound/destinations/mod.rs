//! Where services are that are outside the mesh: the addresses of their hosts, looked up again and again, and plain
//! connections to them.
//!
//! [`host`] is what is known of one host, pure. An address is chosen like an instance: endpoints of a destination are
//! instances of the service here, in no catalog, with a balancer of their own.

mod host;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::host::Known;
use super::balance::Balancer;
use crate::{
    catalog::{
        destination::{Destination, HostName, Place},
        model::{Health, Instance, Service, ServiceName, Snapshot, Weights},
        store::Catalog,
        vip::VipPools,
    },
    dns::lookup::{Family, Lookup},
    lifecycle::Shutdown,
    telemetry::log::chain,
    tunnel::connect::prepare,
};

/// The destinations of the catalog in force.
#[derive(Debug)]
pub struct Destinations {
    /// Chooses among the endpoints of each.
    pub(super) balancer: Arc<Balancer>,
    lookup: Arc<Lookup>,
    own: Own,
    followed: Arc<Mutex<BTreeMap<ServiceName, Followed>>>,
    shutdown: Shutdown,
}

/// What is here, and so at no destination.
#[derive(Debug, Clone)]
pub struct Own {
    /// Nothing answers there but the mesh.
    pub virtual_ranges: VipPools,
    /// Where this agent listens, at whatever address of the node.
    pub ports: BTreeSet<u16>,
}

/// A destination with what is known of it.
#[derive(Debug)]
struct Followed {
    destination: Arc<Destination>,
    endpoints: watch::Receiver<Arc<Endpoints>>,
    /// Ends the looking up.
    _stop: Option<DropGuard>,
}

/// The addresses of a destination as they are now.
#[derive(Debug)]
pub struct Endpoints {
    /// The service with an instance for each.
    service: Arc<Service>,
    /// Whether it is known if there are any.
    is_told: bool,
    /// Why there are none, or none that are new.
    pub problem: Option<String>,
}

impl Endpoints {
    /// Where connections go.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let instances = self.service.instances.iter();
        instances.map(|instance| instance.tunnel).collect()
    }
}

/// A plain connection that did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody takes it there.
    #[error("connect to {address}")]
    Dial {
        /// Where to.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no answer.
    #[error("connect to {address}: no answer within {} ms", limit.as_millis())]
    Timeout {
        /// Where to.
        address: SocketAddr,
        /// How long was waited.
        limit: Duration,
    },
    /// It would be a connection to the agent, which would lead nowhere.
    #[error("{0} is this agent's own listener")]
    Own(SocketAddr),
    /// It would go around the mesh.
    #[error("{address} is an address of {owner}, which is in the mesh")]
    InMesh {
        /// Where to.
        address: SocketAddr,
        /// Whose that is.
        owner: ServiceName,
    },
}

impl Destinations {
    /// Follows nothing yet.
    pub fn new(lookup: Lookup, own: Own, shutdown: Shutdown) -> Self {
        Self {
            balancer: Arc::default(),
            lookup: Arc::new(lookup),
            own,
            followed: Arc::default(),
            shutdown,
        }
    }

    /// Follows the destinations of `catalog` from now on, and no others. What is known of those that stay stays.
    pub fn follow(&self, catalog: &Catalog) {
        let services = catalog.snapshot.services.values();
        let wanted: BTreeMap<&ServiceName, (&Arc<Service>, &Arc<Destination>)> = services
            .filter_map(|service| Some((&service.name, (service, service.destination()?))))
            .collect();
        let mut followed = self.followed.lock();
        followed.retain(|name, followed| {
            wanted
                .get(name)
                .is_some_and(|(_, destination)| **destination == followed.destination)
        });
        for (name, (service, destination)) in wanted {
            if !followed.contains_key(name) {
                followed.insert(name.clone(), self.begin(service, destination));
            }
        }
        forget_others(&self.balancer, &followed);
    }

    fn begin(&self, service: &Arc<Service>, destination: &Arc<Destination>) -> Followed {
        let destination = Arc::clone(destination);
        match &destination.place {
            Place::Addresses(addresses) => {
                // The allocator has reported the others.
                let is_real = |it: &IpAddr| self.own.virtual_ranges.range_of(*it).is_none();
                let addresses = addresses.iter().copied().filter(is_real).collect();
                let endpoints = Endpoints {
                    service: with_endpoints(service, destination.port, &addresses),
                    is_told: true,
                    problem: None,
                };
                // The sender may go: there is nothing else to tell.
                let (_sender, endpoints) = watch::channel(Arc::new(endpoints));
                Followed {
                    destination,
                    endpoints,
                    _stop: None,
                }
            }
            Place::Host(host) => {
                let unknown = Endpoints {
                    service: with_endpoints(service, destination.port, &BTreeSet::new()),
                    is_told: false,
                    problem: None,
                };
                let (told, endpoints) = watch::channel(Arc::new(unknown));
                let stop = CancellationToken::new();
                let following = FollowedHost {
                    host: host.clone(),
                    port: destination.port,
                    service: Arc::clone(service),
                    lookup: Arc::clone(&self.lookup),
                    virtual_ranges: self.own.virtual_ranges,
                    known: Mutex::default(),
                    told,
                    balancer: Arc::clone(&self.balancer),
                    followed: Arc::clone(&self.followed),
                };
                let (shutdown, stopped) = (self.shutdown.clone(), stop.clone());
                self.shutdown.spawn_service("destination", async move {
                    tokio::select! {
                        biased;
                        () = stopped.cancelled() => {}
                        () = shutdown.stopped() => {}
                        () = following.run() => {}
                    }
                });
                Followed {
                    destination,
                    endpoints,
                    _stop: Some(stop.drop_guard()),
                }
            }
        }
    }

    /// `service` with its endpoints as instances. If `dialled` is one of the addresses that are called as they are, only
    /// that one. Waits at most for `limit` until a host was looked up for the first time.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn endpoints(
        &self,
        service: &Service,
        dialled: Option<IpAddr>,
        limit: Duration,
    ) -> Result<Arc<Service>, String> {
        let found = self.followed(&service.name);
        let (destination, mut endpoints) =
            found.ok_or_else(|| format!("the destination of {} is gone", service.name))?;
        let told = timeout(limit, endpoints.wait_for(|endpoints| endpoints.is_told));
        if told.await.is_err() {
            return Err(format!("{destination} is not looked up yet"));
        }
        let endpoints = Arc::clone(&endpoints.borrow());
        if let Place::Addresses(listed) = &destination.place
            && let Some(dialled) = dialled.map(|address| address.to_canonical())
            && listed.contains(&dialled)
        {
            let only = BTreeSet::from([dialled]);
            return Ok(with_endpoints(service, destination.port, &only));
        }
        if endpoints.service.instances.is_empty() {
            let problem = endpoints.problem.clone();
            return Err(problem.unwrap_or_else(|| format!("{destination} has no address")));
        }
        Ok(Arc::clone(&endpoints.service))
    }

    fn followed(
        &self,
        name: &ServiceName,
    ) -> Option<(Arc<Destination>, watch::Receiver<Arc<Endpoints>>)> {
        let followed = self.followed.lock();
        let found = followed.get(name)?;
        Some((Arc::clone(&found.destination), found.endpoints.clone()))
    }

    /// What is known of each destination.
    pub fn all(&self) -> BTreeMap<ServiceName, Arc<Endpoints>> {
        let followed = self.followed.lock();
        let all = followed.iter();
        all.map(|(name, followed)| (name.clone(), Arc::clone(&followed.endpoints.borrow())))
            .collect()
    }

    /// Opens a plain connection to an endpoint of a destination. `catalog` says whose addresses are in the mesh.
    ///
    /// # Errors
    /// See [`DialError`]; another endpoint may be tried.
    pub(super) async fn dial(
        &self,
        address: SocketAddr,
        catalog: &Catalog,
        limit: Duration,
    ) -> Result<TcpStream, DialError> {
        let virtual_there = catalog.service_at(address);
        let owner = virtual_there
            .filter(|owner| owner.destination().is_none())
            .or_else(|| catalog.instance_at(address).map(|(owner, _)| owner));
        if let Some(owner) = owner {
            let owner = owner.name.clone();
            return Err(DialError::InMesh { address, owner });
        }
        let failed = |source| DialError::Dial { address, source };
        let connected = timeout(limit, TcpStream::connect(address)).await;
        let stream = connected
            .map_err(|_late| DialError::Timeout { address, limit })?
            .map_err(failed)?;
        // A connection to an address of this node comes from that address.
        let is_here = stream.local_addr().map_err(failed)?.ip() == address.ip();
        if is_here && self.own.ports.contains(&address.port()) {
            return Err(DialError::Own(address));
        }
        prepare(&stream).map_err(failed)?;
        Ok(stream)
    }
}

/// Forgets what the balancer saw of endpoints that no destination has any more.
fn forget_others(balancer: &Balancer, followed: &BTreeMap<ServiceName, Followed>) {
    let current: Vec<Arc<Service>> = followed
        .values()
        .map(|followed| Arc::clone(&followed.endpoints.borrow().service))
        .collect();
    balancer.retain(&Snapshot::default(), &current);
}

/// A host while its addresses are followed.
#[derive(Debug)]
struct FollowedHost {
    host: HostName,
    port: u16,
    service: Arc<Service>,
    lookup: Arc<Lookup>,
    virtual_ranges: VipPools,
    known: Mutex<Known>,
    told: watch::Sender<Arc<Endpoints>>,
    balancer: Arc<Balancer>,
    followed: Arc<Mutex<BTreeMap<ServiceName, Followed>>>,
}

impl FollowedHost {
    /// Both families for ever, each at its own pace: a server that does not answer about one says enough by the other.
    async fn run(&self) {
        tokio::join!(self.follow(Family::Ipv4), self.follow(Family::Ipv6));
    }

    async fn follow(&self, family: Family) {
        loop {
            let said = self.lookup.addresses(self.host.as_str(), family).await;
            let said = said.map_err(|error| chain(&error).to_string());
            let next = self.known.lock().take(family, said, Instant::now());
            self.tell();
            sleep_until(next).await;
        }
    }

    fn tell(&self) {
        let known = self.known.lock();
        let usable = known.usable(|address| self.is_usable(address));
        let is_told = known.is_told() || !usable.addresses.is_empty();
        drop(known);
        let addresses = with_a_route(usable.addresses, self.port);
        let problem = usable.problem.map(|problem| {
            format!(
                "{}, the destination of {}: {problem}",
                self.host, self.service.name
            )
        });
        let before = Arc::clone(&self.told.borrow());
        if let Some(problem) = problem
            .as_ref()
            .filter(|it| before.problem.as_ref() != Some(it))
        {
            tracing::warn!(problem, "destination");
        }
        let mut service = with_endpoints(&self.service, self.port, &addresses);
        if service.instances == before.service.instances {
            service = Arc::clone(&before.service);
        } else {
            tracing::info!(
                service = %self.service.name, host = %self.host, ?addresses,
                "addresses of a destination"
            );
        }
        let is_other = !Arc::ptr_eq(&service, &before.service);
        self.told.send_replace(Arc::new(Endpoints {
            service,
            is_told,
            problem,
        }));
        if is_other {
            forget_others(&self.balancer, &self.followed.lock());
        }
    }

    /// Names that lead to the node itself or into the mesh are mistakes, or worse.
    fn is_usable(&self, address: IpAddr) -> Result<(), String> {
        crate::catalog::destination::is_outside(address).map_err(|inside| inside.to_string())?;
        if let IpAddr::V4(v4) = address.to_canonical()
            && v4.is_link_local()
        {
            return Err("a host outside has no link-local address".to_owned());
        }
        match self.virtual_ranges.range_of(address) {
            Some(range) => Err(format!(
                "addresses of {range} are virtual: the upstream of dns.upstreams asks this agent"
            )),
            None => Ok(()),
        }
    }
}

/// Those that the node has a route to; all of them if there is none to any, so that the connection says why.
fn with_a_route(addresses: BTreeSet<IpAddr>, port: u16) -> BTreeSet<IpAddr> {
    let has_route = |address: &IpAddr| {
        let any: IpAddr = match address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        // Sends nothing: the kernel only looks for the route.
        let socket = UdpSocket::bind((any, 0));
        socket.is_ok_and(|socket| socket.connect((*address, port)).is_ok())
    };
    let reached: BTreeSet<IpAddr> = addresses.iter().copied().filter(has_route).collect();
    if reached.is_empty() {
        addresses
    } else {
        reached
    }
}

/// `service` with an instance for each address: what the balancer chooses among. There is no tunnel to them.
fn with_endpoints(service: &Service, port: u16, addresses: &BTreeSet<IpAddr>) -> Arc<Service> {
    let instance = |address: &IpAddr| {
        let address = SocketAddr::new(*address, port);
        Some(Arc::new(Instance {
            id: address.to_string().parse().ok()?,
            node: "outside".parse().ok()?,
            tunnel: address,
            local: address,
            port,
            tags: vec![],
            meta: BTreeMap::new(),
            health: Health::Passing,
            weights: Weights::default(),
            target: None,
        }))
    };
    Arc::new(Service {
        instances: addresses.iter().filter_map(instance).collect(),
        ..service.clone()
    })
}
