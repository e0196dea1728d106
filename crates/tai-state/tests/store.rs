//! What `StateStore` promises, on every backend.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use chrono::TimeDelta;
use common::{Make, counter, open, options, proved, snapshot, why};
use serde_json::json;
use tai_state::{Clock, Error, ListOptions, StateMachinePersister, TransactionManager};

on_every_backend![
    several_states_are_read_as_of_one_moment,
    too_many_states_at_once_are_refused,
    save_get_update_delete,
    versions_have_no_gaps,
    the_address_in_the_call_wins,
    update_conflicts_name_both_versions,
    a_deleted_state_goes_on_at_its_version,
    lists_are_paged_and_ordered,
    batch_get_keeps_the_order,
    stats_count_everything,
    clocks_grow_with_every_change,
    sixteen_tasks_lose_no_update,
    racing_saves_all_count,
    every_call_can_be_spawned,
];

async fn save_get_update_delete(make: Make<'_>) {
    let store = open(make);
    let missing = store.get_state("gov", "counter").await.unwrap_err();
    assert!(matches!(missing, Error::StateNotFound { .. }), "{missing}");
    assert_eq!(store.save_state("gov", "counter", counter(1), why()).await.unwrap(), 1);
    let (state, version) = store.get_state("gov", "counter").await.unwrap();
    assert_eq!((state.data, version, state.version), (json!({"count": 1}), 1, 1));
    assert_eq!(state.metadata, why());
    assert_eq!(store.update_state("gov", "counter", counter(2), 1, why()).await.unwrap(), 2);
    assert!(store.exists("gov", "counter").await.unwrap());
    assert_eq!(store.delete_state("gov", "counter", Some(2), why()).await.unwrap(), 3);
    assert!(!store.exists("gov", "counter").await.unwrap());
    let gone = store.delete_state("gov", "counter", None, why()).await.unwrap_err();
    assert!(matches!(gone, Error::StateNotFound { .. }));
    proved(&store).await;
}

async fn versions_have_no_gaps(make: Make<'_>) {
    let store = open(make);
    for n in 1..=12 {
        // The same data each time: a change all the same.
        assert_eq!(store.save_state("gov", "counter", counter(0), why()).await.unwrap(), n);
    }
    let report = store.verify(|_| {}).await.unwrap();
    assert_eq!((report.ok, report.states, report.events), (true, 1, 12));
}

async fn the_address_in_the_call_wins(make: Make<'_>) {
    let store = open(make);
    store.save_state("gov", "here", snapshot("elsewhere", json!(1)), why()).await.unwrap();
    assert_eq!(store.get_state("gov", "here").await.unwrap().0.id, "here");
    assert!(!store.exists("gov", "elsewhere").await.unwrap());
}

async fn update_conflicts_name_both_versions(make: Make<'_>) {
    let store = open(make);
    let conflict = |error: Error| match error {
        Error::VersionConflict { governor, state, expected, actual } => {
            assert_eq!((governor.as_str(), state.as_str()), ("gov", "counter"));
            (expected, actual)
        }
        other => panic!("{other}"),
    };
    let update = |expected| store.update_state("gov", "counter", counter(9), expected, why());
    assert_eq!(conflict(update(3).await.unwrap_err()), (3, 0));
    assert_eq!(update(0).await.unwrap(), 1);
    assert_eq!(conflict(update(0).await.unwrap_err()), (0, 1));
    assert_eq!(update(1).await.unwrap(), 2);
    assert_eq!(conflict(update(1).await.unwrap_err()), (1, 2));
    assert_eq!(conflict(update(u64::MAX).await.unwrap_err()), (u64::MAX, 2));
    // Another handle does not know what this one remembers, and the other way round.
    let delete = store.delete_state("gov", "counter", Some(1), why()).await.unwrap_err();
    assert_eq!(conflict(delete), (1, 2));
    assert_eq!(store.get_state("gov", "counter").await.unwrap().1, 2);
    proved(&store).await;
}

async fn a_deleted_state_goes_on_at_its_version(make: Make<'_>) {
    let store = open(make);
    store.save_state("gov", "counter", counter(1), why()).await.unwrap();
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    let again = store.update_state("gov", "counter", counter(2), 0, why()).await.unwrap();
    assert_eq!(again, 3);
    let record = store.record("gov", "counter").await.unwrap().unwrap();
    assert!(!record.deleted && record.snapshot.version == 3);
    let old = store.update_state("gov", "counter", counter(3), 1, why()).await.unwrap_err();
    assert!(matches!(old, Error::VersionConflict { expected: 1, actual: 3, .. }));
    let event = store.event("gov", "counter", 3).await.unwrap();
    assert!(event.from_state.is_none(), "nothing was there before");
    proved(&store).await;
}

async fn lists_are_paged_and_ordered(make: Make<'_>) {
    let store = open(make);
    for n in 0..30 {
        let id = format!("s{n:02}");
        store.save_state("gov", &id, snapshot(&id, json!(n)), why()).await.unwrap();
    }
    for n in [0, 1, 2, 3, 4, 17, 29] {
        store.delete_state("gov", format!("s{n:02}"), None, why()).await.unwrap();
    }
    store.save_state("other", "x", snapshot("x", json!(1)), why()).await.unwrap();
    for (base, wanted) in
        [(ListOptions::default(), 23), (ListOptions::default().with_deleted(), 30)]
    {
        for limit in [1, 4, 100] {
            let mut options = base.clone().limit(limit);
            let mut found = Vec::new();
            loop {
                let page = store.list_states("gov", &options).await.unwrap();
                assert!(page.states.len() <= limit);
                found.extend(page.states.iter().map(|record| record.snapshot.id.to_string()));
                match page.next {
                    Some(next) => options = options.after(next),
                    None => break,
                }
            }
            let distinct: BTreeSet<_> = found.iter().cloned().collect();
            assert_eq!((found.len(), distinct.len()), (wanted, wanted));
            assert!(found.is_sorted());
        }
    }
    let governors = store.list_governors(None, 10).await.unwrap();
    assert_eq!(governors, ["gov", "other"].map(tai_state::GovernorId::from));
    assert_eq!(store.list_governors(governors.first(), 10).await.unwrap().len(), 1);
    assert!(store.list_states("nobody", &ListOptions::default()).await.unwrap().states.is_empty());
}

async fn batch_get_keeps_the_order(make: Make<'_>) {
    let store = open(make);
    for id in ["a", "b", "c"] {
        store.save_state("gov", id, snapshot(id, json!(id)), why()).await.unwrap();
    }
    store.delete_state("gov", "b", None, why()).await.unwrap();
    let found = store.batch_get_states("gov", &["c", "none", "b", "a", "c"]).await.unwrap();
    let ids: Vec<&str> = found.iter().map(|state| state.id.as_str()).collect();
    assert_eq!(ids, ["c", "a", "c"]);
    assert!(store.batch_get_states::<&str>("gov", &[]).await.unwrap().is_empty());
}

async fn stats_count_everything(make: Make<'_>) {
    let store = open(make);
    assert_eq!(store.get_stats().await.unwrap().total_states, 0);
    for n in 0..3 {
        let id = format!("s{n}");
        for _ in 0..=n {
            store.save_state(&id, &id, snapshot(&id, json!(n)), why()).await.unwrap();
        }
    }
    store.delete_state("s0", "s0", None, why()).await.unwrap();
    let stats = store.get_stats().await.unwrap();
    assert_eq!((stats.total_governors, stats.total_states, stats.deleted_states), (3, 2, 1));
    assert_eq!((stats.total_events, stats.max_version), (7, 3));
    assert!(stats.cache_size_bytes > 0);
}

async fn clocks_grow_with_every_change(make: Make<'_>) {
    let store = make(options(|o| o.node = Some("node-a".into())));
    store.save_state("gov", "counter", counter(1), why()).await.unwrap();
    let (first, _) = store.get_state("gov", "counter").await.unwrap();
    let mut second = first.clone();
    second.causality.increment("elsewhere");
    store.update_state("gov", "counter", second, 1, why()).await.unwrap();
    let (second, _) = store.get_state("gov", "counter").await.unwrap();
    assert!(first.causality.happened_before(&second.causality));
    assert_eq!((second.causality.get("node-a"), second.causality.get("elsewhere")), (2, 1));
}

async fn sixteen_tasks_lose_no_update(make: Make<'_>) {
    const TASKS: u64 = 16;
    const STEPS: u64 = 200;
    let store = open(make);
    store.save_state("gov", "counter", counter(0), why()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let store = store.clone();
        tasks.spawn(async move {
            let (mut done, mut conflicts) = (0, 0u64);
            for _ in 0..STEPS {
                let (mut state, version) = store.get_state("gov", "counter").await.unwrap();
                state.data["count"] = json!(state.data["count"].as_u64().unwrap() + 1);
                match store.update_state("gov", "counter", state, version, why()).await {
                    Ok(new) => {
                        assert_eq!(new, version + 1);
                        done += 1;
                    }
                    Err(Error::VersionConflict { expected, actual, .. }) => {
                        assert!(expected == version && actual > version, "{expected} {actual}");
                        conflicts += 1;
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            (done, conflicts)
        });
    }
    let all = tasks.join_all().await;
    let (done, conflicts) = all.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    assert_eq!(done + conflicts, TASKS * STEPS);
    assert!(conflicts > 0, "nobody raced: the test shows nothing");
    let (state, version) = store.get_state("gov", "counter").await.unwrap();
    assert_eq!((version, state.data), (done + 1, json!({"count": done})));
    proved(&store).await;
}

async fn racing_saves_all_count(make: Make<'_>) {
    let store = open(make);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            let mut versions = Vec::new();
            for _ in 0..20 {
                let saved = store.save_state("gov", "counter", counter(task), why()).await;
                versions.push(saved.unwrap());
            }
            versions
        });
    }
    let versions: BTreeSet<u64> = tasks.join_all().await.into_iter().flatten().collect();
    assert_eq!(versions, (1..=160).collect());
    proved(&store).await;
}

/// Every future is `Send`, with borrowed and with owned arguments.
async fn every_call_can_be_spawned(make: Make<'_>) {
    let store = open(make);
    let shared = Arc::new(store.clone());
    let persister = StateMachinePersister::with_defaults(Arc::clone(&shared));
    let manager = TransactionManager::new(shared);
    let done = tokio::spawn(async move {
        store.save_state("g".to_owned(), "s", counter(1), why()).await?;
        store.get_state("g", String::from("s")).await?;
        store.update_state("g", "s", counter(2), 1, why()).await?;
        store.batch_get_states("g", &["s"]).await?;
        store.list_states("g", &ListOptions::default()).await?;
        store.list_governors(None, 1).await?;
        store.get_stats().await?;
        store.event("g", "s", 1).await?;
        store.record("g", "s").await?;
        store.state_at_version("g", "s", 1).await?;
        store.state_at_time("g", "s", tai_state::SystemClock.now() + TimeDelta::days(1)).await?;
        store.history("g", "s", ..).await?.next_page().await?;
        store.export(None, &mut Vec::new(), |_| {}).await?;
        store.verify(|_| {}).await?;
        persister.load_state("g", "s").await?;
        persister.log_transition("g", None, &counter(1), "x", why()).await?;
        manager.execute_transaction("g", |tx| async move { tx.get_state("g", "s").await }).await?;
        store.delete_state("g", "s", None, why()).await
    });
    assert_eq!(done.await.unwrap().unwrap(), 3);
}

/// A writer changes two states together; whoever reads both sees them alike.
async fn several_states_are_read_as_of_one_moment(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let writing = manager.clone();
    let both = move |n: u64| {
        let manager = writing.clone();
        async move {
            let write = |tx: tai_state::Transaction| async move {
                tx.save_state("g", "a", counter(n), why()).await?;
                tx.save_state("g", "b", counter(n), why()).await
            };
            manager.run(write).await.unwrap()
        }
    };
    both(0).await;
    let writer = {
        let both = both.clone();
        tokio::spawn(async move {
            for n in 1..=150 {
                both(n).await;
            }
        })
    };
    let mut reads = 0;
    while !writer.is_finished() {
        let read = store.batch_get_states("g", &["a", "b"]).await.unwrap();
        assert_eq!(read[0].data, read[1].data);
        let in_transaction =
            |tx: tai_state::Transaction| async move { tx.batch_get_states("g", &["b", "a"]).await };
        let read = manager.run(in_transaction).await.unwrap().value;
        assert_eq!(read[0].data, read[1].data);
        reads += 1;
    }
    writer.await.unwrap();
    println!("{reads} readings of each kind");
    assert!(reads > 10);
}

async fn too_many_states_at_once_are_refused(make: Make<'_>) {
    let store = open(make);
    let ids: Vec<String> = (0..501).map(|n| format!("s{n}")).collect();
    assert!(store.batch_get_states("g", &ids[..500]).await.unwrap().is_empty());
    let refused = store.batch_get_states("g", &ids).await.unwrap_err();
    assert!(matches!(refused, Error::TooLarge { size: 501, limit: 500, .. }), "{refused}");
}
