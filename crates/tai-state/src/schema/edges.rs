//! What a change is written as, and what is believed when it is read: each condition from both sides.

use serde_json::{Value, json};

use super::*;
use crate::config::PersistenceConfig;
use crate::transition::tests::{put, request, run, time};
use crate::transition::{Expect, Wish};

fn steps(wishes: Vec<Wish>) -> Vec<Transition> {
    let requests: Vec<_> = wishes.into_iter().map(|wish| request(wish, Expect::Any)).collect();
    run(&requests, &PersistenceConfig { snapshot_interval: 0, ..PersistenceConfig::default() })
}

/// The bodies of the events that are written.
fn events(steps: &[Transition], repeat_before: usize) -> Vec<Body> {
    let bodies = writes(steps, None, repeat_before).unwrap().0.into_iter();
    let body = |write: Write| match write.operation {
        Operation::Put(body) => body,
        other => panic!("{other:?}"),
    };
    bodies.map(body).collect()
}

fn fields(body: &Body) -> Value {
    body.parse().unwrap()
}

fn document(key: crate::keys::Key, body: &Body, change: impl FnOnce(&mut Value)) -> Document {
    let mut changed = fields(body);
    change(&mut changed);
    Document { key, body: Body::from_text(changed.to_string()), revision: Revision::new(1) }
}

#[test]
fn an_event_repeats_the_state_before_it_where_there_was_one() {
    let wishes = vec![put(1), put(2), Wish::Delete, put(3), Wish::Purge, put(4)];
    let before = |body: &Body| fields(body).get("from_state").cloned();
    let all = events(&steps(wishes.clone()), usize::MAX);
    let said: Vec<_> = all.iter().map(before).collect();
    // Not before the first, not after a deletion, and never what was purged.
    assert_eq!(said, [None, Some(json!(1)), Some(json!(2)), None, None, None]);
    let from: Vec<_> = all.iter().map(|body| fields(body)["from_version"].clone()).collect();
    assert_eq!(from, [0, 1, 2, 3, 4, 5].map(Value::from));
    assert!(events(&steps(wishes), 0).iter().all(|body| before(body).is_none()));
}

#[test]
fn the_state_before_is_repeated_up_to_a_limit_of_the_whole_event() {
    let steps = steps(vec![put(1), put(2)]);
    let whole = events(&steps, usize::MAX)[1].as_text().len();
    for (limit, is_repeated) in [(whole + 1, true), (whole, true), (whole - 1, false), (1, false)] {
        let body = fields(&events(&steps, limit)[1]);
        assert_eq!(body.get("from_state").is_some(), is_repeated, "{limit}");
    }
}

#[test]
fn a_commit_changes_one_state_and_something() {
    assert_eq!(writes(&[], None, 0).unwrap_err().code(), "invalid_state");
    let mut mixed = steps(vec![put(1), put(2)]);
    mixed[0].head.change.address = Address::new("gov", "other").unwrap();
    assert_eq!(writes(&mixed, None, 0).unwrap_err().code(), "invalid_state");
}

/// The hash covers neither the key nor these copies for queries.
#[test]
fn what_stands_beside_the_hash_is_checked_too() {
    let steps = steps(vec![put(1), put(2)]);
    let second = &steps[1].head.change;
    let address = &second.address;
    let body = event_body(second, None).unwrap();
    let read = |version: u64, change: &dyn Fn(&mut Value)| {
        let document = document(address.event(version), &body, change);
        read_change(address, &document).map_or_else(|error| error.code(), |_| "ok")
    };
    assert_eq!(read(2, &|_| {}), "ok");
    assert_eq!(read(3, &|_| {}), "corrupt");
    assert_eq!(read(2, &|body| body["state_id"] = json!("other")), "corrupt");
    assert_eq!(read(2, &|body| body["from_version"] = json!(0)), "corrupt");
    assert_eq!(read(2, &|body| body["from_version"] = json!(null)), "corrupt");
    assert_eq!(read(2, &|body| body["format"] = json!(0)), "corrupt");
    assert_eq!(read(2, &|body| body["format"] = json!(FORMAT + 1)), "newer_format");

    // A saved snapshot has no such copies.
    let saved = snapshot_body(second, 2).unwrap();
    let saved = document(address.snapshot(2), &saved, |_| {});
    assert_eq!(read_change(address, &saved).unwrap(), *second);
    assert_eq!(read_saved(address, &saved).unwrap(), (second.clone(), 2));

    // What it says of the cut, it must have said when it was saved.
    let body = snapshot_body(second, 2).unwrap();
    for (field, other) in [("first_version", json!(1)), ("notes_hash", json!(null))] {
        let changed = document(address.snapshot(2), &body, |body| body[field] = other);
        assert_eq!(read_saved(address, &changed).unwrap_err().code(), "corrupt", "{field}");
    }
    for first in [0, 3] {
        let body = snapshot_body(second, first).unwrap();
        let saved = document(address.snapshot(2), &body, |_| {});
        assert_eq!(read_saved(address, &saved).unwrap_err().code(), "corrupt", "{first}");
    }

    let mut none = second.clone();
    none.version = 0;
    none.hash = none.expected_hash();
    let body = snapshot_body(&none, 1).unwrap();
    let none = document(address.snapshot(0), &body, |_| {});
    assert!(read_change(address, &none).unwrap_err().to_string().contains("version 0"));
}

#[test]
fn a_head_s_notes_are_checked() {
    let mut head = steps(vec![put(1), put(2)]).pop().unwrap().head;
    head.snapshot_versions = vec![1, 2];
    let address = head.change.address.clone();
    let body = head_body(&head).unwrap();
    assert_eq!(read_head(&address, &document(address.head(), &body, |_| {})).unwrap(), head);
    for (field, other) in [
        ("snapshot_versions", json!([1])),
        ("first_version", json!(2)),
        ("oldest_version", json!(2)),
    ] {
        let changed = document(address.head(), &body, |body| body[field] = other);
        assert_eq!(read_head(&address, &changed).unwrap_err().code(), "corrupt", "{field}");
    }
}

#[test]
fn the_newest_until_a_time_is_one_event_of_this_state() {
    let address = Address::new("gov", "state").unwrap();
    let query = newest_until(&address, &time(0));
    assert_eq!((query.kind, query.limit, query.after), (Kind::Events, 1, None));
    let at = Test::AtMost(json!("2023-11-14T22:13:20Z"));
    let field = |name: &str| Field(vec![name.to_owned()]);
    let state = Test::Equal(json!("state"));
    assert_eq!(query.filters, [(field("state_id"), state), (field("timestamp"), at)]);
    assert_eq!(query.order, Some((field("timestamp"), Direction::Descending)));
    let latest = newest_until(&address, &DateTime::<Utc>::MAX_UTC).filters.pop().unwrap().1;
    assert_eq!(latest, Test::AtMost(json!("9999-12-31T23:59:59.999999Z")));
    assert_eq!(FIRST_TIME.to_rfc3339(), "0001-01-01T00:00:00+00:00");
}

#[cfg(feature = "firestore")]
#[test]
fn only_these_are_times() {
    for name in ["timestamp", "created_at", "acquired_at", "expires_at"] {
        assert!(is_time(name), "{name}");
    }
    assert!(!is_time("state") && !is_time("Timestamp") && !is_time(""));
}
