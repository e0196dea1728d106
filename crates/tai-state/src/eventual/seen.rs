//! What was seen of each state, so that a read that goes back behind it is noticed.

use std::num::NonZeroUsize;

use lru::LruCache;

use super::Freshness;
use crate::clock_vector::{Causality, VectorClockSnapshot};
use crate::state::StateSnapshot;

/// States that are remembered at most, and about how many bytes of them.
const MOST_STATES: usize = 16_384;
const MOST_BYTES: usize = 8 << 20;

/// All that was known by any copy of a state that was seen.
#[derive(Debug)]
struct Known {
    clock: VectorClockSnapshot,
    version: u64,
    bytes: usize,
}

/// What was seen, bounded, what was not asked for the longest time forgotten first.
#[derive(Debug)]
pub(super) struct Seen {
    states: LruCache<(String, String), Known>,
    bytes: usize,
    most_bytes: usize,
}

impl Default for Seen {
    fn default() -> Self {
        Self::bounded(MOST_STATES, MOST_BYTES)
    }
}

impl Seen {
    fn bounded(states: usize, most_bytes: usize) -> Self {
        let states = NonZeroUsize::new(states).unwrap_or(NonZeroUsize::MIN);
        Self { states: LruCache::new(states), bytes: 0, most_bytes }
    }

    /// Adds what a copy knows, and says how it stood to what was known before.
    pub(super) fn note(&mut self, governor: &str, copy: &StateSnapshot) -> Freshness {
        let key = (governor.to_owned(), copy.id.as_str().to_owned());
        let before = self.states.pop(&key);
        self.bytes -= before.as_ref().map_or(0, |known| known.bytes).min(self.bytes);
        let freshness = before.as_ref().map_or(Freshness::First, |known| stands(copy, known));
        let (mut clock, version) = match before {
            Some(known) => (known.clock, known.version.max(copy.version)),
            None => (VectorClockSnapshot::new(), copy.version),
        };
        clock.merge(&copy.causality);
        let bytes = 256
            + key.0.len()
            + key.1.len()
            + clock.iter().map(|(node, _)| 64 + node.len()).sum::<usize>();
        self.bytes += bytes;
        if let Some((_, forgotten)) = self.states.push(key, Known { clock, version, bytes }) {
            self.bytes -= forgotten.bytes.min(self.bytes);
        }
        while self.bytes > self.most_bytes {
            let Some((_, forgotten)) = self.states.pop_lru() else { break };
            self.bytes -= forgotten.bytes.min(self.bytes);
        }
        freshness
    }
}

fn stands(copy: &StateSnapshot, known: &Known) -> Freshness {
    match copy.causality.compare(&known.clock) {
        Causality::Before => Freshness::Stale,
        Causality::After => Freshness::Newer,
        Causality::Concurrent => Freshness::Concurrent,
        // Only copies that never came from a store: those have no clock.
        Causality::Equal => match copy.version.cmp(&known.version) {
            std::cmp::Ordering::Less => Freshness::Stale,
            std::cmp::Ordering::Equal => Freshness::Current,
            std::cmp::Ordering::Greater => Freshness::Newer,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ChangeMetadata;
    use serde_json::json;

    fn copy(id: &str, nodes: &[&str]) -> StateSnapshot {
        let mut copy =
            StateSnapshot::new(id.into(), json!(null), ChangeMetadata::new("a", "b", None));
        nodes.iter().for_each(|node| copy.causality.increment(node));
        copy
    }

    #[test]
    fn a_read_is_judged_by_all_that_was_seen_before() {
        let mut seen = Seen::default();
        let steps: [(&[&str], Freshness); 8] = [
            (&["a"], Freshness::First),
            (&["a"], Freshness::Current),
            (&["a", "a"], Freshness::Newer),
            (&["a"], Freshness::Stale),
            (&["a", "b"], Freshness::Concurrent),
            // It lacks the second change of a, which was seen.
            (&["a", "b"], Freshness::Stale),
            (&["a", "a", "b"], Freshness::Current),
            (&["a", "a", "b", "c"], Freshness::Newer),
        ];
        for (nodes, expected) in steps {
            assert_eq!(seen.note("g", &copy("s", nodes)), expected, "{nodes:?}");
        }
        assert_eq!(seen.note("other", &copy("s", &["a"])), Freshness::First);
    }

    #[test]
    fn without_clocks_versions_tell() {
        let mut seen = Seen::default();
        let mut read = copy("s", &[]);
        for (version, expected) in [
            (3, Freshness::First),
            (4, Freshness::Newer),
            (4, Freshness::Current),
            (3, Freshness::Stale),
        ] {
            read.version = version;
            assert_eq!(seen.note("g", &read), expected, "{version}");
        }
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_goes_first() {
        let mut seen = Seen::bounded(4, 1 << 20);
        for n in 0..100 {
            seen.note("g", &copy(&n.to_string(), &["a"]));
        }
        assert_eq!(seen.states.len(), 4);
        assert_eq!(seen.note("g", &copy("96", &["a"])), Freshness::Current);
        assert_eq!(seen.note("g", &copy("95", &["a"])), Freshness::First);
        let mut seen = Seen::bounded(1_000, 10_000);
        let long = "n".repeat(1_000);
        for n in 0..100 {
            seen.note("g", &copy(&(n % 30).to_string(), &[&long]));
            assert!(seen.bytes <= 10_000);
            let counted: usize = seen.states.iter().map(|(_, known)| known.bytes).sum();
            assert_eq!(seen.bytes, counted);
        }
        assert!(seen.states.len() > 3);
    }
}
