//! The contract of a backend, one line for each.

use std::sync::Arc;

use tai_state::backend::embedded::EmbeddedBackend;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::conformance;

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
