//! [`TransactionManager`]: runs transactions until they hold, and keeps locks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clock::Stopwatch;
use crate::conditions::Conditions;
use crate::error::{Error, Result};
use crate::fence::GLOBAL_GOVERNOR;
use crate::json::{MAX_DEPTH, depth_exceeds, too_deep};
use crate::keys::Address;
use crate::lines::{Base, NewEntry, Pending, Place, Turn};
use crate::patience::Deadline;
use crate::proposal::{Beside, Guard, Proposal, Steps};
use crate::records::{Records, version_conflict};
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::StateStore;
use crate::transaction::{Seen, Transaction, Work};
use crate::transaction_log::{TransactionLog, TransactionRecord, TransactionStatus};

/// So often a transaction plans on what is not durable, and then no more.
const MOST_RETURNS: u32 = 2;
/// How long a transaction waits in line for a state that it lost before.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs transactions on a store, and keeps locks. A cheap handle: clones share the log.
#[derive(Debug, Clone)]
pub struct TransactionManager {
    pub(crate) records: Arc<Records>,
    conditions: Conditions,
    /// Under which locks stand.
    pub(crate) governor: String,
    log: TransactionLog,
}

/// What a transaction gave, and what it took.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completed<T> {
    /// What the closure returned.
    pub value: T,
    /// How often the closure ran; 1 when nobody was faster.
    pub attempts: u32,
    /// The id that stands in the context of its changes.
    pub transaction_id: String,
    /// How many states were read, and how many written.
    pub reads: usize,
    /// How many states were written.
    pub writes: usize,
    /// What became of it: committed, read only, or answered before.
    pub status: TransactionStatus,
    /// How long it took, retries included.
    pub took: Duration,
}

/// What an attempt that lost leaves to the next.
#[derive(Debug, Default)]
struct Lost {
    /// Where the next attempt stands in line, in order: first for what it wrote, and when that was not
    /// enough for all that it touched, so that it cannot lose to others here for ever.
    line: Vec<Address>,
    /// Whether it touched one state alone.
    is_single: bool,
    /// Whether it has planned too often on what then failed: then it waits for what holds.
    waits: bool,
}

/// The places in line that an attempt holds; the turn is missing where it was waited for too long.
#[derive(Debug, Default)]
struct Held {
    places: BTreeMap<Address, (Place, Option<Turn>)>,
}

impl Held {
    /// Takes the turn of a state that was not waited for.
    ///
    /// # Errors
    /// The conflict, when others stand in line there.
    fn join(&mut self, records: &Records, address: &Address, version: u64) -> Result<(), Attempt> {
        if self.places.contains_key(address) {
            return Ok(());
        }
        let place = records.lines.join(address);
        let Some(turn) = place.turn_now() else {
            // At its end.
            let conflict = version_conflict(address, version, version);
            return Err(Attempt::Lost(conflict, Sleep::No));
        };
        self.places.insert(address.clone(), (place, Some(turn)));
        Ok(())
    }
}

/// Why an attempt did not hold.
enum Attempt {
    /// Somebody was faster: again.
    Lost(Error, Sleep),
    /// It cannot be.
    Failed(Error),
}

/// Whether to wait before the next attempt.
#[derive(Clone, Copy, PartialEq)]
enum Sleep {
    /// The line orders those who stand in it.
    No,
    Backoff,
}

impl TransactionManager {
    /// On this store. A store that is [fenced](StateStore::fenced_by) makes a manager whose every
    /// commit is.
    pub fn new(store: impl Into<StateStore>) -> Self {
        let StateStore { records, conditions } = store.into();
        let governor = GLOBAL_GOVERNOR.to_owned();
        Self { records, conditions, governor, log: TransactionLog::default() }
    }

    /// Keeps its locks under this governor instead of [`GLOBAL_GOVERNOR`].
    #[must_use]
    pub fn with_lock_governor(mut self, governor: impl Into<String>) -> Self {
        self.governor = governor.into();
        self
    }

    /// Keeps the newest so many transactions in its log; 0 for none.
    #[must_use]
    pub fn with_log_of(mut self, records: usize) -> Self {
        self.log = TransactionLog::keeping(records);
        self
    }

    /// The newest transactions that were run through this manager and its clones, the oldest first;
    /// 256 of them, unless [`with_log_of`](TransactionManager::with_log_of) says otherwise.
    #[must_use]
    pub fn transaction_log(&self) -> Vec<TransactionRecord> {
        self.log.records()
    }

    /// Runs a closure as one transaction. It may run more than once: when a state that it read
    /// changed before the commit, it runs again on a fresh cut. An error of its own ends
    /// the transaction with nothing written.
    ///
    /// `governor` names the transaction in logs; the closure may use any governor.
    ///
    /// # Errors
    /// The closure's own; [`Error::TransactionFailed`] after the last attempt, with the conflict as
    /// source; [`Error::OutcomeUnknown`] when the answer was lost and could not be settled;
    /// [`Error::LockLost`] on a fenced store.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let store = StateStore::in_memory();
    /// # let why = ChangeMetadata::new("docs", "example", None);
    /// # for id in ["a", "b"] {
    /// #   let account = StateSnapshot::new(id.into(), json!({"balance": 100}), why.clone());
    /// #   store.save_state("bank", id, account, why.clone()).await?;
    /// # }
    /// let manager = TransactionManager::new(store.clone());
    /// manager.execute_transaction("bank", |tx| { let why = why.clone(); async move {
    ///     let (mut a, version_a) = tx.get_state("bank", "a").await?;
    ///     let (mut b, version_b) = tx.get_state("bank", "b").await?;
    ///     a.data["balance"] = json!(a.data["balance"].as_i64().unwrap_or(0) - 30);
    ///     b.data["balance"] = json!(b.data["balance"].as_i64().unwrap_or(0) + 30);
    ///     tx.update_state("bank", "a", a, version_a, why.clone()).await?;
    ///     tx.update_state("bank", "b", b, version_b, why).await?;
    ///     Ok(())
    /// }}).await?;
    /// assert_eq!(store.get_state("bank", "b").await?.0.data["balance"], 130);
    /// # Ok(()) }
    /// ```
    pub async fn execute_transaction<T, F, Fut>(
        &self,
        governor: impl AsRef<str>,
        body: F,
    ) -> Result<T>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        Ok(self.run_named(governor.as_ref(), body).await?.value)
    }

    /// As [`execute_transaction`](TransactionManager::execute_transaction), and says what it took.
    ///
    /// # Errors
    /// As [`execute_transaction`](TransactionManager::execute_transaction).
    pub async fn run<T, F, Fut>(&self, body: F) -> Result<Completed<T>>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        self.run_named("", body).await
    }

    /// Runs a closure as one transaction under an idempotency key: once it was committed, everyone who
    /// comes with the key gets what it returned, and nothing is done again. The answer is kept in the
    /// same commit, for [`StoreOptions::idempotency_ttl`](crate::StoreOptions::idempotency_ttl) at least.
    ///
    /// # Errors
    /// As [`execute_transaction`](TransactionManager::execute_transaction);
    /// [`Error::SerializationError`] when the answer that is kept is no `T`;
    /// [`Error::TooLarge`] for an answer beyond [`MAX_ANSWER_BYTES`](crate::MAX_ANSWER_BYTES).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let store = StateStore::in_memory();
    /// # let why = || ChangeMetadata::new("docs", "example", None);
    /// let manager = TransactionManager::new(store.clone());
    /// for _ in 0..3 {
    ///     // A caller that did not hear the first answer asks again.
    ///     let version = manager.execute_once("shop", "order-17", |tx| async move {
    ///         let order = StateSnapshot::new("order-17".into(), json!({"paid": true}), why());
    ///         tx.save_state("shop", "order-17", order, why()).await
    ///     }).await?;
    ///     assert_eq!(version, 1);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn execute_once<T, F, Fut>(
        &self,
        governor: impl AsRef<str>,
        idempotency_key: impl AsRef<str>,
        mut body: F,
    ) -> Result<T>
    where
        T: Serialize + DeserializeOwned,
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let key = idempotency_key.as_ref();
        let once = |transaction: Transaction| {
            let run = body(transaction.clone());
            async move {
                if let Some(first) = transaction.idempotency_key(key).await? {
                    return Ok(first);
                }
                let value = run.await?;
                transaction.answer(&value).await?;
                Ok(value)
            }
        };
        Ok(self.run_named(governor.as_ref(), once).await?.value)
    }

    /// Reads some states and writes some, as one: the writes happen only if what was read, and what
    /// they replace, has not changed. A state to write that was read from a store before (version
    /// above 0) must still have that version. Returns those of the read states that exist.
    ///
    /// # Errors
    /// As [`execute_transaction`](TransactionManager::execute_transaction), and
    /// [`Error::VersionConflict`] when a state to write has another version.
    pub async fn read_write_transaction<R: AsRef<str>, W: AsRef<str>>(
        &self,
        governor: impl AsRef<str>,
        reads: &[R],
        writes: &[(W, StateSnapshot, ChangeMetadata)],
    ) -> Result<Vec<StateSnapshot>> {
        let governor = governor.as_ref();
        // These belong to the caller; what is too deep must not be cloned.
        for (state, snapshot, metadata) in writes {
            let mut values = metadata.context.values().chain([&snapshot.data]);
            if values.any(|value| depth_exceeds(value, MAX_DEPTH)) {
                return Err(too_deep(&format!("{governor}/{}", state.as_ref())));
            }
        }
        let body = |transaction: Transaction| async move {
            let read = transaction.batch_get_states(governor, reads).await?;
            for (state, snapshot, metadata) in writes {
                let (state, new, why) = (state.as_ref(), snapshot.clone(), metadata.clone());
                match snapshot.version {
                    0 => transaction.save_state(governor, state, new, why).await?,
                    known => transaction.update_state(governor, state, new, known, why).await?,
                };
            }
            Ok(read)
        };
        Ok(self.run_named(governor, body).await?.value)
    }

    /// Removes the answers to commands that are older than
    /// [`StoreOptions::idempotency_ttl`](crate::StoreOptions::idempotency_ttl) was when they were given;
    /// returns how many. Reads all answers; run it now and then. On Firestore a time-to-live policy on
    /// `expires_at` does the same.
    ///
    /// # Errors
    /// What reading and writing meet.
    pub async fn forget_expired_commands(&self) -> Result<u64> {
        self.records.forget_answers().await
    }

    async fn run_named<T, F, Fut>(&self, governor: &str, mut body: F) -> Result<Completed<T>>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        if self.conditions.key.is_some() {
            return Err(Error::refused(
                "a transaction on a handle with an idempotency key",
                "such a handle is for single writes; use Transaction::idempotency_key",
            ));
        }
        let policy = &self.records.options().retry;
        let deadline = self.records.deadline();
        let mut note = Note::new(self, governor);
        let mut lost = Lost::default();
        // Lost against others, and sent back by the line: the latter are no failures.
        let (mut races, mut returns) = (0, 0);
        let mut last_conflict = None;
        loop {
            note.record.attempts += 1;
            let (mut held, preset) = self.stand_in_line(&lost, deadline).await;
            let transaction = Transaction::begin(&self.records, deadline, preset);
            note.record.id = transaction.id().to_owned();
            let outcome = body(transaction.clone()).await;
            let mut work = transaction.end().await;
            lost = Lost { waits: lost.waits, ..note.touched(&work) };
            let attempt = match (work.spoiled.take(), outcome) {
                (Some(conflict), _) => Err(Attempt::Lost(conflict, Sleep::No)),
                (None, Err(error)) => Err(self.judge(error, work, deadline).await),
                (None, Ok(value)) => self
                    .commit(work, &mut held, lost.waits, deadline)
                    .await
                    .map(|status| (value, status)),
            };
            drop(held);
            let (conflict, sleep) = match attempt {
                Ok((value, status)) => return Ok(note.completed(value, status)),
                Err(Attempt::Failed(error)) => return Err(note.failed(error)),
                Err(Attempt::Lost(conflict, sleep)) => (conflict, sleep),
            };
            let attempts = note.record.attempts;
            note.record.reason = Some(conflict.to_string());
            tracing::debug!(attempts, %conflict, "somebody was faster, running again");
            match sleep {
                Sleep::No => returns += 1,
                Sleep::Backoff => {
                    races += 1;
                    last_conflict = Some(conflict);
                    metrics::counter!("tai_state_conflicts_total").increment(1);
                }
            }
            lost.waits |= returns >= MOST_RETURNS;
            if races >= policy.max_attempts || deadline.is_over() {
                let source = last_conflict.unwrap_or_else(|| Error::Timeout {
                    operation: "waiting in line to write".to_owned(),
                    after: deadline.limit(),
                });
                let failed = Error::TransactionFailed { attempts, source: Box::new(source) };
                return Err(note.failed(failed));
            }
            if sleep == Sleep::Backoff {
                // Within one opened store the line orders those who lost; over a network they would
                // meet again.
                let waits = races - u32::from(self.records.reads_are_cheap());
                if waits > 0 {
                    tokio::time::sleep(policy.backoff(waits).min(deadline.left())).await;
                }
            }
        }
    }

    /// A closure's own error counts if what it saw was there: durable, and all at one moment.
    async fn judge(&self, error: Error, mut work: Work, deadline: Deadline) -> Attempt {
        if let Err(conflict) = work.is_durable(deadline).await {
            return Attempt::Lost(conflict, Sleep::No);
        }
        let guards: Vec<Guard> = work
            .states
            .into_iter()
            .filter_map(|(address, touched)| match touched.seen {
                Seen::Known(seen) => Some(Guard { address, seen }),
                Seen::Pending(_) => None,
            })
            .collect();
        match self.records.confirm(&guards, deadline).await {
            Err(conflict @ Error::VersionConflict { .. }) => {
                Attempt::Lost(conflict, Sleep::Backoff)
            }
            // What cannot be confirmed does not make the closure's error another.
            Ok(()) | Err(_) => Attempt::Failed(error),
        }
    }

    /// Takes the turn for what the attempt before has written, in the order of the addresses, so that
    /// nobody waits for one who waits for him. Returns the end of the line for one that stands alone.
    async fn stand_in_line(&self, lost: &Lost, deadline: Deadline) -> (Held, Option<Pending>) {
        let mut held = Held::default();
        let patience = Deadline::after(PATIENCE.min(deadline.left()));
        for address in &lost.line {
            let place = self.records.lines.join(address);
            let turn = place.turn_within(patience.left()).await;
            held.places.insert(address.clone(), (place, turn));
        }
        if lost.is_single && !lost.waits {
            let end = held.places.values().next().and_then(|(place, _)| place.end());
            return (held, end);
        }
        for (place, _) in held.places.values() {
            while let Some(mut pending) = place.end() {
                if deadline.is_over() || pending.is_durable(deadline).await {
                    break;
                }
            }
        }
        (held, None)
    }

    async fn commit(
        &self,
        mut work: Work,
        held: &mut Held,
        alone: bool,
        deadline: Deadline,
    ) -> Result<TransactionStatus, Attempt> {
        let was_answered = work.was_answered();
        let command = work.new_command(&self.records).map_err(Attempt::Failed)?;
        let beside = Beside { fences: self.conditions.fences.clone(), command };
        let is_single = work.states.len() == 1;
        let mut groups = Vec::new();
        let mut guards = Vec::new();
        for (address, touched) in std::mem::take(&mut work.states) {
            if touched.steps.is_empty() {
                match touched.seen {
                    Seen::Known(seen) => guards.push(Guard { address, seen }),
                    Seen::Pending(mut pending) => {
                        if !pending.is_durable(deadline).await {
                            return Err(Attempt::Lost(gone(&address, &pending), Sleep::No));
                        }
                    }
                }
            } else if is_single {
                // What was sent back again and again may be what spoils the commit for others.
                let alone = alone || !beside.is_empty();
                let entry = NewEntry { steps: touched.steps, beside, alone, deadline };
                return self.hand_in(&address, touched.seen.into(), entry, held).await;
            } else {
                let Seen::Known(base) = touched.seen else {
                    let reason = "a state under way was written together with others";
                    return Err(Attempt::Failed(Error::refused(address.to_string(), reason)));
                };
                groups.push(Steps { base, transitions: touched.steps });
            }
        }
        // Whoever stands in line must not lose to one who does not.
        for change in groups.iter().filter_map(Steps::first) {
            held.join(&self.records, &change.address, change.version.saturating_sub(1))?;
        }
        if !self.records.options().checks_reads() && !groups.is_empty() {
            guards.clear();
        }
        let committed = if groups.is_empty() && beside.command.is_none() {
            // What only read has read one cut, once that is sure.
            self.records.confirm(&guards, deadline).await
        } else {
            let proposal = Proposal { groups: &groups, guards: &guards, beside: &beside };
            self.records.commit(proposal, deadline).await
        };
        match committed {
            Ok(()) if !groups.is_empty() => Ok(TransactionStatus::Committed),
            Ok(()) if was_answered => Ok(TransactionStatus::Answered),
            Ok(()) => Ok(TransactionStatus::ReadOnly),
            Err(error @ Error::VersionConflict { .. }) => Err(Attempt::Lost(error, Sleep::Backoff)),
            Err(error) => Err(Attempt::Failed(error)),
        }
    }

    /// Hands in the changes of one state at its line.
    async fn hand_in(
        &self,
        address: &Address,
        base: Base,
        entry: NewEntry,
        held: &mut Held,
    ) -> Result<TransactionStatus, Attempt> {
        held.join(&self.records, address, base.head().map_or(0, |head| head.version()))?;
        let Some((place, turn)) = held.places.remove(address) else {
            let reason = "it has no place in line";
            return Err(Attempt::Failed(Error::refused(address.to_string(), reason)));
        };
        let receipt = self.records.submit(&place, base, entry);
        // Whoever is next can plan on it while it is under way.
        drop(turn);
        match receipt.settled().await {
            Ok(()) => Ok(TransactionStatus::Committed),
            Err(refused) if refused.stale => Err(Attempt::Lost(refused.error, Sleep::No)),
            Err(refused) => Err(match refused.error {
                error @ Error::VersionConflict { .. } => Attempt::Lost(error, Sleep::Backoff),
                error => Attempt::Failed(error),
            }),
        }
    }
}

/// The conflict of what was decided on a head that has not become durable.
pub(crate) fn gone(address: &Address, pending: &Pending) -> Error {
    let version = pending.head.version();
    version_conflict(address, version, version.saturating_sub(1))
}

/// The entry of the log, written when the transaction ends, however it ends.
struct Note<'a> {
    manager: &'a TransactionManager,
    record: TransactionRecord,
    started: Stopwatch,
    is_written: bool,
}

impl<'a> Note<'a> {
    fn new(manager: &'a TransactionManager, governor: &str) -> Self {
        let record = TransactionRecord {
            id: String::new(),
            governor: governor.to_owned(),
            status: TransactionStatus::Abandoned,
            attempts: 0,
            reads: Vec::new(),
            writes: Vec::new(),
            reason: None,
            finished_at: chrono::DateTime::UNIX_EPOCH,
            took: Duration::ZERO,
        };
        Self { manager, record, started: Stopwatch::start(), is_written: false }
    }

    /// Notes what an attempt has touched.
    fn touched(&mut self, work: &Work) -> Lost {
        (self.record.reads, self.record.writes) = work.touched();
        let is_first = self.record.attempts == 1;
        let wanted = work.states.iter().filter(|(_, touch)| !is_first || !touch.steps.is_empty());
        let line: Vec<Address> = wanted.map(|(address, _)| address.clone()).collect();
        let is_single =
            work.states.len() == 1 && work.states.values().all(|touch| !touch.steps.is_empty());
        Lost { line, is_single, waits: false }
    }

    fn write(&mut self) {
        self.is_written = true;
        self.record.finished_at = self.manager.records.options().clock.now();
        self.record.took = self.started.elapsed();
        self.manager.log.add(self.record.clone());
    }

    fn completed<T>(mut self, value: T, status: TransactionStatus) -> Completed<T> {
        self.record.status = status;
        self.write();
        let record = &self.record;
        tracing::debug!(
            governor = record.governor,
            attempts = record.attempts,
            status = status.as_str(),
            "transaction ended"
        );
        Completed {
            value,
            attempts: record.attempts,
            transaction_id: record.id.clone(),
            reads: record.reads.len(),
            writes: record.writes.len(),
            status,
            took: record.took,
        }
    }

    fn failed(mut self, error: Error) -> Error {
        let is_unknown = matches!(error, Error::OutcomeUnknown { .. });
        self.record.status =
            if is_unknown { TransactionStatus::Unknown } else { TransactionStatus::Failed };
        let mut reason = error.to_string();
        if let Error::TransactionFailed { source, .. } = &error {
            reason = format!("{reason}: {source}");
        }
        self.record.reason = Some(reason);
        self.write();
        error
    }
}

impl Drop for Note<'_> {
    fn drop(&mut self) {
        if !self.is_written {
            self.write();
        }
    }
}
