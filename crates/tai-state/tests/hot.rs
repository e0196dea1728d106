//! Clean-ups beside a writer, with a connection of its own, that never pauses; and a head that is lost while
//! one is under way.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{snapshot, why};
use serde_json::json;
use tai_state::backend::embedded::EmbeddedBackend;
use tai_state::backend::firestore::{FirestoreBackend, FirestoreConfig};
use tai_state::backend::memory::MemoryBackend;
use tai_state::backend::{Backend, Key, Kind, Name, Precondition, Write};
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::{CleanupOptions, NewTransition, StateMachinePersister, StateStore, StoreOptions};

/// A writer with another connection, that never pauses, does not keep a clean-up from its end: the bytes are
/// gone, and nothing of the writer's is.
async fn not_stopped(name: &str, here: Arc<dyn Backend>, there: Arc<dyn Backend>) {
    let store = StateStore::with_backend(here, StoreOptions::default());
    let elsewhere = StateStore::with_backend(there, StoreOptions::default());
    let persister = StateMachinePersister::with_defaults(store.clone());
    for n in 0..60 {
        let to = NewTransition::to("g", "s", "write", json!({ "old": n }), why());
        persister.append(to).await.unwrap();
    }
    let go_on = Arc::new(AtomicBool::new(true));
    let (on, written) = (Arc::clone(&go_on), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&written);
    let writer = tokio::spawn(async move {
        let persister = StateMachinePersister::with_defaults(elsewhere);
        while on.load(Ordering::Relaxed) {
            let to = NewTransition::to("g", "s", "write", json!("new"), why());
            persister.append(to).await.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    while written.load(Ordering::Relaxed) < 3 {
        tokio::task::yield_now().await;
    }
    let before = written.load(Ordering::Relaxed);
    let keep = CleanupOptions::older_than(Duration::ZERO).keep_versions(2).batch(5);
    let started = tokio::time::Instant::now();
    let report = persister.cleanup("g", &keep, |_| {}).await.unwrap();
    let took = started.elapsed();
    let meanwhile = written.load(Ordering::Relaxed) - before;
    go_on.store(false, Ordering::Relaxed);
    writer.await.unwrap();
    println!("{name}: {} events removed beside {meanwhile} writes in {took:?}", report.events);
    assert!(
        report.events >= 60 && (meanwhile > 0 || name == "memory"),
        "{name}: {report:?}, {meanwhile}"
    );
    for version in 1..=60 {
        let gone = store.event("g", "s", version).await.unwrap_err();
        assert_eq!(gone.code(), "history_trimmed", "{name}");
    }
    assert_eq!(store.get_state("g", "s").await.unwrap().1, 60 + written.load(Ordering::Relaxed));
    // What the writer made it overlook is done by a run that nobody disturbs.
    persister.cleanup("g", &keep, |_| {}).await.unwrap();
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok && report.leftovers == 0, "{name}: {report:?}");
    assert_eq!(report.events, 2, "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_memory() {
    let backend = Arc::new(MemoryBackend::new());
    not_stopped("memory", backend.clone(), backend).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hot.tai");
    let here = EmbeddedBackend::open(&path, true, false).await.unwrap();
    let there = EmbeddedBackend::open(&path, false, false).await.unwrap();
    not_stopped("embedded", Arc::new(here), Arc::new(there)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_emulator() {
    let Some(emulator) = Emulator::shared().await else { return };
    let mut config = FirestoreConfig::new(fresh_project());
    config.emulator = Some(emulator.address().to_owned());
    let here = FirestoreBackend::open(config.clone()).await.unwrap();
    let there = FirestoreBackend::open(config).await.unwrap();
    not_stopped("emulator", Arc::new(here), Arc::new(there)).await;
}

/// A clean-up is killed after each of its commits, and then somebody removes the head: what comes back from
/// the log never begins before the cut, since another run may be removing that.
#[tokio::test(flavor = "multi_thread")]
async fn no_recovery_brings_back_what_is_being_removed() {
    for purged in [false, true] {
        for stopped_after in 1..=4 {
            let backend: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
            let store = StateStore::with_backend(Arc::clone(&backend), StoreOptions::default());
            let persister = StateMachinePersister::with_defaults(store.clone());
            let write = async |n: u64| {
                store.save_state("g", "s", snapshot("s", json!(n)), why()).await.unwrap();
            };
            for n in 1..=20 {
                write(n).await;
            }
            if purged {
                persister.purge("g", "s", why(), |_| {}).await.unwrap();
            } else {
                let keep = CleanupOptions::older_than(Duration::ZERO).keep_versions(10);
                persister.cleanup("g", &keep, |_| {}).await.unwrap();
            }
            for n in 21..=40 {
                write(n).await;
            }
            let (killed, count) = (persister.clone(), Arc::new(AtomicU64::new(0)));
            let told = Arc::clone(&count);
            let cleaning = tokio::spawn(async move {
                let keep = CleanupOptions::older_than(Duration::ZERO).keep_versions(3).batch(4);
                let stop = |_: &tai_state::CleanupReport| {
                    let batches = told.fetch_add(1, Ordering::SeqCst) + 1;
                    assert!(batches < stopped_after, "stopped");
                };
                killed.cleanup("g", &keep, stop).await
            });
            assert!(cleaning.await.is_err(), "it came to its end");
            let newest = store.get_state("g", "s").await.unwrap().1;
            let name = Name::escape("s", "state id").unwrap();
            let governor = Name::escape("g", "governor id").unwrap();
            let head = Key { governor, name, kind: Kind::States, version: 0 };
            backend.commit(vec![Write::delete(head, Precondition::Any)]).await.unwrap();
            let fresh = StateStore::with_backend(Arc::clone(&backend), StoreOptions::default());
            let again = StateMachinePersister::with_defaults(fresh.clone());
            let report = again.recover("g", "s").await.unwrap();
            assert_eq!(report.1.version, newest);
            let gone = fresh.event("g", "s", newest - 3).await.unwrap_err();
            assert_eq!(gone.code(), "history_trimmed", "{purged} {stopped_after}");
            let keep = CleanupOptions::older_than(Duration::ZERO).keep_versions(3);
            again.cleanup("g", &keep, |_| {}).await.unwrap();
            let report = fresh.verify(|_| {}).await.unwrap();
            assert!(report.ok && report.leftovers == 0 && report.events == 3, "{report:?}");
        }
    }
}
