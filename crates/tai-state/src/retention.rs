//! How much of the past is kept: the clean-up of what is old.
//!
//! First the head says since when history is kept, in one commit with the saved snapshot at that version;
//! from then on nobody looks for what is older. Then that is removed, batch by batch, and at the end the head
//! says that nothing is left. So a run that was killed leaves nothing that is not accounted for, and the
//! next one goes on.
//!
//! The batches do not ask that the head is unchanged, so that a writer who never pauses, in whatever process,
//! does not hold them up. That is safe because a head never says again that history begins earlier:
//!
//! * Writers, purges and other clean-ups take over or raise what it says.
//! * A recovery without a head lets history begin where the saved snapshots say that it was cut: each knows
//!   since when history was kept when it was saved (`recovery.rs`). The commit that lets history begin later
//!   takes away what the log began with, and the saved snapshots before the new beginning, and saves one
//!   there; what is left over from earlier is removed before it. So what is found after that begins at none
//!   of those that are left, and is not taken for a whole log.
//! * A head that somebody removed, and a state that begins anew, has other events: each is removed only at
//!   the revision that was read, and no document has a revision twice. The head is looked at before every
//!   batch, and one that says otherwise ends the run.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::backend::{Document, Key, Kind};
use crate::chain::Change;
use crate::error::{Error, Result};
use crate::keys::{Address, Name};
use crate::persister::StateMachinePersister;
use crate::records::KnownHead;
use crate::store::StateStore;
use crate::transition::Head;
use crate::trim::{self, MOST_REMOVED};

/// States that are looked at in one go.
pub(crate) const PAGE: usize = 200;

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
    /// Events that were removed, as far as it is known that this run did it: what a commit has removed that
    /// was delivered twice may look like another run's.
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

impl CleanupReport {
    /// The sum of two of the same run.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.states += other.states;
        self.states_trimmed += other.states_trimmed;
        self.events += other.events;
        self.snapshots += other.snapshots;
        self.snapshots_saved += other.snapshots_saved;
        self.recovered_bytes += other.recovered_bytes;
        self.problems.extend(other.problems);
        self
    }
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
    /// `progress` is called after every state and every commit.
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
        } else if base.is_some() || known.head.oldest_version < known.head.first_version {
            let batch = options.batch;
            if let Some(base) = base {
                self.cut(address, &base, batch, report, progress).await?;
            }
            self.sweep(address, batch, |events, bytes| {
                report.events += events;
                report.recovered_bytes += bytes;
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
                Err(error @ (Error::Corrupt { .. } | Error::HistoryTrimmed { .. })) => {
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
        batch: usize,
        report: &mut CleanupReport,
        progress: &mut (dyn FnMut(&CleanupReport) + Send),
    ) -> Result<()> {
        loop {
            let Some(known) = self.records.head(address).await? else { return Ok(()) };
            let (first, newest) = (known.head.first_version, known.head.version());
            if base.version <= first || base.version > newest {
                return Ok(());
            }
            // What an earlier run has left.
            self.clear(address, batch, |events, bytes| {
                report.events += events;
                report.recovered_bytes += bytes;
                progress(report);
            })
            .await?;
            let saved = &known.head.snapshot_versions;
            let is_new = !saved.contains(&base.version);
            let old = saved.iter().filter(|at| **at < base.version);
            let sizes = self.sizes(address, old).await?;
            let begins = self.records.reader().get(&[address.event(first)]).await?;
            let begins = begins.iter().flatten().map(|found| (first, found.bytes())).collect();
            let decide = |head: &Head| match head.first_version == first {
                true => trim::cut(head, base),
                // Another clean-up came in between: what it has left has to go first.
                false => None,
            };
            let Some(trim) = self.records.revise(address, &self.conditions, decide).await? else {
                continue;
            };
            let (snapshots, bytes) = removed(&trim.drop_snapshots, &sizes);
            let (events, event_bytes) = removed(&trim.drop_events, &begins);
            report.snapshots += snapshots;
            report.events += events;
            report.recovered_bytes += bytes + event_bytes;
            report.snapshots_saved += u64::from(is_new && trim.save.is_some());
            metrics::counter!("tai_state_events_removed_total").increment(events);
            progress(report);
        }
    }

    /// Removes what was given up, batch by batch, and tells of each; then the head says so.
    pub(crate) async fn sweep(
        &self,
        address: &Address,
        batch: usize,
        swept: impl FnMut(u64, u64),
    ) -> Result<()> {
        let Some(first) = self.clear(address, batch, swept).await? else { return Ok(()) };
        let decide = |head: &Head| trim::swept(head, first);
        match self.records.revise(address, &self.conditions, decide).await {
            // There is nothing left; only the note is missing, and the next run makes up for it.
            Err(error @ Error::Timeout { .. }) => {
                tracing::debug!(%address, %error, "swept, and not noted");
                Ok(())
            }
            noted => noted.map(drop),
        }
    }

    /// Removes the events that were given up. Returns below which version there are none any more; `None`
    /// when there was nothing to look for.
    async fn clear(
        &self,
        address: &Address,
        batch: usize,
        mut swept: impl FnMut(u64, u64),
    ) -> Result<Option<u64>> {
        let mut cleared = None;
        loop {
            let Some(known) = self.records.head(address).await? else { return Ok(None) };
            let (oldest, first) = (known.head.oldest_version, known.head.first_version);
            let from = cleared.unwrap_or(oldest).max(oldest);
            if from >= first {
                return Ok(cleared.filter(|cleared| *cleared == first));
            }
            let reader = self.records.reader();
            let (documents, next) =
                reader.versions(address, Kind::Events, from, first - 1, batch).await?;
            if self.records.remove(address, &self.conditions, &documents).await? {
                let bytes = documents.iter().map(Document::bytes).sum();
                let events = documents.len() as u64;
                metrics::counter!("tai_state_events_removed_total").increment(events);
                swept(events, bytes);
                cleared = Some(next.unwrap_or(first));
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
        let mut next = (head.oldest_version < first).then_some(head.oldest_version);
        while let Some(from) = next {
            let reader = self.records.reader();
            let (documents, after) =
                reader.versions(address, Kind::Events, from, first - 1, MOST_REMOVED).await?;
            report.events += documents.len() as u64;
            report.recovered_bytes += documents.iter().map(Document::bytes).sum::<u64>();
            next = after;
        }
        Ok(())
    }

    /// The sizes of those saved snapshots that exist.
    pub(crate) async fn sizes(
        &self,
        address: &Address,
        versions: impl Iterator<Item = &u64>,
    ) -> Result<HashMap<u64, u64>> {
        let keys: Vec<Key> = versions.map(|version| address.snapshot(*version)).collect();
        let mut sizes = HashMap::new();
        for keys in keys.chunks(PAGE) {
            let found = self.records.reader().get(keys).await?;
            sizes.extend(found.iter().flatten().map(|found| (found.key.version, found.bytes())));
        }
        Ok(sizes)
    }

    pub(crate) fn store(&self) -> StateStore {
        StateStore { records: Arc::clone(&self.records), conditions: self.conditions.clone() }
    }
}

/// How many of these versions there were, and their bytes.
pub(crate) fn removed(versions: &[u64], sizes: &HashMap<u64, u64>) -> (u64, u64) {
    let found = versions.iter().filter_map(|version| sizes.get(version));
    found.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size))
}
