//! What the specification shows, as it is written there, on `FirestoreStore` and on `StateStore`: patterns
//! 4 and 5, the crash recovery and the migration guide. Patterns 1 to 3 are in `store.rs` and
//! `transactions.rs`, with the chaos test.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{counter, proved, why};
use serde_json::json;
use tai_state::{
    ChangeMetadata, Error, EventualConsistency, LastWriteWinsResolver, Result, StateId,
    StateMachinePersister, StateSnapshot,
};

/// The tests on one kind of store. Written once, they are compiled with each type: what is shown for a
/// `FirestoreStore` must not need a `StateStore`, nor the other way round. Only what the specification
/// leaves out is added: the bindings, and what is asserted.
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
    };
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
