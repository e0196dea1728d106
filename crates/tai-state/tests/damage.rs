//! Random damage to a store's file gives the right data or `Corrupt`, never a wrong answer, never
//! a panic.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Random, snapshot, why};
use serde_json::{Value, json};
use tai_state::{Error, ListOptions, PersistenceConfig, StateStore, StoreOptions};

/// Not so many that their log is folded into the file before it is damaged.
const STATES: u64 = 80;
const GOVERNORS: [&str; 3] = ["a", "c", "governor/b"];

type Truth = BTreeMap<(String, String), Vec<Value>>;

/// A store with saved snapshots, a large state and a deleted one; and what it must say.
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
            store.save_state(&governor, &id, snapshot(&id, data.clone()), why()).await.unwrap();
            versions.push(data);
        }
        truth.insert((governor, id), versions);
    }
    store.delete_state("a", "machine-0003", None, why()).await.unwrap();
    truth.get_mut(&("a".into(), "machine-0003".into())).unwrap().push(Value::Null);
    let hash = store.verify(|_| {}).await.unwrap().content_hash.to_string();
    (store, truth, hash)
}

/// `true` when the answer was right, `false` when damage was reported.
fn right<T: PartialEq + std::fmt::Debug>(answer: Result<T, Error>, wanted: &T, what: &str) -> bool {
    match answer {
        Ok(found) => {
            assert!(found == *wanted, "WRONG ANSWER: {what}: {found:?}");
            true
        }
        Err(Error::Corrupt { .. }) => false,
        Err(error) => panic!("{what}: {error} ({})", error.code()),
    }
}

/// Asks everything. Returns whether any damage was reported.
async fn interrogate(path: &Path, truth: &Truth, hashes: &[String]) -> bool {
    let mut options = StoreOptions::default();
    options.create = false;
    let store = match StateStore::open_with(path, options).await {
        Ok(store) => store,
        Err(Error::Corrupt { .. } | Error::NotAStore { .. }) => return true,
        Err(error) => panic!("opening: {error} ({})", error.code()),
    };
    let mut clean = true;
    for ((governor, id), versions) in truth {
        let what = format!("{governor}/{id}");
        let newest = (versions.last().unwrap().clone(), versions.len() as u64);
        let got = match store.get_state(governor, id).await {
            Err(Error::StateNotFound { .. }) if newest.0.is_null() => Ok(newest.clone()),
            got => got.map(|(state, version)| (state.data, version)),
        };
        clean &= right(got, &newest, &format!("get {what}"));
        let first = store.state_at_version(governor, id, 1).await.map(|state| state.data);
        clean &= right(first, &versions[0], &format!("{what} at v1"));
        let history = async {
            let mut history = store.history(governor, id, ..).await?;
            let mut all = Vec::new();
            loop {
                let page = history.next_page().await?;
                if page.is_empty() {
                    return Ok(all);
                }
                all.extend(page.into_iter().map(|event| event.to_state.data));
            }
        };
        clean &= right(history.await, versions, &format!("history of {what}"));
    }
    for governor in GOVERNORS {
        let listed = async {
            let mut options = ListOptions::default().limit(7).with_deleted();
            let mut all = Vec::new();
            loop {
                let page = store.list_states(governor, &options).await?;
                all.extend(
                    page.states
                        .into_iter()
                        .map(|r| (r.snapshot.id.to_string(), r.snapshot.version)),
                );
                match page.next {
                    Some(next) => options = options.after(next),
                    None => return Ok(all),
                }
            }
        };
        let wanted: Vec<(String, u64)> = truth
            .iter()
            .filter(|((of, _), _)| of == governor)
            .map(|((_, id), versions)| (id.clone(), versions.len() as u64))
            .collect();
        clean &= right(listed.await, &wanted, &format!("list of {governor}"));
        let absent = match store.get_state(governor, "machine-0011x").await {
            Err(Error::StateNotFound { .. }) => Ok(()),
            other => other.map(|_| panic!("an absent state was found")),
        };
        clean &= right(absent, &(), "an absent state");
    }
    let governors = store.list_governors(None, 10).await;
    let named = |all: &[tai_state::GovernorId]| -> Vec<String> {
        all.iter().map(ToString::to_string).filter(|id| id != "z").collect()
    };
    let governors = governors.map(|all| named(&all));
    clean &= right(governors, &GOVERNORS.map(String::from).to_vec(), "the governors");
    match store.verify(|_| {}).await {
        Ok(report) if report.ok => {
            let found = report.content_hash.to_string();
            assert!(hashes.contains(&found), "verify says ok and is wrong");
            assert!(clean, "verify says ok, but reading met damage");
        }
        Ok(_) | Err(Error::Corrupt { .. }) => clean = false,
        Err(error) => panic!("verify: {error}"),
    }
    !clean
}

fn damage(bytes: &mut Vec<u8>, random: &mut Random) -> String {
    let length = bytes.len() as u64;
    match random.below(10) {
        // Half of the flips hit the pages of an index, which are few: what they lose is not found,
        // rather than found damaged.
        0..=4 => {
            let index: Vec<usize> = (1..bytes.len() / 4096)
                .filter(|page| matches!(bytes[page * 4096], 2 | 10))
                .collect();
            let at = if random.below(2) == 0 {
                index[random.below(index.len() as u64) as usize] * 4096
                    + random.below(4096) as usize
            } else {
                random.below(length) as usize
            };
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} flipped")
        }
        5..=7 => {
            let size = [1, 16, 512, 4096][random.below(4) as usize];
            let at = random.below(length - size) as usize;
            let at = if random.below(2) == 0 { at } else { at / size as usize * size as usize };
            bytes[at..at + size as usize].fill(0);
            format!("{size} bytes from {at} zeroed")
        }
        8 => {
            let to = random.below(length) as usize;
            bytes.truncate(to);
            format!("truncated to {to}")
        }
        _ => {
            let pages = length / 4096;
            let (a, b) = (random.below(pages) as usize * 4096, random.below(pages) as usize * 4096);
            let page = bytes[a..a + 4096].to_vec();
            bytes.copy_within(b..b + 4096, a);
            bytes[b..b + 4096].copy_from_slice(&page);
            format!("pages at {a} and {b} swapped")
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn right_data_or_corrupt() {
    let rounds: u64 =
        std::env::var("TAI_STATE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(500);
    let mut random = Random::announced("damage");
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good.tai");
    let (store, truth, hash) = build(&good).await;
    drop(store);
    let hashes = [hash];
    let bytes = std::fs::read(&good).unwrap();
    assert!(!interrogate(&good, &truth, &hashes).await, "an undamaged store reports damage");
    let mut noticed = 0;
    for round in 0..rounds {
        let mut damaged = bytes.clone();
        let what = damage(&mut damaged, &mut random);
        if damaged.is_empty() || damaged == bytes {
            continue;
        }
        let path = folder.path().join(format!("{round}.tai"));
        std::fs::write(&path, &damaged).unwrap();
        println!("round {round}: {what}");
        noticed += u64::from(interrogate(&path, &truth, &hashes).await);
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(folder.path().join(format!("{round}.tai{suffix}")));
        }
    }
    println!("{noticed} of {rounds} damages were noticed, the others hit nothing that is read");
    assert!(noticed > rounds / 4, "the damage hardly hits anything: the test has no teeth");
}

/// The log that a kill leaves behind: damage in it may cost the very last commit, which cannot be told
/// from one that was cut short, and the one before it if that one's mark of being a commit is hit;
/// nothing else in silence.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_is_not_passed_over() {
    let mut random = Random::announced("log");
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("live.tai");
    let (store, truth, before) = build(&live).await;
    // Two commits that may be lost, in a governor of their own.
    let mut hashes = vec![before];
    for n in 0..2 {
        store.save_state("z", "last", snapshot("last", json!(n)), why()).await.unwrap();
        hashes.push(store.verify(|_| {}).await.unwrap().content_hash.to_string());
    }
    let file = std::fs::read(&live).unwrap();
    let log = std::fs::read(folder.path().join("live.tai-wal")).unwrap();
    let (mut noticed, rounds) = (0, 200);
    for round in 0..rounds {
        let mut damaged = log.clone();
        // One in four near the end, where the last commits are.
        let from = if random.below(4) == 0 { log.len() - 60_000 } else { 0 };
        let at = from + random.below((log.len() - from) as u64) as usize;
        let what = if random.below(3) == 0 {
            let end = (at + 600).min(log.len());
            damaged[at..end].fill(0);
            format!("600 bytes from {at} zeroed")
        } else {
            damaged[at] ^= 1 << random.below(8);
            format!("a bit of byte {at} flipped")
        };
        println!("round {round}: {what}");
        let path = folder.path().join(format!("{round}.tai"));
        let beside = folder.path().join(format!("{round}.tai-wal"));
        std::fs::write(&path, &file).unwrap();
        std::fs::write(&beside, &damaged).unwrap();
        let mut options = StoreOptions::default();
        options.create = false;
        match StateStore::open_with(&path, options).await {
            Err(Error::Corrupt { .. }) => {
                noticed += 1;
                assert!(std::fs::read(&beside).unwrap() == damaged, "the log was changed");
            }
            Err(error) => panic!("{error}"),
            Ok(store) => {
                drop(store);
                noticed += u64::from(interrogate(&path, &truth, &hashes).await);
            }
        }
    }
    println!("{noticed} of {rounds} damages to the log were noticed");
    assert!(noticed > rounds / 3, "the damage hardly hits anything: the test has no teeth");
}
