//! Lost requests, lost answers and doubled requests: every intention is applied exactly once, and
//! nobody gets a conflict for their own success.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Random, counter, why};
use serde_json::json;
use tai_state::backend::Backend;
use tai_state::backend::embedded::EmbeddedBackend;
use tai_state::backend::firestore::{FirestoreBackend, FirestoreConfig};
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::testing::faults::{CommitFault, FaultyBackend};
use tai_state::{
    Error, NewTransition, StateMachinePersister, StateStore, StoreOptions, TransactionManager,
};

const FAULTS: [CommitFault; 5] = [
    CommitFault::None,
    CommitFault::Unavailable,
    CommitFault::LostRequest,
    CommitFault::LostAnswer,
    CommitFault::Duplicated,
];

fn store(inner: Arc<dyn Backend>, faults: impl IntoIterator<Item = CommitFault>) -> StateStore {
    let mut options = StoreOptions::default();
    options.retry.base = Duration::from_micros(100);
    options.retry.cap = Duration::from_millis(1);
    StateStore::with_backend(Arc::new(FaultyBackend::new(inner, faults)), options)
}

async fn every_fault_at_every_place(inner: Arc<dyn Backend>) {
    let clean = store(Arc::clone(&inner), []);
    for (n, fault) in FAULTS.into_iter().enumerate() {
        for place in 0..12usize {
            // The fault meets the commit at `place`, and the next one twice.
            let faults = vec![CommitFault::None; place].into_iter().chain([fault, fault]);
            let store = store(Arc::clone(&inner), faults);
            let persister = StateMachinePersister::with_defaults(store.clone());
            let id = format!("s{n}-{place}");
            let state = |n| common::snapshot(&id, json!(n));
            let mut version = store.update_state("g", &id, state(0), 0, why()).await.unwrap();
            for step in 1..6u64 {
                let what = format!("{fault:?} at {place}, step {step}");
                let before = version;
                version = match step % 3 {
                    0 => store.save_state("g", &id, state(step), why()).await,
                    1 => store.update_state("g", &id, state(step), version, why()).await,
                    _ => {
                        let (from, _) = store.get_state("g", &id).await.unwrap();
                        let to = state(step);
                        let logged = persister.log_transition("g", Some(&from), &to, "step", why());
                        logged.await.map(|event| event.version())
                    }
                }
                .unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(version, before + 1, "{what}");
                // What was answered is what is stored.
                let (stored, at) = clean.get_state("g", &id).await.unwrap();
                assert_eq!((stored.data, at), (json!(step), version), "{what}");
            }
            let manager = TransactionManager::new(store.clone());
            let completed = manager
                .run(|tx| {
                    let id = id.clone();
                    async move {
                        let (state, at) = tx.get_state("g", &id).await?;
                        tx.update_state("g", &id, state, at, why()).await?;
                        tx.save_state("g", format!("{id}-other"), counter(1), why()).await
                    }
                })
                .await
                .unwrap();
            assert_eq!((completed.value, completed.attempts), (1, 1), "{fault:?} at {place}");
            assert_eq!(
                store.delete_state("g", &id, Some(version + 1), why()).await.unwrap(),
                version + 2
            );
        }
    }
    let report = clean.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    // For each: 6 versions, one of the transaction, one deletion, and the other state.
    assert_eq!(report.events, 5 * 12 * 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    every_fault_at_every_place(Arc::new(MemoryBackend::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.tai");
    every_fault_at_every_place(Arc::new(EmbeddedBackend::open(&path, true, false).await.unwrap()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn emulator() {
    let Some(emulator) = Emulator::shared().await else { return };
    let mut config = FirestoreConfig::new(fresh_project());
    config.emulator = Some(emulator.address().to_owned());
    every_fault_at_every_place(Arc::new(FirestoreBackend::open(config).await.unwrap())).await;
}

/// With an idempotency key and under a lock the same holds: whatever becomes of a commit, it is applied
/// once, and the same call again finds its answer.
async fn keyed_and_fenced(inner: Arc<dyn Backend>) {
    let clean = store(Arc::clone(&inner), []);
    let lock = TransactionManager::new(&clean)
        .acquire_lock("r", "me", Duration::from_secs(60))
        .await
        .unwrap();
    for (n, fault) in FAULTS.into_iter().enumerate() {
        for place in 0..4usize {
            let what = format!("{fault:?} at {place}");
            let faults = vec![CommitFault::None; place].into_iter().chain([fault, fault]);
            let store = store(Arc::clone(&inner), faults).fenced_by(&lock);
            let id = format!("k{n}-{place}");
            let once = store.idempotency_key(&id).unwrap();
            for _ in 0..2 {
                let saved = once.save_state("g", &id, counter(1), why()).await;
                assert_eq!(saved.unwrap_or_else(|error| panic!("{what}: {error}")), 1);
            }
            let manager = TransactionManager::new(&store);
            for _ in 0..3 {
                let answer = manager
                    .execute_once("g", format!("t {id}"), |tx| {
                        let id = id.clone();
                        async move {
                            let (state, version) = tx.get_state("g", &id).await?;
                            tx.update_state("g", &id, state, version, why()).await?;
                            tx.save_state("g", format!("{id}-other"), counter(1), why()).await?;
                            Ok(version)
                        }
                    })
                    .await;
                assert_eq!(answer.unwrap_or_else(|error| panic!("{what}: {error}")), 1);
            }
            assert_eq!(clean.get_state("g", &id).await.unwrap().1, 2, "{what}");
            // One that changes nothing is known by its answer alone.
            let faults = vec![CommitFault::None; place].into_iter().chain([fault, fault]);
            let manager = TransactionManager::new(self::store(Arc::clone(&inner), faults));
            for n in 0..3 {
                let looked = manager.run(|tx| {
                    let key = format!("look {id} {n}");
                    async move {
                        let before = tx.idempotency_key::<u64>(key).await?;
                        assert!(before.is_none(), "its own answer was taken for another's");
                        tx.answer(&1).await
                    }
                });
                let attempts = looked.await.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(attempts.attempts, 1, "{what}");
            }
        }
    }
    // Locks themselves: granted once, whatever becomes of the answer.
    for (n, fault) in FAULTS.into_iter().enumerate() {
        for place in 0..4u64 {
            let faults = vec![CommitFault::None; place as usize].into_iter().chain([fault, fault]);
            let manager = TransactionManager::new(store(Arc::clone(&inner), faults));
            let name = format!("lock {n} {place}");
            for token in 1..=3 {
                let lease = Duration::from_secs(60);
                let lock = manager.acquire_lock(&name, "me", lease).await.unwrap();
                assert_eq!(lock.fencing_token, token, "{fault:?} at {place}");
                lock.release().await.unwrap();
            }
        }
    }
    let report = clean.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!(report.events, 5 * 4 * 3);
}

/// A release whose answer is lost, and whose lock somebody else has at once: it was released.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_no_loss() {
    let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let other = TransactionManager::new(store(Arc::clone(&inner), []));
    let is_over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = Arc::clone(&is_over);
    let (lease, wait) = (Duration::from_secs(60), Duration::from_secs(20));
    let taker = tokio::spawn(async move {
        while !stop.load(std::sync::atomic::Ordering::SeqCst) {
            if let Ok(lock) = other.try_acquire_lock("r", "taker", lease).await {
                lock.release().await.unwrap();
            }
        }
    });
    for n in 0..200 {
        // Only the release is lost, whichever commit that is.
        let faults = FaultyBackend::new(Arc::clone(&inner), []);
        let mut options = StoreOptions::default();
        options.retry.base = Duration::from_millis(2);
        let of_us = StateStore::with_backend(Arc::new(faults.clone()), options);
        let manager = TransactionManager::new(&of_us);
        let lock = manager.acquire_lock_within("r", "us", lease, wait).await.unwrap();
        faults.inject([CommitFault::LostAnswer]);
        let released = match n % 2 {
            0 => lock.release().await,
            _ => TransactionManager::new(&of_us).release_lock("r", &lock.lock_token).await,
        };
        released.unwrap();
    }
    is_over.store(true, std::sync::atomic::Ordering::SeqCst);
    taker.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn keyed_and_fenced_in_memory() {
    keyed_and_fenced(Arc::new(MemoryBackend::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keyed_and_fenced_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.tai");
    keyed_and_fenced(Arc::new(EmbeddedBackend::open(&path, true, false).await.unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keyed_and_fenced_on_the_emulator() {
    let Some(emulator) = Emulator::shared().await else { return };
    let mut config = FirestoreConfig::new(fresh_project());
    config.emulator = Some(emulator.address().to_owned());
    keyed_and_fenced(Arc::new(FirestoreBackend::open(config).await.unwrap())).await;
}

/// Writers who lose answers at random race for a few states: what they were told is what happened.
#[tokio::test(flavor = "multi_thread")]
async fn racing_writers_with_lost_answers() {
    let mut random = Random::announced("settling");
    let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8u64 {
        let faults: Vec<CommitFault> = (0..400).map(|_| FAULTS[random.below(5) as usize]).collect();
        let persister = StateMachinePersister::with_defaults(store(Arc::clone(&inner), faults));
        tasks.spawn(async move {
            let (mut told, mut unknown) = (Vec::new(), Vec::new());
            for step in 0..60u64 {
                let state = format!("s{}", step % 3);
                let data = json!({"task": task, "step": step});
                let to = NewTransition::to("g", &state, "step", data.clone(), why());
                match persister.append(to).await {
                    Ok(event) => told.push((state, event.version(), event.id, data)),
                    Err(Error::OutcomeUnknown { version, event_id, .. }) => {
                        unknown.push((state, version, event_id));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            (told, unknown)
        });
    }
    let (told, unknown): (Vec<_>, Vec<_>) = tasks.join_all().await.into_iter().unzip();
    let told: Vec<_> = told.into_iter().flatten().collect();
    let clean = store(inner, []);
    // What stayed unknown is settled by looking for its identity.
    let mut found = 0;
    for (state, version, id) in unknown.iter().flatten() {
        match clean.event("g", state, *version).await {
            Ok(event) => found += u64::from(event.id == *id),
            Err(Error::StateNotFound { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    println!(
        "{} told, {} unknown, {found} of them applied",
        told.len(),
        unknown.iter().flatten().count()
    );
    assert!(told.len() > 400);
    for (state, version, id, data) in &told {
        let event = clean.event("g", state, *version).await.unwrap();
        assert_eq!((&event.id, &event.to_state.data), (id, data));
    }
    let report = clean.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!(
        report.events,
        told.len() as u64 + found,
        "something was applied twice or not at all"
    );
}

/// When it cannot be settled, the caller is told so, with the identity to look for; and what can be
/// settled by a last look is.
#[tokio::test(flavor = "multi_thread")]
async fn what_stays_unknown_names_its_identity() {
    for fault in [CommitFault::LostRequest, CommitFault::LostAnswer] {
        let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
        // The answer is lost, and then the storage takes no more commits.
        let faults = [fault].into_iter().chain(vec![CommitFault::Unavailable; 100]);
        let saved = store(Arc::clone(&inner), faults).save_state("g", "s", counter(1), why()).await;
        let there = store(inner, []).event("g", "s", 1).await;
        match (fault, saved) {
            (CommitFault::LostAnswer, Ok(1)) => assert!(there.is_ok()),
            (_, Err(Error::OutcomeUnknown { version: 1, event_id, .. })) => {
                assert!(fault == CommitFault::LostRequest && !event_id.is_empty());
                assert!(matches!(there, Err(Error::StateNotFound { .. })));
            }
            (_, other) => panic!("{fault:?}: {other:?}"),
        }
    }
}

/// Another's event with the same identity is another's all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_identity_is_no_success() {
    let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let persister = |inner: &Arc<dyn Backend>| {
        StateMachinePersister::with_defaults(store(Arc::clone(inner), []))
    };
    let (a, b) = (persister(&inner), persister(&inner));
    let to = |data: u64| NewTransition::to("g", "s", "step", json!(data), why());
    a.append(to(1)).await.unwrap();
    b.append(to(2).with_id("mine").expecting(1)).await.unwrap();
    let refused = a.append(to(3).with_id("mine").expecting(1)).await.unwrap_err();
    assert!(matches!(refused, Error::VersionConflict { expected: 1, actual: 2, .. }), "{refused}");
}
