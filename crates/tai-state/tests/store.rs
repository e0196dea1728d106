//! What `StateStore`, `StateMachinePersister` and `TransactionManager` promise: one list, run on every
//! backend.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use chrono::{TimeDelta, TimeZone, Utc};
use common::{counter, snapshot, why};
use serde_json::{Value, json};
use tai_state::{
    ChangeMetadata, Clock, Error, ListOptions, ManualClock, NewTransition, PersistenceConfig,
    RetryPolicy, StateMachinePersister, StateStore, StoreOptions, TransactionManager,
};

/// Runs each test on each backend, under the name `backend::test`.
macro_rules! on_every_backend {
    ($($test:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test(&mut |options| tai_state::StateStore::in_memory_with(options)).await;
            })*
        }
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let folder = tempfile::tempdir().unwrap();
                let mut number = 0;
                super::$test(&mut |options| {
                    number += 1;
                    let path = folder.path().join(format!("{number}.tai"));
                    tokio::task::block_in_place(|| {
                        tokio::runtime::Handle::current()
                            .block_on(tai_state::StateStore::open_with(path, options))
                            .unwrap()
                    })
                })
                .await;
            })*
        }
    };
}

on_every_backend![
    save_get_update_delete,
    versions_have_no_gaps,
    the_address_in_the_call_wins,
    update_conflicts_name_both_versions,
    a_deleted_state_goes_on_at_its_version,
    lists_are_paged_and_ordered,
    batch_get_keeps_the_order,
    stats_count_everything,
    log_transition_checks_where_it_starts,
    load_state_replays,
    saved_snapshots_shorten_the_replay,
    events_tell_before_and_after,
    the_past_can_be_read,
    time_never_goes_backwards,
    clocks_grow_with_every_change,
    sixteen_tasks_lose_no_update,
    racing_saves_all_count,
    transactions_are_all_or_nothing,
    transactions_see_their_own_writes,
    a_transaction_guards_what_it_only_read,
    a_transaction_s_own_error_writes_nothing,
    read_write_transactions,
    a_handle_outlives_its_transaction_harmlessly,
    several_changes_of_one_state_in_one_transaction,
    hostile_ids_are_kept_or_refused,
    hostile_values_are_kept_or_refused,
    hostile_arguments_are_refused,
    exports_are_equal_after_a_round_trip,
    verify_proves_all,
    the_specification_s_patterns,
    every_call_can_be_spawned,
];

type Make<'a> = &'a mut (dyn FnMut(StoreOptions) -> StateStore + Send);

fn open(make: Make<'_>) -> StateStore {
    make(StoreOptions::default())
}

fn options(change: impl FnOnce(&mut StoreOptions)) -> StoreOptions {
    let mut options = StoreOptions::default();
    change(&mut options);
    options
}

/// The content hash, after proving the whole store.
async fn proved(store: &StateStore) -> String {
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    report.content_hash.to_string()
}

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

async fn log_transition_checks_where_it_starts(make: Make<'_>) {
    let store = open(make);
    let persister = StateMachinePersister::with_defaults(store.clone());
    let (one, two) = (counter(1), counter(2));
    let event = persister.log_transition("gov", None, &one, "init", why()).await.unwrap();
    assert_eq!((event.version(), event.action.as_str()), (1, "init"));
    assert!(event.from_state.is_none());
    let again = persister.log_transition("gov", None, &one, "init", why()).await.unwrap_err();
    assert!(matches!(again, Error::VersionConflict { expected: 0, actual: 1, .. }));

    // Built by hand: compared by its data.
    let event = persister.log_transition("gov", Some(&one), &two, "step", why()).await.unwrap();
    assert_eq!(event.from_state.as_ref().unwrap().data, one.data);
    let wrong = persister.log_transition("gov", Some(&one), &two, "step", why()).await.unwrap_err();
    assert!(matches!(wrong, Error::VersionConflict { actual: 2, .. }));

    // Read from the store: compared by its version, whatever the data.
    let (read, _) = store.get_state("gov", "counter").await.unwrap();
    store.save_state("gov", "counter", counter(2), why()).await.unwrap();
    let stale =
        persister.log_transition("gov", Some(&read), &one, "back", why()).await.unwrap_err();
    assert!(matches!(stale, Error::VersionConflict { expected: 2, actual: 3, .. }));
    proved(&store).await;
}

async fn load_state_replays(make: Make<'_>) {
    let store = open(make);
    let persister = StateMachinePersister::with_defaults(store.clone());
    let (one, two) = (counter(1), counter(2));
    persister.log_transition("gov", None, &one, "init", why()).await.unwrap();
    persister.log_transition("gov", Some(&one), &two, "step", why()).await.unwrap();
    let (loaded, was_recovery) = persister.load_state("gov", "counter").await.unwrap();
    assert!(was_recovery);
    assert_eq!((loaded.data, loaded.version), (two.data, 2));
    let trusting = PersistenceConfig { auto_replay: false, ..PersistenceConfig::default() };
    let persister = StateMachinePersister::new(store.clone(), trusting);
    assert!(!persister.load_state("gov", "counter").await.unwrap().1);
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    let gone = persister.load_state("gov", "counter").await.unwrap_err();
    assert!(matches!(gone, Error::StateNotFound { .. }));
}

async fn saved_snapshots_shorten_the_replay(make: Make<'_>) {
    let store = open(make);
    let config = PersistenceConfig {
        snapshot_interval: 10,
        snapshot_retention: 2,
        max_replay_batch_size: 3,
        ..PersistenceConfig::default()
    };
    let persister = StateMachinePersister::new(store.clone(), config);
    for n in 0..47 {
        let to = NewTransition::to("gov", "counter", "step", json!(n), why());
        persister.append(to).await.unwrap();
        let (loaded, _) = persister.load_state("gov", "counter").await.unwrap();
        assert_eq!(loaded.data, json!(n));
    }
    let report = store.verify(|_| {}).await.unwrap();
    assert_eq!((report.ok, report.snapshots, report.events), (true, 2, 47));
}

async fn events_tell_before_and_after(make: Make<'_>) {
    let store = open(make);
    for n in 1..=3 {
        store.save_state("gov", "counter", counter(n), why()).await.unwrap();
    }
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    let mut history = store.history("gov", "counter", ..).await.unwrap();
    let events = history.next_page().await.unwrap();
    assert!(history.next_page().await.unwrap().is_empty());
    let counts: Vec<_> = events.iter().map(|e| e.to_state.data["count"].as_u64()).collect();
    assert_eq!(counts, [Some(1), Some(2), Some(3), None]);
    for pair in events.windows(2) {
        assert_eq!(pair[1].from_state.as_ref(), Some(&pair[0].to_state));
        assert_eq!(pair[1].prev_hash, Some(pair[0].hash));
        assert_ne!(pair[1].id, pair[0].id);
    }
    assert!(events[3].deleted && events[3].action == "delete");
    for event in &events {
        assert_eq!(store.event("gov", "counter", event.version()).await.unwrap(), *event);
    }
    let mut middle = store.history("gov", "counter", 2..4).await.unwrap();
    assert_eq!(middle.next_page().await.unwrap(), events[1..3]);
    for version in [0, 5, u64::MAX] {
        let missing = store.event("gov", "counter", version).await.unwrap_err();
        assert!(matches!(missing, Error::StateNotFound { .. }), "{missing}");
    }
    let mut nothing = store.history("gov", "counter", 9..).await.unwrap();
    assert!(nothing.next_page().await.unwrap().is_empty());
}

async fn the_past_can_be_read(make: Make<'_>) {
    let start = Utc.with_ymd_and_hms(2026, 1, 1, 15, 0, 0).unwrap();
    let clock = ManualClock::at(start);
    let store = make(options(|o| o.clock = Arc::new(clock.clone())));
    // Versions 1 to 9, two of them at the same time each.
    for n in 1..=9u64 {
        store.save_state("gov", "counter", counter(n), why()).await.unwrap();
        if n % 2 == 0 {
            clock.advance(TimeDelta::minutes(1));
        }
    }
    store.delete_state("gov", "counter", None, why()).await.unwrap();
    for n in 1..=9 {
        let then = store.state_at_version("gov", "counter", n).await.unwrap();
        assert_eq!((then.data, then.version), (json!({"count": n}), n));
    }
    for (seconds, version) in [(0, 2), (59, 2), (60, 4), (61, 4), (180, 8)] {
        let at = start + TimeDelta::seconds(seconds);
        assert_eq!(store.state_at_time("gov", "counter", at).await.unwrap().version, version);
    }
    let early = store.state_at_time("gov", "counter", start - TimeDelta::seconds(1)).await;
    assert!(matches!(early, Err(Error::StateNotFound { .. })));
    let late = store.state_at_time("gov", "counter", start + TimeDelta::hours(1)).await;
    assert!(late.unwrap_err().to_string().contains("deleted"));
    assert!(store.state_at_version("gov", "counter", 10).await.is_err());
}

async fn time_never_goes_backwards(make: Make<'_>) {
    let clock = ManualClock::at(Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).unwrap());
    let store = make(options(|o| o.clock = Arc::new(clock.clone())));
    for n in 0..5 {
        store.save_state("gov", "counter", counter(n), why()).await.unwrap();
        clock.advance(TimeDelta::hours(-1));
    }
    let mut history = store.history("gov", "counter", ..).await.unwrap();
    let events = history.next_page().await.unwrap();
    assert!(events.iter().all(|event| event.timestamp == events[0].timestamp));
    assert!(clock.now() < events[0].timestamp);
    proved(&store).await;
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

async fn bank(store: &StateStore, accounts: u64) {
    for n in 0..accounts {
        let id = format!("account-{n}");
        let money = snapshot(&id, json!({"balance": 100}));
        store.save_state("bank", &id, money, why()).await.unwrap();
    }
}

fn balance(state: &tai_state::StateSnapshot) -> i64 {
    state.data["balance"].as_i64().unwrap()
}

async fn transactions_are_all_or_nothing(make: Make<'_>) {
    let store = open(make);
    bank(&store, 4).await;
    let manager = TransactionManager::new(store.clone());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6u64 {
        let manager = manager.clone();
        tasks.spawn(async move {
            for step in 0..15u64 {
                let from = format!("account-{}", (task + step) % 4);
                let to = format!("account-{}", (task + step * 3 + 1) % 4);
                if from == to {
                    continue;
                }
                let moved = manager.execute_transaction("bank", |tx| {
                    let (from, to) = (from.clone(), to.clone());
                    Box::pin(async move {
                        let (mut a, version_a) = tx.get_state("bank", &from).await?;
                        let (mut b, version_b) = tx.get_state("bank", &to).await?;
                        a.data["balance"] = json!(balance(&a) - 1);
                        b.data["balance"] = json!(balance(&b) + 1);
                        tx.update_state("bank", &from, a, version_a, why()).await?;
                        tx.update_state("bank", &to, b, version_b, why()).await?;
                        Ok(())
                    })
                });
                match moved.await {
                    Ok(()) | Err(Error::TransactionFailed { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
    }
    let auditor = manager.clone();
    let audits = tokio::spawn(async move {
        for _ in 0..30 {
            let ids = ["account-0", "account-1", "account-2", "account-3"];
            let all = auditor
                .execute_transaction(
                    "bank",
                    |tx| async move { tx.batch_get_states("bank", &ids).await },
                )
                .await
                .unwrap();
            assert_eq!(all.iter().map(balance).sum::<i64>(), 400);
        }
    });
    tasks.join_all().await;
    audits.await.unwrap();
    proved(&store).await;
}

async fn transactions_see_their_own_writes(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(&store);
    let outside = store.clone();
    manager
        .execute_transaction("gov", |tx| {
            let outside = outside.clone();
            async move {
                assert!(!tx.exists("gov", "new").await?);
                assert_eq!(tx.save_state("gov", "new", counter(1), why()).await?, 1);
                assert_eq!(tx.get_state("gov", "new").await?.0.data, json!({"count": 1}));
                assert!(!outside.exists("gov", "new").await?, "seen before the commit");
                tx.delete_state("gov", "new", Some(1), why()).await?;
                assert!(!tx.exists("gov", "new").await?);
                tx.save_state("gov", "new", counter(3), why()).await?;
                Ok(())
            }
        })
        .await
        .unwrap();
    assert_eq!(store.get_state("gov", "new").await.unwrap().1, 3);
    proved(&store).await;
}

async fn a_transaction_guards_what_it_only_read(make: Make<'_>) {
    let store = open(make);
    bank(&store, 2).await;
    let manager = TransactionManager::new(store.clone());
    let outside = store.clone();
    let completed = manager
        .run(|tx| {
            let outside = outside.clone();
            async move {
                let (read, version) = tx.get_state("bank", "account-0").await?;
                let absent = tx.exists("bank", "account-9").await?;
                if version == 1 {
                    // Somebody changes it after it was read: the first attempt must not count.
                    outside
                        .save_state(
                            "bank",
                            "account-0",
                            snapshot("x", json!({"balance": 7})),
                            why(),
                        )
                        .await?;
                } else if !absent {
                    let created = snapshot("x", json!({"balance": 1}));
                    outside.save_state("bank", "account-9", created, why()).await?;
                }
                let sum = json!({"balance": balance(&read), "nine": absent});
                tx.save_state("bank", "account-1", snapshot("y", sum), why()).await?;
                Ok(())
            }
        })
        .await
        .unwrap();
    assert_eq!(completed.attempts, 3);
    let (written, version) = store.get_state("bank", "account-1").await.unwrap();
    assert_eq!((written.data, version), (json!({"balance": 7, "nine": true}), 2));
}

async fn a_transaction_s_own_error_writes_nothing(make: Make<'_>) {
    let store = open(make);
    bank(&store, 1).await;
    let before = proved(&store).await;
    let manager = TransactionManager::new(store.clone());
    let refused = manager
        .execute_transaction("bank", |tx| async move {
            tx.save_state("bank", "account-0", counter(1), why()).await?;
            tx.save_state("bank", "new", counter(1), why()).await?;
            tx.get_state("bank", "none").await?;
            Ok(())
        })
        .await;
    assert!(matches!(refused, Err(Error::StateNotFound { .. })));
    assert_eq!(proved(&store).await, before);
    // With one attempt a conflict ends it, and says why.
    let store = make(options(|o| o.retry = RetryPolicy::none()));
    bank(&store, 1).await;
    let manager = TransactionManager::new(store.clone());
    let failed = manager
        .execute_transaction("bank", |tx| {
            let store = store.clone();
            async move {
                let (state, version) = tx.get_state("bank", "account-0").await?;
                store.save_state("bank", "account-0", counter(1), why()).await?;
                tx.update_state("bank", "account-0", state, version, why()).await
            }
        })
        .await
        .unwrap_err();
    let Error::TransactionFailed { attempts: 1, source } = failed else { panic!("{failed}") };
    assert!(matches!(*source, Error::VersionConflict { expected: 1, actual: 2, .. }), "{source}");
}

async fn read_write_transactions(make: Make<'_>) {
    let store = open(make);
    bank(&store, 3).await;
    let manager = TransactionManager::new(store.clone());
    let (mut a, _) = store.get_state("bank", "account-0").await.unwrap();
    a.data["balance"] = json!(1);
    let read = manager
        .read_write_transaction(
            "bank",
            &["account-1", "none"],
            &[("account-0", a.clone(), why()), ("new", counter(1), why())],
        )
        .await
        .unwrap();
    assert_eq!(read.len(), 1);
    assert_eq!(store.get_state("bank", "account-0").await.unwrap().1, 2);
    // The same again: `a` is now old.
    let old =
        manager.read_write_transaction("bank", &["account-1"], &[("account-0", a, why())]).await;
    assert!(matches!(old, Err(Error::VersionConflict { expected: 1, actual: 2, .. })));
    let events = [
        store.event("bank", "account-0", 2).await.unwrap(),
        store.event("bank", "new", 1).await.unwrap(),
    ];
    let ids = events.each_ref().map(|e| e.metadata.context[tai_state::TRANSACTION_CONTEXT].clone());
    assert_eq!(ids[0], ids[1], "one transaction, one id");
}

async fn a_handle_outlives_its_transaction_harmlessly(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let kept = manager
        .execute_transaction("gov", |tx| async move {
            tx.save_state("gov", "a", counter(1), why()).await?;
            Ok(tx)
        })
        .await
        .unwrap();
    let late = kept.save_state("gov", "a", counter(2), why()).await.unwrap_err();
    assert!(matches!(late, Error::InvalidState { .. }), "{late}");
    assert_eq!(store.get_state("gov", "a").await.unwrap().1, 1);
}

async fn several_changes_of_one_state_in_one_transaction(make: Make<'_>) {
    let config = PersistenceConfig {
        snapshot_interval: 2,
        snapshot_retention: 1,
        ..PersistenceConfig::default()
    };
    let store = make(options(|o| o.persistence = config));
    let manager = TransactionManager::new(store.clone());
    for round in 0..3 {
        manager
            .execute_transaction("gov", |tx| async move {
                for n in 0..5 {
                    tx.save_state("gov", "a", counter(round * 10 + n), why()).await?;
                }
                Ok(())
            })
            .await
            .unwrap();
    }
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!((report.events, report.snapshots), (15, 1));
}

async fn hostile_ids_are_kept_or_refused(make: Make<'_>) {
    let store = open(make);
    let long = "x".repeat(1_400);
    let kept = [
        ".",
        "..",
        "../../etc/passwd",
        "__x__",
        "a~b",
        "a~00000000000000000001",
        "%2F",
        "a/b",
        "a\0b",
        "line\nbreak",
        "\u{202e}abc",
        "e\u{301}",
        "\u{e9}",
        " ",
        "-rf",
        "\u{1F600}",
        "\u{7f}",
        &long,
    ];
    for (n, id) in kept.iter().enumerate() {
        store.save_state(id, id, snapshot(id, json!(n)), why()).await.unwrap();
    }
    for (n, id) in kept.iter().enumerate() {
        let (state, _) = store.get_state(id, id).await.unwrap();
        assert_eq!((state.data, state.id.as_str()), (json!(n), *id));
        assert_eq!(store.list_states(id, &ListOptions::default()).await.unwrap().states.len(), 1);
        assert_eq!(store.event(id, id, 1).await.unwrap().governor_id, *id);
    }
    let governors = store.list_governors(None, 100).await.unwrap();
    let found: BTreeSet<&str> = governors.iter().map(tai_state::GovernorId::as_str).collect();
    assert_eq!(found, kept.iter().copied().collect());

    let before = proved(&store).await;
    for id in [String::new(), "x".repeat(1_401), "x".repeat(10_000), "/".repeat(500)] {
        for (governor, state) in [(id.as_str(), "s"), ("g", id.as_str())] {
            let error = store.save_state(governor, state, counter(1), why()).await.unwrap_err();
            assert!(["invalid_state", "too_large"].contains(&error.code()), "{error}");
            assert_eq!(store.get_state(governor, state).await.unwrap_err().code(), error.code());
        }
    }
    assert_eq!(proved(&store).await, before);
}

async fn hostile_values_are_kept_or_refused(make: Make<'_>) {
    let store = open(make);
    let nest = |levels: usize| (0..levels).fold(Value::Null, |inner, _| Value::Array(vec![inner]));
    let kept = [
        json!(null),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.1 + 0.2),
        json!(-0.0),
        json!([[1, [2, [3]]], {}, [], "", {"": {"__x__": "\0"}}]),
        json!("x".repeat(900 * 1024 - 2)),
        nest(100),
    ];
    for (n, value) in kept.iter().enumerate() {
        let id = format!("s{n}");
        store.save_state("gov", &id, snapshot(&id, value.clone()), why()).await.unwrap();
        let (state, _) = store.get_state("gov", &id).await.unwrap();
        assert_eq!(state.data.to_string(), value.to_string());
    }
    let before = proved(&store).await;
    let persister = StateMachinePersister::with_defaults(&store);
    let manager = TransactionManager::new(&store);
    let refused: [(fn() -> Value, &str); 5] = [
        (|| json!("x".repeat(2 << 20)), "too_large"),
        (|| json!("x".repeat(900 * 1024 - 1)), "too_large"),
        (|| json!(vec![0; 200_000]), "too_large"),
        (|| (0..101).fold(Value::Null, |inner, _| Value::Array(vec![inner])), "invalid_state"),
        (|| (0..10_000).fold(Value::Null, |inner, _| Value::Array(vec![inner])), "invalid_state"),
    ];
    for (value, code) in refused {
        let new = || snapshot_of("s0", value());
        let error = store.save_state("gov", "s0", new(), why()).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        let error = store.update_state("gov", "s0", new(), 1, why()).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        let lent = std::mem::ManuallyDrop::new(new());
        let error = persister.log_transition("gov", None, &lent, "x", why()).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        let to = NewTransition::to("gov", "s0", "x", value(), why());
        assert_eq!(persister.append(to).await.unwrap_err().code(), code);
        let in_transaction = manager.execute_transaction("gov", |tx| async move {
            tx.save_state("gov", "s1", counter(1), why()).await?;
            tx.save_state("gov", "s0", snapshot_of("s0", value()), why()).await
        });
        assert_eq!(in_transaction.await.unwrap_err().code(), code);
    }
    assert_eq!(proved(&store).await, before);
}

/// Without the clone and the recursion that `json!` makes.
fn snapshot_of(id: &str, data: Value) -> tai_state::StateSnapshot {
    let mut new = snapshot(id, Value::Null);
    new.data = data;
    new
}

async fn hostile_arguments_are_refused(make: Make<'_>) {
    let store = open(make);
    store.save_state("gov", "s", counter(1), why()).await.unwrap();
    let before = proved(&store).await;
    let persister = StateMachinePersister::with_defaults(&store);
    let long = || ChangeMetadata::new("x".repeat(40_000), "", None);
    let deep =
        || why().with_context("deep", (0..5_000).fold(Value::Null, |v, _| Value::Array(vec![v])));
    assert_eq!(
        store.save_state("gov", "s", counter(1), long()).await.unwrap_err().code(),
        "too_large"
    );
    assert_eq!(
        store.save_state("gov", "s", counter(1), deep()).await.unwrap_err().code(),
        "invalid_state"
    );
    assert_eq!(
        store.delete_state("gov", "s", None, deep()).await.unwrap_err().code(),
        "invalid_state"
    );
    for action in [String::new(), "x".repeat(2_000)] {
        let to = NewTransition::to("gov", "s", action, json!(1), why());
        assert!(persister.append(to).await.is_err());
    }
    for id in [String::new(), "x".repeat(200)] {
        let to = NewTransition::to("gov", "s", "x", json!(1), why()).with_id(id);
        assert!(persister.append(to).await.is_err());
    }
    let far =
        NewTransition::to("gov", "s", "x", json!(1), why()).at(chrono::DateTime::<Utc>::MAX_UTC);
    assert_eq!(persister.append(far).await.unwrap_err().code(), "invalid_state");
    let mut clock = snapshot("s", json!(1));
    clock.causality = serde_json::from_value(json!({"n": u64::MAX})).unwrap();
    assert_eq!(
        store.save_state("gov", "s", clock, why()).await.unwrap_err().code(),
        "invalid_state"
    );
    let none = store.list_states("gov", &ListOptions::default().limit(0)).await.unwrap_err();
    assert_eq!(none.code(), "invalid_state");
    let many: Vec<_> = (0..600).map(|n| (format!("s{n}"), counter(n), why())).collect();
    let manager = TransactionManager::new(&store);
    let too_many = manager.read_write_transaction("gov", &["s"], &many).await.unwrap_err();
    assert_eq!(too_many.code(), "too_large");
    let heavy: Vec<_> = (0..12)
        .map(|n| (format!("s{n}"), snapshot("s", json!("x".repeat(900_000))), why()))
        .collect();
    let too_heavy =
        manager.read_write_transaction::<&str, _>("gov", &[], &heavy).await.unwrap_err();
    assert_eq!(too_heavy.code(), "too_large");
    assert_eq!(proved(&store).await, before);
}

async fn exports_are_equal_after_a_round_trip(make: Make<'_>) {
    let source = open(make);
    for id in ["a", "é/x", "__b__", "c~1"] {
        for n in 0..5 {
            source
                .save_state(id, id, snapshot(id, json!({"n": n, "z": [0.1, u64::MAX]})), why())
                .await
                .unwrap();
        }
    }
    source.delete_state("a", "a", None, ChangeMetadata::new("op", "", None)).await.unwrap();
    let mut lines = Vec::new();
    let summary = source.export(None, &mut lines, |_| {}).await.unwrap();
    assert_eq!((summary.states, summary.transitions), (4, 21));
    assert_eq!(summary.content_hash.to_string(), proved(&source).await);

    let target = open(make);
    let persister = StateMachinePersister::with_defaults(&target);
    for line in std::str::from_utf8(&lines).unwrap().lines() {
        let line = tai_state::TransitionLine::parse(line, "line").unwrap();
        let who = ChangeMetadata::new(&line.actor, &line.reason, None);
        let transition = if line.deleted {
            NewTransition::to_deleted(&line.governor_id, &line.state_id, &line.action, who)
        } else {
            NewTransition::to(
                &line.governor_id,
                &line.state_id,
                &line.action,
                line.data.clone(),
                who,
            )
        };
        persister.append(transition.at(line.timestamp)).await.unwrap();
    }
    let mut again = Vec::new();
    let copied = target.export(None, &mut again, |_| {}).await.unwrap();
    assert!(lines == again, "the export changed");
    assert_eq!(copied.content_hash, summary.content_hash);
    assert_ne!(source.identity().store, target.identity().store);
}

async fn verify_proves_all(make: Make<'_>) {
    let store = open(make);
    let empty = store.verify(|_| {}).await.unwrap();
    assert!(empty.ok && empty.states == 0);
    // SHA-256 of nothing.
    assert!(empty.content_hash.to_string().starts_with("e3b0c44298fc1c14"));
    for n in 0..250 {
        store.save_state("gov", format!("s{}", n % 3), counter(n), why()).await.unwrap();
    }
    let mut seen = 0;
    let report = store.verify(|events| seen = events).await.unwrap();
    assert!(report.ok);
    assert_eq!((report.states, report.events, seen), (3, 250, 250));
    assert_ne!(report.content_hash, empty.content_hash);
}

/// The specification's patterns 1 to 4, its crash recovery and its migration, as they are written.
async fn the_specification_s_patterns(make: Make<'_>) {
    use tai_state::{StateId, StateSnapshot};
    let store = open(make);

    // Pattern 1
    let snapshot = StateSnapshot::new(
        StateId::new("counter".into()),
        json!({"count": 0}),
        ChangeMetadata::new("system", "initialization", None),
    );
    store
        .save_state("governor1", "counter", snapshot, ChangeMetadata::new("system", "init", None))
        .await
        .unwrap();
    let (state, version) = store.get_state("governor1", "counter").await.unwrap();
    assert_eq!((state.data["count"].as_i64(), version), (Some(0), 1));

    // Pattern 2
    let mut new_state = state.clone();
    new_state.data["count"] = json!(state.data["count"].as_i64().unwrap_or(0) + 1);
    match store
        .update_state(
            "governor1",
            "counter",
            new_state,
            version,
            ChangeMetadata::new("user", "increment", Some(version)),
        )
        .await
    {
        Ok(new_version) => assert_eq!(new_version, 2),
        Err(Error::VersionConflict { .. }) => panic!("nobody else writes"),
        Err(e) => panic!("{e}"),
    }

    // Pattern 3
    for (id, balance) in [("account_a", 100), ("account_b", 0)] {
        let account = StateSnapshot::new(id.into(), json!({"balance": balance}), why());
        store.save_state("gov1", id, account, why()).await.unwrap();
    }
    let manager = TransactionManager::new(store.clone());
    manager
        .execute_transaction("governor1", |store| {
            Box::pin(async move {
                let (account_a, ver_a) = store.get_state("gov1", "account_a").await?;
                let (account_b, ver_b) = store.get_state("gov1", "account_b").await?;
                let mut new_a = account_a.clone();
                let mut new_b = account_b.clone();
                new_a.data["balance"] = json!(balance(&account_a) - 100);
                new_b.data["balance"] = json!(balance(&account_b) + 100);
                store.update_state("gov1", "account_a", new_a, ver_a, why()).await?;
                store.update_state("gov1", "account_b", new_b, ver_b, why()).await?;
                Ok(())
            })
        })
        .await
        .unwrap();
    assert_eq!(balance(&store.get_state("gov1", "account_b").await.unwrap().0), 100);

    // Pattern 4, and the crash recovery
    let persister = StateMachinePersister::with_defaults(store.clone());
    let state1 = StateSnapshot::new("machine".into(), json!({"on": false}), why());
    let state2 = StateSnapshot::new("machine".into(), json!({"on": true}), why());
    persister.log_transition("gov1", None, &state1, "init", why()).await.unwrap();
    let event = persister
        .log_transition(
            "gov1",
            Some(&state1),
            &state2,
            "action",
            ChangeMetadata::new("user", "action", None),
        )
        .await
        .unwrap();
    assert_eq!(event.from_state.as_ref().map(|state| &state.data), Some(&state1.data));
    let (recovered, was_recovery) = persister.load_state("gov1", "machine").await.unwrap();
    assert!(was_recovery);
    assert_eq!(recovered.data, state2.data);
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
