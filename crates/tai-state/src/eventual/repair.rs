//! Read repair: a store learns what a copy knows, and the loser of a conflict stays on record.
//!
//! What is to be written is decided on a head that was read, and committed at once under the
//! condition that it is still the head. Whoever reads the newest version never sees a loser: one commit
//! writes the head once, with its last event.

use serde_json::{Map, Value, json};

use super::{EventualConsistency, Freshness, count};
use crate::chain::format_time;
use crate::clock::new_event_id;
use crate::clock_vector::{Causality, VectorClockSnapshot};
use crate::conflict::{comparable, same};
use crate::error::{Error, Result};
use crate::json::refuse_deep;
use crate::keys::Address;
use crate::lines::{Base, NewEntry};
use crate::proposal::Beside;
use crate::records::{Race, Records};
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::StateStore;
use crate::transition::{Expect, Head, Request, Transition, Wish, check_metadata_size};

/// The action of an event that only keeps what has lost a conflict on record.
pub const CONFLICT_LOST: &str = "conflict.lost";
/// The action of an event that ends a conflict.
pub const CONFLICT_RESOLVED: &str = "conflict.resolved";
/// The action of an event that brings a newer copy into a store.
pub const REPAIRED: &str = "repair";
/// The key of a change's context under which stands what happened.
pub const CONFLICT_CONTEXT: &str = "conflict";

/// The longest name of a resolver on record.
const MAX_RESOLVER_BYTES: usize = 64;

/// What came of a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RepairOutcome {
    /// The store had the same. Nothing was written.
    Unchanged,
    /// The store knew all that the copy knows, and more: take [`Repair::newest`] instead of the copy.
    /// Nothing was written.
    Stale,
    /// The store did not have the state, and has it now.
    Created,
    /// The copy knew all that the store knew, and more: the store has it now. There was no conflict.
    Advanced,
    /// Both sides had come to the same data on their own. The store knows of both now.
    Agreed,
    /// There was a conflict, and the copy has won.
    MineWon,
    /// There was a conflict, and the store's version has won.
    TheirsWon,
    /// There was a conflict, and the resolver has made something new of both.
    Merged,
}

impl RepairOutcome {
    /// Its name on record.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::Stale => "stale",
            Self::Created => "created",
            Self::Advanced => "advanced",
            Self::Agreed => "agreed",
            Self::MineWon => "mine_won",
            Self::TheirsWon => "theirs_won",
            Self::Merged => "merged",
        }
    }
}

/// The answer of [`EventualConsistency::repair`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Repair {
    /// What was done.
    pub outcome: RepairOutcome,
    /// The newest version in the store; its data is `null` when it is deleted.
    pub newest: StateSnapshot,
    /// Whether the state is deleted.
    pub deleted: bool,
    /// The version under which the loser of the conflict can be read, if there was one.
    pub lost_version: Option<u64>,
}

/// How a copy stands to the head, and what follows from that.
enum Decision<'a> {
    /// Nothing is to be written.
    Keep(RepairOutcome, &'a Head),
    /// The copy becomes the newest version.
    Take(RepairOutcome),
    /// A resolver has to be asked.
    Conflict(&'a Head),
}

/// What is to be written.
struct Planned {
    outcome: RepairOutcome,
    /// The loser, where it is not the version before.
    lost: Option<Transition>,
    newest: Transition,
}

impl EventualConsistency {
    /// Brings what a copy knows into a store. In one commit, and only on the version that was looked at:
    ///
    /// * The store knows all of it: nothing is written ([`Unchanged`](RepairOutcome::Unchanged),
    ///   [`Stale`](RepairOutcome::Stale)). So a second repair with the same copy writes nothing.
    /// * The copy knows all that the store knows: it becomes the newest version (event [`REPAIRED`]). That
    ///   is no conflict, and the resolver is not asked. It keeps the clock that it has, so that two stores
    ///   that are repaired with one another's copies come to rest.
    /// * Neither, or equal clocks with different data: the resolver decides. If the copy wins, it becomes
    ///   the newest version (event [`CONFLICT_RESOLVED`]); what it replaces is the version before. Else
    ///   the copy is put on record first (event [`CONFLICT_LOST`]), and the answer becomes the newest
    ///   version on top of it. A resolver that [uses a base](crate::ConflictResolver::uses_base) gets the
    ///   newest version of the log that both sides know of.
    ///
    /// What is written has the time of what it says, as far as times do not go backwards, so that the
    /// last write wins the same whatever the order of repairs; its clock knows of both sides. The
    /// metadata are the given ones, with an entry [`CONFLICT_CONTEXT`] in their context: the resolver, the
    /// outcome, the version that the copy met, and the copy's own version, time, metadata and clock (what
    /// of that would not fit the limit of metadata is left out).
    ///
    /// A deleted state is a version with the data `null`; a copy cannot say that it is deleted. If that is what the resolver answers, the state
    /// stays deleted. A deletion that knows of the copy wins over it without asking.
    ///
    /// # Errors
    /// [`Error::MergeConflict`] and whatever else the resolver says; [`Error::InvalidState`] or
    /// [`Error::TooLarge`] for a copy that no store could keep, and for a handle with an idempotency key;
    /// [`Error::VersionConflict`] when others were faster until the deadline;
    /// [`Error::LockLost`] on a [fenced](StateStore::fenced_by) handle; [`Error::OutcomeUnknown`]. But for
    /// the last, nothing is written then.
    pub async fn repair(
        &self,
        store: &StateStore,
        governor: impl AsRef<str>,
        mine: &StateSnapshot,
        mut metadata: ChangeMetadata,
    ) -> Result<Repair> {
        comparable([mine])?;
        let address = Address::new(governor.as_ref(), mine.id.as_str())?;
        refuse_deep(metadata.context.values_mut(), &address.to_string())?;
        let StateStore { records, conditions } = store;
        if conditions.key.is_some() {
            return Err(Error::refused(
                format!("a repair of {address} on a handle with an idempotency key"),
                "it needs none: repaired again, nothing is written",
            ));
        }
        let deadline = records.deadline();
        let place = records.lines.join(&address);
        let mut race = Race::default();
        let mut alone = !conditions.is_empty();
        let mut is_noted = false;
        loop {
            let turn = place.turn().await;
            // Decided is on what holds, not on what is under way.
            while let Some(mut pending) = place.end() {
                if deadline.is_over() || pending.is_durable(deadline).await {
                    break;
                }
            }
            let theirs = records.head_by(&address, deadline).await?;
            let head = theirs.as_ref().map(|known| known.head.as_ref());
            let repair = Attempt { records, address: &address, mine, metadata: &metadata, head };
            let planned = match decide(mine, head) {
                Decision::Keep(outcome, head) => {
                    if outcome == RepairOutcome::Stale {
                        self.note_freshness(governor.as_ref(), mine, Freshness::Stale);
                    }
                    return Ok(answer(outcome, head, None));
                }
                Decision::Take(outcome) => repair.take(outcome)?,
                Decision::Conflict(head) => {
                    if !std::mem::replace(&mut is_noted, true) {
                        self.note_conflict(mine.id.as_str());
                    }
                    self.resolve(&repair, head).await?
                }
            };
            let Planned { outcome, lost, newest } = planned;
            let lost_version = match &lost {
                Some(lost) => Some(lost.head.version()),
                None if outcome == RepairOutcome::MineWon => head.map(Head::version),
                None => None,
            };
            let done = answer(outcome, &newest.head, lost_version);
            let planned_on = theirs.as_ref().map(|known| known.revision);
            let steps = lost.into_iter().chain([newest]).collect();
            let beside = Beside { fences: conditions.fences.clone(), command: None };
            let entry = NewEntry { steps, beside, alone, deadline };
            let receipt = records.submit(&place, Base::Known(theirs), entry);
            drop(turn);
            let refused = match receipt.settled().await {
                Ok(()) => {
                    self.note_repair(&address, outcome);
                    return Ok(done);
                }
                Err(refused) => refused,
            };
            alone |= refused.alone;
            match refused.error {
                error if refused.stale => {
                    if deadline.is_over() {
                        return Err(error);
                    }
                }
                error @ Error::VersionConflict { .. } => {
                    race.lost(planned_on);
                    if race.is_stuck() {
                        return Err(Error::corrupt(
                            format!("the log of {address}"),
                            format!("it holds an event beyond the head: {error}"),
                        ));
                    }
                    if deadline.is_over() {
                        return Err(error);
                    }
                    tracing::debug!(%address, races = race.races, "somebody was faster, repairing anew");
                    metrics::counter!("tai_state_conflicts_total").increment(1);
                    let wait = records.options().retry.backoff(race.races);
                    tokio::time::sleep(wait.min(deadline.left())).await;
                }
                error => return Err(error),
            }
        }
    }

    /// Asks the resolver, and says what is to be written.
    async fn resolve(&self, repair: &Attempt<'_>, head: &Head) -> Result<Planned> {
        let (mine, theirs) = (repair.mine, &head.change);
        let base = if self.shared.resolver.uses_base() {
            common_ancestor(repair, head).await?
        } else {
            None
        };
        let answer = self.resolve_from(base.as_ref(), mine, &theirs.snapshot())?;
        // Where the state is deleted, `null` is the deletion, also if the copy says it too.
        let outcome = if same(&answer.data, &theirs.data) {
            RepairOutcome::TheirsWon
        } else if same(&answer.data, &mine.data) {
            RepairOutcome::MineWon
        } else {
            RepairOutcome::Merged
        };
        let stays_deleted = theirs.deleted && outcome == RepairOutcome::TheirsWon;
        let resolver = short(self.shared.resolver.name());
        let mut note = Map::new();
        note.insert("outcome".into(), outcome.as_str().into());
        note.insert("resolver".into(), resolver.into());
        note.insert("with_version".into(), head.version().into());
        let wish = if stays_deleted { Wish::Delete } else { Wish::Put(answer.data) };
        let at = Some(answer.timestamp);
        let last = |metadata| Request {
            action: CONFLICT_RESOLVED.to_owned(),
            wish,
            at,
            based_on: answer.causality.clone(),
            ..repair.request(metadata)
        };
        let Attempt { records, .. } = repair;
        let policy = &records.options().persistence;
        if outcome == RepairOutcome::MineWon {
            let newest = records.plan(Some(head), &last(repair.with_mine(note)), policy)?;
            return Ok(Planned { outcome, lost: None, newest });
        }
        let lost = Request {
            action: CONFLICT_LOST.to_owned(),
            at,
            ..repair.request(repair.with_mine(note.clone()))
        };
        let lost = records.plan(Some(head), &lost, policy)?;
        note.insert("lost_version".into(), lost.head.version().into());
        let newest = records.plan(Some(&lost.head), &last(repair.with(note)), policy)?;
        Ok(Planned { outcome, lost: Some(lost), newest })
    }

    fn note_repair(&self, address: &Address, outcome: RepairOutcome) {
        use RepairOutcome::{Agreed, Merged, MineWon, TheirsWon};
        let counts = &self.shared.counts;
        count(&counts.read_repairs);
        if matches!(outcome, MineWon | TheirsWon | Merged) {
            count(&counts.conflicts_resolved);
        }
        if matches!(outcome, TheirsWon | Merged) {
            count(&counts.losers_recorded);
        }
        let outcome_name = outcome.as_str();
        if matches!(outcome, MineWon | TheirsWon | Merged | Agreed) {
            tracing::warn!(%address, outcome = outcome_name, "a conflict was resolved");
        } else {
            tracing::info!(%address, outcome = outcome_name, "a store was repaired");
        }
    }
}

/// Every case in which no resolver is needed.
fn decide<'a>(mine: &StateSnapshot, head: Option<&'a Head>) -> Decision<'a> {
    let Some(head) = head else { return Decision::Take(RepairOutcome::Created) };
    let theirs = &head.change;
    let is_same = same(&mine.data, &theirs.data);
    match mine.causality.compare(&theirs.causality) {
        Causality::Before => Decision::Keep(RepairOutcome::Stale, head),
        Causality::After => Decision::Take(RepairOutcome::Advanced),
        Causality::Equal if is_same => Decision::Keep(RepairOutcome::Unchanged, head),
        Causality::Concurrent if is_same && !theirs.deleted => {
            Decision::Take(RepairOutcome::Agreed)
        }
        Causality::Equal | Causality::Concurrent => Decision::Conflict(head),
    }
}

fn answer(outcome: RepairOutcome, head: &Head, lost_version: Option<u64>) -> Repair {
    let newest = head.change.snapshot();
    Repair { outcome, newest, deleted: head.change.deleted, lost_version }
}

/// What one try of a repair works with.
struct Attempt<'a> {
    records: &'a Records,
    address: &'a Address,
    mine: &'a StateSnapshot,
    metadata: &'a ChangeMetadata,
    head: Option<&'a Head>,
}

impl Attempt<'_> {
    /// One step: the copy's data, time and clock, unless said otherwise.
    fn request(&self, metadata: ChangeMetadata) -> Request {
        Request {
            address: self.address.clone(),
            id: new_event_id().to_string(),
            action: REPAIRED.to_owned(),
            metadata,
            wish: Wish::Put(self.mine.data.clone()),
            // It is planned on a head that was read, and committed on that head only.
            expect: Expect::Any,
            at: Some(self.mine.timestamp),
            based_on: self.mine.causality.clone(),
        }
    }

    /// The copy becomes the newest version. That is no change of its own: the copy's is told on.
    fn take(&self, outcome: RepairOutcome) -> Result<Planned> {
        let mut note = Map::new();
        note.insert("outcome".into(), outcome.as_str().into());
        note.insert("with_version".into(), self.head.map_or(0, Head::version).into());
        let policy = &self.records.options().persistence;
        let request = self.request(self.with_mine(note));
        let newest = self.records.adopt(self.head, &request, policy)?;
        Ok(Planned { outcome, lost: None, newest })
    }

    /// The metadata with a note of what happened, and what else is known of the copy. All of it if it fits;
    /// else without its context and clock; else as much as fits.
    fn with_mine(&self, note: Map<String, Value>) -> ChangeMetadata {
        let StateSnapshot { version, timestamp, metadata, causality, .. } = self.mine;
        let timestamp = format_time(timestamp);
        let little = json!({"version": version, "timestamp": timestamp});
        let some = json!({
            "version": version,
            "timestamp": timestamp,
            "changed_by": metadata.changed_by,
            "reason": metadata.reason,
            "parent_version": metadata.parent_version,
        });
        let mut all = some.clone();
        if let Some(all) = all.as_object_mut() {
            all.insert("causality".into(), counts(causality));
            // What happened to it before stands on record where it happened.
            let mut context = metadata.context.clone();
            context.remove(CONFLICT_CONTEXT);
            all.insert("context".into(), Value::Object(context.into_iter().collect()));
        }
        for mine in [all, some, little] {
            let mut note = note.clone();
            note.insert("mine".into(), mine);
            if let Some(metadata) = self.noted(note) {
                return metadata;
            }
        }
        self.with(note)
    }

    /// The metadata with a note, or without where it does not fit.
    fn with(&self, note: Map<String, Value>) -> ChangeMetadata {
        self.noted(note).unwrap_or_else(|| self.metadata.clone())
    }

    fn noted(&self, note: Map<String, Value>) -> Option<ChangeMetadata> {
        let metadata = self.metadata.clone().with_context(CONFLICT_CONTEXT, note);
        check_metadata_size(&metadata, "a repair").is_ok().then_some(metadata)
    }
}

fn counts(clock: &VectorClockSnapshot) -> Value {
    Value::Object(clock.iter().map(|(node, count)| (node.to_owned(), count.into())).collect())
}

fn short(name: &str) -> &str {
    let mut end = name.len().min(MAX_RESOLVER_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.get(..end).unwrap_or_default()
}

/// The newest version of the log, before the head, that the copy knows of too.
///
/// Every event knows of all events before it. So the copy knows of the first events up to one, and that is
/// found by halving; the copy mostly says itself where to begin.
async fn common_ancestor(repair: &Attempt<'_>, head: &Head) -> Result<Option<StateSnapshot>> {
    let Attempt { records, address, mine, .. } = repair;
    let (mut low, mut high) = (head.first_version, head.version());
    let mut found = None;
    let mut probes: Vec<u64> = [Some(mine.version), mine.metadata.parent_version]
        .into_iter()
        .flatten()
        .flat_map(|version| [version, version.saturating_add(1)])
        .filter(|version| (low..high).contains(version))
        .collect();
    probes.sort_unstable();
    probes.dedup();
    while low < high {
        if probes.is_empty() {
            probes.push(low + (high - low) / 2);
        }
        let changes = records.reader().changes_at(address, &probes).await?;
        for (version, change) in probes.drain(..).zip(changes) {
            if !(low..high).contains(&version) {
                continue;
            }
            let change = change.ok_or_else(|| {
                let location = format!("the log of {address} at v{version}");
                Error::corrupt(location, "the event is missing")
            })?;
            match change.causality.compare(&mine.causality) {
                Causality::Before | Causality::Equal => {
                    low = version + 1;
                    found = Some(change.snapshot());
                }
                Causality::After | Causality::Concurrent => high = version,
            }
        }
    }
    Ok(found)
}
