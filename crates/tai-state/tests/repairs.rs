//! Repairs beside one another, beside writers and in any order: they come to one end and lose nothing.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use common::copies::{elsewhere, events, in_conflict, knows, read, repair, save, settled, with};
use common::{Make, open, proved, snapshot, why};
use serde_json::json;
use tai_state::backend::Backend;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::faults::{CommitFault, FaultyBackend};
use tai_state::{
    CONFLICT_CONTEXT, Error, Event, EventualConsistency, FieldMergeResolver, LastWriteWinsResolver,
    RepairOutcome, StateStore, StoreOptions, TransactionManager,
};

on_every_backend![
    every_order_of_repairs_ends_alike,
    two_stores_come_to_rest,
    repairs_that_race,
    a_repair_that_races_with_writers,
    a_fenced_repair,
];

async fn every_order_of_repairs_ends_alike(make: Make<'_>) {
    for resolver in ["last write", "causality"] {
        let ec = match resolver {
            "last write" => with(LastWriteWinsResolver),
            _ => EventualConsistency::new(),
        };
        let mut ends = Vec::new();
        let store = open(make);
        let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        for (number, order) in orders.into_iter().enumerate() {
            let id = format!("s{number}");
            let origin = {
                let mut origin = snapshot(&id, json!("origin"));
                origin.timestamp -= TimeDelta::days(1);
                origin
            };
            let copies = [("a", 10), ("b", 30), ("c", 20)]
                .map(|(node, seconds)| elsewhere(&origin, node, seconds, json!(node)));
            for copy in order.map(|at| &copies[at]) {
                repair(&ec, &store, copy).await;
            }
            let (end, _) = store.get_state("gov", &id).await.unwrap();
            assert!(copies.iter().all(|copy| knows(&end, copy)));
            assert_eq!(end.timestamp, copies[1].timestamp, "{order:?}");
            let log = store.history("gov", &id, ..).await.unwrap().next_page().await.unwrap();
            for copy in &copies {
                assert!(log.iter().any(|event| event.to_state.data == copy.data), "{order:?}");
            }
            ends.push(end.data);
        }
        assert_eq!(ends, vec![json!("b"); 6], "{resolver}");
        proved(&store).await;
    }
}

/// Two stores that are repaired with one another's copies: in the end both have the same, and write no more.
async fn two_stores_come_to_rest(make: Make<'_>) {
    let named = |name: &str| common::options(|options| options.node = Some(name.to_owned()));
    for (resolver, here_ahead) in
        [("causality", true), ("causality", false), ("merge", true), ("same", true)]
    {
        let (here, there) = (make(named("here")), make(named("there")));
        let ec = match resolver {
            "merge" => with(FieldMergeResolver::default()),
            _ => EventualConsistency::new(),
        };
        let exchange = async || {
            let from_here = repair(&ec, &there, &read(&here).await).await.outcome;
            let from_there = repair(&ec, &here, &read(&there).await).await.outcome;
            (from_here, from_there)
        };
        let origin = save(&here, json!({"here": 0, "there": 0})).await;
        use RepairOutcome::{Created, Unchanged};
        assert_eq!(exchange().await, (Created, Unchanged));
        let mut change = origin.clone();
        let (a, b) = match resolver {
            "same" => (json!({"n": 1}), json!({"n": 1})),
            _ => (json!({"here": 1, "there": 0}), json!({"here": 0, "there": 1})),
        };
        let (first, second) = if here_ahead { (&there, &here) } else { (&here, &there) };
        change.data = a;
        save(first, change.data.clone()).await;
        save(second, b).await;
        // Once for the conflict, once for its outcome to come back, and then there is silence.
        exchange().await;
        exchange().await;
        let counted = (events(&here).await.len(), events(&there).await.len());
        assert_eq!(exchange().await, (Unchanged, Unchanged), "{resolver}");
        assert_eq!((events(&here).await.len(), events(&there).await.len()), counted);
        let (end_here, end_there) = (read(&here).await, read(&there).await);
        assert_eq!(end_here.data, end_there.data);
        assert_eq!(end_here.causality, end_there.causality);
        if resolver == "merge" {
            assert_eq!(end_here.data, json!({"here": 1, "there": 1}));
        }
        proved(&here).await;
        proved(&there).await;
    }
}

async fn repairs_that_race(make: Make<'_>) {
    let store = open(make);
    let first = save(&store, json!("first")).await;
    let copies: Vec<_> = (0..6)
        .map(|n| elsewhere(&first, &format!("node{n}"), 10 + n, json!(format!("copy {n}"))))
        .collect();
    let ec = EventualConsistency::new();
    let mut tasks = tokio::task::JoinSet::new();
    for copy in &copies {
        // Twice each: the same repair from two places.
        for _ in 0..2 {
            let (ec, store, copy) = (ec.clone(), store.clone(), copy.clone());
            tasks.spawn(async move { ec.repair(&store, "gov", &copy, why()).await.unwrap() });
        }
    }
    let done = tasks.join_all().await;
    let newest = read(&store).await;
    assert_eq!(newest.data, json!("copy 5"));
    let log = events(&store).await;
    for copy in &copies {
        assert!(knows(&newest, copy));
        let of_copy = |event: &&Event| {
            let note = event.metadata.context.get(CONFLICT_CONTEXT);
            note.is_some_and(|note| note["mine"]["changed_by"] == copy.metadata.changed_by.as_str())
        };
        // Whether it has won or lost, it stands there once.
        assert_eq!(log.iter().filter(of_copy).count(), 1, "{:?}", copy.data);
        assert!(log.iter().any(|event| event.to_state.data == copy.data));
    }
    let is_known = |outcome| matches!(outcome, RepairOutcome::Stale | RepairOutcome::Unchanged);
    let stale = done.iter().filter(|repair| is_known(repair.outcome)).count();
    assert_eq!(stale, 6);
    assert_eq!(ec.statistics().read_repairs as usize, done.len() - stale);
    proved(&store).await;
}

async fn a_repair_that_races_with_writers(make: Make<'_>) {
    let store = open(make);
    let first = save(&store, json!({"count": 0, "note": ""})).await;
    let writers = (0..3).map(|_| {
        let store = store.clone();
        async move {
            let manager = TransactionManager::new(&store);
            for _ in 0..8 {
                let step = manager.execute_transaction("gov", |tx| async move {
                    let (mut state, version) = tx.get_state("gov", "s").await?;
                    state.data["count"] = json!(state.data["count"].as_u64().unwrap() + 1);
                    tx.update_state("gov", "s", state, version, why()).await
                });
                match step.await {
                    Ok(_) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
    let writers: Vec<_> = writers.map(tokio::spawn).collect();
    let ec = with(FieldMergeResolver::default().or_last_write());
    for n in 0..5 {
        let copy =
            elsewhere(&first, &format!("node{n}"), 0, json!({"count": 0, "note": n.to_string()}));
        repair(&ec, &store, &copy).await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let end = read(&store).await;
    // No count was lost to a merge that was decided on an older head.
    assert_eq!(end.data["count"], 24);
    let log = events(&store).await;
    for n in 0..5 {
        assert!(log.iter().any(|event| event.to_state.data["note"] == json!(n.to_string())));
    }
    proved(&store).await;
}

/// Whatever becomes of a commit or of its answer: it is applied once, and the answer says so.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_lost() {
    for fault in [
        CommitFault::Unavailable,
        CommitFault::LostRequest,
        CommitFault::LostAnswer,
        CommitFault::Duplicated,
    ] {
        for seconds in [60, -60] {
            let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
            let mut inner = Some(inner);
            let backend = inner.clone().unwrap();
            let make = &mut |options| StateStore::with_backend(inner.take().unwrap(), options);
            let (clean, copy) = in_conflict(make, seconds).await;
            let faulty = Arc::new(FaultyBackend::new(backend, [fault, fault]));
            let faulty = StateStore::with_backend(faulty, StoreOptions::default());
            let ec = EventualConsistency::new();
            let done = repair(&ec, &faulty, &copy).await;
            let versions = if seconds > 0 { 3 } else { 4 };
            assert_eq!(
                (done.newest.version, events(&clean).await.len()),
                (versions, versions as usize)
            );
            settled(&ec, &clean, &copy, &done).await;
            assert_eq!(ec.statistics().read_repairs, 1);
        }
    }
}

async fn a_fenced_repair(make: Make<'_>) {
    for seconds in [60, -60] {
        let (store, copy) = in_conflict(make, seconds).await;
        let manager = TransactionManager::new(&store);
        let lock = manager.acquire_lock("r", "me", Duration::from_secs(60)).await.unwrap();
        let fenced = store.fenced_by(&lock);
        lock.release().await.unwrap();
        let ec = EventualConsistency::new();
        let refused = ec.repair(&fenced, "gov", &copy, why()).await.unwrap_err();
        assert!(matches!(refused, Error::LockLost { .. }), "{refused}");
        assert_eq!(events(&store).await.len(), 2);
        assert_eq!(ec.statistics().read_repairs, 0);
        let lock = manager.acquire_lock("r", "me", Duration::from_secs(60)).await.unwrap();
        let done = repair(&ec, &store.fenced_by(&lock), &copy).await;
        settled(&ec, &store, &copy, &done).await;
        lock.release().await.unwrap();
    }
}
