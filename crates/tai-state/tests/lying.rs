//! What is stored lies: bits flip in bodies, documents vanish, change places, are cut off. Loading gives
//! the right state or says that it is damaged, never a wrong state; heads and saved snapshots are made
//! anew from the log.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::stored::{config, fresh, key, put, read, remove};
use common::{Random, every_backend, snapshot, why};
use serde_json::{Value, json};
use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Document, Key, Kind};
use tai_state::{
    CleanupOptions, Error, HeadCondition, PersistenceConfig, RecoveryBase, StateMachinePersister,
};

/// What each state was at each version that is kept.
type Truth = BTreeMap<&'static str, BTreeMap<u64, Value>>;

/// Logs of several lengths, the longer ones cleaned up; one deleted, one purged and made again.
async fn build(backend: &Arc<dyn Backend>) -> Truth {
    let (store, persister) = fresh(backend);
    let mut truth = Truth::new();
    let plans =
        [("short", 4), ("long", 47), ("even", 30), ("cut", 38), ("gone", 15), ("again", 12)];
    for (id, length) in plans {
        let kept = truth.entry(id).or_default();
        for n in 1..=length {
            let data = json!({"n": n, "state": id, "text": "t".repeat(n as usize), "f": 0.5});
            store.save_state("g", id, snapshot(id, data.clone()), why()).await.unwrap();
            kept.insert(n, data);
        }
        match id {
            "gone" => {
                kept.insert(store.delete_state("g", id, None, why()).await.unwrap(), Value::Null);
            }
            "again" => {
                let purge = persister.purge("g", id, why(), |_| {}).await.unwrap();
                *kept = BTreeMap::from([(purge.version, Value::Null)]);
                for n in 0..25 {
                    let data = json!({ "after": n });
                    let state = snapshot(id, data.clone());
                    let version = store.save_state("g", id, state, why()).await.unwrap();
                    kept.insert(version, data);
                }
            }
            _ => {}
        }
    }
    // Some are shorter than that and stay whole.
    let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(20);
    let report = persister.cleanup("g", &options, |_| {}).await.unwrap();
    assert!(report.events > 0);
    for kept in truth.values_mut() {
        let newest = *kept.keys().next_back().unwrap();
        kept.retain(|version, _| *version + 20 > newest);
    }
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    truth
}

async fn all_documents(backend: &Arc<dyn Backend>, truth: &Truth) -> Vec<Document> {
    let mut keys = Vec::new();
    for (id, kept) in truth {
        keys.push(key(Kind::States, id, 0));
        keys.extend(kept.keys().map(|version| key(Kind::Events, id, *version)));
        keys.extend((1..=60).map(|version| key(Kind::Snapshots, id, version)));
    }
    backend.get(&keys).await.unwrap().into_iter().flatten().collect()
}

/// Damages one thing; says which documents were hit and how. `None` when nothing came of it.
async fn damage(
    backend: &Arc<dyn Backend>,
    documents: &[Document],
    random: &mut Random,
) -> Option<(Vec<Key>, String)> {
    // Each kind as often as the others, however many there are of it.
    let kind = [Kind::States, Kind::Snapshots, Kind::Events][random.below(3) as usize];
    let documents: Vec<&Document> = documents
        .iter()
        .filter(|document| document.key.kind == kind || random.below(3) == 0)
        .collect();
    let of_kind: Vec<&Document> =
        documents.iter().copied().filter(|document| document.key.kind == kind).collect();
    let document = of_kind[random.below(of_kind.len() as u64) as usize];
    let text = document.body.as_text();
    let (what, damaged) = match random.below(10) {
        0..=4 => {
            let mut bytes = text.as_bytes().to_vec();
            let byte = random.below(bytes.len() as u64) as usize;
            bytes[byte] ^= 1 << random.below(7);
            (format!("a bit of byte {byte}"), String::from_utf8(bytes).ok()?)
        }
        5 => {
            let length = random.below(text.len() as u64) as usize;
            (format!("cut off at {length}"), text.get(..length)?.to_owned())
        }
        6 | 7 => {
            remove(backend, &document.key).await;
            return Some((vec![document.key.clone()], "removed".into()));
        }
        _ => {
            let other = documents[random.below(documents.len() as u64) as usize];
            if other.key == document.key
                || !put(backend, &document.key, other.body.as_text()).await
                || !put(backend, &other.key, text).await
            {
                return None;
            }
            return Some((vec![document.key.clone(), other.key.clone()], "changed places".into()));
        }
    };
    if damaged == text || !put(backend, &document.key, &damaged).await {
        return None;
    }
    // An engine with fields of its own may keep the same for another text.
    let stored: Result<Value, _> = read(backend, &document.key).await.body.parse();
    let whole: Value = document.body.parse().unwrap();
    if stored.is_ok_and(|stored| stored == whole) {
        return None;
    }
    Some((vec![document.key.clone()], what))
}

/// Loads every state and looks at every version. Returns how many answers were right and how many were
/// refused.
async fn ask(backend: &Arc<dyn Backend>, truth: &Truth, hit: &[Key], what: &str) -> (u64, u64) {
    let (mut right, mut refused) = (0, 0);
    for (id, kept) in truth {
        let (store, persister) = fresh(backend);
        let (newest, data) = kept.iter().next_back().unwrap();
        let context = format!("{what}: {hit:?}, loading {id}");
        match persister.load_state("g", id).await {
            Ok((state, was_recovery)) => {
                assert!(was_recovery, "{context}");
                assert_eq!((&state.data, state.version), (data, *newest), "WRONG STATE: {context}");
                right += 1;
            }
            Err(Error::StateNotFound { .. }) if data.is_null() => right += 1,
            Err(Error::Corrupt { .. } | Error::NewerFormat { .. }) => {
                refused += 1;
                let is_hit =
                    |kind| hit.iter().any(|key| key.kind == kind && key.name.as_str() == *id);
                assert!(is_hit(Kind::Events) || is_newer(backend, hit).await, "REFUSED: {context}");
            }
            Err(error) => panic!("{context}: {error} ({})", error.code()),
        }
        for version in [*kept.keys().next().unwrap(), newest / 2 + 1, *newest] {
            match store.state_at_version("g", id, version).await {
                Ok(state) => assert_eq!(Some(&state.data), kept.get(&version), "WRONG: {context}"),
                Err(Error::StateNotFound { .. }) => {
                    let is_there = kept.get(&version).is_some_and(|data| !data.is_null());
                    let head_is_gone = hit.iter().any(|key| key.kind == Kind::States);
                    assert!(!is_there || head_is_gone, "{context}");
                }
                Err(Error::HistoryTrimmed { .. }) => {
                    assert!(!kept.contains_key(&version), "{context}");
                }
                Err(Error::Corrupt { .. } | Error::NewerFormat { .. }) => {}
                Err(error) => panic!("{context}: {error} ({})", error.code()),
            }
        }
    }
    (right, refused)
}

/// Whether one of the documents says that it is of a newer format: then it is refused, not repaired.
async fn is_newer(backend: &Arc<dyn Backend>, keys: &[Key]) -> bool {
    let found = backend.get(keys).await.unwrap();
    found.into_iter().flatten().any(|document| {
        let body: Result<Value, _> = document.body.parse();
        body.is_ok_and(|body| body["format"].as_u64().is_some_and(|format| format > 1))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn one_damage_never_makes_a_wrong_state() {
    let mut random = Random::announced("one_damage_never_makes_a_wrong_state");
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let truth = build(&backend).await;
        let documents = all_documents(&backend, &truth).await;
        let rounds = if name == "emulator" { 100 } else { 1_000 };
        let (mut done, mut right, mut refused, mut harmless) = (0, 0, 0, 0);
        let mut kinds = BTreeMap::new();
        while done < rounds {
            let Some((hit, what)) = damage(&backend, &documents, &mut random).await else {
                continue;
            };
            let verified = fresh(&backend).0.verify(|_| {}).await.unwrap();
            let (good, bad) = ask(&backend, &truth, &hit, &format!("{name}: {what}")).await;
            if verified.ok {
                // It says the same in other letters: a `t` for a `T` in a time, another name for
                // a field that is not set.
                assert!(
                    bad == 0 && what.starts_with("a bit"),
                    "verify does not see: {what} {hit:?}"
                );
                harmless += 1;
            }
            right += good;
            refused += bad;
            *kinds.entry(hit[0].kind.as_str()).or_insert(0) += 1;
            // Everything as it was, for the next.
            for document in &documents {
                let now = backend.get(std::slice::from_ref(&document.key)).await.unwrap().pop();
                if now.flatten().is_none_or(|now| now.body != document.body) {
                    assert!(put(&backend, &document.key, document.body.as_text()).await);
                }
            }
            done += 1;
        }
        println!(
            "{name}: {done} damages to {kinds:?}: {right} loads right, {refused} refused; {harmless} \
             changed nothing that is said"
        );
        assert!(right > rounds * 4 && refused > 0, "the run shows nothing");
        assert!(harmless < rounds / 4, "too many damages are none");
        let report = fresh(&backend).0.verify(|_| {}).await.unwrap();
        assert!(report.ok, "{:?}", report.problems);
    }
}

/// Saved snapshots alone, the one that would be used: whatever becomes of it the state is the same, and the
/// report names it. One that says it is of a newer format is refused.
#[tokio::test(flavor = "multi_thread")]
async fn one_damaged_snapshot_changes_nothing() {
    let mut random = Random::announced("one_damaged_snapshot_changes_nothing");
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let truth = build(&backend).await;
        let mut newest: BTreeMap<String, Document> = BTreeMap::new();
        for document in all_documents(&backend, &truth).await {
            let id = document.key.name.as_str().to_owned();
            let is_gone = truth[id.as_str()].values().next_back().unwrap().is_null();
            if document.key.kind == Kind::Snapshots && !is_gone {
                // They come in the order of their versions.
                newest.insert(id, document);
            }
        }
        let newest: Vec<Document> = newest.into_values().collect();
        // Firestore keeps fields and no text, so nothing of it can be cut off.
        let (flips, cuts) = if name == "emulator" { (100, 0) } else { (1_000, 64) };
        let (mut done, mut named, mut newer) = ([0, 0], 0, 0);
        while done != [flips, cuts] {
            let document = &newest[random.below(newest.len() as u64) as usize];
            let text = document.body.as_text();
            let is_cut = done[0] == flips;
            let damaged = if is_cut {
                text.get(..random.below(text.len() as u64) as usize).map(str::to_owned)
            } else {
                let mut bytes = text.as_bytes().to_vec();
                let byte = random.below(bytes.len() as u64) as usize;
                bytes[byte] ^= 1 << random.below(7);
                String::from_utf8(bytes).ok()
            };
            // An engine may refuse to keep it.
            let Some(damaged) = damaged else { continue };
            if !put(&backend, &document.key, &damaged).await {
                continue;
            }
            done[usize::from(is_cut)] += 1;
            let (id, version) = (document.key.name.as_str(), document.key.version);
            let (last, data) = truth[id].iter().next_back().unwrap();
            let context = format!("{name}: {id} v{version}: {damaged}");
            if is_newer(&backend, std::slice::from_ref(&document.key)).await {
                let refused = fresh(&backend).1.load_state("g", id).await;
                assert!(
                    matches!(refused, Err(Error::NewerFormat { .. })),
                    "{context}: {refused:?}"
                );
                newer += 1;
                assert!(put(&backend, &document.key, text).await);
                continue;
            }
            let (state, _) = fresh(&backend).1.load_state("g", id).await.expect(&context);
            assert_eq!((&state.data, state.version), (data, *last), "WRONG STATE: {context}");
            let (state, report) = fresh(&backend).1.recover("g", id).await.expect(&context);
            assert_eq!(&state.unwrap().data, data, "WRONG STATE: {context}");
            let is_named = report.passed_over.iter().any(|passed| passed.version == version);
            // Some say the same in other letters.
            assert!(is_named || (!is_cut && report.passed_over.is_empty()), "{context}");
            named += u64::from(is_named);
            assert!(put(&backend, &document.key, text).await);
        }
        println!(
            "{name}: {done:?} bits flipped and cut off, {named} named, {newer} of a newer format and \
             refused, all states right"
        );
        assert!(named > (flips + cuts) * 3 / 4, "{name}: {named} are named");
        let report = fresh(&backend).0.verify(|_| {}).await.unwrap();
        assert!(report.ok, "{:?}", report.problems);
    }
}

/// The rules of recovery, one by one, with what the report says.
#[tokio::test(flavor = "multi_thread")]
async fn each_source_falls_back_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let (store, persister) = fresh(&backend);
        for n in 1..=47 {
            store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
        }
        let head = read(&backend, &key(Kind::States, "s", 0)).await;
        let recover = async || {
            let (state, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
            assert_eq!(state.unwrap().data, json!(47), "{name}");
            assert_eq!(report.version, 47);
            assert!(report.bytes_read > 100);
            report
        };
        let whole = recover().await;
        assert_eq!((whole.base, whole.events_replayed), (RecoveryBase::SavedSnapshot(40), 7));
        assert_eq!((whole.head, whole.repaired), (HeadCondition::Sound, false));

        // Saved snapshots: missing, damaged, lying (true of another version), all of them.
        let saved = |version| key(Kind::Snapshots, "s", version);
        remove(&backend, &saved(40)).await;
        let report = recover().await;
        assert_eq!((report.base, report.events_replayed), (RecoveryBase::SavedSnapshot(30), 17));
        assert_eq!((report.passed_over.len(), report.repaired), (1, true));
        assert_eq!(recover().await.base, RecoveryBase::SavedSnapshot(40));
        for version in [20, 30, 40] {
            assert!(put(&backend, &saved(version), "{\"format\":1}").await);
        }
        let (state, _) = fresh(&backend).1.load_state("g", "s").await.unwrap();
        assert_eq!(state.data, json!(47));
        let report = recover().await;
        let passed: Vec<u64> = report.passed_over.iter().map(|passed| passed.version).collect();
        assert_eq!((report.base, passed), (RecoveryBase::FirstEvent(1), vec![40, 30, 20]));
        assert_eq!(report.events_replayed, 47);
        assert_eq!(recover().await.base, RecoveryBase::SavedSnapshot(40));

        // One that is sound in itself, of a log that went another way.
        let elsewhere: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
        let (other, _) = fresh(&elsewhere);
        for n in 1..=47 {
            other.save_state("g", "s", snapshot("s", json!({ "other": n })), why()).await.unwrap();
        }
        let right = read(&backend, &saved(40)).await;
        let lie = read(&elsewhere, &saved(40)).await;
        assert!(put(&backend, &saved(40), lie.body.as_text()).await);
        let report = recover().await;
        assert_eq!((report.base, report.passed_over.len()), (RecoveryBase::SavedSnapshot(30), 1));
        assert_eq!(read(&backend, &saved(40)).await.body, right.body, "{name}");
        // One that is sound in itself, of a version that this log has not come to.
        for n in 48..=57 {
            other.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
        }
        let beyond = read(&elsewhere, &saved(50)).await;
        assert!(put(&backend, &saved(50), beyond.body.as_text()).await);
        let (state, _) = fresh(&backend).1.load_state("g", "s").await.unwrap();
        assert_eq!((state.data, state.version), (json!(47), 47), "{name}");
        assert_eq!(recover().await.base, RecoveryBase::SavedSnapshot(40), "{name}");
        assert!(!fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{name}");
        remove(&backend, &saved(50)).await;

        // Heads: missing, damaged, an old one.
        let place = key(Kind::States, "s", 0);
        let again = async |condition: &dyn Fn(&HeadCondition) -> bool| {
            let report = recover().await;
            assert!(condition(&report.head) && report.repaired, "{name}: {:?}", report.head);
            let now = read(&backend, &place).await;
            assert_eq!(now.body, head.body, "{name}");
            assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok);
        };
        remove(&backend, &place).await;
        assert!(!fresh(&backend).0.verify(|_| {}).await.unwrap().ok);
        again(&|head| *head == HeadCondition::Missing).await;
        assert!(put(&backend, &place, &head.body.as_text().replace("47", "48")).await);
        again(&|head| matches!(head, HeadCondition::Damaged(_))).await;
        let old = {
            let (store, _) = fresh(&backend);
            for n in 1..=12 {
                store.save_state("g", "o", snapshot("o", json!(n)), why()).await.unwrap();
            }
            let old = read(&backend, &key(Kind::States, "o", 0)).await;
            for n in 13..=31 {
                store.save_state("g", "o", snapshot("o", json!(n)), why()).await.unwrap();
            }
            old
        };
        assert!(put(&backend, &old.key, old.body.as_text()).await);
        let problems = fresh(&backend).0.validate_consistency("g").await.unwrap().problems;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].rule, tai_state::Rule::HeadIsNewest);
        let (state, report) = fresh(&backend).1.recover("g", "o").await.unwrap();
        assert_eq!((state.unwrap().data, report.head), (json!(31), HeadCondition::Behind(12)));
        assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok);
        // Writing goes on where the log ends.
        let next = fresh(&backend).0.save_state("g", "o", snapshot("o", json!(32)), why()).await;
        assert_eq!(next.unwrap(), 32);

        // The log itself: what it says of a version that is gone is not guessed.
        let gap = key(Kind::Events, "s", 43);
        let event = read(&backend, &gap).await;
        remove(&backend, &gap).await;
        let error = fresh(&backend).1.load_state("g", "s").await.unwrap_err();
        assert!(error.code() == "corrupt" && error.to_string().contains("v43"), "{error}");
        assert!(put(&backend, &gap, event.body.as_text()).await);
        // A gap before the base is no matter of loading, but of proving.
        let gap = key(Kind::Events, "s", 5);
        let event = read(&backend, &gap).await;
        remove(&backend, &gap).await;
        assert_eq!(recover().await.base, RecoveryBase::SavedSnapshot(40));
        let report = fresh(&backend).0.validate_consistency("g").await.unwrap();
        assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
        assert_eq!(
            (report.problems[0].rule, report.problems[0].version),
            (tai_state::Rule::NoGap, Some(5))
        );
        assert!(put(&backend, &gap, event.body.as_text()).await);

        // Without auto_replay the head is believed.
        let trusting = PersistenceConfig { auto_replay: false, ..config() };
        let trusting = StateMachinePersister::new(fresh(&backend).0, trusting);
        let (state, was_recovery) = trusting.load_state("g", "s").await.unwrap();
        assert!(!was_recovery && state.version == 47);
        let never = persister.load_state("g", "never").await.unwrap_err();
        assert_eq!(never.code(), "state_not_found");
    }
}

/// Every broken rule is listed, not only the first.
#[tokio::test(flavor = "multi_thread")]
async fn every_broken_rule_is_listed() {
    use std::collections::BTreeSet;
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let (store, persister) = fresh(&backend);
        for id in ["a", "b", "c", "d"] {
            for n in 1..=35 {
                store
                    .save_state("g", id, snapshot(id, json!({"id": id, "n": n})), why())
                    .await
                    .unwrap();
            }
        }
        let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(34);
        persister.cleanup("g", &options, |_| {}).await.unwrap();
        assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok);
        remove(&backend, &key(Kind::Events, "a", 7)).await;
        remove(&backend, &key(Kind::Events, "a", 9)).await;
        assert!(put(&backend, &key(Kind::Events, "a", 20), "{\"format\":1}").await);
        remove(&backend, &key(Kind::Snapshots, "a", 30)).await;
        assert!(put(&backend, &key(Kind::Snapshots, "b", 20), "{\"format\":1}").await);
        remove(&backend, &key(Kind::States, "c", 0)).await;
        let report = fresh(&backend).0.validate_consistency("g").await.unwrap();
        let found: BTreeSet<(String, Option<u64>)> = report
            .problems
            .iter()
            .map(|problem| (format!("{:?} {}", problem.rule, problem.place), problem.version))
            .collect();
        let expected = [
            ("NoGap the log of g/a", Some(7)),
            ("NoGap the log of g/a", Some(9)),
            ("Readable the log of g/a", Some(20)),
            ("SnapshotExists the saved snapshot g/a", Some(30)),
            ("Readable the saved snapshot g/b", Some(20)),
        ];
        let expected: BTreeSet<_> =
            expected.iter().map(|(place, version)| ((*place).to_owned(), *version)).collect();
        assert_eq!(found, expected, "{name}");
        assert!(!report.ok && report.states == 3);
    }
}
