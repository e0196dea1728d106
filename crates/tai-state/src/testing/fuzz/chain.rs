//! Logs with one or several things wrong: a fold takes a log only if each event follows from the one
//! before it.

use chrono::{DateTime, TimeDelta, Utc};

use super::Input;
use super::records::{address, drawn, typed, written};
use crate::backend::Kind;
use crate::chain::{Change, Hash};
use crate::replay::{Link, Replay};
use crate::schema;

/// A recipe for an orderly log, and then for what is done to it.
pub(super) fn chain(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let first = match input.below(4) {
        0 => input.edge().max(1),
        _ => 1,
    };
    let length = input.below(7) as u64;
    let mut log: Vec<Change> = Vec::new();
    let begin: Option<Hash> = (first > 1).then_some(Change::NO_HASH);
    let mut time = DateTime::<Utc>::UNIX_EPOCH;
    for version in (first..=u64::MAX).take(length as usize) {
        let prev_hash = log.last().map_or(begin, |last| Some(last.hash));
        time += TimeDelta::microseconds(input.byte().into());
        log.push(drawn(&mut input, version, time, prev_hash));
    }
    while !input.is_empty() {
        wrong(&mut input, &mut log);
    }
    let decoded = decode(&log);
    fold(first, &decoded, &log);
}

/// One thing that must not be, or that does not matter.
fn wrong(input: &mut Input<'_>, log: &mut Vec<Change>) {
    let count = log.len();
    if count == 0 {
        input.rest();
        return;
    }
    let what = input.below(9);
    let at = input.below(count);
    let other = input.below(count);
    match what {
        0 => drop(log.remove(at)),
        1 => log.swap(at, other),
        2 => log.insert(at, log[other].clone()),
        3 => log[at].data = input.json(3),
        4 => log[at].prev_hash = Some(log[other].hash).filter(|_| input.byte() > 64),
        5 => log[at].timestamp -= TimeDelta::microseconds(input.byte().into()),
        6 => log[at].version = input.edge(),
        7 => log[at].action = input.text(),
        _ => {
            // The forger who knows how: everything from here on fits again.
            for at in at..count {
                if at > 0 {
                    log[at].prev_hash = Some(log[at - 1].hash);
                }
                log[at].hash = log[at].expected_hash();
            }
            return;
        }
    }
    if input.byte() > 128 && at < log.len() {
        log[at].hash = log[at].expected_hash();
    }
}

/// The log as it is read from what is stored; the first event that is refused ends it.
fn decode(log: &[Change]) -> Vec<Change> {
    let mut decoded = Vec::new();
    for change in log {
        // A version that no store gives cannot be written.
        if change.version == 0 {
            break;
        }
        let event = written(change).remove(0);
        assert_eq!(event.key.kind, Kind::Events);
        let read = typed(schema::read_change(&address(), &event));
        let is_proved = change.hash == change.expected_hash()
            && change.version <= crate::transition::MAX_COUNTER;
        assert_eq!(read.is_some(), is_proved, "v{}: its hash decides", change.version);
        match read {
            Some(read) => {
                assert_eq!(read, *change);
                decoded.push(read);
            }
            None => break,
        }
    }
    decoded
}

/// Folds it, and compares with the rule spelled out.
fn fold(first: u64, decoded: &[Change], log: &[Change]) {
    let mut replay = Replay::from_first(first);
    let mut link = Link::first(first);
    let mut folded = 0;
    for (at, change) in decoded.iter().enumerate() {
        let before = at.checked_sub(1).map(|before| &decoded[before]);
        let follows = match before {
            None => change.version == first && change.prev_hash.is_some() == (first > 1),
            Some(before) => {
                before.version.checked_add(1) == Some(change.version)
                    && change.prev_hash == Some(before.expected_hash())
                    && change.timestamp >= before.timestamp
            }
        };
        let linked = typed(link.push(&change.address, change));
        assert_eq!(linked.is_some(), follows, "v{} after {before:?}", change.version);
        assert_eq!(typed(replay.push(change.clone())).is_some(), follows);
        if !follows {
            break;
        }
        folded += 1;
        assert_eq!(replay.last(), Some(change));
        assert_eq!((link.hash(), replay.folded()), (Some(change.hash), folded));
    }
    assert!(folded as usize <= log.len());
    // From any event of it the rest folds to the same.
    for base in 0..folded as usize {
        let mut replay = Replay::from_base(decoded[base].clone());
        for change in &decoded[base + 1..folded as usize] {
            replay.push(change.clone()).expect("it was folded before");
        }
        assert_eq!(replay.last(), Some(&decoded[folded as usize - 1]));
    }
}
