//! What several test programs share.

#![allow(dead_code, clippy::unwrap_used, clippy::indexing_slicing)]

pub(crate) mod copies;
pub(crate) mod stored;

use serde_json::{Value, json};
use tai_state::{ChangeMetadata, FirestoreStore, StateId, StateSnapshot, StateStore, StoreOptions};

/// A small generator whose whole run is its seed: SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A fresh seed, or the one in `TAI_STATE_SEED`; printed, so that a failure can be run again.
    pub(crate) fn announced(what: &str) -> Self {
        let seed = match std::env::var("TAI_STATE_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => {
                use std::hash::{BuildHasher, Hasher};
                std::collections::hash_map::RandomState::new().build_hasher().finish()
            }
        };
        println!("{what}: TAI_STATE_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

pub(crate) fn why() -> ChangeMetadata {
    ChangeMetadata::new("test", "because", None)
}

pub(crate) fn snapshot(id: &str, data: Value) -> StateSnapshot {
    StateSnapshot::new(StateId::from(id), data, why())
}

pub(crate) fn counter(n: u64) -> StateSnapshot {
    snapshot("counter", json!({ "count": n }))
}

/// Runs each test on each backend, under the name `backend::test`.
#[allow(unused_macros)]
macro_rules! on_every_backend {
    ($($test:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test(&mut |options| tai_state::StateStore::in_memory_with(options)).await;
            })*
        }
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let folder = tempfile::tempdir().unwrap();
                let mut number = 0;
                super::$test(&mut |options| {
                    number += 1;
                    let path = folder.path().join(format!("{number}.tai"));
                    tokio::task::block_in_place(|| {
                        tokio::runtime::Handle::current()
                            .block_on(tai_state::StateStore::open_with(path, options))
                            .unwrap()
                    })
                })
                .await;
            })*
        }
        mod emulator {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                let Some(emulator) = tai_state::testing::emulator::Emulator::shared().await else {
                    return;
                };
                super::$test(&mut |options| {
                    let store = crate::common::on_emulator(emulator.address(), options);
                    tokio::task::block_in_place(|| {
                        tokio::runtime::Handle::current().block_on(store)
                    })
                })
                .await;
            })*
        }
    };
}

/// A new store on an emulator, in a project of its own.
pub(crate) async fn on_emulator(address: &str, options: StoreOptions) -> StateStore {
    let project = tai_state::testing::emulator::fresh_project();
    let builder = FirestoreStore::builder(project).emulator(address).options(options);
    builder.connect().await.unwrap().into()
}

/// The program of an example.
pub(crate) fn built_example(name: &str) -> std::path::PathBuf {
    // Cargo builds the examples of a package with its tests, but not with one of them alone.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap();
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    let program = profile.join("examples").join(name);
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    let written = |path: &std::path::Path| path.metadata().and_then(|file| file.modified()).ok();
    if written(&program) < written(&source.with_extension("rs")) {
        let mut build = std::process::Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--all-features", "-p", "tai-state", "--example", name]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
    }
    program
}

/// Makes a store on the backend under test.
pub(crate) type Make<'a> = &'a mut (dyn FnMut(StoreOptions) -> StateStore + Send);

pub(crate) fn open(make: Make<'_>) -> StateStore {
    make(StoreOptions::default())
}

pub(crate) fn options(change: impl FnOnce(&mut StoreOptions)) -> StoreOptions {
    let mut options = StoreOptions::default();
    change(&mut options);
    options
}

/// The content hash, after proving the whole store.
pub(crate) async fn proved(store: &StateStore) -> String {
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    report.content_hash.to_string()
}

pub(crate) fn balance(state: &StateSnapshot) -> i64 {
    state.data["balance"].as_i64().unwrap()
}

/// Every backend bare, for tests that go behind the store's back; the emulator where there is one.
pub(crate) async fn every_backend(
    folder: &std::path::Path,
) -> Vec<(&'static str, std::sync::Arc<dyn tai_state::backend::Backend>)> {
    use tai_state::backend::embedded::EmbeddedBackend;
    use tai_state::backend::firestore::{FirestoreBackend, FirestoreConfig};
    use tai_state::backend::memory::MemoryBackend;
    use tai_state::testing::emulator::{Emulator, fresh_project};
    let file = EmbeddedBackend::open(&folder.join("bare.tai"), true, false).await.unwrap();
    let mut backends: Vec<(&'static str, std::sync::Arc<dyn tai_state::backend::Backend>)> = vec![
        ("memory", std::sync::Arc::new(MemoryBackend::new())),
        ("embedded", std::sync::Arc::new(file)),
    ];
    if let Some(emulator) = Emulator::shared().await {
        let mut config = FirestoreConfig::new(fresh_project());
        config.emulator = Some(emulator.address().to_owned());
        let firestore = FirestoreBackend::open(config).await.unwrap();
        backends.push(("emulator", std::sync::Arc::new(firestore)));
    }
    backends
}
