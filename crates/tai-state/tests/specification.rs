//! The usual ways to use the interface, as one would write them, on `FirestoreStore` and on `StateStore`. What
//! is behind them is tested at length elsewhere; here they must compile for both, and do what they say.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{counter, proved, snapshot, why};
use serde_json::json;
use tai_state::{
    CausalityAwareResolver, ChangeMetadata, ConflictResolver, Error, EventualConsistency,
    LastWriteWinsResolver, LockStatus, PersistenceConfig, Result, StateId, StateMachinePersister,
    StateSnapshot, Transaction, TransactionManager, VectorClockSnapshot,
};

/// The tests on one kind of store. Written once, they are compiled with each type: what is shown for a
/// `FirestoreStore` must not need a `StateStore`, nor the other way round. Beside the calls there is
/// only what they need: the bindings, and what is asserted.
macro_rules! as_written {
    () => {
        use super::*;

        #[tokio::test]
        async fn pattern_4() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            store.save_state("governor1", "counter", counter(0), why()).await?;
            let (from_state, _) = store.get_state("governor1", "counter").await?;
            let to_state = counter(1);

            let persister = StateMachinePersister::with_defaults(store.clone());

            // Log transition
            let event = persister
                .log_transition(
                    "governor1",
                    Some(&from_state),
                    &to_state,
                    "increment",
                    ChangeMetadata::new("user", "action", None),
                )
                .await?;

            // Snapshot created automatically every N events
            // Replay events when needed
            let (recovered_state, was_recovery) =
                persister.load_state("governor1", "counter").await?;

            assert_eq!((event.action.as_str(), event.version()), ("increment", 2));
            assert_eq!(event.from_state, Some(from_state));
            assert_eq!((&recovered_state, was_recovery), (&event.to_state, true));
            assert_eq!(recovered_state.data, to_state.data);
            for n in 2..=99 {
                store.save_state("governor1", "counter", counter(n), why()).await?;
            }
            let saved = persister.saved_snapshots("governor1", "counter").await?;
            assert_eq!(saved.iter().map(|saved| saved.version).collect::<Vec<_>>(), [100]);
            proved(&store).await;
            Ok(())
        }

        #[tokio::test]
        async fn pattern_5() -> Result<()> {
            let (Some(one), Some(two)) = (place().await, place().await) else { return Ok(()) };
            let (replica1, replica2) = (open(&one).await?, open(&two).await?);
            replica1.save_state("gov1", "counter", counter(1), why()).await?;
            let from_replica_1 = replica1.get_state("gov1", "counter").await?.0;
            replica2.save_state("gov1", "counter", counter(2), why()).await?;
            let mut from_replica_2 = replica2.get_state("gov1", "counter").await?.0;
            from_replica_2.timestamp = from_replica_1.timestamp + chrono::TimeDelta::seconds(1);

            let ec = EventualConsistency::new();

            // Two concurrent versions
            let v1 = from_replica_1;
            let v2 = from_replica_2;

            // Resolve
            let resolved = ec.resolve_conflict(&v1, &v2)?;
            println!("Resolved to version with timestamp: {}", resolved.timestamp);

            assert!(v1.causality.concurrent_with(&v2.causality));
            assert_eq!((resolved.timestamp, &resolved.data), (v2.timestamp, &v2.data));
            assert_eq!(ec.resolve_conflict(&v2, &v1)?, resolved);
            assert_eq!(ec.statistics().conflicts_resolved, 2);

            let ec = EventualConsistency::with_resolver(Box::new(LastWriteWinsResolver));

            assert_eq!(ec.resolve_conflict(&v1, &v2)?, resolved);
            // The store is accepted where a repair wants one.
            let repair = ec.repair(&replica1, "gov1", &resolved, why()).await?;
            assert_eq!(repair.newest.data, resolved.data);
            proved(&replica1).await;
            Ok(())
        }

        #[tokio::test]
        async fn test_crash_recovery() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let (state1, state2) = (counter(1), counter(2));
            assert_eq!(state1.version, 0, "built by hand");

            // Simulate crash: save state, lose in-memory data, recover from Firestore
            let store = open(&place).await?;
            let persister = StateMachinePersister::with_defaults(store.clone());

            // Log transitions
            let metadata = why();
            persister.log_transition("gov1", None, &state1, "init", metadata).await?;
            let metadata = why();
            persister.log_transition("gov1", Some(&state1), &state2, "action", metadata).await?;

            // "Crash" and recover
            let (recovered, was_recovery) = persister.load_state("gov1", "counter").await?;
            assert!(was_recovery);
            assert_eq!(recovered.data, state2.data);

            // The same when all that was in memory is really lost.
            drop((store, persister));
            let store = open(&place).await?;
            let persister = StateMachinePersister::with_defaults(&store);
            assert_eq!(persister.load_state("gov1", "counter").await?, (recovered, true));
            // And a state built by hand that is not what the store has starts nothing.
            let wrong = persister.log_transition("gov1", Some(&state1), &state2, "action", why());
            let wrong = wrong.await.unwrap_err();
            assert!(matches!(wrong, Error::VersionConflict { actual: 2, .. }), "{wrong}");
            proved(&store).await;
            Ok(())
        }

        #[tokio::test]
        #[allow(unused_mut)]
        async fn migration_from_naive_in_memory() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            let metadata = why();

            // After
            let mut state = StateSnapshot::new(
                StateId::new("counter".into()),
                json!({"counter": 0}),
                metadata,
            );
            let metadata = why();
            store.save_state("gov1", "counter", state, metadata).await?;

            // On restart
            drop(store);
            let store = open(&place).await?;
            let (state, _) = store.get_state("gov1", "counter").await?;

            assert_eq!((state.data, state.version), (json!({"counter": 0}), 1));
            Ok(())
        }

        #[tokio::test]
        async fn migration_from_a_database_with_manual_versioning() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            let state_id = "counter";
            store.save_state("gov1", state_id, counter(0), why()).await?;
            let (_, current_version) = store.get_state("gov1", state_id).await?;
            let (new_state, metadata) = (counter(1), why());

            // After: Built-in optimistic locking
            store.update_state("gov1", state_id, new_state, current_version, metadata).await?;

            // Automatic VersionConflict detection
            let late = store.update_state("gov1", state_id, counter(9), current_version, why());
            let late = late.await.unwrap_err();
            assert!(matches!(late, Error::VersionConflict { expected: 1, actual: 2, .. }), "{late}");
            assert_eq!(store.get_state("gov1", state_id).await?.0.data, counter(1).data);
            Ok(())
        }

        #[tokio::test]
        async fn pattern_1() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;

            // Save state
            let snapshot = StateSnapshot::new(
                StateId::new("counter".into()),
                json!({"count": 0}),
                ChangeMetadata::new("system", "initialization", None),
            );

            store
                .save_state(
                    "governor1",
                    "counter",
                    snapshot,
                    ChangeMetadata::new("system", "init", None),
                )
                .await?;

            // Retrieve
            let (state, version) = store.get_state("governor1", "counter").await?;
            println!("State: {:?}, Version: {}", state, version);

            assert_eq!((state.data, state.version, version), (json!({"count": 0}), 1, 1));
            Ok(())
        }

        #[tokio::test]
        async fn pattern_2() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            store.save_state("gov1", "counter", counter(0), why()).await?;

            // Read
            let (state, version) = store.get_state("gov1", "counter").await?;

            // Modify
            let mut new_state = state.clone();
            new_state.data["count"] = json!(state.data["count"].as_i64().unwrap_or(0) + 1);

            let is_late = new_state.clone();
            // Write with version check
            match store
                .update_state(
                    "gov1",
                    "counter",
                    new_state,
                    version, // Expected version
                    ChangeMetadata::new("user", "increment", Some(version)),
                )
                .await
            {
                Ok(new_version) => println!("Updated to version {}", new_version),
                Err(Error::VersionConflict { .. }) => {
                    println!("Conflict detected, retrying...");
                    // Retry from beginning
                }
                Err(e) => return Err(e),
            }

            let late = store.update_state("gov1", "counter", is_late, version, why()).await;
            assert!(matches!(late, Err(Error::VersionConflict { expected: 1, actual: 2, .. })));
            assert_eq!(store.get_state("gov1", "counter").await?.0.data, counter(1).data);
            Ok(())
        }

        /// As it is written but for the sums: JSON values have no `-=`.
        #[tokio::test]
        async fn pattern_3() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            for (name, balance) in [("account_a", 300), ("account_b", 50)] {
                let account = snapshot(name, json!({ "balance": balance }));
                store.save_state("gov1", name, account, why()).await?;
            }

            let manager = TransactionManager::new(store.clone());

            manager
                .execute_transaction("governor1", |store| {
                    Box::pin(async move {
                        let metadata = why();
                        // Read
                        let (account_a, ver_a) = store.get_state("gov1", "account_a").await?;
                        let (account_b, ver_b) = store.get_state("gov1", "account_b").await?;

                        // Compute
                        let mut new_a = account_a.clone();
                        let mut new_b = account_b.clone();
                        let balance = |of: &StateSnapshot| of.data["balance"].as_i64().unwrap();
                        new_a.data["balance"] = json!(balance(&account_a) - 100);
                        new_b.data["balance"] = json!(balance(&account_b) + 100);

                        // Write (atomic)
                        let twice = metadata.clone();
                        store.update_state("gov1", "account_a", new_a, ver_a, twice).await?;
                        store.update_state("gov1", "account_b", new_b, ver_b, metadata).await?;

                        Ok(())
                    })
                })
                .await?;

            for (name, balance) in [("account_a", 200), ("account_b", 150)] {
                let (account, version) = store.get_state("gov1", name).await?;
                assert_eq!((account.data, version), (json!({ "balance": balance }), 2));
            }
            // Strong consistency: all operations or none
            let none = manager.execute_transaction("gov1", |store| {
                Box::pin(async move {
                    store.save_state("gov1", "account_a", counter(0), why()).await?;
                    store.get_state("gov1", "nobody").await?;
                    Ok(())
                })
            });
            assert!(matches!(none.await, Err(Error::StateNotFound { .. })));
            assert_eq!(store.get_state("gov1", "account_a").await?.1, 2);
            proved(&store).await;
            Ok(())
        }

        #[tokio::test]
        async fn pattern_6() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            let manager = TransactionManager::new(store.clone());

            let lock = manager
                .acquire_lock("database_migration", "process_1", Duration::from_secs(30))
                .await?;

            // Only one process can execute this section
            let short = Duration::from_secs(30);
            let other = manager.try_acquire_lock("database_migration", "process_2", short).await;
            assert!(
                matches!(&other, Err(Error::LockHeld { held_by, .. }) if held_by == "process_1"),
                "{other:?}"
            );

            // Auto-released when dropped, or explicitly:
            manager.release_lock("database_migration", &lock.lock_token).await?;

            assert!(lock.is_lost());
            let record = manager.lock_record("database_migration").await?.unwrap();
            assert_eq!(record.status, LockStatus::Free);
            // When dropped: who waits gets it.
            drop(manager.acquire_lock("database_migration", "process_2", short).await?);
            let next = manager.acquire_lock("database_migration", "process_3", short).await?;
            assert_eq!((next.client_id.as_str(), next.fencing_token), ("process_3", 3));
            Ok(())
        }

        #[tokio::test]
        async fn several_states_at_once() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            let manager = TransactionManager::new(store.clone());
            for name in ["state1", "state2"] {
                store.save_state("gov1", name, snapshot(name, json!(1)), why()).await?;
            }
            let new_state1 = snapshot("state1", json!(2));
            let new_state2 = snapshot("state2", json!(2));
            let (metadata1, metadata2) = (why(), why());

            // Good: Get multiple states in one operation
            let states = store.batch_get_states("gov1", &["state1", "state2", "state3"]).await?;

            // Better: Use transactions for consistency
            manager
                .read_write_transaction(
                    "gov1",
                    &["state1", "state2"], // Read these
                    &[
                        ("state1", new_state1, metadata1),
                        ("state2", new_state2, metadata2),
                    ], // Write these atomically
                )
                .await?;

            assert_eq!(states.len(), 2, "one of the three does not exist");
            for name in ["state1", "state2"] {
                assert_eq!(store.get_state("gov1", name).await?.0.data, json!(2));
            }
            Ok(())
        }

        #[tokio::test]
        async fn figures_and_cleanup() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            let persister = StateMachinePersister::with_defaults(store.clone());
            store.save_state("gov1", "counter", counter(1), why()).await?;
            store.save_state("gov1", "counter", counter(2), why()).await?;

            // Keep 30 days of data
            let stats = persister.cleanup_old_data("gov1", 30).await?;
            println!("Recovered {} bytes", stats.recovered_bytes);
            assert_eq!(stats.recovered_bytes, 0, "all of it is younger");

            let stats = store.get_stats().await?;
            println!("Total states: {}", stats.total_states);
            println!("Total events: {}", stats.total_events);
            println!("Cache size: {} bytes", stats.cache_size_bytes);
            println!("Max version: {}", stats.max_version);
            assert_eq!((stats.total_states, stats.total_events, stats.max_version), (1, 2, 2));
            Ok(())
        }

        #[tokio::test]
        async fn transient_and_permanent_errors() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            let store = open(&place).await?;
            store.save_state("gov1", "counter", counter(1), why()).await?;
            let tries = std::sync::atomic::AtomicU64::new(0);
            // The first try expects a version that is gone.
            let operation = async || {
                let expected = tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                store.update_state("gov1", "counter", counter(2), expected, why()).await
            };

            let version = match operation().await {
                Err(err) if err.is_transient() => {
                    // Retry with backoff
                    let backoff = err.backoff_duration();
                    tokio::time::sleep(backoff).await;
                    operation().await?
                }
                Err(err) => return Err(err),
                Ok(result) => result,
            };
            assert_eq!((version, tries.into_inner()), (2, 2));

            let operation = async || store.get_state("gov1", "nobody").await;
            match operation().await {
                Err(err) if err.is_permanent() => {
                    // Don't retry - fix the issue first
                    assert!(matches!(err, Error::StateNotFound { .. }) && !err.is_transient());
                }
                other => panic!("{other:?}"),
            }
            Ok(())
        }

        #[tokio::test(flavor = "multi_thread")]
        async fn test_concurrent_modifications() -> Result<()> {
            let Some(place) = place().await else { return Ok(()) };
            // Multiple tasks modifying same state
            let store = Arc::new(open(&place).await?);
            store.save_state("gov1", "counter", counter(0), why()).await?;

            let mut tasks = vec![];
            for _ in 0..10 {
                let store_clone = store.clone();
                tasks.push(tokio::spawn(async move {
                    // Try to modify state
                    // Some will succeed, some will conflict
                    let (state, version) = store_clone.get_state("gov1", "counter").await?;
                    let next = counter(state.data["count"].as_u64().unwrap() + 1);
                    store_clone.update_state("gov1", "counter", next, version, why()).await
                }));
            }

            // Verify total count matches successful operations
            let mut succeeded = 0;
            for task in tasks {
                match task.await.unwrap() {
                    Ok(_) => succeeded += 1,
                    Err(error) => assert!(matches!(error, Error::VersionConflict { .. }), "{error}"),
                }
            }
            assert!(succeeded > 0);
            let (state, version) = store.get_state("gov1", "counter").await?;
            assert_eq!((state.data, version), (counter(succeeded).data, succeeded + 1));
            // Whatever takes a store takes one that is shared.
            let manager = TransactionManager::new(Arc::clone(&store));
            let read = |tx: Transaction| async move { tx.get_state("gov1", "counter").await };
            assert_eq!(manager.execute_transaction("gov1", read).await?.1, version);
            proved(&store).await;
            Ok(())
        }
    };
}

#[test]
fn when_snapshots_are_saved() {
    let written = PersistenceConfig {
        snapshot_interval: 100,      // Snapshot every 100 events
        snapshot_retention: 5,       // Keep 5 latest snapshots
        auto_replay: true,           // Auto-reconstruct on load
        max_replay_batch_size: 1000, // Prevent memory spikes
    };
    assert_eq!(written, PersistenceConfig::default());
}

#[test]
#[allow(clippy::bool_comparison)]
fn vector_clocks_and_resolvers() -> Result<()> {
    let mut clock1 = VectorClockSnapshot::new();
    clock1.increment("node1"); // Local event
    clock1.increment("node1"); // Another event on node1

    let mut clock2 = VectorClockSnapshot::new();
    clock2.increment("node2"); // Event on node2

    // Check causality
    assert!(clock1.happened_before(&clock2) == false);
    assert!(clock1.concurrent_with(&clock2) == true);

    let (mut state1, mut state2) = (counter(1), counter(2));
    state2.timestamp = state1.timestamp + chrono::TimeDelta::seconds(1);

    let resolver = LastWriteWinsResolver;
    // Newer timestamp always wins
    let resolved = resolver.resolve(&state1, &state2)?;
    // Returns: state with later timestamp
    assert_eq!(resolved.data, state2.data);

    // Causality against the time.
    state2.causality = clock1.clone();
    state1.causality = clock1;
    state1.causality.merge(&clock2);
    assert!(state2.causality.happened_before(&state1.causality));
    assert_eq!(CausalityAwareResolver.resolve(&state1, &state2)?.data, state1.data);
    let ec = EventualConsistency::with_resolver(Box::new(CausalityAwareResolver));
    assert_eq!(ec.resolve_conflict(&state1, &state2)?.data, state1.data);
    Ok(())
}

mod firestore {
    use tai_state::FirestoreStore;
    use tai_state::testing::emulator::{Emulator, fresh_project};

    async fn place() -> Option<(&'static str, String)> {
        Some((Emulator::shared().await?.address(), fresh_project()))
    }

    async fn open((emulator, project): &(&str, String)) -> Result<FirestoreStore> {
        FirestoreStore::builder(project).emulator(*emulator).connect().await
    }

    as_written!();
}

mod file {
    use tai_state::StateStore;

    async fn place() -> Option<tempfile::TempDir> {
        tempfile::tempdir().ok()
    }

    async fn open(folder: &tempfile::TempDir) -> Result<StateStore> {
        StateStore::open(folder.path().join("app.tai")).await
    }

    as_written!();
}

mod memory {
    use tai_state::StateStore;

    /// What is in memory lives as long as one handle on it.
    async fn place() -> Option<StateStore> {
        Some(StateStore::in_memory())
    }

    async fn open(store: &StateStore) -> Result<StateStore> {
        Ok(store.clone())
    }

    as_written!();
}
