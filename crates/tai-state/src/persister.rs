//! [`StateMachinePersister`]: log transitions, and load a state from its log.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::clock::new_event_id;
use crate::clock_vector::VectorClockSnapshot;
use crate::conditions::Conditions;
use crate::config::PersistenceConfig;
use crate::error::Result;
use crate::event::Event;
use crate::fold::LoggedEvent;
use crate::json::{MAX_DEPTH, depth_exceeds, refuse_deep, too_deep};
use crate::keys::Address;
use crate::records::Records;
use crate::recovery::{Recovered, RecoveryReport};
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{StateStore, not_found};
use crate::transition::{Expect, Request, Wish};

/// Logs the transitions of state machines and brings their states back from the log.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
/// use serde_json::json;
/// use tai_state::{ChangeMetadata, StateId, StateMachinePersister, StateSnapshot, StateStore};
///
/// let persister = StateMachinePersister::with_defaults(StateStore::in_memory());
/// let why = || ChangeMetadata::new("docs", "example", None);
/// let state = |n| StateSnapshot::new(StateId::new("door".into()), json!({"open": n}), why());
///
/// let closed = persister.log_transition("gov", None, &state(false), "install", why()).await?;
/// persister.log_transition("gov", Some(&closed.to_state), &state(true), "open", why()).await?;
/// let (door, was_recovery) = persister.load_state("gov", "door").await?;
/// assert!(was_recovery && door.version == 2 && door.data["open"] == true);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct StateMachinePersister {
    pub(crate) records: Arc<Records>,
    pub(crate) conditions: Conditions,
    pub(crate) config: PersistenceConfig,
}

/// What came out of a [replay](StateMachinePersister::replay).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Replayed {
    /// The state; `None` when it is deleted.
    pub state: Option<StateSnapshot>,
    /// How many events were folded.
    pub events: u64,
    /// The version of the first of them.
    pub first_version: u64,
}

/// A transition with all that may be said of it; [`StateMachinePersister::append`] takes it.
///
/// [`log_transition`](StateMachinePersister::log_transition) is the short form. This one also takes
/// the transition's own time and identity, for logs that come from elsewhere.
#[derive(Debug, Clone)]
pub struct NewTransition {
    governor: String,
    state: String,
    request: Parts,
}

#[derive(Debug, Clone)]
struct Parts {
    id: Option<String>,
    action: String,
    metadata: ChangeMetadata,
    wish: Wish,
    expect: Expect,
    at: Option<DateTime<Utc>>,
    based_on: VectorClockSnapshot,
}

impl NewTransition {
    fn new(
        governor: impl Into<String>,
        state: impl Into<String>,
        action: impl Into<String>,
        wish: Wish,
        metadata: ChangeMetadata,
    ) -> Self {
        let request = Parts {
            id: None,
            action: action.into(),
            metadata,
            wish,
            expect: Expect::Any,
            at: None,
            based_on: VectorClockSnapshot::new(),
        };
        Self { governor: governor.into(), state: state.into(), request }
    }

    /// The state becomes `data`.
    pub fn to(
        governor: impl Into<String>,
        state: impl Into<String>,
        action: impl Into<String>,
        data: Value,
        metadata: ChangeMetadata,
    ) -> Self {
        Self::new(governor, state, action, Wish::Put(data), metadata)
    }

    /// The state is deleted. There must be one, unless the transition has its own
    /// [time](NewTransition::at) and is [expecting](NewTransition::expecting) version 0: a log from
    /// elsewhere, whose beginning was cleaned up there, may begin with a deletion.
    pub fn to_deleted(
        governor: impl Into<String>,
        state: impl Into<String>,
        action: impl Into<String>,
        metadata: ChangeMetadata,
    ) -> Self {
        Self::new(governor, state, action, Wish::Delete, metadata)
    }

    /// Only if the state has this version; 0 = does not exist. Without it, whatever its version.
    #[must_use]
    pub fn expecting(mut self, version: u64) -> Self {
        self.request.expect = Expect::Version(version);
        self
    }

    /// The transition's own time. Kept unless it is earlier than that of the version before.
    #[must_use]
    pub fn at(mut self, time: DateTime<Utc>) -> Self {
        self.request.at = Some(time);
        self
    }

    /// The transition's own identity: a UUID, or other text of at most 128 bytes that no other
    /// change has. Without it a new one is chosen.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<String>) -> Self {
        self.request.id = Some(id.into());
        self
    }
}

impl StateMachinePersister {
    /// With a configuration of one's own.
    pub fn new(store: impl Into<StateStore>, config: PersistenceConfig) -> Self {
        let StateStore { records, conditions } = store.into();
        Self { records, conditions, config }
    }

    /// With [`PersistenceConfig::default`].
    pub fn with_defaults(store: impl Into<StateStore>) -> Self {
        Self::new(store, PersistenceConfig::default())
    }

    /// Logs a transition and makes its state the newest, in one commit.
    ///
    /// `from` says what the transition starts from: `None` = the state must not exist; a state that
    /// was read from the store = it must still have that version; a state built by hand (version 0)
    /// = the newest data must equal its data. The state's name is `to.id`, its version is assigned.
    ///
    /// # Errors
    /// [`Error::VersionConflict`](crate::Error::VersionConflict) when the state is not at `from`; nothing is written then.
    pub async fn log_transition(
        &self,
        governor: impl AsRef<str>,
        from: Option<&StateSnapshot>,
        to: &StateSnapshot,
        action: impl Into<String>,
        metadata: ChangeMetadata,
    ) -> Result<Event> {
        let request = request(governor.as_ref(), from, to, action.into(), metadata)?;
        self.apply(&request).await
    }

    /// Logs a transition with all that may be said of it.
    ///
    /// # Errors
    /// As [`log_transition`](StateMachinePersister::log_transition);
    /// [`Error::StateNotFound`](crate::Error::StateNotFound) for the deletion of nothing.
    pub async fn append(&self, transition: NewTransition) -> Result<Event> {
        let NewTransition { governor, state, mut request } = transition;
        let data = match &mut request.wish {
            Wish::Put(data) => Some(data),
            Wish::Delete | Wish::Purge => None,
        };
        let values = data.into_iter().chain(request.metadata.context.values_mut());
        refuse_deep(values, &format!("{governor}/{state}"))?;
        let request = Request {
            address: Address::new(&governor, &state)?,
            id: request.id.unwrap_or_else(|| new_event_id().to_string()),
            action: request.action,
            metadata: request.metadata,
            wish: request.wish,
            expect: request.expect,
            at: request.at,
            based_on: request.based_on,
        };
        self.apply(&request).await
    }

    async fn apply(&self, request: &Request) -> Result<Event> {
        let (change, before) = self.records.apply(request, &self.config, &self.conditions).await?;
        Ok(change.event(before.as_ref().map(|head| &head.change)))
    }

    /// The newest value of a state, and whether it was established from the log.
    ///
    /// With [`PersistenceConfig::auto_replay`] the newest saved snapshot is loaded, the events after
    /// it are replayed on it, and the result must be what the head says. A saved snapshot that is
    /// missing or damaged is passed over for the one before it; a head that is missing, damaged or older
    /// than the log is made anew from the log and put back. Without `auto_replay` the head is
    /// returned as it is. [`recover`](StateMachinePersister::recover) says what was found.
    ///
    /// # Errors
    /// [`Error::StateNotFound`](crate::Error::StateNotFound); [`Error::Corrupt`](crate::Error::Corrupt) when log and head say different things of one
    /// version, or the log has a gap.
    pub async fn load_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<(StateSnapshot, bool)> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let change = if self.config.auto_replay {
            let batch = self.config.max_replay_batch_size;
            self.records.recover(&address, &self.conditions, batch, false).await?.change
        } else {
            let known = self.records.head(&address).await?;
            known.ok_or_else(|| not_found(&address, String::new()))?.head.change.clone()
        };
        if change.deleted {
            return Err(not_found(&address, String::new()));
        }
        Ok((change.snapshot(), self.config.auto_replay))
    }

    /// Folds the whole log of a state from where its history begins, and gives each event to `each`, the
    /// oldest first: for a read model of one's own. Proves the chain as it goes; an error of `each` ends
    /// it. At most [`PersistenceConfig::max_replay_batch_size`] events are in memory, twice.
    ///
    /// # Errors
    /// [`Error::StateNotFound`](crate::Error::StateNotFound) when it never existed;
    /// [`Error::Corrupt`](crate::Error::Corrupt) naming the first version that does not fit; what `each`
    /// returns.
    pub async fn replay(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        mut each: impl FnMut(LoggedEvent) -> Result<()> + Send,
    ) -> Result<Replayed> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let head = known.ok_or_else(|| not_found(&address, String::new()))?;
        let batch = self.config.max_replay_batch_size;
        self.records.fold_all(&address, &head, batch.max(1), &mut each).await?;
        let (newest, first) = (&head.head.change, head.head.first_version);
        let (last, state) = (newest.version, (!newest.deleted).then(|| newest.snapshot()));
        Ok(Replayed { state, events: last + 1 - first, first_version: first })
    }

    /// Establishes a state from its log as [`load_state`](StateMachinePersister::load_state) does,
    /// whatever `auto_replay` says, and makes saved snapshots anew that could not be used. Says what was
    /// found and done; the state is `None` when it is deleted.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let persister = StateMachinePersister::with_defaults(StateStore::in_memory());
    /// # let why = || ChangeMetadata::new("docs", "example", None);
    /// for n in 1..=105 {
    ///     persister.append(NewTransition::to("gov", "counter", "count", json!(n), why())).await?;
    /// }
    /// let (state, report) = persister.recover("gov", "counter").await?;
    /// assert_eq!(state.map(|state| state.data), Some(json!(105)));
    /// assert_eq!(report.base, RecoveryBase::SavedSnapshot(100));
    /// assert_eq!((report.events_replayed, report.repaired), (5, false));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`load_state`](StateMachinePersister::load_state), but for the deleted state.
    pub async fn recover(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<(Option<StateSnapshot>, RecoveryReport)> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let batch = self.config.max_replay_batch_size;
        let Recovered { change, report } =
            self.records.recover(&address, &self.conditions, batch, true).await?;
        Ok(((!change.deleted).then(|| change.snapshot()), report))
    }
}

/// What [`StateMachinePersister::log_transition`] asks for.
pub(crate) fn request(
    governor: &str,
    from: Option<&StateSnapshot>,
    to: &StateSnapshot,
    action: String,
    mut metadata: ChangeMetadata,
) -> Result<Request> {
    refuse_deep(metadata.context.values_mut(), &format!("{governor}/{}", to.id))?;
    let address = Address::new(governor, to.id.as_str())?;
    // These belong to the caller; they must only not be cloned.
    let mut lent = [Some(&to.data), from.map(|state| &state.data)].into_iter().flatten();
    if lent.any(|data| depth_exceeds(data, MAX_DEPTH)) {
        return Err(too_deep(&address.to_string()));
    }
    let expect = match from {
        None => Expect::Version(0),
        Some(state) if state.version > 0 => Expect::Version(state.version),
        Some(state) => Expect::Data(state.data.clone()),
    };
    let mut based_on = to.causality.clone();
    if let Some(from) = from {
        based_on.merge(&from.causality);
    }
    Ok(Request {
        address,
        id: new_event_id().to_string(),
        action,
        metadata,
        wish: Wish::Put(to.data.clone()),
        expect,
        at: None,
        based_on,
    })
}
