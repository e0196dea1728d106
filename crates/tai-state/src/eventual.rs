//! [`EventualConsistency`]: what to make of copies that do not agree: resolve, notice what is stale, repair.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::clock_vector::Causality;
use crate::conflict::{CausalityAwareResolver, ConflictResolver, comparable, same};
use crate::error::{Error, Result};
use crate::json::refuse_deep;
use crate::keys::Address;
use crate::state::StateSnapshot;
use crate::store::StateStore;

mod repair;
mod seen;

pub use repair::{
    CONFLICT_CONTEXT, CONFLICT_LOST, CONFLICT_RESOLVED, REPAIRED, Repair, RepairOutcome,
};
use seen::Seen;

/// Deals with copies of states that were changed apart from one another: resolves them, notices stale
/// reads, and repairs a store with what a copy knows.
///
/// The store itself is not eventually consistent: each state has one newest version. This is for what
/// lives beside it: a cache, a replica that was read from, a second store that was written to while there
/// was no connection. A copy carries what it knows in its vector clock; a snapshot that never came from a
/// store knows of nothing, and so is older than anything that did.
///
/// A cheap handle: clones share the resolver, what was seen, and the statistics.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
/// use serde_json::json;
/// use tai_state::{
///     ChangeMetadata, EventualConsistency, LastWriteWinsResolver, RepairOutcome, StateSnapshot, StateStore,
/// };
///
/// let why = || ChangeMetadata::new("docs", "example", None);
/// let store = StateStore::in_memory();
/// let door = StateSnapshot::new("door".into(), json!({"open": false}), why());
/// store.save_state("gov", "door", door, why()).await?;
/// // A copy is taken along and changed elsewhere, and meanwhile here too.
/// let (mut copy, _) = store.get_state("gov", "door").await?;
/// copy.data = json!({"open": true});
/// copy.timestamp += chrono::TimeDelta::hours(1);
/// copy.causality.increment("elsewhere");
/// let (here, _) = store.get_state("gov", "door").await?;
/// store.save_state("gov", "door", here.clone(), why()).await?;
///
/// let ec = EventualConsistency::with_resolver(Box::new(LastWriteWinsResolver));
/// let (newest, _) = store.get_state("gov", "door").await?;
/// assert_eq!(ec.resolve_conflict(&copy, &newest)?.data["open"], true);
/// // The same, and the store has it. What lost stays on record.
/// let repair = ec.repair(&store, "gov", &copy, why()).await?;
/// assert_eq!((repair.outcome, repair.newest.version), (RepairOutcome::MineWon, 3));
/// assert_eq!(repair.lost_version, Some(2));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct EventualConsistency {
    shared: Arc<Shared>,
}

struct Shared {
    resolver: Box<dyn ConflictResolver>,
    seen: Mutex<Seen>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    conflicts_detected: AtomicU64,
    conflicts_resolved: AtomicU64,
    stale_reads: AtomicU64,
    read_repairs: AtomicU64,
    losers_recorded: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What an [`EventualConsistency`] and its clones have met so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ConsistencyStatistics {
    /// Two versions of which neither knew all of the other, or that differed with equal clocks.
    pub conflicts_detected: u64,
    /// Those for which the resolver had an answer (and the store has taken it, in a repair).
    pub conflicts_resolved: u64,
    /// Copies that lacked what had been seen before, or what the store had.
    pub stale_reads: u64,
    /// Repairs that changed a store.
    pub read_repairs: u64,
    /// Losers that a repair has put on record.
    pub losers_recorded: u64,
}

/// How a copy stands to what is known of its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Freshness {
    /// Nothing was known of the state.
    First,
    /// It is what was known.
    Current,
    /// It knows all that was known, and more.
    Newer,
    /// It lacks something that was known, and has nothing new: it is from before.
    Stale,
    /// It lacks something that was known, and has something new: it was changed apart from it.
    Concurrent,
}

impl Default for EventualConsistency {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for EventualConsistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventualConsistency")
            .field("resolver", &self.shared.resolver)
            .field("statistics", &self.statistics())
            .finish_non_exhaustive()
    }
}

impl EventualConsistency {
    /// With [`CausalityAwareResolver`]: what is causally newer wins, and the last write among what is
    /// not. It never takes a cause for newer than its effect, whatever the clocks on the wall said.
    #[must_use]
    pub fn new() -> Self {
        Self::with_resolver(Box::new(CausalityAwareResolver))
    }

    /// With a resolver of one's choice, or of one's own.
    #[must_use]
    pub fn with_resolver(resolver: Box<dyn ConflictResolver>) -> Self {
        let (seen, counts) = (Mutex::default(), Counts::default());
        Self { shared: Arc::new(Shared { resolver, seen, counts }) }
    }

    /// What two versions of one state come to: the resolver's answer, with both clocks merged, so that it
    /// counts as knowing both. Does not depend on the order of the two, if the resolver does not.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for versions of different states, or what is nested too deep;
    /// [`Error::MergeConflict`], as the resolver says.
    pub fn resolve_conflict(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        comparable([a, b])?;
        let is_conflict = is_conflict(a, b);
        if is_conflict {
            self.note_conflict(a.id.as_str());
        }
        let answer = self.resolve_from(None, a, b)?;
        if is_conflict {
            count(&self.shared.counts.conflicts_resolved);
        }
        Ok(answer)
    }

    /// What any number of versions of one state come to, whatever their order, with all clocks merged.
    ///
    /// # Errors
    /// As [`resolve_conflict`](EventualConsistency::resolve_conflict), and [`Error::InvalidState`] for no
    /// version at all.
    pub fn resolve_all(&self, versions: &[StateSnapshot]) -> Result<StateSnapshot> {
        let compared = comparable(versions)?;
        let mut others = compared.iter();
        let mut is_in_conflict = false;
        while let Some(one) = others.next() {
            is_in_conflict |= others.clone().any(|other| is_conflict(one, other));
        }
        if let Some(first) = compared.first().filter(|_| is_in_conflict) {
            self.note_conflict(first.id.as_str());
        }
        let answer = self.shared.resolver.resolve_all(versions)?;
        let answer = with_clocks(answer, &compared)?;
        if is_in_conflict {
            count(&self.shared.counts.conflicts_resolved);
        }
        Ok(answer)
    }

    /// Notes a copy that was read, and says how it stands to all copies of that state that were noted
    /// before: [`Freshness::Stale`] and [`Freshness::Concurrent`] are reads that went back behind one
    /// before (they break "monotonic reads"). What is compared is clocks, and versions where the clocks
    /// are equal.
    ///
    /// Only so much is remembered: of some thousand states, those that were not read for the longest time
    /// forgotten first. A forgotten state is [`Freshness::First`] again.
    pub fn observe(&self, governor: impl AsRef<str>, copy: &StateSnapshot) -> Freshness {
        let governor = governor.as_ref();
        let mut seen = self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let freshness = seen.note(governor, copy);
        drop(seen);
        self.note_freshness(governor, copy, freshness)
    }

    /// Says how a copy stands to the newest version in the store: [`Freshness::First`] when the store has
    /// never had the state, [`Freshness::Concurrent`] also for equal clocks with different data. Changes
    /// nothing.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible id or what is nested too deep, or what reading meets.
    pub async fn check(
        &self,
        store: &StateStore,
        governor: impl AsRef<str>,
        copy: &StateSnapshot,
    ) -> Result<Freshness> {
        comparable([copy])?;
        let address = Address::new(governor.as_ref(), copy.id.as_str())?;
        let freshness = match store.records.head(&address).await? {
            None => Freshness::First,
            Some(known) => {
                let change = &known.head.change;
                match copy.causality.compare(&change.causality) {
                    Causality::Before => Freshness::Stale,
                    Causality::After => Freshness::Newer,
                    Causality::Equal if same(&copy.data, &change.data) => Freshness::Current,
                    Causality::Equal | Causality::Concurrent => Freshness::Concurrent,
                }
            }
        };
        Ok(self.note_freshness(governor.as_ref(), copy, freshness))
    }

    /// What was met so far.
    #[must_use]
    pub fn statistics(&self) -> ConsistencyStatistics {
        let counts = &self.shared.counts;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConsistencyStatistics {
            conflicts_detected: read(&counts.conflicts_detected),
            conflicts_resolved: read(&counts.conflicts_resolved),
            stale_reads: read(&counts.stale_reads),
            read_repairs: read(&counts.read_repairs),
            losers_recorded: read(&counts.losers_recorded),
        }
    }

    /// The resolver's answer, if it is one, with both clocks merged.
    fn resolve_from(
        &self,
        base: Option<&StateSnapshot>,
        a: &StateSnapshot,
        b: &StateSnapshot,
    ) -> Result<StateSnapshot> {
        with_clocks(self.shared.resolver.resolve_with_base(base, a, b)?, &[a, b])
    }

    fn note_conflict(&self, state: &str) {
        count(&self.shared.counts.conflicts_detected);
        let resolver = self.shared.resolver.name();
        tracing::warn!(state, resolver, "two versions were made apart from one another");
    }

    fn note_freshness(
        &self,
        governor: &str,
        copy: &StateSnapshot,
        freshness: Freshness,
    ) -> Freshness {
        let (state, version) = (copy.id.as_str(), copy.version);
        match freshness {
            Freshness::Stale => {
                count(&self.shared.counts.stale_reads);
                tracing::warn!(governor, state, version, "a stale copy was read");
            }
            Freshness::Concurrent => self.note_conflict(state),
            Freshness::First | Freshness::Current | Freshness::Newer => {}
        }
        freshness
    }
}

/// Whether neither of two versions is simply the newer one.
fn is_conflict(a: &StateSnapshot, b: &StateSnapshot) -> bool {
    match a.causality.compare(&b.causality) {
        Causality::Before | Causality::After => false,
        Causality::Equal => !same(&a.data, &b.data),
        Causality::Concurrent => true,
    }
}

/// An answer that knows all that the versions knew.
fn with_clocks(mut answer: StateSnapshot, of: &[&StateSnapshot]) -> Result<StateSnapshot> {
    let subject = "the answer of a conflict resolver";
    let values = answer.metadata.context.values_mut().chain([&mut answer.data]);
    refuse_deep(values, subject)?;
    let mut clocks = of.iter().map(|version| &version.causality);
    let mut causality = clocks.next().cloned().unwrap_or_default();
    clocks.for_each(|clock| causality.merge(clock));
    if of.iter().any(|version| version.id != answer.id) {
        return Err(Error::refused(subject, format!("it is a version of {}", answer.id)));
    }
    answer.causality = causality;
    Ok(answer)
}
