//! Whether a body matches a query, and which of many come first: for engines that look themselves.
//!
//! Pure. Values are ordered as Firestore orders them: `null`, booleans, numbers by their exact value,
//! strings by their bytes, then arrays and objects; a test meets values of its own type only.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::{Number, Value};

use super::{BackendError, Cursor, Direction, Document, Field, Found, Key, Query, Test};

/// What stands at the end of a path.
pub(crate) fn field<'a>(body: &'a Value, Field(path): &Field) -> Option<&'a Value> {
    path.iter().try_fold(body, |value, name| value.as_object()?.get(name))
}

/// Whether all tests hold.
pub(crate) fn matches(filters: &[(Field, Test)], body: &Value) -> bool {
    filters.iter().all(|(path, test)| field(body, path).is_some_and(|value| holds(test, value)))
}

fn holds(test: &Test, value: &Value) -> bool {
    let is = |wanted: &Value| compare(value, wanted).is_eq();
    let range = |wanted: &Value, right: fn(Ordering) -> bool| {
        rank(value) == rank(wanted) && right(compare(value, wanted))
    };
    match test {
        Test::Equal(wanted) => is(wanted),
        Test::OneOf(wanted) => wanted.iter().any(is),
        Test::Contains(wanted) => value
            .as_array()
            .is_some_and(|elements| elements.iter().any(|e| compare(e, wanted).is_eq())),
        Test::Less(wanted) => range(wanted, Ordering::is_lt),
        Test::AtMost(wanted) => range(wanted, Ordering::is_le),
        Test::Greater(wanted) => range(wanted, Ordering::is_gt),
        Test::AtLeast(wanted) => range(wanted, Ordering::is_ge),
    }
}

fn rank(value: &Value) -> u8 {
    match value {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(_) => 2,
        Value::String(_) => 3,
        Value::Array(_) => 4,
        Value::Object(_) => 5,
    }
}

/// A total order of all JSON values. `1` and `1.0` are equal, `0.0` and `-0.0` too.
pub(crate) fn compare(a: &Value, b: &Value) -> Ordering {
    match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => a.cmp(b),
        (Value::Number(a), Value::Number(b)) => compare_numbers(a, b),
        (Value::String(a), Value::String(b)) => a.as_bytes().cmp(b.as_bytes()),
        (Value::Array(a), Value::Array(b)) => {
            let pairs = a.iter().zip(b).map(|(a, b)| compare(a, b));
            pairs.fold(Ordering::Equal, Ordering::then).then(a.len().cmp(&b.len()))
        }
        (Value::Object(a), Value::Object(b)) => {
            let sorted = |object: &serde_json::Map<String, Value>| {
                let fields = object.iter().map(|(name, value)| (name.clone(), value.clone()));
                fields.collect::<BTreeMap<_, _>>()
            };
            let (a, b) = (sorted(a), sorted(b));
            let pairs = a.iter().zip(&b).map(|(a, b)| a.0.cmp(b.0).then(compare(a.1, b.1)));
            pairs.fold(Ordering::Equal, Ordering::then).then(a.len().cmp(&b.len()))
        }
        _ => rank(a).cmp(&rank(b)),
    }
}

/// By value and without rounding: an integer is never turned into a double.
fn compare_numbers(a: &Number, b: &Number) -> Ordering {
    match (integer(a), integer(b)) {
        (Some(a), Some(b)) => a.cmp(&b),
        (Some(a), None) => compare_with_double(a, double(b)),
        (None, Some(b)) => compare_with_double(b, double(a)).reverse(),
        // A JSON number is never NaN.
        (None, None) => double(a).partial_cmp(&double(b)).unwrap_or(Ordering::Equal),
    }
}

fn integer(number: &Number) -> Option<i128> {
    number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from))
}

fn double(number: &Number) -> f64 {
    number.as_f64().unwrap_or_default()
}

fn compare_with_double(integer: i128, double: f64) -> Ordering {
    // The cast keeps the whole part exactly up to 2^127, far beyond any integer of JSON here, and
    // goes to the end of the range for what lies behind.
    let whole = double.trunc();
    integer.cmp(&(whole as i128)).then_with(|| {
        // The whole parts are equal, so what is left of the double decides.
        0.0.partial_cmp(&(double - whole)).unwrap_or(Ordering::Equal)
    })
}

/// Where a document stands in the answer to a query.
#[derive(Debug)]
struct Place {
    value: Option<Value>,
    key: Key,
    descending: bool,
}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_value = match (&self.value, &other.value) {
            (Some(a), Some(b)) => compare(a, b),
            _ => Ordering::Equal,
        };
        let ascending = by_value.then_with(|| self.key.cmp(&other.key));
        if self.descending { ascending.reverse() } else { ascending }
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Place {}

/// Gathers one page of an answer from documents in any order, and holds no more than that page.
#[derive(Debug)]
pub(crate) struct Best<'a> {
    query: &'a Query,
    after: Option<Place>,
    /// The first of all that have come so far.
    kept: BTreeMap<Place, Document>,
    bytes: usize,
    most_bytes: usize,
    /// The first of those that are not kept: from there on nothing is, or the page had a gap.
    beyond: Option<Place>,
}

impl<'a> Best<'a> {
    /// For a query that was not refused. A page ends at its limit, or when its bodies together have
    /// more than `most_bytes`.
    pub(crate) fn new(query: &'a Query, most_bytes: usize) -> Self {
        let descending = matches!(query.order, Some((_, Direction::Descending)));
        let after = query.after.as_ref().map(|cursor| Place {
            value: cursor.value.clone(),
            key: cursor.key.clone(),
            descending,
        });
        let kept = BTreeMap::new();
        Self { query, after, kept, bytes: 0, most_bytes, beyond: None }
    }

    /// Looks at one document.
    ///
    /// # Errors
    /// [`BackendError::Corrupt`] when its body is no JSON.
    pub(crate) fn take(&mut self, document: Document) -> Result<(), BackendError> {
        let Query { filters, order, .. } = self.query;
        let mut value = None;
        if !filters.is_empty() || order.is_some() {
            let body: Value = document.body.parse().map_err(|error| BackendError::Corrupt {
                location: document.key.to_string(),
                reason: format!("its body cannot be read: {error}"),
            })?;
            if !matches(filters, &body) {
                return Ok(());
            }
            if let Some((by, _)) = order {
                let Some(found) = field(&body, by) else { return Ok(()) };
                value = Some(found.clone());
            }
        }
        let descending = matches!(order, Some((_, Direction::Descending)));
        let place = Place { value, key: document.key.clone(), descending };
        if self.after.as_ref().is_some_and(|after| place <= *after)
            || self.beyond.as_ref().is_some_and(|beyond| place >= *beyond)
        {
            return Ok(());
        }
        self.bytes += document.body.as_text().len();
        self.kept.insert(place, document);
        while self.kept.len() > self.query.limit
            || (self.bytes > self.most_bytes && self.kept.len() > 1)
        {
            let Some((place, document)) = self.kept.pop_last() else { break };
            self.bytes -= document.body.as_text().len();
            self.beyond = Some(place);
        }
        Ok(())
    }

    /// Whether nothing that comes later can belong to this page, when documents come by key.
    pub(crate) fn is_done(&self) -> bool {
        self.query.order.is_none() && self.beyond.is_some()
    }

    /// The page.
    pub(crate) fn finish(self) -> Found {
        let next = match (&self.beyond, self.kept.last_key_value()) {
            (Some(_), Some((last, _))) => {
                Some(Cursor { key: last.key.clone(), value: last.value.clone() })
            }
            _ => None,
        };
        Found { documents: self.kept.into_values().collect(), next }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::backend::{Body, Kind, Name, Revision};
    use crate::testing::arbitrary_json;

    #[test]
    fn numbers_are_compared_by_their_exact_value() {
        // Each is less than the next; those in one row are equal.
        let rows = [
            vec![json!(-1e300)],
            vec![json!(i64::MIN), json!(-9_223_372_036_854_775_808.0)],
            vec![json!(i64::MIN + 1)],
            vec![json!(-1.5)],
            vec![json!(-1), json!(-1.0)],
            vec![json!(-0.5)],
            vec![json!(0), json!(0.0), json!(-0.0)],
            vec![json!(5e-324)],
            vec![json!(0.5)],
            vec![json!(1), json!(1.0)],
            vec![json!(1.5)],
            vec![json!(9_007_199_254_740_992_u64), json!(9_007_199_254_740_992.0)],
            vec![json!(9_007_199_254_740_993_u64)],
            vec![json!(9_007_199_254_740_994_u64), json!(9_007_199_254_740_994.0)],
            vec![json!(i64::MAX)],
            vec![json!(9_223_372_036_854_775_808_u64), json!(9_223_372_036_854_775_808.0)],
            vec![json!(u64::MAX)],
            vec![json!(18_446_744_073_709_551_616.0)],
            vec![json!(1e300)],
        ];
        let all: Vec<(usize, &Value)> = rows
            .iter()
            .enumerate()
            .flat_map(|(at, row)| row.iter().map(move |v| (at, v)))
            .collect();
        for (a_at, a) in &all {
            for (b_at, b) in &all {
                assert_eq!(compare(a, b), a_at.cmp(b_at), "{a} and {b}");
            }
        }
    }

    #[test]
    fn a_path_goes_through_objects_only() {
        let body = json!({"a": {"b": [{"c": 1}], "": 2}, "a.b": 3, "n": null});
        let at = |path: &[&str]| {
            field(&body, &Field(path.iter().map(ToString::to_string).collect())).cloned()
        };
        assert_eq!(at(&["a", "b"]), Some(json!([{"c": 1}])));
        assert_eq!(at(&["a.b"]), Some(json!(3)));
        assert_eq!(at(&["n"]), Some(Value::Null));
        for absent in [&["a", "b", "0"][..], &["a", "b", "c"], &["a", "x"], &["n", "x"], &["b"]] {
            assert_eq!(at(absent), None, "{absent:?}");
        }
    }

    fn document(name: usize, body: &Value) -> Document {
        let name = Name::escape(&format!("{name:03}"), "id").unwrap();
        let governor = Name::escape("g", "id").unwrap();
        let key = Key { governor, kind: Kind::States, name, version: 0 };
        Document { key, body: Body::new(body).unwrap(), revision: Revision::new(1) }
    }

    proptest! {
        #[test]
        fn the_order_of_values_is_total(a in arbitrary_json(), b in arbitrary_json(), c in arbitrary_json()) {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            prop_assert_eq!(compare(&a, &a), Ordering::Equal);
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                prop_assert!(compare(&a, &c).is_le());
            }
        }

        /// Pages of any size, of documents that come in any order, are the sorted list cut in pieces.
        #[test]
        fn pages_are_the_sorted_list(
            values in prop::collection::vec(prop::option::of(0..5u8), 0..30),
            shuffle in any::<u64>(),
            limit in 1..8usize,
            most_bytes in 1..200usize,
            direction in prop_oneof![Just(None), Just(Some(Direction::Ascending)), Just(Some(Direction::Descending))],
        ) {
            let documents: Vec<Document> = values.iter().enumerate().map(|(at, value)| {
                // Of different sizes, so that a small one may fit where a large one did not.
                let padding = "x".repeat(at * 7 % 40);
                document(at, &value.map_or(json!({}), |n| json!({"n": n, "padding": padding})))
            }).collect();
            let n = Field(vec!["n".into()]);
            let mut wanted: Vec<(Option<u8>, usize)> =
                values.iter().copied().enumerate().map(|(at, value)| (value, at)).collect();
            match direction {
                None => {}
                Some(Direction::Ascending) => {
                    wanted.retain(|(value, _)| value.is_some());
                    wanted.sort();
                }
                Some(Direction::Descending) => {
                    wanted.retain(|(value, _)| value.is_some());
                    wanted.sort_by(|a, b| b.cmp(a));
                }
            }
            let mut query = Query {
                governor: Name::escape("g", "id").unwrap(),
                kind: Kind::States,
                filters: Vec::new(),
                order: direction.map(|direction| (n, direction)),
                after: None,
                limit,
            };
            let hashing = std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default();
            let mut found = Vec::new();
            loop {
                let mut come = documents.clone();
                if direction.is_some() {
                    come.sort_by_key(|d| hashing.hash_one((shuffle, d.key.name.as_str())));
                }
                let mut best = Best::new(&query, most_bytes);
                for document in come {
                    best.take(document).unwrap();
                    prop_assert!(best.kept.len() <= limit);
                    if best.is_done() {
                        break;
                    }
                }
                let page = best.finish();
                prop_assert!(found.len() <= documents.len());
                found.extend(page.documents.iter().map(|d| d.key.name.as_str().parse::<usize>().unwrap()));
                match page.next {
                    Some(next) => query.after = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(found, wanted.into_iter().map(|(_, at)| at).collect::<Vec<_>>());
        }
    }
}
