//! Three-way merge: what each side has changed of what both started from.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{ConflictResolver, comparable, last_write};
use crate::error::{Error, Result};
use crate::json::{refuse_deep, too_deep};
use crate::state::StateSnapshot;

/// Merges two versions field by field, by what each has changed of the version that both started from.
///
/// A change is what a merge patch ([RFC 7396](https://www.rfc-editor.org/rfc/rfc7396)) would say:
/// objects are merged member by member at every depth, arrays and everything else are taken as wholes,
/// and taking a member away is a change. But `null` is a value here as any other, no removal. A field
/// that one side has changed takes that side; changed equally on both, it takes that; changed
/// differently on both, it is a conflict: [`Error::MergeConflict`] with the [JSON
/// pointers](https://www.rfc-editor.org/rfc/rfc6901) of all such fields, unless
/// [`or_last_write`](FieldMergeResolver::or_last_write) is set. Two whole values that are not both
/// objects are one field, with the pointer `""`.
///
/// The result is the version that [`LastWriteWinsResolver`](crate::LastWriteWinsResolver) prefers, with
/// the merged data, both clocks merged, and the greater version.
///
/// The base is the one that it was made with, or better the one that is handed to
/// [`resolve_with_base`](ConflictResolver::resolve_with_base):
/// [`EventualConsistency::repair`](crate::EventualConsistency::repair) finds it in the log. A base that
/// is no object counts as `{}`. By default it is `{}`, which knows of no field: then what stands on one
/// side only was added there, and what both have must be equal.
///
/// ```
/// # use serde_json::json;
/// # use tai_state::*;
/// let state = |data| StateSnapshot::new("order".into(), data, ChangeMetadata::new("a", "b", None));
/// let merge = FieldMergeResolver::new(json!({"status": "new", "items": 1, "note": "x"}));
/// let paid = state(json!({"status": "paid", "items": 1, "note": "x"}));
/// let more = state(json!({"status": "new", "items": 2}));
/// assert_eq!(merge.resolve(&paid, &more)?.data, json!({"status": "paid", "items": 2}));
///
/// let gone = state(json!({"status": "cancelled", "items": 1, "note": "x"}));
/// let conflict = merge.resolve(&paid, &gone);
/// assert!(matches!(conflict, Err(Error::MergeConflict { fields, .. }) if fields == ["/status"]));
/// # Ok::<(), tai_state::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct FieldMergeResolver {
    base: Value,
    is_base_too_deep: bool,
    or_last_write: bool,
}

impl Default for FieldMergeResolver {
    /// With `{}` as base.
    fn default() -> Self {
        Self::new(Value::Object(Map::new()))
    }
}

impl FieldMergeResolver {
    /// With a base, for conflicts that come without one of their own. What is nested too deep is refused
    /// when it is used.
    #[must_use]
    pub fn new(mut base: Value) -> Self {
        let is_base_too_deep = refuse_deep([&mut base], "the base of a merge").is_err();
        Self { base, is_base_too_deep, or_last_write: false }
    }

    /// Takes the side of the last write for the fields that were changed differently on both, and only
    /// for those.
    #[must_use]
    pub fn or_last_write(mut self) -> Self {
        self.or_last_write = true;
        self
    }

    fn merge(&self, base: &Value, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        let is_a_later = last_write(a, b).is_ge();
        let mut merge = Merge { is_a_later, at: String::new(), conflicts: Vec::new() };
        // There is a value on both sides, so there is one in the end.
        let data = merge.field(Some(base), Some(&a.data), Some(&b.data)).unwrap_or_default();
        if !merge.conflicts.is_empty() && !self.or_last_write {
            let mut fields = merge.conflicts;
            fields.sort_unstable();
            return Err(Error::MergeConflict { state: a.id.to_string(), fields });
        }
        let later = if is_a_later { a } else { b };
        let mut causality = a.causality.clone();
        causality.merge(&b.causality);
        Ok(StateSnapshot {
            id: later.id.clone(),
            data,
            version: a.version.max(b.version),
            timestamp: later.timestamp,
            metadata: later.metadata.clone(),
            causality,
        })
    }
}

impl ConflictResolver for FieldMergeResolver {
    fn resolve(&self, a: &StateSnapshot, b: &StateSnapshot) -> Result<StateSnapshot> {
        self.resolve_with_base(None, a, b)
    }

    fn resolve_with_base(
        &self,
        base: Option<&StateSnapshot>,
        a: &StateSnapshot,
        b: &StateSnapshot,
    ) -> Result<StateSnapshot> {
        comparable([Some(a), Some(b), base].into_iter().flatten())?;
        let base = match base {
            Some(base) => &base.data,
            None if self.is_base_too_deep => return Err(too_deep("the base of a merge")),
            None => &self.base,
        };
        self.merge(base, a, b)
    }

    fn uses_base(&self) -> bool {
        true
    }

    fn name(&self) -> &str {
        if self.or_last_write { "field_merge_or_last_write" } else { "field_merge" }
    }
}

/// A merge in progress. It recurses; what it is given is not nested deeper than [`MAX_DEPTH`](crate::json::MAX_DEPTH).
struct Merge {
    is_a_later: bool,
    /// The pointer of the field that is being merged.
    at: String,
    conflicts: Vec<String>,
}

impl Merge {
    /// Merges one field; `None` = it is not there.
    fn field(
        &mut self,
        base: Option<&Value>,
        a: Option<&Value>,
        b: Option<&Value>,
    ) -> Option<Value> {
        if are_same(a, b) || are_same(b, base) {
            return a.cloned();
        }
        if are_same(a, base) {
            return b.cloned();
        }
        let (Some(Value::Object(a)), Some(Value::Object(b))) = (a, b) else {
            self.conflicts.push(self.at.clone());
            return if self.is_a_later { a.cloned() } else { b.cloned() };
        };
        let base = base.and_then(Value::as_object);
        let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        let mut merged = Map::new();
        let here = self.at.len();
        for key in keys {
            self.at.push('/');
            self.at.push_str(&key.replace('~', "~0").replace('/', "~1"));
            let field = self.field(base.and_then(|base| base.get(key)), a.get(key), b.get(key));
            if let Some(value) = field {
                merged.insert(key.clone(), value);
            }
            self.at.truncate(here);
        }
        Some(Value::Object(merged))
    }
}

fn are_same(a: Option<&Value>, b: Option<&Value>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => same(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// Whether two values have the same canonical text. By `==`, `0.0` and `-0.0` are equal: then it would be
/// the order of the arguments that decides which of them is kept. Recurses, as deep as [`MAX_DEPTH`](crate::json::MAX_DEPTH).
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            a.as_f64().map(f64::to_bits) == b.as_f64().map(f64::to_bits)
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        (a, b) => a == b,
    }
}
