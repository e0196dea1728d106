//! The heads that a handle remembers, so that the next change needs no read before it.

use std::num::NonZeroUsize;

use lru::LruCache;

use crate::keys::Address;
use crate::records::KnownHead;

/// Remembered heads, bounded by their bytes, the least recently used forgotten first. They only
/// save a read before a write: each is used with its revision as precondition, so an old one costs
/// a second try and can do no harm.
#[derive(Debug)]
pub(crate) struct Remembered {
    heads: LruCache<Address, (KnownHead, usize)>,
    bytes: usize,
    most: usize,
}

impl Remembered {
    pub(crate) fn new(most: usize) -> Self {
        // Bounded by bytes; the count only keeps the map from growing without sense.
        let count = NonZeroUsize::new(65_536).unwrap_or(NonZeroUsize::MIN);
        Self { heads: LruCache::new(count), bytes: 0, most }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn get(&mut self, address: &Address) -> Option<KnownHead> {
        self.heads.get(address).map(|(head, _)| head.clone())
    }

    pub(crate) fn put(&mut self, address: &Address, head: &KnownHead) {
        self.forget(address);
        let change = &head.head.change;
        let metadata = &change.metadata;
        let context: usize =
            metadata.context.iter().map(|(key, value)| 64 + key.len() + rough_size(value)).sum();
        let clock: usize = change.causality.iter().map(|(node, _)| 64 + node.len()).sum();
        let texts = metadata.reason.len() + metadata.changed_by.len() + change.action.len();
        // An address stands in the map and in the change.
        let ids = 2 * (address.governor.as_str().len() + address.state.as_str().len());
        let bytes = 512 + rough_size(&change.data) + context + clock + texts + ids;
        // One large state must not push out all others.
        if bytes > self.most / 4 {
            return;
        }
        self.bytes += bytes;
        if let Some((_, (_, old))) = self.heads.push(address.clone(), (head.clone(), bytes)) {
            self.bytes = self.bytes.saturating_sub(old);
        }
        while self.bytes > self.most {
            let Some((_, (_, old))) = self.heads.pop_lru() else { break };
            self.bytes = self.bytes.saturating_sub(old);
        }
    }

    pub(crate) fn forget(&mut self, address: &Address) {
        if let Some((_, bytes)) = self.heads.pop(address) {
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }
}

/// About how many bytes a value takes in memory.
pub(crate) fn rough_size(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 32,
        Value::String(text) => 32 + text.len(),
        Value::Array(items) => 32 + items.iter().map(rough_size).sum::<usize>(),
        Value::Object(fields) => {
            64 + fields.iter().map(|(key, item)| 64 + key.len() + rough_size(item)).sum::<usize>()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::memory::MemoryBackend;
    use crate::conditions::Conditions;
    use crate::config::{PersistenceConfig, StoreOptions};
    use crate::records::Records;
    use crate::transition::tests::request;
    use crate::transition::{Expect, Wish};
    use serde_json::json;

    #[tokio::test]
    async fn the_cache_stays_within_its_bytes() {
        let options = StoreOptions { cache_bytes: 40_000, ..StoreOptions::default() };
        let records = Arc::new(Records::new(Arc::new(MemoryBackend::new()), options));
        for n in 0..500 {
            let mut put = request(Wish::Put(json!({"n": n})), Expect::Any);
            put.address = Address::new("gov", &format!("s{n}")).unwrap();
            records
                .apply(&put, &PersistenceConfig::default(), &Conditions::default())
                .await
                .unwrap();
            assert!(records.cache_bytes() <= 40_000);
        }
        assert!(records.cache_bytes() > 20_000);
        let mut large = request(Wish::Put(json!("x".repeat(100_000))), Expect::Any);
        large.address = Address::new("gov", "large").unwrap();
        records.apply(&large, &PersistenceConfig::default(), &Conditions::default()).await.unwrap();
        assert!(records.cache_bytes() <= 40_000, "a large state pushed out all others");
    }
}
