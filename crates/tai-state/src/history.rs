//! Reading the past: a state at a version or a time, its events, and the whole log as lines.

use std::io::Write;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::chain::{Change, Hash, Hasher, format_time};
use crate::clock_vector::VectorClockSnapshot;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::json::{write_canonical, write_string};
use crate::keys::Address;
use crate::records::KnownHead;
use crate::state::{ChangeMetadata, StateSnapshot};
use crate::store::{ChangeAndBefore, StateRecord, StateStore, not_found};
use crate::transition::{Expect, Request, Wish, check_input};

/// Events in memory at once while a history is read.
const PAGE: usize = 500;

/// One transition as it is exported and imported: one JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransitionLine {
    /// Whose state.
    pub governor_id: String,
    /// Which state.
    pub state_id: String,
    /// What was done.
    pub action: String,
    /// When.
    pub timestamp: DateTime<Utc>,
    /// Who did it.
    pub actor: String,
    /// Why; absent when nothing was said.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The state after it; `null` after a deletion.
    pub data: Value,
    /// Whether it deleted the state; absent when not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

impl TransitionLine {
    /// Reads one line. Keys that stand twice, unknown keys and numbers that would be rounded are
    /// refused.
    ///
    /// # Errors
    /// [`Error::SerializationError`] naming `subject`.
    pub fn parse(line: &str, subject: &str) -> Result<Self> {
        let value = crate::json::parse(line, subject)?;
        serde_json::from_value(value)
            .map_err(|source| Error::SerializationError { subject: subject.to_owned(), source })
    }

    /// Checks what can be checked without a store: ids, sizes, depth, and that a deletion has no
    /// data.
    ///
    /// # Errors
    /// [`Error::InvalidState`] or [`Error::TooLarge`], naming `subject`.
    pub fn check(&self, subject: &str) -> Result<()> {
        let at = |error: Error| match error {
            Error::InvalidState { subject: what, reason } => {
                Error::refused(format!("{subject}: {what}"), reason)
            }
            Error::TooLarge { what, size, limit } => {
                Error::TooLarge { what: format!("{subject}: {what}"), size, limit }
            }
            error => error,
        };
        if self.deleted && !self.data.is_null() {
            return Err(Error::refused(subject, "it deletes the state and has data"));
        }
        let request = Request {
            address: Address::new(&self.governor_id, &self.state_id).map_err(at)?,
            id: self.identity(0),
            action: self.action.clone(),
            metadata: ChangeMetadata::new(&self.actor, &self.reason, None),
            wish: Wish::Put(self.data.clone()),
            expect: Expect::Any,
            at: Some(self.timestamp),
            based_on: VectorClockSnapshot::new(),
        };
        check_input(&request).map_err(at)
    }

    /// The identity of this transition when it is imported: a UUID made of what the line says, and
    /// of how many equal lines stood before it. So the same line gets the same identity in every
    /// run, and two equal lines are two transitions.
    #[must_use]
    pub fn identity(&self, equal_before: u64) -> String {
        let mut hasher = Hasher::default();
        // Hashing does not fail.
        let _ = self.write(&mut hasher);
        let _ = hasher.write_all(&equal_before.to_be_bytes());
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(hasher.finish().as_bytes()).for_each(|(to, from)| *to = *from);
        uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
    }

    /// Writes the line in its canonical form, with the newline.
    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        for (name, text) in [
            ("{\"governor_id\":", self.governor_id.as_str()),
            (",\"state_id\":", &self.state_id),
            (",\"action\":", &self.action),
            (",\"timestamp\":", &format_time(&self.timestamp)),
            (",\"actor\":", &self.actor),
        ] {
            out.write_all(name.as_bytes())?;
            write_string(text, out)?;
        }
        if !self.reason.is_empty() {
            out.write_all(b",\"reason\":")?;
            write_string(&self.reason, out)?;
        }
        out.write_all(b",\"data\":")?;
        write_canonical(&self.data, out)?;
        if self.deleted {
            out.write_all(b",\"deleted\":true")?;
        }
        out.write_all(b"}\n")
    }
}

impl From<&Change> for TransitionLine {
    fn from(change: &Change) -> Self {
        Self {
            governor_id: change.address.governor.id(),
            state_id: change.address.state.id(),
            action: change.action.clone(),
            timestamp: change.timestamp,
            actor: change.metadata.changed_by.clone(),
            reason: change.metadata.reason.clone(),
            data: change.data.clone(),
            deleted: change.deleted,
        }
    }
}

impl From<&Event> for TransitionLine {
    fn from(event: &Event) -> Self {
        Self {
            governor_id: event.governor_id.to_string(),
            state_id: event.to_state.id.to_string(),
            action: event.action.clone(),
            timestamp: event.timestamp,
            actor: event.metadata.changed_by.clone(),
            reason: event.metadata.reason.clone(),
            data: event.to_state.data.clone(),
            deleted: event.deleted,
        }
    }
}

/// What an export was, in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ExportSummary {
    /// States, deleted ones included.
    pub states: u64,
    /// Lines.
    pub transitions: u64,
    /// The SHA-256 of all lines, each with its newline.
    pub content_hash: Hash,
}

/// Counts and hashes what a log says, in canonical order: by governor, state and version, ids in
/// the order of their escaped bytes. Equal histories have equal hashes on every backend.
#[derive(Clone, Default)]
pub(crate) struct ContentHash {
    hasher: Hasher,
    line: Vec<u8>,
}

impl ContentHash {
    /// Takes the next change and gives its line, with the newline.
    pub(crate) fn push(&mut self, change: &Change) -> &[u8] {
        self.line.clear();
        // Writing to memory does not fail, nor does hashing.
        let _ = TransitionLine::from(change).write(&mut self.line);
        let _ = self.hasher.write_all(&self.line);
        &self.line
    }

    pub(crate) fn finish(self) -> Hash {
        self.hasher.finish()
    }
}

/// The events of a state in pages.
#[derive(Debug)]
pub struct History<'a> {
    store: &'a StateStore,
    address: Address,
    next: u64,
    last: u64,
    before: Option<Change>,
}

impl History<'_> {
    /// The next events, oldest first; empty at the end. What is read is proved: no version is
    /// missing, and each event follows from the one before it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first version that does not fit.
    pub async fn next_page(&mut self) -> Result<Vec<Event>> {
        let changes = self.next_changes().await?;
        let mut events = Vec::with_capacity(changes.len());
        for change in changes {
            events.push(change.event(self.before.as_ref()));
            self.before = Some(change);
        }
        Ok(events)
    }

    async fn next_changes(&mut self) -> Result<Vec<Change>> {
        if self.next > self.last {
            return Ok(Vec::new());
        }
        let reader = self.store.records.reader();
        let (changes, _) = reader.changes(&self.address, self.next, self.last, PAGE).await?;
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

fn missing(address: &Address, version: u64) -> Error {
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
        // An event proves itself; only when it is not there the head must say why.
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
        match self.records.reader().newest_until(&address, &time).await? {
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
            Ok(Some(head)) if head.head.first_version > 1 => trimmed(address, &head, &at),
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
            None if first > 1 => Err(trimmed(&address, &head, &at)),
            None => Err(not_found(&address, at)),
        }
    }

    /// The newest change that is kept and not later than a time.
    pub(crate) async fn newest_until(
        &self,
        address: &Address,
        head: &KnownHead,
        time: DateTime<Utc>,
    ) -> Result<Option<Change>> {
        if head.head.change.timestamp <= time {
            return Ok(Some(head.head.change.clone()));
        }
        if self.records.reads_are_cheap() {
            return self.newest_by_halving(address, head, time).await;
        }
        let found = self.records.reader().newest_until(address, &time).await?;
        // What was given up may still stand for a while.
        Ok(found.filter(|change| change.version >= head.head.first_version))
    }

    /// Times never fall with rising versions, so it is found by halving.
    async fn newest_by_halving(
        &self,
        address: &Address,
        head: &KnownHead,
        time: DateTime<Utc>,
    ) -> Result<Option<Change>> {
        let (mut low, mut high) = (head.head.first_version, head.head.version());
        let mut newest = None;
        while low <= high {
            let middle = low + (high - low) / 2;
            let change = self.change_at(address, head, middle).await?;
            if change.timestamp <= time {
                low = middle + 1;
                newest = Some(change);
            } else {
                high = middle - 1;
            }
        }
        Ok(newest)
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
        let next = first.unwrap_or(first_kept).max(first_kept);
        let last = last.min(head.head.version());
        let before = if next > first_kept && next <= last {
            Some(self.change_at(&address, &head, next - 1).await?)
        } else {
            None
        };
        Ok(History { store: self, address, next, last, before })
    }

    /// Writes the whole log, or that of one governor, as lines of [`TransitionLine`] in canonical
    /// order. Each state is read up to the version that its head has when it is reached.
    ///
    /// # Errors
    /// What reading meets, [`Error::Corrupt`] included, and [`Error::Storage`] when `out` refuses.
    pub async fn export(
        &self,
        governor: Option<&str>,
        out: &mut (dyn Write + Send),
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<ExportSummary> {
        let mut content = ContentHash::default();
        let (mut states, mut transitions) = (0, 0);
        let mut walk = self.walk(governor)?;
        while let Some(page) = walk.next_page().await? {
            for (address, head) in page {
                states += 1;
                let mut history = self.history_of(address, &head);
                while history.next <= history.last {
                    let changes = history.next_changes().await?;
                    for change in &changes {
                        out.write_all(content.push(change)).map_err(|error| Error::Storage {
                            location: "the export's output".into(),
                            reason: error.to_string(),
                        })?;
                        transitions += 1;
                    }
                    history.before = changes.into_iter().next_back();
                    progress(transitions);
                }
            }
        }
        Ok(ExportSummary { states, transitions, content_hash: content.finish() })
    }

    fn history_of(&self, address: Address, head: &KnownHead) -> History<'_> {
        let (next, last) = (head.head.first_version, head.head.version());
        History { store: self, address, next, last, before: None }
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
        found.into_iter().next().flatten().ok_or_else(|| missing(address, version))
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

fn trimmed(address: &Address, head: &KnownHead, asked: &str) -> Error {
    Error::HistoryTrimmed {
        governor: address.governor.id(),
        state: address.state.id(),
        asked: asked.to_owned(),
        first_version: head.head.first_version,
    }
}
