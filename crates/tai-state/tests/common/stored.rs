//! What is stored, read and changed past the store.

use std::sync::Arc;

use tai_state::backend::{Backend, Body, Document, Key, Kind, Name, Precondition, Write};
use tai_state::{PersistenceConfig, StateMachinePersister, StateStore, StoreOptions};

/// Small pages and frequent snapshots.
pub(crate) fn config() -> PersistenceConfig {
    PersistenceConfig {
        snapshot_interval: 10,
        snapshot_retention: 3,
        auto_replay: true,
        max_replay_batch_size: 7,
    }
}

/// A handle that remembers nothing.
pub(crate) fn fresh(backend: &Arc<dyn Backend>) -> (StateStore, StateMachinePersister) {
    let mut options = StoreOptions::default();
    options.persistence = config();
    options.retry.base = std::time::Duration::from_micros(100);
    options.retry.cap = std::time::Duration::from_millis(5);
    let store = StateStore::with_backend(Arc::clone(backend), options);
    (store.clone(), StateMachinePersister::new(store, config()))
}

pub(crate) fn key(kind: Kind, state: &str, version: u64) -> Key {
    let name = |id| Name::escape(id, "id").unwrap();
    Key { governor: name("g"), kind, name: name(state), version }
}

pub(crate) async fn read(backend: &Arc<dyn Backend>, key: &Key) -> Document {
    backend.get(std::slice::from_ref(key)).await.unwrap().pop().flatten().unwrap()
}

pub(crate) async fn put(backend: &Arc<dyn Backend>, key: &Key, text: &str) -> bool {
    let body = Body::from_text(text.to_owned());
    backend.commit(vec![Write::put(key.clone(), body, Precondition::Any)]).await.is_ok()
}

pub(crate) async fn remove(backend: &Arc<dyn Backend>, key: &Key) {
    backend.commit(vec![Write::delete(key.clone(), Precondition::Any)]).await.unwrap();
}
