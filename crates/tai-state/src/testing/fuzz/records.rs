//! Stored documents of every kind: each text is a typed error, or a record that is written and read
//! back equal.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::Input;
use crate::backend::{Body, Document, Key, Kind, Operation, Revision};
use crate::chain::{Change, Hash};
use crate::clock::Moment;
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::lease::{Lease, Now, Wanted};
use crate::schema;
use crate::transition::{Head, Transition};

/// Bodies as stores write them, for what answers with documents.
#[cfg(feature = "firestore")]
pub(crate) const BODIES: [&str; 4] = [
    r#"{"format":1,"store":"s","incarnation":1,"created_at":"2026-01-01T00:00:00Z","moved_to":null}"#,
    r#"{"format":1,"id":"x","state_id":"s","version":1,"action":"a","from_version":0,"to_state":1,"timestamp":"2026-01-01T00:00:00Z","causality":{},"metadata":{"changed_by":"c","reason":"r"},"deleted":false,"prev_hash":null,"hash":""}"#,
    r#"{"format":1,"client_id":"c","lock_token":"t","fencing_token":1,"held":true,"broken":false,"lost_token":0,"lease_ms":1,"clock":"","clock_micros":1,"acquired_at":"2026-01-01T00:00:00Z","expires_at":"2026-01-01T00:00:00Z"}"#,
    r#"{"format":1,"id":"x","request":null,"answer":{"value":1},"created_at":"2026-01-01T00:00:00Z","expires_at":"2026-01-01T00:00:00Z"}"#,
];

/// The kind in the first byte; with its highest bit set the hashes are made to fit. Then the text.
pub(super) fn record(bytes: &[u8]) {
    let Some((first, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let kind = Kind::ALL[usize::from(first & 0x7f) % Kind::ALL.len()];
    let address = address();
    let forged = if first & 0x80 == 0 { None } else { forged(&address, kind, text) };
    let text = forged.as_deref().unwrap_or(text);
    let version = match kind.is_versioned() {
        true => said_version(text).unwrap_or(1),
        false => 0,
    };
    let name = address.state.clone();
    let key = Key { governor: address.governor.clone(), kind, name, version };
    let document = document(key, Body::from_text(text.to_owned()));
    match kind {
        Kind::States => head(&address, &document),
        Kind::Events | Kind::Snapshots => change(&address, &document),
        Kind::Locks => lease(&document),
        Kind::Commands => command(&document),
    }
}

/// The one state that all of these are about.
pub(super) fn address() -> Address {
    Address::new("gov/1", "state~1").expect("two ids")
}

pub(super) fn document(key: Key, body: Body) -> Document {
    Document { key, body, revision: Revision::new(1) }
}

/// What was read, unless it was refused as it should be.
pub(super) fn typed<T>(read: Result<T>) -> Option<T> {
    match read {
        Ok(read) => Some(read),
        Err(Error::Corrupt { .. } | Error::NewerFormat { .. }) => None,
        Err(error) => panic!("an error of another kind: {error:?}"),
    }
}

fn said_version(text: &str) -> Option<u64> {
    serde_json::from_str::<Value>(text).ok()?.get("version")?.as_u64()
}

fn head(address: &Address, document: &Document) {
    let Some(head) = typed(schema::read_head(address, document)) else { return };
    let body = schema::head_body(&head).expect("it was read");
    let again = super::records::document(document.key.clone(), body);
    assert_eq!(schema::read_head(address, &again).expect("its own body"), head);
    proved(&head.change);
}

fn change(address: &Address, document: &Document) {
    let Some(change) = typed(schema::read_change(address, document)) else { return };
    assert_eq!(change.version, document.key.version);
    proved(&change);
    if document.key.kind == Kind::Snapshots
        && let Some((saved, first_version)) = typed(schema::read_saved(address, document))
    {
        assert_eq!(saved, change);
        assert!((1..=change.version).contains(&first_version), "kept since {first_version}");
    }
    for document in written(&change) {
        assert_eq!(schema::read_change(address, &document).expect("its own body"), change);
    }
}

/// What is taken for a change has the hash of all that it says.
fn proved(change: &Change) {
    assert_eq!(change.hash, change.expected_hash(), "its hash was not looked at");
    assert!(change.version > 0);
}

/// The event and the saved snapshot of a change, as they are written.
pub(super) fn written(change: &Change) -> Vec<Document> {
    let head = Head::new(change.clone());
    let step = Transition { head, save_snapshot: true, drop_snapshots: Vec::new() };
    let (writes, _) = schema::writes(&[step], None, 0).expect("it was read");
    assert_eq!(writes.len(), 2);
    let body = |operation| match operation {
        Operation::Put(body) => body,
        other => panic!("{other:?}"),
    };
    writes.into_iter().map(|write| document(write.key, body(write.operation))).collect()
}

fn lease(stored: &Document) {
    let Some(lease) = typed(schema::read_lease(stored)) else { return };
    let body = schema::lease_body("r", &lease).expect("it was read");
    let again = document(stored.key.clone(), body);
    assert_eq!(schema::read_lease(&again).expect("its own body"), lease);
    // Whatever it says, the next grant has a higher token, and what is decided of it does not panic.
    let now = Now {
        moment: Moment { epoch: lease.ends.epoch.clone(), micros: 1 },
        wall: lease.acquired_at,
    };
    let wanted =
        Wanted { client_id: "c".into(), lock_token: "t".into(), lease: Duration::from_secs(1) };
    let _ = (lease.standing(&now.moment), lease.renewed(&now), lease.released());
    match Lease::grant(Some(&lease), &wanted, &now) {
        Ok(next) => assert!(next.fencing_token > lease.fencing_token),
        Err(error) => assert_eq!(error.code(), "invalid_state"),
    }
}

fn command(stored: &Document) {
    let Some(command) = typed(schema::read_command(stored)) else { return };
    let body = schema::command_body("k", &command, DateTime::<Utc>::MIN_UTC).expect("it was read");
    let again = document(stored.key.clone(), body);
    assert_eq!(schema::read_command(&again).expect("its own body"), command);
}

/// The text with the hashes that it would have, had a store written it: so that what stands behind the
/// check of a hash is met too.
fn forged(address: &Address, kind: Kind, text: &str) -> Option<String> {
    let mut body: Value = serde_json::from_str(text).ok()?;
    let field = |name: &str| body.get(name).cloned().unwrap_or(Value::Null);
    let either = |a: &str, b: &str| body.get(a).or_else(|| body.get(b)).cloned();
    let change = Change {
        address: address.clone(),
        version: field("version").as_u64()?,
        id: serde_json::from_value(either("id", "event_id")?).ok()?,
        action: serde_json::from_value(field("action")).ok()?,
        timestamp: serde_json::from_value(field("timestamp")).ok()?,
        causality: serde_json::from_value(field("causality")).ok()?,
        metadata: serde_json::from_value(field("metadata")).ok()?,
        deleted: field("deleted").as_bool()?,
        data: either("state", "to_state")?,
        prev_hash: serde_json::from_value(field("prev_hash")).ok()?,
        hash: Change::NO_HASH,
    };
    let hash = change.expected_hash();
    body["hash"] = json!(hash);
    if kind == Kind::States {
        let numbers = |name: &str| body.get(name).cloned().unwrap_or(json!(0));
        let saved = body.get("snapshot_versions").cloned().unwrap_or_else(|| json!([]));
        let notes = json!([hash, saved, numbers("first_version"), numbers("oldest_version")]);
        body["notes_hash"] = json!(Hash::of(&notes));
    }
    Some(body.to_string())
}

/// A change made of a recipe, with the hash that it must have.
pub(super) fn drawn(
    input: &mut Input<'_>,
    version: u64,
    time: DateTime<Utc>,
    prev_hash: Option<Hash>,
) -> Change {
    let mut causality = crate::clock_vector::VectorClockSnapshot::new();
    causality.increment(&input.text());
    let metadata = crate::state::ChangeMetadata::new(input.text(), input.text(), None)
        .with_context(input.text(), input.json(3));
    let mut change = Change {
        address: address(),
        version,
        id: input.text(),
        action: input.text(),
        timestamp: time,
        causality,
        metadata,
        deleted: input.byte() > 200,
        data: input.json(4),
        prev_hash,
        hash: Change::NO_HASH,
    };
    change.hash = change.expected_hash();
    change
}
