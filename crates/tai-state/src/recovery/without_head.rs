//! Makes a head anew from the whole log, and says since when history is kept.

use std::collections::{BTreeMap, BTreeSet};

use super::{Fold, Folded, Found, RecoveryBase};
use crate::backend::Kind;
use crate::chain::Hash;
use crate::error::{Error, Result};
use crate::replay::Replay;
use crate::revise::Repair;
use crate::schema;
use crate::store::not_found;
use crate::transition::{Head, is_purge};
use crate::trim::MOST_REMOVED;

impl Fold<'_> {
    /// The whole log, since there is no head to believe: none, or one that is older than the log.
    pub(super) async fn without_head(&mut self, found: &Found) -> Result<(Folded, Option<Repair>)> {
        let place = format!("the head of {}", self.address);
        let lost = |reason: &str| match found {
            Found::Damaged(damage, _) => Error::corrupt(&place, format!("{damage}; {reason}")),
            Found::Missing => Error::corrupt(&place, format!("it is missing; {reason}")),
            Found::Sound(..) => {
                Error::corrupt(&place, format!("it is older than its log; {reason}"))
            }
        };
        // What was found wrong with the help of a head that is not believed any more.
        (self.passed_over, self.disputed) = (Vec::new(), Vec::new());
        let saved = self.all_saved().await?;
        let tail = self.page(0).await?;
        let Some(oldest) = tail.documents.first().map(|document| document.key.version) else {
            return match found {
                Found::Missing if saved.is_empty() && self.passed_over.is_empty() => {
                    Err(not_found(self.address, String::new()))
                }
                _ => Err(lost("there are no events to make it from")),
            };
        };
        let unreadable: Vec<u64> = self.passed_over.iter().map(|passed| passed.version).collect();
        let (mut purged, mut sound) = (None, BTreeMap::new());
        let mut is_of_the_log = false;
        let mut replay = Replay::from_first(oldest);
        let mut next = Some(tail);
        while let Some(tail) = next {
            for document in &tail.documents {
                let change = schema::read_change(self.address, document)?;
                let version = change.version;
                is_of_the_log |= matches!(found, Found::Sound(old, _) if old.change == change);
                if is_purge(&change) {
                    (purged, sound) = (Some(version), BTreeMap::new());
                }
                match saved.get(&version) {
                    Some((hash, since)) if *hash == change.hash => {
                        sound.insert(version, *since);
                    }
                    Some(_) => self.pass_over(version, "it is not what the log says"),
                    None => {}
                }
                replay.push(change)?;
            }
            next = self.after(&tail).await?;
        }
        let change = replay.last().cloned().ok_or_else(|| lost("there are no events"))?;
        // An old head was the newest once. If the log reaches back to it and does not hold it, the log has lost
        // something, and the head may be all that is left of it.
        if let Found::Sound(old, _) = found
            && old.version() >= oldest
            && !is_of_the_log
        {
            return Err(lost(&format!("its own event, v{}, is not in it", old.version())));
        }
        let last_saved = saved.keys().chain(&unreadable).max().copied();
        if let Some(later) = last_saved.filter(|version| *version > change.version) {
            return Err(lost(&format!(
                "its log ends at v{}, and there is a saved snapshot of v{later}: what came after is lost",
                change.version
            )));
        }
        let known = match found {
            Found::Sound(old, _) if !self.is_cut_since(old).await? => Some(old.first_version),
            _ => None,
        };
        let is_guess = !matches!(found, Found::Sound(..));
        let first = match (purged, known, oldest) {
            // The commit that lets history begin later removes the event with which it has begun.
            (Some(first), _, _) | (None, Some(first), _) | (None, None, first @ 1) => Some(first),
            (None, None, _) => cut(&sound, oldest).or_else(|| {
                // One that cannot be read, and stands before all that can, may be the one at the cut.
                unreadable.into_iter().filter(|_| is_guess).find(|version| {
                    (oldest..=change.version).contains(version)
                        && sound.keys().next().is_none_or(|first| version < first)
                })
            }),
        };
        let first = first.ok_or_else(|| {
            lost(&format!(
                "its log begins at v{oldest}, and no saved snapshot says that it should: what stood \
                 before was cleaned up or is lost"
            ))
        })?;
        // A cut takes away those before it.
        sound.retain(|version, _| *version >= first);
        let mut head = Head {
            change,
            snapshot_versions: sound.keys().copied().collect(),
            first_version: first,
            oldest_version: oldest,
        };
        let mut anew: Vec<u64> = sound
            .iter()
            .filter(|(version, since)| head.is_disputed_by(**version, **since))
            .map(|(version, _)| *version)
            .collect();
        if head.cut_snapshot().is_some() && purged.is_none() && !sound.contains_key(&first) {
            head.snapshot_versions.insert(0, first);
            anew.insert(0, first);
        }
        anew.truncate(MOST_REMOVED);
        let mut save = Vec::new();
        for event in self.records.reader().changes_at(self.address, &anew).await? {
            // A head must not name a saved snapshot that is not there.
            save.push(event.ok_or_else(|| lost("an event that it needs has gone meanwhile"))?);
        }
        self.disputed =
            save.iter().filter_map(|c| Some((c.clone(), *sound.get(&c.version)?))).collect();
        // One that can be read and is not of this log stands in both.
        let unsound: BTreeSet<u64> = saved
            .keys()
            .copied()
            .chain(self.passed_over.iter().map(|passed| passed.version))
            .filter(|version| !head.snapshot_versions.contains(version))
            .collect();
        let drop_snapshots = unsound.into_iter().take(MOST_REMOVED).collect();
        let repair = Repair { save, drop_snapshots, ..Repair::of(found.revision(), head) };
        let base = RecoveryBase::FirstEvent(oldest);
        Ok((Folded { base, replay }, Some(repair)))
    }

    /// Whether history was cut since this head was written: the event with which it begins is gone.
    pub(super) async fn is_cut_since(&self, head: &Head) -> Result<bool> {
        match self.records.reader().changes_at(self.address, &[head.first_version]).await {
            Ok(found) => Ok(found.iter().all(Option::is_none)),
            // A damaged one is there.
            Err(Error::Corrupt { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All saved snapshots that can be read: their versions, their hashes, and since when history was kept.
    pub(super) async fn all_saved(&mut self) -> Result<BTreeMap<u64, (Hash, u64)>> {
        let (mut saved, mut from) = (BTreeMap::new(), 0);
        loop {
            let reader = self.records.reader();
            let (documents, next) =
                reader.versions(self.address, Kind::Snapshots, from, u64::MAX, self.batch).await?;
            for document in &documents {
                self.bytes += document.bytes();
                match schema::read_saved(self.address, document) {
                    Ok((change, first)) => drop(saved.insert(change.version, (change.hash, first))),
                    Err(Error::Corrupt { reason, .. }) => {
                        self.pass_over(document.key.version, &reason);
                    }
                    Err(error) => return Err(error),
                }
            }
            match next {
                Some(next) => from = next,
                None => return Ok(saved),
            }
        }
    }
}

/// Where history was cut, by what the saved snapshots say that are of the log: each, since when it was kept when
/// it was saved. A cut takes away those before it, so what is later than one that stands is not true.
fn cut(sound: &BTreeMap<u64, u64>, oldest: u64) -> Option<u64> {
    let first_saved = *sound.keys().next()?;
    sound.values().copied().filter(|since| (oldest..=first_saved).contains(since)).max()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_cut_is_what_the_latest_says_that_none_contradicts() {
        let cut =
            |saved: &[(u64, u64)], oldest| super::cut(&saved.iter().copied().collect(), oldest);
        assert_eq!(cut(&[], 5), None);
        assert_eq!(cut(&[(23, 23), (30, 1), (40, 23)], 5), Some(23));
        // The one at the cut is gone, the one behind it was saved since, or before.
        assert_eq!(cut(&[(30, 23), (40, 23)], 23), Some(23));
        assert_eq!(cut(&[(30, 1), (40, 1)], 23), None);
        // A cut at 33 would have taken away the one at 23, one at 41 all three.
        assert_eq!(cut(&[(23, 23), (30, 1), (40, 33)], 23), Some(23));
        assert_eq!(cut(&[(23, 1), (30, 24), (40, 33)], 2), None);
        // What is older than the log is not where it begins.
        assert_eq!(cut(&[(30, 22)], 23), None);
    }
}
