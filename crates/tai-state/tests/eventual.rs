//! What `EventualConsistency` promises, on every backend: how copies are resolved, and what a repair writes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chrono::TimeDelta;
use common::copies::{elsewhere, events, in_conflict, read, repair, save, settled, with};
use common::{Make, open, proved, snapshot, why};
use serde_json::json;
use tai_state::{
    CONFLICT_CONTEXT, CONFLICT_LOST, CONFLICT_RESOLVED, Causality, CausalityAwareResolver,
    ChangeMetadata, ConflictResolver, Error, EventualConsistency, FieldMergeResolver, Freshness,
    HighestVersionResolver, LastWriteWinsResolver, REPAIRED, RepairOutcome, ResolveWith,
    StateSnapshot,
};

on_every_backend![
    concurrent_versions_are_resolved_by_time,
    a_stale_copy_changes_nothing,
    a_state_that_is_not_there_is_created,
    a_newer_copy_is_no_conflict,
    the_loser_stays_on_record,
    what_both_sides_came_to_is_no_conflict,
    equal_clocks_with_different_data,
    deleted_states,
    a_base_from_the_log,
    a_base_is_the_newest_that_both_know,
    what_cannot_be_merged_writes_nothing,
    what_cannot_be_kept_is_refused,
    freshness_against_a_store,
];

async fn concurrent_versions_are_resolved_by_time(make: Make<'_>) {
    let store = open(make);
    let v1 = save(&store, json!({"count": 1})).await;
    // Two concurrent versions, each from a replica of its own.
    let v1_a = elsewhere(&v1, "replica1", 20, json!({"count": 2}));
    let v1_b = elsewhere(&v1, "replica2", 10, json!({"count": 3}));
    assert!(v1_a.causality.concurrent_with(&v1_b.causality));

    let ec = EventualConsistency::new();
    let resolved = ec.resolve_conflict(&v1_a, &v1_b).unwrap();
    println!("Resolved to version with timestamp: {}", resolved.timestamp);
    assert_eq!((resolved.timestamp, &resolved.data), (v1_a.timestamp, &v1_a.data));
    for of in [&v1_a, &v1_b, &v1] {
        assert!(of.causality.happened_before(&resolved.causality));
    }
    let resolvers: [Box<dyn ConflictResolver>; 3] = [
        Box::new(LastWriteWinsResolver),
        Box::new(CausalityAwareResolver),
        Box::new(HighestVersionResolver),
    ];
    for resolver in resolvers {
        let ec = EventualConsistency::with_resolver(resolver);
        assert_eq!(ec.resolve_conflict(&v1_a, &v1_b).unwrap(), resolved);
        assert_eq!(ec.resolve_conflict(&v1_b, &v1_a).unwrap(), resolved);
        for versions in [[&v1, &v1_a, &v1_b], [&v1_b, &v1_a, &v1], [&v1_a, &v1, &v1_b]] {
            assert_eq!(ec.resolve_all(&versions.map(Clone::clone)).unwrap(), resolved);
        }
        let statistics = ec.statistics();
        assert_eq!((statistics.conflicts_detected, statistics.conflicts_resolved), (5, 5));
    }
    // What is only older is no conflict.
    let ec = EventualConsistency::default();
    assert_eq!(ec.resolve_conflict(&v1, &v1_b).unwrap(), v1_b);
    assert_eq!(ec.statistics().conflicts_detected, 0);
    let other = snapshot("other", json!(1));
    assert_eq!(ec.resolve_conflict(&v1, &other).unwrap_err().code(), "invalid_state");
    assert_eq!(ec.resolve_all(&[]).unwrap_err().code(), "invalid_state");
    // A resolver of one's own must answer with a version of the same state.
    let wrong = with(ResolveWith::new("wrong", move |_: &StateSnapshot, _: &StateSnapshot| {
        Ok(other.clone())
    }));
    assert_eq!(wrong.resolve_conflict(&v1_a, &v1_b).unwrap_err().code(), "invalid_state");
    assert_eq!(
        wrong.repair(&store, "gov", &v1_a, why()).await.unwrap().outcome,
        RepairOutcome::Advanced
    );
    assert_eq!(
        wrong.repair(&store, "gov", &v1_b, why()).await.unwrap_err().code(),
        "invalid_state"
    );
}

async fn a_stale_copy_changes_nothing(make: Make<'_>) {
    let store = open(make);
    let ec = EventualConsistency::new();
    let old = save(&store, json!(1)).await;
    let same = repair(&ec, &store, &old).await;
    assert_eq!(
        (same.outcome, &same.newest, same.lost_version),
        (RepairOutcome::Unchanged, &old, None)
    );
    let newest = save(&store, json!(2)).await;
    let by_hand = snapshot("s", json!(3));
    for copy in [&old, &by_hand] {
        let stale = repair(&ec, &store, copy).await;
        assert_eq!((stale.outcome, &stale.newest), (RepairOutcome::Stale, &newest));
    }
    // The last write does not count either: the store knows of it.
    let mut late = old.clone();
    late.timestamp += TimeDelta::days(1);
    let stale = repair(&with(LastWriteWinsResolver), &store, &late).await;
    assert_eq!(stale.outcome, RepairOutcome::Stale);
    assert_eq!(events(&store).await.len(), 2);
    let statistics = ec.statistics();
    assert_eq!((statistics.stale_reads, statistics.read_repairs), (2, 0));
    assert_eq!(statistics.conflicts_detected, 0);
}

async fn a_state_that_is_not_there_is_created(make: Make<'_>) {
    let (from, to) = (open(make), open(make));
    let ec = EventualConsistency::new();
    let copy = elsewhere(&save(&from, json!({"x": 1.0})).await, "elsewhere", -5, json!({"x": 2.0}));
    let created = repair(&ec, &to, &copy).await;
    assert_eq!((created.outcome, created.lost_version), (RepairOutcome::Created, None));
    assert_eq!((created.newest.version, created.newest.timestamp), (1, copy.timestamp));
    assert_eq!(created.newest.data, json!({"x": 2.0}));
    settled(&ec, &to, &copy, &created).await;
    let event = &events(&to).await[0];
    assert_eq!((event.action.as_str(), event.metadata.changed_by.as_str()), (REPAIRED, "repairer"));
    let note = &event.metadata.context[CONFLICT_CONTEXT];
    assert_eq!((&note["outcome"], &note["with_version"]), (&json!("created"), &json!(0)));
    assert_eq!(note["mine"]["changed_by"], "elsewhere");
    assert_eq!(note["mine"]["causality"], serde_json::to_value(&copy.causality).unwrap());
    assert_eq!(ec.statistics().read_repairs, 1);
}

async fn a_newer_copy_is_no_conflict(make: Make<'_>) {
    let store = open(make);
    let first = save(&store, json!(1)).await;
    // Its wall clock is behind; it knows better all the same, and the resolver is not asked.
    let copy = elsewhere(&first, "elsewhere", -60, json!(2));
    let ec = with(ResolveWith::new("never", |_: &StateSnapshot, _: &StateSnapshot| {
        panic!("there is no conflict")
    }));
    let done = repair(&ec, &store, &copy).await;
    assert_eq!((done.outcome, done.lost_version), (RepairOutcome::Advanced, None));
    assert_eq!((done.newest.version, &done.newest.data), (2, &json!(2)));
    assert_eq!(done.newest.timestamp, first.timestamp, "time went backwards");
    settled(&ec, &store, &copy, &done).await;
    assert_eq!(events(&store).await[1].action, REPAIRED);
    assert_eq!(ec.statistics().conflicts_detected, 0);
}

async fn the_loser_stays_on_record(make: Make<'_>) {
    // The copy wins: what it replaces is the version before.
    let (store, copy) = in_conflict(make, 60).await;
    let ec = EventualConsistency::new();
    let done = repair(&ec, &store, &copy).await;
    assert_eq!((done.outcome, done.lost_version), (RepairOutcome::MineWon, Some(2)));
    assert_eq!((done.newest.version, &done.newest.data), (3, &copy.data));
    assert_eq!(done.newest.timestamp, copy.timestamp);
    settled(&ec, &store, &copy, &done).await;
    let log = events(&store).await;
    assert_eq!((log.len(), log[2].action.as_str()), (3, CONFLICT_RESOLVED));
    let note = &log[2].metadata.context[CONFLICT_CONTEXT];
    assert_eq!((&note["outcome"], &note["with_version"]), (&json!("mine_won"), &json!(2)));
    assert_eq!(
        (&note["resolver"], &note["mine"]["reason"]),
        (&json!("causality_aware"), &json!("apart"))
    );

    // The store wins: the copy is put on record, and never was the newest version.
    let (store, copy) = in_conflict(make, -60).await;
    let theirs = read(&store).await;
    let done = repair(&ec, &store, &copy).await;
    assert_eq!((done.outcome, done.lost_version), (RepairOutcome::TheirsWon, Some(3)));
    assert_eq!((done.newest.version, &done.newest.data), (4, &theirs.data));
    assert_eq!(done.newest.timestamp, theirs.timestamp);
    settled(&ec, &store, &copy, &done).await;
    let log = events(&store).await;
    assert_eq!(
        (log[2].action.as_str(), log[3].action.as_str()),
        (CONFLICT_LOST, CONFLICT_RESOLVED)
    );
    assert_eq!(log[2].to_state.data, copy.data);
    assert_eq!(store.state_at_version("gov", "s", 3).await.unwrap().data, copy.data);
    assert_eq!(log[2].metadata.context[CONFLICT_CONTEXT]["mine"]["changed_by"], "elsewhere");
    assert_eq!(log[3].metadata.context[CONFLICT_CONTEXT]["lost_version"], 3);

    // Something new of both.
    let (store, copy) = in_conflict(make, 60).await;
    let both = with(ResolveWith::new("both", |a: &StateSnapshot, b: &StateSnapshot| {
        let mut both = LastWriteWinsResolver.resolve(a, b)?;
        both.data = json!("both");
        Ok(both)
    }));
    let done = repair(&both, &store, &copy).await;
    assert_eq!((done.outcome, done.lost_version), (RepairOutcome::Merged, Some(3)));
    settled(&both, &store, &copy, &done).await;
    let data: Vec<_> = events(&store).await.into_iter().map(|event| event.to_state.data).collect();
    assert_eq!(data, [json!({"n": 1}), json!({"n": 2}), copy.data, json!("both")]);
    let statistics = ec.statistics();
    assert_eq!((statistics.conflicts_detected, statistics.conflicts_resolved), (2, 2));
    assert_eq!((statistics.read_repairs, statistics.losers_recorded), (2, 1));
    assert_eq!(statistics.stale_reads, 2);
}

async fn what_both_sides_came_to_is_no_conflict(make: Make<'_>) {
    let (store, mut copy) = in_conflict(make, 60).await;
    copy.data = json!({"n": 2});
    let ec = EventualConsistency::new();
    let done = repair(&ec, &store, &copy).await;
    assert_eq!((done.outcome, done.lost_version), (RepairOutcome::Agreed, None));
    assert_eq!((done.newest.version, &done.newest.data), (3, &copy.data));
    settled(&ec, &store, &copy, &done).await;
    // By the canonical text: this is another number.
    let (store, mut copy) = in_conflict(make, 60).await;
    copy.data = json!({"n": 2.0});
    assert_eq!(repair(&ec, &store, &copy).await.outcome, RepairOutcome::MineWon);
}

/// As when a node has lost its counter and counts again what it had counted before.
async fn equal_clocks_with_different_data(make: Make<'_>) {
    for (seconds, outcome) in [(1, RepairOutcome::MineWon), (-1, RepairOutcome::TheirsWon)] {
        let store = open(make);
        let ec = EventualConsistency::new();
        let mut copy = save(&store, json!("theirs")).await;
        copy.data = json!("mine");
        copy.timestamp += TimeDelta::seconds(seconds);
        assert_eq!(ec.check(&store, "gov", &copy).await.unwrap(), Freshness::Concurrent);
        let done = repair(&ec, &store, &copy).await;
        assert_eq!(done.outcome, outcome);
        settled(&ec, &store, &copy, &done).await;
    }
}

async fn deleted_states(make: Make<'_>) {
    let ec = EventualConsistency::new();
    // The deletion knows of the copy.
    let store = open(make);
    let first = save(&store, json!(1)).await;
    store.delete_state("gov", "s", None, why()).await.unwrap();
    let done = repair(&ec, &store, &first).await;
    assert_eq!((done.outcome, done.deleted), (RepairOutcome::Stale, true));
    // A copy of the deletion itself.
    let gone = store.record("gov", "s").await.unwrap().unwrap().snapshot;
    assert_eq!(repair(&ec, &store, &gone).await.outcome, RepairOutcome::Unchanged);
    assert_eq!(ec.check(&store, "gov", &gone).await.unwrap(), Freshness::Current);
    // It was deleted here while it was changed there: the deletion is the last write, so it stays.
    let early = elsewhere(&first, "elsewhere", -60, json!("early"));
    let done = repair(&ec, &store, &early).await;
    assert_eq!((done.outcome, done.deleted), (RepairOutcome::TheirsWon, true));
    assert_eq!((done.newest.version, done.lost_version), (4, Some(3)));
    settled(&ec, &store, &early, &done).await;
    assert!(!store.exists("gov", "s").await.unwrap());
    assert_eq!(store.state_at_version("gov", "s", 3).await.unwrap().data, json!("early"));
    // A live null is not told from the deletion.
    let null = elsewhere(&first, "null", 60, json!(null));
    let done = repair(&ec, &store, &null).await;
    assert_eq!((done.outcome, done.deleted), (RepairOutcome::TheirsWon, true));
    settled(&ec, &store, &null, &done).await;
    // A later write brings it back.
    let late = elsewhere(&first, "late", 600, json!("late"));
    let done = repair(&ec, &store, &late).await;
    assert_eq!((done.outcome, done.deleted), (RepairOutcome::MineWon, false));
    settled(&ec, &store, &late, &done).await;
    assert_eq!(read(&store).await.data, json!("late"));
    // Whoever merges fields is told of both.
    let store = open(make);
    let first = save(&store, json!({"x": 1})).await;
    store.delete_state("gov", "s", None, why()).await.unwrap();
    let merge = with(FieldMergeResolver::default());
    let changed = elsewhere(&first, "elsewhere", 60, json!({"x": 2}));
    let refused = merge.repair(&store, "gov", &changed, why()).await.unwrap_err();
    assert!(
        matches!(&refused, Error::MergeConflict { fields, .. } if fields == &[""]),
        "{refused}"
    );
    let unchanged = elsewhere(&first, "elsewhere", 60, json!({"x": 1}));
    let done = repair(&merge, &store, &unchanged).await;
    assert_eq!((done.outcome, done.deleted), (RepairOutcome::TheirsWon, true));
    settled(&merge, &store, &unchanged, &done).await;
}

async fn a_base_from_the_log(make: Make<'_>) {
    let store = open(make);
    let first = save(&store, json!({"x": 1, "y": 1, "old": true})).await;
    save(&store, json!({"x": 2, "y": 1, "old": true})).await;
    let copy = elsewhere(&first, "elsewhere", -60, json!({"x": 1, "y": 2, "new": []}));
    let ec = with(FieldMergeResolver::default());
    // Without the log nobody knows who has changed what.
    let blind = ec.resolve_conflict(&copy, &read(&store).await).unwrap_err();
    assert!(
        matches!(&blind, Error::MergeConflict { fields, .. } if fields == &["/x", "/y"]),
        "{blind}"
    );
    let done = repair(&ec, &store, &copy).await;
    assert_eq!((done.outcome, done.lost_version), (RepairOutcome::Merged, Some(3)));
    assert_eq!(done.newest.data, json!({"x": 2, "y": 2, "new": []}));
    settled(&ec, &store, &copy, &done).await;
    // It goes on from there: the copy that was changed once more, and has not heard of the merge.
    let copy = elsewhere(&copy, "elsewhere", 120, json!({"x": 1, "y": 3, "new": [], "more": 1}));
    let done = repair(&with(FieldMergeResolver::default().or_last_write()), &store, &copy).await;
    assert_eq!(done.newest.data, json!({"x": 2, "y": 3, "new": [], "more": 1}));
    settled(&ec, &store, &copy, &done).await;
    let unknown = elsewhere(&snapshot("s", json!({})), "nobody", 0, json!({"x": 2, "z": 1}));
    let done = repair(&ec, &store, &unknown).await;
    assert_eq!(done.newest.data, json!({"x": 2, "y": 3, "new": [], "more": 1, "z": 1}));
}

/// Whatever the copy says of its origin: neither its version nor its parent lead to the base, the clocks do.
async fn a_base_is_the_newest_that_both_know(make: Make<'_>) {
    let asked = Arc::new(AtomicU64::new(0));
    #[derive(Debug)]
    struct Tells(Arc<AtomicU64>);
    impl ConflictResolver for Tells {
        fn resolve(
            &self,
            a: &StateSnapshot,
            b: &StateSnapshot,
        ) -> tai_state::Result<StateSnapshot> {
            self.resolve_with_base(None, a, b)
        }
        fn resolve_with_base(
            &self,
            base: Option<&StateSnapshot>,
            _: &StateSnapshot,
            b: &StateSnapshot,
        ) -> tai_state::Result<StateSnapshot> {
            self.0.store(base.map_or(0, |base| base.version), Ordering::SeqCst);
            // Nothing is to be written, so that the next case meets the same log.
            Err(Error::MergeConflict { state: b.id.to_string(), fields: Vec::new() })
        }
        fn uses_base(&self) -> bool {
            true
        }
    }
    let store = open(make);
    let mut versions = Vec::new();
    for n in 0..9 {
        versions.push(save(&store, json!(n)).await);
    }
    let ec = with(Tells(Arc::clone(&asked)));
    for known in 0..9usize {
        let from = match known {
            0 => snapshot("s", json!(null)),
            known => versions[known - 1].clone(),
        };
        for (says, parent) in
            [(known as u64, None), (0, Some(known as u64)), (7, Some(3)), (99, Some(1))]
        {
            let mut copy = elsewhere(&from, "elsewhere", 0, json!("copy"));
            (copy.version, copy.metadata.parent_version) = (says, parent);
            ec.repair(&store, "gov", &copy, why()).await.unwrap_err();
            let found = asked.swap(u64::MAX, Ordering::SeqCst);
            assert_eq!(found, known as u64, "says {says}, {parent:?}");
        }
    }
    // Equal clocks: what both started from is the version before.
    let mut twin = versions[8].clone();
    twin.data = json!("twin");
    ec.repair(&store, "gov", &twin, why()).await.unwrap_err();
    assert_eq!(asked.load(Ordering::SeqCst), 8);
}

async fn what_cannot_be_merged_writes_nothing(make: Make<'_>) {
    let (store, copy) = in_conflict(make, 60).await;
    let ec = with(FieldMergeResolver::default());
    let refused = ec.repair(&store, "gov", &copy, why()).await.unwrap_err();
    assert!(
        matches!(&refused, Error::MergeConflict { state, fields } if state == "s" && fields == &["/n"])
    );
    assert_eq!(events(&store).await.len(), 2);
    let statistics = ec.statistics();
    assert_eq!((statistics.conflicts_detected, statistics.conflicts_resolved), (1, 0));
    assert_eq!((statistics.read_repairs, statistics.losers_recorded), (0, 0));
}

async fn what_cannot_be_kept_is_refused(make: Make<'_>) {
    let (store, copy) = in_conflict(make, 60).await;
    let ec = EventualConsistency::new();
    let deep = (0..150).fold(json!(1), |inner, _| json!([inner]));
    let large = json!("x".repeat(1_000_000));
    for (data, code) in [(deep.clone(), "invalid_state"), (large, "too_large")] {
        let bad = StateSnapshot { data, ..copy.clone() };
        assert_eq!(ec.repair(&store, "gov", &bad, why()).await.unwrap_err().code(), code);
    }
    let deep_context = why().with_context("deep", deep);
    assert_eq!(
        ec.repair(&store, "gov", &copy, deep_context).await.unwrap_err().code(),
        "invalid_state"
    );
    assert_eq!(ec.repair(&store, "", &copy, why()).await.unwrap_err().code(), "invalid_state");
    let keyed = store.idempotency_key("k").unwrap();
    assert_eq!(ec.repair(&keyed, "gov", &copy, why()).await.unwrap_err().code(), "invalid_state");
    assert_eq!(events(&store).await.len(), 2);
    // What the copy says of itself does not fit beside the metadata; its data stand there all the same.
    let mut talkative = copy.clone();
    talkative.metadata.reason = "x".repeat(20_000);
    let mut metadata = ChangeMetadata::new("repairer", "y".repeat(20_000), None);
    metadata = metadata.with_context("mine", 1);
    let done = ec.repair(&store, "gov", &talkative, metadata).await.unwrap();
    assert_eq!(done.outcome, RepairOutcome::MineWon);
    let note = &done.newest.metadata.context[CONFLICT_CONTEXT];
    assert_eq!((&note["outcome"], &note["mine"]["version"]), (&json!("mine_won"), &json!(1)));
    assert_eq!(note["mine"].get("reason"), None);
    proved(&store).await;
}

async fn freshness_against_a_store(make: Make<'_>) {
    let (store, copy) = in_conflict(make, 60).await;
    let ec = EventualConsistency::new();
    let newest = read(&store).await;
    let newer = elsewhere(&newest, "elsewhere", 0, json!(3));
    let first = store.state_at_version("gov", "s", 1).await.unwrap();
    let missing = snapshot("missing", json!(1));
    for (copy, expected) in [
        (&missing, Freshness::First),
        (&newest, Freshness::Current),
        (&first, Freshness::Stale),
        (&copy, Freshness::Concurrent),
        (&newer, Freshness::Newer),
    ] {
        assert_eq!(ec.check(&store, "gov", copy).await.unwrap(), expected);
    }
    assert_eq!(newest.causality.compare(&copy.causality), Causality::Concurrent);
    let statistics = ec.statistics();
    assert_eq!((statistics.stale_reads, statistics.conflicts_detected), (1, 1));
    assert_eq!(events(&store).await.len(), 2);
    // Without a store: what was seen in one session, by all clones.
    for (copy, expected) in [
        (&first, Freshness::First),
        (&newest, Freshness::Newer),
        (&first, Freshness::Stale),
        (&newest, Freshness::Current),
        (&copy, Freshness::Concurrent),
    ] {
        assert_eq!(ec.clone().observe("gov", copy), expected);
    }
    assert_eq!(ec.observe("other", &first), Freshness::First);
    let statistics = ec.statistics();
    assert_eq!((statistics.stale_reads, statistics.conflicts_detected), (2, 2));
}
