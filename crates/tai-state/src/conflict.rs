//! Conflicts: which of two versions of one state counts, or what they come to together.
//!
//! The resolvers that choose ([`LastWriteWinsResolver`], [`CausalityAwareResolver`],
//! [`HighestVersionResolver`]) return one of the two **unchanged**. If the winner came with a merged
//! clock it would have another place in the order than before, and `(a, b), c` could have another
//! winner than `a, (b, c)`. Whoever keeps the answer merges the clocks:
//! [`EventualConsistency`](crate::EventualConsistency) does.
//!
//! All resolvers here are commutative (the answer does not depend on the order of the arguments) and
//! idempotent (`resolve(a, a)` is `a`); those that follow one total order (last write wins, highest
//! version) are associative too.

use std::cmp::Ordering;
use std::fmt;

use crate::chain::Hash;
use crate::clock_vector::Causality;
use crate::error::{Error, Result};
use crate::json::{MAX_DEPTH, canonical, depth_exceeds, too_deep};
use crate::state::{ChangeMetadata, StateSnapshot};

mod merge;
#[cfg(test)]
mod tests;

pub use merge::FieldMergeResolver;
pub(crate) use merge::same;

/// Decides between two versions of one state that do not agree.
///
/// An answer must not depend on anything but the arguments, nor on their order: else two who resolve
/// the same conflict do not come to the same end.
pub trait ConflictResolver: Send + Sync + fmt::Debug {
    /// What the two versions come to.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when they are versions of different states, or nested too deep;
    /// [`Error::MergeConflict`] from a resolver that does not decide everything.
    fn resolve(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot>;

    /// As [`resolve`](ConflictResolver::resolve), with the newest version that both are based on, where
    /// that is known. Without a method of its own, a resolver does without it.
    ///
    /// # Errors
    /// As [`resolve`](ConflictResolver::resolve).
    fn resolve_with_base(
        &self,
        base: Option<&StateSnapshot>,
        a: &StateSnapshot,
        b: &StateSnapshot,
    ) -> Result<StateSnapshot> {
        let _ = base;
        self.resolve(a, b)
    }

    /// Whether it makes use of a base. Looking for one costs reads.
    fn uses_base(&self) -> bool {
        false
    }

    /// What several versions come to, whatever their order: here they are sorted by the order of
    /// [`LastWriteWinsResolver`] and resolved one after the other, the earliest first.
    ///
    /// # Errors
    /// As [`resolve`](ConflictResolver::resolve), and [`Error::InvalidState`] for no version at all.
    fn resolve_all(&self, versions: &[StateSnapshot]) -> Result<StateSnapshot> {
        let mut sorted = comparable(versions)?;
        sorted.sort_by(|a, b| last_write(a, b));
        let mut sorted = sorted.into_iter();
        let first = sorted.next().ok_or_else(of_nothing)?.clone();
        sorted.try_fold(first, |sum, next| self.resolve(&sum, next))
    }

    /// What it is called on record, at most 64 bytes of it.
    fn name(&self) -> &str {
        "custom"
    }
}

/// The later timestamp wins, whatever the clocks say.
///
/// Of two with the same timestamp, in this order: the one that knows of more changes (by the sum of its
/// clock's counts: what happened before has the smaller sum, so this never prefers a cause to its
/// effect), the greater clock by its entries, the greater version, the greater metadata, the greater
/// SHA-256 of the canonical data. So only versions that say the same are equal, and the answer does not
/// depend on who is asked first.
///
/// Timestamps are wall time: a node whose clock is ahead wins. Where that matters, use
/// [`CausalityAwareResolver`].
///
/// ```
/// # use serde_json::json;
/// # use tai_state::*;
/// let version = |n: i64| {
///     let why = ChangeMetadata::new("docs", "example", None);
///     let mut state = StateSnapshot::new("door".into(), json!({"open": n}), why);
///     state.timestamp += chrono::TimeDelta::seconds(n);
///     state
/// };
/// let (early, late) = (version(1), version(2));
/// assert_eq!(LastWriteWinsResolver.resolve(&late, &early)?, late);
/// assert_eq!(LastWriteWinsResolver.resolve(&early, &late)?, late);
/// # Ok::<(), tai_state::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct LastWriteWinsResolver;

/// What is causally newer wins. Where neither knows all of the other, and where equal clocks stand with
/// different data (as when a node has lost its counter), the order of [`LastWriteWinsResolver`]
/// decides.
///
/// Of several versions those go first that another one knows of; the order decides among the rest.
#[derive(Debug, Clone, Copy, Default)]
pub struct CausalityAwareResolver;

/// The greater version wins; of equal versions the one that [`LastWriteWinsResolver`] prefers. For copies
/// of one store, whose versions count the same changes.
#[derive(Debug, Clone, Copy, Default)]
pub struct HighestVersionResolver;

/// A resolver made of a function, with the name that it has on record. The function gets two versions of
/// the same state; what it says must not depend on their order.
///
/// ```
/// # use serde_json::json;
/// # use tai_state::*;
/// let longest = ResolveWith::new("longest", |a: &StateSnapshot, b: &StateSnapshot| {
///     let length = |state: &StateSnapshot| state.data.as_array().map_or(0, Vec::len);
///     match length(a).cmp(&length(b)) {
///         std::cmp::Ordering::Greater => Ok(a.clone()),
///         std::cmp::Ordering::Less => Ok(b.clone()),
///         std::cmp::Ordering::Equal => LastWriteWinsResolver.resolve(a, b),
///     }
/// });
/// let list = |data| StateSnapshot::new("list".into(), data, ChangeMetadata::new("a", "b", None));
/// let (short, long) = (list(json!([1])), list(json!([1, 2])));
/// let ec = EventualConsistency::with_resolver(Box::new(longest));
/// assert_eq!(ec.resolve_conflict(&short, &long)?.data, json!([1, 2]));
/// # Ok::<(), tai_state::Error>(())
/// ```
#[derive(Clone)]
pub struct ResolveWith<F> {
    name: String,
    function: F,
}

impl<F> ResolveWith<F>
where
    F: Fn(&StateSnapshot, &StateSnapshot) -> Result<StateSnapshot> + Send + Sync,
{
    /// A resolver that asks this function.
    pub fn new(name: impl Into<String>, function: F) -> Self {
        Self { name: name.into(), function }
    }
}

impl<F> fmt::Debug for ResolveWith<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResolveWith").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<F> ConflictResolver for ResolveWith<F>
where
    F: Fn(&StateSnapshot, &StateSnapshot) -> Result<StateSnapshot> + Send + Sync,
{
    fn resolve(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        comparable([a, b])?;
        (self.function)(a, b)
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl ConflictResolver for LastWriteWinsResolver {
    fn resolve(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        greatest([a, b], last_write)
    }

    fn resolve_all(&self, versions: &[StateSnapshot]) -> Result<StateSnapshot> {
        greatest(versions, last_write)
    }

    fn name(&self) -> &str {
        "last_write_wins"
    }
}

impl ConflictResolver for CausalityAwareResolver {
    fn resolve(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        greatest([a, b], |a, b| match a.causality.compare(&b.causality) {
            Causality::Before => Ordering::Less,
            Causality::After => Ordering::Greater,
            Causality::Equal | Causality::Concurrent => last_write(a, b),
        })
    }

    /// Resolved one by one, a version that another knows of could win in the end: over one that is
    /// concurrent to both.
    fn resolve_all(&self, versions: &[StateSnapshot]) -> Result<StateSnapshot> {
        let known = |a: &StateSnapshot| {
            versions.iter().any(|other| a.causality.happened_before(&other.causality))
        };
        comparable(versions)?;
        greatest(versions.iter().filter(|version| !known(version)), last_write)
    }

    fn name(&self) -> &str {
        "causality_aware"
    }
}

impl ConflictResolver for HighestVersionResolver {
    fn resolve(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        greatest([a, b], highest_version)
    }

    fn resolve_all(&self, versions: &[StateSnapshot]) -> Result<StateSnapshot> {
        greatest(versions, highest_version)
    }

    fn name(&self) -> &str {
        "highest_version"
    }
}

/// The greatest by an order, unchanged.
fn greatest<'a>(
    versions: impl IntoIterator<Item = &'a StateSnapshot>,
    order: impl Fn(&StateSnapshot, &StateSnapshot) -> Ordering,
) -> Result<StateSnapshot> {
    let versions = comparable(versions)?;
    let greatest = versions.into_iter().max_by(|a, b| order(a, b));
    greatest.cloned().ok_or_else(of_nothing)
}

fn highest_version(a: &StateSnapshot, b: &StateSnapshot) -> Ordering {
    a.version.cmp(&b.version).then_with(|| last_write(a, b))
}

/// The order of [`LastWriteWinsResolver`]. Total: what is equal by it says the same. The arguments must
/// be [`comparable`].
fn last_write(a: &StateSnapshot, b: &StateSnapshot) -> Ordering {
    a.timestamp
        .cmp(&b.timestamp)
        .then_with(|| a.causality.total().cmp(&b.causality.total()))
        .then_with(|| a.causality.iter().cmp(b.causality.iter()))
        .then_with(|| a.version.cmp(&b.version))
        .then_with(|| metadata_order(&a.metadata, &b.metadata))
        .then_with(|| Hash::of(&a.data).cmp(&Hash::of(&b.data)))
}

fn metadata_order(a: &ChangeMetadata, b: &ChangeMetadata) -> Ordering {
    let texts = |metadata: &ChangeMetadata| {
        let context = metadata.context.iter();
        context.map(|(key, value)| (key.clone(), canonical(value))).collect::<Vec<_>>()
    };
    a.changed_by
        .cmp(&b.changed_by)
        .then_with(|| a.reason.cmp(&b.reason))
        .then_with(|| a.parent_version.cmp(&b.parent_version))
        .then_with(|| texts(a).cmp(&texts(b)))
}

/// Makes sure that these are versions of one state, and shallow enough to be compared and copied.
///
/// # Errors
/// [`Error::InvalidState`] that names the state.
pub(crate) fn comparable<'a>(
    versions: impl IntoIterator<Item = &'a StateSnapshot>,
) -> Result<Vec<&'a StateSnapshot>> {
    let versions: Vec<&StateSnapshot> = versions.into_iter().collect();
    for version in &versions {
        if let Some(first) = versions.first()
            && first.id != version.id
        {
            let reason = format!("a version of {} is no version of it", version.id);
            return Err(Error::refused(format!("a conflict over {}", first.id), reason));
        }
        let mut values = version.metadata.context.values().chain([&version.data]);
        if values.any(|value| depth_exceeds(value, MAX_DEPTH)) {
            return Err(too_deep(&format!("a version of {}", version.id)));
        }
    }
    Ok(versions)
}

fn of_nothing() -> Error {
    Error::refused("a conflict of no versions", "there is nothing to choose from")
}
