//! [`StateMachinePersister`]: log transitions, and load a state from its log.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::chain::Change;
use crate::clock::new_event_id;
use crate::clock_vector::VectorClockSnapshot;
use crate::conditions::Conditions;
use crate::config::PersistenceConfig;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::json::{MAX_DEPTH, depth_exceeds, refuse_deep, too_deep};
use crate::keys::Address;
use crate::records::Records;
use crate::replay::Replay;
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{StateStore, not_found};
use crate::transition::{Expect, Head, Request, Wish};

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
    records: Arc<Records>,
    conditions: Conditions,
    config: PersistenceConfig,
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

    /// The state is deleted.
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
    /// [`Error::VersionConflict`] when the state is not at `from`; nothing is written then.
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
    /// [`Error::StateNotFound`] for the deletion of nothing.
    pub async fn append(&self, transition: NewTransition) -> Result<Event> {
        let NewTransition { governor, state, mut request } = transition;
        let data = match &mut request.wish {
            Wish::Put(data) => Some(data),
            Wish::Delete => None,
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
    /// missing or damaged is passed over for the one before it. Without `auto_replay` the head is
    /// returned as it is.
    ///
    /// # Errors
    /// [`Error::StateNotFound`]; [`Error::Corrupt`] when log and head disagree, or the log has
    /// a gap.
    pub async fn load_state(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<(StateSnapshot, bool)> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let alive = known.filter(|known| !known.head.change.deleted);
        let head = alive.ok_or_else(|| not_found(&address, String::new()))?.head;
        if !self.config.auto_replay {
            return Ok((head.change.snapshot(), false));
        }
        let replayed = self.replay(&address, &head).await?;
        if replayed.as_ref() != Some(&head.change) {
            return Err(Error::corrupt(
                format!("the head of {address}"),
                "it is not what its log says",
            ));
        }
        Ok((head.change.snapshot(), true))
    }

    /// Folds the log from the newest saved snapshot that can be used. The snapshot and what follows it
    /// are read at the same time.
    async fn replay(&self, address: &Address, head: &Head) -> Result<Option<Change>> {
        let reader = self.records.reader();
        let batch = self.config.max_replay_batch_size.max(1);
        let page = |from| async move {
            if from > head.version() {
                return Ok(Vec::new());
            }
            let (changes, _) = reader.changes(address, from, head.version(), batch).await?;
            if changes.is_empty() {
                return Err(Error::corrupt(
                    format!("the log of {address} at v{from}"),
                    "the event is missing",
                ));
            }
            Ok(changes)
        };
        let mut started = None;
        for version in head.snapshot_versions.iter().rev() {
            let (base, tail) = tokio::join!(reader.snapshot(address, *version), page(version + 1));
            match base {
                Ok(Some(base)) => {
                    started = Some((Replay::from_base(base), tail?));
                    break;
                }
                Ok(None) => {
                    tracing::warn!(%address, version, "a saved snapshot is missing");
                }
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::warn!(%address, version, %error, "a saved snapshot is damaged");
                }
                Err(error) => return Err(error),
            }
        }
        let (mut replay, mut changes) = match started {
            Some(started) => started,
            None => (Replay::from_first(head.first_version), page(head.first_version).await?),
        };
        loop {
            changes.into_iter().try_for_each(|change| replay.push(change))?;
            if replay.next_version() > head.version() {
                break;
            }
            changes = page(replay.next_version()).await?;
        }
        tracing::debug!(%address, events = replay.folded(), "replayed");
        Ok(replay.last().cloned())
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
