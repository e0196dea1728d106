//! Establishes a state from its log, and mends the head when it is not what the log says.
//!
//! *State = saved snapshot + replay.* The newest saved snapshot that can be used is the base, the events
//! after it are folded on it, and the result is compared with the head. Which of several sources is
//! believed when they differ:
//!
//! * a saved snapshot that is missing, damaged, or that the event after it does not follow from is passed
//!   over for the one before it, in the end for the first event;
//! * a head that is missing, damaged, or older than the log is made anew from the log, and put back if
//!   nothing else stands there meanwhile;
//! * a gap or a broken chain in the log, or a head that says something else than the log at the same
//!   version, is [`Error::Corrupt`]: then nothing says what the state is.

mod report;
mod saved;
mod without_head;

use std::sync::Arc;

use crate::backend::{Document, Kind, Revision};
use crate::chain::Change;
use crate::clock::Stopwatch;
use crate::conditions::Conditions;
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::patience::Deadline;
use crate::records::{KnownHead, Records};
use crate::replay::Replay;
use crate::revise::Repair;
use crate::schema;
use crate::transition::Head;

pub use report::{HeadCondition, PassedOver, RecoveryBase, RecoveryReport};

/// How often a head that seems to be behind its log is looked at again, before it is believed to be so:
/// on Google's emulator an event is visible a little before its head.
const LOOKS: u32 = 6;

/// What was established.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) change: Change,
    pub(crate) report: RecoveryReport,
}

/// What stands where the head belongs.
enum Found {
    Sound(Arc<Head>, Revision),
    Damaged(String, Revision),
    Missing,
}

impl Found {
    fn of(address: &Address, document: Option<&Document>) -> Result<Self> {
        let Some(document) = document else { return Ok(Self::Missing) };
        match schema::read_head(address, document) {
            Ok(head) => Ok(Self::Sound(Arc::new(head), document.revision)),
            Err(Error::Corrupt { reason, .. }) => Ok(Self::Damaged(reason, document.revision)),
            Err(error) => Err(error),
        }
    }

    fn revision(&self) -> Option<Revision> {
        match self {
            Self::Sound(_, revision) | Self::Damaged(_, revision) => Some(*revision),
            Self::Missing => None,
        }
    }

    /// Whether what was read in between may be another history. Writers alone only add to it: then what
    /// is missing is missing, however often it is looked for.
    fn is_overtaken_by(&self, newer: &Self) -> bool {
        match (self, newer) {
            (Self::Sound(old, _), Self::Sound(new, _)) => old.first_version != new.first_version,
            _ => self.revision() != newer.revision(),
        }
    }

    fn condition(&self) -> HeadCondition {
        match self {
            Self::Sound(..) => HeadCondition::Sound,
            Self::Damaged(reason, _) => HeadCondition::Damaged(reason.clone()),
            Self::Missing => HeadCondition::Missing,
        }
    }
}

/// One attempt to fold a log.
struct Fold<'a> {
    records: &'a Records,
    address: &'a Address,
    batch: usize,
    bytes: u64,
    passed_over: Vec<PassedOver>,
    /// Saved snapshots that are of the log, and do not say what the head says of since when history is kept.
    disputed: Vec<(Change, u64)>,
    /// Saved snapshots that the head does not name.
    unnamed: Vec<u64>,
}

/// A log that was folded up to its end.
struct Folded {
    base: RecoveryBase,
    replay: Replay,
}

impl Records {
    /// Establishes a state from its log, reading `batch` events at a time, and puts back the head when it
    /// is not what the log says; with `thorough` also the saved snapshots that were passed over.
    pub(crate) async fn recover(
        self: &Arc<Self>,
        address: &Address,
        conditions: &Conditions,
        batch: usize,
        thorough: bool,
    ) -> Result<Recovered> {
        let watch = Stopwatch::start();
        let deadline = self.deadline();
        let (mut looks, mut refused) = (0, 0);
        let goes_on = || match deadline.is_over() {
            true => {
                let operation = format!("recovering {address}");
                Err(Error::Timeout { operation, after: deadline.limit() })
            }
            false => Ok(()),
        };
        loop {
            let (found, bytes) = self.find_head(address, deadline).await?;
            if let Found::Sound(head, revision) = &found {
                let known = KnownHead { head: Arc::clone(head), revision: *revision };
                self.remember(address, Some(&known));
            }
            let mut fold = Fold::new(self, address, batch, bytes);
            let mut condition = found.condition();
            let by_the_head = match fold.run(&found).await {
                Ok(folded) => Ok(folded),
                // A clean-up, or a purge, may have come in between.
                Err(error @ Error::Corrupt { .. }) => {
                    if found.is_overtaken_by(&self.find_head(address, deadline).await?.0) {
                        goes_on()?;
                        continue;
                    }
                    Err(error)
                }
                Err(error) => return Err(error),
            };
            let (mut from_before, mut is_doubtful) = (None, false);
            if let Found::Sound(head, _) = &found
                && (thorough || by_the_head.is_err())
                && fold.is_cut_since(head).await?
            {
                // As a rule somebody has cleaned up in between.
                let newest = self.find_head(address, deadline).await?.0;
                let is_overtaken = found.is_overtaken_by(&newest);
                looks += u32::from(!is_overtaken);
                if is_overtaken || looks < LOOKS {
                    goes_on()?;
                    tokio::time::sleep(self.options.retry.backoff(looks)).await;
                    continue;
                }
                from_before = fold.without_older_head(&found).await?;
                is_doubtful = from_before.is_none();
            }
            let (mut folded, mut repair) = match from_before {
                Some(made) => made,
                None => by_the_head?,
            };
            if let (Found::Sound(head, _), Some(_)) = (&found, &repair) {
                condition = HeadCondition::Behind(head.version());
            }
            if let Found::Sound(head, revision) = &found
                && condition == HeadCondition::Sound
                && folded.replay.next_version() > head.version() + 1
            {
                // The log goes on after the head. As a rule somebody has written in between.
                let newest = self.find_head(address, deadline).await?.0;
                if newest.revision() == Some(*revision) {
                    looks += 1;
                    if looks < LOOKS && !deadline.is_over() {
                        tokio::time::sleep(self.options.retry.backoff(looks)).await;
                        continue;
                    }
                    condition = HeadCondition::Behind(head.version());
                    // What it notes is old too.
                    (folded, repair) = fold.without_head(&found).await?;
                }
            }
            let change = match (&found, &repair) {
                (Found::Sound(head, _), None) => head.change.clone(),
                _ => folded.newest()?.clone(),
            };
            if thorough
                && let Found::Sound(head, _) = &found
                && repair.is_none()
            {
                fold.look_at_saved(head, folded.base).await?;
                fold.look_for_unnamed(head).await?;
                if is_doubtful {
                    // They may know better than the head.
                    fold.disputed.retain(|(_, since)| *since <= head.first_version);
                }
            }
            if thorough && fold.found_something() {
                let head = match (&repair, &found) {
                    (Some(repair), _) => Some(repair.head.clone()),
                    (None, Found::Sound(head, _)) => Some(Head::clone(head)),
                    (None, _) => None,
                };
                if let Some(head) = head {
                    let mut whole = repair.unwrap_or_else(|| Repair::of(found.revision(), head));
                    fold.save_again(&mut whole).await?;
                    fold.name_or_drop(&mut whole).await?;
                    let is_idle = whole.save.is_empty()
                        && whole.drop_snapshots.is_empty()
                        && matches!(&found, Found::Sound(head, _) if **head == whole.head);
                    repair = (!is_idle).then_some(whole);
                }
            }
            let mut repaired = false;
            if let Some(repair) = &repair {
                repaired = self.restore(address, conditions, repair, self.deadline()).await?;
                refused += u32::from(!repaired);
                // Only the head must be put right. Saved snapshots of a hot state come and go meanwhile: those
                // that were passed over are as a rule gone with their names.
                let may_stay = condition == HeadCondition::Sound && refused >= LOOKS;
                if !repaired && !may_stay {
                    if deadline.is_over() {
                        let operation = format!("repairing {address}");
                        return Err(Error::Timeout { operation, after: deadline.limit() });
                    }
                    tokio::time::sleep(self.options.retry.backoff(refused)).await;
                    continue;
                }
                if !repaired {
                    let newest = self.find_head(address, self.deadline()).await?.0;
                    fold.forget_what_was_cleaned_up(&newest).await?;
                }
            }
            if repaired {
                tracing::warn!(%address, version = change.version, head = ?condition, "repaired from the log");
                metrics::counter!("tai_state_repairs_total").increment(1);
            }
            let report = RecoveryReport {
                governor_id: address.governor.id(),
                state_id: address.state.id(),
                version: change.version,
                base: folded.base,
                head: condition,
                repaired,
                passed_over: fold.passed_over,
                disputed: fold.disputed.iter().map(|(change, _)| change.version).collect(),
                events_replayed: folded.replay.folded(),
                bytes_read: fold.bytes,
                elapsed: watch.elapsed(),
            };
            tracing::debug!(%address, events = report.events_replayed, "replayed");
            metrics::histogram!("tai_state_recovery_events").record(report.events_replayed as f64);
            metrics::histogram!("tai_state_recovery_seconds").record(report.elapsed.as_secs_f64());
            return Ok(Recovered { change, report });
        }
    }

    /// What stands where the head belongs, and its size.
    async fn find_head(&self, address: &Address, deadline: Deadline) -> Result<(Found, u64)> {
        let found = self.reader_within(deadline.left()).get(&[address.head()]).await?;
        let document = found.into_iter().next().flatten();
        let bytes = document.as_ref().map_or(0, Document::bytes);
        Ok((Found::of(address, document.as_ref())?, bytes))
    }
}

impl Repair {
    fn of(found: Option<Revision>, head: Head) -> Self {
        Self { found, head, save: Vec::new(), drop_snapshots: Vec::new() }
    }
}

impl Folded {
    fn newest(&self) -> Result<&Change> {
        let nothing = || Error::corrupt("a log", "it is empty");
        self.replay.last().ok_or_else(nothing)
    }
}

impl<'a> Fold<'a> {
    fn new(records: &'a Records, address: &'a Address, batch: usize, bytes: u64) -> Self {
        let (passed_over, disputed, unnamed) = (Vec::new(), Vec::new(), Vec::new());
        Self { records, address, batch: batch.max(1), bytes, passed_over, disputed, unnamed }
    }

    /// Folds the log up to its end; says what is to be put right when there is no head to believe.
    async fn run(&mut self, found: &Found) -> Result<(Folded, Option<Repair>)> {
        let Found::Sound(head, _) = found else {
            return self.without_head(found).await;
        };
        for version in head.snapshot_versions.iter().rev() {
            let (base, tail) = tokio::join!(self.snapshot(*version), self.page(version + 1));
            let (base, tail) = match (base, tail) {
                (Ok((Some(base), bytes)), tail) => {
                    self.bytes += bytes;
                    (base, tail?)
                }
                (Ok((None, _)), _) => {
                    self.pass_over(*version, "it is missing");
                    continue;
                }
                (Err(Error::Corrupt { reason, .. }), _) => {
                    self.pass_over(*version, &reason);
                    continue;
                }
                (Err(error), _) => return Err(error),
            };
            let (base, since) = base;
            let follows = tail.documents.first().is_none_or(|first| {
                // A damaged event is no fault of the base.
                schema::read_change(self.address, first)
                    .map_or(true, |first| first.prev_hash == Some(base.hash))
            });
            let is_head = base.version == head.version();
            if !follows || (is_head && base != head.change) {
                self.pass_over(*version, "it is not what the log says");
                continue;
            }
            if head.is_disputed_by(*version, since) {
                self.disputed.push((base.clone(), since));
            }
            let start = (RecoveryBase::SavedSnapshot(*version), Replay::from_base(base));
            return Ok((self.finish(start, tail, head).await?, None));
        }
        let first = head.first_version;
        let tail = self.page(first).await?;
        let start = (RecoveryBase::FirstEvent(first), Replay::from_first(first));
        Ok((self.finish(start, tail, head).await?, None))
    }

    /// What the log says, for a head from before a clean-up, if a saved snapshot or a purge says since when history
    /// is kept. If none does, something is lost, and the head is all that there is.
    async fn without_older_head(
        &mut self,
        found: &Found,
    ) -> Result<Option<(Folded, Option<Repair>)>> {
        let by_the_head = (self.passed_over.clone(), self.disputed.clone());
        match self.without_head(found).await {
            Ok(made) => Ok(Some(made)),
            Err(Error::Corrupt { .. }) => {
                (self.passed_over, self.disputed) = by_the_head;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Folds page after page on what it starts from, up to the head.
    async fn finish(
        &mut self,
        (base, mut replay): (RecoveryBase, Replay),
        tail: Tail,
        head: &Head,
    ) -> Result<Folded> {
        let wanted = head.version();
        let mut at_head = replay.last().filter(|base| base.version == wanted).cloned();
        let mut next = Some(tail);
        while let Some(tail) = next {
            for document in &tail.documents {
                let change = schema::read_change(self.address, document)?;
                if change.version == wanted {
                    at_head = Some(change.clone());
                }
                replay.push(change)?;
            }
            // That it goes on after the head is enough: who reads it to its end may run after its writers.
            if replay.next_version() > wanted + 1 {
                self.bytes += tail.bytes();
                break;
            }
            next = self.after(&tail).await?;
        }
        if replay.next_version() <= wanted {
            return Err(Error::corrupt(
                format!("the log of {} at v{}", self.address, replay.next_version()),
                "the event is missing",
            ));
        }
        if at_head.as_ref() != Some(&head.change) {
            return Err(Error::corrupt(
                format!("the head of {}", self.address),
                "it is not what its log says",
            ));
        }
        Ok(Folded { base, replay })
    }

    fn pass_over(&mut self, version: u64, reason: &str) {
        let address = self.address;
        if self.passed_over.iter().any(|passed| passed.version == version) {
            return;
        }
        tracing::warn!(%address, version, reason, "a saved snapshot is passed over");
        self.passed_over.push(PassedOver { version, reason: reason.to_owned() });
    }

    /// A saved snapshot with since when history was kept, and its size.
    async fn snapshot(&self, version: u64) -> Result<(Option<(Change, u64)>, u64)> {
        let found = self.records.reader().get(&[self.address.snapshot(version)]).await?;
        let Some(document) = found.into_iter().next().flatten() else { return Ok((None, 0)) };
        Ok((Some(schema::read_saved(self.address, &document)?), document.bytes()))
    }

    async fn page(&self, from: u64) -> Result<Tail> {
        let reader = self.records.reader();
        let (documents, next) =
            reader.versions(self.address, Kind::Events, from, u64::MAX, self.batch).await?;
        Ok(Tail { documents, next })
    }

    async fn after(&mut self, tail: &Tail) -> Result<Option<Tail>> {
        self.bytes += tail.bytes();
        match tail.next {
            Some(from) => Ok(Some(self.page(from).await?)),
            None => Ok(None),
        }
    }
}

/// A page of events.
struct Tail {
    documents: Vec<Document>,
    next: Option<u64>,
}

impl Tail {
    fn bytes(&self) -> u64 {
        self.documents.iter().map(Document::bytes).sum()
    }
}
