//! Clean-ups, purges, repairs and readers of the past that come in between one another at the worst
//! moment.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{DateTime, TimeZone, Utc};
use common::{every_backend, proved, snapshot, why};
use serde_json::json;
use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Key, Kind, Name, Write};
use tai_state::testing::faults::{Call, CommitFault, FaultyBackend};
use tai_state::{
    CleanupOptions, Clock, Error, HeadCondition, NewTransition, PersistenceConfig,
    StateMachinePersister, StateStore, StoreOptions, SystemClock, TransactionManager,
};

fn config(interval: u64, retention: usize) -> PersistenceConfig {
    PersistenceConfig {
        snapshot_interval: interval,
        snapshot_retention: retention,
        ..PersistenceConfig::default()
    }
}

/// A handle of its own.
fn handle(
    backend: impl Backend + 'static,
    config: &PersistenceConfig,
    change: impl FnOnce(&mut StoreOptions),
) -> (StateStore, StateMachinePersister) {
    let mut options = StoreOptions::default();
    options.persistence = config.clone();
    options.retry.base = Duration::from_micros(200);
    options.retry.cap = Duration::from_millis(5);
    change(&mut options);
    let store = StateStore::with_backend(Arc::new(backend), options);
    (store.clone(), StateMachinePersister::new(store, config.clone()))
}

/// Another handle on the same documents.
fn other(backend: &Arc<dyn Backend>) -> (StateStore, StateMachinePersister) {
    handle(between(backend), &config(10, 3), |_| {})
}

fn between(backend: &Arc<dyn Backend>) -> FaultyBackend {
    FaultyBackend::new(Arc::clone(backend), [])
}

fn at(second: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_767_225_600 + second, 0).unwrap()
}

async fn fill(persister: &StateMachinePersister, id: &str, from: u64, to: u64) {
    for n in from..=to {
        let change = NewTransition::to("g", id, "step", json!(n), why()).at(at(n as i64 * 10));
        persister.append(change).await.unwrap();
    }
}

fn all_but(versions: u64) -> CleanupOptions {
    CleanupOptions::before(at(1_000_000_000)).keep_versions(versions)
}

async fn backends(folder: &std::path::Path) -> Vec<(&'static str, Arc<dyn Backend>)> {
    every_backend(folder).await
}

async fn proved_apart(backend: &Arc<dyn Backend>) {
    proved(&other(backend).0).await;
}

/// The answer to a writer is lost, another stands in line behind it, and a clean-up comes before the
/// answer is looked for: what the second planned knows nothing of the clean-up.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_line_does_not_undo_a_clean_up() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in backends(folder.path()).await {
        let between = between(&backend);
        let (store, persister) = handle(between.clone(), &config(10, 3), |_| {});
        fill(&persister, "s", 1, 12).await;
        let cleaner = other(&backend).1;
        let behind = store.clone();
        let second = Arc::new(Mutex::new(None));
        let started = Arc::clone(&second);
        between.at(Call::Commit, 0, move || {
            let (behind, started, cleaner) =
                (behind.clone(), Arc::clone(&started), cleaner.clone());
            async move {
                let save = async move {
                    behind.save_state("g", "s", snapshot("s", json!(14)), why()).await
                };
                *started.lock().unwrap() = Some(tokio::spawn(save));
                tokio::time::sleep(Duration::from_millis(50)).await;
                let report = cleaner.cleanup("g", &all_but(1), |_| {}).await.unwrap();
                assert_eq!(report.events, 12);
            }
        });
        let first = store.save_state("g", "s", snapshot("s", json!(13)), why()).await.unwrap();
        let second = second.lock().unwrap().take().unwrap();
        assert_eq!((first, second.await.unwrap().unwrap()), (13, 14), "{name}");
        let record = other(&backend).0.record("g", "s").await.unwrap().unwrap();
        assert_eq!(record.first_version, 13, "{name}: the clean-up is undone");
        proved_apart(&backend).await;
    }
}

/// A transaction that began at the end of the line leaves it for another state, and a clean-up comes in
/// between.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_leaves_the_line_does_not_undo_a_clean_up() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in backends(folder.path()).await {
        let faulty = FaultyBackend::new(Arc::clone(&backend), []);
        let (store, persister) = handle(faulty.clone(), &config(10, 3), |_| {});
        fill(&persister, "s", 1, 12).await;
        let cleaner = other(&backend).1;
        let manager = TransactionManager::new(&store);
        let runs = AtomicU64::new(0);
        let done = manager.execute_transaction("g", |tx| {
            let run = runs.fetch_add(1, Ordering::SeqCst);
            let (store, faulty, cleaner) = (store.clone(), faulty.clone(), cleaner.clone());
            async move {
                if run == 0 {
                    tx.get_state("g", "s").await?;
                    faulty.hold();
                    tokio::spawn(async move {
                        store.save_state("g", "s", snapshot("s", json!(13)), why()).await
                    });
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    tx.save_state("g", "s", snapshot("s", json!("early")), why()).await?;
                    return Ok(());
                }
                tx.save_state("g", "s", snapshot("s", json!(14)), why()).await?;
                faulty.let_go();
                tokio::time::sleep(Duration::from_millis(100)).await;
                cleaner.cleanup("g", &all_but(1), |_| {}).await?;
                tx.exists("g", "other").await?;
                Ok(())
            }
        });
        done.await.unwrap();
        let record = other(&backend).0.record("g", "s").await.unwrap().unwrap();
        assert_eq!(record.snapshot.version, 14, "{name}");
        assert!(record.first_version >= 13, "{name}: the clean-up is undone");
        proved_apart(&backend).await;
    }
}

fn trimmed<T: std::fmt::Debug>(what: &str, result: Result<T, Error>) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::HistoryTrimmed { .. }), "{what}: {error}");
}

/// What is cleaned up while the past is read is said to be cleaned up, and is no damage.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_under_a_reader_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in backends(folder.path()).await {
        if name == "emulator" {
            continue;
        }
        for is_far in [false, true] {
            let fresh = format!("{name}, far: {is_far}");
            let between = if is_far { between(&backend).far() } else { between(&backend) };
            let (store, persister) = handle(between.clone(), &config(100, 3), |_| {});
            let cleaner = other(&backend).1;
            let mut round = 0;
            // A state of its own for each question, cleaned up when it is asked.
            let mut prepare = async |call: Call, passed: u32, length: u64| {
                round += 1;
                let id = format!("s{is_far}{round}");
                fill(&persister, &id, 1, length).await;
                let cleaner = cleaner.clone();
                between.at(call, passed, move || {
                    let cleaner = cleaner.clone();
                    async move { drop(cleaner.cleanup("g", &all_but(5), |_| {}).await.unwrap()) }
                });
                id
            };
            let events = Call::Scan(Kind::Events);
            let event = Call::Get(Kind::Events);

            let id = prepare(events, 0, 40).await;
            let mut history = store.history("g", &id, ..).await.unwrap();
            trimmed(&fresh, history.next_page().await);
            let id = prepare(event, 0, 40).await;
            trimmed(&fresh, store.history("g", &id, 20..).await);
            let id = prepare(event, 0, 40).await;
            trimmed(&fresh, store.record_at_version("g", &id, 20).await);
            let id = prepare(event, 0, 40).await;
            trimmed(&fresh, store.diff("g", &id, 20, 40).await);
            let id = prepare(events, 0, 40).await;
            trimmed(&fresh, persister.replay("g", &id, |_| Ok(())).await);

            // At a time: what is kept is found, and what is not is told.
            let call = if is_far { Call::Query } else { event };
            let id = prepare(call, 0, 40).await;
            let kept = store.record_at_time("g", &id, at(385)).await.unwrap();
            assert_eq!(kept.snapshot.version, 38, "{fresh}");
            let id = prepare(call, 0, 40).await;
            trimmed(&fresh, store.record_at_time("g", &id, at(105)).await);
            let id = prepare(call, 0, 40).await;
            trimmed(&fresh, store.diff("g", &id, at(105), 40).await);
            let id = prepare(call, 0, 40).await;
            trimmed(&fresh, store.events_between("g", &id, at(105), at(385)).await);
        }
    }
}

/// The same where all states of a governor are gone through.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_under_a_reader_of_a_governor_is_no_damage() {
    for is_far in [false, true] {
        let fresh = || async move {
            let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
            let between = if is_far { between(&backend).far() } else { between(&backend) };
            let (store, persister) = handle(between.clone(), &config(100, 3), |_| {});
            fill(&persister, "a", 1, 40).await;
            fill(&persister, "b", 1, 40).await;
            let cleaner = other(&backend).1;
            let clean = move || {
                let cleaner = cleaner.clone();
                async move { drop(cleaner.cleanup("g", &all_but(5), |_| {}).await.unwrap()) }
            };
            (store, between, clean, backend)
        };
        // At the past: all or nothing, never a state that is left out.
        let (store, between, clean, _) = fresh().await;
        let call = if is_far { Call::Query } else { Call::Get(Kind::Events) };
        between.at(call, 0, clean);
        let page = store.consistent_cut("g", at(105)).unwrap().next_page().await;
        trimmed("cut", page.map(|page| page.len()));
        let (store, between, clean, _) = fresh().await;
        between.at(call, 0, clean);
        let page = store.consistent_cut("g", at(385)).unwrap().next_page().await.unwrap();
        assert!(page.len() == 2 && page.iter().all(|record| record.snapshot.version == 38));
        // The timeline.
        let (store, between, clean, _) = fresh().await;
        between.at(Call::Scan(Kind::Events), 0, clean);
        trimmed("timeline", store.timeline("g", None, None).await.map(drop));
        // An export goes on with what is kept of a state that it has not begun.
        let (store, between, clean, backend) = fresh().await;
        between.at(Call::Scan(Kind::Events), 0, clean);
        let mut out = Vec::new();
        let summary = store.export(None, &mut out, |_| {}).await.unwrap();
        assert_eq!((summary.states, summary.transitions), (2, 10));
        let report = other(&backend).0.verify(|_| {}).await.unwrap();
        assert_eq!(report.content_hash, summary.content_hash);
    }
}

/// A history is paged through while its beginning is cleaned up.
#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_overtaken_says_so() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let (store, persister) = other(&backend);
    fill(&persister, "s", 1, 1_100).await;
    let mut history = store.history("g", "s", ..).await.unwrap();
    let mut timeline = store.timeline("g", None, None).await.unwrap();
    assert_eq!(history.next_page().await.unwrap().len(), 500);
    assert_eq!(timeline.next_page().await.unwrap().len(), 256);
    persister.cleanup("g", &all_but(10), |_| {}).await.unwrap();
    trimmed("history", history.next_page().await);
    let ended = async {
        while !timeline.next_page().await?.is_empty() {}
        Ok(())
    };
    trimmed("timeline", ended.await);
}

/// A handle on which others write before each such call.
fn overtaken(
    backend: &Arc<dyn Backend>,
    config: &PersistenceConfig,
    call: Call,
) -> (StateStore, StateMachinePersister) {
    let between = between(backend);
    let writer = handle(FaultyBackend::new(Arc::clone(backend), []), config, |_| {}).1;
    between.always(call, move || {
        let writer = writer.clone();
        async move {
            for _ in 0..3 {
                let change = NewTransition::to("g", "s", "step", json!(0), why());
                writer.append(change).await.unwrap();
            }
        }
    });
    handle(between, config, |options| options.retry.deadline = Duration::from_secs(3))
}

/// A state whose saved snapshots come and go with every change is proved and loaded like any other.
#[tokio::test(flavor = "multi_thread")]
async fn a_hot_state_that_saves_every_change_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in backends(folder.path()).await {
        let config = config(1, 1);
        fill(&handle(between(&backend), &config, |_| {}).1, "s", 1, 20).await;
        let (store, persister) = overtaken(&backend, &config, Call::Get(Kind::Snapshots));
        let report = store.validate_state("g", "s").await.unwrap();
        assert!(report.ok, "{name}: {:?}", report.problems);
        persister.load_state("g", "s").await.unwrap();
        let report = persister.recover("g", "s").await.unwrap().1;
        assert_eq!((report.head, report.repaired), (HeadCondition::Sound, false), "{name}");
        let saved = persister.saved_snapshots("g", "s").await.unwrap();
        assert!(saved.iter().all(|saved| saved.problem.is_none()), "{name}: {saved:?}");
        proved_apart(&backend).await;
    }
}

/// Real damage is told although the state is written to all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_a_hot_state_is_told() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let config = config(0, 0);
    fill(&handle(between(&backend), &config, |_| {}).1, "s", 1, 20).await;
    let name = |id| Name::escape(id, "id").unwrap();
    let key = Key { governor: name("g"), kind: Kind::Events, name: name("s"), version: 7 };
    let precondition = tai_state::backend::Precondition::Any;
    backend.commit(vec![Write::delete(key, precondition)]).await.unwrap();
    let (_, persister) = overtaken(&backend, &config, Call::Scan(Kind::Events));
    let error = persister.load_state("g", "s").await.unwrap_err();
    assert!(error.code() == "corrupt" && error.to_string().contains("v7"), "{error}");
}

/// Reading one event after the other comes to an end, however fast others write.
#[tokio::test(flavor = "multi_thread")]
async fn loading_does_not_run_after_the_writers() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let mut config = config(0, 0);
    config.max_replay_batch_size = 0;
    fill(&handle(between(&backend), &config, |_| {}).1, "s", 1, 20).await;
    let (_, persister) = overtaken(&backend, &config, Call::Scan(Kind::Events));
    let load = persister.load_state("g", "s");
    let loaded = tokio::time::timeout(Duration::from_secs(10), load).await;
    assert_eq!(loaded.expect("it never ends").unwrap().0.version, 20);
}

const FAULTS: [CommitFault; 4] = [
    CommitFault::Unavailable,
    CommitFault::LostRequest,
    CommitFault::LostAnswer,
    CommitFault::Duplicated,
];

/// Each fault at each commit of everything that tidies up: the work is done, and counted once.
#[tokio::test(flavor = "multi_thread")]
async fn faults_of_any_commit_lose_and_double_nothing() {
    for fault in FAULTS {
        for place in 0..9 {
            let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
            let faulty = FaultyBackend::new(Arc::clone(&backend), []);
            let (store, persister) = handle(faulty.clone(), &config(5, 100), |_| {});
            fill(&persister, "s", 1, 42).await;
            let said = format!("{fault:?} at {place}");
            let is_twice = fault == CommitFault::Duplicated;
            let strike = |faulty: &FaultyBackend| {
                let calm = std::iter::repeat_n(CommitFault::None, place);
                faulty.inject(calm.chain([fault]));
            };
            let fresh = || {
                let faulty = FaultyBackend::new(Arc::clone(&backend), []);
                strike(&faulty);
                handle(faulty, &config(5, 100), |_| {}).1
            };
            strike(&faulty);
            let options = all_but(10).batch(10);
            let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
            let counted = (report.events, report.snapshots, report.snapshots_saved);
            // 33 is the cut: 1 to 32 go, and the saved snapshots 5 to 30.
            if !is_twice {
                assert_eq!(counted, (32, 6, 1), "{said}: {report:?}");
            }
            let calm = store.verify(|_| {}).await.unwrap();
            assert!(calm.ok && calm.leftovers == 0, "{said}: {:?}", calm.problems);
            let persister = fresh();
            let pruned = persister.prune_snapshots("g", "s", 1).await.unwrap();
            if !is_twice {
                assert_eq!(pruned.snapshots, 1, "{said}");
            }
            proved(&store).await;
            let persister = fresh();
            let report = persister.purge("g", "s", why(), |_| {}).await.unwrap();
            assert_eq!(report.version, 43, "{said}");
            if !is_twice {
                assert_eq!((report.events, report.snapshots), (10, 2), "{said}");
            }
            persister.verify_purge(&report).await.unwrap();
            proved(&store).await;
        }
    }
}

/// A head that is put back although the answer to that does not come, or not at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_repair_is_tried_again() {
    let name = |id| Name::escape(id, "id").unwrap();
    let key = Key { governor: name("g"), kind: Kind::States, name: name("s"), version: 0 };
    for fault in FAULTS {
        let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
        fill(&other(&backend).1, "s", 1, 42).await;
        let gone = Write::delete(key.clone(), tai_state::backend::Precondition::Any);
        backend.commit(vec![gone]).await.unwrap();
        let faulty = FaultyBackend::new(Arc::clone(&backend), [fault]);
        let (store, persister) = handle(faulty, &config(10, 3), |_| {});
        let (state, report) = persister.recover("g", "s").await.unwrap();
        assert_eq!(state.unwrap().data, json!(42), "{fault:?}");
        assert_eq!((report.head, report.repaired), (HeadCondition::Missing, true), "{fault:?}");
        proved(&store).await;
    }
}

/// The head is lost and the saved snapshot at the cut is damaged: what is kept stays kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_cut_gives_nothing_up() {
    let name = |id| Name::escape(id, "id").unwrap();
    let key = |kind, version| Key { governor: name("g"), kind, name: name("s"), version };
    let any = tai_state::backend::Precondition::Any;
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let (store, persister) = other(&backend);
    fill(&persister, "s", 1, 47).await;
    persister.cleanup("g", &all_but(15), |_| {}).await.unwrap();
    let text = tai_state::backend::Body::from_text("{\"format\":1}".into());
    let damage = Write::put(key(Kind::Snapshots, 33), text, any);
    backend.commit(vec![damage, Write::delete(key(Kind::States, 0), any)]).await.unwrap();
    let (state, report) = persister.recover("g", "s").await.unwrap();
    assert_eq!((state.unwrap().data, report.repaired), (json!(47), true));
    assert_eq!(store.record("g", "s").await.unwrap().unwrap().first_version, 33);
    assert_eq!(store.state_at_version("g", "s", 33).await.unwrap().data, json!(33));
    proved(&store).await;
}

/// Two that sweep at the same time count what each has removed.
#[tokio::test(flavor = "multi_thread")]
async fn two_sweeps_count_each_event_once() {
    let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let between = between(&backend);
    let (_, persister) = handle(between.clone(), &config(0, 0), |_| {});
    fill(&persister, "s", 1, 50).await;
    let second = other(&backend).1;
    let counted = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&counted);
    // After the events were read, before they are removed: the second removes the first of them.
    between.at(Call::Get(Kind::States), 6, move || {
        let (second, count) = (second.clone(), Arc::clone(&count));
        async move {
            // It is stopped after its first batch.
            let told = move |report: &tai_state::CleanupReport| {
                count.store(report.events, Ordering::SeqCst);
                assert!(report.events == 0, "stopped");
            };
            let cleaning = tokio::spawn(async move {
                second.cleanup("g", &all_but(10).batch(7), told).await.unwrap();
            });
            cleaning.await.unwrap_err();
        }
    });
    let report = persister.cleanup("g", &all_but(10).batch(20), |_| {}).await.unwrap();
    assert_eq!(report.events + counted.load(Ordering::SeqCst), 40);
    proved_apart(&backend).await;
}

/// The ends of time.
#[tokio::test(flavor = "multi_thread")]
async fn times_at_their_ends_are_times() {
    let folder = tempfile::tempdir().unwrap();
    let (first, last) = (DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
    for (name, backend) in backends(folder.path()).await {
        let (store, persister) = other(&backend);
        fill(&persister, "s", 1, 9).await;
        for options in [
            CleanupOptions::before(first),
            CleanupOptions::older_than(Duration::MAX),
            CleanupOptions::older_than(Duration::from_secs(5_000 * 366 * 86_400)),
            CleanupOptions::before(last).keep_versions(u64::MAX),
        ] {
            for options in [options.clone().dry_run(), options] {
                let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
                assert_eq!((report.states, report.events), (1, 0), "{name}");
            }
        }
        let none = persister.cleanup_old_data("g", u32::MAX).await.unwrap();
        assert_eq!(none.events, 0);
        let count = async |from, to| {
            let mut events = store.events_between("g", "s", from, to).await.unwrap();
            let mut count = 0;
            while events.next().await.unwrap().is_some() {
                count += 1;
            }
            count
        };
        assert_eq!(count(first, last).await, 9, "{name}");
        assert_eq!(count(last, last).await, 0, "{name}");
        assert_eq!(count(first, first).await, 0, "{name}");
        let early = store.state_at_time("g", "s", first).await.unwrap_err();
        assert_eq!(early.code(), "state_not_found", "{name}");
        assert_eq!(store.state_at_time("g", "s", last).await.unwrap().version, 9);
        assert!(store.consistent_cut("g", first).unwrap().next_page().await.unwrap().is_empty());
        assert_eq!(store.diff("g", "s", first, last).await.unwrap()[0]["value"], 9);
        let mut timeline = store.timeline("g", Some(first), Some(last)).await.unwrap();
        assert_eq!(timeline.next_page().await.unwrap().len(), 9, "{name}");
        persister.cleanup("g", &CleanupOptions::before(last), |_| {}).await.unwrap();
        // Since ever is since before what is kept.
        trimmed(name, store.events_between("g", "s", first, last).await.map(drop));
        trimmed(name, store.timeline("g", Some(first), None).await.map(drop));
        trimmed(name, store.state_at_time("g", "s", first).await);
    }
}

/// Writers, clean-ups, purges, proofs, loads and readers of one state, through handles of their own.
#[tokio::test(flavor = "multi_thread")]
async fn everybody_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in backends(folder.path()).await {
        let rounds: u64 = if name == "emulator" { 6 } else { 60 };
        let config = config(3, 2);
        let new = || handle(between(&backend), &config, |_| {});
        fill(&new().1, "s", 1, 20).await;
        let mut tasks = tokio::task::JoinSet::new();
        let written = Arc::new(AtomicU64::new(20));
        for _ in 0..2 {
            let ((store, _), written) = (new(), Arc::clone(&written));
            for _ in 0..2 {
                let (store, written) = (store.clone(), Arc::clone(&written));
                tasks.spawn(async move {
                    for n in 0..rounds {
                        store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
                        written.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        }
        for keep in [3, 8] {
            let persister = new().1;
            tasks.spawn(async move {
                for _ in 0..rounds {
                    let options = all_but(keep).batch(2);
                    let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
                    assert!(report.problems.is_empty(), "{:?}", report.problems);
                    persister.prune_snapshots("g", "s", 1).await.unwrap();
                    persister.save_snapshot("g", "s").await.unwrap();
                }
            });
        }
        let (persister, purged) = (new().1, Arc::clone(&written));
        tasks.spawn(async move {
            for _ in 0..rounds / 5 {
                let before = persister.saved_snapshots("g", "s").await.unwrap();
                assert!(before.iter().all(|saved| saved.problem.is_none()), "{before:?}");
                let report = persister.purge("g", "s", why(), |_| {}).await.unwrap();
                persister.verify_purge(&report).await.unwrap();
                purged.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        for _ in 0..2 {
            let (store, persister) = new();
            tasks.spawn(async move {
                for _ in 0..rounds {
                    for result in [
                        persister.load_state("g", "s").await.map(drop),
                        persister.recover("g", "s").await.map(drop),
                        persister.replay("g", "s", |_| Ok(())).await.map(drop),
                        store.diff("g", "s", 5, 8).await.map(drop),
                        store.record_at_time("g", "s", SystemClock.now()).await.map(drop),
                        async {
                            let mut history = store.history("g", "s", ..).await?;
                            while history.next().await?.is_some() {}
                            Ok(())
                        }
                        .await,
                    ] {
                        let code = result.as_ref().err().map_or("ok", Error::code);
                        let is_right = ["ok", "state_not_found", "history_trimmed"].contains(&code);
                        assert!(is_right, "{result:?}");
                    }
                    let report = store.verify(|_| {}).await.unwrap();
                    assert!(report.ok, "{:?}", report.problems);
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let head = new().0.record("g", "s").await;
        if let Ok(Some(record)) = head {
            assert!(record.snapshot.version <= written.load(Ordering::SeqCst), "{name}");
        }
        proved_apart(&backend).await;
    }
}
