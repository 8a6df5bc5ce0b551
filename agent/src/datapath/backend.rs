//! The two ways of capturing, behind one face: eBPF programs, or iptables rules where these cannot be used.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, SocketAddr},
    os::fd::BorrowedFd,
    path::PathBuf,
    time::Duration,
};

use sidestep_abi::{FlowEvent, Verdict};

use super::{
    Attachment, Captured, Datapath, DatapathError, NetnsCookie, Reconciled, RefusedEvents,
    Undesired, VipTargets,
    iptables::Iptables,
    listener::CaptureListeners,
    netns::Netns,
    queries::{QuerySocket, SweepLimits},
};

/// What captures on this node. The order of calls is that of [`Datapath::load`].
#[derive(Debug)]
pub enum Backend {
    /// `capture.mode = "ebpf"`
    Programs(Box<Datapath>),
    /// `capture.mode = "iptables"`
    Rules(Box<Iptables>),
}

impl Backend {
    /// Its name for operators.
    pub fn name(&self) -> String {
        match self {
            Self::Programs(_) => "ebpf".to_owned(),
            Self::Rules(rules) => format!("iptables-{}", rules.variant().as_str()),
        }
    }

    /// See [`Datapath::attach_hand_over`]; rules hand nothing over.
    ///
    /// # Errors
    /// As there.
    pub fn attach_hand_over(&self) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.attach_hand_over(),
            Self::Rules(_) => Ok(()),
        }
    }

    /// See [`Datapath::attach_capture`]; rules capture from the moment that a namespace is enrolled, so that the
    /// programs of an agent before are only in their way.
    ///
    /// # Errors
    /// [`DatapathError`].
    pub fn attach_capture(&self) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.attach_capture(),
            Self::Rules(rules) => rules.replace_programs(),
        }
    }

    /// Puts back what captures, where it is without effect.
    ///
    /// # Errors
    /// [`DatapathError`].
    pub fn attach_again(&self) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.attach_again(),
            Self::Rules(rules) => Ok(rules.apply_again()?),
        }
    }

    /// The cgroups whose processes are captured.
    pub fn attach_points(&self) -> &[PathBuf] {
        match self {
            Self::Programs(programs) => programs.attach_points(),
            Self::Rules(rules) => rules.attach_points(),
        }
    }

    /// What makes its holder the agent of this node, if there is a pin directory.
    pub fn pin_lock(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Programs(programs) => programs.pin_lock(),
            Self::Rules(rules) => rules.pin_lock(),
        }
    }

    /// Brings the catalog's addresses to the kernel.
    ///
    /// # Errors
    /// [`DatapathError`]. Calling again is always right.
    pub fn reconcile(
        &self,
        desired: &VipTargets,
        undesired: Undesired,
    ) -> Result<Reconciled, DatapathError> {
        match self {
            Self::Programs(programs) => programs.reconcile(desired, undesired),
            Self::Rules(rules) => rules.reconcile(desired, undesired),
        }
    }

    /// Brings some of the catalog's addresses to the kernel, then forgets those `gone`, and leaves the others as they
    /// are. What is gone must be one port of an address of which other ports pass.
    ///
    /// # Errors
    /// [`DatapathError`]. Calling [`Self::reconcile`] after it is always right.
    pub fn update(
        &self,
        some: &VipTargets,
        gone: &[SocketAddr],
    ) -> Result<Reconciled, DatapathError> {
        match self {
            Self::Programs(programs) => programs.update(some, gone),
            Self::Rules(rules) => rules.update(some, gone),
        }
    }

    /// See [`Datapath::beat`]; rules know nothing of an agent that hangs.
    ///
    /// # Errors
    /// As there.
    pub fn beat(&self, hung_after: Option<Duration>) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.beat(hung_after),
            Self::Rules(_) => Ok(()),
        }
    }

    /// See [`Datapath::stop_beating`].
    ///
    /// # Errors
    /// As there.
    pub fn stop_beating(&self, hung_after: Option<Duration>) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.stop_beating(hung_after),
            Self::Rules(_) => Ok(()),
        }
    }

    /// See [`Datapath::flow_counters`]; rules hand nothing over.
    ///
    /// # Errors
    /// As there.
    pub fn flow_counters(&self) -> Result<Vec<(FlowEvent, u64)>, DatapathError> {
        match self {
            Self::Programs(programs) => programs.flow_counters(),
            Self::Rules(_) => Ok(vec![]),
        }
    }

    /// Captures in this namespace, as long as its listeners are open.
    ///
    /// # Errors
    /// [`DatapathError`].
    pub fn enrol_netns(
        &self,
        cookie: NetnsCookie,
        netns: &Netns,
        listeners: &CaptureListeners,
    ) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.enrol_netns(cookie, listeners),
            Self::Rules(rules) => Ok(rules.enrol_netns(cookie, netns, listeners)?),
        }
    }

    /// Captures in this namespace no more. Returns whether it was enrolled.
    ///
    /// # Errors
    /// [`DatapathError`].
    pub fn dismiss_netns(&self, cookie: NetnsCookie) -> Result<bool, DatapathError> {
        match self {
            Self::Programs(programs) => programs.dismiss_netns(cookie),
            Self::Rules(rules) => Ok(rules.dismiss_netns(cookie)?),
        }
    }

    /// See [`Datapath::enrol_queries`]; rules capture no queries.
    ///
    /// # Errors
    /// As there.
    pub fn enrol_queries(
        &self,
        cookie: NetnsCookie,
        socket: &QuerySocket,
    ) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.enrol_queries(cookie, socket),
            Self::Rules(_) => Ok(()),
        }
    }

    /// See [`Datapath::dismiss_queries`].
    ///
    /// # Errors
    /// As there.
    pub fn dismiss_queries(&self, cookie: NetnsCookie) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.dismiss_queries(cookie),
            Self::Rules(_) => Ok(()),
        }
    }

    /// See [`Datapath::server`].
    ///
    /// # Errors
    /// As there.
    pub fn server(&self, stand_in: Ipv4Addr) -> Result<Option<SocketAddr>, DatapathError> {
        match self {
            Self::Programs(programs) => programs.server(stand_in),
            Self::Rules(_) => Ok(None),
        }
    }

    /// See [`Datapath::servers`].
    ///
    /// # Errors
    /// As there.
    pub fn servers(&self) -> Result<usize, DatapathError> {
        match self {
            Self::Programs(programs) => programs.servers(),
            Self::Rules(_) => Ok(0),
        }
    }

    /// See [`Datapath::sweep_servers`].
    ///
    /// # Errors
    /// As there.
    pub fn sweep_servers<E: From<DatapathError>>(
        &self,
        limits: SweepLimits,
        connected: impl FnOnce() -> Result<HashSet<Ipv4Addr>, E>,
    ) -> Result<usize, E> {
        match self {
            Self::Programs(programs) => programs.sweep_servers(limits, connected),
            Self::Rules(_) => Ok(0),
        }
    }

    /// What an accepted connection was aimed at and who aimed; `None` if it was not captured.
    ///
    /// # Errors
    /// [`DatapathError`] if that cannot be found out.
    pub fn captured(&self, socket: BorrowedFd<'_>) -> Result<Option<Captured>, DatapathError> {
        match self {
            Self::Programs(programs) => programs.captured(socket),
            Self::Rules(rules) => Ok(rules.captured(socket)?),
        }
    }

    /// How often each verdict was given, of those that are counted.
    ///
    /// # Errors
    /// [`DatapathError`] if the kernel refuses to answer.
    pub fn counters(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
        match self {
            Self::Programs(programs) => programs.counters(),
            Self::Rules(rules) => Ok(vec![(Verdict::Captured, rules.captured_count())]),
        }
    }

    /// The stream of refused connects, if there is one.
    ///
    /// # Errors
    /// As [`Datapath::events`].
    pub fn events(&self) -> Result<Option<RefusedEvents>, DatapathError> {
        match self {
            Self::Programs(programs) => programs.events().map(Some),
            Self::Rules(_) => Ok(None),
        }
    }

    /// See [`Datapath::sweep_flows`]; rules leave nothing to sweep.
    ///
    /// # Errors
    /// As there.
    pub fn sweep_flows(&self, older_than: Duration) -> Result<usize, DatapathError> {
        match self {
            Self::Programs(programs) => programs.sweep_flows(older_than),
            Self::Rules(_) => Ok(0),
        }
    }

    /// The programs that are attached.
    pub fn attachments(&self) -> Vec<Attachment> {
        match self {
            Self::Programs(programs) => programs.attachments(),
            Self::Rules(_) => vec![],
        }
    }

    /// See [`Datapath::set_debug`].
    ///
    /// # Errors
    /// As there; rules log nothing.
    pub fn set_debug(&self, on: bool) -> Result<(), DatapathError> {
        match self {
            Self::Programs(programs) => programs.set_debug(on),
            Self::Rules(_) if on => Err(DatapathError::CannotLog),
            Self::Rules(_) => Ok(()),
        }
    }

    /// The agent takes no more connections, and no other one does in its place: refuses them. The programs do so by
    /// themselves when the listeners close.
    ///
    /// # Errors
    /// [`DatapathError`] if a part goes on.
    pub fn close(&self) -> Result<(), DatapathError> {
        match self {
            Self::Programs(_) => Ok(()),
            Self::Rules(rules) => Ok(rules.close()?),
        }
    }

    /// The end of an agent: without a pin directory it leaves nothing. Programs go by themselves.
    ///
    /// # Errors
    /// [`DatapathError`] if something stays.
    pub fn leave(&self) -> Result<(), DatapathError> {
        match self {
            Self::Programs(_) => Ok(()),
            Self::Rules(rules) => Ok(rules.leave()?),
        }
    }
}
