//! The past: differences, going back, all states at one time, and a governor's events in order, each
//! compared with a plain fold.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, TimeZone, Utc};
use common::{Make, Random, options, proved, snapshot, why};
use serde_json::{Value, json};
use tai_state::{
    CleanupOptions, Error, ManualClock, NewTransition, StateMachinePersister, StateStore,
    TransactionManager,
};

fn at(second: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_767_225_600 + second, 0).unwrap()
}

type Told = (DateTime<Utc>, String, u64, Value);

/// Random transitions of several states with equal times among them; deletions too.
async fn logs(store: &StateStore, random: &mut Random, count: u64) -> Vec<Told> {
    let persister = StateMachinePersister::with_defaults(store.clone());
    let mut told: Vec<Told> = Vec::new();
    let mut second = 0;
    let mut newest: BTreeMap<String, (u64, bool)> = BTreeMap::new();
    for n in 0..count {
        second += random.below(3) as i64;
        let id = ["a", "a-b", "b", "c/d"][random.below(4) as usize].to_owned();
        let (version, alive) = newest.get(&id).copied().unwrap_or((0, false));
        let delete = alive && random.below(9) == 0;
        let data = if delete { Value::Null } else { json!({ "n": n }) };
        let change = match delete {
            true => NewTransition::to_deleted("g", &id, "rm", why()),
            false => NewTransition::to("g", &id, "step", data.clone(), why()),
        };
        persister.append(change.at(at(second))).await.unwrap();
        newest.insert(id.clone(), (version + 1, !delete));
        told.push((at(second), id, version + 1, data));
    }
    told
}

async fn everything_agrees_with_a_plain_fold(make: Make<'_>) {
    let mut random = Random::announced("everything_agrees_with_a_plain_fold");
    let store = make(options(|options| options.clock = Arc::new(ManualClock::at(at(100_000)))));
    let told = logs(&store, &mut random, 120).await;
    let last = told.last().unwrap().0;
    for _ in 0..25 {
        let from =
            at(random.below(130) as i64) + TimeDelta::microseconds(random.below(3) as i64 - 1);
        let to = from + TimeDelta::seconds(random.below(60) as i64);
        let within = |time: &DateTime<Utc>| from <= *time && *time <= to;

        // The governor's events, in the order of time, then id, then version.
        let mut expected: Vec<&Told> = told.iter().filter(|told| within(&told.0)).collect();
        expected
            .sort_by_key(|told| (told.0, format!("{}~{:020}", told.1.replace('/', "%2F"), told.2)));
        let mut timeline = store.timeline("g", Some(from), Some(to)).await.unwrap();
        let mut found = Vec::new();
        // One by one and in pages, mixed: nothing is given twice or passed over.
        while let Some(event) = timeline.next().await.unwrap() {
            found.push(event);
            if random.below(20) == 0 {
                found.extend(timeline.next_page().await.unwrap());
            }
        }
        assert_eq!(found.len(), expected.len());
        for (event, (time, id, version, data)) in found.iter().zip(&expected) {
            let said = (&event.timestamp, event.to_state.id.as_str(), event.version());
            assert_eq!(said, (time, id.as_str(), *version));
            assert_eq!(event.to_state.data, *data);
            // Before it stands what the version before said, unless that was a deletion.
            let before = told.iter().find(|(_, of, at, _)| of == id && at + 1 == *version);
            let before = before.map(|(_, _, _, data)| data).filter(|data| !data.is_null());
            assert_eq!(event.from_state.as_ref().map(|state| &state.data), before);
        }

        // One state's.
        let of_a: Vec<u64> = told
            .iter()
            .filter(|told| told.1 == "a" && within(&told.0))
            .map(|told| told.2)
            .collect();
        let mut history = store.events_between("g", "a", from, to).await.unwrap();
        let mut versions = Vec::new();
        while let Some(event) = history.next().await.unwrap() {
            versions.push(event.version());
        }
        assert_eq!(versions, of_a, "{from} to {to}");

        // All states at one time.
        let mut expected: BTreeMap<&str, (u64, &Value)> = BTreeMap::new();
        for (time, id, version, data) in &told {
            if *time <= to {
                expected.insert(id, (*version, data));
            }
        }
        expected.retain(|_, (_, data)| !data.is_null());
        let mut cut = store.consistent_cut("g", to).unwrap();
        let mut found = Vec::new();
        while let Some(record) = cut.next().await.unwrap() {
            found.push(record);
        }
        let found: BTreeMap<&str, (u64, &Value)> = found
            .iter()
            .map(|record| {
                (record.snapshot.id.as_str(), (record.snapshot.version, &record.snapshot.data))
            })
            .collect();
        assert_eq!(found, expected, "at {to}");
    }
    let whole = store.timeline("g", None, None).await.unwrap().next_page().await.unwrap();
    assert_eq!(whole.len(), told.len());
    assert!(
        store
            .timeline("g", Some(last + TimeDelta::seconds(1)), None)
            .await
            .unwrap()
            .next_page()
            .await
            .unwrap()
            .is_empty()
    );
    let error = store.consistent_cut("g", at(100_001)).unwrap_err();
    assert_eq!(error.code(), "invalid_state");
}

async fn differences_applied_give_the_other(make: Make<'_>) {
    let store = make(options(|_| {}));
    let mut random = Random::announced("differences_applied_give_the_other");
    let mut versions = vec![Value::Null];
    for n in 0..12u64 {
        let many: Vec<u64> = (0..random.below(5)).map(|_| random.below(3)).collect();
        let data = json!({"n": n / 2, "list": many, "deep": {"a": random.below(2), "b~/": n}});
        store.save_state("g", "s", snapshot("s", data.clone()), why()).await.unwrap();
        versions.push(data);
    }
    versions.push(Value::Null);
    store.delete_state("g", "s", None, why()).await.unwrap();
    for from in 0..versions.len() {
        for to in 0..versions.len() {
            let patch = store.diff("g", "s", from as u64, to as u64).await.unwrap();
            let patch: json_patch::Patch = serde_json::from_value(patch).unwrap();
            let mut patched = versions[from].clone();
            json_patch::patch(&mut patched, &patch).unwrap();
            assert_eq!(patched, versions[to], "v{from} to v{to}");
        }
    }
    assert_eq!(store.diff("g", "s", 1, 99).await.unwrap_err().code(), "state_not_found");
    assert_eq!(store.diff("g", "x", 0, 1).await.unwrap_err().code(), "state_not_found");
    let before = store.diff("g", "s", at(-1_000_000_000), 1).await.unwrap();
    assert_eq!(before, json!([{"op": "replace", "path": "", "value": versions[1]}]));
}

async fn going_back_is_a_version_of_its_own(make: Make<'_>) {
    let store = make(options(|_| {}));
    for n in 1..=5 {
        store.save_state("g", "s", snapshot("s", json!({ "n": n })), why()).await.unwrap();
    }
    let event = store.revert("g", "s", 2, why()).await.unwrap();
    assert_eq!((event.version(), event.action.as_str()), (6, "revert"));
    assert_eq!(event.to_state.data, json!({"n": 2}));
    assert_eq!(event.metadata.context["reverted_to"], 2);
    assert_eq!(event.from_state.unwrap().data, json!({"n": 5}));
    assert_eq!(store.state_at_version("g", "s", 5).await.unwrap().data, json!({"n": 5}));
    // Also what was deleted comes back; but not to where it was deleted.
    store.delete_state("g", "s", None, why()).await.unwrap();
    assert_eq!(store.revert("g", "s", 7, why()).await.unwrap_err().code(), "state_not_found");
    assert_eq!(store.revert("g", "s", 1, why()).await.unwrap().version(), 8);
    assert_eq!(store.get_state("g", "s").await.unwrap().0.data, json!({"n": 1}));
    assert_eq!(store.revert("g", "s", 80, why()).await.unwrap_err().code(), "state_not_found");
    let persister = StateMachinePersister::with_defaults(store.clone());
    persister.cleanup_old_data("g", 0).await.unwrap();
    let gone = store.revert("g", "s", 2, why()).await.unwrap_err();
    assert!(matches!(gone, Error::HistoryTrimmed { first_version: 8, .. }), "{gone}");
    proved(&store).await;
}

/// A transaction's changes have one time, so no time shows half of it.
async fn a_cut_shows_all_of_a_transaction(make: Make<'_>) {
    let store = make(options(|_| {}));
    let manager = TransactionManager::new(&store);
    for n in 0..10 {
        manager
            .execute_transaction("g", |tx| async move {
                for id in ["x", "y", "z"] {
                    tx.save_state("g", id, snapshot(id, json!(n)), why()).await?;
                }
                Ok(())
            })
            .await
            .unwrap();
    }
    let mut history = store.history("g", "y", ..).await.unwrap();
    let mut seen = 0;
    while let Some(event) = history.next().await.unwrap() {
        let page = store.consistent_cut("g", event.timestamp).unwrap().next_page().await.unwrap();
        let data: Vec<&Value> = page.iter().map(|record| &record.snapshot.data).collect();
        assert!(data.len() == 3 && data.windows(2).all(|pair| pair[0] == pair[1]), "{data:?}");
        seen += 1;
    }
    assert_eq!(seen, 10);
}

/// What was cleaned up is refused wherever it would be needed, and nowhere else.
async fn what_is_not_kept_is_said(make: Make<'_>) {
    let store = make(options(|options| options.clock = Arc::new(ManualClock::at(at(1_000)))));
    let persister = StateMachinePersister::with_defaults(store.clone());
    for n in 1..=20 {
        let change = NewTransition::to("g", "s", "step", json!(n), why()).at(at(n * 10));
        persister.append(change).await.unwrap();
    }
    let keep = CleanupOptions::before(at(105));
    assert_eq!(persister.cleanup("g", &keep, |_| {}).await.unwrap().events, 9);
    let trimmed = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::HistoryTrimmed { first_version: 10, .. }), "{error}");
    };
    trimmed(store.events_between("g", "s", at(95), at(300)).await.map(drop));
    trimmed(store.timeline("g", Some(at(95)), None).await.map(drop));
    trimmed(store.diff("g", "s", 3, 15).await.map(drop));
    // What ends before the cut is not empty, it is gone.
    trimmed(store.history("g", "s", ..=3).await.map(drop));
    trimmed(store.history_between("g", "s", None, Some(3.into())).await.map(drop));
    trimmed(store.history_between("g", "s", None, Some(at(95).into())).await.map(drop));
    trimmed(store.timeline("g", None, Some(at(95))).await.map(drop));
    trimmed(store.diff("g", "s", 0, 15).await.map(drop));
    trimmed(store.diff("g", "s", at(95), 15).await.map(drop));
    trimmed(store.consistent_cut("g", at(95)).unwrap().next_page().await.map(drop));
    // From the cutoff on all of it is there.
    let mut history = store.events_between("g", "s", at(105), at(125)).await.unwrap();
    let page = history.next_page().await.unwrap();
    assert_eq!(page.iter().map(tai_state::Event::version).collect::<Vec<_>>(), [11, 12]);
    assert_eq!(page[0].from_state.as_ref().unwrap().version, 10);
    let cut = store.consistent_cut("g", at(105)).unwrap().next_page().await.unwrap();
    assert_eq!(cut[0].snapshot.version, 10);
    let whole = store.timeline("g", None, None).await.unwrap().next_page().await.unwrap();
    assert_eq!(whole.len(), 11);
}

on_every_backend!(
    everything_agrees_with_a_plain_fold,
    differences_applied_give_the_other,
    going_back_is_a_version_of_its_own,
    a_cut_shows_all_of_a_transaction,
    what_is_not_kept_is_said,
);
