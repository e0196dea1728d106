//! Both sides of every limit and condition of a write.

use serde_json::json;

use super::tests::{put, request, time};
use super::*;

fn policy(snapshot_interval: u64, snapshot_retention: usize) -> PersistenceConfig {
    PersistenceConfig { snapshot_interval, snapshot_retention, ..PersistenceConfig::default() }
}

fn planned(head: Option<&Head>, request: &Request) -> Result<Transition> {
    plan(head, request, time(0), "n", &policy(0, 0))
}

fn code(head: Option<&Head>, request: &Request) -> &'static str {
    planned(head, request).map_or_else(|error| error.code(), |_| "ok")
}

/// A head after so many changes.
fn head(versions: u64, policy: &PersistenceConfig) -> Head {
    let requests: Vec<_> = (1..=versions).map(|n| request(put(n), Expect::Any)).collect();
    super::tests::run(&requests, policy).pop().unwrap().head
}

/// Puts 1 with a changed request.
fn with(change: impl FnOnce(&mut Request)) -> Request {
    let mut changed = request(put(1), Expect::Any);
    change(&mut changed);
    changed
}

fn count(limit: u64) -> usize {
    usize::try_from(limit).unwrap()
}

#[test]
fn a_deletion_is_no_purge_and_a_note_of_one_neither() {
    let alive = head(1, &policy(0, 0));
    assert!(!is_purge(&alive.change));
    let change = |wish| planned(Some(&alive), &request(wish, Expect::Any)).unwrap().head.change;
    assert!(!is_purge(&change(Wish::Delete)));
    let mut purged = change(Wish::Purge);
    assert!(is_purge(&purged));
    purged.deleted = false;
    assert!(!is_purge(&purged));
}

#[test]
fn the_last_version_and_the_last_count() {
    let mut last = head(1, &policy(0, 0));
    last.change.version = MAX_COUNTER - 1;
    let step = planned(Some(&last), &request(put(1), Expect::Any)).unwrap();
    assert_eq!(step.head.version(), MAX_COUNTER);
    assert_eq!(code(Some(&step.head), &request(put(1), Expect::Any)), "invalid_state");

    let seen = |node: &str, count: u64| serde_json::from_value(json!({ node: count })).unwrap();
    for node in ["n", "m"] {
        let most = with(|r| r.based_on = seen(node, MAX_GIVEN_COUNT));
        assert_eq!(code(None, &most), "ok", "{node}");
        let more = with(|r| r.based_on = seen(node, MAX_GIVEN_COUNT + 1));
        assert_eq!(code(None, &more), "invalid_state", "{node}");
        // Whatever a writer brings along, the state can be written, deleted and purged after it.
        let step = planned(None, &most).unwrap().head;
        let seen = step.change.causality.clone();
        let step = planned(Some(&step), &with(|r| r.based_on = seen)).unwrap().head;
        let step = planned(Some(&step), &request(Wish::Delete, Expect::Any)).unwrap().head;
        assert_eq!(code(Some(&step), &request(Wish::Purge, Expect::Any)), "ok", "{node}");
    }
    let counted = |count| {
        let mut last = head(1, &policy(0, 0));
        last.change.causality = seen("n", count);
        last
    };
    let own = request(put(1), Expect::Any);
    let step = planned(Some(&counted(MAX_COUNTER - 1)), &own).unwrap();
    assert_eq!(step.head.change.causality.get("n"), MAX_COUNTER);
    assert_eq!(code(Some(&counted(MAX_COUNTER)), &own), "invalid_state");
    assert_eq!(code(None, &with(|r| r.metadata.parent_version = Some(MAX_COUNTER))), "ok");
    let beyond = with(|r| r.metadata.parent_version = Some(MAX_COUNTER + 1));
    assert_eq!(code(None, &beyond), "invalid_state");
}

#[test]
fn only_a_log_from_elsewhere_begins_with_a_deletion() {
    let delete = |at, expect| Request { at, ..request(Wish::Delete, expect) };
    let step = planned(None, &delete(Some(time(3)), Expect::Version(0))).unwrap();
    assert!(step.head.change.deleted && step.head.version() == 1);
    assert_eq!(code(None, &delete(None, Expect::Version(0))), "state_not_found");
    assert_eq!(code(None, &delete(Some(time(3)), Expect::Any)), "state_not_found");
    // That it was purged as well is told of what is deleted too.
    let purge = Request { action: PURGE.into(), ..delete(Some(time(4)), Expect::Version(1)) };
    let purged = planned(Some(&step.head), &purge).unwrap().head;
    assert!(purged.change.deleted && purged.version() == 2 && !is_purge(&purged.change));
    let now = Request { at: None, ..purge };
    assert_eq!(code(Some(&step.head), &now), "state_not_found");
    // What is there, but deleted, is not the beginning of a log.
    assert_eq!(
        code(Some(&step.head), &delete(Some(time(4)), Expect::Version(0))),
        "state_not_found"
    );
}

#[test]
fn no_interval_and_no_retention_save_nothing() {
    for (interval, retention) in [(0, 3), (1, 0), (0, 0)] {
        let policy = policy(interval, retention);
        let before = head(3, &policy);
        let step = plan(Some(&before), &request(put(4), Expect::Any), time(9), "n", &policy);
        let step = step.unwrap();
        assert_eq!((step.save_snapshot, step.drop_snapshots), (false, vec![]));
        assert!(step.head.snapshot_versions.is_empty());
    }
    assert_eq!(head(3, &policy(1, 3)).snapshot_versions, [1, 2, 3]);
}

#[test]
fn the_first_snapshot_of_a_whole_log_goes_like_any_other() {
    let whole = head(4, &policy(1, 2));
    assert_eq!((whole.cut_snapshot(), whole.snapshot_versions), (None, vec![3, 4]));
}

#[test]
fn everything_that_is_said_of_a_change_counts_up_to_its_limit() {
    let limit = count(MAX_METADATA_BYTES);
    // A name, a reason, and a key with a text, which takes two bytes more as JSON.
    let size = |reason: usize, text: usize| {
        with(|request| {
            request.metadata = ChangeMetadata::new("x".repeat(10), "y".repeat(reason), None)
                .with_context("key", "z".repeat(text));
        })
    };
    assert_eq!(code(None, &size(limit - 15 - 100, 100)), "ok");
    assert_eq!(code(None, &size(limit - 15 - 100, 101)), "too_large");
    assert_eq!(code(None, &size(limit - 15 - 99, 100)), "too_large");
    let two = |text: usize| {
        with(|request| {
            request.metadata = ChangeMetadata::new("", "", None)
                .with_context("a", "z".repeat(limit / 2))
                .with_context("b", "z".repeat(text));
        })
    };
    assert_eq!(code(None, &two(limit / 2 - 6)), "ok");
    assert_eq!(code(None, &two(limit / 2 - 5)), "too_large");

    for (bytes, said) in
        [(MAX_ID_BYTES, "ok"), (MAX_ID_BYTES + 1, "too_large"), (0, "invalid_state")]
    {
        assert_eq!(code(None, &with(|r| r.id = "i".repeat(count(bytes)))), said);
    }
    assert_eq!(code(None, &with(|r| r.action = "a".repeat(count(MAX_ACTION_BYTES)))), "ok");
    let long = with(|r| r.action = "a".repeat(count(MAX_ACTION_BYTES) + 1));
    assert_eq!(code(None, &long), "too_large");
}

#[test]
fn a_clock_counts_up_to_its_limit_also_where_two_meet() {
    // A node takes its name and 24 bytes.
    let clock = |from: usize, nodes: usize, bytes: usize| -> VectorClockSnapshot {
        let counts = (from..from + nodes).map(|n| (format!("{n:0>bytes$}"), json!(1)));
        serde_json::from_value(Value::Object(counts.collect())).unwrap()
    };
    let limit = count(MAX_GIVEN_CLOCK_BYTES);
    assert_eq!(limit % 64, 0);
    let most = limit / 64;
    // The writer's own node takes 25.
    let fits = with(|r| r.based_on = clock(0, most - 1, 40));
    assert_eq!(code(None, &fits), "ok");
    assert_eq!(code(None, &with(|r| r.based_on = clock(0, most, 40))), "too_large");
    assert_eq!(code(None, &with(|r| r.based_on = clock(0, most + 1, 40))), "too_large");
    let first = planned(None, &with(|r| r.based_on = clock(0, most / 2, 40))).unwrap();
    let other = |nodes| with(|r| r.based_on = clock(most, nodes, 40));
    assert_eq!(code(Some(&first.head), &other(most / 2 - 1)), "ok");
    assert_eq!(code(Some(&first.head), &other(most / 2)), "too_large");

    // The rest is for those who write it: also what is adopted from elsewhere, to the last byte, is written on.
    let adopted =
        adopt(None, &with(|r| r.based_on = clock(0, most, 40)), time(1), "n", &policy(0, 0));
    let mut last = adopted.unwrap().head;
    assert_eq!(last.change.causality.get("n"), 0);
    let free = count(MAX_CAUSALITY_BYTES) - limit;
    for n in 0..free / 64 {
        let node = format!("{n:x>40}");
        let again = with(|r| r.based_on = last.change.causality.clone());
        last = plan(Some(&last), &again, time(2), &node, &policy(0, 0)).unwrap().head;
    }
    let one_more = plan(Some(&last), &with(|_| ()), time(3), "n", &policy(0, 0));
    assert_eq!(one_more.unwrap_err().code(), "too_large");
}

#[test]
fn the_limits_are_what_the_documents_say() {
    let limits = [MAX_STATE_BYTES, MAX_METADATA_BYTES, MAX_CAUSALITY_BYTES, MAX_ACTION_BYTES];
    assert_eq!(limits, [921_600, 32_768, 32_768, 1_024]);
    assert_eq!((MAX_GIVEN_CLOCK_BYTES, MAX_COUNTER - MAX_GIVEN_COUNT), (24 * 1_024, 1 << 32));
}
