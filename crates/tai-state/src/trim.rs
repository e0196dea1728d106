//! Every decision about how much of a state's past is kept, in pure functions.
//!
//! Like [`plan`](crate::transition::plan) they take a head as it was read and say what is to be written;
//! what follows is one commit. None of them makes a version: the newest change stays as it is.

use crate::chain::Change;
use crate::transition::{Head, surplus};

/// How many documents one commit removes at most.
pub(crate) const MOST_REMOVED: usize = 400;

/// What is to be written: the head with other notes, and the documents that come and go with it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Trim {
    pub(crate) head: Head,
    pub(crate) save: Option<Change>,
    pub(crate) drop_snapshots: Vec<u64>,
    pub(crate) drop_events: Vec<u64>,
}

impl Trim {
    fn of(head: Head) -> Self {
        Self { head, save: None, drop_snapshots: Vec::new(), drop_events: Vec::new() }
    }

    /// Takes the first of these saved snapshots away, and says whether that was all of them.
    fn drop_snapshots(&mut self, mut versions: Vec<u64>) -> bool {
        let is_all = versions.len() <= MOST_REMOVED;
        versions.truncate(MOST_REMOVED);
        self.head.snapshot_versions.retain(|version| !versions.contains(version));
        self.drop_snapshots = versions;
        is_all
    }
}

/// Gives up what stands before `base`, the event at which history begins from now on, and saves
/// a snapshot there, which says so. `None` when history does not begin earlier. Where there are very many saved
/// snapshots to remove, they go first, step by step. Nothing may be left of what was given up before.
///
/// With it goes the event at which history began until now, so that without a head nobody takes what is
/// left for a whole log (`retention.rs` says why that matters).
pub(crate) fn cut(head: &Head, base: &Change) -> Option<Trim> {
    let first = base.version;
    if first <= head.first_version || first > head.version() {
        return None;
    }
    let mut trim = Trim::of(head.clone());
    let old = head.snapshot_versions.iter().copied().filter(|version| *version < first).collect();
    if trim.drop_snapshots(old) {
        trim.drop_events = vec![head.first_version];
        trim.head.first_version = first;
        trim.head.oldest_version = head.first_version + 1;
        if !trim.head.snapshot_versions.contains(&first) {
            trim.head.snapshot_versions.insert(0, first);
        }
        // One that stands there is written anew: it says that history begins with it.
        trim.save = Some(base.clone());
    }
    Some(trim)
}

/// Notes that nothing is left below `upto`, where history begins or has begun. `None` when that is noted.
pub(crate) fn swept(head: &Head, upto: u64) -> Option<Trim> {
    if upto <= head.oldest_version || upto > head.first_version {
        return None;
    }
    let mut trim = Trim::of(head.clone());
    trim.head.oldest_version = upto;
    Some(trim)
}

/// Removes saved snapshots, the oldest first, until so many are left beside the one at the cut. `None`
/// when there are not more.
pub(crate) fn prune(head: &Head, kept: usize) -> Option<Trim> {
    let surplus = surplus(&head.snapshot_versions, head.cut_snapshot(), kept);
    if surplus.is_empty() {
        return None;
    }
    let mut trim = Trim::of(head.clone());
    trim.drop_snapshots(surplus);
    Some(trim)
}

/// Saves a snapshot of the newest version. `None` when there is one.
pub(crate) fn save(head: &Head) -> Option<Trim> {
    if head.snapshot_versions.contains(&head.version()) {
        return None;
    }
    let mut trim = Trim::of(head.clone());
    trim.head.snapshot_versions.push(head.version());
    trim.save = Some(head.change.clone());
    Some(trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PersistenceConfig;
    use crate::transition::plan;
    use crate::transition::tests::{put, request, run, time};
    use crate::transition::{Expect, Wish};

    fn policy() -> PersistenceConfig {
        PersistenceConfig {
            snapshot_interval: 3,
            snapshot_retention: 2,
            ..PersistenceConfig::default()
        }
    }

    /// A log of twelve versions with saved snapshots at 9 and 12.
    fn log() -> (Head, Vec<Change>) {
        let requests: Vec<_> = (1..=12).map(|n| request(put(n), Expect::Any)).collect();
        let steps = run(&requests, &policy());
        let head = steps.last().unwrap().head.clone();
        (head, steps.into_iter().map(|step| step.head.change).collect())
    }

    #[test]
    fn a_cut_leaves_a_base_and_what_follows() {
        let (head, log) = log();
        for first in 2..=12 {
            let trim = cut(&head, &log[first - 1]).unwrap();
            let first = first as u64;
            assert_eq!((trim.head.first_version, trim.head.oldest_version), (first, 2));
            assert_eq!(trim.drop_events, [1]);
            assert_eq!(trim.head.change, head.change);
            assert_eq!(trim.head.snapshot_versions.first(), Some(&first));
            assert_eq!(trim.save.as_ref(), Some(&log[first as usize - 1]), "saved anew too");
            let kept = trim.head.snapshot_versions.iter().filter(|v| **v != first);
            let dropped = trim.drop_snapshots.iter();
            assert!(kept.clone().all(|v| *v > first) && dropped.clone().all(|v| *v < first));
            // A second time there is nothing to do.
            assert_eq!(cut(&trim.head, &log[first as usize - 1]), None);
        }
        assert_eq!(cut(&head, &log[0]), None);
    }

    #[test]
    fn the_snapshot_at_the_cut_stays_whatever_is_kept() {
        let (head, log) = log();
        let mut head = cut(&head, &log[4]).unwrap().head;
        assert_eq!(head.snapshot_versions, [5, 9, 12]);
        assert_eq!(prune(&head, 2), None);
        for n in 13..=30 {
            let request = request(put(n), Expect::Any);
            head = plan(Some(&head), &request, time(100), "n", &policy()).unwrap().head;
        }
        assert_eq!(head.snapshot_versions, [5, 27, 30]);
        let trim = prune(&head, 0).unwrap();
        assert_eq!((trim.head.snapshot_versions, trim.drop_snapshots), (vec![5], vec![27, 30]));
    }

    #[test]
    fn only_what_was_given_up_is_noted_as_swept() {
        let (head, log) = log();
        let head = cut(&head, &log[7]).unwrap().head;
        assert_eq!(swept(&head, 9), None);
        let trim = swept(&head, 8).unwrap();
        assert_eq!((trim.head.oldest_version, trim.head.first_version), (8, 8));
        assert!(trim.drop_events.is_empty());
        assert_eq!(swept(&trim.head, 8), None);
        // A clean-up that comes late, after another has let history begin later.
        let later = cut(&trim.head, &log[10]).unwrap();
        assert_eq!((later.head.first_version, later.head.oldest_version), (11, 9));
        assert_eq!((later.drop_events, swept(&later.head, 8)), (vec![8], None));
    }

    #[test]
    fn very_many_saved_snapshots_go_step_by_step() {
        let (mut head, log) = log();
        head.snapshot_versions = (1..=1_000).collect();
        head.change.version = 2_000;
        let mut base = log[11].clone();
        base.version = 1_900;
        let mut steps = 0;
        while let Some(trim) = cut(&head, &base) {
            assert!(trim.drop_snapshots.len() <= MOST_REMOVED);
            head = trim.head;
            steps += 1;
        }
        assert_eq!((steps, head.snapshot_versions, head.first_version), (3, vec![1_900], 1_900));
    }

    #[test]
    fn a_snapshot_is_saved_once() {
        let (mut head, _) = log();
        head.snapshot_versions.pop();
        let trim = save(&head).unwrap();
        assert_eq!(trim.head.snapshot_versions, [9, 12]);
        assert_eq!(save(&trim.head), None);
    }

    #[test]
    fn a_purge_gives_up_everything_and_keeps_the_version() {
        let (head, _) = log();
        let purge = request(Wish::Purge, Expect::Any);
        let step = plan(Some(&head), &purge, time(50), "n", &policy()).unwrap();
        assert_eq!(step.head.version(), 13);
        assert_eq!((step.head.first_version, step.head.oldest_version), (13, 1));
        assert!(step.head.change.deleted && step.head.change.data.is_null());
        assert_eq!((step.drop_snapshots, step.save_snapshot), (vec![9, 12], false));
        assert!(plan(None, &purge, time(50), "n", &policy()).is_err());
    }
}
