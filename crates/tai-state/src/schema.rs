//! The documents that a change becomes: the only place that spells a field's name.
//!
//! Heads, events and saved snapshots all hold one whole change and its hash, so each proves itself.
//! See `docs/data-model.md`.

mod beside;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::backend::{
    Body, Direction, Document, Field, Kind, Operation, Precondition, Query, Revision, Test, Write,
};
use crate::chain::{Change, FORMAT, Hash, format_time};
use crate::clock::to_micros;
use crate::clock_vector::VectorClockSnapshot;
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::state::ChangeMetadata;
use crate::transition::{Head, MAX_COUNTER, Transition, is_purge};

pub(crate) use beside::{Answered, Command, command_body, lease_body, read_command, read_lease};

/// Whether the field of this name, at the top of a body, holds a time: a backend that has a type for
/// times may keep it so.
#[cfg(feature = "firestore")]
pub(crate) fn is_time(field: &str) -> bool {
    matches!(field, "timestamp" | "created_at" | "acquired_at" | "expires_at")
}

/// Which store this is, for a backend that keeps it as a document.
#[cfg(feature = "firestore")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    pub(crate) format: u64,
    /// The store's identity, a UUID.
    pub(crate) store: String,
    /// 1: nothing counts it up yet.
    pub(crate) incarnation: u64,
    pub(crate) created_at: String,
    /// Where the store is now, if it was moved.
    pub(crate) moved_to: Option<String>,
}

#[derive(Serialize)]
struct HeadOut<'a> {
    format: u64,
    state: &'a Value,
    version: u64,
    #[serde(serialize_with = "time")]
    timestamp: &'a DateTime<Utc>,
    metadata: &'a ChangeMetadata,
    causality: &'a VectorClockSnapshot,
    action: &'a str,
    event_id: &'a str,
    prev_hash: Option<Hash>,
    hash: Hash,
    deleted: bool,
    snapshot_versions: &'a [u64],
    first_version: u64,
    oldest_version: u64,
    notes_hash: Hash,
}

#[derive(Serialize)]
struct EventOut<'a> {
    format: u64,
    id: &'a str,
    state_id: &'a str,
    version: u64,
    action: &'a str,
    from_version: u64,
    /// For readers with other tools, where it is not too large; nothing here reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    from_state: Option<&'a Value>,
    to_state: &'a Value,
    #[serde(serialize_with = "time")]
    timestamp: &'a DateTime<Utc>,
    causality: &'a VectorClockSnapshot,
    metadata: &'a ChangeMetadata,
    deleted: bool,
    prev_hash: Option<Hash>,
    hash: Hash,
}

#[derive(Serialize)]
struct SnapshotOut<'a> {
    format: u64,
    state: &'a Value,
    version: u64,
    #[serde(serialize_with = "time")]
    timestamp: &'a DateTime<Utc>,
    causality: &'a VectorClockSnapshot,
    metadata: &'a ChangeMetadata,
    action: &'a str,
    event_id: &'a str,
    prev_hash: Option<Hash>,
    hash: Hash,
    deleted: bool,
    /// Since which version history was kept when it was saved.
    first_version: u64,
    notes_hash: Hash,
}

/// What all three have in common, read.
#[derive(Deserialize)]
struct ChangeIn {
    format: u64,
    #[serde(alias = "event_id")]
    id: String,
    #[serde(alias = "to_state")]
    state: Value,
    version: u64,
    action: String,
    timestamp: DateTime<Utc>,
    causality: VectorClockSnapshot,
    metadata: ChangeMetadata,
    deleted: bool,
    prev_hash: Option<Hash>,
    hash: Hash,
    #[serde(default)]
    snapshot_versions: Vec<u64>,
    #[serde(default)]
    first_version: u64,
    #[serde(default)]
    oldest_version: u64,
    notes_hash: Option<Hash>,
    /// An event's own; the hash covers the address and the version, but not these copies of them.
    state_id: Option<String>,
    from_version: Option<u64>,
}

/// The writes of several transitions of one state that follow one another: events and saved
/// snapshots, and then the one head. `base` is the change that the head had when the first of them
/// was planned, and its revision. An event repeats the state before it up to so many bytes.
pub(crate) fn writes(
    steps: &[Transition],
    base: Option<(&Change, Revision)>,
    repeat_before: usize,
) -> Result<(Vec<Write>, Write)> {
    let mut writes = Vec::with_capacity(steps.len() + 2);
    let mut before = base.map(|(change, _)| change);
    for step in steps {
        let change = &step.head.change;
        let address = &change.address;
        // What is purged must not be said again.
        let from =
            before.filter(|before| !before.deleted && !is_purge(change)).map(|before| &before.data);
        before = Some(change);
        let body = match from.filter(|_| repeat_before > 0) {
            Some(from) => Some(event_body(change, Some(from))?),
            None => None,
        };
        let body = match body.filter(|body| body.as_text().len() <= repeat_before) {
            Some(body) => body,
            None => event_body(change, None)?,
        };
        writes.push(Write::put(address.event(change.version), body, Precondition::Absent));
        if step.save_snapshot {
            writes.push(Write::put(
                address.snapshot(change.version),
                snapshot_body(change, step.head.first_version)?,
                Precondition::Any,
            ));
        }
        for version in &step.drop_snapshots {
            let key = address.snapshot(*version);
            // One saved and dropped within the same commit must not stand in it twice.
            match writes.iter().position(|write: &Write| write.key == key) {
                Some(at) => drop(writes.remove(at)),
                None => writes.push(Write::delete(key, Precondition::Any)),
            }
        }
    }
    let newest = steps.last().ok_or_else(|| Error::refused("a commit", "it changes nothing"))?;
    // One head is written for all of them.
    let address = &newest.head.change.address;
    if steps.iter().any(|step| step.head.change.address != *address) {
        return Err(Error::refused(address.to_string(), "changes of other states were mixed in"));
    }
    let revision = base.map(|(_, revision)| revision);
    let guard = revision.map_or(Precondition::Absent, Precondition::Revision);
    let head = Write {
        key: newest.head.change.address.head(),
        operation: Operation::Put(head_body(&newest.head)?),
        precondition: guard,
    };
    Ok((writes, head))
}

/// Where a head keeps a field of the state's data; the data themselves for no names.
pub(crate) fn data_field(path: &[String]) -> Field {
    Field(std::iter::once("state".to_owned()).chain(path.iter().cloned()).collect())
}

fn time<S: Serializer>(time: &&DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_time(time))
}

/// Binds what a head notes to its newest change, whose own hash does not cover it.
fn notes_hash(head: &Head) -> Hash {
    let Head { change, snapshot_versions, first_version, oldest_version } = head;
    Hash::of(&serde_json::json!([change.hash, snapshot_versions, first_version, oldest_version]))
}

/// The same for a saved snapshot.
fn saved_notes_hash(change: &Change, first_version: u64) -> Hash {
    Hash::of(&serde_json::json!([change.hash, first_version]))
}

pub(crate) fn head_body(head: &Head) -> Result<Body> {
    let change = &head.change;
    body(
        change,
        &HeadOut {
            format: FORMAT,
            state: &change.data,
            version: change.version,
            timestamp: &change.timestamp,
            metadata: &change.metadata,
            causality: &change.causality,
            action: &change.action,
            event_id: &change.id,
            prev_hash: change.prev_hash,
            hash: change.hash,
            deleted: change.deleted,
            snapshot_versions: &head.snapshot_versions,
            first_version: head.first_version,
            oldest_version: head.oldest_version,
            notes_hash: notes_hash(head),
        },
    )
}

fn event_body(change: &Change, from_state: Option<&Value>) -> Result<Body> {
    body(
        change,
        &EventOut {
            format: FORMAT,
            id: &change.id,
            state_id: &change.address.state.id(),
            version: change.version,
            action: &change.action,
            from_version: change.version - 1,
            from_state,
            to_state: &change.data,
            timestamp: &change.timestamp,
            causality: &change.causality,
            metadata: &change.metadata,
            deleted: change.deleted,
            prev_hash: change.prev_hash,
            hash: change.hash,
        },
    )
}

/// The body of a saved snapshot, which says too since when history was kept. Where a head is lost, that tells
/// what was cleaned up from what is missing.
pub(crate) fn snapshot_body(change: &Change, first_version: u64) -> Result<Body> {
    body(
        change,
        &SnapshotOut {
            format: FORMAT,
            state: &change.data,
            version: change.version,
            timestamp: &change.timestamp,
            causality: &change.causality,
            metadata: &change.metadata,
            action: &change.action,
            event_id: &change.id,
            prev_hash: change.prev_hash,
            hash: change.hash,
            deleted: change.deleted,
            first_version,
            notes_hash: saved_notes_hash(change, first_version),
        },
    )
}

fn body<T: Serialize>(change: &Change, out: &T) -> Result<Body> {
    Body::new(out)
        .map_err(|source| Error::SerializationError { subject: change.address.to_string(), source })
}

pub(crate) const LAST_TIME: DateTime<Utc> =
    match DateTime::from_timestamp(253_402_300_799, 999_999_999) {
        Some(time) => time,
        None => DateTime::<Utc>::MAX_UTC,
    };

/// No change is older.
pub(crate) const FIRST_TIME: DateTime<Utc> = match DateTime::from_timestamp(-62_135_596_800, 0) {
    Some(time) => time,
    None => DateTime::<Utc>::MIN_UTC,
};

/// The newest change of a state that is not later than a time: times never fall with rising versions,
/// and of equal times the last version comes first.
pub(crate) fn newest_until(address: &Address, time: &DateTime<Utc>) -> Query {
    // Times are kept in whole microseconds and end with the year 9999.
    let time = to_micros((*time).min(LAST_TIME));
    let field = |name: &str| Field(vec![name.to_owned()]);
    Query {
        governor: address.governor.clone(),
        kind: Kind::Events,
        filters: vec![
            (field("state_id"), Test::Equal(address.state.id().into())),
            (field("timestamp"), Test::AtMost(format_time(&time).into())),
        ],
        order: Some((field("timestamp"), Direction::Descending)),
        after: None,
        limit: 1,
    }
}

/// Reads a head and checks its hash, and that of its notes.
pub(crate) fn read_head(address: &Address, document: &Document) -> Result<Head> {
    let mut read = read(document)?;
    let snapshot_versions = std::mem::take(&mut read.snapshot_versions);
    let (first_version, oldest_version) = (read.first_version, read.oldest_version);
    let said = read.notes_hash;
    let change = change(address, document, read)?;
    let head = Head { change, snapshot_versions, first_version, oldest_version };
    let is_ordered = 1 <= oldest_version
        && oldest_version <= first_version
        && first_version <= head.version()
        && head.snapshot_versions.is_sorted_by(|one, next| one < next)
        && head.snapshot_versions.iter().all(|v| (first_version..=head.version()).contains(v));
    if said != Some(notes_hash(&head)) || !is_ordered {
        return Err(Error::corrupt(
            document.key.to_string(),
            "its notes about saved snapshots or the oldest event are not what was written",
        ));
    }
    Ok(head)
}

/// Reads an event or a saved snapshot, and checks its version and hash.
pub(crate) fn read_change(address: &Address, document: &Document) -> Result<Change> {
    read_noted(address, document).map(|(change, ..)| change)
}

/// Reads a saved snapshot, and since which version history was kept when it was saved.
pub(crate) fn read_saved(address: &Address, document: &Document) -> Result<(Change, u64)> {
    let (change, first_version, said) = read_noted(address, document)?;
    let is_in_it = (1..=change.version).contains(&first_version);
    if !is_in_it || said != Some(saved_notes_hash(&change, first_version)) {
        return Err(Error::corrupt(
            document.key.to_string(),
            "what it says about since when history was kept is not what was written",
        ));
    }
    Ok((change, first_version))
}

fn read_noted(address: &Address, document: &Document) -> Result<(Change, u64, Option<Hash>)> {
    let read = read(document)?;
    let (first_version, said) = (read.first_version, read.notes_hash);
    let change = change(address, document, read)?;
    if change.version != document.key.version {
        return Err(Error::corrupt(
            document.key.to_string(),
            format!("it says that it is version {}", change.version),
        ));
    }
    Ok((change, first_version, said))
}

fn read(document: &Document) -> Result<ChangeIn> {
    let read: ChangeIn = document.body.parse().map_err(|source| {
        Error::corrupt(document.key.to_string(), format!("its body cannot be read: {source}"))
    })?;
    refuse_newer(document, read.format)?;
    Ok(read)
}

fn refuse_newer(document: &Document, found: u64) -> Result<()> {
    if (1..=FORMAT).contains(&found) {
        return Ok(());
    }
    if found == 0 {
        return Err(Error::corrupt(document.key.to_string(), "there is no format 0"));
    }
    let location = document.key.to_string();
    Err(Error::NewerFormat { location, found, supported: FORMAT })
}

fn change(address: &Address, document: &Document, read: ChangeIn) -> Result<Change> {
    // Queries find events by these.
    if document.key.kind == Kind::Events {
        let state_fits = read.state_id.as_deref() == Some(address.state.id().as_str());
        let from_fits =
            read.from_version.and_then(|from| from.checked_add(1)) == Some(read.version);
        if !state_fits || !from_fits {
            return Err(Error::corrupt(
                document.key.to_string(),
                "it says that it is an event of another state or version",
            ));
        }
    }
    let change = Change {
        address: address.clone(),
        version: read.version,
        id: read.id,
        action: read.action,
        timestamp: read.timestamp,
        causality: read.causality,
        metadata: read.metadata,
        deleted: read.deleted,
        data: read.state,
        prev_hash: read.prev_hash,
        hash: read.hash,
    };
    if !(1..=MAX_COUNTER).contains(&change.version) {
        let reason = format!("it says that it is version {}", change.version);
        return Err(Error::corrupt(document.key.to_string(), reason));
    }
    change.check(document.key.kind.as_str())?;
    Ok(change)
}

#[cfg(test)]
mod edges;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PersistenceConfig;
    use crate::testing::arbitrary_json;
    use crate::transition::Expect;
    use crate::transition::tests::{change_with, put, request, run};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn all_three_bodies_read_back_equal(data in arbitrary_json(), text in any::<String>()) {
            let change = change_with(data, &text);
            let document = |key, body| Document { key, body, revision: Revision::new(1) };
            let address = change.address.clone();
            let event = document(address.event(change.version), event_body(&change, None).unwrap());
            prop_assert_eq!(read_change(&address, &event).unwrap(), change.clone());
            let saved = document(address.snapshot(change.version), snapshot_body(&change, 1).unwrap());
            prop_assert_eq!(read_saved(&address, &saved).unwrap(), (change.clone(), 1));
            let head = Head { snapshot_versions: vec![1], ..Head::new(change) };
            let stored = document(address.head(), head_body(&head).unwrap());
            prop_assert_eq!(read_head(&address, &stored).unwrap(), head);
        }

        #[test]
        fn any_changed_byte_is_noticed(at in any::<prop::sample::Index>(), to in 0x20u8..0x7f) {
            let change = change_with(serde_json::json!({"n": [1, 2.5, "x"]}), "why");
            let mut text = event_body(&change, None).unwrap().as_text().as_bytes().to_vec();
            let at = at.index(text.len());
            prop_assume!(text[at] != to);
            text[at] = to;
            let key = change.address.event(change.version);
            let body = Body::from_text(String::from_utf8(text).unwrap());
            let document = Document { key, body, revision: Revision::new(1) };
            // What can be read at all is either the same change or refused.
            if let Ok(read) = read_change(&change.address, &document) {
                prop_assert_eq!(read, change);
            }
        }
    }

    /// Head and event guard one another; each guard alone must be there, since the other would hide
    /// that it is missing.
    #[test]
    fn every_write_is_guarded() {
        let steps = run(
            &[request(put(1), Expect::Any), request(put(2), Expect::Any)],
            &PersistenceConfig::default(),
        );
        let before = change_with(serde_json::json!(0), "why");
        for (base, guard) in [
            (None, Precondition::Absent),
            (Some((&before, Revision::new(7))), Precondition::Revision(Revision::new(7))),
        ] {
            let (logged, head) = writes(&steps, base, 0).unwrap();
            assert!(logged.iter().all(|write| write.precondition == Precondition::Absent));
            assert_eq!((logged.len(), head.precondition), (2, guard));
        }
    }

    /// Notes that cannot be, with a hash that fits them, each for one reason only.
    #[test]
    fn notes_out_of_order_are_refused() {
        let requests: Vec<_> = (1..=5).map(|n| request(put(n), Expect::Any)).collect();
        let change = run(&requests, &PersistenceConfig::default()).pop().unwrap().head.change;
        let read = |oldest_version, first_version, snapshots: &[u64]| {
            let (change, snapshot_versions) = (change.clone(), snapshots.to_vec());
            let head = Head { change, snapshot_versions, first_version, oldest_version };
            let (key, body) = (head.change.address.head(), head_body(&head).unwrap());
            let document = Document { key, body, revision: Revision::new(1) };
            read_head(&head.change.address, &document).map(|read| assert_eq!(read, head))
        };
        let allowed = [(1, 1, &[][..]), (1, 1, &[1, 5]), (1, 3, &[3, 5]), (5, 5, &[5])];
        for (oldest, first, snapshots) in allowed {
            read(oldest, first, snapshots).unwrap();
        }
        let oldest = [(0, 1, &[][..]), (3, 2, &[]), (1, 6, &[]), (6, 6, &[])];
        let snapshots = [&[6][..], &[0], &[3, 2], &[2, 2]].map(|snapshots| (1, 1, snapshots));
        let before_the_cut = [(1, 5, &[1, 5][..])];
        for (oldest, first, snapshots) in oldest.into_iter().chain(snapshots).chain(before_the_cut)
        {
            let refused = read(oldest, first, snapshots).unwrap_err();
            assert_eq!(refused.code(), "corrupt", "{oldest} {first} {snapshots:?}");
        }
    }

    /// Saved snapshots that come and go within one commit must not stand in it twice.
    #[test]
    fn no_document_stands_twice_in_a_commit() {
        let policy = PersistenceConfig {
            snapshot_interval: 3,
            snapshot_retention: 2,
            ..PersistenceConfig::default()
        };
        let requests: Vec<_> = (1..=12).map(|n| request(put(n), Expect::Any)).collect();
        let (mut all, head) = writes(&run(&requests, &policy), None, 0).unwrap();
        all.push(head);
        crate::backend::refuse_doubles(&all).unwrap();
        assert_eq!(all.len(), 12 + 2 + 1);
    }

    /// What queries ask for is where a head keeps it.
    #[test]
    fn queries_ask_for_what_a_head_says() {
        use crate::backend::matching::field;
        for deleted in [false, true] {
            let mut change = change_with(serde_json::json!({"a": {"b.c": 7}}), "why");
            change.deleted = deleted;
            let head = Head::new(change);
            let body: Value = head_body(&head).unwrap().parse().unwrap();
            let path = ["a".to_owned(), "b.c".to_owned()];
            assert_eq!(field(&body, &data_field(&path)), Some(&serde_json::json!(7)));
            assert_eq!(field(&body, &data_field(&[])), Some(&head.change.data));
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let change = change_with(serde_json::json!(1), "why");
        let text =
            event_body(&change, None).unwrap().as_text().replace("\"format\":1", "\"format\":2");
        let document = Document {
            key: change.address.event(change.version),
            body: Body::from_text(text),
            revision: Revision::new(1),
        };
        assert_eq!(read_change(&change.address, &document).unwrap_err().code(), "newer_format");
    }
}
