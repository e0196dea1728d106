//! Saved snapshots by hand: list them, save one now, remove what is too many.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::backend::{Document, Key};
use crate::error::Result;
use crate::keys::Address;
use crate::persister::StateMachinePersister;
use crate::retention::{PAGE, removed};
use crate::schema;
use crate::store::not_found;
use crate::transition::Head;
use crate::trim;

/// How often those that are missing are looked for, while the head changes.
const LOOKS: u32 = 6;

/// What the removal of saved snapshots has removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PruneReport {
    /// Saved snapshots that were removed.
    pub snapshots: u64,
    /// The bytes of their bodies.
    pub recovered_bytes: u64,
}

/// One saved snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SavedSnapshot {
    /// The version that it is of.
    pub version: u64,
    /// When that version was made; `None` when the snapshot cannot be read.
    pub timestamp: Option<DateTime<Utc>>,
    /// The bytes of its body; 0 when it is missing.
    pub bytes: u64,
    /// Whether it is the one where history begins, which is kept however old it is.
    pub is_cut: bool,
    /// Why it cannot be used, if so.
    pub problem: Option<String>,
}

impl StateMachinePersister {
    /// The saved snapshots of a state that are kept, the oldest first.
    ///
    /// # Errors
    /// [`Error::StateNotFound`](crate::Error::StateNotFound); what reading meets.
    pub async fn saved_snapshots(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<Vec<SavedSnapshot>> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let absent = || not_found(&address, String::new());
        let mut known = self.records.head(&address).await?.ok_or_else(absent)?;
        let mut looks = 1;
        loop {
            let mut saved = self.saved_by(&address, &known.head).await?;
            if saved.iter().all(|saved| saved.bytes > 0) {
                return Ok(saved);
            }
            // What was dropped since the head was read is not missing, even if it was saved again meanwhile.
            let newest = self.records.head(&address).await?.ok_or_else(absent)?;
            if newest.revision == known.revision || looks == LOOKS {
                saved.retain(|saved| {
                    saved.bytes > 0 || newest.head.snapshot_versions.contains(&saved.version)
                });
                return Ok(saved);
            }
            (known, looks) = (newest, looks + 1);
        }
    }

    /// The saved snapshots that a head names.
    async fn saved_by(&self, address: &Address, head: &Head) -> Result<Vec<SavedSnapshot>> {
        let mut saved = Vec::with_capacity(head.snapshot_versions.len());
        for versions in head.snapshot_versions.chunks(PAGE) {
            let keys: Vec<Key> =
                versions.iter().map(|version| address.snapshot(*version)).collect();
            let found = self.records.reader().get(&keys).await?;
            for (version, document) in versions.iter().zip(found) {
                let read = document.as_ref().map(|found| schema::read_saved(address, found));
                let (timestamp, problem) = match read {
                    None => (None, Some("it is missing".to_owned())),
                    Some(Ok((change, _))) => (Some(change.timestamp), None),
                    Some(Err(error)) => (None, Some(error.to_string())),
                };
                saved.push(SavedSnapshot {
                    version: *version,
                    timestamp,
                    bytes: document.as_ref().map_or(0, Document::bytes),
                    is_cut: head.cut_snapshot() == Some(*version),
                    problem,
                });
            }
        }
        Ok(saved)
    }

    /// Saves a snapshot of the newest version now, whatever the interval says; returns that version.
    ///
    /// # Errors
    /// [`Error::StateNotFound`](crate::Error::StateNotFound) for a state that does not exist; what reading and writing meet.
    pub async fn save_snapshot(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<u64> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let saved = self.records.revise(&address, &self.conditions, trim::save).await?;
        match saved {
            Some(trim) => Ok(trim.head.version()),
            None => {
                let known = self.records.head(&address).await?;
                Ok(known.ok_or_else(|| not_found(&address, String::new()))?.head.version())
            }
        }
    }

    /// Removes saved snapshots of a state, the oldest first, until so many are left beside the one where
    /// its history begins. No event is removed.
    ///
    /// # Errors
    /// [`Error::StateNotFound`](crate::Error::StateNotFound); what reading and writing meet.
    pub async fn prune_snapshots(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        keep: usize,
    ) -> Result<PruneReport> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        self.prune(&address, keep).await
    }

    pub(crate) async fn prune(&self, address: &Address, keep: usize) -> Result<PruneReport> {
        let mut report = PruneReport::default();
        loop {
            let known = self.records.head(address).await?;
            let head = known.ok_or_else(|| not_found(address, String::new()))?.head;
            let sizes = match trim::prune(&head, keep) {
                Some(trim) => self.sizes(address, trim.drop_snapshots.iter()).await?,
                None => return Ok(report),
            };
            let decide = |head: &Head| trim::prune(head, keep);
            if let Some(trim) = self.records.revise(address, &self.conditions, decide).await? {
                let (snapshots, bytes) = removed(&trim.drop_snapshots, &sizes);
                report.snapshots += snapshots;
                report.recovered_bytes += bytes;
            }
        }
    }
}
