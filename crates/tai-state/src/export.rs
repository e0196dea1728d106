//! The whole log as lines: what `export` writes and `import` reads, and the hash of it.

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
use crate::state::ChangeMetadata;
use crate::store::StateStore;
use crate::transition::{Expect, Request, Wish, check_input};

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
        crate::json::from_value(value, subject)
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

impl StateStore {
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
                let mut history = self.history_of(address.clone(), &head);
                let mut is_begun = false;
                loop {
                    let changes = match history.next_changes().await {
                        // Cleaned up since its head was read: what is kept of it is the whole of it now.
                        Err(error @ Error::HistoryTrimmed { .. }) if !is_begun => {
                            let newest = self.records.head(&address).await?;
                            history = self.history_of(address.clone(), &newest.ok_or(error)?);
                            continue;
                        }
                        changes => changes?,
                    };
                    if changes.is_empty() {
                        break;
                    }
                    is_begun = true;
                    for change in &changes {
                        out.write_all(content.push(change)).map_err(|error| Error::Storage {
                            location: "the export's output".into(),
                            reason: error.to_string(),
                        })?;
                        transitions += 1;
                    }
                    progress(transitions);
                }
            }
        }
        Ok(ExportSummary { states, transitions, content_hash: content.finish() })
    }
}
