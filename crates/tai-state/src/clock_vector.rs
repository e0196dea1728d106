//! Vector clocks: which change could have known of which.
//!
//! A clock counts, for every node, the changes of that node that are known. `a` happened before
//! `b` when every count of `a` is at most that of `b` and one is smaller; when neither knows all
//! of the other, they are concurrent (Mattern 1989, Fidge 1988).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How two clocks stand to one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Causality {
    /// The first knows strictly less: it happened before the second.
    Before,
    /// The first knows strictly more: it happened after the second.
    After,
    /// Both know the same.
    Equal,
    /// Each knows something that the other does not.
    Concurrent,
}

/// A vector clock as it was when a change was made. A node that is not named counts 0.
///
/// ```
/// use tai_state::VectorClockSnapshot;
///
/// let mut a = VectorClockSnapshot::new();
/// a.increment("node1");
/// let mut b = a.clone();
/// b.increment("node2");
/// assert!(a.happened_before(&b));
/// a.increment("node1");
/// assert!(a.concurrent_with(&b));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VectorClockSnapshot {
    #[serde(deserialize_with = "without_zeros")]
    counts: BTreeMap<String, u64>,
}

/// A count of 0 and no count mean the same; only one of the two may be kept, or equal clocks
/// would differ.
fn without_zeros<'de, D>(deserializer: D) -> Result<BTreeMap<String, u64>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let mut counts = BTreeMap::<String, u64>::deserialize(deserializer)?;
    counts.retain(|_, count| *count > 0);
    Ok(counts)
}

impl VectorClockSnapshot {
    /// A clock that knows of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts one more change of `node`.
    pub fn increment(&mut self, node: &str) {
        match self.counts.get_mut(node) {
            Some(count) => *count = count.saturating_add(1),
            None => {
                self.counts.insert(node.to_owned(), 1);
            }
        }
    }

    /// How many changes of `node` are known.
    #[must_use]
    pub fn get(&self, node: &str) -> u64 {
        self.counts.get(node).copied().unwrap_or(0)
    }

    /// Learns all that `other` knows.
    pub fn merge(&mut self, other: &Self) {
        for (node, count) in &other.counts {
            match self.counts.get_mut(node) {
                Some(mine) => *mine = (*mine).max(*count),
                None => {
                    self.counts.insert(node.clone(), *count);
                }
            }
        }
    }

    /// How this clock stands to `other`.
    #[must_use]
    pub fn compare(&self, other: &Self) -> Causality {
        let less = self.counts.iter().any(|(node, count)| *count > other.get(node));
        let more = other.counts.iter().any(|(node, count)| *count > self.get(node));
        match (less, more) {
            (false, false) => Causality::Equal,
            (true, false) => Causality::After,
            (false, true) => Causality::Before,
            (true, true) => Causality::Concurrent,
        }
    }

    /// Whether `other` knows all of this and more.
    #[must_use]
    pub fn happened_before(&self, other: &Self) -> bool {
        self.compare(other) == Causality::Before
    }

    /// Whether neither knows all of the other.
    #[must_use]
    pub fn concurrent_with(&self, other: &Self) -> bool {
        self.compare(other) == Causality::Concurrent
    }

    /// The counts by node, in the order of the nodes' bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.counts.iter().map(|(node, count)| (node.as_str(), *count))
    }

    /// How many changes are known, of all nodes. What happened before has the smaller sum, so the order
    /// of the sums never contradicts causality.
    pub(crate) fn total(&self) -> u128 {
        self.counts.values().map(|count| u128::from(*count)).sum()
    }

    /// How many nodes are counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn clock(counts: &[(&str, u64)]) -> VectorClockSnapshot {
        let mut clock = VectorClockSnapshot::new();
        for (node, count) in counts {
            (0..*count).for_each(|_| clock.increment(node));
        }
        clock
    }

    #[test]
    fn table() {
        let cases: &[(&[(&str, u64)], &[(&str, u64)], Causality)] = &[
            (&[], &[], Causality::Equal),
            (&[], &[("a", 1)], Causality::Before),
            (&[("a", 2)], &[("a", 1)], Causality::After),
            (&[("a", 2)], &[("b", 1)], Causality::Concurrent),
            (&[("a", 1), ("b", 1)], &[("b", 1), ("a", 1)], Causality::Equal),
            (&[("a", 2), ("b", 1)], &[("a", 1), ("b", 2)], Causality::Concurrent),
        ];
        for (left, right, expected) in cases {
            assert_eq!(clock(left).compare(&clock(right)), *expected, "{left:?} {right:?}");
        }
    }

    #[test]
    fn a_stored_zero_is_no_count() {
        let read: VectorClockSnapshot = serde_json::from_str(r#"{"a":0,"b":1}"#).unwrap();
        assert_eq!(read, clock(&[("b", 1)]));
    }

    /// Any of 64 nodes, few of them as a rule and with small counts, so that clocks meet often.
    fn clocks() -> impl Strategy<Value = VectorClockSnapshot> {
        let count = |nodes: usize, most| prop::collection::vec((0..nodes, 1..4u64), 0..=most);
        let counts = prop_oneof![3 => count(3, 3), 1 => count(64, 64)];
        counts.prop_map(|counts| {
            let named = counts.into_iter().map(|(node, count)| (format!("n{node}"), count));
            VectorClockSnapshot { counts: named.collect() }
        })
    }

    fn merged(a: &VectorClockSnapshot, b: &VectorClockSnapshot) -> VectorClockSnapshot {
        let mut merged = a.clone();
        merged.merge(b);
        merged
    }

    /// Random executions of 1 to 64 nodes: each step a node makes a change, or learns what another knows
    /// and makes one.
    fn executions() -> impl Strategy<Value = Vec<(usize, Option<usize>)>> {
        prop_oneof![1..8usize, 1..=64usize].prop_flat_map(|nodes| {
            prop::collection::vec((0..nodes, prop::option::of(0..nodes)), 1..=64)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        /// The brute-force definition keeps the set of changes that each change knows, one bit for each.
        #[test]
        fn agrees_with_the_sets_of_known_changes(
            steps in executions(),
            pairs in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 48),
        ) {
            let mut nodes = vec![(VectorClockSnapshot::new(), 0u64); 64];
            let mut changes = Vec::new();
            for (number, (node, from)) in steps.into_iter().enumerate() {
                if let Some(from) = from {
                    let (clock, known) = nodes[from].clone();
                    nodes[node].0.merge(&clock);
                    nodes[node].1 |= known;
                }
                nodes[node].0.increment(&format!("n{node}"));
                nodes[node].1 |= 1 << number;
                changes.push(nodes[node].clone());
            }
            // All neighbours, and some of the other pairs.
            let drawn = pairs.iter().map(|(a, b)| (a.get(&changes), b.get(&changes)));
            let neighbours = changes.iter().zip(changes.iter().skip(1));
            for ((clock_a, known_a), (clock_b, known_b)) in drawn.chain(neighbours) {
                let is_part = |a: u64, b: u64| a & b == a;
                let expected = match (is_part(*known_a, *known_b), is_part(*known_b, *known_a)) {
                    (true, true) => Causality::Equal,
                    (true, false) => Causality::Before,
                    (false, true) => Causality::After,
                    (false, false) => Causality::Concurrent,
                };
                prop_assert_eq!(clock_a.compare(clock_b), expected);
                let [before, concurrent] = [Causality::Before, Causality::Concurrent];
                prop_assert_eq!(clock_a.happened_before(clock_b), expected == before);
                prop_assert_eq!(clock_a.concurrent_with(clock_b), expected == concurrent);
            }
        }

        #[test]
        fn laws_of_clocks(a in clocks(), b in clocks(), c in clocks()) {
            prop_assert_eq!(merged(&a, &b), merged(&b, &a));
            prop_assert_eq!(merged(&merged(&a, &b), &c), merged(&a, &merged(&b, &c)));
            prop_assert_eq!(&merged(&a, &a), &a);
            let mirrored = match a.compare(&b) {
                Causality::Before => Causality::After,
                Causality::After => Causality::Before,
                same => same,
            };
            prop_assert_eq!(b.compare(&a), mirrored);
            prop_assert_eq!(a.compare(&b) == Causality::Equal, a == b);
            if a.happened_before(&b) {
                prop_assert!(a.total() < b.total());
                prop_assert!(!b.happened_before(&c) || a.happened_before(&c));
            }
            let both = merged(&a, &b);
            prop_assert!(!a.concurrent_with(&both) && !both.happened_before(&a));
        }
    }
}
