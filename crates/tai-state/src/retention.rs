//! How much of the past is kept: saved snapshots, clean-up of what is old, and the erasure of a state.
//!
//! First the head says since when history is kept, in one commit with the saved snapshot at that version;
//! from then on nobody looks for what is older. Then that is removed, batch by batch, each in one commit
//! with the note how far it has come. So a run that was killed leaves nothing that is not accounted for,
//! and the next one goes on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::backend::{Document, Key, Kind};
use crate::chain::{Change, Hash};
use crate::clock::new_event_id;
use crate::clock_vector::VectorClockSnapshot;
use crate::error::{Error, Result};
use crate::json::refuse_deep;
use crate::keys::{Address, Name};
use crate::persister::StateMachinePersister;
use crate::records::KnownHead;
use crate::schema;
use crate::state::ChangeMetadata;
use crate::store::{StateStore, not_found};
use crate::transition::{Expect, Head, PURGE_CONTEXT, Request, Wish};
use crate::trim::{self, MOST_REMOVED, Trim};

/// The action of the event that a purge leaves.
const PURGE: &str = "purge";

/// States that are looked at in one go.
const PAGE: usize = 200;

/// What is old, and how it is removed.
#[derive(Debug, Clone)]
pub struct CleanupOptions {
    cutoff: Cutoff,
    keep_versions: u64,
    dry_run: bool,
    batch: usize,
}

#[derive(Debug, Clone, Copy)]
enum Cutoff {
    Ago(Duration),
    At(DateTime<Utc>),
}

impl CleanupOptions {
    fn new(cutoff: Cutoff) -> Self {
        Self { cutoff, keep_versions: 1, dry_run: false, batch: MOST_REMOVED }
    }

    /// History is kept for so long, by the clock of whoever cleans up.
    #[must_use]
    pub fn older_than(age: Duration) -> Self {
        Self::new(Cutoff::Ago(age))
    }

    /// History is kept since this time.
    #[must_use]
    pub fn before(time: DateTime<Utc>) -> Self {
        Self::new(Cutoff::At(time))
    }

    /// However old they are, so many of a state's newest versions are kept; at least 1.
    #[must_use]
    pub fn keep_versions(mut self, versions: u64) -> Self {
        self.keep_versions = versions.max(1);
        self
    }

    /// Only says what would be removed.
    #[must_use]
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }

    /// How many events one commit removes at most: 1 to 400.
    #[must_use]
    pub fn batch(mut self, events: usize) -> Self {
        self.batch = events.clamp(1, MOST_REMOVED);
        self
    }
}

/// What a clean-up has removed so far; of a dry run, what it would remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CleanupReport {
    /// Since when history is kept.
    pub cutoff: DateTime<Utc>,
    /// Whether nothing was removed.
    pub dry_run: bool,
    /// States that were looked at, deleted ones included.
    pub states: u64,
    /// States of which something was removed.
    pub states_trimmed: u64,
    /// Events that were removed.
    pub events: u64,
    /// Saved snapshots that were removed.
    pub snapshots: u64,
    /// Snapshots that were saved where history begins now.
    pub snapshots_saved: u64,
    /// The bytes of the bodies of all that was removed. A file does not shrink by it: the space is used
    /// again.
    pub recovered_bytes: u64,
    /// States that were passed over because they are damaged, and why.
    pub problems: Vec<String>,
}

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
    /// Removes the events and saved snapshots of a governor's states that are older than so many days.
    ///
    /// What a state was at any time within those days can still be asked: its event from before them
    /// that was its newest then is kept too, with a saved snapshot. Reading what is before that is
    /// [`Error::HistoryTrimmed`]. Heads, and deleted states, are never removed.
    ///
    /// # Errors
    /// What reading and writing meet. What was removed until then stays removed; another call goes on.
    pub async fn cleanup_old_data(
        &self,
        governor: impl AsRef<str>,
        days: u32,
    ) -> Result<CleanupReport> {
        let age = Duration::from_secs(u64::from(days) * 24 * 60 * 60);
        self.cleanup(governor, &CleanupOptions::older_than(age), |_| {}).await
    }

    /// As [`cleanup_old_data`](StateMachinePersister::cleanup_old_data), with all that may be said of it.
    /// `progress` is called after every state and every batch.
    ///
    /// # Errors
    /// As [`cleanup_old_data`](StateMachinePersister::cleanup_old_data).
    pub async fn cleanup(
        &self,
        governor: impl AsRef<str>,
        options: &CleanupOptions,
        mut progress: impl FnMut(&CleanupReport) + Send,
    ) -> Result<CleanupReport> {
        let governor = Name::escape(governor.as_ref(), "governor id")?;
        let mut report = CleanupReport {
            cutoff: self.cutoff(options.cutoff),
            dry_run: options.dry_run,
            states: 0,
            states_trimmed: 0,
            events: 0,
            snapshots: 0,
            snapshots_saved: 0,
            recovered_bytes: 0,
            problems: Vec::new(),
        };
        let mut after: Option<Name> = None;
        loop {
            let reader = self.records.reader();
            let addresses = reader.state_names(&governor, after.as_ref(), PAGE).await?;
            let Some(last) = addresses.last() else { return Ok(report) };
            after = Some(last.state.clone());
            for address in &addresses {
                match self.cleanup_state(address, options, &mut report, &mut progress).await {
                    Ok(()) => {}
                    // One damaged state must not keep all others from being cleaned up.
                    Err(error @ (Error::Corrupt { .. } | Error::NewerFormat { .. })) => {
                        tracing::warn!(%address, %error, "not cleaned up");
                        report.problems.push(error.to_string());
                    }
                    Err(error) => return Err(error),
                }
                progress(&report);
            }
        }
    }

    fn cutoff(&self, cutoff: Cutoff) -> DateTime<Utc> {
        match cutoff {
            Cutoff::At(time) => time,
            Cutoff::Ago(age) => {
                let now = self.records.options().clock.now();
                let before = TimeDelta::from_std(age).ok();
                let before = before.and_then(|age| now.checked_sub_signed(age));
                before.unwrap_or(DateTime::<Utc>::MIN_UTC)
            }
        }
    }

    async fn cleanup_state(
        &self,
        address: &Address,
        options: &CleanupOptions,
        report: &mut CleanupReport,
        progress: &mut (dyn FnMut(&CleanupReport) + Send),
    ) -> Result<()> {
        // Removed since it was listed.
        let Some(known) = self.records.head(address).await? else { return Ok(()) };
        report.states += 1;
        let counted = (report.events, report.snapshots);
        let base = self.base(address, known.clone(), report.cutoff, options.keep_versions).await?;
        if options.dry_run {
            self.measure(address, &known.head, base.as_ref(), report).await?;
        } else {
            if let Some(base) = base {
                self.cut(address, &base, report).await?;
            }
            let batch = options.batch;
            let mut swept = (report.events, report.recovered_bytes);
            self.sweep(address, batch, |events, bytes| {
                swept = (swept.0 + events, swept.1 + bytes);
                (report.events, report.recovered_bytes) = swept;
                progress(report);
            })
            .await?;
        }
        report.states_trimmed += u64::from((report.events, report.snapshots) != counted);
        Ok(())
    }

    /// The event at which history is to begin: the newest that is not later than the cutoff. `None` when
    /// it does begin there, or later.
    async fn base(
        &self,
        address: &Address,
        mut known: KnownHead,
        cutoff: DateTime<Utc>,
        keep_versions: u64,
    ) -> Result<Option<Change>> {
        let store = self.store();
        loop {
            let head = &known.head;
            let newest = (head.version() + 1).saturating_sub(keep_versions);
            if newest <= head.first_version {
                return Ok(None);
            }
            let found = async {
                let found = store.newest_until(address, &known, cutoff).await?;
                match found {
                    Some(change) if change.version > newest => {
                        store.change_at(address, &known, newest).await.map(Some)
                    }
                    found => Ok(found),
                }
            };
            match found.await {
                Ok(base) => return Ok(base.filter(|base| base.version > head.first_version)),
                // Another clean-up may have come in between.
                Err(error @ Error::Corrupt { .. }) => {
                    let first = head.first_version;
                    match self.records.head(address).await? {
                        Some(newer) if newer.head.first_version > first => known = newer,
                        Some(_) => return Err(error),
                        None => return Ok(None),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Lets history begin at `base`.
    async fn cut(
        &self,
        address: &Address,
        base: &Change,
        report: &mut CleanupReport,
    ) -> Result<()> {
        loop {
            let Some(known) = self.records.head(address).await? else { return Ok(()) };
            let old: Vec<u64> = known.head.snapshot_versions.clone();
            let sizes = self.sizes(address, old.iter().filter(|at| **at < base.version)).await?;
            let decide = |head: &Head| trim::cut(head, base);
            let Some(trim) = self.records.revise(address, &self.conditions, decide).await? else {
                return Ok(());
            };
            let (snapshots, bytes) = removed(&trim.drop_snapshots, &sizes);
            report.snapshots += snapshots;
            report.recovered_bytes += bytes;
            report.snapshots_saved += u64::from(trim.save.is_some());
        }
    }

    /// Removes what was given up, batch by batch, and tells of each.
    async fn sweep(
        &self,
        address: &Address,
        batch: usize,
        mut swept: impl FnMut(u64, u64),
    ) -> Result<()> {
        loop {
            let Some(known) = self.records.head(address).await? else { return Ok(()) };
            let (oldest, first) = (known.head.oldest_version, known.head.first_version);
            if oldest >= first {
                return Ok(());
            }
            let reader = self.records.reader();
            let (documents, more) =
                reader.versions(address, Kind::Events, oldest, first - 1, batch).await?;
            let upto = match documents.last() {
                Some(last) if more => last.key.version + 1,
                _ => first,
            };
            let sizes: HashMap<u64, u64> =
                documents.iter().map(|found| (found.key.version, size(found))).collect();
            let versions: Vec<u64> = documents.iter().map(|found| found.key.version).collect();
            drop(documents);
            let decide = |head: &Head| trim::sweep(head, &versions, upto);
            if let Some(trim) = self.records.revise(address, &self.conditions, decide).await? {
                let (events, bytes) = removed(&trim.drop_events, &sizes);
                metrics::counter!("tai_state_events_removed_total").increment(events);
                swept(events, bytes);
            }
        }
    }

    /// What a clean-up would remove of a state.
    async fn measure(
        &self,
        address: &Address,
        head: &Head,
        base: Option<&Change>,
        report: &mut CleanupReport,
    ) -> Result<()> {
        let first = base.map_or(head.first_version, |base| base.version);
        let old = head.snapshot_versions.iter().filter(|version| **version < first);
        let sizes = self.sizes(address, old).await?;
        report.snapshots += sizes.len() as u64;
        report.recovered_bytes += sizes.values().sum::<u64>();
        report.snapshots_saved +=
            u64::from(base.is_some_and(|base| !head.snapshot_versions.contains(&base.version)));
        let mut next = head.oldest_version;
        while next < first {
            let reader = self.records.reader();
            let (documents, more) =
                reader.versions(address, Kind::Events, next, first - 1, MOST_REMOVED).await?;
            report.events += documents.len() as u64;
            report.recovered_bytes += documents.iter().map(size).sum::<u64>();
            next = match documents.last() {
                Some(last) if more => last.key.version + 1,
                _ => first,
            };
        }
        Ok(())
    }

    /// The sizes of those saved snapshots that exist.
    async fn sizes(
        &self,
        address: &Address,
        versions: impl Iterator<Item = &u64>,
    ) -> Result<HashMap<u64, u64>> {
        let keys: Vec<Key> = versions.map(|version| address.snapshot(*version)).collect();
        let mut sizes = HashMap::new();
        for keys in keys.chunks(PAGE) {
            let found = self.records.reader().get(keys).await?;
            sizes.extend(found.iter().flatten().map(|found| (found.key.version, size(found))));
        }
        Ok(sizes)
    }

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
        let (mut snapshots, mut recovered_bytes, mut events) = (0, 0, 0);
        if !is_purged(&known.head) {
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
            self.records.apply(&request, &self.config, &self.conditions).await?;
            snapshots += sizes.len() as u64;
            recovered_bytes += sizes.values().sum::<u64>();
        }
        let mut swept = (0, 0);
        self.sweep(&address, MOST_REMOVED, |count, bytes| {
            swept = (swept.0 + count, swept.1 + bytes);
            progress(swept.0);
        })
        .await?;
        events += swept.0;
        recovered_bytes += swept.1;
        let head = self.records.head(&address).await?.ok_or_else(absent)?.head;
        let first = head.first_version;
        // What no head named, such as what was put there by hand.
        let strays = self.strays(&address, Kind::Snapshots, first).await?;
        if !strays.is_empty() {
            let versions: Vec<u64> = strays.iter().map(|found| found.key.version).collect();
            let decide = |head: &Head| Some(Trim::without(head, &versions));
            self.records.revise(&address, &self.conditions, decide).await?;
            snapshots += strays.len() as u64;
            recovered_bytes += strays.iter().map(size).sum::<u64>();
        }
        let tombstone = self.records.reader().changes_at(&address, &[first]).await?;
        let tombstone = tombstone.into_iter().next().flatten().ok_or_else(|| {
            Error::corrupt(format!("the log of {address} at v{first}"), "the event is missing")
        })?;
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
            if event.first().and_then(Option::as_ref).map(|event| event.hash) != Some(report.hash) {
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

    /// The saved snapshots of a state that are kept, the oldest first.
    ///
    /// # Errors
    /// [`Error::StateNotFound`]; what reading meets.
    pub async fn saved_snapshots(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
    ) -> Result<Vec<SavedSnapshot>> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        let known = self.records.head(&address).await?;
        let head = known.ok_or_else(|| not_found(&address, String::new()))?.head;
        let mut saved = Vec::with_capacity(head.snapshot_versions.len());
        for versions in head.snapshot_versions.chunks(PAGE) {
            let keys: Vec<Key> =
                versions.iter().map(|version| address.snapshot(*version)).collect();
            let found = self.records.reader().get(&keys).await?;
            for (version, document) in versions.iter().zip(found) {
                let read = document.as_ref().map(|found| schema::read_change(&address, found));
                let (timestamp, problem) = match read {
                    None => (None, Some("it is missing".to_owned())),
                    Some(Ok(change)) => (Some(change.timestamp), None),
                    Some(Err(error)) => (None, Some(error.to_string())),
                };
                saved.push(SavedSnapshot {
                    version: *version,
                    timestamp,
                    bytes: document.as_ref().map_or(0, size),
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
    /// [`Error::StateNotFound`] for a state that does not exist; what reading and writing meet.
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
    /// [`Error::StateNotFound`]; what reading and writing meet.
    pub async fn prune_snapshots(
        &self,
        governor: impl AsRef<str>,
        state: impl AsRef<str>,
        keep: usize,
    ) -> Result<PruneReport> {
        let address = Address::new(governor.as_ref(), state.as_ref())?;
        self.prune(&address, keep).await
    }

    async fn prune(&self, address: &Address, keep: usize) -> Result<PruneReport> {
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

    pub(crate) fn store(&self) -> StateStore {
        StateStore { records: Arc::clone(&self.records), conditions: self.conditions.clone() }
    }
}

/// Whether a head is the tombstone of a purge.
fn is_purged(head: &Head) -> bool {
    head.change.deleted && head.change.metadata.context.contains_key(PURGE_CONTEXT)
}

/// How many of these versions there were, and their bytes.
fn removed(versions: &[u64], sizes: &HashMap<u64, u64>) -> (u64, u64) {
    let found = versions.iter().filter_map(|version| sizes.get(version));
    found.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size))
}

fn size(document: &Document) -> u64 {
    document.body.as_text().len() as u64
}
