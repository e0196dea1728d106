//! [`Transaction`]: several states read and written as one.
//!
//! A transaction reads through one consistent cut and keeps its writes to itself until the end;
//! then everything is committed at once, under the condition that nothing it read has changed in
//! between. So transactions are serializable without holding a lock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Mutex;

use crate::chain::Hash;
use crate::clock::new_event_id;
use crate::command::Asked;
use crate::conditions::CommandKey;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::keys::Address;
use crate::lines::{Base, Pending};
use crate::manager::gone;
use crate::patience::Deadline;
use crate::proposal::{NewCommand, refuse_many};
use crate::records::{KnownHead, Records, View};
use crate::schema::Answered;
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{self, not_found};
use crate::transaction_log::TouchedState;
use crate::transition::{Expect, Head, Request, Transition as Step};

/// The key of a change's context under which the transaction's id stands.
pub const TRANSACTION_CONTEXT: &str = "transaction";

/// What a transaction's closure works on: the store's verbs, with all reads from one cut and all
/// writes held back until the commit. A cheap handle; clones are the same transaction.
#[derive(Debug, Clone)]
pub struct Transaction {
    records: Arc<Records>,
    id: String,
    deadline: Deadline,
    work: Arc<Mutex<Work>>,
}

/// What was read and is to be written so far.
#[derive(Debug, Default)]
pub(crate) struct Work {
    view: Option<Arc<View>>,
    pub(crate) states: BTreeMap<Address, Touched>,
    command: Option<(Asked, Progress)>,
    /// When it changed something first.
    now: Option<DateTime<Utc>>,
    /// What was read has changed under the transaction: whatever its closure says does not count.
    pub(crate) spoiled: Option<Error>,
    over: bool,
}

/// How far a command has come.
enum Progress {
    /// It was answered before this transaction.
    Answered,
    /// This transaction answers it, with this.
    Running(Value),
}

/// Without the answer.
impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Answered => "Answered",
            Self::Running(_) => "Running",
        })
    }
}

#[derive(Debug)]
pub(crate) struct Touched {
    pub(crate) seen: Seen,
    pub(crate) steps: Vec<Step>,
}

/// What was seen of a state.
#[derive(Debug)]
pub(crate) enum Seen {
    /// Its head, or none, in the transaction's cut.
    Known(Option<KnownHead>),
    /// The end of the line of its writers here: as long as the transaction touches this state alone.
    Pending(Pending),
}

impl From<Seen> for Base {
    fn from(seen: Seen) -> Self {
        match seen {
            Seen::Known(known) => Self::Known(known),
            Seen::Pending(pending) => Self::Pending(pending),
        }
    }
}

impl Touched {
    fn head(&self) -> Option<&Head> {
        match (self.steps.last(), &self.seen) {
            (Some(step), _) => Some(&step.head),
            (None, Seen::Known(known)) => known.as_ref().map(|known| known.head.as_ref()),
            (None, Seen::Pending(pending)) => Some(&pending.head),
        }
    }
}

impl Work {
    /// Makes sure that all that was seen is durable.
    ///
    /// # Errors
    /// The conflict, when it is not.
    pub(crate) async fn is_durable(&mut self, deadline: Deadline) -> Result<()> {
        for (address, touched) in &mut self.states {
            if let Seen::Pending(pending) = &mut touched.seen
                && !pending.is_durable(deadline).await
            {
                return Err(gone(address, pending));
            }
        }
        Ok(())
    }

    pub(crate) fn was_answered(&self) -> bool {
        matches!(self.command, Some((_, Progress::Answered)))
    }

    /// The answer that is to be kept.
    pub(crate) fn new_command(&mut self, records: &Records) -> Result<Option<NewCommand>> {
        match self.command.take() {
            Some((asked, Progress::Running(answer))) => {
                records.new_command(&asked, Answered::Value(answer)).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// What was read, and what was written.
    pub(crate) fn touched(&self) -> (Vec<TouchedState>, Vec<TouchedState>) {
        let state = |address: &Address, version| TouchedState {
            governor_id: address.governor.id(),
            state_id: address.state.id(),
            version,
        };
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for (address, touched) in &self.states {
            let seen = match &touched.seen {
                Seen::Known(known) => known.as_ref().map_or(0, |known| known.head.version()),
                Seen::Pending(pending) => pending.head.version(),
            };
            reads.push(state(address, seen));
            writes.extend(touched.steps.last().map(|step| state(address, step.head.version())));
        }
        (reads, writes)
    }
}

impl Transaction {
    /// `preset` is what is seen of the one state that it is expected to touch.
    pub(crate) fn begin(
        records: &Arc<Records>,
        deadline: Deadline,
        preset: Option<Pending>,
    ) -> Self {
        let mut work = Work::default();
        if let Some(pending) = preset {
            let address = pending.head.change.address.clone();
            work.states
                .insert(address, Touched { seen: Seen::Pending(pending), steps: Vec::new() });
        }
        let id = new_event_id().to_string();
        Self { records: Arc::clone(records), id, deadline, work: Arc::new(Mutex::new(work)) }
    }

    /// The id that stands in the context of every change of this attempt.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// As [`StateStore::get_state`](crate::StateStore::get_state), on the transaction's cut and its own writes.
    ///
    /// # Errors
    /// [`Error::StateNotFound`].
    pub async fn get_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<(StateSnapshot, u64)> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let mut work = self.work.lock().await;
        self.read(&mut work, std::slice::from_ref(&address)).await?;
        let head = work.states.get(&address).and_then(Touched::head);
        let alive = head.filter(|head| !head.change.deleted);
        let head = alive.ok_or_else(|| not_found(&address, String::new()))?;
        Ok((head.change.snapshot(), head.version()))
    }

    /// As [`StateStore::batch_get_states`](crate::StateStore::batch_get_states), on the transaction's cut and its own writes.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn batch_get_states<S: AsRef<str>>(
        &self,
        governor: impl AsRef<str>,
        states: &[S],
    ) -> Result<Vec<StateSnapshot>> {
        let addresses = store::addresses(governor.as_ref(), states)?;
        let mut work = self.work.lock().await;
        self.read(&mut work, &addresses).await?;
        let heads = addresses.iter().filter_map(|address| work.states.get(address)?.head());
        Ok(heads.filter(|head| !head.change.deleted).map(|head| head.change.snapshot()).collect())
    }

    /// As [`StateStore::exists`](crate::StateStore::exists), on the transaction's cut and its own writes.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn exists(&self, governor: impl AsRef<str>, state: impl AsRef<str>) -> Result<bool> {
        match self.get_state(governor, state).await {
            Ok(_) => Ok(true),
            Err(Error::StateNotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// As [`StateStore::save_state`](crate::StateStore::save_state); the version it returns comes true with the commit.
    ///
    /// # Errors
    /// [`Error::InvalidState`], [`Error::TooLarge`].
    pub async fn save_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        snapshot: StateSnapshot,
        metadata: ChangeMetadata,
    ) -> Result<u64> {
        let address = (governor.as_ref(), state.as_ref());
        Ok(self
            .write(store::put(address, "save", snapshot, Expect::Any, metadata)?)
            .await?
            .version())
    }

    /// As [`StateStore::update_state`](crate::StateStore::update_state); the version it returns comes true with the commit.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] when the state has another version in the transaction's cut.
    pub async fn update_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        new: StateSnapshot,
        expected_version: u64,
        metadata: ChangeMetadata,
    ) -> Result<u64> {
        let expect = Expect::Version(expected_version);
        let address = (governor.as_ref(), state.as_ref());
        Ok(self.write(store::put(address, "update", new, expect, metadata)?).await?.version())
    }

    /// As [`StateStore::delete_state`](crate::StateStore::delete_state); the version it returns comes true with the commit.
    ///
    /// # Errors
    /// [`Error::StateNotFound`], [`Error::VersionConflict`].
    pub async fn delete_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        expected_version: Option<u64>,
        metadata: ChangeMetadata,
    ) -> Result<u64> {
        let address = (governor.as_ref(), state.as_ref());
        Ok(self.write(store::delete(address, expected_version, metadata)?).await?.version())
    }

    /// As [`StateMachinePersister::log_transition`](crate::StateMachinePersister::log_transition);
    /// the event comes true with the commit.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] when the state is not at `from` in the transaction's cut.
    pub async fn log_transition(
        &self,
        governor: impl AsRef<str>,
        from: Option<&StateSnapshot>,
        to: &StateSnapshot,
        action: impl Into<String>,
        metadata: ChangeMetadata,
    ) -> Result<Event> {
        self.write(crate::persister::request(governor.as_ref(), from, to, action.into(), metadata)?)
            .await
    }

    /// Makes this transaction the one that answers for an idempotency key. `Some` is the answer that was
    /// given before: return it, and write nothing. `None`: go on, and say with
    /// [`answer`](Transaction::answer) what is to be kept; the answer is kept in the transaction's own
    /// commit, so that of all who come with this key one is applied and the others get its answer.
    ///
    /// Keys are of the whole store. [`TransactionManager::execute_once`](crate::TransactionManager::execute_once)
    /// does all this in one call.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible key, a second key in one transaction, or a key that
    /// answered a single write; [`Error::SerializationError`] when the answer is no `T`.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let manager = TransactionManager::new(StateStore::in_memory());
    /// # let why = || ChangeMetadata::new("docs", "example", None);
    /// let pay = async || manager.execute_transaction("shop", |tx| async move {
    ///     if let Some(receipt) = tx.idempotency_key("payment-4711").await? {
    ///         return Ok(receipt);
    ///     }
    ///     let paid = StateSnapshot::new("order-1".into(), json!({"paid": true}), why());
    ///     let version = tx.save_state("shop", "order-1", paid, why()).await?;
    ///     let receipt = format!("paid in version {version}");
    ///     tx.answer(&receipt).await?;
    ///     Ok(receipt)
    /// }).await;
    /// assert_eq!(pay().await?, "paid in version 1");
    /// assert_eq!(pay().await?, "paid in version 1");
    /// # Ok(()) }
    /// ```
    pub async fn idempotency_key<T: DeserializeOwned>(
        &self,
        key: impl AsRef<str>,
    ) -> Result<Option<T>> {
        self.claim(key.as_ref(), None).await
    }

    /// As [`idempotency_key`](Transaction::idempotency_key), for a request that can be written down: the
    /// same key with another request is refused.
    ///
    /// # Errors
    /// As [`idempotency_key`](Transaction::idempotency_key), and [`Error::InvalidState`] when the key was
    /// used for another request.
    pub async fn idempotency_key_of<T: DeserializeOwned>(
        &self,
        key: impl AsRef<str>,
        request: &Value,
    ) -> Result<Option<T>> {
        let subject = format!("the request under the idempotency key {:?}", key.as_ref());
        crate::json::measure(request, &subject)?;
        self.claim(key.as_ref(), Some(Hash::of(request))).await
    }

    async fn claim<T: DeserializeOwned>(
        &self,
        key: &str,
        request: Option<Hash>,
    ) -> Result<Option<T>> {
        let key = CommandKey::new(key)?;
        let mut work = self.work.lock().await;
        self.refuse_late(&work)?;
        if let Some((asked, _)) = &work.command {
            let subject = format!("the idempotency key {:?}", key.text());
            let reason = format!("this transaction has {:?} already", asked.key.text());
            return Err(Error::refused(subject, reason));
        }
        let asked = Asked::of(&key, request);
        // What is under way may be the very same command: its effect must not be seen without its answer.
        self.leave_line(&mut work).await?;
        let view = self.view(&mut work).await?;
        let there = view.reader().command(&key.0).await;
        let Some(there) = there? else {
            work.command = Some((asked, Progress::Running(Value::Null)));
            return Ok(None);
        };
        asked.check(&there)?;
        let Answered::Value(value) = &there.answer else {
            let subject = format!("the idempotency key {:?}", key.text());
            return Err(Error::refused(subject, "it was used for a single write"));
        };
        let answer = T::deserialize(value).map_err(|source| Error::SerializationError {
            subject: format!("the answer under the idempotency key {:?}", key.text()),
            source: crate::json::without_values(source),
        })?;
        work.command = Some((asked, Progress::Answered));
        Ok(Some(answer))
    }

    /// What is kept as the answer under the [idempotency key](Transaction::idempotency_key); `null`
    /// without it.
    ///
    /// # Errors
    /// [`Error::InvalidState`] without a key; [`Error::SerializationError`] for what is no JSON.
    pub async fn answer<T: Serialize>(&self, answer: &T) -> Result<()> {
        let subject = || "the answer of a transaction".to_owned();
        let value = serde_json::to_value(answer)
            .map_err(|source| Error::SerializationError { subject: subject(), source })?;
        crate::json::measure(&value, &subject())?;
        let mut work = self.work.lock().await;
        self.refuse_late(&work)?;
        match &mut work.command {
            Some((_, Progress::Running(kept))) => {
                *kept = value;
                Ok(())
            }
            Some(_) => Err(Error::refused(subject(), "it was answered before")),
            None => Err(Error::refused(subject(), "it has no idempotency key")),
        }
    }

    async fn write(&self, mut request: Request) -> Result<Event> {
        let context = &mut request.metadata.context;
        context.insert(TRANSACTION_CONTEXT.to_owned(), self.id.clone().into());
        let mut work = self.work.lock().await;
        if work.was_answered() {
            let subject = format!("a change of {} in a transaction", request.address);
            return Err(Error::refused(subject, "its idempotency key was answered before"));
        }
        // An event each, and a head each state: more than a commit takes is not gathered first.
        let changed = work.states.values().filter(|touched| !touched.steps.is_empty());
        let writes = changed.map(|touched| touched.steps.len() + 1).sum();
        refuse_many(writes, &self.records.limits())?;
        self.read(&mut work, std::slice::from_ref(&request.address)).await?;
        // One time for all that it changes: so a cut at any time shows all of it or nothing.
        let now = *work.now.get_or_insert_with(|| self.records.options().clock.now());
        let Some(touched) = work.states.get_mut(&request.address) else {
            return Err(Error::refused(request.address.to_string(), "it was not read"));
        };
        let policy = &self.records.options().persistence;
        let step = self.records.plan_at(now, touched.head(), &request, policy)?;
        let event = step.head.change.event(touched.head().map(|head| &head.change));
        touched.steps.push(step);
        Ok(event)
    }

    fn refuse_late(&self, work: &Work) -> Result<()> {
        if work.over {
            let reason = "it was used after its closure had ended";
            return Err(Error::refused("a transaction's handle", reason));
        }
        Ok(())
    }

    /// The view through which everything is read. It stays: a read that is given up must not move the cut.
    async fn view(&self, work: &mut Work) -> Result<Arc<View>> {
        if let Some(view) = &work.view {
            return Ok(Arc::clone(view));
        }
        let view = Arc::new(self.records.view(self.deadline).await?);
        work.view = Some(Arc::clone(&view));
        Ok(view)
    }

    /// What was seen at the end of the line must be part of the cut that all else comes from.
    async fn leave_line(&self, work: &mut Work) -> Result<()> {
        let pending = work.states.iter().find_map(|(address, touched)| match &touched.seen {
            Seen::Pending(pending) => Some((address.clone(), pending.clone())),
            Seen::Known(_) => None,
        });
        let Some((address, mut pending)) = pending else { return Ok(()) };
        let is_durable = pending.is_durable(self.deadline).await;
        let view = self.view(work).await?;
        let found = view.reader().head(&address).await?;
        // With its notes, on which the steps so far were planned too: a clean-up may have come in between.
        let is_same = found.as_ref().is_some_and(|known| known.head == pending.head);
        if !is_durable || !is_same {
            work.spoiled = Some(gone(&address, &pending));
            return Err(gone(&address, &pending));
        }
        if let Some(touched) = work.states.get_mut(&address) {
            touched.seen = Seen::Known(found);
        }
        Ok(())
    }

    /// Reads what was not read yet; everything through the same view.
    async fn read(&self, work: &mut Work, addresses: &[Address]) -> Result<()> {
        self.refuse_late(work)?;
        let mut missing: Vec<Address> = addresses.to_vec();
        missing.sort_unstable();
        missing.dedup();
        missing.retain(|address| !work.states.contains_key(address));
        if missing.is_empty() {
            return Ok(());
        }
        self.leave_line(work).await?;
        let view = self.view(work).await?;
        let found = view.reader().heads(&missing).await;
        for (address, base) in missing.into_iter().zip(found?) {
            work.states.insert(address, Touched { seen: Seen::Known(base), steps: Vec::new() });
        }
        Ok(())
    }

    /// Closes the handle and takes what it gathered. The view ends here, before the commit.
    pub(crate) async fn end(&self) -> Work {
        let mut work = self.work.lock().await;
        let gathered = std::mem::take(&mut *work);
        work.over = true;
        Work { view: None, ..gathered }
    }
}
