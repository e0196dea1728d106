//! What stands in the way of clean-up, purge and recovery: lost and doubled commits, renewed locks, other
//! handles at the same moment, settings at the edge.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{every_backend, snapshot, why};
use serde_json::json;
use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Key, Kind, Name, Precondition, Write};
use tai_state::testing::faults::{Call, CommitFault, FaultyBackend};
use tai_state::{
    CleanupOptions, Error, PersistenceConfig, StateMachinePersister, StateStore, StoreOptions,
    TransactionManager,
};

const FAULTS: [CommitFault; 4] = [
    CommitFault::Unavailable,
    CommitFault::LostRequest,
    CommitFault::LostAnswer,
    CommitFault::Duplicated,
];

fn config() -> PersistenceConfig {
    PersistenceConfig { snapshot_interval: 5, ..PersistenceConfig::default() }
}

fn on(backend: Arc<dyn Backend>) -> StateMachinePersister {
    let mut options = StoreOptions::default();
    options.retry.base = Duration::from_micros(100);
    options.retry.cap = Duration::from_millis(2);
    options.persistence = config();
    StateMachinePersister::new(StateStore::with_backend(backend, options), config())
}

fn faulty(inner: &Arc<dyn Backend>, place: usize, fault: CommitFault) -> StateMachinePersister {
    let faults = vec![CommitFault::None; place].into_iter().chain([fault, fault]);
    on(Arc::new(FaultyBackend::new(Arc::clone(inner), faults)))
}

async fn fill(backend: &Arc<dyn Backend>, id: &str, count: u64) -> StateStore {
    let mut options = StoreOptions::default();
    options.persistence = config();
    let store = StateStore::with_backend(Arc::clone(backend), options);
    for n in 1..=count {
        store.save_state("g", id, snapshot(id, json!(n)), why()).await.unwrap();
    }
    store
}

async fn proved(backend: &Arc<dyn Backend>) {
    let store = StateStore::with_backend(Arc::clone(backend), StoreOptions::default());
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok && report.leftovers == 0, "{report:?}");
}

/// Each fault at each commit: the work is done, once, and counted once.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_at_every_commit() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let rounds = if name == "emulator" { 3 } else { 8 };
        for place in 0..rounds {
            for (n, fault) in FAULTS.into_iter().enumerate() {
                let id = format!("s{place}-{n}");
                let context = format!("{name}: {fault:?} at commit {place}");
                fill(&backend, &id, 30).await;
                let persister = faulty(&backend, place, fault);
                let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(8).batch(4);
                let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
                // What a doubled commit has removed may be another's as far as can be told.
                let counted = (report.events, report.snapshots_saved);
                let is_double = fault == CommitFault::Duplicated;
                assert!(
                    counted == (22, 1) || (is_double && counted < (22, 1)),
                    "{context}: {counted:?}"
                );
                assert!(report.problems.is_empty(), "{context}");
                proved(&backend).await;
                let persister = faulty(&backend, place % 3, fault);
                let pruned = persister.prune_snapshots("g", &id, 1).await.unwrap();
                assert!(pruned.snapshots == 1 || is_double, "{context}");
                let persister = faulty(&backend, place % 4, fault);
                let purged = persister.purge("g", &id, why(), |_| {}).await.unwrap();
                let counted = (purged.events, purged.snapshots);
                assert!(
                    counted == (8, 2) || (is_double && counted < (8, 2)),
                    "{context}: {counted:?}"
                );
                persister.verify_purge(&purged).await.unwrap();
                assert_eq!(purged.version, 31, "{context}");
                proved(&backend).await;
            }
        }
    }
}

/// A head that is put back by several at once, while somebody writes: nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn racing_recoveries_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        for round in 0..10 {
            let id = format!("s{round}");
            fill(&backend, &id, 12).await;
            let escaped = |id: &str| Name::escape(id, "id").unwrap();
            let key =
                Key { governor: escaped("g"), kind: Kind::States, name: escaped(&id), version: 0 };
            backend.commit(vec![Write::delete(key, Precondition::Any)]).await.unwrap();
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..3 {
                let (persister, id) = (on(Arc::clone(&backend)), id.clone());
                tasks.spawn(async move {
                    persister.recover("g", &id).await.unwrap();
                    let (state, _) = persister.load_state("g", &id).await.unwrap();
                    let next = snapshot(&id, json!("next"));
                    let store = &persister;
                    let event = store.log_transition("g", Some(&state), &next, "next", why()).await;
                    match event {
                        Ok(event) => Some(event.version()),
                        Err(Error::VersionConflict { .. }) => None,
                        Err(error) => panic!("{error}"),
                    }
                });
            }
            let written: Vec<u64> = tasks.join_all().await.into_iter().flatten().collect();
            assert!(!written.is_empty(), "{name}");
            let store = on(Arc::clone(&backend));
            let (state, _) = store.load_state("g", &id).await.unwrap();
            assert_eq!(state.version, 12 + written.len() as u64, "{name}: {written:?}");
        }
        proved(&backend).await;
    }
}

/// Who was slow to put a head back finds that another did, and that it was written since.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_recovery_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        fill(&backend, "s", 12).await;
        let escaped = |id: &str| Name::escape(id, "id").unwrap();
        let key =
            Key { governor: escaped("g"), kind: Kind::States, name: escaped("s"), version: 0 };
        backend.commit(vec![Write::delete(key, Precondition::Any)]).await.unwrap();
        let slow = FaultyBackend::new(Arc::clone(&backend), []);
        slow.hold();
        let late = on(Arc::new(slow.clone()));
        let late = tokio::spawn(async move { late.recover("g", "s").await.unwrap() });
        while slow.commits() == 0 {
            tokio::task::yield_now().await;
        }
        let other = on(Arc::clone(&backend));
        let (state, _) = other.load_state("g", "s").await.unwrap();
        let next = snapshot("s", json!("next"));
        other.log_transition("g", Some(&state), &next, "next", why()).await.unwrap();
        slow.let_go();
        let (state, report) = late.await.unwrap();
        assert_eq!((state.unwrap().version, report.repaired), (13, false), "{name}");
        assert_eq!(other.load_state("g", "s").await.unwrap().0.version, 13, "{name}");
        proved(&backend).await;
    }
}

/// A step of a clean-up that was slow to arrive undoes nothing of what another handle wrote meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_clean_up_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let writer = fill(&backend, "s", 12).await;
        let slow = FaultyBackend::new(Arc::clone(&backend), []);
        slow.hold();
        let late = on(Arc::new(slow.clone()));
        let late = tokio::spawn(async move {
            let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(3);
            late.cleanup("g", &options, |_| {}).await.unwrap()
        });
        while slow.commits() == 0 {
            tokio::task::yield_now().await;
        }
        let version = writer.save_state("g", "s", snapshot("s", json!("new")), why()).await;
        assert_eq!(version.unwrap(), 13, "{name}");
        slow.let_go();
        assert_eq!(late.await.unwrap().events, 9, "{name}");
        // By the head alone: loading would make it anew from the log.
        let fresh = StateStore::with_backend(Arc::clone(&backend), StoreOptions::default());
        let (state, _) = fresh.get_state("g", "s").await.unwrap();
        assert_eq!((state.version, state.data), (13, json!("new")), "{name}");
        proved(&backend).await;
    }
}

/// Another clean-up takes away what this one is about to begin history with: there is nothing left to do,
/// and nothing is damaged.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_that_is_overtaken_leaves_the_rest() {
    for is_far in [false, true] {
        let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
        fill(&backend, "s", 40).await;
        let between = FaultyBackend::new(Arc::clone(&backend), []);
        let between = if is_far { between.far() } else { between };
        let faster = on(Arc::clone(&backend));
        between.at(Call::Get(Kind::Events), 0, move || {
            let faster = faster.clone();
            async move {
                let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(3);
                let report = faster.cleanup("g", &options, |_| {}).await.unwrap();
                assert_eq!(report.events, 37);
            }
        });
        let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(8);
        let report = on(Arc::new(between)).cleanup("g", &options, |_| {}).await.unwrap();
        assert_eq!((report.events, report.states_trimmed), (0, 0));
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        proved(&backend).await;
    }
}

/// The event at which history is to begin is missing: that is damage, is said once, and stops nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_passes_over_what_is_damaged() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    for id in ["a", "b", "c"] {
        fill(&backend, id, 12).await;
    }
    let name = |id| Name::escape(id, "id").unwrap();
    let key = Key { governor: name("g"), kind: Kind::Events, name: name("b"), version: 9 };
    backend.commit(vec![Write::delete(key, Precondition::Any)]).await.unwrap();
    let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(4);
    let report = on(backend).cleanup("g", &options, |_| {}).await.unwrap();
    assert_eq!((report.states, report.states_trimmed, report.events), (3, 2, 16));
    assert_eq!(report.problems.len(), 1);
    assert!(report.problems[0].contains("g/b"), "{:?}", report.problems);
}

/// The holder of a lock cleans up while its lease is renewed; who has lost it removes nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn fences_hold_for_clean_ups() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let store = fill(&backend, "s", 40).await;
        let manager = TransactionManager::new(&store);
        let lock = manager.acquire_lock("cleaner", "me", Duration::from_millis(400)).await.unwrap();
        let fenced = StateMachinePersister::new(store.fenced_by(&lock), config());
        let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(10).batch(1);
        // Long enough for renewals in between.
        let mut removed = 0;
        for keep in (10..40).rev() {
            let options = options.clone().keep_versions(keep);
            removed += fenced.cleanup("g", &options, |_| {}).await.unwrap().events;
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        assert_eq!(removed, 30, "{name}");
        manager.break_lock("cleaner").await.unwrap();
        let late = fenced.cleanup("g", &options.clone().keep_versions(5), |_| {}).await;
        assert_eq!(late.unwrap_err().code(), "lock_lost", "{name}");
        for late in [
            fenced.purge("g", "s", why(), |_| {}).await.map(drop),
            fenced.prune_snapshots("g", "s", 0).await.map(drop),
        ] {
            let error = late.unwrap_err();
            assert_eq!(error.code(), "lock_lost", "{name}: {error}");
        }
        assert_eq!(store.get_state("g", "s").await.unwrap().1, 40);
        proved(&backend).await;
    }
}

/// A handle that remembers a head from before a clean-up or a purge writes on what is there now.
#[tokio::test(flavor = "multi_thread")]
async fn old_notes_do_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let store = fill(&backend, "s", 24).await;
        let other = on(Arc::clone(&backend));
        let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(3);
        other.cleanup("g", &options, |_| {}).await.unwrap();
        assert_eq!(store.save_state("g", "s", snapshot("s", json!(25)), why()).await.unwrap(), 25);
        proved(&backend).await;
        // A transaction that has read, and is overtaken by the clean-up, is not applied on what it read.
        let manager = TransactionManager::new(&store);
        let cleaner = other.clone();
        let runs = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counted = Arc::clone(&runs);
        manager
            .execute_transaction("g", move |tx| {
                let (cleaner, runs) = (cleaner.clone(), Arc::clone(&counted));
                async move {
                    let (state, version) = tx.get_state("g", "s").await?;
                    if runs.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
                        let options = CleanupOptions::older_than(Duration::ZERO);
                        cleaner.cleanup("g", &options, |_| {}).await?;
                    }
                    tx.update_state("g", "s", state, version, why()).await.map(drop)
                }
            })
            .await
            .unwrap();
        assert!(runs.load(std::sync::atomic::Ordering::SeqCst) >= 2, "{name}");
        other.purge("g", "s", why(), |_| {}).await.unwrap();
        // Blind, by a handle that remembers version 26, and by one that remembers nothing.
        assert_eq!(store.save_state("g", "s", snapshot("s", json!(1)), why()).await.unwrap(), 28);
        other.purge("g", "s", why(), |_| {}).await.unwrap();
        let fresh = StateStore::with_backend(Arc::clone(&backend), StoreOptions::default());
        assert_eq!(fresh.save_state("g", "s", snapshot("s", json!(1)), why()).await.unwrap(), 30);
        proved(&backend).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_at_the_edge() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    fill(&backend, "s", 12).await;
    let persister = on(Arc::clone(&backend));
    for options in [
        CleanupOptions::before(chrono::DateTime::<chrono::Utc>::MIN_UTC),
        CleanupOptions::older_than(Duration::MAX),
        CleanupOptions::before(chrono::DateTime::<chrono::Utc>::MAX_UTC).keep_versions(u64::MAX),
        CleanupOptions::before(chrono::DateTime::<chrono::Utc>::MAX_UTC).keep_versions(12),
    ] {
        assert_eq!(persister.cleanup("g", &options, |_| {}).await.unwrap().events, 0);
    }
    assert_eq!(persister.cleanup_old_data("g", u32::MAX).await.unwrap().events, 0);
    assert_eq!(persister.cleanup_old_data("nobody", 0).await.unwrap().states, 0);
    let all = CleanupOptions::before(chrono::DateTime::<chrono::Utc>::MAX_UTC).keep_versions(0);
    let report = persister.cleanup("g", &all.batch(0), |_| {}).await.unwrap();
    assert_eq!((report.events, report.problems.len()), (11, 0));
    proved(&backend).await;

    // An id that must be escaped, no events at once, one try.
    let mut options = StoreOptions::default();
    options.retry.max_attempts = 1;
    let none_at_once = PersistenceConfig { max_replay_batch_size: 0, ..config() };
    let store = StateStore::with_backend(Arc::clone(&backend), options);
    let persister = StateMachinePersister::new(store.clone(), none_at_once);
    for n in 1..=12 {
        store.save_state("g/~%", "a/~%", snapshot("x", json!(n)), why()).await.unwrap();
    }
    assert_eq!(persister.load_state("g/~%", "a/~%").await.unwrap().0.version, 12);
    let replayed = persister.replay("g/~%", "a/~%", |_| Ok(())).await.unwrap();
    assert_eq!((replayed.events, replayed.first_version), (12, 1));
    let stop = persister.replay("g/~%", "a/~%", |event| match event.to_state.version {
        3 => Err(Error::InvalidState { subject: "three".into(), reason: "enough".into() }),
        _ => Ok(()),
    });
    assert_eq!(stop.await.unwrap_err().code(), "invalid_state");
    let purged = persister.purge("g/~%", "a/~%", why(), |_| {}).await.unwrap();
    persister.verify_purge(&purged).await.unwrap();
    let again = serde_json::from_str(&serde_json::to_string(&purged).unwrap()).unwrap();
    persister.verify_purge(&again).await.unwrap();
    proved(&backend).await;
}

/// No document that a purge leaves, or makes, says anything of what was.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_says_nothing_of_what_it_erased() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let store = fill(&backend, "s", 3).await;
        let secret = snapshot("s", json!({"name": "xyzzy"}));
        store.save_state("g", "s", secret, why()).await.unwrap();
        on(Arc::clone(&backend)).purge("g", "s", why(), |_| {}).await.unwrap();
        store.save_state("g", "s", snapshot("s", json!("new")), why()).await.unwrap();
        let escaped = |id: &str| Name::escape(id, "id").unwrap();
        let key = |kind, version| Key { governor: escaped("g"), kind, name: escaped("s"), version };
        let mut keys = vec![key(Kind::States, 0)];
        keys.extend((1..=9).flat_map(|n| [key(Kind::Events, n), key(Kind::Snapshots, n)]));
        let found = backend.get(&keys).await.unwrap();
        let texts: Vec<_> = found.iter().flatten().map(|found| found.body.as_text()).collect();
        assert_eq!(texts.len(), 3, "{name}: the head, the purge, and what came after it");
        assert!(texts.iter().all(|text| !text.contains("xyzzy")), "{name}: {texts:?}");
    }
}

/// What was put beside the log by hand goes too, however much it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_removes_what_no_head_names() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        fill(&backend, "s", 900).await;
        let persister = on(Arc::clone(&backend));
        let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(10);
        persister.cleanup("g", &options, |_| {}).await.unwrap();
        let escaped = |id: &str| Name::escape(id, "id").unwrap();
        let key = |kind, version| Key { governor: escaped("g"), kind, name: escaped("s"), version };
        let found = backend.get(&[key(Kind::Events, 900)]).await.unwrap().pop().flatten().unwrap();
        for versions in [1..400, 400..800] {
            let stray =
                |n| Write::put(key(Kind::Snapshots, n), found.body.clone(), Precondition::Any);
            backend.commit(versions.map(stray).collect()).await.unwrap();
        }
        let stray = Write::put(key(Kind::Events, 7), found.body.clone(), Precondition::Any);
        backend.commit(vec![stray]).await.unwrap();
        let report = persister.purge("g", "s", why(), |_| {}).await.unwrap();
        assert_eq!(report.events, 10 + 1, "{name}");
        assert!(report.snapshots >= 799, "{name}: {report:?}");
        persister.verify_purge(&report).await.unwrap();
        proved(&backend).await;
    }
}

/// Very many saved snapshots do not make a commit that no engine takes.
#[tokio::test(flavor = "multi_thread")]
async fn very_many_saved_snapshots_can_be_removed() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let each = PersistenceConfig {
        snapshot_interval: 1,
        snapshot_retention: usize::MAX,
        ..PersistenceConfig::default()
    };
    let mut options = StoreOptions::default();
    options.persistence = each.clone();
    let store = StateStore::with_backend(Arc::clone(&backend), options);
    let persister = StateMachinePersister::new(store.clone(), each);
    for id in ["a", "b", "c"] {
        for n in 1..=1_300 {
            store.save_state("g", id, snapshot(id, json!(n)), why()).await.unwrap();
        }
    }
    assert_eq!(persister.saved_snapshots("g", "a").await.unwrap().len(), 1_300);
    let pruned = persister.prune_snapshots("g", "a", 3).await.unwrap();
    assert_eq!(pruned.snapshots, 1_297);
    let purged = persister.purge("g", "b", why(), |_| {}).await.unwrap();
    assert_eq!((purged.events, purged.snapshots), (1_300, 1_300));
    let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(2);
    let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
    assert_eq!((report.events, report.snapshots), (2 * 1_298, 1_298 + 1));
    proved(&backend).await;
}
