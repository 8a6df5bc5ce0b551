//! Issuing, renewing and running out, on a clock that tests move.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::identity::{
    ca::{self, BuiltinCa, CaFiles},
    clock::TokioClock,
    provider::{BoxFuture, Leaf, TrustBundle},
};

const LIFE: Duration = Duration::from_secs(24 * 3600);

/// The built-in CA, counted, and broken at will.
#[derive(Debug)]
struct Counted {
    ca: BuiltinCa,
    issued: AtomicUsize,
    broken: AtomicBool,
}

impl CertificateProvider for Counted {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Leaf, IssueError>> {
        if self.broken.load(Ordering::Relaxed) {
            let after = Duration::ZERO;
            return Box::pin(async move { Err(IssueError::Timeout { after }) });
        }
        self.issued.fetch_add(1, Ordering::Relaxed);
        self.ca.issue(identity)
    }

    fn roots(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.ca.roots()
    }
}

fn setup() -> (Certificates, Arc<Counted>) {
    let directory = tempfile::tempdir().unwrap();
    let files = CaFiles {
        certificate: directory.path().join("root.pem"),
        key: directory.path().join("root-key.pem"),
        passphrase_file: None,
        roots: vec![directory.path().join("root.pem")],
    };
    let clock = TokioClock::starting_at(SystemTime::now());
    let trust_domain = "example.test".parse().unwrap();
    ca::init(&trust_domain, &files, &*clock).unwrap();
    let clock: Arc<dyn Clock> = clock;
    let ca = BuiltinCa::load(&files, trust_domain, LIFE, Arc::clone(&clock)).unwrap();
    let counted = Arc::new(Counted {
        ca,
        issued: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    });
    let provider = Arc::<Counted>::clone(&counted);
    let certificates = Certificates::new(provider, clock, Jitter::seeded(7), Shutdown::default());
    (certificates, counted)
}

fn web() -> SpiffeId {
    "spiffe://example.test/ns/default/dc/dc1/svc/web"
        .parse()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn concurrent_callers_share_one_issuance() {
    let (certificates, counted) = setup();
    let identity = web();
    let (one, other) = tokio::join!(
        certificates.for_identity(&identity),
        certificates.for_identity(&identity)
    );
    assert!(Arc::ptr_eq(&one.unwrap(), &other.unwrap()));
    assert_eq!(counted.issued.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_leaf_is_renewed_between_60_and_90_percent_of_its_life() {
    let (certificates, counted) = setup();
    let first = certificates.for_identity(&web()).await.unwrap();
    sleep(LIFE * 59 / 100).await;
    assert_eq!(counted.issued.load(Ordering::Relaxed), 1);
    sleep(LIFE * 32 / 100).await;
    assert_eq!(counted.issued.load(Ordering::Relaxed), 2);
    let second = certificates.for_identity(&web()).await.unwrap();
    assert!(second.not_after() > first.not_after());
}

#[tokio::test(start_paused = true)]
async fn while_the_issuer_is_away_the_leaf_serves_until_it_expires_and_no_longer() {
    let (certificates, counted) = setup();
    let first = certificates.for_identity(&web()).await.unwrap();
    counted.broken.store(true, Ordering::Relaxed);
    sleep(LIFE * 95 / 100).await;
    let still = certificates.for_identity(&web()).await.unwrap();
    assert_eq!(still.not_after(), first.not_after());
    assert!(certificates.status()[0].last_error.is_some());
    sleep(LIFE * 10 / 100).await;
    let expired = certificates.for_identity(&web()).await.unwrap_err();
    assert!(
        matches!(expired, CertificateError::Expired { .. }),
        "{expired}"
    );

    counted.broken.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs(3600)).await;
    certificates.for_identity(&web()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_identity_of_another_trust_domain_is_not_issued() {
    let (certificates, _counted) = setup();
    let foreign = "spiffe://other.test/ns/default/dc/dc1/svc/web"
        .parse()
        .unwrap();
    let error = certificates.for_identity(&foreign).await.unwrap_err();
    assert!(
        matches!(error, CertificateError::NotIssued { .. }),
        "{error}"
    );
}
