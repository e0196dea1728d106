//! What several test programs share.

#![allow(dead_code, clippy::unwrap_used)]

use serde_json::{Value, json};
use tai_state::{ChangeMetadata, StateId, StateSnapshot};

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
