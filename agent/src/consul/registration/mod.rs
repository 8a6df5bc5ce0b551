//! Being reached through Consul: a `connect-proxy` registration for each local instance, at a port of its own.
//!
//! A local instance is one that is registered with this node's Consul agent and is a workload of this node: a
//! `[[workload]]` rule names its service, or its socket was found in a cgroup
//! ([`discovered`](crate::identity::workload::discovered)). Existing sidecars and Connect-native clients then find the
//! proxy as they find any other. The [`Registrar`] looks at Consul's agent and at the sockets once a second: a request to
//! the same host costs less than a watch on the servers, and sees what a restarted Consul agent forgot.
//!
//! [`mod@plan`] decides, [`ports`] remembers, this does. Who makes the listeners tells the registrar at which ports
//! there is one: a port is open before it is registered.

pub mod plan;
pub mod ports;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use self::{
    plan::{LocalService, OwnNode, Plan, Registration, local_services, plan},
    ports::InboundPorts,
};
use super::{
    Answer, Client, ConsulError, Request,
    answers::{AgentServices, ServiceEntry},
    judge::{Before, Doubt, Verdict, judge},
    position::{Pace, PaceLimits},
    upstreams::{Offer, Upstreams, upstreams},
};
use crate::{
    catalog::model::{Instance, InstanceId, ServiceName},
    identity::workload::{
        WorkloadResolver,
        discovered::{Assignments, Bounds, Located, RegisteredService, assign, locate},
    },
    lifecycle::Shutdown,
    sock_diag::SockDiag,
    sockets::ListenAddress,
    telemetry::log::chain,
};

/// Between two looks at Consul's agent and at the sockets.
const POLL: Duration = Duration::from_secs(1);

/// After failures: it is the node's own agent, which is back soon after a restart.
const PAUSES: PaceLimits = PaceLimits {
    burst: 1,
    interval: POLL,
    pause_min: Duration::from_secs(1),
    pause_max: Duration::from_secs(15),
};

/// How long saying farewell may take in all; the agent's end does not wait for a Consul that is gone.
const FAREWELL: Duration = Duration::from_secs(5);

/// The instances that this node delivers to, each with its service and its own tunnel port.
pub type LocalInstances = Arc<Vec<(ServiceName, Arc<Instance>)>>;

/// What the registrar needs to know.
#[derive(Debug, Clone)]
pub struct RegistrarSettings {
    /// Who registers, and where it is reached.
    pub node: OwnNode,
    /// The node's datacenter.
    pub datacenter: String,
    /// `consul.register`: if not, nothing is registered.
    pub register: bool,
    /// `consul.inbound_ports`
    pub inbound_ports: RangeInclusive<u16>,
    /// Remembers the ports across restarts.
    pub state_file: Option<PathBuf>,
    /// Which cgroups may be found to be services; `None` switches finding off.
    pub discovery: Option<Bounds>,
}

/// Keeps this node's registrations in step with what is there. One per agent.
#[derive(Debug)]
pub struct Registrar {
    client: Client,
    settings: RegistrarSettings,
    workloads: Arc<WorkloadResolver>,
    ports: InboundPorts,
    sockets: Option<SockDiag>,
    known: Known,
    instances: watch::Sender<LocalInstances>,
    upstreams: watch::Sender<BTreeMap<ListenAddress, Offer>>,
    listening: watch::Receiver<BTreeSet<u16>>,
    status: Arc<Mutex<RegistrarStatus>>,
    reading: Pace,
    writing: Pace,
    /// Whether what is local has been told, be it nothing.
    has_looked: bool,
    /// What failed last, and when it is tried again; anything else is done at once.
    failed: Option<(Instant, Plan)>,
}

/// What the last look showed.
#[derive(Debug, Default)]
struct Known {
    /// Of Consul's agent, with whether something was left out of it; `None` before the first answer.
    present: Option<(AgentServices, bool)>,
    assignments: Assignments,
    /// Where each instance listens or listened.
    local: BTreeMap<InstanceId, SocketAddr>,
    /// Instances that were found in a cgroup. They stay workloads of this node while they are registered: a service
    /// that restarts is away for a moment, and its checks tell that.
    found: BTreeSet<InstanceId>,
}

/// How the registrar fares, for operators.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistrarStatus {
    /// When Consul's agent last told its services.
    pub good_at: Option<SystemTime>,
    /// What was found by itself: cgroups and their services.
    pub discovered: Vec<(PathBuf, ServiceName)>,
    /// Ids of the instances that are reached through this node, and their ports.
    pub registered: Vec<(InstanceId, u16)>,
    /// Who listens for a service and is not taken for it, and why, each as a sentence.
    pub refused: BTreeSet<String>,
    /// What is wrong, each as a sentence.
    pub problems: BTreeSet<String>,
}

/// Where an instance runs, as far as its registration and the rules tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On this host, in its own network namespace.
    Host,
    /// In a network namespace that a rule names.
    Namespace,
    /// At an address that is not this host's: a container's, or that of something outside which is registered here.
    Elsewhere,
}

/// The other side of a [`Registrar`].
#[derive(Debug)]
pub struct LocalServices {
    instances: watch::Receiver<LocalInstances>,
    upstreams: watch::Receiver<BTreeMap<ListenAddress, Offer>>,
    listening: watch::Sender<BTreeSet<u16>>,
    status: Arc<Mutex<RegistrarStatus>>,
}

impl LocalServices {
    /// The instances to take tunnels for, now and after each change. The first change tells that they are known.
    pub fn instances(&self) -> watch::Receiver<LocalInstances> {
        self.instances.clone()
    }

    /// The explicit upstreams that sidecars are registered with, by the address to listen at.
    pub fn upstreams(&self) -> watch::Receiver<BTreeMap<ListenAddress, Offer>> {
        self.upstreams.clone()
    }

    /// Says at which ports there is a listener: only those are registered.
    pub fn listening_at(&self, ports: BTreeSet<u16>) {
        self.listening.send_if_modified(|before| {
            let is_new = *before != ports;
            *before = ports;
            is_new
        });
    }

    /// How the registrar fares.
    pub fn status(&self) -> RegistrarStatus {
        self.status.lock().clone()
    }
}

impl Registrar {
    /// Asks nothing before [`Self::run`].
    pub fn new(
        client: Client,
        settings: RegistrarSettings,
        workloads: Arc<WorkloadResolver>,
    ) -> (Self, LocalServices) {
        let (range, file) = (settings.inbound_ports.clone(), settings.state_file.clone());
        let (ports, damaged) = InboundPorts::new(range, file);
        if let Some(problem) = damaged {
            tracing::error!(problem = %chain(&problem), "inbound ports follow from ids again");
        }
        let (instances, local) = watch::channel(LocalInstances::default());
        let (upstreams, local_upstreams) = watch::channel(BTreeMap::new());
        let (listening, listening_seen) = watch::channel(BTreeSet::new());
        let status = Arc::<Mutex<RegistrarStatus>>::default();
        let registrar = Self {
            client,
            settings,
            workloads,
            ports,
            sockets: None,
            known: Known::default(),
            instances,
            upstreams,
            listening: listening_seen,
            status: Arc::clone(&status),
            reading: Pace::new(PAUSES, Instant::now()),
            writing: Pace::new(PAUSES, Instant::now()),
            has_looked: false,
            failed: None,
        };
        let other_side = LocalServices {
            instances: local,
            upstreams: local_upstreams,
            listening,
            status,
        };
        (registrar, other_side)
    }

    /// One look, for tests. Returns whether Consul's agent answered.
    #[cfg(test)]
    async fn look(&mut self) -> bool {
        let read = self.read().await;
        let answered = read.is_ok();
        self.follow(read).await;
        answered
    }

    /// Runs until the agent drains. Then deregisters, unless `is_replaced` says that another agent goes on with the
    /// same ports.
    pub async fn run(mut self, shutdown: Shutdown, is_replaced: impl Fn() -> bool + Send) {
        while !shutdown.is_draining() {
            let read = tokio::select! {
                biased;
                () = shutdown.draining() => break,
                read = self.read() => read,
            };
            // Not dropped half way: what Consul was asked to register it might do after the farewell.
            let pause = self.follow(read).await;
            let listening = self.listening.has_changed().is_ok();
            tokio::select! {
                biased;
                () = shutdown.draining() => {}
                Ok(()) = self.listening.changed(), if listening => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        if !is_replaced() {
            self.say_farewell().await;
        }
    }

    /// Brings everything up to date with what Consul's agent has. Returns how long to wait before the next look.
    async fn follow(&mut self, read: Result<(AgentServices, bool), String>) -> Duration {
        let mut problems = BTreeSet::new();
        match read {
            Ok((present, filtered)) => {
                self.status.lock().good_at = Some(SystemTime::now());
                self.known.present = Some((present, filtered));
                self.reading.after_answer(Instant::now(), 0.0);
            }
            Err(problem) => {
                problems.insert(problem);
            }
        }
        let is_away = !problems.is_empty();
        let Some((present, _)) = self.known.present.clone() else {
            self.tell(problems, vec![]);
            return self.reading.after_failure(fastrand::f64());
        };
        self.offer_upstreams(&present, &mut problems);
        let (services, unusable) = local_services(&present);
        for id in unusable {
            let problem = format!(
                "service instance {id:?} cannot be reached: its id or name makes no identity"
            );
            problems.insert(problem);
        }
        self.find(&services, &mut problems);
        let instances = self.instances_of(services, &mut problems);
        let is_first = !std::mem::replace(&mut self.has_looked, true);
        self.instances.send_if_modified(|before| {
            let is_new = **before != instances;
            *before = Arc::new(instances.clone());
            is_new || is_first
        });
        let listening = self.listening.borrow_and_update().clone();
        let registered: Vec<_> = instances
            .iter()
            .filter(|_| self.settings.register)
            .collect();
        if !is_away {
            let wanted = registered
                .iter()
                .map(|(service, instance)| self.settings.node.registration(service, instance));
            let node = &self.settings.node;
            let plan = plan(node, wanted.collect(), &listening, &present);
            self.carry_out(plan, &mut problems).await;
        }
        let registered = registered
            .iter()
            .map(|(_, instance)| (instance.id.clone(), instance.tunnel.port()))
            .filter(|(_, port)| listening.contains(port));
        self.tell(problems, registered.collect());
        if is_away {
            self.reading.after_failure(fastrand::f64())
        } else {
            POLL
        }
    }

    fn offer_upstreams(&self, present: &AgentServices, problems: &mut BTreeSet<String>) {
        let Upstreams {
            offered,
            problems: refused,
        } = upstreams(present.0.values(), &self.settings.datacenter);
        problems.extend(refused);
        self.upstreams.send_if_modified(|before| {
            let is_new = *before != offered;
            *before = offered;
            is_new
        });
    }

    /// What Consul's agent has, if it can be believed.
    async fn read(&self) -> Result<(AgentServices, bool), String> {
        let request = Request::to(&["v1", "agent", "services"]);
        let answered = self.client.get::<AgentServices>(&request).await;
        // As of every answer from an agent itself, there is no leader behind it.
        let answer = answered.map(|answer| Answer {
            known_leader: None,
            ..answer
        });
        let answer = answer.map_err(|error| chain(&error).to_string())?;
        let before = self.known.present.as_ref();
        let told = before.map(|(present, filtered)| Before {
            was_empty: present.0.is_empty(),
            was_filtered: *filtered,
        });
        if let Verdict::Keep(doubt) = judge(told, &answer, false, Duration::MAX) {
            return Err(doubt.to_string());
        }
        // Before 1.11 a token without rights is answered as an agent without services is.
        if let Some(id) = before.and_then(|(present, _)| present.0.keys().next())
            && answer.body.0.is_empty()
        {
            let request = Request::to(&["v1", "agent", "service", id]);
            match self.client.get::<ServiceEntry>(&request).await {
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_refused() => return Err(Doubt::LostRights.to_string()),
                Err(error) => return Err(chain(&error).to_string()),
                // Registered again meanwhile: the next look sees it.
                Ok(_) => return Err("Consul's agent has just got its services back".to_owned()),
            }
        }
        Ok((answer.body, answer.filtered_by_acls))
    }

    /// Finds the sockets of `services`, and which cgroups are services by it.
    fn find(&mut self, services: &[LocalService], problems: &mut BTreeSet<String>) {
        let listeners = match self.listeners() {
            Ok(listeners) => listeners,
            Err(problem) => {
                // What was found before stays.
                problems.insert(problem);
                return;
            }
        };
        let node = self.settings.node.address;
        let registered: Vec<_> = services
            .iter()
            .filter(|service| self.place_of(service) == Place::Host)
            .map(|service| RegisteredService {
                instance: service.instance.clone(),
                service: service.service.clone(),
                address: SocketAddr::new(service.address.unwrap_or(node), service.port),
            })
            .collect();
        let located = locate(&registered, &listeners);
        let here = |instance: &InstanceId| registered.iter().find(|r| r.instance == *instance);
        self.known.local.retain(|instance, local| {
            here(instance).is_some_and(|now| now.address.port() == local.port())
        });
        self.known.found.retain(|instance| here(instance).is_some());
        for (instance, Located { local, .. }) in &located {
            self.known.local.insert(instance.clone(), *local);
        }
        let Some(bounds) = &self.settings.discovery else {
            return;
        };
        let cgroups = self.workloads.cgroups();
        let before = &self.known.assignments;
        let (assignments, refused) = assign(&registered, &located, cgroups, bounds, before);
        // What a rule names is settled by the rule.
        let open = refused.iter().filter(|refusal| {
            let is_named = |service| self.workloads.rules_name(service);
            !refusal.services().into_iter().all(is_named)
        });
        let open = open.map(ToString::to_string).collect();
        let refused = std::mem::replace(&mut self.status.lock().refused, open);
        for problem in self.status.lock().refused.difference(&refused) {
            tracing::warn!(problem, "workload not found");
        }
        for service in &registered {
            let cgroups = located.get(&service.instance).map(|l| &l.cgroups);
            let is_assigned = |cgroup| {
                let assignment = assignments.get(cgroup);
                assignment.is_some_and(|a| a.service == service.service)
            };
            if cgroups.into_iter().flatten().any(is_assigned) {
                self.known.found.insert(service.instance.clone());
            }
        }
        if assignments != self.known.assignments {
            for (cgroup, assignment) in &assignments {
                if !self.known.assignments.contains_key(cgroup) {
                    let (path, service) = (assignment.path.display(), &assignment.service);
                    tracing::info!(cgroup = %path, %service, "workload found");
                }
            }
            self.workloads.discover(&assignments);
            self.known.assignments = assignments;
        }
    }

    fn listeners(&mut self) -> Result<Vec<(SocketAddr, crate::sock_diag::SocketOwner)>, String> {
        if self.sockets.is_none() {
            let opened = SockDiag::open();
            self.sockets = Some(opened.map_err(|e| format!("open sock_diag(7): {e}"))?);
        }
        let sockets = self.sockets.as_ref().map(SockDiag::listeners);
        match sockets.transpose() {
            Ok(listeners) => Ok(listeners.unwrap_or_default()),
            Err(error) => {
                self.sockets = None;
                Err(chain(&error).to_string())
            }
        }
    }

    /// Those of `services` that are workloads of this node, each with a port.
    fn instances_of(
        &mut self,
        mut services: Vec<LocalService>,
        problems: &mut BTreeSet<String>,
    ) -> Vec<(ServiceName, Arc<Instance>)> {
        services.retain(|service| {
            self.known.found.contains(&service.instance)
                || self.workloads.rules_name(&service.service)
        });
        let ids = services.iter().map(|s| s.instance.clone()).collect();
        let (ports, missing) = self.ports.assign(&ids, SystemTime::now());
        problems.extend(missing.iter().map(|problem| chain(problem).to_string()));
        let instance = |service: LocalService| {
            let port = *ports.get(&service.instance)?;
            let local = self.local_address(&service);
            let instance = self.settings.node.instance(&service, port, local);
            Some((service.service, Arc::new(instance)))
        };
        services.into_iter().filter_map(instance).collect()
    }

    /// Where to deliver to: where its socket is, or else where a sidecar would look (Consul's `LocalServiceAddress`).
    fn local_address(&self, service: &LocalService) -> SocketAddr {
        if let Some(found) = self.known.local.get(&service.instance) {
            return *found;
        }
        let ip = match (service.address, self.place_of(service)) {
            (Some(address), Place::Elsewhere) => address,
            (_, Place::Host | Place::Namespace | Place::Elsewhere) => Ipv4Addr::LOCALHOST.into(),
        };
        SocketAddr::new(ip, service.port)
    }

    fn place_of(&self, service: &LocalService) -> Place {
        let in_namespaces = self.workloads.namespaces();
        if in_namespaces
            .iter()
            .any(|(_, named)| *named == service.service)
        {
            return Place::Namespace;
        }
        let node = self.settings.node.address;
        match service.address {
            Some(address) if address != node && !is_of_this_host(address) => Place::Elsewhere,
            Some(_) | None => Place::Host,
        }
    }

    async fn carry_out(&mut self, plan: Plan, problems: &mut BTreeSet<String>) {
        for id in &plan.taken {
            problems.insert(format!(
                "{id:?} is registered with Consul's agent by somebody else: the instance is not reached through this node"
            ));
        }
        let is_early = |(at, failed): &(Instant, Plan)| Instant::now() < *at && *failed == plan;
        if self.failed.as_ref().is_some_and(is_early) {
            // The problems of the last attempt still hold.
            let before = self.status.lock().problems.clone();
            problems.extend(
                before
                    .into_iter()
                    .filter(|p| p.starts_with(NOT_CARRIED_OUT)),
            );
            return;
        }
        let failed = self.change(&plan).await;
        self.failed = if failed.is_empty() {
            self.writing.after_answer(Instant::now(), 0.0);
            None
        } else {
            let pause = self.writing.after_failure(fastrand::f64());
            Some((Instant::now() + pause, plan))
        };
        problems.extend(failed);
    }

    /// Makes the changes of `plan`. Returns what went wrong; if Consul went away it leaves the rest to the next time.
    async fn change(&self, plan: &Plan) -> BTreeSet<String> {
        let mut failed = BTreeSet::new();
        let mut goes_on = |id: &str, done: Result<(), ConsulError>| {
            let Err(error) = done else { return true };
            failed.insert(not_carried_out(id, &error));
            matches!(error, ConsulError::Status { .. })
        };
        for registration in &plan.register {
            if !goes_on(&registration.id, self.register(registration).await) {
                return failed;
            }
        }
        for id in &plan.deregister {
            if !goes_on(id, self.deregister(id).await) {
                return failed;
            }
        }
        failed
    }

    async fn register(&self, registration: &Registration) -> Result<(), ConsulError> {
        let request = Request::to(&["v1", "agent", "service", "register"])
            .with("replace-existing-checks", "true");
        self.client.put(&request, registration).await?;
        tracing::info!(
            id = registration.id,
            port = registration.port,
            "registered with Consul"
        );
        Ok(())
    }

    async fn deregister(&self, id: &str) -> Result<(), ConsulError> {
        let request = Request::to(&["v1", "agent", "service", "deregister", id]);
        match self.client.put_nothing(&request).await {
            Err(error) if !error.is_not_found() => Err(error),
            Ok(_) | Err(_) => {
                tracing::info!(id, "deregistered from Consul");
                Ok(())
            }
        }
    }

    /// Deregisters all that is this node's.
    async fn say_farewell(&self) {
        let all = async {
            let (present, _) = self.read().await?;
            for id in plan(&self.settings.node, vec![], &BTreeSet::new(), &present).deregister {
                let done = self.deregister(&id).await;
                done.map_err(|error| chain(&error).to_string())?;
            }
            Ok::<_, String>(())
        };
        let ended = tokio::time::timeout(FAREWELL, all).await;
        let problem = match ended {
            Ok(Ok(())) => return,
            Ok(Err(problem)) => problem,
            Err(_elapsed) => format!("no answer within {} s", FAREWELL.as_secs()),
        };
        tracing::warn!(
            problem,
            "left registered with Consul: its checks will find the ports closed"
        );
    }

    /// Puts the status in place, and logs what is wrong since this time.
    fn tell(&self, problems: BTreeSet<String>, registered: Vec<(InstanceId, u16)>) {
        let mut status = self.status.lock();
        for problem in problems.difference(&status.problems) {
            tracing::warn!(problem, "local services of Consul");
        }
        status.problems = problems;
        status.registered = registered;
        let assignments = self.known.assignments.values();
        status.discovered = assignments
            .map(|assignment| (assignment.path.clone(), assignment.service.clone()))
            .collect();
    }
}

/// Whether `address` is one of this host's: what goes there comes from there. Nothing is sent.
fn is_of_this_host(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        // Any port will do.
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}

/// What the problems of registering and deregistering begin with.
const NOT_CARRIED_OUT: &str = "Consul's agent does not take the registration of ";

fn not_carried_out(id: &str, error: &ConsulError) -> String {
    let advice = if error.is_refused() {
        "; the agent's token needs `service:write` on the service and on <service>-sidestep-proxy"
    } else {
        ""
    };
    format!("{NOT_CARRIED_OUT}{id:?}: {}{advice}", chain(error))
}

#[cfg(test)]
mod tests;
