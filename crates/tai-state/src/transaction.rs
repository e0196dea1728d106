//! [`TransactionManager`]: several states read and written as one.
//!
//! A transaction reads through one consistent cut and keeps its writes to itself until the end;
//! then everything is committed at once, under the condition that nothing it read has changed in
//! between. So transactions are serializable without holding a lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::clock::new_event_id;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::json::{MAX_DEPTH, depth_exceeds, too_deep};
use crate::keys::Address;
use crate::patience::Deadline;
use crate::records::{Guard, KnownHead, Records, Steps, View};
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{self, StateStore, not_found};
use crate::transition::{Expect, Head, Request, Transition as Step};

/// The key of a change's context under which the transaction's id stands.
pub const TRANSACTION_CONTEXT: &str = "transaction";

/// Runs transactions on a store.
#[derive(Debug, Clone)]
pub struct TransactionManager {
    records: Arc<Records>,
}

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
struct Work {
    view: Option<View>,
    states: BTreeMap<Address, Touched>,
    over: bool,
}

#[derive(Debug, Default)]
struct Touched {
    base: Option<KnownHead>,
    steps: Vec<Step>,
}

impl Touched {
    fn head(&self) -> Option<&Head> {
        match self.steps.last() {
            Some(step) => Some(&step.head),
            None => self.base.as_ref().map(|known| known.head.as_ref()),
        }
    }
}

/// What a transaction gave, and how often it was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completed<T> {
    /// What the closure returned.
    pub value: T,
    /// How often the closure ran; 1 when nobody was faster.
    pub attempts: u32,
}

impl TransactionManager {
    /// On this store.
    pub fn new(store: impl Into<StateStore>) -> Self {
        Self { records: store.into().records }
    }

    /// Runs a closure as one transaction. It may run more than once: when a state that it read
    /// changed before the commit, it runs again on a fresh cut. An error of its own ends
    /// the transaction with nothing written.
    ///
    /// `governor` names the transaction in logs; the closure may use any governor.
    ///
    /// # Errors
    /// The closure's own; [`Error::TransactionFailed`] after the last attempt, with the conflict as
    /// source; [`Error::OutcomeUnknown`] when the answer was lost and could not be settled.
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
        let completed = self.run(body).await?;
        tracing::debug!(
            governor = governor.as_ref(),
            attempts = completed.attempts,
            "transaction committed"
        );
        Ok(completed.value)
    }

    /// As [`execute_transaction`](TransactionManager::execute_transaction), and says how often it
    /// was tried.
    ///
    /// # Errors
    /// As [`execute_transaction`](TransactionManager::execute_transaction).
    pub async fn run<T, F, Fut>(&self, mut body: F) -> Result<Completed<T>>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let policy = self.records.options().retry.clone();
        let deadline = self.records.deadline();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let transaction = Transaction {
                records: Arc::clone(&self.records),
                id: new_event_id().to_string(),
                deadline,
                work: Arc::default(),
            };
            let outcome = body(transaction.clone()).await;
            let work = transaction.end().await;
            let value = outcome?;
            let conflict = match self.commit(work, deadline).await {
                Ok(()) => return Ok(Completed { value, attempts }),
                Err(error @ Error::VersionConflict { .. }) => error,
                Err(error) => return Err(error),
            };
            if attempts >= policy.max_attempts || deadline.is_over() {
                return Err(Error::TransactionFailed { attempts, source: Box::new(conflict) });
            }
            tracing::debug!(attempts, %conflict, "somebody was faster, running again");
            tokio::time::sleep(policy.backoff(attempts).min(deadline.left())).await;
        }
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
        Ok(self.run(body).await?.value)
    }

    async fn commit(&self, work: Work, deadline: Deadline) -> Result<()> {
        let mut groups = Vec::new();
        let mut guards = Vec::new();
        for (address, touched) in work.states {
            if touched.steps.is_empty() {
                guards.push(Guard { address, seen: touched.base });
            } else {
                groups.push(Steps { base: touched.base, transitions: touched.steps });
            }
        }
        // What only read has read one cut, once that is sure.
        if groups.is_empty() {
            return self.records.confirm(&guards, deadline).await;
        }
        self.records.commit(&groups, &guards, deadline).await
    }
}

impl Transaction {
    /// The id that stands in the context of every change of this attempt.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// As [`StateStore::get_state`], on the transaction's cut and its own writes.
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

    /// As [`StateStore::batch_get_states`], on the transaction's cut and its own writes.
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

    /// As [`StateStore::exists`], on the transaction's cut and its own writes.
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

    /// As [`StateStore::save_state`]; the version it returns comes true with the commit.
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

    /// As [`StateStore::update_state`]; the version it returns comes true with the commit.
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

    /// As [`StateStore::delete_state`]; the version it returns comes true with the commit.
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

    async fn write(&self, mut request: Request) -> Result<Event> {
        let context = &mut request.metadata.context;
        context.insert(TRANSACTION_CONTEXT.to_owned(), self.id.clone().into());
        let mut work = self.work.lock().await;
        self.read(&mut work, std::slice::from_ref(&request.address)).await?;
        let touched = work.states.entry(request.address.clone()).or_default();
        let policy = &self.records.options().persistence;
        let step = self.records.plan(touched.head(), &request, policy)?;
        let event = step.head.change.event(touched.head().map(|head| &head.change));
        touched.steps.push(step);
        Ok(event)
    }

    /// Reads what was not read yet; everything through the same view.
    async fn read(&self, work: &mut Work, addresses: &[Address]) -> Result<()> {
        if work.over {
            return Err(Error::refused(
                "a transaction's handle",
                "it was used after its closure had ended",
            ));
        }
        let mut missing: Vec<Address> = addresses.to_vec();
        missing.sort_unstable();
        missing.dedup();
        missing.retain(|address| !work.states.contains_key(address));
        if missing.is_empty() {
            return Ok(());
        }
        let view = match work.view.take() {
            Some(view) => view,
            None => self.records.view(self.deadline).await?,
        };
        let found = view.reader().heads(&missing).await;
        work.view = Some(view);
        for (address, base) in missing.into_iter().zip(found?) {
            work.states.insert(address, Touched { base, steps: Vec::new() });
        }
        Ok(())
    }

    /// Closes the handle and takes what it gathered. The view ends here, before the commit.
    async fn end(&self) -> Work {
        let mut work = self.work.lock().await;
        let gathered = std::mem::take(&mut *work);
        work.over = true;
        Work { view: None, ..gathered }
    }
}
