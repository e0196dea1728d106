//! Sends a commit until its outcome is known, and finds out what became of one that was not answered.
//!
//! A commit that was refused, or whose answer was lost, is never reported from the refusal alone: the
//! event at that version is read, and if it is ours, the change was applied.

use crate::backend::{BackendError, Key, Revision, Write};
use crate::chain::Change;
use crate::error::{Error, Result};
use crate::patience::{Deadline, Tries};
use crate::reader::{KnownHead, known, lift};
use crate::records::{Guard, Records, Steps, version_conflict};
use crate::schema;

impl Records {
    /// Sends one list of writes until its outcome is known.
    pub(crate) async fn send(
        &self,
        groups: &[Steps],
        guards: &[Guard],
        writes: &[Write],
        deadline: Deadline,
    ) -> Result<Applied, Refused> {
        let mut tries = Tries::new(&self.options.retry, deadline);
        let mut unclear = false;
        loop {
            let error = match tries.once(self.backend.commit(writes.to_vec())).await {
                Some(Ok(committed)) => return Ok(Applied::Answered(committed.revisions)),
                Some(Err(error)) => error,
                None => BackendError::Indeterminate("no answer before the deadline".into()),
            };
            let was_asked_to_wait = matches!(error, BackendError::Throttled(_));
            let source = match error {
                BackendError::Conflict if !self.options.settles() => {
                    return Err(overtaken_by_nobody(groups).into());
                }
                BackendError::Conflict => {
                    match self.settle(groups, guards, deadline.for_a_last_look()).await {
                        Ok(Settled::Applied(heads)) => return Ok(Applied::Settled(heads)),
                        Ok(Settled::Overtaken(refused)) => return Err(refused),
                        // What stands in the way cannot be seen yet. It may be our own commit, so this
                        // is no conflict: the same is sent again until it is seen.
                        Ok(Settled::AsPlanned) => {
                            unclear = true;
                            overtaken_by_nobody(groups)
                        }
                        Ok(Settled::Trimmed) => {
                            return Err(outcome_unknown(groups, overtaken_by_nobody(groups)).into());
                        }
                        // A commit can be delivered twice: the refusal may be of our own second one.
                        Err(error) if unclear || error.is_transient() => {
                            return Err(outcome_unknown(groups, error).into());
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                BackendError::Indeterminate(reason) => {
                    unclear = true;
                    lift(BackendError::Indeterminate(reason), &self.location)
                }
                error @ (BackendError::Throttled(_) | BackendError::Unavailable(_)) => {
                    lift(error, &self.location)
                }
                error if unclear => {
                    return Err(outcome_unknown(groups, lift(error, &self.location)).into());
                }
                error => return Err(lift(error, &self.location).into()),
            };
            let failed = tries.failed() + 1;
            tracing::warn!(reason = %source, failed, unclear, "a commit was not answered");
            if tries.again(was_asked_to_wait).await {
                continue;
            }
            if !unclear {
                return Err(source.into());
            }
            // The last resort: whoever stands at that version now has settled it.
            return match self.settle(groups, guards, deadline.for_a_last_look()).await {
                Ok(Settled::Applied(heads)) => Ok(Applied::Settled(heads)),
                Ok(Settled::Overtaken(refused)) => Err(refused),
                Ok(Settled::AsPlanned | Settled::Trimmed) | Err(_) => {
                    Err(outcome_unknown(groups, source).into())
                }
            };
        }
    }

    /// Finds out what became of a commit, by looking for its events. One read for all.
    async fn settle(
        &self,
        groups: &[Steps],
        guards: &[Guard],
        deadline: Deadline,
    ) -> Result<Settled> {
        let firsts: Vec<(&Change, Option<Revision>)> = groups
            .iter()
            .filter_map(|group| {
                let first = &group.transitions.first()?.head.change;
                Some((first, group.base.as_ref().map(|known| known.revision)))
            })
            .collect();
        // What only guards comes first: where a read of several documents may be torn, a guard must not
        // be newer than what says that our own commit is not there. And the head before its event: see
        // `backend::Read::get`.
        let mut keys: Vec<Key> = guards.iter().map(|guard| guard.address.head()).collect();
        for (change, _) in &firsts {
            keys.extend([change.address.head(), change.address.event(change.version)]);
        }
        let mut found = self.reader_within(deadline.left()).get(&keys).await?.into_iter();
        let mut next = || found.next().flatten();
        let (mut conflict, mut heads) = (None, Vec::new());
        let (mut ours, mut trimmed) = (false, false);
        for guard in guards {
            let head = next().map(|document| known(&guard.address, &document)).transpose()?;
            let seen = guard.seen.as_ref();
            if head.as_ref().map(|known| known.revision) != seen.map(|known| known.revision) {
                let version = |known: Option<&KnownHead>| known.map_or(0, |k| k.head.version());
                let (expected, actual) = (version(seen), version(head.as_ref()));
                conflict.get_or_insert_with(|| version_conflict(&guard.address, expected, actual));
            }
        }
        for (change, seen) in &firsts {
            let address = &change.address;
            let head = next().map(|document| known(address, &document)).transpose()?;
            let there =
                next().map(|document| schema::read_change(address, &document)).transpose()?;
            // By the hash, which covers the identity and all that the event says: another's event may
            // carry the same identity, if its writer chose it. All or nothing: one event of ours
            // proves the whole commit.
            ours |= there.as_ref().is_some_and(|there| there.hash == change.hash);
            // Something stood at that version and is cleaned up: nobody can tell any more whose it was.
            let is_past = head.as_ref().is_some_and(|head| head.head.version() >= change.version);
            trimmed |= is_past && there.is_none();
            if head.as_ref().map(|known| known.revision) != *seen || there.is_some() {
                let actual = head.as_ref().map_or(0, |known| known.head.version());
                let actual = actual.max(there.map_or(0, |change| change.version));
                conflict
                    .get_or_insert_with(|| version_conflict(address, change.version - 1, actual));
            }
            heads.push(head);
        }
        if ours {
            return Ok(Settled::Applied(heads));
        }
        if trimmed {
            return Ok(Settled::Trimmed);
        }
        Ok(match conflict {
            Some(error) => Settled::Overtaken(Refused { error, heads }),
            None => Settled::AsPlanned,
        })
    }
}

/// How it is known that a commit was applied.
pub(crate) enum Applied {
    /// By its answer: the revisions of its documents.
    Answered(Vec<Option<Revision>>),
    /// By looking: the newest heads of its groups.
    Settled(Vec<Option<KnownHead>>),
}

/// What became of a commit.
enum Settled {
    /// It was applied: its answer was lost, or it was delivered twice.
    Applied(Vec<Option<KnownHead>>),
    /// It can never be applied any more, since what it was planned on has changed.
    Overtaken(Refused),
    /// Nothing has changed; it may still be on its way.
    AsPlanned,
    /// What would tell was cleaned up.
    Trimmed,
}

/// Why a commit was not applied, and the newest heads of its groups as far as they were seen.
pub(crate) struct Refused {
    pub(crate) error: Error,
    pub(crate) heads: Vec<Option<KnownHead>>,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, heads: Vec::new() }
    }
}

fn overtaken_by_nobody(groups: &[Steps]) -> Error {
    match groups.first().and_then(|group| group.transitions.first()) {
        Some(first) => {
            let change = &first.head.change;
            version_conflict(&change.address, change.version - 1, change.version - 1)
        }
        None => Error::refused("a commit", "it changes nothing"),
    }
}

fn outcome_unknown(groups: &[Steps], source: Error) -> Error {
    match groups.first().and_then(|group| group.transitions.first()) {
        Some(first) => {
            let change = &first.head.change;
            Error::OutcomeUnknown {
                governor: change.address.governor.id(),
                state: change.address.state.id(),
                version: change.version,
                event_id: change.id.clone(),
                source: Some(Box::new(source)),
            }
        }
        None => source,
    }
}
