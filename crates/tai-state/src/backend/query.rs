//! Queries of the port: documents of one kind chosen by what their bodies say.

use serde_json::Value;

use super::{BackendError, Document, Key, Kind, Name};

/// A path to a field of a body: the names of the objects on the way, then the field's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field(pub Vec<String>);

/// What a field must hold for its document to match.
///
/// A test compares with values of its own JSON type only: booleans, numbers by their value (`1` is
/// `1.0`), strings by their UTF-8 bytes; `null` only with [`Equal`](Test::Equal). A document without the field never matches. Integers beyond 64 signed
/// bits, arrays directly within arrays and what stands within objects that Firestore cannot hold as
/// they are match nothing on Firestore; elsewhere that is not promised.
#[derive(Debug, Clone, PartialEq)]
pub enum Test {
    /// It is this.
    Equal(Value),
    /// It is less.
    Less(Value),
    /// It is less or this.
    AtMost(Value),
    /// It is greater.
    Greater(Value),
    /// It is greater or this.
    AtLeast(Value),
    /// It is one of these, at most 30.
    OneOf(Vec<Value>),
    /// It is an array that holds this.
    Contains(Value),
}

/// Which way an order goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The smallest first.
    Ascending,
    /// The greatest first.
    Descending,
}

/// Documents of one kind within one governor, chosen by what their bodies say.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// The governor.
    pub governor: Name,
    /// The kind, versioned or not.
    pub kind: Kind,
    /// What must hold, all of it.
    pub filters: Vec<(Field, Test)>,
    /// By which field, and then by key in the same direction; without it by key, ascending (of a
    /// versioned kind, the order between different names is not promised). Only
    /// documents that have the field are found. Booleans come before numbers before strings;
    /// whether and where those come whose field holds anything else is not promised. When there is
    /// a filter that is no equality, it must be on this field.
    pub order: Option<(Field, Direction)>,
    /// Continue after this one.
    pub after: Option<Cursor>,
    /// How many at most in one page. A backend may give fewer.
    pub limit: usize,
}

/// Where a page of a query ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Cursor {
    /// The key of its last document.
    pub key: Key,
    /// What that document has in the field of the order.
    pub value: Option<Value>,
}

/// A page of a query.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The documents in the order asked for.
    pub documents: Vec<Document>,
    /// Continue after this one; `None` when there is nothing more.
    pub next: Option<Cursor>,
}

/// Refuses a query that no backend can answer: a limit of 0, an empty path, a value that is no
/// scalar, `null` for anything but equality, a choice among no or more than 30 values (several
/// choices multiply), more than one [`Contains`](Test::Contains), a range on another field than that
/// of the order, or a cursor of another query.
///
/// # Errors
/// [`BackendError::Invalid`] that says which of them.
pub fn refuse_query(query: &Query) -> Result<(), BackendError> {
    let refuse = |reason: &str| Err(BackendError::Invalid(format!("a query with {reason}")));
    let fields = query.filters.iter().map(|(field, _)| field);
    let mut fields = fields.chain(query.order.iter().map(|(field, _)| field));
    if query.limit == 0 {
        return refuse("a limit of 0");
    }
    if fields.any(|Field(path)| path.is_empty() || path.iter().any(String::is_empty)) {
        return refuse("an empty path to a field");
    }
    let (mut choices, mut contains) = (1usize, 0);
    for (field, test) in &query.filters {
        let mut is_range = false;
        let values = match test {
            Test::Equal(value) => std::slice::from_ref(value),
            Test::OneOf(values) => {
                choices = choices.saturating_mul(values.len());
                values
            }
            Test::Contains(value) => {
                contains += 1;
                std::slice::from_ref(value)
            }
            Test::Less(value)
            | Test::AtMost(value)
            | Test::Greater(value)
            | Test::AtLeast(value) => {
                is_range = true;
                std::slice::from_ref(value)
            }
        };
        if values.iter().any(|value| value.is_array() || value.is_object()) {
            return refuse("a value that is an array or an object");
        }
        // Firestore passes over such a null in silence.
        if !matches!(test, Test::Equal(_)) && values.iter().any(Value::is_null) {
            return refuse("null for anything but equality");
        }
        if is_range && query.order.as_ref().is_none_or(|(by, _)| by != field) {
            return refuse("a range on a field that is not the one of the order");
        }
    }
    if choices == 0 || choices > 30 {
        return refuse("no or more than 30 values to choose from");
    }
    if contains > 1 {
        return refuse("more than one value that must be contained");
    }
    let is_another_s = |cursor: &Cursor| {
        cursor.key.governor != query.governor
            || cursor.key.kind != query.kind
            || cursor.value.is_some() != query.order.is_some()
    };
    if query.after.as_ref().is_some_and(is_another_s) {
        return refuse("a cursor of another query");
    }
    Ok(())
}
