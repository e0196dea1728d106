//! Sends a commit until its outcome is known, and finds out what became of one that was not answered.
//!
//! A commit that was refused, or whose answer was lost, is never reported from the refusal alone: the
//! event at that version is read, and if it is ours, the change was applied. The answer to a command
//! serves where there is no event.

use std::sync::Arc;

use crate::backend::{BackendError, Document, Key, Precondition, Revision, Write};
use crate::chain::Change;
use crate::error::{Error, Result};
use crate::fence::Token;
use crate::keys::Address;
use crate::lease::Lease;
use crate::patience::{Deadline, Tries};
use crate::proposal::{Proposal, Steps};
use crate::reader::{KnownHead, known, lift};
use crate::records::{Records, version_conflict};
use crate::schema;

impl Records {
    /// Sends one list of writes until its outcome is known.
    pub(crate) async fn send(
        &self,
        proposal: Proposal<'_>,
        mut writes: Vec<Write>,
        deadline: Deadline,
    ) -> Result<Applied, Refused> {
        let mut tries = Tries::new(&self.options.retry, deadline);
        let mut unclear = false;
        if deadline.is_over() {
            // Nothing was sent, so nothing is unclear.
            let operation = format!("writing to {}", self.location);
            return Err(Error::Timeout { operation, after: deadline.limit() }.into());
        }
        loop {
            let error = match tries.once(self.backend.commit(writes.clone())).await {
                Some(Ok(committed)) => return Ok(Applied::Answered(committed.revisions)),
                Some(Err(error)) => error,
                None => BackendError::Indeterminate("no answer before the deadline".into()),
            };
            let was_asked_to_wait = matches!(error, BackendError::Throttled(_));
            let source = match error {
                BackendError::Conflict if !self.options.settles() => {
                    return Err(overtaken_by_nobody(proposal.groups).into());
                }
                BackendError::Conflict => {
                    match self.settle(proposal, &writes, deadline.for_a_last_look()).await {
                        Ok(Settled::Applied(heads)) => return Ok(Applied::Settled(heads)),
                        Ok(Settled::Overtaken(refused)) => return Err(refused),
                        // With the revisions of before it can never be applied any more.
                        Ok(Settled::Renewed) => {
                            unclear = false;
                            for check in proposal.fence_checks() {
                                if let Some(old) = writes.iter_mut().find(|w| w.key == check.key) {
                                    *old = check;
                                }
                            }
                            // The holder's own renewal is no failure: the same again, at once.
                            if !deadline.is_over() {
                                continue;
                            }
                            overtaken_by_nobody(proposal.groups)
                        }
                        // What stands in the way cannot be seen yet. It may be our own commit, so this
                        // is no conflict: the same is sent again until it is seen.
                        Ok(Settled::AsPlanned) => {
                            unclear = true;
                            overtaken_by_nobody(proposal.groups)
                        }
                        // It was refused, and never sent without an answer: what is gone was another's.
                        Ok(Settled::Trimmed(refused)) if !unclear => return Err(refused),
                        Ok(Settled::Trimmed(_)) => {
                            let reason = overtaken_by_nobody(proposal.groups);
                            return Err(outcome_unknown(proposal.groups, reason).into());
                        }
                        // A commit can be delivered twice: the refusal may be of our own second one.
                        Err(error) if unclear || error.is_transient() => {
                            return Err(outcome_unknown(proposal.groups, error).into());
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
                    let error = lift(error, &self.location);
                    return Err(outcome_unknown(proposal.groups, error).into());
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
            return match self.settle(proposal, &writes, deadline.for_a_last_look()).await {
                Ok(Settled::Applied(heads)) => Ok(Applied::Settled(heads)),
                Ok(Settled::Overtaken(refused)) => Err(refused),
                Ok(Settled::Renewed) => Err(source.into()),
                Ok(Settled::AsPlanned | Settled::Trimmed(_)) | Err(_) => {
                    Err(outcome_unknown(proposal.groups, source).into())
                }
            };
        }
    }

    /// Finds out what became of a commit, by looking for its events and its answer. One read for all.
    async fn settle(
        &self,
        proposal: Proposal<'_>,
        sent: &[Write],
        deadline: Deadline,
    ) -> Result<Settled> {
        let Proposal { groups, guards, beside } = proposal;
        let firsts: Vec<(&Change, Option<Revision>)> = groups
            .iter()
            .filter_map(|group| {
                Some((group.first()?, group.base.as_ref().map(|known| known.revision)))
            })
            .collect();
        // What only guards comes first: where a read of several documents may be torn, a guard must not
        // be newer than what says that our own commit is not there. And the head before its event: see
        // `backend::Read::get`.
        let mut keys: Vec<Key> = guards.iter().map(|guard| guard.address.head()).collect();
        keys.extend(beside.fences.iter().map(|token| token.key.clone()));
        for (change, _) in &firsts {
            keys.extend([change.address.head(), change.address.event(change.version)]);
        }
        keys.extend(beside.command.iter().map(|command| command.key.clone()));
        let mut found = self.reader_within(deadline.left()).get(&keys).await?.into_iter();
        let mut next = || found.next().flatten();
        let (mut conflict, mut heads) = (None, Vec::new());
        let (mut ours, mut trimmed, mut renewed) = (false, false, false);
        for guard in guards {
            let head = next().map(|document| known(&guard.address, &document)).transpose()?;
            let seen = guard.seen.as_ref();
            if head.as_ref().map(|known| known.revision) != seen.map(|known| known.revision) {
                let version = |known: Option<&KnownHead>| known.map_or(0, |k| k.head.version());
                let (expected, actual) = (version(seen), version(head.as_ref()));
                conflict.get_or_insert_with(|| version_conflict(&guard.address, expected, actual));
            }
        }
        for token in &beside.fences {
            match stands(next().as_ref(), &token.key, token.fencing_token) {
                Ok(revision) => {
                    // Others see the renewals of the same grant too: what counts is what was sent.
                    let now = Precondition::Revision(revision);
                    let check = sent.iter().find(|write| write.key == token.key);
                    renewed |= check.is_some_and(|check| check.precondition != now);
                    token.see(revision);
                }
                // What is decided under a lost lock counts for nothing, whatever else is true.
                Err(error) => conflict = Some(error),
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
        if let (Some(ask), Some(document)) = (&beside.command, next()) {
            let there = schema::read_command(&document)?;
            if there.id == ask.command.id {
                ours = true;
            } else {
                // Somebody was faster with the same key. Who tries again finds the answer.
                conflict.get_or_insert_with(|| answered_meanwhile(&ask.key));
            }
        }
        if ours {
            return Ok(Settled::Applied(heads));
        }
        if trimmed {
            let error = conflict.unwrap_or_else(|| overtaken_by_nobody(groups));
            return Ok(Settled::Trimmed(Refused { heads, ..Refused::from(error) }));
        }
        Ok(match conflict {
            Some(error) => Settled::Overtaken(Refused { heads, ..Refused::from(error) }),
            None if renewed => Settled::Renewed,
            None => Settled::AsPlanned,
        })
    }

    /// Makes sure that each of the grants was seen to stand, so that a commit can check it.
    pub(crate) async fn see_fences(
        &self,
        proposal: Proposal<'_>,
        deadline: Deadline,
    ) -> Result<()> {
        let mut unseen = Vec::new();
        let fences = &proposal.beside.fences;
        for token in fences {
            // Of two grants of one resource the older is over, or the newer was never made.
            let other = fences
                .iter()
                .find(|other| other.key == token.key && other.fencing_token != token.fencing_token);
            if let Some(other) = other {
                return Err(Error::LockLost {
                    resource: token.key.name.id(),
                    fencing_token: token.fencing_token.min(other.fencing_token),
                    reason: "another grant of the same lock is asked for too".into(),
                });
            }
            if token.store.as_ref().is_some_and(|store| *store != self.identity().store) {
                let subject = format!("a write fenced by the lock {}", token.key.name.id());
                return Err(Error::refused(subject, "that is a lock of another store"));
            }
            if token.seen().is_none() {
                unseen.push(token);
            }
        }
        self.look_at_fences(unseen, deadline).await
    }

    /// Looks whether each of the grants stands, and at which revision.
    pub(crate) async fn look_at_fences(
        &self,
        fences: impl IntoIterator<Item = &Arc<Token>>,
        deadline: Deadline,
    ) -> Result<()> {
        let fences: Vec<&Arc<Token>> = fences.into_iter().collect();
        if fences.is_empty() {
            return Ok(());
        }
        let keys: Vec<Key> = fences.iter().map(|token| token.key.clone()).collect();
        let found = self.reader_within(deadline.left()).get(&keys).await?;
        for (token, document) in fences.into_iter().zip(&found) {
            token.see(stands(document.as_ref(), &token.key, token.fencing_token)?);
        }
        Ok(())
    }
}

/// The revision at which a grant stands.
fn stands(document: Option<&Document>, key: &Key, fencing_token: u64) -> Result<Revision> {
    let lease = document.map(schema::read_lease).transpose()?;
    Lease::check(lease.as_ref(), &key.name.id(), fencing_token)?;
    // Without a document the check has failed.
    Ok(document.map_or(Revision::new(0), |document| document.revision))
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
    /// Nothing has changed but a lease that was renewed; it can be sent with that.
    Renewed,
    /// Nothing has changed; it may still be on its way.
    AsPlanned,
    /// What would tell was cleaned up. What is planned on has changed all the same.
    Trimmed(Refused),
}

/// Why a commit was not applied, and the newest heads of its groups as far as they were seen.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) error: Error,
    pub(crate) heads: Vec<Option<KnownHead>>,
    /// It was not sent, because what it was planned on will not be; that says nothing about it.
    pub(crate) stale: bool,
    /// It shared its commit with others, and must not do so again.
    pub(crate) alone: bool,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, heads: Vec::new(), stale: false, alone: false }
    }
}

/// The conflict of those who were faster with the same idempotency key.
fn answered_meanwhile(key: &Key) -> Error {
    Error::VersionConflict {
        governor: key.governor.id(),
        state: format!("{} (idempotency key)", key.name.id()),
        expected: 0,
        actual: 1,
    }
}

fn overtaken_by_nobody(groups: &[Steps]) -> Error {
    match groups.first().and_then(Steps::first) {
        Some(change) => version_conflict(&change.address, change.version - 1, change.version - 1),
        None => Error::Firestore {
            message: "the commit was refused, and nothing is seen that stands in its way".into(),
            source: None,
        },
    }
}

fn outcome_unknown(groups: &[Steps], source: Error) -> Error {
    match groups.first().and_then(Steps::first) {
        Some(change) => Identity::of(change).unknown(source),
        // It changes no state.
        None => source,
    }
}

/// Which change it is, for whoever has to look for it.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) address: Address,
    pub(crate) version: u64,
    id: String,
}

impl Identity {
    pub(crate) fn of(change: &Change) -> Self {
        let (address, version, id) = (change.address.clone(), change.version, change.id.clone());
        Self { address, version, id }
    }

    /// That it is not known what became of it.
    pub(crate) fn unknown(&self, source: Error) -> Error {
        Error::OutcomeUnknown {
            governor: self.address.governor.id(),
            state: self.address.state.id(),
            version: self.version,
            event_id: self.id.clone(),
            source: Some(Box::new(source)),
        }
    }
}
