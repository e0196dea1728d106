//! Hostile ids, values and arguments: kept exactly or refused with the store unchanged, on every backend.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::collections::BTreeSet;

use chrono::Utc;
use common::{Make, counter, open, proved, snapshot, why};
use serde_json::{Value, json};
use tai_state::{
    ChangeMetadata, ListOptions, NewTransition, StateMachinePersister, TransactionManager,
};

on_every_backend![
    hostile_ids_are_kept_or_refused,
    hostile_values_are_kept_or_refused,
    hostile_arguments_are_refused,
    a_clock_that_was_kept_can_be_updated,
];

/// Without the clone and the recursion that `json!` makes.
fn snapshot_of(id: &str, data: Value) -> tai_state::StateSnapshot {
    let mut new = snapshot(id, Value::Null);
    new.data = data;
    new
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
        "CON",
        "%2e%2e",
        " a ",
        "a\u{200b}b",
        "`a`.b",
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
        json!(9_223_372_036_854_775_808_u64),
        json!({"a.b": 1, "`": 2, "__type__": "x", "empty": {}, "null": null, "~": [null, {}]}),
        json!({}),
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
    for version in [0, 2, u64::MAX] {
        assert!(store.update_state("gov", "s", counter(1), version, why()).await.is_err());
        assert!(store.delete_state("gov", "s", Some(version), why()).await.is_err());
        assert!(store.state_at_version("gov", "s", version).await.is_err());
    }
    let manager = TransactionManager::new(&store);
    let years = std::time::Duration::from_secs(100 * 365 * 24 * 3_600);
    for lease in [std::time::Duration::ZERO, std::time::Duration::from_nanos(1), years] {
        let error = manager.acquire_lock("l", "me", lease).await.unwrap_err();
        assert_eq!(error.code(), "invalid_state");
    }
    let nothing: Vec<(String, tai_state::StateSnapshot, ChangeMetadata)> = Vec::new();
    manager.read_write_transaction::<&str, _>("gov", &[], &nothing).await.unwrap();
    let none = store.list_states("gov", &ListOptions::default().limit(0)).await.unwrap_err();
    assert_eq!(none.code(), "invalid_state");
    let many: Vec<_> = (0..10_001).map(|n| (format!("s{n}"), counter(n), why())).collect();
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

/// The limit holds for what is stored, so that no state is ever kept that cannot be updated.
async fn a_clock_that_was_kept_can_be_updated(make: Make<'_>) {
    let store = open(make);
    let with_clock = |from: u32| {
        let mut new = counter(1);
        for node in from..from + 400 {
            new.causality.increment(&format!("node-{node:010}-{}", "x".repeat(14)));
        }
        new
    };
    let mut refused = 0;
    for from in [0, 400, 800] {
        if store.save_state("g", "s", with_clock(from), why()).await.is_err() {
            refused += 1;
        }
        let (read, version) = store.get_state("g", "s").await.unwrap();
        store.update_state("g", "s", read, version, why()).await.unwrap();
    }
    assert!(refused > 0, "the clocks were too small to show anything");
    // A deep value with an address that is refused for itself.
    let deep = snapshot_of("s", (0..10_000).fold(Value::Null, |v, _| Value::Array(vec![v])));
    assert!(store.save_state("", "s", deep, why()).await.is_err());
}
