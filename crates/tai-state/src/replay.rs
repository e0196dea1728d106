//! Folds a log into a state, and notices everything that a log must not be: a gap, a wrong order, a
//! broken chain, time that goes backwards.

use chrono::{DateTime, Utc};

use crate::chain::{Change, Hash};
use crate::error::{Error, Result};
use crate::keys::Address;

/// How far a log was proved: what the next event must follow from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Link {
    /// The version, the hash and the time of the last event.
    last: Option<(u64, Hash, DateTime<Utc>)>,
    /// The first version to expect when there is none yet.
    first: u64,
}

impl Link {
    /// From the oldest kept event. Where that is not version 1, the chain is proved from there on.
    pub(crate) fn first(first: u64) -> Self {
        Self { last: None, first }
    }

    /// After this change.
    pub(crate) fn after(change: &Change) -> Self {
        let last = (change.version, change.hash, change.timestamp);
        Self { last: Some(last), first: change.version }
    }

    /// The version that must come next.
    pub(crate) fn next_version(&self) -> u64 {
        self.last.map_or(self.first, |(version, _, _)| version + 1)
    }

    /// The hash of the last event.
    pub(crate) fn hash(&self) -> Option<Hash> {
        self.last.map(|(_, hash, _)| hash)
    }

    /// Takes the next change. Its own hash must have been checked (reading it does).
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first version that does not fit.
    pub(crate) fn push(&mut self, address: &Address, change: &Change) -> Result<()> {
        let next = self.next_version();
        let wrong = |reason: String| {
            Err(Error::corrupt(format!("the log of {address} at v{next}"), reason))
        };
        if change.version != next {
            return wrong(format!("version {} stands there", change.version));
        }
        match self.last {
            Some((_, hash, _)) if change.prev_hash != Some(hash) => {
                return wrong("it does not follow from the event before it".into());
            }
            Some((_, _, time)) if change.timestamp < time => {
                return wrong("its time is earlier than that of the event before it".into());
            }
            None if next == 1 && change.prev_hash.is_some() => {
                return wrong("it names an event before version 1".into());
            }
            None if next > 1 && change.prev_hash.is_none() => {
                return wrong("it names no event before it".into());
            }
            _ => {}
        }
        *self = Self::after(change);
        Ok(())
    }
}

/// A fold in progress. Feed it the changes of one state in ascending order.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    link: Link,
    last: Option<Change>,
    folded: u64,
}

impl Replay {
    /// From the oldest kept event.
    pub(crate) fn from_first(first: u64) -> Self {
        Self { link: Link::first(first), last: None, folded: 0 }
    }

    /// From a saved snapshot, whose own hash must have been checked.
    pub(crate) fn from_base(base: Change) -> Self {
        Self { link: Link::after(&base), last: Some(base), folded: 0 }
    }

    /// The version that must come next.
    pub(crate) fn next_version(&self) -> u64 {
        self.link.next_version()
    }

    /// Takes the next change, as [`Link::push`].
    ///
    /// # Errors
    /// As [`Link::push`].
    pub(crate) fn push(&mut self, change: Change) -> Result<()> {
        self.link.push(&change.address, &change)?;
        self.folded += 1;
        self.last = Some(change);
        Ok(())
    }

    /// How many changes were folded.
    pub(crate) fn folded(&self) -> u64 {
        self.folded
    }

    /// The newest change so far.
    pub(crate) fn last(&self) -> Option<&Change> {
        self.last.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PersistenceConfig;
    use crate::transition::tests::{request, time};
    use crate::transition::{Expect, Head, Wish, plan};
    use serde_json::json;

    fn log(length: u64) -> Vec<Change> {
        let mut head: Option<Head> = None;
        let policy = PersistenceConfig::default();
        (1..=length)
            .map(|n| {
                let request = request(Wish::Put(json!(n)), Expect::Any);
                let step = plan(head.as_ref(), &request, time(n as i64), "n", &policy).unwrap();
                head = Some(step.head.clone());
                step.head.change
            })
            .collect()
    }

    fn fold(mut replay: Replay, log: impl IntoIterator<Item = Change>) -> Result<Option<Change>> {
        for change in log {
            replay.push(change)?;
        }
        Ok(replay.last)
    }

    #[test]
    fn a_log_folds_to_its_last_change_from_anywhere() {
        let log = log(9);
        let newest = log.last().cloned();
        assert_eq!(fold(Replay::from_first(1), log.clone()).unwrap(), newest);
        for base in 0..9 {
            let replay = Replay::from_base(log[base].clone());
            assert_eq!(fold(replay, log[base + 1..].to_vec()).unwrap(), newest);
        }
        assert_eq!(fold(Replay::from_first(4), log[3..].to_vec()).unwrap(), newest);
    }

    #[test]
    fn a_chain_begins_with_version_1_or_names_what_came_before() {
        let log = log(3);
        let mut link = Link::first(2);
        assert_eq!((link.next_version(), link.hash()), (2, None));
        link.push(&log[1].address, &log[1]).unwrap();
        assert_eq!((link.next_version(), link.hash()), (3, Some(log[1].hash)));

        let refused = |first: u64, prev_hash| {
            let index = usize::try_from(first).unwrap() - 1;
            let mut change = log[index].clone();
            change.prev_hash = prev_hash;
            let refused = Link::first(first).push(&change.address, &change).unwrap_err();
            assert_eq!(refused.code(), "corrupt");
            refused.to_string()
        };
        assert!(refused(1, Some(log[1].hash)).contains("before version 1"));
        assert!(refused(2, None).contains("names no event before it"));
        assert!(refused(3, None).contains("names no event before it"));
    }

    #[test]
    fn equal_times_follow_one_another_and_all_are_counted() {
        let mut log = log(4);
        log[2].timestamp = log[1].timestamp;
        let mut replay = Replay::from_base(log[0].clone());
        assert_eq!((replay.folded(), replay.next_version()), (0, 2));
        for (count, change) in (1..).zip(&log[1..]) {
            replay.push(change.clone()).unwrap();
            assert_eq!(replay.folded(), count);
        }
    }

    #[test]
    fn damage_is_named_by_version() {
        let good = log(5);
        let other = {
            let mut other = good[2].clone();
            other.data = json!("other");
            other.hash = other.expected_hash();
            other
        };
        let with = |at: usize, change: &Change| {
            let mut log = good.clone();
            log[at] = change.clone();
            log
        };
        let mut gap = good.clone();
        gap.remove(2);
        let mut back = good[4].clone();
        back.timestamp = time(-5);
        for (log, at) in [
            (gap, "v3"),
            (with(2, &good[1]), "v3"),
            (with(2, &other), "v4"),
            (with(4, &back), "v5"),
            (good[1..].to_vec(), "v1"),
        ] {
            let error = fold(Replay::from_first(1), log).unwrap_err();
            assert_eq!(error.code(), "corrupt");
            assert!(error.to_string().contains(at), "{error}");
        }
    }
}
