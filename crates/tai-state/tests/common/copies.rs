//! Copies of a state that are changed apart from it, and their repair.

use chrono::TimeDelta;
use serde_json::{Value, json};
use tai_state::{
    Causality, ChangeMetadata, ConflictResolver, Event, EventualConsistency, Repair, RepairOutcome,
    StateSnapshot, StateStore,
};

use super::{Make, open, proved, snapshot, why};

/// The state, read from the store.
pub(crate) async fn read(store: &StateStore) -> StateSnapshot {
    store.get_state("gov", "s").await.unwrap().0
}

pub(crate) async fn save(store: &StateStore, data: Value) -> StateSnapshot {
    store.save_state("gov", "s", snapshot("s", data), why()).await.unwrap();
    read(store).await
}

/// What becomes of a copy elsewhere: changed by another node, so many seconds later.
pub(crate) fn elsewhere(
    copy: &StateSnapshot,
    node: &str,
    seconds: i64,
    data: Value,
) -> StateSnapshot {
    let mut changed = copy.clone();
    changed.data = data;
    changed.causality.increment(node);
    changed.timestamp += TimeDelta::seconds(seconds);
    changed.metadata = ChangeMetadata::new(node, "apart", Some(copy.version));
    changed
}

/// A store with two versions, and a copy that was changed on the basis of the first.
pub(crate) async fn in_conflict(make: Make<'_>, seconds: i64) -> (StateStore, StateSnapshot) {
    let store = open(make);
    let first = save(&store, json!({"n": 1})).await;
    save(&store, json!({"n": 2})).await;
    let copy = elsewhere(&first, "elsewhere", seconds, json!({"n": "copy"}));
    (store, copy)
}

pub(crate) fn with(resolver: impl ConflictResolver + 'static) -> EventualConsistency {
    EventualConsistency::with_resolver(Box::new(resolver))
}

pub(crate) async fn repair(
    ec: &EventualConsistency,
    store: &StateStore,
    copy: &StateSnapshot,
) -> Repair {
    ec.repair(store, "gov", copy, ChangeMetadata::new("repairer", "repair", None)).await.unwrap()
}

pub(crate) async fn events(store: &StateStore) -> Vec<Event> {
    store.history("gov", "s", ..).await.unwrap().next_page().await.unwrap()
}

/// Whether a version knows all that a copy knows.
pub(crate) fn knows(version: &StateSnapshot, copy: &StateSnapshot) -> bool {
    let both = [Causality::Before, Causality::Equal];
    both.contains(&copy.causality.compare(&version.causality))
}

/// That the answer is what is stored, that it knows of the copy, and that a second repair writes nothing.
pub(crate) async fn settled(
    ec: &EventualConsistency,
    store: &StateStore,
    copy: &StateSnapshot,
    done: &Repair,
) {
    let record = store.record("gov", "s").await.unwrap().unwrap();
    assert_eq!((&record.snapshot, record.deleted), (&done.newest, done.deleted));
    assert!(knows(&done.newest, copy));
    let again = repair(ec, store, copy).await;
    assert!(matches!(again.outcome, RepairOutcome::Stale | RepairOutcome::Unchanged), "{again:?}");
    assert_eq!(again.newest, done.newest);
    assert_eq!(again.lost_version, None);
    proved(store).await;
}
