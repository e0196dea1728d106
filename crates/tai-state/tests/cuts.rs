//! A head that is lost while history was cut: a recovery lets it begin where it was cut, gives up nothing that
//! is kept, and does not take what is lost for what was cleaned up.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use common::{Random, counter, proved, why};
use tai_state::{
    CleanupOptions, Event, NewTransition, PersistenceConfig, StateMachinePersister, StateRecord,
    StateStore, TransactionManager,
};

const NEWEST: u64 = 12;
const HEAD_DAMAGED: &str = "UPDATE state SET body = body || 'x'";

fn transition(state: &str, n: u64) -> NewTransition {
    NewTransition::to("g", state, "a", counter(n).data, why())
}

/// Keeps so many versions, and is stopped when it has told of its progress so often.
async fn clean_up(store: &StateStore, kept: u64, stop_after: Option<u64>) {
    let persister = StateMachinePersister::with_defaults(store);
    let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(kept).batch(1);
    let mut told = 0;
    let run = tokio::spawn(async move {
        let stops = |_: &_| {
            told += 1;
            assert!(Some(told) != stop_after, "stopped on purpose");
        };
        persister.cleanup("g", &options, stops).await
    });
    assert_eq!(run.await.is_err(), stop_after.is_some());
}

fn change(path: &Path, changes: &[&str]) {
    let file = rusqlite::Connection::open(path).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    for change in changes {
        assert_eq!(file.execute(change, ()).unwrap(), 1, "{change}");
    }
}

/// Twelve versions, snapshots saved by hand, cut at v7, and then its rows changed.
async fn damaged(
    folder: &Path,
    saved: &[u64],
    kept: Option<u64>,
    stop_after: Option<u64>,
    changes: &[&str],
) -> PathBuf {
    let path = folder.join("store.tai");
    let store = StateStore::open(&path).await.unwrap();
    let persister = StateMachinePersister::with_defaults(&store);
    for n in 1..=NEWEST {
        persister.append(transition("s", n)).await.unwrap();
        if saved.contains(&n) {
            persister.save_snapshot("g", "s").await.unwrap();
        }
    }
    if let Some(kept) = kept {
        clean_up(&store, kept, stop_after).await;
    }
    drop((store, persister));
    change(&path, changes);
    path
}

/// Since when history is kept, after a recovery that must succeed and leave all of it readable.
async fn recovered(path: &Path) -> u64 {
    let store = StateStore::open(path).await.unwrap();
    let persister = StateMachinePersister::with_defaults(&store);
    let (state, _) = persister.load_state("g", "s").await.unwrap();
    assert_eq!(state.data, counter(NEWEST).data);
    let first = store.record("g", "s").await.unwrap().unwrap().first_version;
    for version in first..=NEWEST {
        let then = store.state_at_version("g", "s", version).await.unwrap();
        assert_eq!(then.data, counter(version).data);
    }
    proved(&store).await;
    first
}

async fn is_corrupt(path: &Path) {
    let store = StateStore::open(path).await.unwrap();
    let persister = StateMachinePersister::with_defaults(&store);
    for _ in 0..2 {
        let error = persister.load_state("g", "s").await.unwrap_err();
        assert_eq!(error.code(), "corrupt");
        assert!(error.to_string().contains("no saved snapshot says"), "{error}");
    }
    // Nothing was given up.
    change(path, &["UPDATE state SET body = substr(body, 1, length(body) - 1)"]);
    let first = store.record("g", "s").await.unwrap().unwrap().first_version;
    assert!(first == 1 || first == 7, "{first}");
}

#[tokio::test(flavor = "multi_thread")]
async fn history_begins_where_it_was_cut() {
    let damaged_at =
        |version: u64| format!("UPDATE snapshot SET body = '{{' WHERE version = {version}");
    let gone_at = |version: u64| format!("DELETE FROM snapshot WHERE version = {version}");
    let (at_7, gone_7) = (damaged_at(7), gone_at(7));
    // Of the first event in the way of the clean-up, and of some of what it has removed; or of all.
    for stop_after in [Some(1), Some(3), None] {
        // Snapshots before the cut, at it and behind it, saved before it.
        for saved in [&[][..], &[3], &[7], &[10], &[3, 7, 10]] {
            for changes in [&[HEAD_DAMAGED][..], &[HEAD_DAMAGED, &at_7]] {
                let folder = tempfile::tempdir().unwrap();
                let path = damaged(folder.path(), saved, Some(6), stop_after, changes).await;
                assert_eq!(recovered(&path).await, 7, "{stop_after:?} {saved:?} {changes:?}");
            }
        }
    }
    // One that was saved since the cut knows of it, also when the one at the cut is lost.
    let folder = tempfile::tempdir().unwrap();
    let path = damaged(folder.path(), &[], Some(6), None, &[]).await;
    let store = StateStore::open(&path).await.unwrap();
    StateMachinePersister::with_defaults(&store).save_snapshot("g", "s").await.unwrap();
    drop(store);
    change(&path, &[HEAD_DAMAGED, &gone_7]);
    assert_eq!(recovered(&path).await, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_is_not_taken_for_what_was_cleaned_up() {
    let first_lost = "DELETE FROM event WHERE version = 1";
    for saved in [&[][..], &[3], &[10], &[3, 10]] {
        let folder = tempfile::tempdir().unwrap();
        let path = damaged(folder.path(), saved, None, None, &[HEAD_DAMAGED, first_lost]).await;
        is_corrupt(&path).await;
    }
    // The snapshot at the cut is lost; the one behind it was saved before, and says that all is kept.
    for stop_after in [Some(2), None] {
        let folder = tempfile::tempdir().unwrap();
        let changes = [HEAD_DAMAGED, "DELETE FROM snapshot WHERE version = 7"];
        let path = damaged(folder.path(), &[10], Some(6), stop_after, &changes).await;
        is_corrupt(&path).await;
    }
}

/// What a store says of a state: what its record says, and all events.
async fn said(store: &StateStore, state: &str) -> Option<(StateRecord, Vec<Event>)> {
    let record = store.record("g", state).await.unwrap()?;
    let mut events = Vec::new();
    let mut history = store.history("g", state, ..).await.unwrap();
    while let Some(event) = history.next().await.unwrap() {
        events.push(event);
    }
    Some((record, events))
}

/// Writes, deletions, purges, reverts, snapshots saved and removed, clean-ups and purges that are stopped, in
/// any order; then heads, saved snapshots and what was given up are damaged: a recovery brings back what was.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_done_before_a_recovery_brings_back_all_of_it() {
    let mut random = Random::announced("cuts");
    for _ in 0..25 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.tai");
        for _ in 0..5 {
            a_while(&path, &mut random).await;
        }
    }
}

async fn a_while(path: &Path, random: &mut Random) {
    let store = StateStore::open(path).await.unwrap();
    let config = PersistenceConfig {
        snapshot_interval: [0, 1, 2, 3, 7][random.below(5) as usize],
        snapshot_retention: [0, 1, 2, 50][random.below(4) as usize],
        max_replay_batch_size: 1 + random.below(4) as usize,
        ..PersistenceConfig::default()
    };
    let persister = StateMachinePersister::new(&store, config.clone());
    for _ in 0..random.below(30) {
        let state = ["s", "t"][random.below(2) as usize];
        one_thing(&store, &persister, state, random).await;
    }
    // Heads as they are now, to be put back when the log has gone on.
    drop((store, persister));
    let old = heads(path);
    let store = StateStore::open(path).await.unwrap();
    let persister = StateMachinePersister::new(&store, config);
    let is_old = random.below(3) == 0;
    if is_old {
        for _ in 0..random.below(15) {
            let state = ["s", "t"][random.below(2) as usize];
            one_thing(&store, &persister, state, random).await;
        }
        for state in ["s", "t"] {
            persister.append(transition(state, 5)).await.unwrap();
            if random.below(2) == 0 {
                clean_up(&store, 1 + random.below(3), None).await;
            }
        }
    }
    let before = [said(&store, "s").await, said(&store, "t").await];
    proved(&store).await;
    drop((store, persister));

    let damages = [
        ["UPDATE state SET body = body || 'x'", "UPDATE snapshot SET body = '{'"],
        ["UPDATE state SET body = NULL", "UPDATE snapshot SET body = '{' WHERE version % 2 = 0"],
        [
            "UPDATE state SET revision = revision + 3",
            "UPDATE snapshot SET crc = crc + 1 WHERE version % 2 = 1",
        ],
        ["UPDATE state SET crc = crc + 1", "UPDATE snapshot SET body = '' WHERE version % 3 = 0"],
    ];
    let file = rusqlite::Connection::open(path).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    let [mut heads, mut snapshots] =
        [0, 1].map(|which| damages.get(random.below(5) as usize).map(|damage| damage[which]));
    if is_old {
        // Then what says where history begins must be readable.
        (heads, snapshots) = (None, None);
        for (id, revision, body, crc) in &old {
            let put = "UPDATE state SET revision = ?2, body = ?3, crc = ?4 WHERE id = ?1";
            assert_eq!(file.execute(put, (id, revision, body, crc)).unwrap(), 1);
        }
    }
    for damage in [heads, snapshots].into_iter().flatten() {
        file.execute(damage, ()).unwrap();
    }
    drop(file);

    let store = StateStore::open(path).await.unwrap();
    let persister = StateMachinePersister::with_defaults(&store);
    for (state, before) in ["s", "t"].into_iter().zip(before) {
        let Some(before) = before else { continue };
        persister.recover("g", state).await.unwrap();
        let after = said(&store, state).await.unwrap();
        assert_eq!(after, before, "{heads:?}, {snapshots:?}, {is_old}");
    }
    proved(&store).await;
}

/// The rows of all heads.
fn heads(path: &Path) -> Vec<(i64, i64, String, i64)> {
    let file = rusqlite::Connection::open(path).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    let mut rows = file.prepare("SELECT id, revision, body, crc FROM state").unwrap();
    let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?));
    rows.query_map((), read).unwrap().map(Result::unwrap).collect()
}

async fn one_thing(
    store: &StateStore,
    persister: &StateMachinePersister,
    state: &str,
    random: &mut Random,
) {
    // What is refused, such as the deletion of nothing, changes nothing.
    match random.below(20) {
        0 => drop(store.delete_state("g", state, None, why()).await),
        1 => clean_up(store, 1 + random.below(4), None).await,
        2 => drop(persister.purge("g", state, why(), |_| {}).await),
        3 => drop(persister.save_snapshot("g", state).await),
        4 => drop(persister.prune_snapshots("g", state, random.below(3) as usize).await),
        5 | 6 => {
            let (after, kept) = (1 + random.below(3), 1 + random.below(4));
            let stopped = StateMachinePersister::with_defaults(store);
            let (is_purge, state) = (random.below(3) == 0, state.to_owned());
            let run = tokio::spawn(async move {
                let mut told = 0;
                let mut stop = move || {
                    told += 1;
                    assert!(told != after, "stopped on purpose");
                };
                let options =
                    CleanupOptions::older_than(Duration::ZERO).keep_versions(kept).batch(1);
                match is_purge {
                    true => drop(stopped.purge("g", state, why(), |_| stop()).await),
                    false => drop(stopped.cleanup("g", &options, |_| stop()).await),
                }
            });
            drop(run.await);
        }
        7 => {
            let manager = TransactionManager::new(store);
            let both = manager.execute_transaction("g", |tx| async move {
                for state in ["s", "t", "s"] {
                    tx.save_state("g", state, counter(77), why()).await?;
                }
                Ok(())
            });
            both.await.unwrap();
        }
        8 => {
            if let Some(record) = store.record("g", state).await.unwrap() {
                let kept = record.snapshot.version - record.first_version + 1;
                let version = record.first_version + random.below(kept);
                drop(store.revert("g", state, version, why()).await);
            }
        }
        _ => drop(persister.append(transition(state, random.below(1_000))).await.unwrap()),
    }
}

/// Nobody is told of damage where others only write and clean up.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn beside_clean_ups_nothing_is_found_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.tai");
    for store in [StateStore::in_memory(), StateStore::open(&path).await.unwrap()] {
        let config = PersistenceConfig {
            snapshot_interval: 1,
            snapshot_retention: 3,
            ..PersistenceConfig::default()
        };
        let persister = StateMachinePersister::new(&store, config);
        let is_over = Arc::new(AtomicBool::new(false));
        let until = || Arc::clone(&is_over);
        persister.append(transition("s", 0)).await.unwrap();
        let (writer, is_written) = (persister.clone(), until());
        let writing = tokio::spawn(async move {
            while !is_written.load(Relaxed) {
                writer.append(transition("s", 1)).await.unwrap();
            }
        });
        let (cleaned, is_clean) = (store.clone(), until());
        let cleaning = tokio::spawn(async move {
            while !is_clean.load(Relaxed) {
                clean_up(&cleaned, 2, None).await;
            }
        });
        let first = async || store.record("g", "s").await.unwrap().unwrap().first_version;
        let mut rounds = 0;
        // The others have to get on too, also on a machine that is slow.
        while rounds < 60 || (rounds < 600 && first().await <= 30) {
            rounds += 1;
            proved(&store).await;
            let (_, report) = persister.recover("g", "s").await.unwrap();
            let is_whole = report.passed_over.is_empty() && report.disputed.is_empty();
            assert!(is_whole && !report.repaired, "{report:?}");
        }
        is_over.store(true, Relaxed);
        writing.await.unwrap();
        cleaning.await.unwrap();
        println!("{rounds} rounds, history begins at v{}", first().await);
        assert!(first().await > 30);
    }
}
