//! Heads and saved snapshots that say something else of where history begins: from before a clean-up, or lost. The
//! log decides, and nothing that is kept is given up.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;

use common::stored::{fresh, key, put, read, remove};
use common::{every_backend, snapshot, why};
use serde_json::json;
use tai_state::backend::{Backend, Document, Key, Kind, Name};
use tai_state::testing::faults::{Call, FaultyBackend};
use tai_state::{CleanupOptions, HeadCondition, Rule};

/// What was cleaned up cannot be told from what was lost, unless a saved snapshot at the cut says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_head_of_a_shortened_log_needs_a_voucher() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let (store, persister) = fresh(&backend);
        for n in 1..=27 {
            store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
        }
        let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(5);
        persister.cleanup("g", &options, |_| {}).await.unwrap();
        let head = read(&backend, &key(Kind::States, "s", 0)).await;
        remove(&backend, &head.key).await;
        let (state, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
        assert_eq!((state.unwrap().version, report.head), (27, HeadCondition::Missing), "{name}");
        assert_eq!(read(&backend, &head.key).await.body, head.body);
        remove(&backend, &head.key).await;
        remove(&backend, &key(Kind::Snapshots, "s", 23)).await;
        let error = fresh(&backend).1.recover("g", "s").await.unwrap_err();
        assert!(error.code() == "corrupt" && error.to_string().contains("v23"), "{error}");
    }
}

/// Whoever has lost the head depends on what the saved snapshots say of the cut: one that was put back from before
/// it is found, and made anew, while there is a head, and also when that is made anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_saved_snapshot_from_before_the_cut_is_found_and_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let cut = key(Kind::Snapshots, "s", 23);
        let (_, old) = cut_at_23(&backend, &[23]).await;
        fresh(&backend).1.save_snapshot("g", "s").await.unwrap();
        let sound = read(&backend, &cut).await;
        let head = read(&backend, &key(Kind::States, "s", 0)).await;
        assert!(old.key == cut && old.body != sound.body);
        for is_lost in [false, true] {
            assert!(put(&backend, &cut, old.body.as_text()).await);
            if is_lost {
                remove(&backend, &head.key).await;
            } else {
                let report = fresh(&backend).0.validate_consistency("g").await.unwrap();
                let found = report.problems.iter().map(|found| (found.rule, found.version));
                assert_eq!(found.collect::<Vec<_>>(), [(Rule::CutIsVouched, Some(23))], "{name}");
            }
            let (_, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
            assert_eq!((report.disputed, report.repaired), (vec![23], true), "{name} {is_lost}");
            assert!(report.passed_over.is_empty(), "{name}: {:?}", report.passed_over);
            assert_eq!(read(&backend, &cut).await.body, sound.body, "{name} {is_lost}");
            assert_eq!(read(&backend, &head.key).await.body, head.body, "{name} {is_lost}");
            assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{name} {is_lost}");
        }
        // It is the last copy of its version: what it says of the cut can be put right without the event.
        assert!(put(&backend, &cut, old.body.as_text()).await);
        remove(&backend, &key(Kind::Events, "s", 23)).await;
        fresh(&backend).1.recover("g", "s").await.unwrap();
        assert_eq!(read(&backend, &cut).await.body, sound.body, "{name}");
    }
}

/// A head that was put back from before a clean-up: the log decides, and what the saved snapshots know is kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_from_before_the_cut_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let (old, _) = cut_at_23(&backend, &[23, 27]).await;
        let head = read(&backend, &old.key).await;
        for kept in [23, 25, 27] {
            if kept > 23 {
                let options = CleanupOptions::older_than(std::time::Duration::ZERO);
                let options = options.keep_versions(28 - kept);
                fresh(&backend).1.cleanup("g", &options, |_| {}).await.unwrap();
            }
            for base in [&old, &head] {
                if kept == 23 && base.key == head.key && base.body == head.body {
                    continue;
                }
                assert!(put(&backend, &base.key, base.body.as_text()).await);
                let (_, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
                let said = format!("{name}, v{kept}: {report:?}");
                assert!(report.head == HeadCondition::Behind(27) && report.repaired, "{said}");
                assert!(report.disputed.is_empty() && report.passed_over.is_empty(), "{said}");
                let record = fresh(&backend).0.record("g", "s").await.unwrap().unwrap();
                assert_eq!((record.first_version, record.snapshot.version), (kept, 27), "{said}");
                assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{said}");
                remove(&backend, &old.key).await;
                fresh(&backend).1.recover("g", "s").await.unwrap();
                let record = fresh(&backend).0.record("g", "s").await.unwrap().unwrap();
                assert_eq!(record.first_version, kept, "{said}");
            }
        }
        // It knows where history begins, though the saved snapshot there cannot be read, and another is gone.
        let (store, persister) = fresh(&backend);
        for n in 1..=27 {
            store.save_state("h", "s", snapshot("s", json!(n)), why()).await.unwrap();
        }
        let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(5);
        persister.cleanup("h", &options, |_| {}).await.unwrap();
        persister.save_snapshot("h", "s").await.unwrap();
        let of_h = |kind, version| Key {
            governor: Name::escape("h", "id").unwrap(),
            ..key(kind, "s", version)
        };
        let old = read(&backend, &of_h(Kind::States, 0)).await;
        persister.prune_snapshots("h", "s", 0).await.unwrap();
        store.save_state("h", "s", snapshot("s", json!(28)), why()).await.unwrap();
        assert!(put(&backend, &of_h(Kind::Snapshots, 23), "{\"format\":1}").await);
        assert!(put(&backend, &old.key, old.body.as_text()).await);
        let (_, report) = fresh(&backend).1.recover("h", "s").await.unwrap();
        let passed: Vec<u64> = report.passed_over.iter().map(|passed| passed.version).collect();
        assert_eq!((passed, report.head), (vec![23], HeadCondition::Behind(27)), "{name}");
        let record = fresh(&backend).0.record("h", "s").await.unwrap().unwrap();
        assert_eq!((record.first_version, record.snapshot.version), (23, 28), "{name}");
        assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{name}");
    }
}

/// A saved snapshot that was put back from before the cut, with the events there, goes again.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_back_from_before_the_cut_is_not_named() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let (store, persister) = fresh(&backend);
        let mut before = Vec::new();
        for n in 1..=27 {
            store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
            if (20..23).contains(&n) {
                before.push(read(&backend, &key(Kind::Events, "s", n)).await);
            }
        }
        before.push(read(&backend, &key(Kind::Snapshots, "s", 20)).await);
        let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(5);
        persister.cleanup("g", &options, |_| {}).await.unwrap();
        let old = read(&backend, &key(Kind::States, "s", 0)).await;
        store.save_state("g", "s", snapshot("s", json!(28)), why()).await.unwrap();
        for document in before.iter().chain([&old]) {
            assert!(put(&backend, &document.key, document.body.as_text()).await);
        }
        let (_, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
        assert_eq!(report.head, HeadCondition::Behind(27), "{name}");
        let record = fresh(&backend).0.record("g", "s").await.unwrap().unwrap();
        assert_eq!((record.first_version, record.snapshot.version), (23, 28), "{name}");
        assert!(
            backend.get(&[key(Kind::Snapshots, "s", 20)]).await.unwrap()[0].is_none(),
            "{name}"
        );
        let report = fresh(&backend).0.verify(|_| {}).await.unwrap();
        assert!(report.ok && report.leftovers == 3, "{name}: {report:?}");
    }
}

/// A purge counts when its first commit holds, and erases afterwards. A head that has lost its own event is not one
/// from before a cut: what was to be erased does not come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_has_lost_its_event_is_not_undone() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        for n in 1..=9 {
            fresh(&backend).0.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
        }
        let faulty = FaultyBackend::new(Arc::clone(&backend), []);
        let down = faulty.clone();
        faulty.at(Call::Commit, 0, move || {
            down.go_down(true);
            std::future::ready(())
        });
        let faulty: Arc<dyn Backend> = Arc::new(faulty);
        fresh(&faulty).1.purge("g", "s", why(), |_| {}).await.unwrap_err();
        read(&backend, &key(Kind::Events, "s", 1)).await;
        let head = read(&backend, &key(Kind::States, "s", 0)).await;
        let record = fresh(&backend).0.record("g", "s").await.unwrap().unwrap();
        assert!(record.deleted && record.first_version == 10, "{name}");
        remove(&backend, &key(Kind::Events, "s", 10)).await;
        let error = fresh(&backend).1.load_state("g", "s").await.unwrap_err();
        assert_eq!(error.code(), "corrupt", "{name}");
        let error = fresh(&backend).1.recover("g", "s").await.unwrap_err();
        assert_eq!(error.code(), "corrupt", "{name}");
        assert_eq!(read(&backend, &head.key).await.body, head.body, "{name}");
        assert!(!fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{name}");
    }
}

/// The newest event is lost, and an old head is put back, or none: what head and saved snapshot hold of the newest
/// version is not given up for a log that ends before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_has_lost_its_end_is_not_believed() {
    for saved in [&[][..], &[27], &[23, 27]] {
        let folder = tempfile::tempdir().unwrap();
        for (name, backend) in every_backend(folder.path()).await {
            let at = format!("{name}, saved {saved:?}");
            let (store, persister) = fresh(&backend);
            for n in 1..=27 {
                store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
                if saved.contains(&n) {
                    persister.save_snapshot("g", "s").await.unwrap();
                }
            }
            let old = read(&backend, &key(Kind::States, "s", 0)).await;
            let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(5);
            persister.cleanup("g", &options, |_| {}).await.unwrap();
            let cut = read(&backend, &key(Kind::Snapshots, "s", 23)).await;
            assert!(put(&backend, &old.key, old.body.as_text()).await);
            remove(&backend, &key(Kind::Events, "s", 27)).await;
            for is_thorough in [false, true] {
                let persister = fresh(&backend).1;
                let version = match is_thorough {
                    true => persister.recover("g", "s").await.map(|(_, told)| told.version),
                    false => persister.load_state("g", "s").await.map(|read| read.0.version),
                };
                match version {
                    Ok(version) => assert!(!saved.is_empty() && version == 27, "{at}: {version}"),
                    Err(error) => assert!(saved.is_empty() && error.code() == "corrupt", "{at}"),
                }
            }
            let record = fresh(&backend).0.record("g", "s").await.unwrap().unwrap();
            assert_eq!(record.snapshot.version, 27, "{at}");
            // It knows better than the head where history begins.
            assert_eq!(read(&backend, &cut.key).await.body, cut.body, "{at}");
            if saved.is_empty() {
                continue;
            }
            remove(&backend, &old.key).await;
            let newest = read(&backend, &key(Kind::Snapshots, "s", 27)).await.key;
            for _ in 0..2 {
                let error = fresh(&backend).1.load_state("g", "s").await.unwrap_err();
                assert!(error.to_string().contains("ends at v26"), "{at}: {error}");
                read(&backend, &newest).await;
                // Nor is it, if it cannot be read.
                assert!(put(&backend, &newest, "{\"format\":1}").await);
            }
        }
    }
}

/// Saved snapshots that no head names, since it is from before they were saved or they from before they were removed,
/// are named if they are of the log that is kept, and go if not.
#[tokio::test(flavor = "multi_thread")]
async fn saved_snapshots_that_no_head_names_are_named_or_go() {
    let folder = tempfile::tempdir().unwrap();
    for (name, backend) in every_backend(folder.path()).await {
        let (_, old) = cut_at_23(&backend, &[23]).await;
        let head = read(&backend, &key(Kind::States, "s", 0)).await;
        fresh(&backend).1.save_snapshot("g", "s").await.unwrap();
        let named = read(&backend, &head.key).await;
        let gone = [key(Kind::Snapshots, "s", 20), key(Kind::Snapshots, "s", 25)];
        for key in &gone {
            assert!(put(&backend, key, old.body.as_text()).await);
        }
        assert!(put(&backend, &head.key, head.body.as_text()).await);
        assert!(!fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{name}");
        let (_, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
        let found: Vec<u64> = report.passed_over.iter().map(|passed| passed.version).collect();
        assert_eq!((found, report.repaired), (vec![27, 25, 20], true), "{name}");
        assert_eq!(report.head, HeadCondition::Sound, "{name}");
        assert_eq!(read(&backend, &head.key).await.body, named.body, "{name}");
        assert!(backend.get(&gone).await.unwrap().iter().all(Option::is_none), "{name}");
        assert!(fresh(&backend).0.verify(|_| {}).await.unwrap().ok, "{name}");
        let (_, report) = fresh(&backend).1.recover("g", "s").await.unwrap();
        assert!(!report.repaired && report.passed_over.is_empty(), "{name}: {report:?}");
    }
}

/// 27 versions, cut at v23, with snapshots saved before; the head and the saved snapshot from before the cut.
async fn cut_at_23(backend: &Arc<dyn Backend>, saved: &[u64]) -> (Document, Document) {
    let (store, persister) = fresh(backend);
    for n in 1..=27 {
        store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
        if saved.contains(&n) {
            persister.save_snapshot("g", "s").await.unwrap();
        }
    }
    let head = read(backend, &key(Kind::States, "s", 0)).await;
    let saved = read(backend, &key(Kind::Snapshots, "s", 23)).await;
    let options = CleanupOptions::older_than(std::time::Duration::ZERO).keep_versions(5);
    persister.cleanup("g", &options, |_| {}).await.unwrap();
    (head, saved)
}
