//! Calls that would wait again and again for what does not come are back in time.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::disallowed_methods)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{counter, options, why};
use tai_state::backend::Kind;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::faults::{Call, CommitFault, FaultyBackend};
use tai_state::{Error, StateStore, TransactionManager};

const DEADLINE: Duration = Duration::from_millis(1_500);
const GRACE: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(60);

fn faulty() -> (FaultyBackend, StateStore) {
    let faults = FaultyBackend::new(Arc::new(MemoryBackend::new()), []).far();
    let options = options(|o| {
        o.retry.deadline = DEADLINE;
        o.retry.attempt_timeout = Duration::from_millis(500);
        o.retry.max_attempts = 4;
        o.retry.cap = Duration::from_millis(100);
    });
    (faults.clone(), StateStore::with_backend(Arc::new(faults), options))
}

/// A lock whose grant is never answered is asked for as often as a commit may be sent, and no longer
/// than it was to be waited for and one attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_whose_grant_is_not_answered_is_given_up() {
    let (faults, store) = faulty();
    faults.inject([CommitFault::LostRequest; 100]);
    let manager = TransactionManager::new(&store);
    let told = manager.try_acquire_lock("r", "me", LEASE).await.unwrap_err();
    assert!(matches!(told, Error::Timeout { .. }), "{told}");
    assert!(faults.commits() <= 4, "{} commits", faults.commits());

    let (faults, store) = faulty();
    faults.hold();
    let started = Instant::now();
    let manager = TransactionManager::new(&store);
    let told = manager.try_acquire_lock("r", "me", LEASE).await.unwrap_err();
    assert!(matches!(told, Error::Timeout { .. }), "{told}");
    assert!(started.elapsed() < Duration::from_millis(500) + GRACE, "{:?}", started.elapsed());
    faults.let_go();
    // What was given up is given back, when it has landed all the same.
    let lock = manager.acquire_lock_within("r", "next", LEASE, Duration::from_secs(20)).await;
    lock.unwrap().release().await.unwrap();
}

/// A write with an idempotency key has one deadline, and not another one for looking for its answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_keyed_write_has_one_deadline() {
    let (faults, store) = faulty();
    faults.go_down(true);
    faults.always(Call::Get(Kind::Commands), std::future::pending);
    let mut patient = options(|o| o.retry.deadline = DEADLINE);
    patient.retry.max_attempts = u32::MAX;
    let store = StateStore::with_backend(Arc::new(faults), {
        drop(store);
        patient
    });
    let started = Instant::now();
    let keyed = store.idempotency_key("k").unwrap();
    let told = keyed.save_state("g", "s", counter(1), why()).await.unwrap_err();
    assert!(told.is_transient(), "{told}");
    assert!(started.elapsed() < DEADLINE + GRACE, "{:?}", started.elapsed());
}

/// Neither has one that stood in line behind another and was told late.
#[tokio::test(flavor = "multi_thread")]
async fn a_keyed_write_in_line_has_one_deadline() {
    let (faults, store) = faulty();
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    faults.go_silent();
    let (first, second) = (store.clone(), store.idempotency_key("k").unwrap());
    let first = async { first.save_state("g", "s", counter(1), why()).await.map(drop) };
    let second = async {
        let started = Instant::now();
        let told = second.save_state("g", "s", counter(2), why()).await.unwrap_err();
        assert!(told.is_transient(), "{told}");
        started.elapsed()
    };
    let (told, took) = tokio::join!(first, second);
    assert!(matches!(told, Err(Error::OutcomeUnknown { .. })), "{told:?}");
    assert!(took < DEADLINE + GRACE, "{took:?}");
}
