//! The kernel's side of capture: programs at `connect()`, their maps, and listeners in namespaces.
//!
//! First stage of a connection. [`Datapath`] loads the programs, attaches them to cgroups and keeps
//! their maps equal to the catalog; [`listener`] opens the sockets that captured connections arrive
//! at; [`Datapath::captured`] tells what an accepted one was aimed at and who aimed. It knows numbers
//! of services, not their names, and decides nothing about identity or policy: see [`crate::outbound`].

pub mod bpf;
pub mod cgroup;
pub mod iptables;
pub mod listener;
pub mod netns;
pub mod pins;
pub mod probe;

mod backend;
mod error;
mod events;
mod heartbeat;
mod kernel_log;
mod links;
pub mod load;
pub mod btf;
pub mod queries;
mod reconcile;
mod types;

pub use crate::config::AwayPolicy;
pub use backend::Backend;
pub use error::{DatapathError, MapOperation};
pub use events::{Refused, RefusedEvents};
pub use heartbeat::HEARTBEAT_PERIOD;
pub use sidestep_abi::{FlowEvent, Verdict};
pub use types::{
    Attachment, Captured, CgroupId, DatapathSettings, Maker, NetnsCookie, Reconciled, ServiceId,
    Undesired, VipRanges, VipTarget, VipTargets,
};

use std::{
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use links::{Link, Wanted};
use listener::CaptureListeners;
use load::Programs;
use parking_lot::Mutex;
use pins::PinDirectory;
use sidestep_abi::{Address, Config, FlowKey, ListenerKey, Origin, Role};

/// The loaded programs and their maps. Without pins, dropping it detaches the programs.
#[derive(Debug)]
pub struct Datapath {
    settings: DatapathSettings,
    maps: Maps,
    programs: Programs,
    pins: Option<PinDirectory>,
    /// Where [`Self::maps`] are pinned.
    maps_directory: Option<PathBuf>,
    /// What is attached. Attaching looks and acts: one at a time.
    links: Mutex<Vec<Link>>,
    /// Reconciling reads, compares and writes: one at a time.
    reconciling: Mutex<()>,
    can_log: bool,
    rings: Mutex<Option<events::Rings>>,
}

/// File descriptors of the maps, named as in `ebpf/programs/src/maps.rs`.
#[derive(Debug)]
struct Maps {
    config: OwnedFd,
    vips: OwnedFd,
    addresses: OwnedFd,
    fallbacks: OwnedFd,
    heartbeat: OwnedFd,
    listeners: OwnedFd,
    servers: OwnedFd,
    origins: OwnedFd,
    flows: OwnedFd,
    counts: OwnedFd,
}

impl Datapath {
    /// Loads the programs into the kernel; nothing new runs yet. Minimum kernel: 6.1.
    ///
    /// With `pins`, the maps are those that the agent before left, and links and maps stay when this one is
    /// dropped: what runs goes on, and refuses connects to virtual addresses for want of a listener.
    ///
    /// The order from here: [`Self::reconcile`], [`Self::attach_hand_over`], [`Self::enrol_netns`],
    /// [`Self::attach_capture`]. So whatever is captured, by these programs or by those of the agent before,
    /// finds its target, a listener, and who hands it over.
    ///
    /// # Errors
    ///
    /// [`DatapathError`] names the program, what the kernel said and what to do about it.
    pub fn load(
        settings: DatapathSettings,
        pins: Option<PinDirectory>,
    ) -> Result<Self, DatapathError> {
        load::load(settings, pins)
    }

    /// Runs what hands connections over, in the attach points and in the agent's own cgroup.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`] names the program, the cgroup, what the kernel said and what to do about it.
    pub fn attach_hand_over(&self) -> Result<(), DatapathError> {
        load::configure(&self.maps, &self.settings)?;
        self.attach(&links::handing_over(&self.settings))
    }

    /// Runs what captures, and removes what an agent before left pinned and is not wanted any more.
    ///
    /// # Errors
    ///
    /// As [`Self::attach_hand_over`].
    pub fn attach_capture(&self) -> Result<(), DatapathError> {
        let capturing = links::capturing(&self.settings);
        self.attach(&capturing)?;
        if let Some(pins) = &self.pins {
            let wanted = [links::handing_over(&self.settings), capturing].concat();
            links::remove_others(&wanted, pins)?;
            if let Some(used) = &self.maps_directory {
                pins.remove_other_maps(used)?;
            }
        }
        Ok(())
    }

    /// The cgroups whose processes are captured.
    pub fn attach_points(&self) -> &[PathBuf] {
        &self.settings.cgroups
    }

    /// What makes its holder the agent of this node, if the datapath is pinned.
    pub fn pin_lock(&self) -> Option<BorrowedFd<'_>> {
        self.pins.as_ref().map(PinDirectory::lock_descriptor)
    }

    /// Runs anew what does not run any more, since its cgroup was replaced by another of its name. Nothing else is
    /// touched: while another agent takes over, the rest is that one's already.
    ///
    /// # Errors
    ///
    /// As [`Self::attach_hand_over`].
    pub fn attach_again(&self) -> Result<(), DatapathError> {
        self.attach(&links::handing_over(&self.settings))?;
        self.attach(&links::capturing(&self.settings))
    }

    fn attach(&self, wanted: &[Wanted]) -> Result<(), DatapathError> {
        let mut held = self.links.lock();
        links::attach(wanted, &self.programs, self.pins.as_ref(), &mut held)
    }

    /// Makes the maps say what `desired` says, whatever they say now: additions and changes first,
    /// then deletions.
    ///
    /// # Errors
    ///
    /// [`DatapathError::TooManyVips`] before anything was changed; [`DatapathError::Map`] if the kernel
    /// refuses, when a part may have been written. Calling again is always right.
    pub fn reconcile(
        &self,
        desired: &VipTargets,
        undesired: Undesired,
    ) -> Result<Reconciled, DatapathError> {
        let _one_at_a_time = self.reconciling.lock();
        reconcile::reconcile(&self.maps, desired, undesired, self.settings.max_vips)
    }

    /// Makes the maps say what `some` says, then forgets the destinations `gone`; the others stay as they are.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses, also for want of room. Calling [`Self::reconcile`] after it is
    /// always right.
    pub fn update(
        &self,
        some: &VipTargets,
        gone: &[SocketAddr],
    ) -> Result<Reconciled, DatapathError> {
        let _one_at_a_time = self.reconciling.lock();
        let max_vips = self.settings.max_vips;
        let mut changed = reconcile::reconcile(&self.maps, some, Undesired::Keep, max_vips)?;
        changed.removed = reconcile::forget(&self.maps, gone)?;
        Ok(changed)
    }

    /// What an accepted connection was aimed at and who aimed; `None` if it was not captured, which
    /// means that somebody connected to the listener itself. One system call.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses to answer.
    pub fn captured(&self, socket: BorrowedFd<'_>) -> Result<Option<Captured>, DatapathError> {
        let key = socket.as_raw_fd();
        let origin = bpf::map_lookup::<i32, Origin>(self.maps.origins.as_fd(), &key)
            .map_err(|source| DatapathError::map("ORIGINS", MapOperation::Read, source))?;
        Ok(origin
            .filter(|origin| origin.role == Role::ACCEPTED)
            .map(Captured::from))
    }

    /// Lets processes in this namespace be captured, as long as its listeners are open.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses, for instance after 16,384 namespaces.
    pub fn enrol_netns(
        &self,
        netns: NetnsCookie,
        listeners: &CaptureListeners,
    ) -> Result<(), DatapathError> {
        let fails = |source| DatapathError::map("LISTENERS", MapOperation::Write, source);
        let map = self.maps.listeners.as_fd();
        let v4 = (Address::LOOPBACK_V4, Some(&listeners.v4));
        let v6 = (Address::LOOPBACK_V6, listeners.v6.as_ref());
        for (address, listener) in [v4, v6] {
            let Some(listener) = listener else { continue };
            let key = ListenerKey::new(netns.0, &address);
            bpf::map_update(map, &key, &listener.as_raw_fd()).map_err(fails)?;
        }
        Ok(())
    }

    /// From now on refuses connects to virtual addresses in this namespace. Returns whether it was enrolled.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses.
    pub fn dismiss_netns(&self, netns: NetnsCookie) -> Result<bool, DatapathError> {
        let fails = |source| DatapathError::map("LISTENERS", MapOperation::Delete, source);
        let map = self.maps.listeners.as_fd();
        let mut was_enrolled = false;
        for address in [Address::LOOPBACK_V4, Address::LOOPBACK_V6] {
            let key = ListenerKey::new(netns.0, &address);
            was_enrolled |= bpf::map_delete(map, &key).map_err(fails)?;
        }
        self.dismiss_queries(netns)?;
        Ok(was_enrolled)
    }

    /// How often each verdict was given since load, on all CPUs together.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses to answer.
    pub fn counters(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
        Verdict::ALL
            .iter()
            .map(|verdict| Ok((*verdict, self.count(verdict.slot())?)))
            .collect()
    }

    /// How often each step of the hand-over happened since load, on all CPUs together.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses to answer.
    pub fn flow_counters(&self) -> Result<Vec<(FlowEvent, u64)>, DatapathError> {
        FlowEvent::ALL
            .iter()
            .map(|event| Ok((*event, self.count(event.slot())?)))
            .collect()
    }

    /// The stream of refused connects. There is one; it must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`DatapathError::EventsTaken`] the second time, [`DatapathError::Events`] if the runtime refuses
    /// to watch the ring buffer.
    pub fn events(&self) -> Result<RefusedEvents, DatapathError> {
        let rings = self.rings.lock().take().ok_or(DatapathError::EventsTaken)?;
        RefusedEvents::new(rings).map_err(|source| DatapathError::Events { source })
    }

    /// Removes published connections that nobody accepted for so long; returns how many.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`] if the kernel refuses.
    pub fn sweep_flows(&self, older_than: Duration) -> Result<usize, DatapathError> {
        let failed = |operation| move |source| DatapathError::map("FLOWS", operation, source);
        let flows = self.maps.flows.as_fd();
        let limit = bpf::monotonic_now().saturating_sub(older_than);
        let is_old = |origin: &Origin| Duration::from_nanos(origin.stamped_ns) < limit;
        let mut swept = 0;
        for (key, origin) in
            bpf::map_entries::<FlowKey, Origin>(flows).map_err(failed(MapOperation::Read))?
        {
            if !is_old(&origin) {
                continue;
            }
            // The ports may have come to another connection since the listing.
            let now =
                bpf::map_lookup::<_, Origin>(flows, &key).map_err(failed(MapOperation::Read))?;
            if now.is_some_and(|origin| is_old(&origin))
                && bpf::map_delete(flows, &key).map_err(failed(MapOperation::Delete))?
            {
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// What is attached where.
    pub fn attachments(&self) -> Vec<Attachment> {
        let described = |link: &Link| {
            let info = bpf::link_info(link.fd.as_fd()).ok()?;
            Some(Attachment {
                program: link.program,
                target: link.target.clone(),
                link_id: info.id,
                program_id: info.program_id,
                is_live: info.cgroup_id != 0,
            })
        };
        self.links.lock().iter().filter_map(described).collect()
    }

    /// Switches the logging of every decision on or off.
    ///
    /// # Errors
    ///
    /// [`DatapathError::CannotLog`] if the programs were loaded without [`DatapathSettings::debug`];
    /// [`DatapathError::Map`] if the kernel refuses.
    pub fn set_debug(&self, on: bool) -> Result<(), DatapathError> {
        if on && !self.can_log {
            return Err(DatapathError::CannotLog);
        }
        let map = self.maps.config.as_fd();
        let config = bpf::map_lookup::<u32, Config>(map, &0)
            .map_err(|source| DatapathError::map("CONFIG", MapOperation::Read, source))?;
        let changed = Config {
            debug: u32::from(on),
            ..config.unwrap_or_default()
        };
        bpf::map_update(map, &0_u32, &changed)
            .map_err(|source| DatapathError::map("CONFIG", MapOperation::Write, source))
    }

    fn count(&self, slot: u32) -> Result<u64, DatapathError> {
        bpf::map_lookup_per_cpu(self.maps.counts.as_fd(), &slot)
            .map(|values| values.iter().sum())
            .map_err(|source| DatapathError::map("COUNTS", MapOperation::Read, source))
    }
}
