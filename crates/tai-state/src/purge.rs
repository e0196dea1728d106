//! The erasure of a state: everything that it ever was is removed, and a tombstone without data stays.

use serde::{Deserialize, Serialize};

use crate::backend::{Document, Kind};
use crate::chain::Hash;
use crate::clock::new_event_id;
use crate::clock_vector::VectorClockSnapshot;
use crate::error::{Error, Result};
use crate::json::refuse_deep;
use crate::keys::Address;
use crate::persister::StateMachinePersister;
use crate::records::KnownHead;
use crate::state::ChangeMetadata;
use crate::store::not_found;
use crate::transition::{Expect, PURGE, Request, Wish, is_purge};
use crate::trim::MOST_REMOVED;

/// What the erasure of a state has removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PurgeReport {
    /// Whose state.
    pub governor_id: String,
    /// Which state.
    pub state_id: String,
    /// The version of the purge: the tombstone. Versions go on after it.
    pub version: u64,
    /// The hash of its event.
    pub hash: Hash,
    /// Events that this call removed. What an earlier call removed that did not come to its end is not
    /// counted.
    pub events: u64,
    /// Saved snapshots that this call removed.
    pub snapshots: u64,
    /// The bytes of the bodies of all that was removed.
    pub recovered_bytes: u64,
}

impl StateMachinePersister {
    /// Erases a state with everything that it ever was: events, saved snapshots, and the data of its head.
    /// What stays is a tombstone without data, so that versions do not begin anew, and one event, which
    /// says who purged it and why. What a state becomes afterwards is not erased.
    ///
    /// The purge counts from its first commit: reading a history before it is
    /// [`Error::HistoryTrimmed`]. A call that does not come to its end is finished by another one, or by a
    /// clean-up; until then single events may still be found. Not erased: answers under idempotency keys,
    /// exports, backups, and whatever else was copied. On a file the freed space is overwritten with
    /// zeros; the write-ahead log beside it is removed when the last handle is closed.
    ///
    /// # Errors
    /// [`Error::StateNotFound`] when the state never existed; what reading and writing meet.
    pub async fn purge(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        mut metadata: ChangeMetadata,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<PurgeReport> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        refuse_deep(metadata.context.values_mut(), &address.to_string())?;
        let absent = || not_found(&address, String::new());
        let mut known = self.records.head(&address).await?.ok_or_else(absent)?;
        let (mut events, mut snapshots, mut recovered_bytes) = (0, 0, 0);
        let mut tombstone = known.head.change.clone();
        if !is_purge(&tombstone) {
            // One commit takes a bounded number of documents.
            while known.head.snapshot_versions.len() > MOST_REMOVED / 2 {
                let pruned = self.prune(&address, 0).await?;
                snapshots += pruned.snapshots;
                recovered_bytes += pruned.recovered_bytes;
                known = self.records.head(&address).await?.ok_or_else(absent)?;
            }
            let sizes = self.sizes(&address, known.head.snapshot_versions.iter()).await?;
            let request = Request {
                address: address.clone(),
                id: new_event_id().to_string(),
                action: PURGE.to_owned(),
                metadata,
                wish: Wish::Purge,
                expect: Expect::Any,
                at: None,
                based_on: VectorClockSnapshot::new(),
            };
            tombstone = self.records.apply(&request, &self.config, &self.conditions).await?.0;
            snapshots += sizes.len() as u64;
            recovered_bytes += sizes.values().sum::<u64>();
        }
        self.sweep(&address, MOST_REMOVED, |count, bytes| {
            events += count;
            recovered_bytes += bytes;
            progress(events);
        })
        .await?;
        // What no head named, such as what was put there by hand.
        for kind in [Kind::Events, Kind::Snapshots] {
            loop {
                let strays = self.strays(&address, kind, tombstone.version).await?;
                if strays.is_empty() {
                    break;
                }
                // By somebody else who purges it too.
                if !self.records.remove(&address, &self.conditions, &strays).await? {
                    continue;
                }
                *(if kind == Kind::Events { &mut events } else { &mut snapshots }) +=
                    strays.len() as u64;
                recovered_bytes += strays.iter().map(Document::bytes).sum::<u64>();
            }
        }
        // History may begin later by now: others go on writing and cleaning up.
        Ok(PurgeReport {
            governor_id: address.governor.id(),
            state_id: address.state.id(),
            version: tombstone.version,
            hash: tombstone.hash,
            events,
            snapshots,
            recovered_bytes,
        })
    }

    /// Looks whether a purge has left nothing: no event and no saved snapshot from before it, and a
    /// history that begins with it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming what is still there.
    pub async fn verify_purge(&self, report: &PurgeReport) -> Result<()> {
        let address = Address::new(&report.governor_id, &report.state_id)?;
        let still = |what: String| Err(Error::corrupt(format!("the purge of {address}"), what));
        let Some(known) = self.records.head(&address).await? else {
            return still("its tombstone is missing".into());
        };
        if known.head.first_version < report.version {
            let first = known.head.first_version;
            return still(format!("history is kept since v{first}"));
        }
        for kind in [Kind::Events, Kind::Snapshots] {
            if let Some(found) = self.strays(&address, kind, report.version).await?.first() {
                return still(format!("{} is still there", found.key));
            }
        }
        // A later clean-up may have removed the event of the purge too.
        if known.head.first_version == report.version {
            let event = self.records.reader().changes_at(&address, &[report.version]).await?;
            let hash = event.first().and_then(Option::as_ref).map(|event| event.hash);
            let begins_with_it = |known: KnownHead| known.head.first_version == report.version;
            // A clean-up that is under way removes it between two looks.
            if hash != Some(report.hash)
                && self.records.head(&address).await?.is_none_or(begins_with_it)
            {
                return still("its own event is another".into());
            }
        }
        Ok(())
    }

    /// The first documents of a state below a version.
    async fn strays(&self, address: &Address, kind: Kind, below: u64) -> Result<Vec<Document>> {
        let reader = self.records.reader();
        Ok(reader.versions(address, kind, 0, below.saturating_sub(1), MOST_REMOVED).await?.0)
    }
}
