//! The contract of a backend, one line for each.

use std::sync::Arc;

use tai_state::backend::embedded::EmbeddedBackend;
use tai_state::backend::firestore::{FirestoreBackend, FirestoreConfig};
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::conformance;
use tai_state::testing::emulator::{Emulator, fresh_project};

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    conformance::run(|| async { Arc::new(MemoryBackend::new()) as _ }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded() {
    let folder = tempfile::tempdir().unwrap();
    let mut number = 0;
    conformance::run(|| {
        number += 1;
        let path = folder.path().join(format!("{number}.tai"));
        async move { Arc::new(EmbeddedBackend::open(&path, true, false).await.unwrap()) as _ }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn emulator() {
    let Some(emulator) = Emulator::shared().await else { return };
    conformance::run(|| {
        let mut config = FirestoreConfig::new(fresh_project());
        config.emulator = Some(emulator.address().to_owned());
        async move { Arc::new(FirestoreBackend::open(config).await.unwrap()) as _ }
    })
    .await;
}

/// Stores in one database that have prefixes of their own do not see one another.
#[tokio::test(flavor = "multi_thread")]
async fn emulator_with_neighbours() {
    let Some(emulator) = Emulator::shared().await else { return };
    let project = fresh_project();
    let mut number = 0;
    conformance::run(|| {
        number += 1;
        let mut config = FirestoreConfig::new(&project);
        config.prefix = format!("p{number}-");
        config.emulator = Some(emulator.address().to_owned());
        async move { Arc::new(FirestoreBackend::open(config).await.unwrap()) as _ }
    })
    .await;
}
