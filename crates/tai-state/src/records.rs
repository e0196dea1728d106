//! The one way a change is made: planned on the newest head that is known, committed, and planned again
//! when somebody was faster.
//!
//! This file, `reader.rs` and `settle.rs` are the only callers of the port. Retries happen here and
//! nowhere below.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::backend::{Backend, BackendError, Identity, Key, Kind, Name, Precondition, Write};
use crate::chain::Change;
use crate::config::{PersistenceConfig, StoreOptions};
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::patience::{self, Deadline, Tries};
use crate::reader::lift;
pub(crate) use crate::reader::{KnownHead, Reader, View, Watch};
use crate::remembered::Remembered;
use crate::schema;
use crate::settle::{Applied, Refused};
use crate::transition::{self, Head, Request, Transition};

/// The changes of one state within a commit, and what they were planned on.
#[derive(Debug)]
pub(crate) struct Steps {
    pub(crate) base: Option<KnownHead>,
    pub(crate) transitions: Vec<Transition>,
}

/// A state that was read and not written; the commit holds only if it stays as it was.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    pub(crate) address: Address,
    pub(crate) seen: Option<KnownHead>,
}

impl Guard {
    fn condition(&self) -> (Key, Precondition) {
        let holds = match &self.seen {
            Some(known) => Precondition::Revision(known.revision),
            None => Precondition::Absent,
        };
        (self.address.head(), holds)
    }
}

/// After so many refusals on an unchanged head the head is not behind, it is wrong.
const STUCK_AFTER: u32 = 12;

/// One store: a backend, its settings, and the heads that this handle remembers.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) location: String,
    pub(crate) node: String,
    pub(crate) options: StoreOptions,
    pub(crate) remembered: Mutex<Remembered>,
}

impl Records {
    pub(crate) fn new(backend: Arc<dyn Backend>, options: StoreOptions) -> Self {
        let node = options.node.clone().unwrap_or_else(|| backend.identity().node);
        let location = backend.location();
        let remembered = Mutex::new(Remembered::new(options.cache_bytes));
        Self { backend, location, node, options, remembered }
    }

    pub(crate) fn identity(&self) -> Identity {
        self.backend.identity()
    }

    /// Whether it pays to look before a commit, and to look often.
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
                Err(error @ Error::VersionConflict { .. }) => {
                    if !tries.again(false).await {
                        return Err(error);
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

    async fn head_by(&self, address: &Address, by: Deadline) -> Result<Option<KnownHead>> {
        let found = self.reader_within(by.left()).head(address).await?;
        self.remember(address, found.as_ref());
        Ok(found)
    }

    fn remember(&self, address: &Address, head: Option<&KnownHead>) {
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
        transition::plan(head, request, self.options.clock.now(), &self.node, policy)
    }

    /// Carries out one request: plans it on the newest head that is known, commits it, and plans
    /// again when the head was not the newest. Returns the change and the one before it.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] when the expectation does not hold on a head that was just read;
    /// what [`plan`](transition::plan) refuses; [`Error::OutcomeUnknown`] when the answer was lost
    /// and could not be settled.
    pub(crate) async fn apply(
        &self,
        request: &Request,
        policy: &PersistenceConfig,
    ) -> Result<(Change, Option<Arc<Head>>)> {
        let address = &request.address;
        let deadline = self.deadline();
        let guess_absent = request.expect == transition::Expect::Any
            && matches!(request.wish, transition::Wish::Put(_))
            && !self.reads_are_cheap();
        let mut base = self.recall(address);
        let mut is_fresh = false;
        if base.is_none() && !guess_absent {
            base = self.head_by(address, deadline).await?;
            is_fresh = true;
        }
        let (mut races, mut failed) = (0u32, 0u32);
        let mut lost_on = None;
        loop {
            let before = base.as_ref().map(|known| Arc::clone(&known.head));
            match self.plan(before.as_deref(), request, policy) {
                // What was remembered may be old; only a fresh head proves a conflict.
                Err(Error::VersionConflict { .. } | Error::StateNotFound { .. }) if !is_fresh => {}
                Err(error) => return Err(error),
                Ok(transition) => {
                    let change = transition.head.change.clone();
                    let planned_on = base.as_ref().map(|known| known.revision);
                    let steps = Steps { base: base.take(), transitions: vec![transition] };
                    let refused = match self.try_commit(&[steps], &[], deadline).await {
                        Ok(()) => return Ok((change, before)),
                        Err(refused) => refused,
                    };
                    let mut seen = refused.heads.into_iter();
                    match refused.error {
                        // The commit was refused although the plan held: somebody was faster.
                        // Whether that matters, the next plan on the newer head says.
                        error @ Error::VersionConflict { .. } => {
                            // The same head lost again and again: nobody is faster, the log runs
                            // ahead of the head.
                            failed = if lost_on == Some(planned_on) { failed + 1 } else { 1 };
                            lost_on = Some(planned_on);
                            if is_fresh && failed >= STUCK_AFTER {
                                return Err(Error::corrupt(
                                    format!("the log of {address}"),
                                    format!("it holds an event beyond the head: {error}"),
                                ));
                            }
                            if deadline.is_over() {
                                return Err(error);
                            }
                            races += 1;
                            tracing::debug!(%address, races, failed, "lost a race, planning again");
                            // One file orders its writers by itself; over a network those who lose
                            // together would meet again.
                            let waits = if self.reads_are_cheap() { failed } else { races };
                            if waits > 1 {
                                let wait = self.options.retry.backoff(waits - 1);
                                tokio::time::sleep(wait.min(deadline.left())).await;
                            } else if let Some(newest) = seen.next() {
                                // Seen just now, while looking for what became of the commit.
                                base = newest;
                                is_fresh = true;
                                continue;
                            }
                        }
                        error => return Err(error),
                    }
                }
            }
            base = self.head_by(address, deadline).await?;
            is_fresh = true;
        }
    }

    /// Commits the changes of one or more states at once, guarded by what was read. Settles what is
    /// unclear.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] naming a state that is not as it was planned on; nothing was
    /// written then.
    pub(crate) async fn commit(
        &self,
        groups: &[Steps],
        guards: &[Guard],
        deadline: Deadline,
    ) -> Result<()> {
        self.try_commit(groups, guards, deadline).await.map_err(|refused| refused.error)
    }

    async fn try_commit(
        &self,
        groups: &[Steps],
        guards: &[Guard],
        deadline: Deadline,
    ) -> Result<(), Refused> {
        let repeat_before = self.backend.limits().repeat_before;
        let mut writes = Vec::new();
        let mut heads = Vec::new();
        for group in groups {
            let base = group.base.as_ref().map(|known| (&known.head.change, known.revision));
            let (logged, head) = schema::writes(&group.transitions, base, repeat_before)?;
            writes.extend(logged);
            heads.push(head);
        }
        for (key, holds) in guards.iter().map(Guard::condition) {
            writes.push(Write::check(key, holds));
        }
        // Heads last: a reader who sees a head then finds all that the head needs.
        writes.append(&mut heads);
        self.check_size(&writes)?;

        let sent = self.send(groups, guards, &writes, deadline).await;
        let first_head = writes.len().saturating_sub(groups.len());
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
        }
        sent.map(drop)
    }

    fn check_size(&self, writes: &[Write]) -> Result<()> {
        let limits = self.backend.limits();
        if writes.len() > limits.commit_writes {
            return Err(Error::TooLarge {
                what: "the number of documents in one commit".into(),
                size: writes.len() as u64,
                limit: limits.commit_writes as u64,
            });
        }
        let size = writes.iter().map(write_bytes).sum();
        if size > limits.commit_bytes {
            let what = "the commit".to_owned();
            return Err(Error::TooLarge { what, size, limit: limits.commit_bytes });
        }
        Ok(())
    }
}

fn write_bytes(write: &Write) -> u64 {
    match &write.operation {
        crate::backend::Operation::Put(body) => body.as_text().len() as u64,
        _ => 0,
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
