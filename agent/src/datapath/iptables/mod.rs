//! Capture by iptables rules, where the eBPF programs cannot be used.
//!
//! In each network namespace: a route that leads virtual addresses to `lo`, and rules of chains of our own that
//! redirect those of the catalog to the capture listener and refuse the rest ([`rules`]). What a connection was
//! aimed at is asked of conntrack, and who aimed of the owner of the calling socket ([`SockDiag`]).
//!
//! The rules name what the catalog has, so a port that no service has is refused by the kernel as with the
//! programs. What differs is in `docs/iptables.md`, why it is as it is in `docs/decisions/0015-iptables-mode.md`.

mod check;
pub(crate) mod conntrack;
mod route;
mod rules;
mod tool;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use conntrack::Original;
use ipnet::IpNet;
use parking_lot::{Mutex, RwLock};
use rules::{Family, Present, Scope};
use rustix::{
    io::Errno,
    net::{getpeername, getsockname},
};
use socket2::SockRef;
use tokio::time::Instant;
pub use tool::{Choice, ToolError, Variant};

pub(super) use check::probe;

use super::{
    Captured, DatapathError, Maker, NetnsCookie, Reconciled, Undesired, VipRanges, VipTargets,
    listener::CaptureListeners,
    netns::{self, Netns, NetnsError},
    pins::PinDirectory,
};
use crate::{
    netlink::Requests,
    sock_diag::{SockDiag, SockDiagError},
};

/// How long trying goes on after a failure; the supervisor expects a sign of life every 15 seconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// What to capture, and with what.
#[derive(Debug, Clone)]
pub struct IptablesSettings {
    /// Cgroups whose processes are captured, by their paths below the cgroup2 mount.
    pub attach_points: Vec<PathBuf>,
    /// Their directories, in the same order.
    pub directories: Vec<PathBuf>,
    /// The agent's own cgroup, below the mount; what runs in or below it is not captured.
    pub agent_cgroup: PathBuf,
    /// Where virtual addresses come from; an unknown one of these is refused.
    pub vip_ranges: VipRanges,
    /// The port of the capture listeners.
    pub port: u16,
    /// How many virtual addresses and ports there may be.
    pub max_vips: u32,
    /// The implementation in the kernel.
    pub choice: Choice,
}

/// The rules could not be applied, or do not tell what a connection is.
#[derive(Debug, thiserror::Error)]
pub enum IptablesError {
    /// `iptables-save` or `iptables-restore` failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel does not tell whose a socket is.
    #[error(transparent)]
    SockDiag(#[from] SockDiagError),
    /// `sock_diag(7)` cannot be asked.
    #[error("open a socket for sock_diag(7) and conntrack")]
    Open(#[source] io::Error),
    /// The route could not be made or removed.
    #[error("change the route to {range}")]
    Route {
        /// Where it leads to.
        range: IpNet,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// An accepted socket does not tell its addresses, or conntrack what they were.
    #[error("read {what} of an accepted connection")]
    Address {
        /// Which one.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The capture listener of a namespace that is none of ours.
    #[error("no rules were made in the network namespace {0}")]
    NotEnrolled(NetnsCookie),
    /// Somebody else's rule brought this connection here.
    #[error("{0} is no virtual address of the catalog")]
    NotVirtual(SocketAddr),
    /// The calling socket is gone: closed before it was looked at.
    #[error("nobody holds the socket {client} any more that called {destination}")]
    Gone {
        /// Its own address.
        client: SocketAddr,
        /// Where it was aimed.
        destination: SocketAddr,
    },
}

impl IptablesError {
    /// Whether it says something of the caller, and not of the agent or the kernel.
    pub fn is_of_caller(&self) -> bool {
        matches!(self, Self::NotVirtual(_) | Self::Gone { .. })
    }
}

/// Capture by rules. Its methods run programs and wait for them, but for [`Self::captured`].
#[derive(Debug)]
pub struct Iptables {
    directories: Vec<PathBuf>,
    scope: Scope,
    variant: Variant,
    max_vips: u32,
    pins: Option<PinDirectory>,
    known: ArcSwap<Known>,
    enrolled: RwLock<BTreeMap<NetnsCookie, Arc<Enrolled>>>,
    /// Rules are compared, written and remembered: one at a time.
    applying: Mutex<()>,
    captured: AtomicU64,
}

/// What the rules must say.
#[derive(Debug, Default)]
struct Known {
    desired: VipTargets,
    /// The catalog was not read whole: addresses that only an agent before knew stay refused.
    keeps: bool,
    kept: BTreeSet<IpAddr>,
}

/// A namespace with rules.
#[derive(Debug)]
struct Enrolled {
    netns: Netns,
    sockets: SockDiag,
    conntrack: Mutex<Requests>,
    families: Vec<Family>,
    /// What the chains hold, as last written.
    applied: Mutex<BTreeMap<Family, BTreeMap<&'static str, String>>>,
}

impl Iptables {
    /// Finds the programs to be used. Changes nothing yet; the order from here is that of
    /// [`Datapath::load`](super::Datapath::load). Kernel 5.14.
    ///
    /// With `pins` the rules stay when the agent ends, and its directory's lock makes this the node's agent.
    ///
    /// # Errors
    /// If the programs are missing, or the agent runs in the root cgroup.
    pub fn new(
        settings: IptablesSettings,
        pins: Option<PinDirectory>,
    ) -> Result<Self, DatapathError> {
        if settings.agent_cgroup == Path::new("/") {
            return Err(DatapathError::AgentInRootCgroup);
        }
        let variant = settings.choice.resolve().map_err(IptablesError::from)?;
        Ok(Self {
            directories: settings.directories,
            scope: Scope {
                attach_points: settings.attach_points,
                agent: settings.agent_cgroup,
                ranges: settings.vip_ranges,
                port: settings.port,
            },
            variant,
            max_vips: settings.max_vips,
            pins,
            known: ArcSwap::default(),
            enrolled: RwLock::default(),
            applying: Mutex::default(),
            captured: AtomicU64::new(0),
        })
    }

    /// Which implementation in the kernel is used.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// The cgroups whose processes are captured.
    pub fn attach_points(&self) -> &[PathBuf] {
        &self.directories
    }

    /// What makes its holder the agent of this node.
    pub fn pin_lock(&self) -> Option<BorrowedFd<'_>> {
        self.pins.as_ref().map(PinDirectory::lock_descriptor)
    }

    /// Removes the programs that an agent left which captured by them.
    ///
    /// # Errors
    /// If they cannot be detached.
    pub fn replace_programs(&self) -> Result<(), DatapathError> {
        match &self.pins {
            Some(pins) => Ok(pins.remove_content()?),
            None => Ok(()),
        }
    }

    /// Makes the rules of every namespace say what `desired` says.
    ///
    /// # Errors
    /// [`DatapathError::TooManyVips`] before anything was changed, or the first failure, after every namespace was
    /// tried. Calling again is always right.
    pub fn reconcile(
        &self,
        desired: &VipTargets,
        undesired: Undesired,
    ) -> Result<Reconciled, DatapathError> {
        let limit = self.max_vips;
        let wanted = desired.ports.len() + desired.any_port.len();
        if wanted > usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(DatapathError::TooManyVips { wanted, limit });
        }
        let _one_at_a_time = self.applying.lock();
        let before = self.known.load_full();
        let mut after = Known {
            desired: desired.clone(),
            ..Known::default()
        };
        if undesired == Undesired::Keep {
            after.keeps = true;
            after.kept.clone_from(&before.kept);
            for (at, target) in &before.desired.ports {
                after.desired.ports.entry(*at).or_insert(*target);
            }
            for (at, target) in &before.desired.any_port {
                after.desired.any_port.entry(*at).or_insert(*target);
            }
            after.desired.real.extend(&before.desired.real);
        }
        let (old, new) = (&before.desired, &after.desired);
        let [of_ports, of_any] = [
            difference(&old.ports, &new.ports),
            difference(&old.any_port, &new.any_port),
        ];
        let reconciled = Reconciled {
            added: of_ports.added + of_any.added,
            changed: of_ports.changed + of_any.changed,
            removed: of_ports.removed + of_any.removed,
        };
        self.known.store(Arc::new(after));
        self.apply_everywhere(false)?;
        Ok(reconciled)
    }

    /// Makes the rules say what `some` says, nothing of the ports `gone`, and what they say already of the rest.
    ///
    /// # Errors
    /// As [`Self::reconcile`].
    pub fn update(
        &self,
        some: &VipTargets,
        gone: &[SocketAddr],
    ) -> Result<Reconciled, DatapathError> {
        let known = self.known.load_full();
        let mut desired = known.desired.clone();
        desired.ports.extend(&some.ports);
        desired.any_port.extend(&some.any_port);
        desired.real.extend(&some.real);
        if !gone.is_empty() {
            for at in gone {
                desired.ports.remove(at);
            }
            let named: BTreeSet<IpAddr> = desired.ports.keys().map(SocketAddr::ip).collect();
            desired.real.retain(|address| named.contains(address));
        }
        let undesired = if known.keeps {
            Undesired::Keep
        } else {
            Undesired::Remove
        };
        self.reconcile(&desired, undesired)
    }

    /// Writes the rules anew in every namespace: somebody may have removed them, or a cgroup may be another one of
    /// its name.
    ///
    /// # Errors
    /// As [`Self::reconcile`].
    pub fn apply_again(&self) -> Result<(), IptablesError> {
        let _one_at_a_time = self.applying.lock();
        self.apply_everywhere(true)
    }

    fn apply_everywhere(&self, anew: bool) -> Result<(), IptablesError> {
        let enrolled: Vec<_> = self.enrolled.read().values().map(Arc::clone).collect();
        let begun = Instant::now();
        let mut result = Ok(());
        for namespace in enrolled {
            result = result.and(self.apply(&namespace, anew));
            // Where somebody holds the lock of all namespaces, waiting for it in each would take forever.
            if result.is_err() && begun.elapsed() > PATIENCE {
                break;
            }
        }
        result
    }

    /// Captures in this namespace, whose listeners are open.
    ///
    /// # Errors
    /// [`IptablesError`]; a part may be done.
    pub fn enrol_netns(
        &self,
        cookie: NetnsCookie,
        netns: &Netns,
        listeners: &CaptureListeners,
    ) -> Result<(), IptablesError> {
        let _one_at_a_time = self.applying.lock();
        let open = || {
            let conntrack = Requests::open(libc::NETLINK_NETFILTER)?;
            Ok((SockDiag::open()?, Mutex::new(conntrack)))
        };
        let (sockets, conntrack) = netns.run(open)?.map_err(IptablesError::Open)?;
        let mut families = vec![Family::V4];
        families.extend(listeners.v6.is_some().then_some(Family::V6));
        let namespace = Arc::new(Enrolled {
            netns: netns.try_clone()?,
            sockets,
            conntrack,
            families,
            applied: Mutex::default(),
        });
        // First: what is redirected is looked for here.
        let mut enrolled = self.enrolled.write();
        enrolled.insert(cookie, Arc::clone(&namespace));
        drop(enrolled);
        let applied = self.apply(&namespace, true);
        if applied.is_err() {
            self.enrolled.write().remove(&cookie);
        }
        applied
    }

    /// Removes the rules and the route in this namespace. Returns whether it was enrolled.
    ///
    /// # Errors
    /// [`IptablesError`].
    pub fn dismiss_netns(&self, cookie: NetnsCookie) -> Result<bool, IptablesError> {
        let _one_at_a_time = self.applying.lock();
        let Some(namespace) = self.enrolled.write().remove(&cookie) else {
            return Ok(false);
        };
        remove(&namespace.netns, self.scope.ranges)?;
        Ok(true)
    }

    /// Refuses from now on what was captured, everywhere. The port of the listeners, which close next, may become
    /// somebody else's.
    ///
    /// # Errors
    /// As [`Self::apply_again`].
    pub fn close(&self) -> Result<(), IptablesError> {
        let _one_at_a_time = self.applying.lock();
        let known = self.known.load_full();
        let mut desired = known.desired.clone();
        let of_any_port = desired.any_port.values_mut();
        for target in desired.ports.values_mut().chain(of_any_port) {
            target.reachable = false;
        }
        self.known.store(Arc::new(Known {
            desired,
            keeps: known.keeps,
            kept: known.kept.clone(),
        }));
        self.apply_everywhere(false)
    }

    /// The end of an agent that leaves nothing behind.
    ///
    /// # Errors
    /// The first failure, after every namespace was tried.
    pub fn leave(&self) -> Result<(), IptablesError> {
        if self.pins.is_some() {
            return Ok(());
        }
        let cookies: Vec<_> = self.enrolled.read().keys().copied().collect();
        let mut result = Ok(());
        for cookie in cookies {
            result = result.and(self.dismiss_netns(cookie).map(drop));
        }
        result
    }

    /// Brings one namespace up to date. With `anew` it looks at what is there; without, it trusts what it wrote.
    fn apply(&self, namespace: &Enrolled, anew: bool) -> Result<(), IptablesError> {
        let work = || {
            for family in &namespace.families {
                self.apply_here(namespace, *family, anew)?;
            }
            Ok(())
        };
        blocking(|| namespace.netns.run(work))?
    }

    fn apply_here(
        &self,
        namespace: &Enrolled,
        family: Family,
        anew: bool,
    ) -> Result<(), IptablesError> {
        let present = if anew {
            for range in self.scope.ranges(family) {
                let failed = |source| IptablesError::Route { range, source };
                route::add(range).map_err(failed)?;
            }
            Some(Present::read(&tool::save(self.variant, family)?))
        } else {
            None
        };
        let known = self.known.load();
        let mut kept = known.kept.clone();
        if let Some(present) = present.as_ref().filter(|_| known.keeps) {
            kept.extend(present.addresses());
            self.known.store(Arc::new(Known {
                desired: known.desired.clone(),
                keeps: true,
                kept: kept.clone(),
            }));
        }
        let content = rules::content(&self.scope, family, &known.desired, &kept);
        let mut applied = namespace.applied.lock();
        if !anew && applied.get(&family) == Some(&content) {
            return Ok(());
        }
        let text = rules::replacement(&content, present.as_ref());
        tool::restore(self.variant, family, &text)?;
        applied.insert(family, content);
        Ok(())
    }

    /// What an accepted connection was aimed at and who aimed; `None` if no rule redirected it, which means that
    /// somebody connected to the listener itself. Waits for nobody.
    ///
    /// # Errors
    /// [`IptablesError::Gone`] and [`IptablesError::NotVirtual`] about the caller, others if the kernel does not
    /// answer.
    pub fn captured(&self, socket: BorrowedFd<'_>) -> Result<Option<Captured>, IptablesError> {
        let failed = |what| move |source: io::Error| IptablesError::Address { what, source };
        // IPv6 has more in an address than its ends.
        let plain = |address: SocketAddr| SocketAddr::new(address.ip(), address.port());
        let own = getsockname(socket)
            .and_then(SocketAddr::try_from)
            .map(plain)
            .map_err(|errno| failed("the address")(errno.into()))?;
        let peer = getpeername(socket)
            .and_then(|peer| SocketAddr::try_from(peer.ok_or(Errno::NOTCONN)?))
            .map(plain)
            .map_err(|errno| failed("the peer")(errno.into()))?;
        let netns = netns::cookie_of(&SockRef::from(&socket)).map_err(failed("the namespace"))?;
        let namespace = self.enrolled.read().get(&netns).map(Arc::clone);
        let namespace = namespace.ok_or(IptablesError::NotEnrolled(netns))?;
        let original = conntrack::original(&mut namespace.conntrack.lock(), own, peer)
            .map_err(failed("the original addresses"))?;
        let Some(Original {
            source: client,
            destination,
        }) = original.filter(|original| original.destination != own)
        else {
            return Ok(None);
        };
        let Some(target) = self.known.load().desired.at(destination) else {
            return Err(IptablesError::NotVirtual(destination));
        };
        let owner = namespace.sockets.socket_of(client, destination)?;
        let owner = owner.ok_or(IptablesError::Gone {
            client,
            destination,
        })?;
        self.captured.fetch_add(1, Ordering::Relaxed);
        Ok(Some(Captured {
            destination,
            service: target.service,
            maker: Maker {
                cgroup: owner.cgroup,
                netns,
                uid: owner.uid,
                // The kernel does not say it of a socket, which several processes may hold.
                process: 0,
            },
            socket_cookie: owner.cookie,
        }))
    }

    /// How many connections were captured.
    pub fn captured_count(&self) -> u64 {
        self.captured.load(Ordering::Relaxed)
    }
}

/// Removes rules and routes of any agent in a namespace, of either implementation, and nothing else. Returns
/// whether there was something.
///
/// # Errors
/// [`IptablesError`]; a part may be done.
pub fn remove(netns: &Netns, ranges: VipRanges) -> Result<bool, IptablesError> {
    let work = || {
        let mut found = false;
        for variant in [Variant::Nft, Variant::Legacy] {
            for family in [Family::V4, Family::V6] {
                found |= remove_rules(variant, family)?;
            }
        }
        let scope = Scope {
            attach_points: vec![],
            agent: PathBuf::new(),
            ranges,
            port: 0,
        };
        // Last: without rules, what is underway must not get out.
        for range in [Family::V4, Family::V6].map(|family| scope.ranges(family)) {
            for range in range {
                let failed = |source| IptablesError::Route { range, source };
                found |= route::remove(range).map_err(failed)?;
            }
        }
        Ok(found)
    };
    blocking(|| netns.run(work))?
}

fn remove_rules(variant: Variant, family: Family) -> Result<bool, IptablesError> {
    if variant == Variant::Legacy && !tool::has_legacy_tables() {
        return Ok(false);
    }
    let saved = match tool::save(variant, family) {
        Ok(saved) => saved,
        // Then nobody made rules with it, or they cannot be seen.
        Err(ToolError::Run { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    let present = Present::read(&saved);
    if !present.is_empty() {
        tool::restore(variant, family, &present.removal())?;
    }
    Ok(!present.is_empty())
}

fn difference<K: Ord, V: PartialEq>(before: &BTreeMap<K, V>, after: &BTreeMap<K, V>) -> Reconciled {
    let gone = |key: &&K| !after.contains_key(key);
    let mut reconciled = Reconciled {
        removed: before.keys().filter(gone).count(),
        ..Reconciled::default()
    };
    for (key, value) in after {
        match before.get(key) {
            None => reconciled.added += 1,
            Some(old) if old != value => reconciled.changed += 1,
            Some(_) => {}
        }
    }
    reconciled
}

/// Lets the runtime's other tasks go on meanwhile.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
