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

impl Fold<'_> {
    /// The whole log, since nothing says where it may begin.
    pub(super) async fn without_head(&mut self, found: &Found) -> Result<(Folded, Option<Repair>)> {
        let place = format!("the head of {}", self.address);
        let lost = |reason: &str| match found {
            Found::Damaged(damage, _) => Error::corrupt(&place, format!("{damage}; {reason}")),
            _ => Error::corrupt(&place, format!("it is missing; {reason}")),
        };
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
        let mut sound = Vec::new();
        let (mut purged, mut kept_since) = (None, 0);
        let mut replay = Replay::from_first(oldest);
        let mut next = Some(tail);
        while let Some(tail) = next {
            for document in &tail.documents {
                let change = schema::read_change(self.address, document)?;
                let version = change.version;
                if is_purge(&change) {
                    (purged, sound) = (Some(version), Vec::new());
                }
                match saved.get(&version) {
                    Some((hash, first)) if *hash == change.hash => {
                        sound.push(version);
                        kept_since = kept_since.max(*first);
                    }
                    Some(_) => self.pass_over(version, "it is not what the log says"),
                    None => {}
                }
                replay.push(change)?;
            }
            next = self.after(&tail).await?;
        }
        let change = replay.last().cloned().ok_or_else(|| lost("there are no events"))?;
        let first = match (purged, oldest) {
            (Some(purged), _) => Some(purged),
            (None, 1) => Some(1),
            // Every saved snapshot knows since when history was kept; those before a cut go with it.
            (None, _) if kept_since >= oldest => Some(kept_since),
            // One that cannot be read, and stands before all that can, may be the one at the cut.
            (None, _) => unreadable.into_iter().find(|version| {
                (oldest..=change.version).contains(version)
                    && sound.first().is_none_or(|first| version < first)
            }),
        };
        let first = first.ok_or_else(|| {
            lost(&format!(
                "its log begins at v{oldest}, and no saved snapshot says that it should: what stood \
                 before was cleaned up or is lost"
            ))
        })?;
        let mut save = Vec::new();
        let is_saved = sound.contains(&first);
        let says_so = saved.get(&first).is_some_and(|(_, kept_since)| *kept_since == first);
        if first > 1 && if is_saved { !says_so } else { purged.is_none() } {
            let begins = self.records.reader().changes_at(self.address, &[first]).await?;
            let begins = begins.into_iter().next().flatten();
            // A head must not name a saved snapshot that is not there.
            save.push(begins.ok_or_else(|| lost("the event at which its history begins is gone"))?);
            if !is_saved {
                sound.insert(0, first);
            }
        }
        // One that can be read and is not of this log stands in both.
        let unsound: BTreeSet<u64> = saved
            .keys()
            .copied()
            .chain(self.passed_over.iter().map(|passed| passed.version))
            .filter(|version| !sound.contains(version))
            .collect();
        let drop_snapshots = unsound.into_iter().take(crate::trim::MOST_REMOVED).collect();
        let head =
            Head { change, snapshot_versions: sound, first_version: first, oldest_version: oldest };
        let repair = Repair { save, drop_snapshots, ..Repair::of(found.revision(), head) };
        let base = RecoveryBase::FirstEvent(oldest);
        Ok((Folded { base, replay }, Some(repair)))
    }

    /// All saved snapshots that can be read: their versions, their hashes, and since when history was kept.
    async fn all_saved(&mut self) -> Result<BTreeMap<u64, (Hash, u64)>> {
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
