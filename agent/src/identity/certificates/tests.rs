//! Tests of issuing, renewing and failing, with the clock paused.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::{TempDir, tempdir};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::*;
use crate::identity::{
    ca::{self, BuiltinCa},
    clock::TokioClock,
    testing::{self, DAY, TestCa, builtin_ca, files, id, trust_domain},
};

/// How the provider answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Works,
    TakesOneSecond,
    GivesTheSameAgain,
    Fails,
    Hangs,
    NamesSomebodyElse,
}

/// The provider hangs after so many attempts: a keeper that spins would stop the paused clock.
const TOO_MANY: usize = 10_000;

/// The built-in CA with an off switch.
#[derive(Debug)]
struct Moody {
    ca: BuiltinCa,
    mode: Mutex<Mode>,
    attempts: AtomicUsize,
    trust: watch::Sender<Trust>,
    /// What it gave last, and gives again if told to.
    given: Mutex<HashMap<SpiffeId, Given>>,
    /// How often it renewed by itself; leaves of before are told from leaves of after by it.
    renewals: watch::Sender<usize>,
    /// It says that it renewed whatever is in use.
    contradicts_itself: AtomicBool,
}

/// The parts of a leaf.
#[derive(Debug)]
struct Given {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    valid: (SystemTime, SystemTime),
    /// [`Moody::renewals`] of then.
    renewals: usize,
}

impl Moody {
    fn set(&self, mode: Mode) {
        *self.mode.lock() = mode;
    }

    fn set_roots(&self, roots: Arc<TrustBundle>) {
        self.trust.send_modify(|trust| trust.roots = roots);
    }

    /// As an authority that makes a new leaf without being asked.
    fn renew_by_itself(&self) {
        self.renewals.send_modify(|renewals| *renewals += 1);
    }

    async fn made(&self, identity: &SpiffeId) -> Result<Leaf, IssueError> {
        let leaf = self.ca.issue(identity).await?;
        let given = Given {
            chain: leaf.chain.clone(),
            key: leaf.key.clone_key(),
            valid: (leaf.not_before, leaf.not_after),
            renewals: *self.renewals.borrow(),
        };
        self.given.lock().insert(identity.clone(), given);
        Ok(leaf)
    }

    fn same_again(&self, identity: &SpiffeId) -> Option<Leaf> {
        let given = self.given.lock();
        let given = given
            .get(identity)
            .filter(|given| given.renewals == *self.renewals.borrow())?;
        Some(Leaf {
            chain: given.chain.clone(),
            key: Zeroizing::new(given.key.clone_key()),
            not_before: given.valid.0,
            not_after: given.valid.1,
            issuer: "the same".to_owned(),
        })
    }

    fn attempts(&self) -> usize {
        self.attempts.load(Ordering::Relaxed)
    }
}

impl CertificateProvider for Moody {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Leaf, IssueError>> {
        let attempts = self.attempts.fetch_add(1, Ordering::Relaxed);
        let mode = if attempts < TOO_MANY {
            *self.mode.lock()
        } else {
            Mode::Hangs
        };
        Box::pin(async move {
            match mode {
                Mode::Works => self.made(identity).await,
                Mode::GivesTheSameAgain => match self.same_again(identity) {
                    Some(leaf) => Ok(leaf),
                    None => self.made(identity).await,
                },
                Mode::TakesOneSecond => {
                    sleep(Duration::from_secs(1)).await;
                    self.ca.issue(identity).await
                }
                Mode::Fails => Err(IssueError::ForeignTrustDomain {
                    identity: identity.clone(),
                    trust_domain: trust_domain(),
                }),
                Mode::Hangs => pending().await,
                Mode::NamesSomebodyElse => self.ca.issue(&id("somebody-else")).await,
            }
        })
    }

    fn trust(&self) -> watch::Receiver<Trust> {
        self.trust.subscribe()
    }

    fn renewed<'a>(
        &'a self,
        identity: &'a SpiffeId,
        in_use: &'a CertificateDer<'static>,
    ) -> BoxFuture<'a, ()> {
        let given_at = {
            let given = self.given.lock();
            let contradicts_itself = self.contradicts_itself.load(Ordering::Relaxed);
            let is_given = |g: &&Given| g.chain.first() == Some(in_use) && !contradicts_itself;
            let given = given.get(identity).filter(is_given);
            given.map(|given| given.renewals)
        };
        let mut renewals = self.renewals.subscribe();
        Box::pin(async move {
            drop(renewals.wait_for(|now| Some(*now) != given_at).await);
        })
    }
}

struct Scene {
    provider: Arc<Moody>,
    clock: Arc<TokioClock>,
    certificates: Certificates,
    shutdown: Shutdown,
    _directory: TempDir,
}

impl Scene {
    fn new(mode: Mode) -> Self {
        Self::with_authority(mode, |directory, clock| builtin_ca(directory, DAY, clock))
    }

    /// An authority that may sign for `life` only.
    fn running_out_after(life: Duration) -> Self {
        Self::with_authority(Mode::Works, |directory, clock| {
            let [root, mut node] = ["root", "node"].map(|name| files(directory, name));
            ca::init(&trust_domain(), &root, &*clock).unwrap();
            let name = "node".parse().unwrap();
            ca::intermediate(&trust_domain(), &root, &name, &node, life, &*clock).unwrap();
            node.roots = vec![root.certificate];
            BuiltinCa::load(&node, trust_domain(), DAY, clock).unwrap()
        })
    }

    fn with_authority(
        mode: Mode,
        authority: impl FnOnce(&Path, Arc<dyn Clock>) -> BuiltinCa,
    ) -> Self {
        let directory = tempdir().unwrap();
        let clock = TokioClock::starting_at(SystemTime::now());
        let clock_again: Arc<dyn Clock> = Arc::<TokioClock>::clone(&clock);
        let ca = authority(directory.path(), Arc::clone(&clock_again));
        let trust = ca.trust().borrow().clone();
        let provider = Arc::new(Moody {
            ca,
            mode: Mutex::new(mode),
            attempts: AtomicUsize::new(0),
            trust: watch::Sender::new(trust),
            given: Mutex::default(),
            renewals: watch::Sender::new(0),
            contradicts_itself: AtomicBool::new(false),
        });
        let shutdown = Shutdown::default();
        let certificates = Certificates::new(
            Arc::<Moody>::clone(&provider),
            clock_again,
            Jitter::seeded(3),
            shutdown.clone(),
        );
        Self {
            provider,
            clock,
            certificates,
            shutdown,
            _directory: directory,
        }
    }

    async fn web(&self) -> Result<Arc<WorkloadTls>, CertificateError> {
        self.certificates.for_identity(&id("web")).await
    }

    fn status(&self) -> CertificateStatus {
        self.certificates.status().remove(0)
    }
}

#[tokio::test(start_paused = true)]
async fn concurrent_first_uses_share_one_issuance() {
    let scene = Scene::new(Mode::TakesOneSecond);
    let started = Instant::now();
    let (a, b, c) = tokio::join!(scene.web(), scene.web(), scene.web());
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert!(Arc::ptr_eq(&a, &b) && Arc::ptr_eq(&b, &c));
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(scene.provider.attempts(), 1);
    assert_eq!(a.identity(), &id("web"));
    assert!(
        Arc::ptr_eq(&a, &scene.web().await.unwrap()),
        "built once, not per connection"
    );
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_gives_up_does_not_stop_the_issuance() {
    let scene = Scene::new(Mode::TakesOneSecond);
    let impatient = timeout(Duration::from_millis(10), scene.web()).await;
    impatient.unwrap_err();
    scene.web().await.unwrap();
    assert_eq!(scene.provider.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn leaves_are_renewed_at_60_to_90_percent_of_their_life() {
    let scene = Scene::new(Mode::Works);
    let mut current = scene.web().await.unwrap();
    for _ in 0..5 {
        let life = current
            .not_after()
            .duration_since(current.not_before())
            .unwrap();
        let due = scene.status().renew_at.unwrap();
        let part = due
            .duration_since(current.not_before())
            .unwrap()
            .as_secs_f64()
            / life.as_secs_f64();
        assert!((0.6..=0.9).contains(&part), "{part}");

        let just_before = due - Duration::from_secs(1);
        sleep(just_before.duration_since(scene.clock.now()).unwrap()).await;
        assert!(
            Arc::ptr_eq(&current, &scene.web().await.unwrap()),
            "renewed early"
        );
        sleep(Duration::from_secs(2)).await;
        let next = scene.web().await.unwrap();
        assert!(next.not_after() > current.not_after(), "renewed late");
        current = next;
    }
    assert_eq!(scene.provider.attempts(), 6);
}

#[tokio::test(start_paused = true)]
async fn the_old_leaf_serves_until_it_expires_and_no_longer() {
    let scene = Scene::new(Mode::Works);
    let first = scene.web().await.unwrap();
    scene.provider.set(Mode::Fails);
    let just_before = first.not_after() - Duration::from_secs(1);
    sleep(just_before.duration_since(scene.clock.now()).unwrap()).await;
    assert!(Arc::ptr_eq(&first, &scene.web().await.unwrap()));
    let failing = scene.status();
    assert!(failing.last_error.is_some());
    assert_eq!(failing.not_after, Some(first.not_after()));

    sleep(Duration::from_secs(1)).await;
    let error = scene.web().await.unwrap_err();
    assert!(
        matches!(error, CertificateError::Expired { .. }),
        "{error:?}"
    );

    scene.provider.set(Mode::Works);
    sleep(Duration::from_secs(301)).await;
    let back = scene.web().await.unwrap();
    assert!(back.not_after() > first.not_after());
    assert!(scene.status().last_error.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_ahead_beyond_expiry_costs_nobody_a_certificate() {
    let scene = Scene::new(Mode::Works);
    let first = scene.web().await.unwrap();
    // Asleep, as after a resume of a suspended machine.
    sleep(Duration::from_secs(10)).await;
    scene.clock.jump_ahead(3 * DAY);
    let started = Instant::now();
    let next = scene.web().await.unwrap();
    assert!(next.not_after() > scene.clock.now() && next.not_after() > first.not_after());
    assert!(started.elapsed() < Duration::from_secs(1), "at once");
    assert_eq!(scene.provider.attempts(), 2);

    scene.provider.set(Mode::Fails);
    scene.clock.jump_ahead(3 * DAY);
    let error = scene.web().await.unwrap_err();
    assert!(
        matches!(error, CertificateError::Expired { .. }),
        "{error:?}"
    );
    for _ in 0..100 {
        scene.web().await.unwrap_err();
    }
    assert_eq!(scene.provider.attempts(), 3, "callers do not hurry it");
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_gets_leaves_that_are_valid_by_it() {
    let scene = Scene::with_authority(Mode::Works, |directory, clock| {
        builtin_ca(directory, DAY, clock)
    });
    // As by a machine that starts with a wrong clock: the authority is older.
    scene.clock.jump_ahead(3 * DAY);
    let future = scene.web().await.unwrap();
    scene.clock.jump_back(3 * DAY);
    assert!(future.not_before() > scene.clock.now());
    sleep(LONGEST_SLEEP + Duration::from_secs(1)).await;
    let now = scene.web().await.unwrap();
    assert!(now.not_before() <= scene.clock.now(), "valid for peers");
    assert_eq!(scene.provider.attempts(), 2);
    sleep(DAY / 2).await;
    assert_eq!(scene.provider.attempts(), 2, "once is enough");
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_does_not_put_off_the_next_attempt() {
    let scene = Scene::new(Mode::Fails);
    scene.clock.jump_ahead(3 * DAY);
    scene.web().await.unwrap_err();
    scene.clock.jump_back(3 * DAY);
    scene.provider.set(Mode::Works);
    sleep(LONGEST_SLEEP + Duration::from_secs(1)).await;
    scene.web().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn nothing_spins_while_an_authority_runs_out_nor_after() {
    let (most, last) = (Duration::from_mins(119), Duration::from_mins(1));
    for seed in 0..20 {
        let mut scene = Scene::running_out_after(most + last);
        scene.certificates = Certificates::new(
            Arc::<Moody>::clone(&scene.provider),
            Arc::<TokioClock>::clone(&scene.clock),
            Jitter::seeded(seed),
            scene.shutdown.clone(),
        );
        scene.web().await.unwrap();
        sleep(most).await;
        scene.web().await.unwrap();
        sleep(last).await;
        scene.web().await.unwrap_err();
        let running_out = scene.provider.attempts();
        assert!(
            running_out < 40,
            "seed {seed}: {running_out} leaves in two hours"
        );
        sleep(Duration::from_hours(1)).await;
        let after = scene.provider.attempts() - running_out;
        assert!(
            after < 300,
            "seed {seed}: {after} attempts in the hour after"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn failed_attempts_are_spaced_out_and_never_stop() {
    let scene = Scene::new(Mode::Fails);
    let error = scene.web().await.unwrap_err();
    assert!(
        matches!(error, CertificateError::NotIssued { .. }),
        "{error:?}"
    );
    // More callers make no more attempts.
    for _ in 0..50 {
        scene.web().await.unwrap_err();
    }
    assert_eq!(scene.provider.attempts(), 1);
    sleep(Duration::from_hours(1)).await;
    let in_an_hour = scene.provider.attempts();
    assert!((18..=40).contains(&in_an_hour), "{in_an_hour}");
    scene.provider.set(Mode::Works);
    sleep(Duration::from_mins(5)).await;
    scene.web().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_hangs_is_given_up() {
    let scene = Scene::new(Mode::Hangs);
    let error = scene.web().await.unwrap_err();
    let CertificateError::NotIssued { source, .. } = error else {
        panic!("{error:?}");
    };
    assert!(matches!(&*source, IssueError::Timeout { .. }), "{source:?}");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_for_somebody_else_is_not_used() {
    let scene = Scene::new(Mode::NamesSomebodyElse);
    let error = scene.web().await.unwrap_err();
    let text = chain(&error).to_string();
    assert!(
        text.contains("svc/somebody-else, expected spiffe://"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn added_roots_are_trusted_at_once_with_the_same_leaf() {
    let scene = Scene::new(Mode::Works);
    let before = scene.web().await.unwrap();
    let next = TestCa::root("next");
    let own = before.bundle().certificates().to_vec();
    let both = own.into_iter().chain([next.certificate()]);
    let both = Arc::new(TrustBundle::new(trust_domain(), both).unwrap());
    scene.provider.set_roots(both);
    sleep(Duration::from_millis(1)).await;
    let after = scene.web().await.unwrap();
    assert_eq!(after.bundle().certificates().len(), 2);
    assert_eq!(after.not_after(), before.not_after());
    assert_eq!(scene.provider.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_leaf_of_a_removed_root_is_issued_anew() {
    let scene = Scene::new(Mode::Works);
    scene.web().await.unwrap();
    let next = testing::bundle(&[&TestCa::root("next")]);
    scene.provider.set_roots(next);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(scene.provider.attempts(), 2);
    // The authority still signs with the removed root, so what it issued is not taken; the old leaf serves.
    let status = scene.status();
    assert!(matches!(
        status.last_error.as_deref(),
        Some(IssueError::Unusable { .. })
    ));
    assert_eq!(scene.web().await.unwrap().bundle().certificates().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn leaves_of_a_replaced_authority_are_renewed_soon_and_not_together() {
    let scene = Scene::new(Mode::Works);
    let names = ["a", "b", "c", "d"].map(id);
    let mut before = vec![];
    for name in &names {
        before.push(scene.certificates.for_identity(name).await.unwrap());
    }
    scene.provider.trust.send_modify(|trust| trust.issuer += 1);
    sleep(Duration::from_millis(1)).await;
    let now = scene.clock.now();
    let due = scene.certificates.status().into_iter();
    let due: std::collections::BTreeSet<_> = due
        .map(|status| status.renew_at.unwrap().duration_since(now).unwrap())
        .collect();
    assert_eq!(due.len(), names.len(), "spread out: {due:?}");
    assert!(
        due.iter().all(|wait| *wait < Duration::from_secs(10)),
        "{due:?}"
    );
    for (name, before) in names.iter().zip(&before) {
        let still = scene.certificates.for_identity(name).await.unwrap();
        assert_eq!(still.not_after(), before.not_after(), "serves until then");
    }

    sleep(Duration::from_secs(10)).await;
    assert_eq!(scene.provider.attempts(), 2 * names.len());
    for (name, before) in names.iter().zip(&before) {
        let renewed = scene.certificates.for_identity(name).await.unwrap();
        assert!(!Arc::ptr_eq(&renewed, before));
    }
    // Once is enough.
    sleep(DAY / 2).await;
    assert_eq!(scene.provider.attempts(), 2 * names.len());
}

#[tokio::test(start_paused = true)]
async fn a_replaced_authority_that_fails_is_asked_again_while_the_old_leaf_serves() {
    let scene = Scene::new(Mode::Works);
    let before = scene.web().await.unwrap();
    scene.provider.set(Mode::Fails);
    scene.provider.trust.send_modify(|trust| trust.issuer += 1);
    sleep(Duration::from_secs(20)).await;
    assert!(scene.status().last_error.is_some());
    assert_eq!(scene.web().await.unwrap().not_after(), before.not_after());
    scene.provider.set(Mode::Works);
    sleep(Duration::from_mins(5)).await;
    assert!(scene.status().last_error.is_none());
    assert!(scene.web().await.unwrap().not_after() > before.not_after());
}

#[tokio::test(start_paused = true)]
async fn identities_no_longer_wanted_are_dropped() {
    let scene = Scene::new(Mode::Works);
    scene.web().await.unwrap();
    scene.certificates.for_identity(&id("db")).await.unwrap();
    assert_eq!(scene.certificates.status().len(), 2);
    scene.certificates.retain(|identity| *identity == id("db"));
    assert_eq!(scene.certificates.status().len(), 1);
    let issued = scene.provider.attempts();
    sleep(DAY).await;
    assert_eq!(scene.provider.attempts(), issued + 1, "only db is renewed");
    scene.web().await.unwrap();
    assert_eq!(scene.provider.attempts(), issued + 2);
}

#[tokio::test(start_paused = true)]
async fn keepers_end_with_the_agent() {
    let scene = Scene::new(Mode::Works);
    scene.web().await.unwrap();
    // They do not hold up draining, and end once nothing needs certificates any more.
    assert_eq!(scene.shutdown.run("test", Duration::from_secs(1)).await, 0);
    scene.web().await.unwrap();
    sleep(DAY).await;
    assert_eq!(scene.provider.attempts(), 1, "nothing is renewed any more");
}

#[tokio::test(start_paused = true)]
async fn a_leaf_that_the_authority_renewed_is_in_use_within_seconds() {
    let scene = Scene::new(Mode::GivesTheSameAgain);
    let mut current = scene.web().await.unwrap();
    for renewal in 1..=3 {
        sleep(Duration::from_hours(1)).await;
        assert_eq!(scene.provider.attempts(), renewal, "nothing to ask for");
        scene.provider.renew_by_itself();
        sleep(Duration::from_millis(1)).await;
        let next = scene.web().await.unwrap();
        assert!(next.not_after() > current.not_after());
        current = next;
    }
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_says_renewed_and_gives_the_same_is_asked_once_a_second() {
    let scene = Scene::new(Mode::GivesTheSameAgain);
    let before = scene.web().await.unwrap();
    // It takes the leaf in use for none of its own from now on.
    scene
        .provider
        .contradicts_itself
        .store(true, Ordering::Relaxed);
    scene.provider.renew_by_itself();
    sleep(Duration::from_millis(1500)).await;
    let attempts = scene.provider.attempts();
    sleep(Duration::from_mins(1)).await;
    let more = scene.provider.attempts() - attempts;
    assert!((55..=61).contains(&more), "{more} in a minute");
    assert!(scene.web().await.unwrap().not_after() >= before.not_after());
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_does_not_renew_is_reported_from_90_percent_of_life_on() {
    let scene = Scene::new(Mode::GivesTheSameAgain);
    let leaf = scene.web().await.unwrap();
    let life = leaf.not_after().duration_since(leaf.not_before()).unwrap();
    let overdue = leaf.not_before() + life.mul_f64(0.9);
    let before = overdue - Duration::from_secs(1);
    sleep(before.duration_since(scene.clock.now()).unwrap()).await;
    assert_eq!(scene.status().last_error.map(|e| e.to_string()), None);
    assert!(scene.provider.attempts() <= 2, "once before");

    sleep(Duration::from_secs(3)).await;
    let error = scene.status().last_error.unwrap();
    assert!(matches!(*error, IssueError::NotRenewed { .. }), "{error:?}");
    assert_eq!(scene.web().await.unwrap().not_after(), leaf.not_after());

    // Asked on the way to the end, and heard when it renews after all.
    let attempts = scene.provider.attempts();
    sleep(Duration::from_mins(30)).await;
    assert!((5..=15).contains(&(scene.provider.attempts() - attempts)));
    scene.provider.renew_by_itself();
    sleep(Duration::from_millis(1)).await;
    assert!(scene.web().await.unwrap().not_after() > leaf.not_after());
    assert!(scene.status().last_error.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_renewed_leaf_that_is_refused_is_asked_for_with_back_off_and_the_old_one_serves() {
    let scene = Scene::new(Mode::GivesTheSameAgain);
    let before = scene.web().await.unwrap();
    sleep(Duration::from_secs(2)).await;
    scene.provider.set(Mode::NamesSomebodyElse);
    scene.provider.renew_by_itself();
    sleep(Duration::from_mins(10)).await;
    let attempts = scene.provider.attempts();
    assert!((5..=20).contains(&attempts), "{attempts}");
    let error = scene.status().last_error.unwrap();
    assert!(
        matches!(*error, IssueError::NotAcceptable { .. }),
        "{error:?}"
    );
    assert_eq!(scene.web().await.unwrap().not_after(), before.not_after());
    scene.provider.set(Mode::Works);
    sleep(Duration::from_mins(5)).await;
    assert!(scene.web().await.unwrap().not_after() > before.not_after());
}
