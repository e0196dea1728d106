//! Which version of a state there was at a time.

use chrono::{DateTime, TimeDelta, Utc};

use super::trimmed;
use crate::chain::{Change, format_time};
use crate::clock::to_micros;
use crate::error::{Error, Result};
use crate::keys::Address;
use crate::records::KnownHead;
use crate::schema;
use crate::store::StateStore;

impl StateStore {
    /// The newest change that is kept and not later than a time.
    ///
    /// # Errors
    /// [`Error::HistoryTrimmed`] when there is none, and more is cleaned up by now than the head says.
    pub(crate) async fn newest_until(
        &self,
        address: &Address,
        head: &KnownHead,
        time: DateTime<Utc>,
    ) -> Result<Option<Change>> {
        let mut known = head.clone();
        loop {
            let found = self.newest_kept_until(address, &known, time).await;
            if !matches!(found, Ok(None) | Err(Error::HistoryTrimmed { .. })) {
                return found;
            }
            // What was looked for may have been cleaned up since the head was read, or what was looked at
            // on the way.
            match self.records.head(address).await? {
                Some(newer) if newer.head.first_version > known.head.first_version => known = newer,
                _ if known.head.first_version > head.head.first_version => {
                    return Err(trimmed(address, &known, &format_time(&time)));
                }
                _ => return found,
            }
        }
    }

    async fn newest_kept_until(
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
        // No event is older, and not every engine has a word for it.
        if time < schema::FIRST_TIME {
            return Ok(None);
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

    /// The versions that were made from one time to another. None when the last is before the first.
    pub(crate) async fn versions_between(
        &self,
        address: &Address,
        head: &KnownHead,
        from: Option<DateTime<Utc>>,
        to: Option<DateTime<Utc>>,
    ) -> Result<(u64, u64)> {
        let first_kept = head.head.first_version;
        // Times are whole microseconds; what is within one has not passed before it.
        let micros = |time: DateTime<Utc>| match to_micros(time) {
            whole if whole < time => whole.checked_add_signed(TimeDelta::microseconds(1)),
            whole => Some(whole),
        };
        // Beyond the last time there is nothing; before the first there was nothing.
        let from = from.map(|from| micros(from).unwrap_or(DateTime::<Utc>::MAX_UTC));
        let before = from.map(|from| {
            let before = from.checked_sub_signed(TimeDelta::microseconds(1));
            before.unwrap_or(DateTime::<Utc>::MIN_UTC)
        });
        let first = match before {
            None => first_kept,
            Some(before) => match self.newest_until(address, head, before).await? {
                Some(change) => change.version + 1,
                None if first_kept > 1 => {
                    let asked = format!("what happened since {}", format_time(&before));
                    return Err(trimmed(address, head, &asked));
                }
                None => first_kept,
            },
        };
        let last = match to {
            None => head.head.version(),
            Some(to) => {
                self.newest_until(address, head, to).await?.map_or(0, |change| change.version)
            }
        };
        if last == 0 && first_kept > 1 {
            let asked = to.map(|to| format!("what happened until {}", format_time(&to)));
            return Err(trimmed(address, head, &asked.unwrap_or_default()));
        }
        Ok((first, last))
    }
}
