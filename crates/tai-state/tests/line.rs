//! Writers of one state within a process: they stand in line, share commits, and nobody is told of
//! what is not durable.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Make, Random, counter, open, options, proved, snapshot, why};
use serde_json::json;
use tai_state::backend::Backend;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::faults::{CommitFault, FaultyBackend};
use tai_state::{
    Error, PersistenceConfig, StateStore, StoreOptions, TransactionManager, TransactionStatus,
};

on_every_backend![
    transactions_on_a_hot_state_all_succeed,
    mixed_writers_of_a_hot_state_lose_nothing,
    expectations_hold_in_the_line,
    transactions_over_hot_states_all_succeed,
    a_closure_that_dawdles_stops_nobody_for_long,
    a_closure_may_write_around_itself,
    a_dropped_call_happens_whole_or_not_at_all,
    one_that_is_refused_spoils_no_other,
    saved_snapshots_in_shared_commits,
];

fn count(state: &tai_state::StateSnapshot) -> u64 {
    state.data["count"].as_u64().unwrap()
}

async fn transactions_on_a_hot_state_all_succeed(make: Make<'_>) {
    const TASKS: u64 = 8;
    const STEPS: u64 = 25;
    // Whoever collides blindly with seven others needs more attempts than these.
    let store = make(options(|o| o.retry.max_attempts = 3));
    store.save_state("g", "hot", counter(0), why()).await.unwrap();
    let manager = TransactionManager::new(&store).with_log_of(1_000);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let manager = manager.clone();
        tasks.spawn(async move {
            let mut seen = Vec::new();
            for _ in 0..STEPS {
                let add = manager.execute_transaction("g", |tx| async move {
                    let (mut state, version) = tx.get_state("g", "hot").await?;
                    state.data["count"] = json!(count(&state) + 1);
                    tx.update_state("g", "hot", state, version, why()).await
                });
                seen.push(add.await.unwrap());
            }
            seen
        });
    }
    let mut versions: Vec<u64> = tasks.join_all().await.into_iter().flatten().collect();
    versions.sort_unstable();
    assert_eq!(versions, (2..=TASKS * STEPS + 1).collect::<Vec<_>>(), "a version was told twice");
    let (state, version) = store.get_state("g", "hot").await.unwrap();
    assert_eq!((count(&state), version), (TASKS * STEPS, TASKS * STEPS + 1));
    let log = manager.transaction_log();
    assert_eq!(log.len() as u64, TASKS * STEPS);
    assert!(log.iter().all(|record| record.status == TransactionStatus::Committed));
    proved(&store).await;
}

async fn mixed_writers_of_a_hot_state_lose_nothing(make: Make<'_>) {
    let store = make(options(|o| o.retry.max_attempts = 100));
    store.save_state("g", "hot", snapshot("hot", json!([])), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6u64 {
        let (store, manager) = (store.clone(), manager.clone());
        tasks.spawn(async move {
            for step in 0..10u64 {
                let mine = task * 100 + step;
                if task % 2 == 0 {
                    let append = manager.execute_transaction("g", |tx| async move {
                        let (mut state, version) = tx.get_state("g", "hot").await?;
                        state.data.as_array_mut().unwrap().push(json!(mine));
                        // Every third reads another state too, and so leaves the line.
                        if mine % 3 == 0 {
                            tx.exists("g", "other").await?;
                        }
                        tx.update_state("g", "hot", state, version, why()).await
                    });
                    append.await.unwrap();
                } else {
                    loop {
                        let (mut state, version) = store.get_state("g", "hot").await.unwrap();
                        state.data.as_array_mut().unwrap().push(json!(mine));
                        match store.update_state("g", "hot", state, version, why()).await {
                            Ok(_) => break,
                            Err(Error::VersionConflict { expected, actual, .. }) => {
                                assert!(expected < actual, "a conflict with what is not there");
                                tokio::time::sleep(Duration::from_millis(1 + mine % 7)).await;
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            }
        });
    }
    tasks.join_all().await;
    let (state, version) = store.get_state("g", "hot").await.unwrap();
    let mut all: Vec<u64> =
        state.data.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    all.sort_unstable();
    let expected: Vec<u64> = (0..6).flat_map(|task| (0..10).map(move |n| task * 100 + n)).collect();
    assert_eq!((all, version), (expected, 61));
    proved(&store).await;
}

/// Of many who expect the same version one succeeds, and the others are told of what is durable.
async fn expectations_hold_in_the_line(make: Make<'_>) {
    let store = open(make);
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    for round in 1..=10u64 {
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..8 {
            let store = store.clone();
            tasks.spawn(async move {
                store.update_state("g", "s", counter(round * 100 + task), round, why()).await
            });
        }
        let (mut done, mut refused) = (0, 0);
        for outcome in tasks.join_all().await {
            match outcome {
                Ok(version) => {
                    assert_eq!(version, round + 1);
                    done += 1;
                }
                Err(Error::VersionConflict { expected, actual, .. }) => {
                    assert_eq!((expected, actual), (round, round + 1));
                    refused += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((done, refused), (1, 7));
    }
    proved(&store).await;
}

async fn transactions_over_hot_states_all_succeed(make: Make<'_>) {
    let store = make(options(|o| o.retry.max_attempts = 4));
    for id in ["a", "b", "c"] {
        store.save_state("g", id, counter(100), why()).await.unwrap();
    }
    let manager = TransactionManager::new(&store);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6usize {
        let manager = manager.clone();
        tasks.spawn(async move {
            for step in 0..10usize {
                let names = ["a", "b", "c"];
                let (from, to) = (names[(task + step) % 3], names[(task + 2 * step + 1) % 3]);
                if from == to {
                    continue;
                }
                let moved = manager.execute_transaction("g", |tx| async move {
                    let (mut a, version_a) = tx.get_state("g", from).await?;
                    let (mut b, version_b) = tx.get_state("g", to).await?;
                    let (count_a, count_b) = (count(&a), count(&b));
                    a.data["count"] = json!(count_a - 1);
                    b.data["count"] = json!(count_b + 1);
                    tx.update_state("g", from, a, version_a, why()).await?;
                    tx.update_state("g", to, b, version_b, why()).await
                });
                moved.await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let all = store.batch_get_states("g", &["a", "b", "c"]).await.unwrap();
    assert_eq!(all.iter().map(count).sum::<u64>(), 300);
    proved(&store).await;
}

/// One that has the turn and waits for something else is passed after a while.
async fn a_closure_that_dawdles_stops_nobody_for_long(make: Make<'_>) {
    let store = open(make);
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let (passed, may_go) = tokio::sync::oneshot::channel::<()>();
    let may_go = Arc::new(tokio::sync::Mutex::new(Some(may_go)));
    let runs = Arc::new(AtomicU64::new(0));
    let (reached, is_there) = tokio::sync::oneshot::channel::<()>();
    let reached = Arc::new(tokio::sync::Mutex::new(Some(reached)));
    let outside = store.clone();
    let counted = Arc::clone(&runs);
    let slow = tokio::spawn(async move {
        manager
            .execute_transaction("g", |tx| {
                let (may_go, reached) = (Arc::clone(&may_go), Arc::clone(&reached));
                let (outside, runs) = (outside.clone(), Arc::clone(&counted));
                async move {
                    let (mut state, version) = tx.get_state("g", "s").await?;
                    if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                        // The first attempt is beaten, so that the second one takes its turn.
                        outside.save_state("g", "s", counter(10), why()).await?;
                    } else if let Some(may_go) = may_go.lock().await.take() {
                        reached.lock().await.take().unwrap().send(()).unwrap();
                        may_go.await.unwrap();
                    }
                    state.data["count"] = json!(count(&state) + 1);
                    tx.update_state("g", "s", state, version, why()).await
                }
            })
            .await
    });
    is_there.await.unwrap();
    // It holds its turn now, and will not give it up before this is done.
    for n in 20..23 {
        let saved = store.save_state("g", "s", counter(n), why());
        tokio::time::timeout(Duration::from_secs(20), saved).await.unwrap().unwrap();
    }
    passed.send(()).unwrap();
    slow.await.unwrap().unwrap();
    assert_eq!(count(&store.get_state("g", "s").await.unwrap().0), 23);
    assert!(runs.load(Ordering::SeqCst) >= 3);
    proved(&store).await;
}

/// A closure that writes to the same state by another way does not wait for itself for ever.
async fn a_closure_may_write_around_itself(make: Make<'_>) {
    let store = open(make);
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let runs = AtomicU64::new(0);
    let done = manager
        .run(|tx| {
            let (store, run) = (store.clone(), runs.fetch_add(1, Ordering::SeqCst));
            async move {
                let (state, version) = tx.get_state("g", "s").await?;
                if run < 2 {
                    store.save_state("g", "s", counter(run), why()).await?;
                }
                tx.update_state("g", "s", state, version, why()).await
            }
        })
        .await
        .unwrap();
    assert_eq!((done.value, done.attempts), (4, 3));
    proved(&store).await;
}

/// A call that is dropped at any point has happened whole or not at all; the next one works.
async fn a_dropped_call_happens_whole_or_not_at_all(make: Make<'_>) {
    let store = open(make);
    for id in ["a", "b"] {
        store.save_state("g", id, counter(0), why()).await.unwrap();
    }
    let manager = TransactionManager::new(&store);
    let (mut finished, mut abandoned) = (0, 0);
    for polls in 0..14 {
        let both = manager.execute_once("g", format!("k{polls}"), |tx| async move {
            for id in ["a", "b"] {
                let (mut state, version) = tx.get_state("g", id).await?;
                state.data["count"] = json!(count(&state) + 1);
                tx.update_state("g", id, state, version, why()).await?;
            }
            Ok(())
        });
        let single = store.save_state("g", "c", counter(polls), why());
        let (mut both, mut single) = (Box::pin(both), Box::pin(single));
        let (mut both_done, mut single_done) = (false, false);
        for _ in 0..polls {
            std::future::poll_fn(|context| {
                both_done = both_done || both.as_mut().poll(context).is_ready();
                single_done = single_done || single.as_mut().poll(context).is_ready();
                std::task::Poll::Ready(())
            })
            .await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        finished += u64::from(both_done);
        abandoned += usize::from(polls > 0 && !both_done);
        drop((both, single));
        let all = store.batch_get_states("g", &["a", "b"]).await.unwrap();
        assert_eq!(count(&all[0]), count(&all[1]), "half of it was applied after {polls} polls");
        assert!(count(&all[0]) >= finished);
        // Neither the line nor a turn was left behind.
        let next = store.save_state("g", "c", counter(999), why());
        tokio::time::timeout(Duration::from_secs(20), next).await.unwrap().unwrap();
    }
    let log = manager.transaction_log();
    let gone = log.iter().filter(|record| record.status == TransactionStatus::Abandoned);
    assert_eq!(gone.count(), abandoned);
    proved(&store).await;
}

/// What cannot be kept is refused by itself, however many share its commit.
async fn one_that_is_refused_spoils_no_other(make: Make<'_>) {
    let store = open(make);
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..16u64 {
        let store = store.clone();
        tasks.spawn(async move {
            let data = if task % 4 == 1 { json!("x".repeat(1_000_000)) } else { json!(task) };
            (task, store.save_state("g", "s", snapshot("s", data), why()).await)
        });
    }
    for (task, outcome) in tasks.join_all().await {
        match (task % 4, outcome) {
            (1, Err(error)) => assert_eq!(error.code(), "too_large"),
            (1, Ok(_)) => panic!("it was kept"),
            (_, outcome) => assert!(outcome.unwrap() > 1),
        }
    }
    assert_eq!(store.get_state("g", "s").await.unwrap().1, 13);
    proved(&store).await;
}

async fn saved_snapshots_in_shared_commits(make: Make<'_>) {
    let persistence = PersistenceConfig {
        snapshot_interval: 3,
        snapshot_retention: 2,
        ..PersistenceConfig::default()
    };
    let store = make(options(|o| o.persistence = persistence));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..12u64 {
        let store = store.clone();
        tasks.spawn(async move {
            for step in 0..5 {
                store.save_state("g", "s", counter(task * 10 + step), why()).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!((report.events, report.snapshots), (60, 2));
}

/// Writers of one state whose shared commits are refused, lost and doubled at random: each change is
/// applied once, and each was told what is stored.
#[tokio::test(flavor = "multi_thread")]
async fn shared_commits_with_lost_answers() {
    let mut random = Random::announced("shared commits");
    let all = [
        CommitFault::None,
        CommitFault::Unavailable,
        CommitFault::LostRequest,
        CommitFault::LostAnswer,
        CommitFault::Duplicated,
    ];
    for _ in 0..30 {
        let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
        let faults: Vec<CommitFault> = (0..60).map(|_| all[random.below(5) as usize]).collect();
        let mut options = StoreOptions::default();
        options.retry.base = Duration::from_micros(100);
        options.retry.cap = Duration::from_millis(1);
        let store = StateStore::with_backend(
            Arc::new(FaultyBackend::new(Arc::clone(&inner), faults)),
            options.clone(),
        );
        // Another process, by its own handle.
        let rival = StateStore::with_backend(Arc::clone(&inner), options);
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..10u64 {
            let store = if task == 9 { rival.clone() } else { store.clone() };
            let manager = TransactionManager::new(&store);
            tasks.spawn(async move {
                let (mut told, mut unknown) = (0u64, 0u64);
                for step in 0..8u64 {
                    let mine = json!(task * 100 + step);
                    let outcome = if task % 2 == 0 {
                        store.save_state("g", "s", snapshot("s", mine), why()).await
                    } else {
                        let write = manager.execute_transaction("g", |tx| {
                            let mine = mine.clone();
                            async move {
                                let version = match tx.get_state("g", "s").await {
                                    Ok((_, version)) => version,
                                    Err(_) => 0,
                                };
                                tx.update_state("g", "s", snapshot("s", mine), version, why()).await
                            }
                        });
                        write.await
                    };
                    match outcome {
                        Ok(_) => told += 1,
                        Err(Error::OutcomeUnknown { .. }) => unknown += 1,
                        // Given up after so many attempts: surely not applied.
                        Err(Error::TransactionFailed { .. } | Error::Firestore { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                (told, unknown)
            });
        }
        let (told, unknown): (Vec<u64>, Vec<u64>) = tasks.join_all().await.into_iter().unzip();
        let (told, unknown) = (told.iter().sum::<u64>(), unknown.iter().sum::<u64>());
        let report = rival.verify(|_| {}).await.unwrap();
        assert!(report.ok, "{:?}", report.problems);
        assert!(
            (told..=told + unknown).contains(&report.events),
            "{} events, {told} told, {unknown} unknown",
            report.events
        );
        assert!(told > 40, "{told} told, {unknown} unknown");
    }
}

/// A store whose second commit waits, and then fails for good; and what it stands on.
async fn second_commit_fails() -> (FaultyBackend, StateStore) {
    let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let options = options(|o| o.retry.base = Duration::from_micros(10));
    let fails = vec![CommitFault::Unavailable; options.retry.max_attempts as usize];
    let backend = FaultyBackend::new(inner, [CommitFault::None].into_iter().chain(fails));
    let store = StateStore::with_backend(Arc::new(backend.clone()), options);
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    backend.hold();
    (backend, store)
}

/// Starts a change that will fail, and waits until it stands at the end of the line.
async fn under_way(store: &StateStore) -> tokio::task::JoinHandle<Result<u64, Error>> {
    let writer = store.clone();
    let doomed = tokio::spawn(async move { writer.save_state("g", "s", counter(5), why()).await });
    // It is handed in before it waits for its commit.
    while !store.is_changing("g", "s") {
        tokio::task::yield_now().await;
    }
    doomed
}

/// A conflict with a version that never became durable is none.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_conflicts_with_what_never_was() {
    let (backend, store) = second_commit_fails().await;
    let doomed = under_way(&store).await;
    let other = store.clone();
    let update =
        tokio::spawn(async move { other.update_state("g", "s", counter(7), 1, why()).await });
    // It stands in line and waits for what becomes of version 2.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!update.is_finished(), "it was told of what is not durable");
    backend.let_go();
    assert!(doomed.await.unwrap().is_err());
    assert_eq!(update.await.unwrap().unwrap(), 2);
    assert_eq!(count(&store.get_state("g", "s").await.unwrap().0), 7);
    proved(&store).await;
}

/// An error that a closure decided on a head that never became durable does not count.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_fails_for_what_never_was() {
    for looks_elsewhere in [true, false] {
        let (backend, store) = second_commit_fails().await;
        let doomed = under_way(&store).await;
        let manager = TransactionManager::new(&store);
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let noted = Arc::clone(&seen);
        let backend = backend.clone();
        let ran = tokio::spawn(async move {
            manager
                .execute_transaction("g", |tx| {
                    let (noted, backend) = (Arc::clone(&noted), backend.clone());
                    async move {
                        let (mut state, version) = tx.get_state("g", "s").await?;
                        let found = count(&state);
                        noted.lock().unwrap().push(found);
                        state.data["count"] = json!(found + 1);
                        if found == 5 {
                            backend.let_go();
                            // Not enough money, not found, whatever: decided on what is seen.
                            match looks_elsewhere {
                                true => tx.get_state("g", "there is no such state").await?.1,
                                false => {
                                    tx.update_state("g", "s", state.clone(), 99, why()).await?
                                }
                            };
                        }
                        tx.update_state("g", "s", state, version, why()).await?;
                        Ok(found)
                    }
                })
                .await
        });
        assert_eq!(ran.await.unwrap().unwrap(), 0);
        assert!(doomed.await.unwrap().is_err());
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen, [0, 5, 0], "the test has not met the case");
        assert_eq!(count(&store.get_state("g", "s").await.unwrap().0), 1);
    }
}
