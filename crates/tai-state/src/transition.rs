//! Every decision of a write, in one pure function.
//!
//! [`plan`] takes the head as it was read and what is wanted, and says what is to be written, or
//! why not. It asks no clock and no backend; what follows is one commit.

use chrono::{DateTime, Datelike, Utc};
use serde_json::Value;

use crate::chain::Change;
use crate::clock::to_micros;
use crate::clock_vector::VectorClockSnapshot;
use crate::config::PersistenceConfig;
use crate::error::{Error, Result};
use crate::json::measure;
use crate::keys::Address;
use crate::state::ChangeMetadata;

/// The largest state, in bytes of canonical JSON and in bytes as Firestore counts native fields.
/// The rest of a document fits into what is left of Firestore's 1 MiB.
pub const MAX_STATE_BYTES: u64 = 900 * 1024;
/// The largest metadata, with its context, in bytes of JSON.
pub const MAX_METADATA_BYTES: u64 = 32 * 1024;
/// The largest vector clock, in bytes of JSON. What a writer brings along may make it three quarters of this.
pub const MAX_CAUSALITY_BYTES: u64 = 32 * 1024;
/// The longest action, in bytes.
pub const MAX_ACTION_BYTES: u64 = 1024;
/// The action of the event that a purge leaves.
pub(crate) const PURGE: &str = "purge";
/// The key in the context of the event of a purge, which says that nothing before it is kept. Nobody
/// else may use it.
pub(crate) const PURGE_CONTEXT: &str = "tai_state.purge";
/// Whether a change is a purge.
pub(crate) fn is_purge(change: &Change) -> bool {
    change.deleted && change.metadata.context.contains_key(PURGE_CONTEXT)
}
/// The longest identity of a change, in bytes.
const MAX_ID_BYTES: u64 = 128;
/// Versions and counters stay within what both backends hold: a signed 64-bit integer.
pub(crate) const MAX_COUNTER: u64 = i64::MAX as u64;
/// The highest count that a writer may bring along in its clock: whatever it brings, the state can be written,
/// deleted and purged some four thousand million times after it.
const MAX_GIVEN_COUNT: u64 = MAX_COUNTER - (1 << 32);
/// The largest clock with nodes that a writer brings along. The rest is for the nodes of stores that write the
/// state itself.
const MAX_GIVEN_CLOCK_BYTES: u64 = MAX_CAUSALITY_BYTES / 4 * 3;

/// The newest value of a state, with what the store notes beside it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Head {
    /// The newest change.
    pub(crate) change: Change,
    /// The versions of the saved snapshots that are kept, ascending.
    pub(crate) snapshot_versions: Vec<u64>,
    /// The oldest version whose event is kept. Where that is not 1, a snapshot is saved at it: the base
    /// of what follows, and the proof that what stood before was taken away on purpose. (After
    /// a purge the event of the purge is that proof.)
    pub(crate) first_version: u64,
    /// The oldest version whose event may still stand. Below `first_version` while a clean-up is under
    /// way: what stands between the two is given up and only waits to be removed.
    pub(crate) oldest_version: u64,
}

impl Head {
    /// A head whose whole log is kept, and that has no saved snapshots.
    pub(crate) fn new(change: Change) -> Self {
        Self { change, snapshot_versions: Vec::new(), first_version: 1, oldest_version: 1 }
    }

    pub(crate) fn version(&self) -> u64 {
        self.change.version
    }

    /// The saved snapshot that is kept however old it is.
    pub(crate) fn cut_snapshot(&self) -> Option<u64> {
        (self.first_version > 1).then_some(self.first_version)
    }

    /// Whether a saved snapshot contradicts it about since when history is kept: the one at the cut must say
    /// that it begins there, since without a head only that tells a cut from a loss, and none may know of a
    /// later cut.
    pub(crate) fn is_disputed_by(&self, snapshot: u64, kept_since: u64) -> bool {
        kept_since > self.first_version
            || (snapshot == self.first_version && kept_since != snapshot)
    }
}

/// What must be true of the head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Expect {
    /// Nothing.
    Any,
    /// It has this version; 0 = the state does not exist, or is deleted.
    Version(u64),
    /// Its data is this.
    Data(Value),
}

/// What the state becomes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wish {
    Put(Value),
    Delete,
    /// Deleted, with everything that it ever was.
    Purge,
}

/// One wanted change. Its identity is chosen here, before anything is sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    pub(crate) address: Address,
    pub(crate) id: String,
    pub(crate) action: String,
    pub(crate) metadata: ChangeMetadata,
    pub(crate) wish: Wish,
    pub(crate) expect: Expect,
    /// The transition's own time, for a log that comes from elsewhere.
    pub(crate) at: Option<DateTime<Utc>>,
    /// What the writer had seen.
    pub(crate) based_on: VectorClockSnapshot,
}

/// What is to be written: the new head, and the saved snapshots that come and go with it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Transition {
    pub(crate) head: Head,
    pub(crate) save_snapshot: bool,
    pub(crate) drop_snapshots: Vec<u64>,
}

/// Decides one change.
///
/// # Errors
/// [`Error::VersionConflict`] when the head is not as expected, [`Error::StateNotFound`] for the
/// deletion of nothing, [`Error::InvalidState`] or [`Error::TooLarge`] for what no backend keeps.
pub(crate) fn plan(
    head: Option<&Head>,
    request: &Request,
    now: DateTime<Utc>,
    node: &str,
    policy: &PersistenceConfig,
) -> Result<Transition> {
    plan_counted(head, request, now, node, policy, false)
}

/// As [`plan`], for a change that was made and counted elsewhere: it brings its clock with it and is not
/// counted once more, so that two stores that tell one another of a change come to rest. One that brings
/// nothing new is counted, since the newest version must know more than the one before it.
///
/// # Errors
/// As [`plan`].
pub(crate) fn adopt(
    head: Option<&Head>,
    request: &Request,
    now: DateTime<Utc>,
    node: &str,
    policy: &PersistenceConfig,
) -> Result<Transition> {
    plan_counted(head, request, now, node, policy, true)
}

fn plan_counted(
    head: Option<&Head>,
    request: &Request,
    now: DateTime<Utc>,
    node: &str,
    policy: &PersistenceConfig,
    is_counted_elsewhere: bool,
) -> Result<Transition> {
    check_input(request)?;
    check_expectation(head, request)?;

    let before = head.map(|head| &head.change);
    let version = before.map_or(0, |change| change.version) + 1;
    if version > MAX_COUNTER {
        return Err(Error::refused(request.address.to_string(), "its versions are used up"));
    }
    let (data, deleted) = match &request.wish {
        Wish::Put(data) => (data.clone(), false),
        Wish::Delete if before.is_some_and(|change| !change.deleted) => (Value::Null, true),
        // What a log from elsewhere says of a purge, which erases also what was deleted before.
        Wish::Delete if before.is_some() && request.at.is_some() && request.action == PURGE => {
            (Value::Null, true)
        }
        // A log from elsewhere that was shortened may begin so.
        Wish::Delete if before.is_none() && is_first_of_a_log(request) => (Value::Null, true),
        Wish::Purge if before.is_some() => (Value::Null, true),
        Wish::Delete | Wish::Purge => return Err(not_found(&request.address)),
    };
    let wanted = to_micros(request.at.unwrap_or(now));
    check_time(wanted, &request.address)?;
    let mut causality = request.based_on.clone();
    if let Some(change) = before {
        causality.merge(&change.causality);
    }
    let known = before.map(|change| &change.causality);
    if !is_counted_elsewhere || known.map_or(causality.is_empty(), |known| *known == causality) {
        if causality.get(node) >= MAX_COUNTER {
            return Err(Error::refused(
                request.address.to_string(),
                format!("the vector clock of node {node:?} is used up"),
            ));
        }
        causality.increment(node);
    }
    check_clock(&causality, MAX_COUNTER, MAX_CAUSALITY_BYTES, &request.address)?;
    let known = |node: &str| before.map_or(0, |change| change.causality.get(node));
    let news = || request.based_on.iter().filter(|(node, count)| *count > known(node));
    if news().any(|(node, _)| known(node) == 0) {
        check_clock(&causality, MAX_COUNTER, MAX_GIVEN_CLOCK_BYTES, &request.address)?;
    }
    if news().any(|(_, count)| count > MAX_GIVEN_COUNT) {
        let what = format!("the vector clock given for {}", request.address);
        return Err(Error::refused(what, "a count is too large"));
    }

    let mut metadata = request.metadata.clone();
    if request.wish == Wish::Purge {
        metadata.context.insert(PURGE_CONTEXT.to_owned(), true.into());
    }
    let mut change = Change {
        address: request.address.clone(),
        version,
        id: request.id.clone(),
        action: request.action.clone(),
        // Monotone per state: a clock that was set back must not make history go backwards.
        timestamp: before.map_or(wanted, |change| wanted.max(change.timestamp)),
        causality,
        metadata,
        deleted,
        data,
        prev_hash: before.map(|change| change.hash),
        hash: Change::NO_HASH,
    };
    change.hash = change.expected_hash();

    let notes = head.map(|head| (head.first_version, head.oldest_version, head.cut_snapshot()));
    let (first_version, oldest_version, cut) = notes.unwrap_or((version, version, None));
    let mut snapshot_versions = head.map_or_else(Vec::new, |head| head.snapshot_versions.clone());
    if request.wish == Wish::Purge {
        let head =
            Head { change, snapshot_versions: Vec::new(), first_version: version, oldest_version };
        return Ok(Transition { head, save_snapshot: false, drop_snapshots: snapshot_versions });
    }
    // No version is a multiple of the interval 0, which means none.
    let due = policy.snapshot_retention > 0 && version.is_multiple_of(policy.snapshot_interval);
    let mut drop_snapshots = Vec::new();
    if due {
        snapshot_versions.push(version);
        // A retention that was lowered is reached step by step: a commit stays small.
        drop_snapshots = surplus(&snapshot_versions, cut, policy.snapshot_retention);
        drop_snapshots.truncate(MOST_DROPS);
        snapshot_versions.retain(|version| !drop_snapshots.contains(version));
    }
    Ok(Transition {
        head: Head { change, snapshot_versions, first_version, oldest_version },
        save_snapshot: due,
        drop_snapshots,
    })
}

/// The saved snapshots, oldest first, that are too many when so many are kept beside the one at the cut.
pub(crate) fn surplus(versions: &[u64], cut: Option<u64>, kept: usize) -> Vec<u64> {
    let mut others: Vec<u64> =
        versions.iter().copied().filter(|version| Some(*version) != cut).collect();
    others.truncate(others.len().saturating_sub(kept));
    others
}

fn is_first_of_a_log(request: &Request) -> bool {
    request.at.is_some() && request.expect == Expect::Version(0)
}

/// How many saved snapshots one commit removes at most.
const MOST_DROPS: usize = 20;

fn not_found(address: &Address) -> Error {
    Error::StateNotFound {
        governor: address.governor.id(),
        state: address.state.id(),
        at: String::new(),
    }
}

fn check_expectation(head: Option<&Head>, request: &Request) -> Result<()> {
    let actual = head.map_or(0, Head::version);
    let deleted = head.is_none_or(|head| head.change.deleted);
    let (holds, expected) = match &request.expect {
        Expect::Any => (true, actual),
        Expect::Version(0) => (deleted, 0),
        Expect::Version(version) => (*version == actual, *version),
        Expect::Data(data) => {
            (head.is_some_and(|head| !head.change.deleted && head.change.data == *data), 0)
        }
    };
    if holds {
        return Ok(());
    }
    Err(Error::VersionConflict {
        governor: request.address.governor.id(),
        state: request.address.state.id(),
        expected,
        actual,
    })
}

/// Refuses what no backend keeps, whatever the head is.
pub(crate) fn check_input(request: &Request) -> Result<()> {
    let subject = request.address.to_string();
    if let Wish::Put(data) = &request.wish {
        let size = measure(data, &subject)?;
        within(&format!("the data of {subject}"), size.text.max(size.native), MAX_STATE_BYTES)?;
    }
    if request.id.is_empty() {
        return Err(Error::refused(format!("the id of a change to {subject}"), "it is empty"));
    }
    within(&format!("the id of a change to {subject}"), request.id.len() as u64, MAX_ID_BYTES)?;
    if request.action.is_empty() {
        return Err(Error::refused(format!("the action on {subject}"), "it is empty"));
    }
    within(&format!("the action on {subject}"), request.action.len() as u64, MAX_ACTION_BYTES)?;
    let metadata = &request.metadata;
    if metadata.context.contains_key(PURGE_CONTEXT) {
        let subject = format!("the metadata of {subject}");
        return Err(Error::refused(subject, format!("{PURGE_CONTEXT} is the store's own")));
    }
    check_metadata_size(metadata, &subject)?;
    if metadata.parent_version.is_some_and(|version| version > MAX_COUNTER) {
        return Err(Error::refused(format!("the parent version of {subject}"), "it is too large"));
    }
    if let Some(at) = request.at {
        check_time(to_micros(at), &request.address)?;
    }
    check_clock(&request.based_on, MAX_COUNTER, MAX_CAUSALITY_BYTES, &request.address)?;
    Ok(())
}

/// RFC 3339 has years of four digits, and no backend keeps the year 0.
fn check_time(time: DateTime<Utc>, address: &Address) -> Result<()> {
    if (1..=9999).contains(&time.year()) {
        return Ok(());
    }
    let subject = format!("the time of a change to {address}");
    Err(Error::refused(subject, "it is outside the years 1 to 9999"))
}

/// # Errors
/// [`Error::TooLarge`], or [`Error::InvalidState`] for what no backend keeps.
pub(crate) fn check_metadata_size(metadata: &ChangeMetadata, subject: &str) -> Result<()> {
    let subject = format!("the metadata of {subject}");
    let mut size = metadata.changed_by.len() as u64 + metadata.reason.len() as u64;
    for (key, value) in &metadata.context {
        let value = measure(value, &subject)?;
        size += key.len() as u64 + value.text.max(value.native);
    }
    within(&subject, size, MAX_METADATA_BYTES)
}

/// The limits hold for the merged clock too: else a state could be stored that can never be updated.
fn check_clock(
    clock: &VectorClockSnapshot,
    most_count: u64,
    most_bytes: u64,
    address: &Address,
) -> Result<()> {
    let what = format!("the vector clock of {address}");
    let size = clock.iter().map(|(node, _)| node.len() as u64 + 24).sum();
    within(&what, size, most_bytes)?;
    if clock.iter().any(|(_, count)| count > most_count) {
        return Err(Error::refused(what, "a count is too large"));
    }
    Ok(())
}

fn within(what: &str, size: u64, limit: u64) -> Result<()> {
    if size <= limit {
        return Ok(());
    }
    Err(Error::TooLarge { what: what.to_owned(), size, limit })
}

#[cfg(test)]
mod edges;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use chrono::{TimeDelta, TimeZone};
    use proptest::prelude::*;
    use serde_json::json;

    pub(crate) fn time(second: i64) -> DateTime<Utc> {
        Utc.timestamp_opt(1_700_000_000 + second, 0).unwrap()
    }

    pub(crate) fn request(wish: Wish, expect: Expect) -> Request {
        Request {
            address: Address::new("gov", "state").unwrap(),
            id: "id".into(),
            action: "act".into(),
            metadata: ChangeMetadata::new("who", "why", None),
            wish,
            expect,
            at: None,
            based_on: VectorClockSnapshot::new(),
        }
    }

    pub(crate) fn change_with(data: Value, text: &str) -> Change {
        let mut request = request(Wish::Put(data), Expect::Any);
        request.metadata =
            ChangeMetadata::new(text, text, Some(7)).with_context("k", json!({"x": [1.5]}));
        let policy = PersistenceConfig::default();
        plan(None, &request, time(0), "node", &policy).unwrap().head.change
    }

    pub(crate) fn put(n: u64) -> Wish {
        Wish::Put(json!(n))
    }

    /// Plans one after the other from nothing.
    pub(crate) fn run(requests: &[Request], policy: &PersistenceConfig) -> Vec<Transition> {
        let mut steps: Vec<Transition> = Vec::new();
        for (second, request) in requests.iter().enumerate() {
            let head = steps.last().map(|step| &step.head);
            let now = time(i64::try_from(second).unwrap());
            steps.push(plan(head, request, now, "node", policy).unwrap());
        }
        steps
    }

    #[test]
    fn expectations_by_table() {
        let policy = PersistenceConfig::default();
        let alive = run(&[request(put(1), Expect::Any), request(put(2), Expect::Any)], &policy);
        let alive = &alive.last().unwrap().head;
        let gone = plan(Some(alive), &request(Wish::Delete, Expect::Any), time(9), "n", &policy);
        let gone = &gone.unwrap().head;
        let cases: &[(Option<&Head>, Expect, Option<(u64, u64)>)] = &[
            (None, Expect::Any, None),
            (None, Expect::Version(0), None),
            (None, Expect::Version(1), Some((1, 0))),
            (None, Expect::Data(json!(2)), Some((0, 0))),
            (Some(alive), Expect::Any, None),
            (Some(alive), Expect::Version(2), None),
            (Some(alive), Expect::Version(0), Some((0, 2))),
            (Some(alive), Expect::Version(1), Some((1, 2))),
            (Some(alive), Expect::Version(3), Some((3, 2))),
            (Some(alive), Expect::Data(json!(2)), None),
            (Some(alive), Expect::Data(json!(2.0)), Some((0, 2))),
            (Some(gone), Expect::Version(0), None),
            (Some(gone), Expect::Version(3), None),
            (Some(gone), Expect::Version(2), Some((2, 3))),
            (Some(gone), Expect::Data(json!(null)), Some((0, 3))),
        ];
        for (head, expect, conflict) in cases {
            let planned = plan(*head, &request(put(5), expect.clone()), time(10), "n", &policy);
            match (planned, conflict) {
                (Ok(step), None) => {
                    assert_eq!(step.head.version(), head.map_or(0, Head::version) + 1);
                }
                (Err(Error::VersionConflict { expected, actual, .. }), Some(versions)) => {
                    assert_eq!((expected, actual), *versions, "{expect:?}");
                }
                (other, _) => panic!("{expect:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn deleting_leaves_a_tombstone_and_versions_go_on() {
        let policy = PersistenceConfig::default();
        let steps = run(
            &[
                request(put(1), Expect::Any),
                request(Wish::Delete, Expect::Version(1)),
                request(put(1), Expect::Version(0)),
            ],
            &policy,
        );
        assert!(steps[1].head.change.deleted && steps[1].head.change.data.is_null());
        assert_eq!(steps[2].head.version(), 3);
        let nothing = plan(None, &request(Wish::Delete, Expect::Any), time(0), "n", &policy);
        assert_eq!(nothing.unwrap_err().code(), "state_not_found");
    }

    #[test]
    fn time_never_goes_backwards() {
        let policy = PersistenceConfig::default();
        let mut early = request(put(1), Expect::Any);
        early.at = Some(time(100) + TimeDelta::nanoseconds(1_999));
        let first = plan(None, &early, time(0), "n", &policy).unwrap();
        assert_eq!(first.head.change.timestamp, time(100) + TimeDelta::microseconds(1));
        let second = plan(Some(&first.head), &request(put(2), Expect::Any), time(5), "n", &policy);
        assert_eq!(second.unwrap().head.change.timestamp, first.head.change.timestamp);
    }

    #[test]
    fn saved_snapshots_come_and_go_with_the_change() {
        let policy = PersistenceConfig {
            snapshot_interval: 3,
            snapshot_retention: 2,
            ..PersistenceConfig::default()
        };
        let requests: Vec<_> = (1..=12).map(|n| request(put(n), Expect::Any)).collect();
        let steps = run(&requests, &policy);
        let saved: Vec<_> =
            steps.iter().filter(|s| s.save_snapshot).map(|s| s.head.version()).collect();
        let dropped: Vec<_> = steps.iter().flat_map(|s| s.drop_snapshots.clone()).collect();
        assert_eq!(saved, [3, 6, 9, 12]);
        assert_eq!(dropped, [3, 6]);
        assert_eq!(steps.last().unwrap().head.snapshot_versions, [9, 12]);
    }

    #[test]
    fn clocks_merge_what_was_seen() {
        let policy = PersistenceConfig::default();
        let first = plan(None, &request(put(1), Expect::Any), time(0), "a", &policy).unwrap();
        let mut second = request(put(2), Expect::Any);
        second.based_on.increment("elsewhere");
        let second = plan(Some(&first.head), &second, time(0), "b", &policy).unwrap();
        let clock = &second.head.change.causality;
        assert_eq!((clock.get("a"), clock.get("b"), clock.get("elsewhere")), (1, 1, 1));
        assert!(first.head.change.causality.happened_before(clock));
    }

    #[test]
    fn what_was_counted_elsewhere_is_not_counted_again() {
        let policy = PersistenceConfig::default();
        let adopt = |head, request: &Request| {
            let step = adopt(head, request, time(0), "here", &policy).unwrap();
            (step.head.change.causality.clone(), step)
        };
        let mut brought = request(put(1), Expect::Any);
        let (counted, _) = adopt(None, &brought);
        assert_eq!(counted.get("here"), 1, "a version that knows of nothing");
        brought.based_on.increment("there");
        let (first, step) = adopt(None, &brought);
        assert_eq!((first, step.head.version()), (brought.based_on.clone(), 1));
        step.head.change.check("change").unwrap();
        let (again, _) = adopt(Some(&step.head), &brought);
        assert_eq!((again.get("there"), again.get("here")), (1, 1));
        brought.based_on.increment("there");
        let (second, step) = adopt(Some(&step.head), &brought);
        assert_eq!((second, step.head.version()), (brought.based_on, 2));
    }

    #[test]
    fn refuses_what_no_backend_keeps() {
        let policy = PersistenceConfig::default();
        let text = |bytes: usize| Wish::Put(json!("x".repeat(bytes)));
        let limit = usize::try_from(MAX_STATE_BYTES).unwrap();
        assert!(plan(None, &request(text(limit - 2), Expect::Any), time(0), "n", &policy).is_ok());
        let many_small = Wish::Put(json!(vec![1; limit / 4]));
        let mut used_up = request(put(1), Expect::Any);
        used_up.based_on = serde_json::from_value(json!({"n": i64::MAX})).unwrap();
        let mut no_action = request(put(1), Expect::Any);
        no_action.action.clear();
        let mut talkative = request(put(1), Expect::Any);
        talkative.metadata.reason = "x".repeat(40_000);
        let mut far = request(put(1), Expect::Any);
        far.at = Some(DateTime::<Utc>::MAX_UTC);
        for (request, code) in [
            (request(text(limit - 1), Expect::Any), "too_large"),
            (request(many_small, Expect::Any), "too_large"),
            (used_up, "invalid_state"),
            (no_action, "invalid_state"),
            (talkative, "too_large"),
            (far, "invalid_state"),
        ] {
            let refused = plan(None, &request, time(0), "n", &policy).unwrap_err();
            assert_eq!(refused.code(), code, "{refused}");
        }
    }

    proptest! {
        #[test]
        fn a_history_is_a_chain(wishes in prop::collection::vec(prop::option::of(0u64..5), 1..60)) {
            let policy = PersistenceConfig { snapshot_interval: 7, ..Default::default() };
            let mut head: Option<Head> = None;
            for (second, wish) in wishes.into_iter().enumerate() {
                let wish = wish.map_or(Wish::Delete, put);
                let now = time(i64::try_from(second * 37 % 11).unwrap());
                let planned = plan(head.as_ref(), &request(wish.clone(), Expect::Any), now, "n", &policy);
                let Ok(step) = planned else {
                    prop_assert_eq!(wish, Wish::Delete);
                    prop_assert!(head.as_ref().is_none_or(|head| head.change.deleted));
                    continue;
                };
                let change = &step.head.change;
                prop_assert_eq!(change.prev_hash, head.as_ref().map(|head| head.change.hash));
                prop_assert_eq!(change.version, head.as_ref().map_or(0, Head::version) + 1);
                if let Some(before) = &head {
                    prop_assert!(change.timestamp >= before.change.timestamp);
                    prop_assert!(before.change.causality.happened_before(&change.causality));
                }
                change.check("change").unwrap();
                head = Some(step.head);
            }
        }
    }
}
