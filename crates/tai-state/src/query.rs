//! States chosen by what their data say: filters, an order, page by page.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::backend::{Cursor, Direction, Kind, Query, Test};
use crate::error::{Error, Result};
use crate::id::StateId;
use crate::keys::{Address, Name};
use crate::schema;
use crate::store::{StateRecord, StateStore};

/// Which field of a state's data: the names of the objects on the way, then the field's own.
///
/// A text is divided at its dots: `"order.total"` is the field `total` of the field `order`. For
/// names that may have dots of their own there is [`FieldPath::of`]. No names at all mean the data
/// as a whole.
///
/// ```
/// use tai_state::FieldPath;
/// assert_eq!(FieldPath::from("order.total"), FieldPath::of(["order", "total"]));
/// assert_ne!(FieldPath::from("v1.0"), FieldPath::of(["v1.0"]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FieldPath(Vec<String>);

impl FieldPath {
    /// A path of names as they are, dots included.
    pub fn of<I: IntoIterator<Item = impl Into<String>>>(names: I) -> Self {
        Self(names.into_iter().map(Into::into).collect())
    }
}

impl From<&str> for FieldPath {
    fn from(path: &str) -> Self {
        Self::of(path.split('.'))
    }
}

impl From<String> for FieldPath {
    fn from(path: String) -> Self {
        path.as_str().into()
    }
}

/// How a field is compared with the value of a filter.
///
/// Only values of the value's own JSON type are met: `Op::Less` than 5 finds no texts. Numbers are
/// compared by value (`1` is `1.0`), texts by their UTF-8 bytes. `null` can only be tested by
/// [`Equal`](Op::Equal); arrays and objects cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// It is the value.
    Equal,
    /// It is less.
    Less,
    /// It is less or the value.
    AtMost,
    /// It is greater.
    Greater,
    /// It is greater or the value.
    AtLeast,
    /// It is one of the values, which are given as an array; all such filters of a query together
    /// make at most 30 combinations.
    OneOf,
    /// It is an array that holds the value; once in a query.
    Contains,
}

/// Which states of a governor, in which order, and how many.
///
/// Without an order states come by their ids; with one, only states that have the field are found,
/// and equal ones come by their ids in the same direction. A range (`Less` … `AtLeast`) orders by its
/// own field unless an order on that field is given; no other is possible beside it. Deleted states
/// are never found.
///
/// On an embedded file and in memory a query reads every state of its governor. Firestore uses
/// indexes: one field needs none beside those that are always there, a filter with an order on
/// another field, or two orders, need one of their own, else the query is
/// [`Error::MissingIndex`](crate::Error::MissingIndex).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> tai_state::Result<()> {
/// use serde_json::json;
/// use tai_state::{ChangeMetadata, Direction, Op, StateQuery, StateSnapshot, StateStore};
///
/// let store = StateStore::in_memory();
/// for (id, status, total) in [("o1", "open", 30), ("o2", "paid", 20), ("o3", "open", 99)] {
///     let why = ChangeMetadata::new("docs", "example", None);
///     let order = StateSnapshot::new(id.into(), json!({"status": status, "total": total}), why.clone());
///     store.save_state("orders", id, order, why).await?;
/// }
///
/// let open = StateQuery::new()
///     .filter("status", Op::Equal, "open")
///     .order_by("total", Direction::Descending)
///     .limit(10);
/// let page = store.query_states("orders", &open).await?;
/// let ids: Vec<&str> = page.states.iter().map(|found| found.snapshot.id.as_str()).collect();
/// assert_eq!(ids, ["o3", "o1"]);
/// assert!(page.next.is_none());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct StateQuery {
    filters: Vec<(FieldPath, Op, Value)>,
    order: Option<(FieldPath, Direction)>,
    after: Option<QueryCursor>,
    limit: usize,
}

impl Default for StateQuery {
    fn default() -> Self {
        Self { filters: Vec::new(), order: None, after: None, limit: 100 }
    }
}

impl StateQuery {
    /// All states, 100 on a page.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only states of which this holds too.
    #[must_use]
    pub fn filter(mut self, field: impl Into<FieldPath>, op: Op, value: impl Into<Value>) -> Self {
        self.filters.push((field.into(), op, value.into()));
        self
    }

    /// Orders by a field.
    #[must_use]
    pub fn order_by(mut self, field: impl Into<FieldPath>, direction: Direction) -> Self {
        self.order = Some((field.into(), direction));
        self
    }

    /// How many at most on one page; at least 1.
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Continues where a page of the same query ended.
    #[must_use]
    pub fn after(mut self, cursor: QueryCursor) -> Self {
        self.after = Some(cursor);
        self
    }

    fn over(&self, governor: &Name) -> Result<Query> {
        let refuse = |reason: &str| Err(Error::refused(format!("the query of {governor}"), reason));
        let mut filters = Vec::with_capacity(self.filters.len());
        let mut order = self
            .order
            .as_ref()
            .map(|(FieldPath(path), direction)| (schema::data_field(path), *direction));
        for (FieldPath(path), op, value) in &self.filters {
            let field = schema::data_field(path);
            let value = value.clone();
            let test = match op {
                Op::Equal => Test::Equal(value),
                Op::Contains => Test::Contains(value),
                Op::OneOf => match value {
                    Value::Array(values) => Test::OneOf(values),
                    _ => return refuse("one of what must be an array of values"),
                },
                Op::Less => Test::Less(value),
                Op::AtMost => Test::AtMost(value),
                Op::Greater => Test::Greater(value),
                Op::AtLeast => Test::AtLeast(value),
            };
            if matches!(op, Op::Less | Op::AtMost | Op::Greater | Op::AtLeast) {
                order.get_or_insert_with(|| (field.clone(), Direction::Ascending));
            }
            filters.push((field, test));
        }
        let after = match &self.after {
            None => None,
            Some(cursor) => {
                let state = Name::escape(cursor.state.as_str(), "state id")?;
                let address = Address { governor: governor.clone(), state };
                Some(Cursor { key: address.head(), value: cursor.value.clone() })
            }
        };
        let (governor, kind, limit) = (governor.clone(), Kind::States, self.limit);
        Ok(Query { governor, kind, filters, order, after, limit })
    }
}

/// Where a page of a query ended: good for the same query only. It can be kept as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryCursor {
    state: StateId,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "present")]
    value: Option<Value>,
}

/// An order's value of `null` is a value too.
mod present {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::Value;

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Value>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Value>, D::Error> {
        Value::deserialize(deserializer).map(Some)
    }
}

/// A page of what a query finds.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct QueryPage {
    /// The states in the order asked for. There may be fewer than the limit even when there are more
    /// to come.
    pub states: Vec<StateRecord>,
    /// Continue after this; `None` when there is nothing more.
    pub next: Option<QueryCursor>,
}

impl StateStore {
    /// A page of the states of a governor that a query finds. One page is one consistent cut.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a query that no backend can answer: a limit of 0, an empty name in
    /// a path, a value that cannot be compared, a range beside an order on another field, too many
    /// values to choose from, a cursor of another query. [`Error::MissingIndex`] on Firestore.
    pub async fn query_states(
        &self,
        governor: impl AsRef<str>,
        query: &StateQuery,
    ) -> Result<QueryPage> {
        let governor = Name::escape(governor.as_ref(), "governor id")?;
        let query = query.over(&governor)?;
        let (heads, next) = self.records.reader().query(&query).await?;
        // Left out here and not by a filter, which would ask Firestore for one more index. The data of
        // a deleted state are `null`, so few queries find one.
        let alive = heads.iter().filter(|known| !known.head.change.deleted);
        let states = alive.map(|known| StateRecord::of(&known.head)).collect();
        let next = next.map(|cursor| QueryCursor {
            state: StateId::new(cursor.key.name.id()),
            value: cursor.value,
        });
        Ok(QueryPage { states, next })
    }

    /// How many states of a governor there are, deleted ones left out. Reads every head.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an impossible id, or what reading meets.
    pub async fn count_states(&self, governor: impl AsRef<str>) -> Result<u64> {
        let mut walk = self.walk(Some(governor.as_ref()))?;
        let mut count = 0;
        while let Some(page) = walk.next_page().await? {
            count += page.iter().filter(|(_, known)| !known.head.change.deleted).count() as u64;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A page may end at a state whose field holds `null`, which is not the same as no order.
    #[test]
    fn a_cursor_comes_back_from_json() {
        for value in [None, Some(Value::Null), Some(json!(1.0)), Some(json!("x"))] {
            let cursor = QueryCursor { state: "s/1".into(), value };
            let kept = serde_json::to_string(&cursor).unwrap();
            assert_eq!(serde_json::from_str::<QueryCursor>(&kept).unwrap(), cursor, "{kept}");
        }
        assert!(serde_json::from_str::<QueryCursor>(r#"{"state":"s","other":1}"#).is_err());
    }
}
