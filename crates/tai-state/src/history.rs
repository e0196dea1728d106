//! Reading the past of a state: as it was at a version or a time, and its events.

mod times;

use std::collections::VecDeque;
use std::fmt;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::chain::{Change, format_time};
use crate::clock::new_event_id;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::json::refuse_deep;
use crate::keys::Address;
use crate::records::KnownHead;
use crate::schema;
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{ChangeAndBefore, StateRecord, StateStore, not_found};
use crate::transition::{Expect, Request, Wish};

/// Events in memory at once while a history is read.
const PAGE: usize = 500;

/// A point in the history of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointInTime {
    /// The version.
    Version(u64),
    /// The newest version that is not later.
    Time(DateTime<Utc>),
}

impl From<u64> for PointInTime {
    fn from(version: u64) -> Self {
        Self::Version(version)
    }
}

impl From<DateTime<Utc>> for PointInTime {
    fn from(time: DateTime<Utc>) -> Self {
        Self::Time(time)
    }
}

/// The events of a state in pages, or one by one. A page is in memory at once.
pub struct History<'a> {
    store: &'a StateStore,
    address: Address,
    next: u64,
    last: u64,
    before: Option<Change>,
    read: VecDeque<Event>,
}

/// Without what was read.
impl fmt::Debug for History<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, next, last, .. } = self;
        f.debug_struct("History")
            .field("address", address)
            .field("next", next)
            .field("last", last)
            .finish_non_exhaustive()
    }
}

impl History<'_> {
    /// The next events, oldest first; empty at the end. What is read is proved: no version is
    /// missing, and each event follows from the one before it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first version that does not fit.
    pub async fn next_page(&mut self) -> Result<Vec<Event>> {
        if !self.read.is_empty() {
            return Ok(std::mem::take(&mut self.read).into());
        }
        let changes = self.read_changes().await?;
        let mut events = Vec::with_capacity(changes.len());
        for change in changes {
            events.push(change.event(self.before.as_ref()));
            self.before = Some(change);
        }
        Ok(events)
    }

    /// The next event, the oldest first; `None` at the end.
    ///
    /// # Errors
    /// As [`next_page`](History::next_page).
    pub async fn next(&mut self) -> Result<Option<Event>> {
        if self.read.is_empty() {
            self.read = self.next_page().await?.into();
        }
        Ok(self.read.pop_front())
    }

    /// The next changes, without the states before them; empty at the end.
    pub(crate) async fn next_changes(&mut self) -> Result<Vec<Change>> {
        let changes = self.read_changes().await?;
        if let Some(last) = changes.last() {
            self.before = Some(last.clone());
        }
        Ok(changes)
    }

    async fn read_changes(&mut self) -> Result<Vec<Change>> {
        let next = self.next;
        let read = self.read_kept().await;
        if matches!(read, Err(Error::Corrupt { .. })) {
            self.next = next;
            self.store.refuse_trimmed(&self.address, next).await?;
        }
        read
    }

    async fn read_kept(&mut self) -> Result<Vec<Change>> {
        if self.next > self.last {
            return Ok(Vec::new());
        }
        let reader = self.store.records.reader();
        let changes = reader.changes(&self.address, self.next, self.last, PAGE).await?;
        let mut hash = self.before.as_ref().map(|change| change.hash);
        for change in &changes {
            let broken_chain = hash.is_some() && change.prev_hash != hash;
            if change.version != self.next || broken_chain {
                return Err(missing(&self.address, self.next));
            }
            hash = Some(change.hash);
            self.next += 1;
        }
        if changes.is_empty() {
            return Err(missing(&self.address, self.next));
        }
        Ok(changes)
    }
}

fn deleted_then(address: &Address, at: &str) -> Error {
    not_found(address, format!("{at}: it was deleted then"))
}

pub(crate) fn missing(address: &Address, version: u64) -> Error {
    Error::corrupt(
        format!("the log of {address} at v{version}"),
        "the event is missing or does not follow from the one before it",
    )
}

impl StateStore {
    /// A state as it was at a version.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when it never had that version or was deleted then,
    /// [`Error::HistoryTrimmed`] when that part is not kept any more.
    pub async fn state_at_version(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        version: u64,
    ) -> Result<StateSnapshot> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        if self.records.reads_are_cheap() {
            return Ok(self.record_at_version(governor, state, version).await?.snapshot);
        }
        // An event proves itself; only when it is not there the head must say why. So one that was given up
        // and still stands, while a clean-up or a purge is under way, is still found here.
        let found = self.records.reader().changes_at(&address, &[version]).await?;
        let change = match found.into_iter().next().flatten() {
            Some(change) => change,
            None => {
                let head = self.history_head(&address, version).await?;
                self.change_at(&address, &head, version).await?
            }
        };
        if change.deleted {
            return Err(deleted_then(&address, &format!(" at v{version}")));
        }
        Ok(change.snapshot())
    }

    /// As [`state_at_version`](StateStore::state_at_version), with all that was noted beside it.
    ///
    /// # Errors
    /// As [`state_at_version`](StateStore::state_at_version).
    pub async fn record_at_version(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        version: u64,
    ) -> Result<StateRecord> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let head = self.history_head(&address, version).await?;
        let change = self.change_at(&address, &head, version).await?;
        if change.deleted {
            return Err(deleted_then(&address, &format!(" at v{version}")));
        }
        Ok(StateRecord::new(&change, head.head.first_version))
    }

    /// A state as it was at a time: the newest version that is not later. Of several versions with
    /// the same time that is the last.
    ///
    /// # Errors
    /// As [`state_at_version`](StateStore::state_at_version).
    pub async fn state_at_time(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        time: DateTime<Utc>,
    ) -> Result<StateSnapshot> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        if self.records.reads_are_cheap() {
            return Ok(self.record_at_time(governor, state, time).await?.snapshot);
        }
        let found = match time < schema::FIRST_TIME {
            true => None,
            false => self.records.reader().newest_until(&address, &time).await?,
        };
        match found {
            Some(change) if change.deleted => {
                Err(deleted_then(&address, &format!(" at {}", format_time(&time))))
            }
            Some(change) => Ok(change.snapshot()),
            None => Err(self.nothing_until(&address, &time).await),
        }
    }

    /// Why there is nothing of a state at a time.
    async fn nothing_until(&self, address: &Address, time: &DateTime<Utc>) -> Error {
        let at = format!(" at {}", format_time(time));
        match self.records.head(address).await {
            Ok(Some(head)) if head.head.first_version > 1 => {
                trimmed(address, &head, at.trim_start())
            }
            Ok(_) => not_found(address, at),
            Err(error) => error,
        }
    }

    /// As [`state_at_time`](StateStore::state_at_time), with all that was noted beside it.
    ///
    /// # Errors
    /// As [`state_at_version`](StateStore::state_at_version).
    pub async fn record_at_time(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        time: DateTime<Utc>,
    ) -> Result<StateRecord> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let at = format!(" at {}", format_time(&time));
        let head = known.ok_or_else(|| not_found(&address, at.clone()))?;
        let first = head.head.first_version;
        match self.newest_until(&address, &head, time).await? {
            Some(change) if change.deleted => Err(deleted_then(&address, &at)),
            Some(change) => Ok(StateRecord::new(&change, first)),
            None if first > 1 => Err(trimmed(&address, &head, at.trim_start())),
            None => Err(not_found(&address, at)),
        }
    }

    /// # Errors
    /// [`Error::HistoryTrimmed`] when a version that is missing was cleaned up meanwhile.
    pub(crate) async fn refuse_trimmed(&self, address: &Address, version: u64) -> Result<()> {
        match self.records.head(address).await? {
            Some(newest) if newest.head.first_version > version => {
                Err(trimmed(address, &newest, &format!("v{version}")))
            }
            _ => Ok(()),
        }
    }

    /// The events of a state from one version to another, both included, oldest first.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when the state never existed, [`Error::HistoryTrimmed`] when the
    /// first of them is not kept any more.
    pub async fn history(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        versions: impl std::ops::RangeBounds<u64>,
    ) -> Result<History<'_>> {
        use std::ops::Bound;
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let head = known.ok_or_else(|| not_found(&address, String::new()))?;
        let first = match versions.start_bound() {
            Bound::Included(first) => Some(*first),
            Bound::Excluded(before) => Some(before.saturating_add(1)),
            Bound::Unbounded => None,
        };
        let last = match versions.end_bound() {
            Bound::Included(last) => *last,
            Bound::Excluded(end) => end.saturating_sub(1),
            Bound::Unbounded => u64::MAX,
        };
        let first_kept = head.head.first_version;
        if first.is_some_and(|first| first.max(1) < first_kept) {
            return Err(trimmed(&address, &head, &format!("v{}", first.unwrap_or(1))));
        }
        refuse_before_the_cut(&address, &head, last)?;
        let next = first.unwrap_or(first_kept).max(first_kept);
        let last = last.min(head.head.version());
        let before = if next > first_kept && next <= last {
            Some(self.change_at(&address, &head, next - 1).await?)
        } else {
            None
        };
        Ok(History { store: self, address, next, last, before, read: VecDeque::new() })
    }

    /// The events of a state from one time to another, both included, oldest first.
    ///
    /// # Errors
    /// As [`history`](StateStore::history): [`Error::HistoryTrimmed`] too when what is kept begins
    /// later than `from`, so that some of them may not be kept any more.
    pub async fn events_between(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        from: DateTime<Utc>,
        to: DateTime<Utc>,
    ) -> Result<History<'_>> {
        self.history_between(governor, state, Some(from.into()), Some(to.into())).await
    }

    /// The events of a state from one point in time to another, both included, oldest first.
    ///
    /// # Errors
    /// As [`events_between`](StateStore::events_between).
    pub async fn history_between(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        from: Option<PointInTime>,
        to: Option<PointInTime>,
    ) -> Result<History<'_>> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let head = known.ok_or_else(|| not_found(&address, String::new()))?;
        let time = |point| match point {
            Some(PointInTime::Time(time)) => Some(time),
            _ => None,
        };
        let (mut next, mut last) =
            self.versions_between(&address, &head, time(from), time(to)).await?;
        if let Some(PointInTime::Version(first)) = from {
            if first.max(1) < head.head.first_version {
                return Err(trimmed(&address, &head, &format!("v{first}")));
            }
            next = first.max(1);
        }
        if let Some(PointInTime::Version(version)) = to {
            refuse_before_the_cut(&address, &head, version)?;
            last = version.min(head.head.version());
        }
        let before = if next > head.head.first_version && next <= last {
            Some(self.change_at(&address, &head, next - 1).await?)
        } else {
            None
        };
        Ok(History { store: self, address, next, last, before, read: VecDeque::new() })
    }

    /// A state as it was at a point in time, with all that was noted beside it.
    ///
    /// # Errors
    /// As [`state_at_version`](StateStore::state_at_version).
    pub async fn record_at(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        point: impl Into<PointInTime>,
    ) -> Result<StateRecord> {
        match point.into() {
            PointInTime::Version(version) => self.record_at_version(governor, state, version).await,
            PointInTime::Time(time) => self.record_at_time(governor, state, time).await,
        }
    }

    /// What changed in the data of a state from one point in time to another, as a JSON Patch
    /// (RFC 6902): applied to the first it gives the second. Where the state did not exist or was
    /// deleted, its data count as `null`; version 0 is before it existed.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
    /// # use serde_json::json;
    /// # use tai_state::*;
    /// # let store = StateStore::in_memory();
    /// # let why = || ChangeMetadata::new("docs", "example", None);
    /// for n in 1..=3 {
    ///     let state = StateSnapshot::new("s".into(), json!({"n": n, "same": true}), why());
    ///     store.save_state("g", "s", state, why()).await?;
    /// }
    /// let patch = store.diff("g", "s", 1, 3).await?;
    /// assert_eq!(patch, json!([{"op": "replace", "path": "/n", "value": 3}]));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when it never existed or never had that version;
    /// [`Error::HistoryTrimmed`].
    pub async fn diff(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        from: impl Into<PointInTime>,
        to: impl Into<PointInTime>,
    ) -> Result<Value> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let (from, to) = (from.into(), to.into());
        let known = self.records.head(&address).await?;
        let head = known.ok_or_else(|| not_found(&address, String::new()))?;
        let (from, to) =
            (self.data_at(&address, &head, from).await?, self.data_at(&address, &head, to).await?);
        let patch = json_patch::diff(&from, &to);
        serde_json::to_value(patch)
            .map_err(|source| Error::SerializationError { subject: address.to_string(), source })
    }

    async fn data_at(
        &self,
        address: &Address,
        head: &KnownHead,
        point: PointInTime,
    ) -> Result<Value> {
        let first = head.head.first_version;
        match point {
            PointInTime::Version(0) if first == 1 => Ok(Value::Null),
            PointInTime::Version(version) if version < first => {
                Err(trimmed(address, head, &format!("v{version}")))
            }
            PointInTime::Version(version) if version > head.head.version() => {
                Err(not_found(address, format!(" at v{version}")))
            }
            PointInTime::Version(version) => Ok(self.change_at(address, head, version).await?.data),
            PointInTime::Time(time) => match self.newest_until(address, head, time).await? {
                Some(change) => Ok(change.data),
                None if first > 1 => Err(trimmed(address, head, &format_time(&time))),
                None => Ok(Value::Null),
            },
        }
    }

    /// Makes a state what it was at a point in time, as a new version on top: nothing of the history
    /// is undone. The context of its event has `reverted_to`, the version that it repeats. Somebody
    /// who is faster is not overwritten.
    ///
    /// # Errors
    /// As [`state_at_version`](StateStore::state_at_version); [`Error::VersionConflict`] when the
    /// state changed meanwhile.
    pub async fn revert(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        to: impl Into<PointInTime>,
        metadata: ChangeMetadata,
    ) -> Result<Event> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let newest = known.ok_or_else(|| not_found(&address, String::new()))?.head.version();
        let then = self.record_at(governor, state, to).await?.snapshot;
        let mut metadata = metadata.with_context("reverted_to", then.version);
        refuse_deep(metadata.context.values_mut(), &address.to_string())?;
        let request = Request {
            address,
            id: new_event_id().to_string(),
            action: "revert".to_owned(),
            metadata,
            wish: Wish::Put(then.data),
            expect: Expect::Version(newest),
            at: None,
            based_on: then.causality,
        };
        let policy = &self.records.options().persistence;
        let (change, before) = self.records.apply(&request, policy, &self.conditions).await?;
        Ok(change.event(before.as_ref().map(|head| &head.change)))
    }

    pub(crate) fn history_of(&self, address: Address, head: &KnownHead) -> History<'_> {
        let (next, last) = (head.head.first_version, head.head.version());
        History { store: self, address, next, last, before: None, read: VecDeque::new() }
    }

    /// The head of a state that has, or had, this version.
    pub(crate) async fn history_head(&self, address: &Address, version: u64) -> Result<KnownHead> {
        let known = self.records.head(address).await?;
        let at = format!(" at v{version}");
        let head = known.ok_or_else(|| not_found(address, at.clone()))?;
        if version == 0 || version > head.head.version() {
            return Err(not_found(address, at));
        }
        if version < head.head.first_version {
            return Err(trimmed(address, &head, &format!("v{version}")));
        }
        Ok(head)
    }

    /// The change that made a version which must be there.
    pub(crate) async fn change_at(
        &self,
        address: &Address,
        head: &KnownHead,
        version: u64,
    ) -> Result<Change> {
        if version == head.head.version() {
            return Ok(head.head.change.clone());
        }
        let found = self.records.reader().changes_at(address, &[version]).await?;
        match found.into_iter().next().flatten() {
            Some(change) => Ok(change),
            None => {
                self.refuse_trimmed(address, version).await?;
                Err(missing(address, version))
            }
        }
    }

    pub(crate) async fn change_and_before(
        &self,
        address: &Address,
        head: &KnownHead,
        version: u64,
    ) -> Result<ChangeAndBefore> {
        let change = self.change_at(address, head, version).await?;
        let before = match version - 1 {
            0 => None,
            before if before < head.head.first_version => None,
            before => Some(self.change_at(address, head, before).await?),
        };
        Ok((change, before))
    }
}

/// What ends before the history that is kept is not empty, it is gone.
fn refuse_before_the_cut(address: &Address, head: &KnownHead, last: u64) -> Result<()> {
    if last == 0 || last >= head.head.first_version {
        return Ok(());
    }
    Err(trimmed(address, head, &format!("up to v{last}")))
}

pub(crate) fn trimmed(address: &Address, head: &KnownHead, asked: &str) -> Error {
    Error::HistoryTrimmed {
        governor: address.governor.id(),
        state: address.state.id(),
        asked: asked.to_owned(),
        first_version: head.head.first_version,
    }
}
