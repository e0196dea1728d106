//! Bits that flip, pages that are lost or change places, files cut short: the right data or `Corrupt`,
//! never a wrong answer, and the file is left as it is.

mod ask;

use std::path::Path;

use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use tai_state::{
    ChangeMetadata, Error, PersistenceConfig, StateSnapshot, StateStore, StoreOptions,
};

use crate::random::Random;
use crate::run::{Run, Tally};
use ask::{GOVERNORS, Truth, asked};

/// Not so many that their log is folded into the file before it is damaged.
const STATES: u64 = 80;
const PAGE: usize = 4096;
/// The header of a log and that of its first frame.
const LOG_BEGINS: usize = LOG_HEADER + 24;
/// A log is a header and frames: a page with a header of its own.
const LOG_HEADER: usize = 32;
const FRAME: usize = 24 + PAGE;
/// A log to be damaged holds so much.
const LEAST_LOG: usize = LOG_HEADER + 300 * FRAME;

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let rounds = run.size(500, 10_000);
    let (file, log) = (rounds * 4 / 5, rounds / 5);
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good.tai");
    let (store, truth, hash) = build(&good).await;
    drop(store);
    let hashes = [hash];
    let bytes = std::fs::read(&good).unwrap();
    let noticed = asked(&good, &truth, &hashes, "undamaged", &mut tally).await;
    tally.holds(!noticed, || "an undamaged store reports damage".to_owned());
    let mut trusting = 0;
    for (n, mut random) in run.rounds(file) {
        let mut damaged = bytes.clone();
        let (kind, what) = damage(&mut damaged, &mut random);
        if damaged.is_empty() || damaged == bytes {
            continue;
        }
        tally.count(kind, 1);
        let path = folder.path().join("damaged.tai");
        std::fs::write(&path, &damaged).unwrap();
        trusting += u64::from(believed(&path, &truth));
        std::fs::write(&path, &damaged).unwrap();
        let what = format!("round {n}: {what}");
        let noticed = asked(&path, &truth, &hashes, &what, &mut tally).await;
        tally.count("damages noticed in the file", u64::from(noticed));
        tally.holds(std::fs::read(&path).unwrap() == damaged, || {
            format!("{what}: the file was changed by looking at it")
        });
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(folder.path().join(format!("damaged.tai{suffix}")));
        }
    }
    // Most of a file is not read by every question: what hits nothing is rightly not noticed.
    tally.at_least("damages noticed in the file", file / 4);
    if file > 200 {
        let what = "the same file read with SQLite alone gives wrong data without an error";
        tally.control(what, trusting, file, file / 100);
    }
    self::log(run, log, &mut tally).await;
    tally
}

fn why() -> ChangeMetadata {
    ChangeMetadata::new("torture", "corrupt", None)
}

async fn save(store: &StateStore, governor: &str, id: &str, data: Value) {
    let snapshot = StateSnapshot::new(id.into(), data, why());
    store.save_state(governor, id, snapshot, why()).await.unwrap();
}

/// A store with saved snapshots, a large state and a deleted one; what it must say, and its content.
async fn build(path: &Path) -> (StateStore, Truth, String) {
    let mut options = StoreOptions::default();
    options.persistence =
        PersistenceConfig { snapshot_interval: 3, ..PersistenceConfig::default() };
    let store = StateStore::open_with(path, options).await.unwrap();
    let mut truth = Truth::new();
    for n in 0..STATES {
        let governor = GOVERNORS[(n % 3) as usize].to_owned();
        let id = format!("machine-{n:04}");
        let mut versions = Vec::new();
        for version in 1..=(1 + n % 7) {
            let filler = if n == 50 { 30_000 } else { 40 + (n * 13 % 400) as usize };
            let data = json!({"n": n, "version": version, "filler": "x".repeat(filler)});
            save(&store, &governor, &id, data.clone()).await;
            versions.push(data);
        }
        truth.insert((governor, id), versions);
    }
    store.delete_state("a", "machine-0003", None, why()).await.unwrap();
    truth.get_mut(&("a".into(), "machine-0003".into())).unwrap().push(Value::Null);
    let hash = store.verify(|_| {}).await.unwrap().content_hash.to_string();
    (store, truth, hash)
}

/// Damages it, and says of which kind that is and what was done.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) -> (&'static str, String) {
    let length = bytes.len() as u64;
    match random.below(16) {
        // Half of the flips hit the pages of an index, which are few: what they lose is not found,
        // rather than found damaged.
        0..=9 => {
            let index: Vec<usize> = (1..bytes.len() / PAGE)
                .filter(|page| matches!(bytes[page * PAGE], 2 | 10))
                .collect();
            let at = if random.percent(50) {
                let page = index[random.below(index.len() as u64) as usize];
                page * PAGE + random.below(PAGE as u64) as usize
            } else {
                random.below(length) as usize
            };
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            ("bits flipped", format!("bit {bit} of byte {at} flipped"))
        }
        10..=12 => {
            let size = [1, 16, 512, PAGE, PAGE][random.below(5) as usize];
            let at = random.below(length - size as u64) as usize;
            let at = if random.percent(50) { at } else { at / size * size };
            bytes[at..at + size].fill(0);
            let kind = if size == PAGE { "pages zeroed" } else { "stretches zeroed" };
            (kind, format!("{size} bytes from {at} zeroed"))
        }
        13..=14 => {
            let to = random.below(length) as usize;
            bytes.truncate(to);
            ("truncations", format!("truncated to {to}"))
        }
        _ => {
            let pages = length / PAGE as u64;
            let mut page = || random.below(pages) as usize * PAGE;
            let (a, b) = (page(), page());
            let content = bytes[a..a + PAGE].to_vec();
            bytes.copy_within(b..b + PAGE, a);
            bytes[b..b + PAGE].copy_from_slice(&content);
            ("pages swapped", format!("pages at {a} and {b} swapped"))
        }
    }
}

/// The control: what a reader gets who trusts SQLite. `true` when it is wrong and no error says so.
fn believed(path: &Path, truth: &Truth) -> bool {
    let read = || -> rusqlite::Result<Vec<(String, String, String)>> {
        let conn = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let mut statement = conn.prepare(
            "SELECT governor.name, state.name, body FROM state JOIN governor ON governor.id = governor",
        )?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        rows.collect()
    };
    let Ok(mut rows) = read() else { return false };
    rows.sort();
    let mut found = Vec::new();
    for (governor, state, body) in rows {
        // What is no JSON any more the reader notices.
        let Ok(body) = serde_json::from_str::<Value>(&body) else { return false };
        found.push((governor, state, body["version"].clone(), body["state"].clone()));
    }
    let escaped = |id: &str| id.replace('/', "%2F");
    let mut right: Vec<_> = truth
        .iter()
        .map(|((governor, state), versions)| {
            let last = versions.last().unwrap().clone();
            (escaped(governor), state.clone(), json!(versions.len()), last)
        })
        .collect();
    right.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    found != right
}

/// How much of a log is in force: when it is begun anew, it gets other salts, and what it has held stays behind.
fn in_force(log: &[u8]) -> usize {
    let salts = &log[16..24];
    let frames = log[LOG_HEADER..].chunks_exact(FRAME);
    LOG_HEADER + frames.take_while(|frame| &frame[8..16] == salts).count() * FRAME
}

/// The log that a kill leaves behind: damage in it may cost the very last commit, which cannot be told
/// from one that was cut short, and the one before it if that one's mark of being a commit is hit;
/// nothing else in silence. A log that is cut short is cut within the last commits: what is left of one that
/// is cut before is what it was before, and nothing in it says that there was more.
async fn log(run: &Run, rounds: u64, tally: &mut Tally) {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("live.tai");
    let (store, truth, _) = build(&live).await;
    let beside = folder.path().join("live.tai-wal");
    let mut more = 0;
    let (file, log, hashes, kept) = loop {
        // A log that has just begun anew holds little; damage to what stands behind that, of before, is none.
        while in_force(&std::fs::read(&beside).unwrap()) < LEAST_LOG {
            save(&store, "z", &format!("more-{more}"), json!("x".repeat(20_000))).await;
            more += 1;
        }
        let mut hashes = vec![store.verify(|_| {}).await.unwrap().content_hash.to_string()];
        let kept = in_force(&std::fs::read(&beside).unwrap());
        // Two commits that may be lost, in a governor of their own.
        for n in 0..2 {
            save(&store, "z", "last", json!(n)).await;
            hashes.push(store.verify(|_| {}).await.unwrap().content_hash.to_string());
        }
        let (file, log) = (std::fs::read(&live).unwrap(), std::fs::read(&beside).unwrap());
        // It may have begun anew meanwhile.
        if in_force(&log) > kept {
            break (file, log, hashes, kept);
        }
    };
    let end = in_force(&log);
    for (n, mut random) in run.rounds(rounds) {
        let mut damaged = log.clone();
        // One in four near the end, where the last commits are; one in eight where it says which log it is.
        let (from, to) = match random.below(8) {
            0 | 1 => (end - 60_000, end),
            2 => (0, LOG_BEGINS),
            _ => (0, end),
        };
        let at = from + random.below((to - from) as u64) as usize;
        tally.count("damages to the beginning of the log", u64::from(at < LOG_BEGINS));
        let what = match random.below(9) {
            0..=2 => {
                let most = if at < LOG_BEGINS { end as u64 / 2 } else { 600 };
                let to = (at + 1 + random.below(most) as usize).min(log.len());
                damaged[at..to].fill(0);
                format!("log, round {n}: {at}..{to} zeroed")
            }
            3 => {
                let frames = ((end - LOG_HEADER) / FRAME) as u64;
                let mut frame = || LOG_HEADER + random.below(frames) as usize * FRAME;
                let (a, b) = (frame(), frame());
                damaged.copy_within(b..b + FRAME, a);
                damaged[b..b + FRAME].copy_from_slice(&log[a..a + FRAME]);
                tally.count("frames of the log swapped", 1);
                format!("log, round {n}: frames at {a} and {b} swapped")
            }
            4 => {
                let to = kept + random.below((end - kept) as u64) as usize;
                damaged.truncate(to);
                tally.count("logs cut short", 1);
                format!("log, round {n}: truncated to {to}")
            }
            _ => {
                damaged[at] ^= 1 << random.below(8);
                format!("log, round {n}: a bit of byte {at} flipped")
            }
        };
        tally.count("damages to the log", 1);
        let path = folder.path().join("damaged.tai");
        let beside = folder.path().join("damaged.tai-wal");
        std::fs::write(&path, &file).unwrap();
        std::fs::write(&beside, &damaged).unwrap();
        let mut options = StoreOptions::default();
        options.create = false;
        let noticed = match StateStore::open_with(&path, options).await {
            Err(Error::Corrupt { .. }) => {
                tally.holds(std::fs::read(&beside).unwrap() == damaged, || {
                    format!("{what}: the log was changed")
                });
                true
            }
            Err(error) => {
                tally.broken(format!("{what}: {error}"));
                false
            }
            Ok(store) => {
                drop(store);
                asked(&path, &truth, &hashes, &what, tally).await
            }
        };
        tally.count("damages noticed in the log", u64::from(noticed));
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(folder.path().join(format!("damaged.tai{suffix}")));
        }
    }
    tally.at_least("damages noticed in the log", rounds / 3);
}
