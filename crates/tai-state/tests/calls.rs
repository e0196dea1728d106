//! How often a store asks its backend, and what it does when the answers do not fit together.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{snapshot, why};
use serde_json::json;
use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Kind};
use tai_state::testing::faults::{Call, FaultyBackend};
use tai_state::{StateStore, StoreOptions, TransactionManager};

fn on(backend: &Arc<dyn Backend>) -> FaultyBackend {
    FaultyBackend::new(Arc::clone(backend), [])
}

fn memory() -> Arc<dyn Backend> {
    Arc::new(MemoryBackend::new())
}

fn store(backend: &FaultyBackend) -> StateStore {
    StateStore::with_backend(Arc::new(backend.clone()), StoreOptions::default())
}

/// Counts the heads that are asked for.
fn counting(backend: &FaultyBackend) -> impl Fn() -> u64 + use<> {
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    backend.always(Call::Get(Kind::States), move || {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::ready(())
    });
    move || count.swap(0, Ordering::SeqCst)
}

async fn save(store: &StateStore, id: &str, n: u64) -> u64 {
    store.save_state("g", id, snapshot(id, json!(n)), why()).await.unwrap()
}

/// A head is read at most once before a change: not when it is remembered, and over a network not when
/// the guess that there is none costs no more than asking.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_read_once_at_most() {
    for is_far in [false, true] {
        let backend = memory();
        let counted = if is_far { on(&backend).far() } else { on(&backend) };
        let (first, reads) = (store(&counted), counting(&counted));
        save(&first, "s", 1).await;
        assert_eq!(reads(), u64::from(!is_far), "far: {is_far}");
        save(&first, "s", 2).await;
        first.update_state("g", "s", snapshot("s", json!(3)), 2, why()).await.unwrap();
        assert_eq!((reads(), counted.commits()), (0, 3), "it is remembered");

        // Whoever expects something, or deletes, asks first and is right at once.
        for id in ["a", "b"] {
            save(&first, id, 1).await;
        }
        let (second, before) = (store(&counted), counted.commits());
        reads();
        second.update_state("g", "a", snapshot("a", json!(2)), 1, why()).await.unwrap();
        assert_eq!(reads(), 1);
        second.delete_state("g", "b", None, why()).await.unwrap();
        assert_eq!(reads(), 1);
        assert_eq!(counted.commits() - before, 2);
        // What is refused is refused by a head that was just read.
        let third = store(&counted);
        reads();
        let refused = third.update_state("g", "a", snapshot("a", json!(3)), 1, why()).await;
        assert_eq!((refused.unwrap_err().code(), reads()), ("version_conflict", 1));
        let refused = third.update_state("g", "a", snapshot("a", json!(3)), 1, why()).await;
        assert_eq!((refused.unwrap_err().code(), reads()), ("version_conflict", 1));
    }
}

/// Several states are of one moment also where reading alone does not say so: one empty commit proves it,
/// and what it refutes is read again. One state needs no proof.
#[tokio::test(flavor = "multi_thread")]
async fn several_states_are_proved_to_be_of_one_moment() {
    let backend = memory();
    let writer = store(&on(&backend));
    for id in ["a", "b"] {
        save(&writer, id, 1).await;
    }
    let exact = on(&backend);
    store(&exact).batch_get_states("g", &["a", "b"]).await.unwrap();
    assert_eq!(exact.commits(), 0);

    let blurred = on(&backend).blurred();
    // Losing to a writer is no failed attempt of a reader, who expects nothing.
    let mut options = StoreOptions::default();
    options.retry.max_attempts = 1;
    let reader = StateStore::with_backend(Arc::new(blurred.clone()), options);
    reader.batch_get_states("g", &["a"]).await.unwrap();
    assert_eq!(blurred.commits(), 0);
    reader.batch_get_states("g", &["a", "b"]).await.unwrap();
    assert_eq!(blurred.commits(), 1);

    blurred.hold();
    let reading =
        tokio::spawn(async move { reader.batch_get_states("g", &["a", "b"]).await.unwrap() });
    while blurred.commits() < 2 {
        tokio::task::yield_now().await;
    }
    save(&writer, "b", 2).await;
    blurred.let_go();
    let read = reading.await.unwrap();
    assert_eq!((&read[0].data, &read[1].data), (&json!(1), &json!(2)));
    assert_eq!(blurred.commits(), 3);
}

/// Over a network nobody looks for an answer before there is something in the way; what is in the way may be
/// the answer to the same command, or to another.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_may_be_the_answer() {
    for is_far in [false, true] {
        let backend = memory();
        let counted = if is_far { on(&backend).far() } else { on(&backend) };
        let once = store(&counted).idempotency_key("k").unwrap();
        let update = |n: u64, expected: u64| {
            once.update_state("g", "s", snapshot("s", json!(n)), expected, why())
        };
        assert_eq!(update(1, 0).await.unwrap(), 1, "far: {is_far}");
        assert_eq!(update(1, 0).await.unwrap(), 1, "the first answer again");
        assert_eq!(save(&store(&on(&backend)), "s", 2).await, 2);
        assert_eq!(update(1, 0).await.unwrap(), 1, "whatever came after it");
        let other = update(7, 0).await.unwrap_err();
        assert_eq!(other.code(), "invalid_state", "another request under the key: {other}");
        // A conflict is one where the key has answered nothing.
        let fresh = store(&counted).idempotency_key("other").unwrap();
        let refused = fresh.update_state("g", "s", snapshot("s", json!(3)), 1, why()).await;
        assert_eq!(refused.unwrap_err().code(), "version_conflict");
    }
}

/// What a commit of several states leaves remembered is right for each of them.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_transaction_each_state_is_written_at_the_first_try() {
    let counted = on(&memory());
    let store = store(&counted);
    let write = |tx: tai_state::Transaction| async move {
        for id in ["a", "b", "c"] {
            tx.save_state("g", id, snapshot(id, json!(1)), why()).await?;
        }
        Ok(())
    };
    TransactionManager::new(&store).run(write).await.unwrap();
    let (reads, before) = (counting(&counted), counted.commits());
    for id in ["a", "b", "c"] {
        assert_eq!(save(&store, id, 2).await, 2);
    }
    assert_eq!((reads(), counted.commits() - before), (0, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_says_where_it_is() {
    let backend = memory();
    let place = backend.location();
    assert!(!place.is_empty());
    assert_eq!(store(&on(&backend)).location(), place);
}

/// What an engine finds in its own structure is part of the proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_structure_is_reported() {
    let store = store(&on(&memory()).broken("page 7 is never used"));
    save(&store, "s", 1).await;
    let report = store.verify(|_| {}).await.unwrap();
    assert!(!report.ok && report.problems.len() == 1, "{:?}", report.problems);
    assert!(report.problems[0].contains("page 7 is never used"), "{:?}", report.problems);
}
