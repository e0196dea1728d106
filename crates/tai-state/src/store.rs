//! [`StateStore`]: save, get, update, delete and list states.

#[cfg(feature = "embedded")]
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::memory::MemoryBackend;
use crate::backend::{Backend, Identity, Kind};
use crate::chain::{Change, Hash};
use crate::clock::new_event_id;
use crate::clock_vector::VectorClockSnapshot;
use crate::conditions::{CommandKey, Conditions};
use crate::config::StoreOptions;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::fence::{Fence, GLOBAL_GOVERNOR};
use crate::id::{GovernorId, StateId};
use crate::json::refuse_deep;
use crate::keys::{Address, Name};
use crate::records::{KnownHead, Records};
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::transition::{Expect, Head, Request, Wish};
use crate::url::StoreUrl;

/// A handle on a store: cheap to clone, shared by all clones, safe to use from many tasks.
///
/// Every change is one commit that holds the new head, its event and, when due, a saved snapshot.
/// When a call that writes returns `Ok`, the change is durable.
///
/// Needs a Tokio runtime with its timer enabled (`enable_all`, as `#[tokio::main]` has it).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
/// use serde_json::json;
/// use tai_state::{ChangeMetadata, StateId, StateSnapshot, StateStore};
///
/// let store = StateStore::in_memory();
/// let why = ChangeMetadata::new("docs", "example", None);
/// let counter = StateSnapshot::new(StateId::new("counter".into()), json!({"count": 0}), why.clone());
/// assert_eq!(store.save_state("governor", "counter", counter, why).await?, 1);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct StateStore {
    pub(crate) records: Arc<Records>,
    pub(crate) conditions: Conditions,
}

impl From<&StateStore> for StateStore {
    fn from(store: &StateStore) -> Self {
        store.clone()
    }
}

impl From<Arc<StateStore>> for StateStore {
    fn from(store: Arc<StateStore>) -> Self {
        store.as_ref().clone()
    }
}

/// A state with all that the store notes beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StateRecord {
    /// Whose state it is.
    pub governor_id: GovernorId,
    /// The state; its data is `null` when it is deleted.
    pub snapshot: StateSnapshot,
    /// What made this version.
    pub action: String,
    /// The identity of the change that made this version.
    pub event_id: String,
    /// The hash of that change, which binds the whole history.
    pub hash: Hash,
    /// Whether it is deleted.
    pub deleted: bool,
    /// The oldest version whose event is kept.
    pub first_version: u64,
}

impl StateRecord {
    pub(crate) fn new(change: &Change, first_version: u64) -> Self {
        Self {
            governor_id: GovernorId::new(change.address.governor.id()),
            snapshot: change.snapshot(),
            action: change.action.clone(),
            event_id: change.id.clone(),
            hash: change.hash,
            deleted: change.deleted,
            first_version,
        }
    }

    pub(crate) fn of(head: &Head) -> Self {
        Self::new(&head.change, head.first_version)
    }
}

/// Which states a listing shows, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListOptions {
    /// Continue after this state.
    pub after: Option<StateId>,
    /// How many at most on one page; at least 1.
    pub limit: usize,
    /// Whether deleted states are shown too.
    pub include_deleted: bool,
}

impl Default for ListOptions {
    fn default() -> Self {
        Self { after: None, limit: 100, include_deleted: false }
    }
}

impl ListOptions {
    /// Continues after this state.
    #[must_use]
    pub fn after(mut self, state: impl Into<StateId>) -> Self {
        self.after = Some(state.into());
        self
    }

    /// How many at most.
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Shows deleted states too.
    #[must_use]
    pub fn with_deleted(mut self) -> Self {
        self.include_deleted = true;
        self
    }
}

/// A page of a listing.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct StatePage {
    /// The states, ascending by the bytes of their escaped ids.
    pub states: Vec<StateRecord>,
    /// Continue after this state; `None` when there is nothing more.
    pub next: Option<StateId>,
}

/// Figures of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StoreStats {
    /// Governors.
    pub total_governors: u64,
    /// States that are not deleted.
    pub total_states: u64,
    /// States that are deleted; their history is kept.
    pub deleted_states: u64,
    /// Events.
    pub total_events: u64,
    /// Saved snapshots.
    pub total_snapshots: u64,
    /// The highest version of any state.
    pub max_version: u64,
    /// Bytes of the heads that this handle remembers.
    pub cache_size_bytes: u64,
}

impl StateStore {
    /// Opens the embedded store in one file, and creates it when there is none.
    ///
    /// # Errors
    /// [`Error::NotAStore`] for anything that is not such a file, [`Error::NewerFormat`],
    /// [`Error::Corrupt`], [`Error::PermissionDenied`], [`Error::StorageFull`]; and
    /// [`Error::InvalidState`] where the disk is known to be memory (Cloud Run), unless
    /// [`StoreOptions::allow_ephemeral_disk`] is set.
    #[cfg(feature = "embedded")]
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, StoreOptions::default()).await
    }

    /// Opens the embedded store in one file with settings of one's own.
    ///
    /// # Errors
    /// As [`open`](StateStore::open).
    #[cfg(feature = "embedded")]
    pub async fn open_with(path: impl AsRef<Path>, options: StoreOptions) -> Result<Self> {
        let backend = crate::backend::embedded::EmbeddedBackend::open(
            path.as_ref(),
            options.create,
            options.allow_ephemeral_disk,
        )
        .await?;
        Ok(Self::with_backend(Arc::new(backend), options))
    }

    /// A store in memory, for tests: nothing of it outlives the process.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::in_memory_with(StoreOptions::default())
    }

    /// A store in memory with settings of one's own.
    #[must_use]
    pub fn in_memory_with(options: StoreOptions) -> Self {
        Self::with_backend(Arc::new(MemoryBackend::new()), options)
    }

    /// Opens whatever a URL names: `app.tai`, `file:///data/app.tai`, `mem:`, `firestore://project`,
    /// `firestore+emulator://127.0.0.1:8080/demo-app`. As with all of Google's clients, the environment
    /// variable `FIRESTORE_EMULATOR_HOST` leads `firestore:` to an emulator.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a URL that cannot be read; else as the backend's own opening.
    pub async fn connect(url: &str) -> Result<Self> {
        Self::connect_with(url, StoreOptions::default()).await
    }

    /// Opens whatever a URL names, with settings of one's own.
    ///
    /// # Errors
    /// As [`connect`](StateStore::connect).
    pub async fn connect_with(url: &str, options: StoreOptions) -> Result<Self> {
        match url.parse::<StoreUrl>()? {
            StoreUrl::Memory => Ok(Self::in_memory_with(options)),
            #[cfg(feature = "embedded")]
            StoreUrl::File { path } => Self::open_with(path, options).await,
            #[cfg(not(feature = "embedded"))]
            StoreUrl::File { .. } => {
                Err(Error::refused(url, "this build lacks the feature `embedded`"))
            }
            #[cfg(feature = "firestore")]
            StoreUrl::Firestore { project, database, prefix } => {
                let builder = crate::FirestoreStore::builder(project).database(database);
                let builder = builder.prefix(prefix).options(options);
                Ok(builder.connect().await?.into())
            }
            #[cfg(feature = "firestore")]
            StoreUrl::FirestoreEmulator { host, project, database, prefix } => {
                let builder = crate::FirestoreStore::builder(project).database(database);
                let builder = builder.prefix(prefix).options(options).emulator(host);
                Ok(builder.connect().await?.into())
            }
            #[cfg(not(feature = "firestore"))]
            StoreUrl::Firestore { .. } | StoreUrl::FirestoreEmulator { .. } => {
                Err(Error::refused(url, "this build lacks the feature `firestore`"))
            }
        }
    }

    /// A store on a backend of one's own.
    #[must_use]
    pub fn with_backend(backend: Arc<dyn Backend>, options: StoreOptions) -> Self {
        let records = Arc::new(Records::new(backend, options));
        Self { records, conditions: Conditions::default() }
    }

    /// For tests: whether a change of this state is under way.
    #[cfg(feature = "testing")]
    #[doc(hidden)]
    #[must_use]
    pub fn is_changing(&self, governor: &str, state: &str) -> bool {
        Address::new(governor, state)
            .is_ok_and(|address| self.records.lines.join(&address).end().is_some())
    }

    /// Which store this is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.records.identity()
    }

    /// Where it is; safe to log.
    #[must_use]
    pub fn location(&self) -> &str {
        self.records.location()
    }

    /// A handle whose every commit, by whatever way, also checks that this grant of a lock is still
    /// the newest one: the write of a holder that was paused for longer than its lease fails with
    /// [`Error::LockLost`], and nothing of it is written. Costs one check in the commit (on Firestore one
    /// billed write). What a holder does outside of the store is not protected.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use std::time::Duration;
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let store = StateStore::in_memory();
    /// # let why = || ChangeMetadata::new("docs", "example", None);
    /// let manager = TransactionManager::new(&store);
    /// let lock = manager.acquire_lock("migration", "worker-1", Duration::from_secs(30)).await?;
    /// let fenced = store.fenced_by(&lock);
    /// let step = StateSnapshot::new("migration".into(), json!({"step": 1}), why());
    /// fenced.save_state("ops", "migration", step.clone(), why()).await?;
    /// lock.release().await?;
    /// let late = fenced.save_state("ops", "migration", step, why()).await;
    /// assert!(matches!(late, Err(Error::LockLost { .. })));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn fenced_by(&self, fence: impl Into<Fence>) -> Self {
        let conditions = self.conditions.fenced_by(fence.into());
        Self { records: Arc::clone(&self.records), conditions }
    }

    /// A handle for one write under an idempotency key: whoever sends the same write with the same key
    /// again gets the first answer, and nothing is written. The answer is kept in the commit of the
    /// write, for [`StoreOptions::idempotency_ttl`] at least, and answers for as long as it is there. Keys
    /// are of the whole store. For transactions see
    /// [`Transaction::idempotency_key`](crate::Transaction::idempotency_key).
    ///
    /// # Errors
    /// [`Error::InvalidState`] or [`Error::TooLarge`] for an impossible key. Another write under a key
    /// that was used is [`Error::InvalidState`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let store = StateStore::in_memory();
    /// # let why = || ChangeMetadata::new("docs", "example", None);
    /// let order = StateSnapshot::new("order-1".into(), json!({"status": "new"}), why());
    /// let once = store.idempotency_key("request-0815")?;
    /// assert_eq!(once.save_state("shop", "order-1", order.clone(), why()).await?, 1);
    /// assert_eq!(once.save_state("shop", "order-1", order, why()).await?, 1);
    /// # Ok(()) }
    /// ```
    pub fn idempotency_key(&self, key: impl AsRef<str>) -> Result<Self> {
        let mut conditions = self.conditions.clone();
        conditions.key = Some(CommandKey::new(key.as_ref())?);
        Ok(Self { records: Arc::clone(&self.records), conditions })
    }

    /// Creates a state or overwrites it, whatever its version; returns the new version. The address
    /// in the call wins over `snapshot.id`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] or [`Error::TooLarge`] for what cannot be kept; nothing is written
    /// then.
    pub async fn save_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        snapshot: StateSnapshot,
        metadata: ChangeMetadata,
    ) -> Result<u64> {
        let address = (governor.as_ref(), state.as_ref());
        let request = put(address, "save", snapshot, Expect::Any, metadata)?;
        self.apply(&request).await
    }

    /// The newest value of a state, and its version.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when it was never saved or is deleted.
    pub async fn get_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<(StateSnapshot, u64)> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let alive = known.filter(|known| !known.head.change.deleted);
        let head = alive.ok_or_else(|| not_found(&address, String::new()))?.head;
        Ok((head.change.snapshot(), head.version()))
    }

    /// The newest record of a state, a deleted one included; `None` when it never existed.
    ///
    /// # Errors
    /// As [`get_state`](StateStore::get_state), but for the absent state.
    pub async fn record(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<Option<StateRecord>> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        Ok(known.map(|known| StateRecord::of(&known.head)))
    }

    /// Whether a state exists and is not deleted.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible id, or what reading meets.
    pub async fn exists(&self, governor: impl AsRef<str>, state: impl AsRef<str>) -> Result<bool> {
        Ok(self.record(governor, state).await?.is_some_and(|record| !record.deleted))
    }

    /// Replaces a state if it still has the version that the caller knows (0: if it does not exist);
    /// returns the new version.
    ///
    /// # Errors
    /// [`Error::VersionConflict`] with both versions when it has another; nothing is written then.
    pub async fn update_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        new: StateSnapshot,
        expected_version: u64,
        metadata: ChangeMetadata,
    ) -> Result<u64> {
        let address = (governor.as_ref(), state.as_ref());
        let expect = Expect::Version(expected_version);
        let request = put(address, "update", new, expect, metadata)?;
        self.apply(&request).await
    }

    /// Deletes a state, if it still has the version that the caller knows when one is given; returns
    /// the version of the deletion. Its history stays, and versions go on after it.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when there is nothing to delete, [`Error::VersionConflict`].
    pub async fn delete_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        expected_version: Option<u64>,
        metadata: ChangeMetadata,
    ) -> Result<u64> {
        let address = (governor.as_ref(), state.as_ref());
        let request = delete(address, expected_version, metadata)?;
        self.apply(&request).await
    }

    async fn apply(&self, request: &Request) -> Result<u64> {
        let policy = &self.records.options().persistence;
        Ok(self.records.apply(request, policy, &self.conditions).await?.0.version)
    }

    /// Those of the states that exist, in the order asked, from one consistent cut.
    ///
    /// # Errors
    /// As [`get_state`](StateStore::get_state), but for absent states.
    pub async fn batch_get_states<S: AsRef<str>>(
        &self,
        governor: impl AsRef<str>,
        states: &[S],
    ) -> Result<Vec<StateSnapshot>> {
        let addresses = addresses(governor.as_ref(), states)?;
        let heads = self.records.heads_at_once(&addresses).await?;
        Ok(alive(heads).map(|known| known.head.change.snapshot()).collect())
    }

    /// A page of the states of a governor.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible id or a limit of 0, or what reading meets.
    pub async fn list_states(
        &self,
        governor: impl AsRef<str>,
        options: &ListOptions,
    ) -> Result<StatePage> {
        if options.limit == 0 {
            return Err(Error::refused("a page of 0 states", "ask for at least one"));
        }
        let governor = Name::escape(governor.as_ref(), "governor id")?;
        let mut after = match &options.after {
            Some(state) => Some(Name::escape(state.as_str(), "state id")?),
            None => None,
        };
        let mut states = Vec::new();
        loop {
            let wanted = options.limit - states.len();
            let (heads, next) =
                self.records.reader().states(&governor, after.take(), wanted).await?;
            let shown = heads.iter().map(|(_, known)| &known.head);
            states.extend(
                shown
                    .filter(|head| options.include_deleted || !head.change.deleted)
                    .map(|head| StateRecord::of(head)),
            );
            // A page of nothing but deleted states must not look like the end.
            if next.is_none() || states.len() >= options.limit {
                let next = next.map(|name| StateId::new(name.id()));
                return Ok(StatePage { states, next });
            }
            after = next;
        }
    }

    /// The governors that have states, at most `limit` after the given one, ascending.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn list_governors(
        &self,
        after: Option<&GovernorId>,
        limit: usize,
    ) -> Result<Vec<GovernorId>> {
        let after = match after {
            Some(governor) => Some(Name::escape(governor.as_str(), "governor id")?),
            None => None,
        };
        let reader = self.records.reader();
        let mut names = reader.governors(after.as_ref(), limit).await?;
        // Locks and answers to commands stand there; that does not make it an owner of states.
        if let Some(at) = names.iter().position(|name| name.as_str() == GLOBAL_GOVERNOR)
            && let Some(global) = names.get(at).cloned()
            && reader.state_names(&global, None, 1).await?.is_empty()
        {
            names.remove(at);
            let last = names.last().cloned().max(Some(global));
            let more = if names.len() + 1 == limit {
                reader.governors(last.as_ref(), 1).await?
            } else {
                Vec::new()
            };
            names.extend(more);
        }
        Ok(names.iter().map(|name| GovernorId::new(name.id())).collect())
    }

    /// Figures of the whole store. Reads every head.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn get_stats(&self) -> Result<StoreStats> {
        let reader = self.records.reader();
        let mut stats = StoreStats {
            total_events: reader.count(None, Kind::Events).await?,
            total_snapshots: reader.count(None, Kind::Snapshots).await?,
            cache_size_bytes: self.records.cache_bytes() as u64,
            ..StoreStats::default()
        };
        let mut walk = self.walk(None)?;
        while let Some(page) = walk.next_page().await? {
            for (_, known) in &page {
                let deleted = known.head.change.deleted;
                stats.total_states += u64::from(!deleted);
                stats.deleted_states += u64::from(deleted);
                stats.max_version = stats.max_version.max(known.head.version());
            }
        }
        stats.total_governors = walk.governors_seen();
        Ok(stats)
    }

    /// The event that made a version, with the state before it.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when the state never had that version,
    /// [`Error::HistoryTrimmed`] when the event is not kept any more.
    pub async fn event(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        version: u64,
    ) -> Result<Event> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let head = self.history_head(&address, version).await?;
        let (change, before) = self.change_and_before(&address, &head, version).await?;
        Ok(change.event(before.as_ref()))
    }
}

pub(crate) fn put(
    (governor, state): (&str, &str),
    action: &str,
    mut snapshot: StateSnapshot,
    expect: Expect,
    mut metadata: ChangeMetadata,
) -> Result<Request> {
    let values = [&mut snapshot.data].into_iter().chain(metadata.context.values_mut());
    refuse_deep(values, &format!("{governor}/{state}"))?;
    Ok(Request {
        address: Address::new(governor, state)?,
        id: new_event_id().to_string(),
        action: action.to_owned(),
        metadata,
        wish: Wish::Put(snapshot.data),
        expect,
        at: None,
        based_on: snapshot.causality,
    })
}

pub(crate) fn delete(
    (governor, state): (&str, &str),
    expected_version: Option<u64>,
    mut metadata: ChangeMetadata,
) -> Result<Request> {
    refuse_deep(metadata.context.values_mut(), &format!("{governor}/{state}"))?;
    Ok(Request {
        address: Address::new(governor, state)?,
        id: new_event_id().to_string(),
        action: "delete".to_owned(),
        metadata,
        wish: Wish::Delete,
        expect: expected_version.map_or(Expect::Any, Expect::Version),
        at: None,
        based_on: VectorClockSnapshot::new(),
    })
}

pub(crate) fn addresses<S: AsRef<str>>(governor: &str, states: &[S]) -> Result<Vec<Address>> {
    states.iter().map(|state| Address::new(governor, state.as_ref())).collect()
}

pub(crate) fn alive(heads: Vec<Option<KnownHead>>) -> impl Iterator<Item = KnownHead> {
    heads.into_iter().flatten().filter(|known| !known.head.change.deleted)
}

pub(crate) fn not_found(address: &Address, at: String) -> Error {
    Error::StateNotFound { governor: address.governor.id(), state: address.state.id(), at }
}

/// What a reader of history needs: the change, and the one before it for its `from_state`.
pub(crate) type ChangeAndBefore = (Change, Option<Change>);
