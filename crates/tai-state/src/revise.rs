//! Commits what is decided about a state's past: a head with other notes, and the documents that come
//! and go with it. No version is made, so there is no event to settle by: what became of a commit whose
//! answer was lost, the head says.

use std::sync::Arc;

use crate::backend::{BackendError, Document, Precondition, Revision, Write};
use crate::conditions::Conditions;
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::patience::{Deadline, Tries};
use crate::proposal::{Beside, Proposal};
use crate::reader::lift;
use crate::records::{KnownHead, Records};
use crate::schema;
use crate::store::not_found;
use crate::transition::Head;
use crate::trim::Trim;

/// The waits between two tries grow up to here, whatever the policy's cap.
const MANY: u32 = 3;

/// What became of sending one.
enum Sent {
    Done(Option<Revision>),
    /// Somebody was faster, or a renewal of a lease came in between.
    Refused,
    /// Not applied as far as is known; whether it may have been, and whether to wait.
    Failed {
        error: Error,
        unclear: bool,
        asked_to_wait: bool,
    },
}

impl Records {
    /// Decides on the newest head and commits that, until it holds. `None` when there is nothing to do.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] without a head; [`Error::LockLost`]; what the backend says.
    pub(crate) async fn revise(
        self: &Arc<Self>,
        address: &Address,
        conditions: &Conditions,
        decide: impl Fn(&Head) -> Option<Trim>,
    ) -> Result<Option<Trim>> {
        let deadline = self.deadline();
        let mut tries = Tries::new(&self.options.retry, deadline);
        let line = self.lines.join(address);
        let (mut lost, mut races) = (None::<Trim>, 0);
        loop {
            // The writers here wait meanwhile: on a hot state they would be faster every time.
            let turn = line.turn().await;
            if let Some(mut pending) = line.end() {
                pending.is_durable(deadline).await;
            }
            let known = self.head_by(address, deadline).await?;
            let known = known.ok_or_else(|| not_found(address, String::new()))?;
            if let Some(trim) = lost.take_if(|trim| trim.head == *known.head) {
                return Ok(Some(trim));
            }
            let Some(trim) = decide(&known.head) else { return Ok(None) };
            let sent = self.send_trim(address, conditions, &trim, known.revision, deadline).await?;
            drop(turn);
            let (error, asked_to_wait) = match sent {
                Sent::Done(revision) => {
                    let newest = revision
                        .map(|revision| KnownHead { head: Arc::new(trim.head.clone()), revision });
                    self.remember(address, newest.as_ref());
                    return Ok(Some(trim));
                }
                Sent::Refused => {
                    if deadline.is_over() {
                        let operation = format!("tidying up {address}");
                        return Err(Error::Timeout { operation, after: deadline.limit() });
                    }
                    races += 1;
                    // Against one that never pauses chance decides each try, so there have to be many.
                    let wait = self.options.retry.backoff(races.min(MANY));
                    tokio::time::sleep(wait.min(deadline.left())).await;
                    continue;
                }
                Sent::Failed { error, unclear, asked_to_wait } => {
                    if unclear {
                        lost = Some(trim);
                    }
                    (error, asked_to_wait)
                }
            };
            tracing::warn!(%address, reason = %error, "a commit was not answered");
            if !tries.again(asked_to_wait).await {
                return Err(error);
            }
        }
    }

    async fn send_trim(
        &self,
        address: &Address,
        conditions: &Conditions,
        trim: &Trim,
        revision: Revision,
        deadline: Deadline,
    ) -> Result<Sent> {
        let mut writes = Vec::new();
        if let Some(change) = &trim.save {
            let body = schema::snapshot_body(change, trim.head.first_version)?;
            writes.push(Write::put(address.snapshot(change.version), body, Precondition::Any));
        }
        let snapshots = trim.drop_snapshots.iter().map(|version| address.snapshot(*version));
        let events = trim.drop_events.iter().map(|version| address.event(*version));
        writes.extend(snapshots.chain(events).map(|key| Write::delete(key, Precondition::Any)));
        let guard = Precondition::Revision(revision);
        let head = Write::put(address.head(), schema::head_body(&trim.head)?, guard);
        self.send_guarded(writes, Some(head), conditions, deadline).await
    }

    /// Removes these documents if each is still the one that was read, under the conditions, whatever
    /// becomes of the head meanwhile. `false` when one of them is not, and nothing was removed as far as is
    /// known.
    ///
    /// # Errors
    /// [`Error::LockLost`]; what the backend says.
    pub(crate) async fn remove(
        &self,
        address: &Address,
        conditions: &Conditions,
        documents: &[Document],
    ) -> Result<bool> {
        if documents.is_empty() {
            return Ok(true);
        }
        let deadline = self.deadline();
        let mut tries = Tries::new(&self.options.retry, deadline);
        let (mut races, mut lost) = (0, false);
        let gone = |found: &Document| {
            Write::delete(found.key.clone(), Precondition::Revision(found.revision))
        };
        let keys: Vec<_> = documents.iter().map(|found| found.key.clone()).collect();
        loop {
            let writes = documents.iter().map(gone).collect();
            let (error, asked_to_wait) =
                match self.send_guarded(writes, None, conditions, deadline).await? {
                    Sent::Done(_) => return Ok(true),
                    Sent::Refused => {
                        // By a renewal of a lease, as long as all of them are there.
                        let found = self.reader_within(deadline.left()).get(&keys).await?;
                        let stands = |(found, read): (&Option<Document>, &Document)| {
                            found.as_ref().is_some_and(|found| found.revision == read.revision)
                        };
                        let standing = found.iter().zip(documents).filter(|it| stands(*it)).count();
                        if standing < documents.len() {
                            // They go together: what was sent before without an answer did it.
                            return Ok(lost && standing == 0);
                        }
                        if deadline.is_over() {
                            let operation = format!("tidying up {address}");
                            return Err(Error::Timeout { operation, after: deadline.limit() });
                        }
                        races += 1;
                        let wait = self.options.retry.backoff(races);
                        tokio::time::sleep(wait.min(deadline.left())).await;
                        continue;
                    }
                    Sent::Failed { error, unclear, asked_to_wait } => {
                        lost |= unclear;
                        (error, asked_to_wait)
                    }
                };
            tracing::warn!(%address, reason = %error, "a commit was not answered");
            if !tries.again(asked_to_wait).await {
                return Err(error);
            }
        }
    }

    /// Puts a head that was made anew from its log, if still nothing else stands there than what was
    /// found. `false` when it does.
    pub(crate) async fn restore(
        &self,
        address: &Address,
        conditions: &Conditions,
        repair: &Repair,
        deadline: Deadline,
    ) -> Result<bool> {
        let mut writes = Vec::new();
        for change in &repair.save {
            let body = schema::snapshot_body(change, repair.head.first_version)?;
            writes.push(Write::put(address.snapshot(change.version), body, Precondition::Any));
        }
        let dropped = repair.drop_snapshots.iter().map(|version| address.snapshot(*version));
        writes.extend(dropped.map(|key| Write::delete(key, Precondition::Any)));
        let guard = repair.found.map_or(Precondition::Absent, Precondition::Revision);
        let head = Write::put(address.head(), schema::head_body(&repair.head)?, guard);
        let mut tries = Tries::new(&self.options.retry, deadline);
        loop {
            let sent =
                self.send_guarded(writes.clone(), Some(head.clone()), conditions, deadline).await?;
            match sent {
                Sent::Done(revision) => {
                    let head = Arc::new(repair.head.clone());
                    let newest = revision.map(|revision| KnownHead { head, revision });
                    self.remember(address, newest.as_ref());
                    return Ok(true);
                }
                // By what was sent before without an answer, or by another who put the same there.
                Sent::Refused => {
                    let there = match self.head_by(address, deadline).await {
                        Err(Error::Corrupt { .. }) => None,
                        there => there?,
                    };
                    return Ok(there.is_some_and(|there| {
                        *there.head == repair.head && Some(there.revision) != repair.found
                    }));
                }
                Sent::Failed { error, asked_to_wait, .. } => {
                    if !tries.again(asked_to_wait).await {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Sends the writes with the checks of the handle's grants, and the head, if there is one, last.
    async fn send_guarded(
        &self,
        mut writes: Vec<Write>,
        head: Option<Write>,
        conditions: &Conditions,
        deadline: Deadline,
    ) -> Result<Sent> {
        let beside = Beside { fences: conditions.fences.clone(), command: None };
        let proposal = Proposal { groups: &[], guards: &[], beside: &beside };
        self.see_fences(proposal, deadline).await?;
        writes.extend(proposal.fence_checks());
        writes.extend(head);
        let sent = tokio::time::timeout(deadline.left(), self.backend.commit(writes)).await;
        let error = match sent {
            Ok(Ok(committed)) => {
                return Ok(Sent::Done(committed.revisions.last().copied().flatten()));
            }
            Ok(Err(error)) => error,
            Err(_) => BackendError::Indeterminate("no answer before the deadline".into()),
        };
        if matches!(error, BackendError::Conflict) {
            // A renewal of a lease moves its revision: look again before the next try.
            self.look_at_fences(&beside.fences, deadline).await?;
            return Ok(Sent::Refused);
        }
        let unclear = matches!(error, BackendError::Indeterminate(_));
        let asked_to_wait = matches!(error, BackendError::Throttled(_));
        let may_help = unclear || asked_to_wait || matches!(error, BackendError::Unavailable(_));
        let error = lift(error, &self.location);
        if may_help { Ok(Sent::Failed { error, unclear, asked_to_wait }) } else { Err(error) }
    }
}

/// A head made anew, and what is put right with it.
#[derive(Debug, Clone)]
pub(crate) struct Repair {
    /// What stands in the head's place; nothing for `None`.
    pub(crate) found: Option<Revision>,
    pub(crate) head: Head,
    /// Saved snapshots that are made anew.
    pub(crate) save: Vec<crate::chain::Change>,
    /// Saved snapshots that no head names any more.
    pub(crate) drop_snapshots: Vec<u64>,
}
