//! Following what changes: every event, in order, from any version on, and again after a restart.
//!
//! The engine's alarm only says when to look. What is given out comes from the log, which has every
//! event under its version: so nothing is lost or doubled when an alarm rings late, together or
//! without need, and a feed can go on from the last version that was seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::Rung;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::keys::{Address, Name};
use crate::records::{KnownHead, Records, Watch};
use crate::replay::Replay;
use crate::store::StateStore;

/// Events, or heads of a listing, that are read at once; fewer when they are large.
const PAGE: usize = 256;
/// Heads that are read by name at once.
const LOOK: usize = 32;

/// The events of one state, in order; made by [`StateStore::watch`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
/// use serde_json::json;
/// use tai_state::{ChangeMetadata, StateSnapshot, StateStore};
///
/// let store = StateStore::in_memory();
/// let why = || ChangeMetadata::new("docs", "example", None);
/// for n in 1..=3 {
///     let counter = StateSnapshot::new("counter".into(), json!({"count": n}), why());
///     store.save_state("governor", "counter", counter, why()).await?;
/// }
/// let mut feed = store.watch("governor", "counter")?.from_version(1);
/// assert_eq!(feed.next().await?.to_state.data, json!({"count": 2}));
/// assert_eq!(feed.next().await?.to_state.data, json!({"count": 3}));
/// assert_eq!(feed.version(), 3);
/// // The next call waits for version 4.
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Feed {
    state: String,
    follow: Follow,
}

impl Feed {
    /// Gives the events after this version: 0, which is the default, for all; the last version that
    /// was seen, to go on. A version that the state has not reached yet is waited for.
    #[must_use]
    pub fn from_version(mut self, version: u64) -> Self {
        let mut position = FeedPosition::new();
        position.set(self.state.as_str(), version);
        self.follow = self.follow.restarted(position);
        self
    }

    /// Gives the events after the version that the state has now.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn from_now(mut self) -> Result<Self> {
        self.follow.skip_to_now().await?;
        Ok(self)
    }

    /// Waits for the next event. A call that is given up, as by a timeout, loses nothing.
    ///
    /// # Errors
    /// [`Error::HistoryTrimmed`] when the next event is not kept any more: start anew from the version
    /// before the first that is kept. What reading meets, [`Error::Corrupt`] included. After an error
    /// the feed stands where it stood, and the next call tries again.
    pub async fn next(&mut self) -> Result<Event> {
        self.follow.next().await
    }

    /// The version of the last event that was given, or where it started.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.follow.position.get(&self.state)
    }
}

/// The events of all states of a governor; made by [`StateStore::watch_governor`].
///
/// The events of one state come in order, each once. Between different states there is no order.
#[derive(Debug)]
pub struct GovernorFeed {
    follow: Follow,
}

impl GovernorFeed {
    /// Goes on after what was seen already; an empty position, which is the default, for everything.
    #[must_use]
    pub fn from_position(mut self, position: FeedPosition) -> Self {
        self.follow = self.follow.restarted(position);
        self
    }

    /// Gives what changes after what there is now. Reads every head of the governor.
    ///
    /// # Errors
    /// What reading meets.
    pub async fn from_now(mut self) -> Result<Self> {
        self.follow.skip_to_now().await?;
        Ok(self)
    }

    /// Waits for the next event. A call that is given up, as by a timeout, loses nothing.
    ///
    /// # Errors
    /// [`Error::HistoryTrimmed`] when the next event of a state is not kept any more: set that state's
    /// version in a copy of the [`position`](GovernorFeed::position) to the one before the first that
    /// is kept, and start anew from there. What reading meets, [`Error::Corrupt`] included. After an
    /// error the feed stands where it stood, and the next call tries again.
    pub async fn next(&mut self) -> Result<Event> {
        self.follow.next().await
    }

    /// What was given so far. Keep it after an event has been dealt with, to go on from there.
    #[must_use]
    pub fn position(&self) -> &FeedPosition {
        &self.follow.position
    }
}

/// How far a feed has come: the last version that was seen of every state. Serialises to a JSON
/// object of state ids and versions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FeedPosition(BTreeMap<String, u64>);

impl FeedPosition {
    /// Before everything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The last version that was seen of a state; 0 for none.
    #[must_use]
    pub fn get(&self, state: impl AsRef<str>) -> u64 {
        self.0.get(state.as_ref()).copied().unwrap_or(0)
    }

    /// Notes the last version that was seen of a state.
    pub fn set(&mut self, state: impl Into<String>, version: u64) {
        self.0.insert(state.into(), version);
    }

    /// All states of which something was seen, with the last version.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(state, version)| (state.as_str(), *version))
    }
}

/// A state that is ahead of what was given out.
#[derive(Debug)]
struct Target {
    address: Address,
    version: u64,
    first_version: u64,
}

impl Target {
    fn new(address: Address, head: &KnownHead) -> Self {
        let (version, first_version) = (head.head.version(), head.head.first_version);
        Self { address, version, first_version }
    }
}

/// What both feeds have in common.
struct Follow {
    records: Arc<Records>,
    governor: Name,
    /// The one state that is followed; all of the governor for `None`.
    only: Option<Name>,
    position: FeedPosition,
    watch: Option<Watch>,
    /// What was read and not given out yet, all of one state.
    ready: VecDeque<Event>,
    /// States whose events are to be read.
    targets: VecDeque<Target>,
    /// States whose heads are to be read.
    look: BTreeSet<Name>,
    /// Where a listing of all heads goes on; `None` when none is under way.
    listing: Option<Option<Name>>,
}

/// Without what was read.
impl fmt::Debug for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { governor, only, position, .. } = self;
        f.debug_struct("Follow")
            .field("governor", governor)
            .field("only", only)
            .field("position", position)
            .finish_non_exhaustive()
    }
}

impl Follow {
    fn new(records: Arc<Records>, governor: Name, only: Option<Name>) -> Self {
        Self {
            records,
            governor,
            only,
            position: FeedPosition::new(),
            watch: None,
            ready: VecDeque::new(),
            targets: VecDeque::new(),
            look: BTreeSet::new(),
            listing: None,
        }
    }

    fn restarted(self, position: FeedPosition) -> Self {
        Self { position, ..Self::new(self.records, self.governor, self.only) }
    }

    /// Every step ends with what it read being noted, so that a call can be given up anywhere.
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.position.set(event.to_state.id.as_str(), event.version());
                return Ok(event);
            }
            // The alarm is set before the first look, so that no change falls between the two.
            let watch = match &mut self.watch {
                Some(watch) => watch,
                none => {
                    let watch = self.records.watch(&self.governor, self.only.as_ref()).await?;
                    match &self.only {
                        Some(state) => drop(self.look.insert(state.clone())),
                        None => self.listing = Some(None),
                    }
                    none.insert(watch)
                }
            };
            if let Some(target) = self.targets.front() {
                let seen = self.position.get(target.address.state.id());
                if seen < target.version {
                    self.ready = events_after(&self.records, target, seen).await?;
                } else {
                    self.targets.pop_front();
                }
            } else if !self.look.is_empty() {
                self.look_at_some().await?;
            } else if let Some(after) = self.listing.clone() {
                let reader = self.records.reader();
                let (heads, next) = reader.states(&self.governor, after, PAGE).await?;
                self.listing = next.map(Some);
                heads.into_iter().for_each(|(address, head)| self.aim(address, &head));
            } else {
                match (watch.ring().await, &self.only) {
                    (Ok(_), Some(state)) => drop(self.look.insert(state.clone())),
                    (Ok(Rung::Names(names)), None) => self.look = names,
                    (Ok(Rung::Anything), None) => self.listing = Some(None),
                    (Err(error), _) => {
                        self.watch = None;
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn look_at_some(&mut self) -> Result<()> {
        let address = |state: &Name| {
            let (governor, state) = (self.governor.clone(), state.clone());
            Address { governor, state }
        };
        let addresses: Vec<Address> = self.look.iter().take(LOOK).map(address).collect();
        let heads = self.records.reader().heads(&addresses).await?;
        for (address, head) in addresses.into_iter().zip(heads) {
            self.look.remove(&address.state);
            if let Some(head) = head {
                self.aim(address, &head);
            }
        }
        Ok(())
    }

    fn aim(&mut self, address: Address, head: &KnownHead) {
        if head.head.version() > self.position.get(address.state.id()) {
            self.targets.push_back(Target::new(address, head));
        }
    }

    async fn skip_to_now(&mut self) -> Result<()> {
        let watch = self.records.watch(&self.governor, self.only.as_ref()).await?;
        let mut position = FeedPosition::new();
        let reader = self.records.reader();
        if let Some(state) = &self.only {
            let address = Address { governor: self.governor.clone(), state: state.clone() };
            if let Some(head) = reader.head(&address).await? {
                position.set(state.id(), head.head.version());
            }
        } else {
            let mut after = None;
            loop {
                let (heads, next) = reader.states(&self.governor, after, PAGE).await?;
                for (address, head) in heads {
                    position.set(address.state.id(), head.head.version());
                }
                match next {
                    Some(next) => after = Some(next),
                    None => break,
                }
            }
        }
        let fresh = Self::new(Arc::clone(&self.records), self.governor.clone(), self.only.clone());
        *self = Self { watch: Some(watch), position, ..fresh };
        Ok(())
    }
}

/// The next events of a state that is ahead, proved to follow one another; at least one.
async fn events_after(records: &Records, target: &Target, seen: u64) -> Result<VecDeque<Event>> {
    let address = &target.address;
    let (mut version, mut first_version) = (target.version, target.first_version);
    loop {
        if seen + 1 < first_version {
            return Err(Error::HistoryTrimmed {
                governor: address.governor.id(),
                state: address.state.id(),
                asked: format!("v{}", seen + 1),
                first_version,
            });
        }
        match read_after(records, address, seen, first_version, version).await {
            Err(error @ Error::Corrupt { .. }) => {
                // Old events may have been cleaned up since the head was read.
                match records.reader().head(address).await? {
                    Some(newer) if newer.head.first_version > first_version => {
                        (version, first_version) = (newer.head.version(), newer.head.first_version);
                    }
                    _ => return Err(error),
                }
            }
            outcome => return outcome,
        }
    }
}

async fn read_after(
    records: &Records,
    address: &Address,
    seen: u64,
    first_version: u64,
    last: u64,
) -> Result<VecDeque<Event>> {
    // The event before the first is read too, if there is one: it is what the first has changed.
    let mut replay = Replay::from_first(seen.max(first_version));
    let mut events = VecDeque::new();
    while events.is_empty() {
        let next = replay.next_version();
        let changes = records.reader().changes(address, next, last, PAGE).await?;
        if changes.is_empty() {
            let location = format!("the log of {address} at v{next}");
            return Err(Error::corrupt(location, "the event is missing"));
        }
        for change in changes {
            let event = (change.version > seen).then(|| change.event(replay.last()));
            replay.push(change)?;
            events.extend(event);
        }
    }
    Ok(events)
}

impl StateStore {
    /// Follows one state: every event from the first on, or from wherever the [`Feed`] is told to
    /// start, and then those that are still to come. The state need not exist yet.
    ///
    /// A feed keeps the store open as a clone of it does.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible id.
    pub fn watch(&self, governor: impl AsRef<str>, state: impl AsRef<str>) -> Result<Feed> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let records = Arc::clone(&self.records);
        let follow = Follow::new(records, address.governor, Some(address.state));
        Ok(Feed { state: state.as_ref().to_owned(), follow })
    }

    /// Follows all states of a governor, those that are still to be made included: every event from
    /// the first on, or from wherever the [`GovernorFeed`] is told to start.
    ///
    /// It remembers the version of every state that it has seen. On a file to which other processes
    /// write too, it reads all heads of the governor again after their changes, at most ten times a
    /// second.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible id.
    pub fn watch_governor(&self, governor: impl AsRef<str>) -> Result<GovernorFeed> {
        let governor = Name::escape(governor.as_ref(), "governor id")?;
        Ok(GovernorFeed { follow: Follow::new(Arc::clone(&self.records), governor, None) })
    }
}
