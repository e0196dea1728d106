//! The one way a change is made: planned on the newest head that is known, committed, and planned again
//! when somebody was faster.
//!
//! What is lost to somebody faster is tried again here and nowhere below. Who else may call the port:
//! ARCHITECTURE.md, rule 2.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::backend::{
    Backend, BackendError, Identity, Key, Kind, Name, Precondition, Revision, Write,
};
use crate::chain::Change;
use crate::command::Asked;
use crate::conditions::Conditions;
use crate::config::{PersistenceConfig, StoreOptions};
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::leases::Locks;
use crate::lines::{Base, Lines, NewEntry};
use crate::patience::{self, Deadline, Tries};
use crate::proposal::{Guard, Proposal};
use crate::reader::lift;
pub(crate) use crate::reader::{KnownHead, Reader, View, Watch};
use crate::remembered::Remembered;
use crate::settle::{Applied, Refused};
use crate::transition::{self, Head, Request, Transition};

/// After so many refusals on an unchanged head the head is not behind, it is wrong.
const STUCK_AFTER: u32 = 12;

/// One store: a backend, its settings, and the heads that this handle remembers.
pub(crate) struct Records {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) location: String,
    pub(crate) node: String,
    pub(crate) options: StoreOptions,
    pub(crate) remembered: Mutex<Remembered>,
    pub(crate) lines: Arc<Lines>,
    pub(crate) locks: Locks,
}

/// Without what the states say, and without the secrets of locks.
impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (location, node) = (&self.location, &self.node);
        f.debug_struct("Records")
            .field("location", location)
            .field("node", node)
            .finish_non_exhaustive()
    }
}

impl Records {
    pub(crate) fn new(backend: Arc<dyn Backend>, options: StoreOptions) -> Self {
        let node = options.node.clone().unwrap_or_else(|| backend.identity().node);
        let location = backend.location();
        let remembered = Mutex::new(Remembered::new(options.cache_bytes));
        let (lines, locks) = (Arc::default(), Locks::default());
        Self { backend, location, node, options, remembered, lines, locks }
    }

    pub(crate) fn identity(&self) -> Identity {
        self.backend.identity()
    }

    /// Whether it pays to look before a commit, and to look often.
    pub(crate) fn limits(&self) -> crate::backend::Limits {
        self.backend.limits()
    }

    pub(crate) fn reads_are_cheap(&self) -> bool {
        self.backend.limits().reads_are_cheap
    }

    /// What the engine finds when it looks through its own structure.
    pub(crate) async fn check_structure(&self) -> Result<Vec<String>> {
        self.backend.check_structure().await.map_err(|error| lift(error, &self.location))
    }

    pub(crate) fn location(&self) -> &str {
        &self.location
    }

    pub(crate) fn options(&self) -> &StoreOptions {
        &self.options
    }

    pub(crate) fn reader(&self) -> Reader<'_> {
        self.reader_within(self.options.retry.deadline)
    }

    pub(crate) fn reader_within(&self, limit: Duration) -> Reader<'_> {
        let (read, retry) = (self.backend.as_ref(), &self.options.retry);
        Reader { read, location: &self.location, retry, limit }
    }

    /// By when a call that begins now has returned.
    pub(crate) fn deadline(&self) -> Deadline {
        Deadline::after(self.options.retry.deadline)
    }

    /// A reader whose answers all come from one cut.
    pub(crate) async fn view(&self, deadline: Deadline) -> Result<View> {
        let read = self.backend.view().await.map_err(|error| lift(error, &self.location))?;
        let (location, retry) = (self.location.clone(), self.options.retry.clone());
        Ok(View { read, location, retry, deadline })
    }

    /// Reads several heads of one moment.
    pub(crate) async fn heads_at_once(
        &self,
        addresses: &[Address],
    ) -> Result<Vec<Option<KnownHead>>> {
        let deadline = self.deadline();
        let mut tries = Tries::new(&self.options.retry, deadline);
        loop {
            let heads = self.reader_within(deadline.left()).heads(addresses).await?;
            let guards: Vec<Guard> = addresses
                .iter()
                .zip(&heads)
                .map(|(address, seen)| Guard { address: address.clone(), seen: seen.clone() })
                .collect();
            match self.confirm(&guards, deadline).await {
                // Nothing was expected, so nothing conflicts: somebody else got on meanwhile.
                Err(Error::VersionConflict { .. }) => {
                    if !tries.after_race().await {
                        let operation = "reading several states at once".to_owned();
                        return Err(Error::Timeout { operation, after: deadline.limit() });
                    }
                }
                Err(error) => return Err(error),
                Ok(()) => return Ok(heads),
            }
        }
    }

    /// Makes sure that what was read was all there at one moment, where reading alone does not say so.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] when something has changed.
    pub(crate) async fn confirm(&self, guards: &[Guard], deadline: Deadline) -> Result<()> {
        let limits = self.backend.limits();
        if guards.len() > limits.commit_writes {
            return Err(Error::TooLarge {
                what: "the number of states read at once".into(),
                size: guards.len() as u64,
                limit: limits.commit_writes as u64,
            });
        }
        if guards.len() < 2 || limits.cuts_are_exact {
            return Ok(());
        }
        let checks: BTreeMap<Key, Precondition> = guards.iter().map(Guard::condition).collect();
        let checks: Vec<Write> =
            checks.into_iter().map(|(key, holds)| Write::check(key, holds)).collect();
        let checked = || self.backend.commit(checks.clone());
        match patience::read(&self.options.retry, deadline, checked).await {
            Some(Ok(_)) => Ok(()),
            Some(Err(BackendError::Conflict)) => match guards.first() {
                Some(guard) => {
                    let version = guard.seen.as_ref().map_or(0, |known| known.head.version());
                    Err(version_conflict(&guard.address, version, version))
                }
                None => Ok(()),
            },
            Some(Err(error)) => Err(lift(error, &self.location)),
            None => {
                let operation = "reading several states at once".to_owned();
                Err(Error::Timeout { operation, after: deadline.limit() })
            }
        }
    }

    /// An alarm for the states of a governor, or for one of them.
    pub(crate) async fn watch(&self, governor: &Name, state: Option<&Name>) -> Result<Watch> {
        let (location, deadline) = (self.location.clone(), self.deadline());
        let watch = || self.backend.watch(governor, Kind::States, state);
        match patience::read(&self.options.retry, deadline, watch).await {
            Some(Ok(alarm)) => Ok(Watch { alarm, location }),
            Some(Err(error)) => Err(lift(error, &location)),
            None => {
                let operation = format!("watching {location}");
                Err(Error::Timeout { operation, after: deadline.limit() })
            }
        }
    }

    /// Reads a head and remembers it for the next change.
    pub(crate) async fn head(&self, address: &Address) -> Result<Option<KnownHead>> {
        self.head_by(address, self.deadline()).await
    }

    /// As [`head`](Records::head), by a deadline.
    pub(crate) async fn head_by(
        &self,
        address: &Address,
        by: Deadline,
    ) -> Result<Option<KnownHead>> {
        let found = self.reader_within(by.left()).head(address).await?;
        self.remember(address, found.as_ref());
        Ok(found)
    }

    pub(crate) fn remember(&self, address: &Address, head: Option<&KnownHead>) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        match head {
            Some(head) => remembered.put(address, head),
            None => remembered.forget(address),
        }
    }

    fn recall(&self, address: &Address) -> Option<KnownHead> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.get(address)
    }

    /// The bytes of all remembered heads.
    pub(crate) fn cache_bytes(&self) -> usize {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }

    /// Decides one change on a head that is in hand.
    pub(crate) fn plan(
        &self,
        head: Option<&Head>,
        request: &Request,
        policy: &PersistenceConfig,
    ) -> Result<Transition> {
        self.plan_at(self.options.clock.now(), head, request, policy)
    }

    /// As [`plan`](Records::plan), at a time that was taken before.
    pub(crate) fn plan_at(
        &self,
        now: DateTime<Utc>,
        head: Option<&Head>,
        request: &Request,
        policy: &PersistenceConfig,
    ) -> Result<Transition> {
        transition::plan(head, request, now, &self.node, policy)
    }

    /// As [`plan`](Records::plan), for a change that was counted elsewhere.
    pub(crate) fn adopt(
        &self,
        head: Option<&Head>,
        request: &Request,
        policy: &PersistenceConfig,
    ) -> Result<Transition> {
        transition::adopt(head, request, self.options.clock.now(), &self.node, policy)
    }

    /// Carries out one request: stands in line with the other writers of the state here, plans it on
    /// the newest head that is known, sends it off, and plans again when the head was not the newest.
    /// Returns the change and the one before it; with an idempotency key that was answered before, the
    /// ones of that answer.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] when the expectation does not hold on a head that was just read;
    /// what [`plan`](transition::plan) refuses; [`Error::OutcomeUnknown`] when the answer was lost
    /// and could not be settled; [`Error::LockLost`].
    pub(crate) async fn apply(
        self: &Arc<Self>,
        request: &Request,
        policy: &PersistenceConfig,
        conditions: &Conditions,
    ) -> Result<(Change, Option<Arc<Head>>)> {
        let asked = conditions.key.as_ref().map(|key| Asked::new(key, request));
        let deadline = self.deadline();
        if let Some(asked) = asked.as_ref().filter(|_| self.reads_are_cheap())
            && let Some(answer) = self.answer_to(asked, deadline).await?
        {
            return Ok(answer);
        }
        let applied = self.apply_anew(request, policy, conditions, asked.as_ref(), deadline).await;
        match (applied, asked) {
            // What stands in the way may be the answer to the same command. What is not known stays so.
            (Err(error), Some(asked)) if !matches!(error, Error::OutcomeUnknown { .. }) => {
                match self.answer_to(&asked, deadline.with_a_last_look()).await {
                    Err(other) if other.is_permanent() => Err(other),
                    answer => answer.ok().flatten().ok_or(error),
                }
            }
            (applied, _) => applied,
        }
    }

    async fn apply_anew(
        self: &Arc<Self>,
        request: &Request,
        policy: &PersistenceConfig,
        conditions: &Conditions,
        asked: Option<&Asked>,
        deadline: Deadline,
    ) -> Result<(Change, Option<Arc<Head>>)> {
        let address = &request.address;
        let guess_absent = request.expect == transition::Expect::Any
            && matches!(request.wish, transition::Wish::Put(_))
            && !self.reads_are_cheap();
        let line = self.lines.join(address);
        let mut turn = line.turn().await;
        let mut is_fresh = false;
        let mut base = match line.end() {
            Some(pending) => Base::Pending(pending),
            None => Base::Known(self.recall(address)),
        };
        if base.head().is_none() && !guess_absent {
            base = Base::Known(self.head_by(address, deadline).await?);
            is_fresh = true;
        }
        let mut race = Race::default();
        let mut stale = 0;
        let mut alone = !conditions.is_empty();
        loop {
            let before = base.head();
            match self.plan(before.as_deref(), request, policy) {
                // What was remembered may be old, and what is under way may fail; only a fresh head
                // proves a conflict.
                Err(Error::VersionConflict { .. } | Error::StateNotFound { .. }) if !is_fresh => {
                    if let Base::Pending(pending) = &mut base {
                        pending.is_durable(deadline).await;
                    }
                    if deadline.is_over() {
                        return Err(late(address, deadline));
                    }
                }
                Err(error) => return Err(error),
                Ok(transition) => {
                    let change = transition.head.change.clone();
                    let planned_on = base.revision();
                    let beside = self.beside(conditions, asked, &change)?;
                    let entry = NewEntry { steps: vec![transition], beside, alone, deadline };
                    let receipt = self.submit(&line, base, entry);
                    // Whoever is next can plan on it while it is under way.
                    drop(turn.take());
                    let refused = match receipt.settled().await {
                        Ok(()) => return Ok((change, before)),
                        Err(refused) => refused,
                    };
                    alone |= refused.alone;
                    match refused.error {
                        _ if refused.stale => {
                            if deadline.is_over() {
                                return Err(late(address, deadline));
                            }
                            stale += 1;
                        }
                        // The commit was refused although the plan held: somebody was faster.
                        // Whether that matters, the next plan on the newer head says.
                        error @ Error::VersionConflict { .. } => {
                            // The answer under the same key may be what was faster.
                            if let Some(asked) = asked
                                && let Some(answer) = self.answer_to(asked, deadline).await?
                            {
                                return Ok(answer);
                            }
                            race.lost(planned_on);
                            if is_fresh && race.is_stuck() {
                                return Err(Error::corrupt(
                                    format!("the log of {address}"),
                                    format!("it holds an event beyond the head: {error}"),
                                ));
                            }
                            if deadline.is_over() {
                                return Err(error);
                            }
                            let (races, failed) = (race.races, race.failed);
                            tracing::debug!(%address, races, failed, "lost a race, planning again");
                            metrics::counter!("tai_state_conflicts_total").increment(1);
                            // One file orders its writers by itself; over a network those who lose
                            // together would meet again.
                            let waits = if self.reads_are_cheap() { failed } else { races };
                            if waits > 1 {
                                let wait = self.options.retry.backoff(waits - 1);
                                tokio::time::sleep(wait.min(deadline.left())).await;
                            } else if let Some(newest) = refused.heads.into_iter().next()
                                && line.end().is_none()
                            {
                                // Seen just now, while looking for what became of the commit.
                                base = Base::Known(newest);
                                is_fresh = true;
                                continue;
                            }
                        }
                        error => return Err(error),
                    }
                    turn = line.turn().await;
                }
            }
            match line.end() {
                // Whoever has planned twice on what then failed waits for something that holds.
                Some(mut pending) if stale >= 2 => {
                    pending.is_durable(deadline).await;
                    base = Base::Known(self.head_by(address, deadline).await?);
                    is_fresh = true;
                }
                Some(pending) => {
                    base = Base::Pending(pending);
                    is_fresh = false;
                }
                None => {
                    base = Base::Known(self.head_by(address, deadline).await?);
                    is_fresh = true;
                }
            }
        }
    }

    /// Commits the changes of one or more states at once, under all the conditions. Settles what is
    /// unclear.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] naming a state that is not as it was planned on; nothing was
    /// written then.
    pub(crate) async fn commit(&self, proposal: Proposal<'_>, deadline: Deadline) -> Result<()> {
        let committed = self.try_commit(proposal, deadline).await;
        committed.map(drop).map_err(|refused| refused.error)
    }

    /// As [`commit`](Records::commit); returns the newest heads of the groups as far as they are known.
    pub(crate) async fn try_commit(
        &self,
        proposal: Proposal<'_>,
        deadline: Deadline,
    ) -> Result<Vec<Option<KnownHead>>, Refused> {
        self.see_fences(proposal, deadline).await?;
        let groups = proposal.groups;
        let writes = proposal.writes(&self.backend.limits())?;
        let first_head = writes.len().saturating_sub(groups.len());
        let sent = self.send(proposal, writes, deadline).await;
        let mut newest_heads = Vec::with_capacity(groups.len());
        for (index, group) in groups.iter().enumerate() {
            let Some(newest) = group.transitions.last() else { continue };
            let known = match &sent {
                Ok(Applied::Answered(revisions)) => {
                    let revision = revisions.get(first_head + index).copied().flatten();
                    revision
                        .map(|revision| KnownHead { head: Arc::new(newest.head.clone()), revision })
                }
                Ok(Applied::Settled(heads)) | Err(Refused { heads, .. }) => {
                    heads.get(index).cloned().flatten()
                }
            };
            self.remember(&newest.head.change.address, known.as_ref());
            newest_heads.push(known);
        }
        sent.map(|_| newest_heads)
    }
}

fn late(address: &Address, deadline: Deadline) -> Error {
    Error::Timeout { operation: format!("changing {address}"), after: deadline.limit() }
}

/// How often a change has lost against others.
#[derive(Debug, Default)]
pub(crate) struct Race {
    pub(crate) races: u32,
    /// On one and the same head: then nobody is faster, the log runs ahead of the head.
    pub(crate) failed: u32,
    lost_on: Option<Option<Revision>>,
}

impl Race {
    pub(crate) fn lost(&mut self, on: Option<Revision>) {
        self.races += 1;
        self.failed = if self.lost_on == Some(on) { self.failed + 1 } else { 1 };
        self.lost_on = Some(on);
    }

    /// Whether a head that is read anew each time is not behind but wrong.
    pub(crate) fn is_stuck(&self) -> bool {
        self.failed >= STUCK_AFTER
    }
}

pub(crate) fn version_conflict(address: &Address, expected: u64, actual: u64) -> Error {
    Error::VersionConflict {
        governor: address.governor.id(),
        state: address.state.id(),
        expected,
        actual,
    }
}

#[cfg(test)]
mod edges;
