//! The certificates of this node's services: issued on first use, renewed in time, kept in memory.
//!
//! Each identity has one task, its keeper, which is the only one that asks the [`CertificateProvider`]. Callers read
//! what the keeper published. An authority that renews by itself says so, and its schedule is the keeper's safety net.
//! A leaf that could not be renewed serves until it expires; after that [`Certificates::for_identity`] is an error, and
//! there is no other way to open a tunnel.

mod schedule;

use std::{
    collections::HashMap,
    fmt,
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

pub use schedule::Jitter;

use super::{
    clock::Clock,
    provider::{BoxFuture, CertificateProvider, IssueError, Leaf, Trust, TrustBundle},
    spiffe::SpiffeId,
    workload_tls::WorkloadTls,
};
use crate::{
    lifecycle::Shutdown,
    telemetry::{log::chain, timestamp::Timestamp},
};

/// How long the provider may take for one certificate. The built-in CA takes under a millisecond.
const ISSUE_DEADLINE: Duration = Duration::from_secs(10);

/// The longest that a keeper sleeps before it reads the clock again: the time of day may have jumped, and
/// the monotonic clock stands still while the machine is suspended.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);

/// An authority that says it has another leaf, and gives the same one, is asked once in this time.
const PAUSE_BEFORE_LISTENING: Duration = Duration::from_secs(1);

/// The certificates in use on this node. Clones share them.
#[derive(Clone)]
pub struct Certificates {
    shared: Arc<Shared>,
}

struct Shared {
    provider: Arc<dyn CertificateProvider>,
    clock: Arc<dyn Clock>,
    jitter: Jitter,
    shutdown: Shutdown,
    slots: Mutex<HashMap<SpiffeId, Kept>>,
}

/// What callers have of the keeper of one identity.
#[derive(Clone)]
struct Kept {
    slot: watch::Receiver<Slot>,
    /// Wakes the keeper, which then reads the clock.
    waker: Arc<Notify>,
}

/// What the keeper of one identity last published.
#[derive(Debug, Clone, Default)]
struct Slot {
    current: Option<Arc<WorkloadTls>>,
    issuer: Option<String>,
    renew_at: Option<SystemTime>,
    last_error: Option<Arc<IssueError>>,
}

impl Certificates {
    /// Issues nothing yet. Keepers end when `shutdown` does.
    pub fn new(
        provider: Arc<dyn CertificateProvider>,
        clock: Arc<dyn Clock>,
        jitter: Jitter,
        shutdown: Shutdown,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                provider,
                clock,
                jitter,
                shutdown,
                slots: Mutex::default(),
            }),
        }
    }

    /// The certificate of `identity`, valid now, and the roots of now.
    ///
    /// Waits for the first issuance, and for the first after a clock that was set ahead; concurrent callers share
    /// them. Cancel-safe: the issuance goes on.
    ///
    /// # Errors
    /// [`CertificateError::NotIssued`] if there never was one and the last attempt failed,
    /// [`CertificateError::Expired`] if it could not be renewed in time,
    /// [`CertificateError::ShuttingDown`] if there is none and the agent drains.
    pub async fn for_identity(
        &self,
        identity: &SpiffeId,
    ) -> Result<Arc<WorkloadTls>, CertificateError> {
        let Kept { mut slot, waker } = self.kept(identity);
        loop {
            {
                let seen = slot.borrow_and_update();
                if let Some(answer) = seen.answer(identity, self.shared.clock.now()) {
                    return answer;
                }
            }
            waker.notify_one();
            if slot.changed().await.is_err() {
                return Err(CertificateError::ShuttingDown {
                    identity: identity.clone(),
                });
            }
        }
    }

    /// Resolves with what took the place of `in_use`: another leaf, or the same under other roots. Never, if nothing
    /// does any more. Cancel-safe.
    pub async fn replaced(&self, in_use: &Arc<WorkloadTls>) -> Arc<WorkloadTls> {
        let is_other = |slot: &Slot| {
            let current = slot.current.as_ref();
            current.is_some_and(|current| !Arc::ptr_eq(current, in_use))
        };
        let mut slot = self.kept(in_use.identity()).slot;
        let current = match slot.wait_for(is_other).await {
            Ok(slot) => slot.current.clone(),
            Err(_keeper_ended) => None,
        };
        match current {
            Some(current) => current,
            None => pending().await,
        }
    }

    /// Stops keeping the certificates of identities that `wanted` does not name. Using one again issues anew.
    pub fn retain(&self, wanted: impl Fn(&SpiffeId) -> bool) {
        // The keeper notices that nobody listens to it any more.
        self.shared
            .slots
            .lock()
            .retain(|identity, _| wanted(identity));
    }

    /// Every certificate kept, in the order of identities.
    pub fn status(&self) -> Vec<CertificateStatus> {
        let slots = self.shared.slots.lock();
        let mut status: Vec<_> = slots
            .iter()
            .map(|(identity, kept)| kept.slot.borrow().status(identity))
            .collect();
        drop(slots);
        status.sort_by(|a, b| a.identity.cmp(&b.identity));
        status
    }

    fn kept(&self, identity: &SpiffeId) -> Kept {
        let mut slots = self.shared.slots.lock();
        if let Some(kept) = slots.get(identity) {
            return kept.clone();
        }
        let (publish, slot) = watch::channel(Slot::default());
        let waker = Arc::<Notify>::default();
        let kept = Kept { slot, waker };
        slots.insert(identity.clone(), kept.clone());
        drop(slots);
        let keeper = Keeper {
            identity: identity.clone(),
            shared: Arc::clone(&self.shared),
            publish,
            waker: Arc::clone(&kept.waker),
            trust: self.shared.provider.trust(),
            issuer: 0,
            failures: 0,
            attempted_at: SystemTime::UNIX_EPOCH,
            renewed: Box::pin(pending()),
        };
        // Not waited for when draining: it ends when everything that needs certificates has.
        self.shared
            .shutdown
            .spawn_service("certificate", keeper.run());
        kept
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("provider", &self.shared.provider)
            .finish_non_exhaustive()
    }
}

impl Slot {
    /// What to tell a caller, or `None` if the attempt that decides it is still to come.
    fn answer(
        &self,
        identity: &SpiffeId,
        now: SystemTime,
    ) -> Option<Result<Arc<WorkloadTls>, CertificateError>> {
        let identity = || identity.clone();
        match (&self.current, &self.last_error) {
            (Some(tls), _) if now < tls.not_after() => Some(Ok(Arc::clone(tls))),
            (Some(tls), Some(source)) => Some(Err(CertificateError::Expired {
                identity: identity(),
                not_after: tls.not_after().into(),
                source: Arc::clone(source),
            })),
            (None, Some(source)) => Some(Err(CertificateError::NotIssued {
                identity: identity(),
                source: Arc::clone(source),
            })),
            // The second: the clock was set ahead while the keeper slept.
            (None | Some(_), None) => None,
        }
    }

    fn status(&self, identity: &SpiffeId) -> CertificateStatus {
        CertificateStatus {
            identity: identity.clone(),
            issuer: self.issuer.clone(),
            not_after: self.current.as_ref().map(|tls| tls.not_after()),
            renew_at: self.renew_at,
            last_error: self.last_error.clone(),
        }
    }
}

/// The state of one certificate, for `sidestep status` and metrics.
#[derive(Debug, Clone)]
pub struct CertificateStatus {
    /// Whose it is.
    pub identity: SpiffeId,
    /// The subject of the certificate that signed the leaf in use; `None` if there never was one.
    pub issuer: Option<String>,
    /// When the leaf in use expires; `None` if there never was one.
    pub not_after: Option<SystemTime>,
    /// When it is to be renewed, or the next attempt is made.
    pub renew_at: Option<SystemTime>,
    /// Why the last attempt failed; `None` if it did not.
    pub last_error: Option<Arc<IssueError>>,
}

/// Why there is no certificate to use.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// None was issued yet.
    #[error("no certificate could be issued for {identity}")]
    NotIssued {
        /// Whose.
        identity: SpiffeId,
        /// Of the last attempt; the next one follows by itself.
        source: Arc<IssueError>,
    },
    /// The last one ran out.
    #[error("the certificate of {identity} expired at {} and could not be renewed", Timestamp::from(*not_after))]
    Expired {
        /// Whose.
        identity: SpiffeId,
        /// When it expired.
        not_after: time::OffsetDateTime,
        /// Of the last attempt; the next one follows by itself.
        source: Arc<IssueError>,
    },
    /// The agent ends and issues no more.
    #[error("the agent is shutting down and has no certificate for {identity}")]
    ShuttingDown {
        /// Whose.
        identity: SpiffeId,
    },
}

/// Issues and renews the certificate of one identity.
struct Keeper {
    identity: SpiffeId,
    shared: Arc<Shared>,
    publish: watch::Sender<Slot>,
    waker: Arc<Notify>,
    trust: watch::Receiver<Trust>,
    /// What issued the leaf in use, as [`Trust::issuer`].
    issuer: u64,
    failures: u32,
    /// When the last attempt began, by the clock of then.
    attempted_at: SystemTime,
    /// Ends when the authority has another leaf than the one in use.
    renewed: BoxFuture<'static, ()>,
}

impl Keeper {
    async fn run(mut self) {
        let mut trust_live = true;
        let mut due = self.renew().await;
        loop {
            let wait = due
                .duration_since(self.shared.clock.now())
                .unwrap_or_default();
            let mut is_renewed = false;
            tokio::select! {
                // Shutdown first: nothing is issued once the agent ends.
                biased;
                () = self.shared.shutdown.stopped() => return,
                () = self.publish.closed() => return,
                () = &mut self.renewed => is_renewed = true,
                changed = self.trust.changed(), if trust_live => {
                    // A provider that ended keeps its last roots; do not spin on it.
                    trust_live = changed.is_ok();
                    if trust_live {
                        due = self.follow(due).await;
                    }
                }
                () = self.waker.notified() => {}
                () = sleep(wait.min(LONGEST_SLEEP)) => {}
            }
            if is_renewed || self.is_due(due) {
                due = self.renew().await;
            }
        }
    }

    /// Whether to try now. A clock that was set back puts nothing off: neither the next attempt after one that failed,
    /// nor a leaf in place of one that is not valid yet.
    fn is_due(&self, due: SystemTime) -> bool {
        let now = self.shared.clock.now();
        let is_early = |tls: &Arc<WorkloadTls>| now < tls.not_before();
        let was_set_back = now < self.attempted_at;
        now >= due
            || was_set_back
                && (self.failures > 0
                    || self.publish.borrow().current.as_ref().is_some_and(is_early))
    }

    /// One attempt. Returns when the next is due.
    async fn renew(&mut self) -> SystemTime {
        let trust = self.trust.borrow_and_update().clone();
        self.attempted_at = self.shared.clock.now();
        let issued = issue(&self.shared, &self.identity, trust.roots).await;
        let issued = issued.and_then(|(tls, issuer)| {
            let renew_at = self.next_renewal(&tls)?;
            Ok((tls, issuer, renew_at))
        });
        // One whose leaf was refused has another leaf than the one in use already.
        let listens = matches!(issued, Ok(_) | Err(IssueError::NotRenewed { .. }));
        let due = match issued {
            Ok((tls, issuer, renew_at)) => {
                self.failures = 0;
                self.issuer = trust.issuer;
                self.install(tls, issuer, renew_at);
                renew_at
            }
            Err(error) => self.failed(error),
        };
        self.renewed = if listens {
            self.renewal()
        } else {
            Box::pin(pending())
        };
        due
    }

    /// When to ask next after the authority gave `tls`.
    ///
    /// # Errors
    /// [`IssueError::NotRenewed`] if it is the leaf in use, and that should have been replaced.
    fn next_renewal(&self, tls: &WorkloadTls) -> Result<SystemTime, IssueError> {
        let now = self.shared.clock.now();
        let (not_before, not_after) = (tls.not_before(), tls.not_after());
        if !self.is_in_use(tls) {
            let jitter = &self.shared.jitter;
            return Ok(schedule::renew_at(now, not_before, not_after, jitter));
        }
        let overdue_at = schedule::overdue_at(not_before, not_after);
        if now < overdue_at {
            Ok(overdue_at)
        } else {
            let not_after = not_after.into();
            Err(IssueError::NotRenewed { not_after })
        }
    }

    fn is_in_use(&self, tls: &WorkloadTls) -> bool {
        let slot = self.publish.borrow();
        let current = slot.current.as_ref();
        current.is_some_and(|current| current.leaf() == tls.leaf())
    }

    fn install(&self, tls: WorkloadTls, issuer: String, renew_at: SystemTime) {
        if !self.is_in_use(&tls) {
            tracing::info!(
                identity = %self.identity,
                not_after = %Timestamp(tls.not_after()),
                issuer,
                "certificate issued"
            );
        }
        self.publish.send_replace(Slot {
            current: Some(Arc::new(tls)),
            issuer: Some(issuer),
            renew_at: Some(renew_at),
            last_error: None,
        });
    }

    /// Ends when the authority has another leaf than the one in use.
    fn renewal(&self) -> BoxFuture<'static, ()> {
        let slot = self.publish.borrow();
        let Some(in_use) = slot.current.as_ref().and_then(|tls| tls.leaf().cloned()) else {
            return Box::pin(pending());
        };
        drop(slot);
        let (provider, identity) = (Arc::clone(&self.shared.provider), self.identity.clone());
        Box::pin(async move {
            sleep(PAUSE_BEFORE_LISTENING).await;
            provider.renewed(&identity, &in_use).await;
        })
    }

    fn failed(&mut self, error: IssueError) -> SystemTime {
        self.failures = self.failures.saturating_add(1);
        let now = self.shared.clock.now();
        let left = self
            .publish
            .borrow()
            .current
            .as_ref()
            .map(|tls| tls.not_after().duration_since(now).unwrap_or_default());
        let wait = schedule::retry_after(self.failures, left, &self.shared.jitter);
        let (identity, attempts, retry_ms) = (&self.identity, self.failures, wait.as_millis());
        let cause = chain(&error).to_string();
        if self.is_overdue(now) {
            tracing::error!(%identity, error = cause, attempts, retry_ms, "certificate runs out");
        } else {
            tracing::warn!(%identity, error = cause, attempts, retry_ms, "certificate not issued");
        }
        let due = now + wait;
        self.publish.send_modify(|slot| {
            slot.renew_at = Some(due);
            slot.last_error = Some(Arc::new(error));
        });
        due
    }

    /// Whether the leaf in use should have been replaced by now.
    fn is_overdue(&self, now: SystemTime) -> bool {
        let slot = self.publish.borrow();
        let current = slot.current.as_ref();
        current.is_some_and(|tls| now >= schedule::overdue_at(tls.not_before(), tls.not_after()))
    }

    /// Takes over what the provider changed. Returns when the next attempt is due.
    async fn follow(&mut self, due: SystemTime) -> SystemTime {
        let trust = self.trust.borrow_and_update().clone();
        if !self.take_roots(trust.roots) {
            return self.renew().await;
        }
        if trust.issuer == self.issuer {
            return due;
        }
        let wait = schedule::after_rotation(&self.shared.jitter);
        let due = due.min(self.shared.clock.now() + wait);
        self.publish.send_modify(|slot| slot.renew_at = Some(due));
        due
    }

    /// Puts the leaf in use under new roots. False if it has to be renewed because it reaches none of them.
    ///
    /// It serves on until then: peers that still have the old root accept it.
    fn take_roots(&self, roots: Arc<TrustBundle>) -> bool {
        let Some(current) = self.publish.borrow().current.clone() else {
            return false;
        };
        match current.with_roots(roots) {
            Ok(tls) => {
                let reaches_a_root = tls.check_own_chain().is_ok();
                self.publish
                    .send_modify(|slot| slot.current = Some(Arc::new(tls)));
                tracing::info!(identity = %self.identity, reaches_a_root, "roots changed");
                reaches_a_root
            }
            Err(error) => {
                tracing::error!(identity = %self.identity, error = %chain(&error), "new roots refused");
                true
            }
        }
    }
}

/// Whether a leaf should have been replaced by `now`.
pub(super) fn is_overdue(leaf: &Leaf, now: SystemTime) -> bool {
    now >= schedule::overdue_at(leaf.not_before, leaf.not_after)
}

/// A leaf under these roots, and who signed it.
async fn issue(
    shared: &Shared,
    identity: &SpiffeId,
    roots: Arc<TrustBundle>,
) -> Result<(WorkloadTls, String), IssueError> {
    let leaf = timeout(ISSUE_DEADLINE, shared.provider.issue(identity))
        .await
        .unwrap_or(Err(IssueError::Timeout {
            after: ISSUE_DEADLINE,
        }))?;
    WorkloadTls::new(identity.clone(), &leaf, roots, Arc::clone(&shared.clock))
        .map(|tls| (tls, leaf.issuer))
        .map_err(IssueError::unusable)
}

#[cfg(test)]
mod tests;
