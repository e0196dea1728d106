//! Looks at the saved snapshots beside a head, and says which are made anew, named or removed.

use super::{Fold, Found, RecoveryBase};
use crate::error::{Error, Result};
use crate::revise::Repair;
use crate::transition::Head;
use crate::trim::MOST_REMOVED;

/// Why one counts as passed over that is put right by naming or removing it.
const UNNAMED: &str = "the head does not name it";

impl Fold<'_> {
    /// Whether saved snapshots are to be put right.
    pub(super) fn found_something(&self) -> bool {
        !(self.passed_over.is_empty() && self.disputed.is_empty() && self.unnamed.is_empty())
    }

    /// Looks at the saved snapshots before the one that was used, which nothing was asked of.
    pub(super) async fn look_at_saved(&mut self, head: &Head, base: RecoveryBase) -> Result<()> {
        let RecoveryBase::SavedSnapshot(base) = base else { return Ok(()) };
        for version in head.snapshot_versions.iter().rev().filter(|version| **version < base) {
            let saved = match self.snapshot(*version).await {
                Ok((Some(saved), bytes)) => {
                    self.bytes += bytes;
                    saved
                }
                Ok((None, _)) => {
                    self.pass_over(*version, "it is missing");
                    continue;
                }
                Err(Error::Corrupt { reason, .. }) => {
                    self.pass_over(*version, &reason);
                    continue;
                }
                Err(error) => return Err(error),
            };
            match self.records.reader().changes_at(self.address, &[*version]).await {
                Ok(found) if found.iter().flatten().all(|event| event.hash == saved.0.hash) => {
                    if head.is_disputed_by(*version, saved.1) {
                        self.disputed.push(saved);
                    }
                }
                Ok(_) => self.pass_over(*version, "it is not what the log says"),
                // What is wrong with the log, `verify` tells.
                Err(Error::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Looks for saved snapshots that the head does not name: it is from before they were saved, or they are from
    /// before they were removed.
    pub(super) async fn look_for_unnamed(&mut self, head: &Head) -> Result<()> {
        let is_named = |version: &u64| head.snapshot_versions.contains(version);
        let found_before = self.passed_over.clone();
        let readable = self.all_saved().await?;
        let unreadable = self.passed_over.drain(..).map(|passed| passed.version);
        let mut unnamed: Vec<u64> = readable.into_keys().chain(unreadable).collect();
        unnamed.retain(|version| !is_named(version));
        unnamed.sort_unstable_by(|one, other| other.cmp(one));
        self.passed_over = found_before;
        self.unnamed = unnamed;
        Ok(())
    }

    /// Names in the head those of them that are of the log that is kept, and removes the rest, if nothing is lost by
    /// that. What is left alone is not told of either: it may have been saved since the head was read.
    pub(super) async fn name_or_drop(&mut self, repair: &mut Repair) -> Result<()> {
        for version in std::mem::take(&mut self.unnamed) {
            if repair.save.len() + repair.drop_snapshots.len() >= MOST_REMOVED {
                break;
            }
            if version > repair.head.version() {
                continue;
            }
            if version < repair.head.first_version {
                self.pass_over(version, UNNAMED);
                repair.drop_snapshots.push(version);
                continue;
            }
            let event = match self.records.reader().changes_at(self.address, &[version]).await {
                Ok(mut found) => found.pop().flatten(),
                Err(Error::Corrupt { .. }) => None,
                Err(error) => return Err(error),
            };
            // Without its event it may be the last that there is of its version.
            let Some(event) = event else { continue };
            match self.snapshot(version).await {
                // It knows of a later cut than the head, which is not to be forgotten.
                Ok((Some((_, since)), _)) if since > repair.head.first_version => continue,
                Ok((Some((saved, since)), _)) if saved == event => {
                    let names = &mut repair.head.snapshot_versions;
                    names.insert(names.partition_point(|named| *named < version), version);
                    if repair.head.is_disputed_by(version, since) {
                        repair.save.push(event);
                    }
                }
                Ok((None, _)) => continue,
                Ok(_) | Err(Error::Corrupt { .. }) => repair.drop_snapshots.push(version),
                Err(error) => return Err(error),
            }
            self.pass_over(version, UNNAMED);
        }
        Ok(())
    }

    /// Makes anew from the log what was passed over, and forgets what has no event any more; what only disputes
    /// since when history is kept, is made anew from itself.
    pub(super) async fn save_again(&self, repair: &mut Repair) -> Result<()> {
        for (change, _) in &self.disputed {
            if repair.save.iter().all(|saved| saved.version != change.version) {
                repair.save.push(change.clone());
            }
        }
        for passed in &self.passed_over {
            let is_saved = repair.save.iter().any(|change| change.version == passed.version);
            if is_saved || !repair.head.snapshot_versions.contains(&passed.version) {
                continue;
            }
            let reader = self.records.reader();
            match reader.changes_at(self.address, &[passed.version]).await {
                Ok(mut found) => match found.pop().flatten() {
                    Some(change) => repair.save.push(change),
                    None => {
                        repair.head.snapshot_versions.retain(|version| *version != passed.version);
                        repair.drop_snapshots.push(passed.version);
                    }
                },
                // Damage in the log is told by `verify`; the state is established without it.
                Err(Error::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Leaves of what was found wrong only what is so by the newest head.
    pub(super) async fn forget_what_was_cleaned_up(&mut self, newest: &Found) -> Result<()> {
        let Found::Sound(newest, _) = newest else { return Ok(()) };
        self.disputed.clear();
        for passed in std::mem::take(&mut self.passed_over) {
            // One that was removed may have been saved again since: a cut does so.
            if newest.snapshot_versions.contains(&passed.version)
                && !matches!(self.snapshot(passed.version).await, Ok((Some(_), _)))
            {
                self.passed_over.push(passed);
            }
        }
        Ok(())
    }
}
