//! The only caller of the port: typed reads, and the one way a change is committed and settled.
//!
//! A commit that was refused, or whose answer was lost, is never reported from the refusal alone:
//! the event at that version is read, and if it is ours, the change was applied. Retries happen
//! here and nowhere below.

use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{
    Backend, BackendError, Document, Identity, Key, Kind, Name, Precondition, Range, Read,
    Revision, Scan, Write,
};
use crate::chain::Change;
use crate::clock::Stopwatch;
use crate::config::{PersistenceConfig, StoreOptions};
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::remembered::Remembered;
use crate::schema;
use crate::transition::{self, Head, Request, Transition};

/// A head as it was read or written, with the revision that guards the next change.
#[derive(Debug, Clone)]
pub(crate) struct KnownHead {
    pub(crate) head: Arc<Head>,
    pub(crate) revision: Revision,
}

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

/// After so many refusals on an unchanged head the head is not behind, it is wrong.
const STUCK_AFTER: u32 = 12;

/// One cut of the store, held for a short time.
#[derive(Debug)]
pub(crate) struct View {
    read: Box<dyn Read>,
    location: String,
}

impl View {
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader { read: self.read.as_ref(), location: &self.location }
    }
}

/// Typed reading through a backend or one of its views.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    read: &'a dyn Read,
    location: &'a str,
}

impl Reader<'_> {
    fn lift(self, error: BackendError) -> Error {
        lift(error, self.location)
    }

    pub(crate) async fn heads(self, addresses: &[Address]) -> Result<Vec<Option<KnownHead>>> {
        let keys: Vec<Key> = addresses.iter().map(Address::head).collect();
        let found = self.read.get(&keys).await.map_err(|error| self.lift(error))?;
        addresses
            .iter()
            .zip(found)
            .map(|(address, document)| document.map(|d| known(address, &d)).transpose())
            .collect()
    }

    pub(crate) async fn head(self, address: &Address) -> Result<Option<KnownHead>> {
        Ok(self.heads(std::slice::from_ref(address)).await?.pop().flatten())
    }

    /// The changes at these versions, as far as their events exist.
    pub(crate) async fn changes_at(
        self,
        address: &Address,
        versions: &[u64],
    ) -> Result<Vec<Option<Change>>> {
        let keys: Vec<Key> = versions.iter().map(|version| address.event(*version)).collect();
        let found = self.read.get(&keys).await.map_err(|error| self.lift(error))?;
        found
            .into_iter()
            .map(|document| document.map(|d| schema::read_change(address, &d)).transpose())
            .collect()
    }

    pub(crate) async fn snapshot(self, address: &Address, version: u64) -> Result<Option<Change>> {
        let key = address.snapshot(version);
        let found = self.read.get(&[key]).await.map_err(|error| self.lift(error))?;
        let document = found.into_iter().next().flatten();
        document.map(|d| schema::read_change(address, &d)).transpose()
    }

    /// The first changes in `from..=to`, at most `limit`, and whether there are more.
    pub(crate) async fn changes(
        self,
        address: &Address,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<(Vec<Change>, bool)> {
        let (documents, more) = self.versions(address, Kind::Events, from, to, limit).await?;
        let changes = documents.iter().map(|d| schema::read_change(address, d));
        Ok((changes.collect::<Result<_>>()?, more))
    }

    async fn versions(
        self,
        address: &Address,
        kind: Kind,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<(Vec<Document>, bool)> {
        let scan = Scan {
            governor: address.governor.clone(),
            kind,
            range: Range::Versions { name: address.state.clone(), from, to },
            limit,
        };
        let page = self.read.scan(&scan).await.map_err(|error| self.lift(error))?;
        Ok((page.documents, page.next.is_some()))
    }

    /// The heads of a governor after a name, and the name to continue after.
    pub(crate) async fn states(
        self,
        governor: &Name,
        after: Option<Name>,
        limit: usize,
    ) -> Result<(Vec<(Address, KnownHead)>, Option<Name>)> {
        let scan = Scan {
            governor: governor.clone(),
            kind: Kind::States,
            range: Range::Names { after },
            limit,
        };
        let page = self.read.scan(&scan).await.map_err(|error| self.lift(error))?;
        let mut heads = Vec::with_capacity(page.documents.len());
        for document in &page.documents {
            let address = Address { governor: governor.clone(), state: document.key.name.clone() };
            let head = known(&address, document)?;
            heads.push((address, head));
        }
        let next = match page.next.map(|scan| scan.range) {
            Some(Range::Names { after }) => after,
            _ => None,
        };
        Ok((heads, next))
    }

    /// The states of a governor after one, whether or not their heads can be read.
    pub(crate) async fn state_names(
        self,
        governor: &Name,
        after: Option<&Name>,
        limit: usize,
    ) -> Result<Vec<Address>> {
        let names = self.read.names(governor, Kind::States, after, limit).await;
        let names = names.map_err(|error| self.lift(error))?;
        let address = |state| Address { governor: governor.clone(), state };
        Ok(names.into_iter().map(address).collect())
    }

    pub(crate) async fn governors(self, after: Option<&Name>, limit: usize) -> Result<Vec<Name>> {
        self.read.governors(after, limit).await.map_err(|error| self.lift(error))
    }

    pub(crate) async fn count(self, governor: Option<&Name>, kind: Kind) -> Result<u64> {
        self.read.count(governor, kind).await.map_err(|error| self.lift(error))
    }
}

fn known(address: &Address, document: &Document) -> Result<KnownHead> {
    let head = Arc::new(schema::read_head(address, document)?);
    Ok(KnownHead { head, revision: document.revision })
}

/// One store: a backend, its settings, and the heads that this handle remembers.
#[derive(Debug)]
pub(crate) struct Records {
    backend: Arc<dyn Backend>,
    location: String,
    node: String,
    options: StoreOptions,
    remembered: Mutex<Remembered>,
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
        Reader { read: self.backend.as_ref(), location: &self.location }
    }

    /// A reader whose answers all come from one cut.
    pub(crate) async fn view(&self) -> Result<View> {
        let read = self.backend.view().await.map_err(|error| lift(error, &self.location))?;
        Ok(View { read, location: self.location.clone() })
    }

    /// Reads a head and remembers it for the next change.
    pub(crate) async fn head(&self, address: &Address) -> Result<Option<KnownHead>> {
        let found = self.reader().head(address).await?;
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
        let started = Stopwatch::start();
        let guess_absent = request.expect == transition::Expect::Any
            && matches!(request.wish, transition::Wish::Put(_))
            && !self.backend.limits().reads_are_cheap;
        let mut base = self.recall(address);
        let mut is_fresh = false;
        if base.is_none() && !guess_absent {
            base = self.head(address).await?;
            is_fresh = true;
        }
        let mut failed = 0u32;
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
                    match self.commit(&[steps], &[]).await {
                        Ok(()) => return Ok((change, before)),
                        // The commit was refused although the plan held: somebody was faster.
                        // Whether that matters, the next plan on the newer head says.
                        Err(error @ Error::VersionConflict { .. }) => {
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
                            if started.elapsed() > self.options.retry.deadline {
                                return Err(error);
                            }
                            tracing::debug!(%address, failed, "lost a race, planning again");
                            if failed > 1 {
                                tokio::time::sleep(self.options.retry.backoff(failed - 1)).await;
                            }
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
            base = self.head(address).await?;
            is_fresh = true;
        }
    }

    /// Commits the changes of one or more states at once, guarded by what was read. Settles what is
    /// unclear.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] naming a state that is not as it was planned on; nothing was
    /// written then.
    pub(crate) async fn commit(&self, groups: &[Steps], guards: &[Guard]) -> Result<()> {
        let mut writes = Vec::new();
        let mut heads = Vec::new();
        for group in groups {
            let base = group.base.as_ref().map(|known| known.revision);
            let (logged, head) = schema::writes(&group.transitions, base)?;
            writes.extend(logged);
            heads.push(head);
        }
        for guard in guards {
            let precondition = match &guard.seen {
                Some(known) => Precondition::Revision(known.revision),
                None => Precondition::Absent,
            };
            writes.push(Write::check(guard.address.head(), precondition));
        }
        // Heads last: a reader who sees a head then finds all that the head needs.
        writes.append(&mut heads);
        self.check_size(&writes)?;

        let revisions = match self.send(groups, guards, &writes).await {
            Ok(revisions) => revisions,
            Err(error) => {
                for group in groups {
                    self.remember_newest(group, None);
                }
                return Err(error);
            }
        };
        let first_head = revisions.len().saturating_sub(groups.len());
        for (index, group) in groups.iter().enumerate() {
            self.remember_newest(group, revisions.get(first_head + index).copied().flatten());
        }
        Ok(())
    }

    fn remember_newest(&self, group: &Steps, revision: Option<Revision>) {
        let Some(newest) = group.transitions.last() else { return };
        let known =
            revision.map(|revision| KnownHead { head: Arc::new(newest.head.clone()), revision });
        self.remember(&newest.head.change.address, known.as_ref());
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

    /// Sends one list of writes until its outcome is known. After success the revisions of the
    /// documents; empty when they are not known because the answer had been lost.
    async fn send(
        &self,
        groups: &[Steps],
        guards: &[Guard],
        writes: &[Write],
    ) -> Result<Vec<Option<Revision>>> {
        let policy = &self.options.retry;
        let started = Stopwatch::start();
        let mut unclear = false;
        let mut failed = 0u32;
        loop {
            let error = match self.backend.commit(writes.to_vec()).await {
                Ok(committed) => return Ok(committed.revisions),
                Err(error) => error,
            };
            failed += 1;
            let again = failed < policy.max_attempts && started.elapsed() < policy.deadline;
            let reason = match error {
                BackendError::Conflict => {
                    return match self.settle(groups, guards).await {
                        Ok(Settled::Applied) => Ok(Vec::new()),
                        Ok(Settled::Overtaken(conflict)) => Err(conflict),
                        // Another commit is under way and not visible yet: a conflict all the same,
                        // and the caller looks again.
                        Ok(Settled::AsPlanned) => Err(overtaken_by_nobody(groups)),
                        Err(error) if unclear => Err(outcome_unknown(groups, error)),
                        Err(error) => Err(error),
                    };
                }
                BackendError::Indeterminate(reason) => {
                    unclear = true;
                    reason
                }
                BackendError::Unavailable(reason) => reason,
                error if unclear => {
                    return Err(outcome_unknown(groups, lift(error, &self.location)));
                }
                error => return Err(lift(error, &self.location)),
            };
            tracing::warn!(%reason, failed, unclear, "a commit was not answered");
            if again {
                tokio::time::sleep(policy.backoff(failed)).await;
                continue;
            }
            let source = lift(BackendError::Unavailable(reason), &self.location);
            if !unclear {
                return Err(source);
            }
            // The last resort: whoever stands at that version now has settled it.
            return match self.settle(groups, guards).await {
                Ok(Settled::Applied) => Ok(Vec::new()),
                Ok(Settled::Overtaken(conflict)) => Err(conflict),
                Ok(Settled::AsPlanned) | Err(_) => Err(outcome_unknown(groups, source)),
            };
        }
    }

    /// Finds out what became of a commit, by looking for its events.
    async fn settle(&self, groups: &[Steps], guards: &[Guard]) -> Result<Settled> {
        let mut conflict = None;
        for group in groups {
            let Some(first) = group.transitions.first() else { continue };
            let change = &first.head.change;
            let address = &change.address;
            let head = self.reader().head(address).await?;
            let there = self.reader().changes_at(address, &[change.version]).await?.pop().flatten();
            // By the hash, which covers the identity and all that the event says: another's event may
            // carry the same identity, if its writer chose it.
            if there.as_ref().is_some_and(|there| there.hash == change.hash) {
                // All or nothing: one event of ours proves the whole commit.
                return Ok(Settled::Applied);
            }
            let seen = group.base.as_ref().map(|known| known.revision);
            if head.as_ref().map(|known| known.revision) != seen || there.is_some() {
                let actual = head.as_ref().map_or(0, |known| known.head.version());
                let actual = actual.max(there.map_or(0, |change| change.version));
                conflict
                    .get_or_insert_with(|| version_conflict(address, change.version - 1, actual));
            }
        }
        for guard in guards {
            let head = self.reader().head(&guard.address).await?;
            let seen = guard.seen.as_ref();
            if head.as_ref().map(|known| known.revision) != seen.map(|known| known.revision) {
                let version = |known: Option<&KnownHead>| known.map_or(0, |k| k.head.version());
                let (expected, actual) = (version(seen), version(head.as_ref()));
                conflict.get_or_insert_with(|| version_conflict(&guard.address, expected, actual));
            }
        }
        Ok(conflict.map_or(Settled::AsPlanned, Settled::Overtaken))
    }
}

/// What became of a commit.
enum Settled {
    /// It was applied: its answer was lost, or it was delivered twice.
    Applied,
    /// It can never be applied any more, since what it was planned on has changed.
    Overtaken(Error),
    /// Nothing has changed; it may still be on its way.
    AsPlanned,
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

/// What a backend's error means to a caller of the crate.
pub(crate) fn lift(error: BackendError, location: &str) -> Error {
    let location = location.to_owned();
    match error {
        BackendError::Conflict => {
            Error::Firestore { message: "a precondition did not hold".into(), source: None }
        }
        BackendError::Unavailable(message) | BackendError::Indeterminate(message) => {
            Error::Firestore { message, source: None }
        }
        BackendError::Denied(reason) => Error::PermissionDenied { location, reason },
        BackendError::Invalid(reason) => Error::InvalidState { subject: location, reason },
        BackendError::TooLarge { what, size, limit } => Error::TooLarge { what, size, limit },
        BackendError::Corrupt { location, reason } => Error::Corrupt { location, reason },
        BackendError::Full => Error::StorageFull { location },
        BackendError::Failed(reason) => Error::Storage { location, reason },
        BackendError::Moved(to) => Error::Moved { location, to },
    }
}
