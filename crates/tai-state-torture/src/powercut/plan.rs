//! Which images are made: every boundary of a sync, and drawn ones.

use super::disk::{Disk, Event, Kept, sectors};
use crate::random::Random;

/// What a cut keeps of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nothing,
    Everything,
    AllBut(usize),
    Only(usize),
    Drawn,
}

/// One image.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) n: u64,
    /// So many events had happened.
    pub(super) cut: usize,
    pub(super) kind: Kind,
    pub(super) random: Random,
}

/// All images of a run, in the order of their cuts.
pub(super) fn all(events: &[Event], seed: u64, size: u64) -> Vec<Planned> {
    let mut whole = Vec::new();
    let mut single = Vec::new();
    let mut disk = Disk::default();
    for at in 0..events.len() {
        let is_sync = matches!(events[at], Event::Sync { .. } | Event::SyncFolder { .. });
        if is_sync {
            boundary(&disk, at, &mut whole, &mut single);
        }
        disk.take(events, at);
        if is_sync {
            boundary(&disk, at + 1, &mut whole, &mut single);
        } else if matches!(events[at], Event::Told) {
            whole.extend([(at + 1, Kind::Nothing), (at + 1, Kind::Everything)]);
        }
    }
    // A run that is too short for all of them draws some, and leaves half for what is drawn freely.
    let mut random = Random::of_round(seed, u64::MAX);
    let half = size as usize / 2;
    thinned(&mut whole, half / 2, &mut random);
    let room = half - whole.len();
    thinned(&mut single, room, &mut random);
    let mut planned = Vec::new();
    for n in 0..size {
        let mut random = Random::of_round(seed, n);
        let (cut, kind) = match whole.pop().or_else(|| single.pop()) {
            Some(fixed) => fixed,
            None => (1 + random.below(events.len() as u64) as usize, Kind::Drawn),
        };
        planned.push(Planned { n, cut, kind, random });
    }
    planned.sort_by_key(|planned| planned.cut);
    planned
}

fn boundary(
    disk: &Disk,
    cut: usize,
    whole: &mut Vec<(usize, Kind)>,
    single: &mut Vec<(usize, Kind)>,
) {
    whole.extend([(cut, Kind::Nothing), (cut, Kind::Everything)]);
    let unsynced = disk.unsynced().len();
    if unsynced > 1 {
        single.extend((0..unsynced).flat_map(|n| [(cut, Kind::AllBut(n)), (cut, Kind::Only(n))]));
    }
}

/// Leaves so many, drawn without looking.
fn thinned<T>(all: &mut Vec<T>, room: usize, random: &mut Random) {
    while all.len() > room {
        all.swap_remove(random.below(all.len() as u64) as usize);
    }
}

impl Planned {
    /// What of the unsynced is kept, and in which order it got there; and what that is called.
    pub(super) fn kept(&mut self, disk: &Disk, events: &[Event]) -> (Vec<Kept>, &'static str) {
        let unsynced = disk.unsynced();
        let whole = |at: &usize| (*at, None);
        match self.kind {
            Kind::Nothing => (Vec::new(), "everything unsynced lost"),
            Kind::Everything => (unsynced.iter().map(whole).collect(), "everything kept"),
            Kind::AllBut(n) => {
                let kept = unsynced.iter().enumerate().filter(|(at, _)| *at != n);
                (kept.map(|(_, at)| whole(at)).collect(), "one unsynced change lost")
            }
            Kind::Only(n) => {
                (unsynced.get(n).map(whole).into_iter().collect(), "one unsynced change kept")
            }
            Kind::Drawn => self.drawn(&unsynced, events),
        }
    }

    fn drawn(&mut self, unsynced: &[usize], events: &[Event]) -> (Vec<Kept>, &'static str) {
        let random = &mut self.random;
        let chance = [10, 50, 90][random.below(3) as usize];
        let how = random.below(5);
        let in_order = how == 0;
        let many = random.below(unsynced.len() as u64 + 1) as usize;
        // The folder's changes go through one journal on ext4 and xfs, so a part of them from the
        // beginning is there; every other time they are drawn one by one, which is worse.
        let names_in_order = random.percent(50);
        let names: Vec<usize> =
            unsynced.iter().filter(|at| matches!(events[**at], Event::Name(_))).copied().collect();
        let names_kept = random.below(names.len() as u64 + 1) as usize;
        let mut kept: Vec<Kept> = Vec::new();
        for (n, at) in unsynced.iter().enumerate() {
            let is_name = matches!(events[*at], Event::Name(_));
            let keeps = match () {
                () if in_order => n < many,
                () if is_name && names_in_order => names[..names_kept].contains(at),
                () => random.percent(chance),
            };
            if !keeps {
                continue;
            }
            let is_last_of_a_part = in_order && n + 1 == many;
            let part = match &events[*at] {
                Event::Write { at, data, .. } if how == 2 || is_last_of_a_part => {
                    let mut parts = sectors(*at, data.len());
                    parts.retain(|_| random.percent(60));
                    Some(parts)
                }
                Event::Write { at, data, .. } if how == 3 => {
                    let mut parts = sectors(*at, data.len());
                    for part in &mut parts {
                        let end = random.below(part.len() as u64 + 1) as usize;
                        part.end = part.start + end;
                    }
                    Some(parts)
                }
                _ => None,
            };
            kept.push((*at, part));
        }
        let name = match how {
            0 => "cut in the middle of a write",
            1 => "a part of the unsynced changes kept",
            2 => "with some sectors of each write",
            3 => "with sectors that are torn themselves",
            _ => {
                for n in (1..kept.len()).rev() {
                    kept.swap(n, random.below(n as u64 + 1) as usize);
                }
                "in another order"
            }
        };
        (kept, name)
    }
}
