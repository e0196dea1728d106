//! Firestore's queries: ranges of names, and filters over fields.
//!
//! Ranges go over `__name__` in ascending order only: that needs no index beside the primary one, and
//! Firestore refuses the other direction.

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as proto;
use proto::structured_query::composite_filter::Operator as Every;
use proto::structured_query::field_filter::Operator;
use proto::structured_query::filter::FilterType;
use proto::structured_query::{
    CollectionSelector, CompositeFilter, Direction as Way, FieldFilter, FieldReference, Filter,
    Order, unary_filter,
};
use proto::value::ValueType;
use proto::{ArrayValue, Cursor as At, StructuredQuery};

use super::place::Place;
use super::value::{native, to_operand};
use crate::backend::{Direction, Field, Key, Kind, Query, Test};
use serde_json::Value;

const NAME: &str = "__name__";

/// The documents of a collection between two names.
pub(super) fn between(
    collection: String,
    all_descendants: bool,
    start: Option<(String, bool)>,
    end: Option<(String, bool)>,
    limit: Option<usize>,
) -> StructuredQuery {
    // `before` of a start cursor includes the name itself, that of an end cursor excludes it.
    let cursor = |(name, before)| At { values: vec![reference(name)], before };
    StructuredQuery {
        from: vec![CollectionSelector { collection_id: collection, all_descendants }],
        order_by: vec![order(NAME.into(), Direction::Ascending)],
        start_at: start.map(cursor),
        end_at: end.map(cursor),
        limit: limit.map(bounded),
        ..StructuredQuery::default()
    }
}

/// The names alone.
pub(super) fn names_only(query: StructuredQuery) -> StructuredQuery {
    let fields = vec![FieldReference { field_path: NAME.into() }];
    StructuredQuery { select: Some(proto::structured_query::Projection { fields }), ..query }
}

/// A query of the port.
pub(super) fn matching(place: &Place, query: &Query) -> StructuredQuery {
    let mut filters: Vec<Filter> = query.filters.iter().map(filter).collect();
    let only = if filters.len() == 1 { filters.pop() } else { None };
    let all = || {
        let every = CompositeFilter { op: Every::And.into(), filters: filters.clone() };
        Filter { filter_type: Some(FilterType::CompositeFilter(every)) }
    };
    let condition = only.or_else(|| (!filters.is_empty()).then(all));
    let mut order_by = Vec::new();
    let mut direction = Direction::Ascending;
    if let Some((field, way)) = &query.order {
        order_by.push(order(path(field), *way));
        direction = *way;
    }
    order_by.push(order(NAME.into(), direction));
    let start_at = query.after.as_ref().map(|after| {
        let mut values = Vec::new();
        if let (Some((Field(path), _)), Some(value)) = (&query.order, &after.value) {
            values.push(to_operand(path, value));
        }
        values.push(reference(place.document(&after.key)));
        At { values, before: false }
    });
    StructuredQuery {
        from: vec![collection(place, query.kind)],
        r#where: condition,
        order_by,
        start_at,
        limit: Some(bounded(query.limit)),
        ..StructuredQuery::default()
    }
}

/// All documents of a kind in a governor, as they are listened to.
pub(super) fn all(place: &Place, kind: Kind) -> StructuredQuery {
    StructuredQuery { from: vec![collection(place, kind)], ..StructuredQuery::default() }
}

fn collection(place: &Place, kind: Kind) -> CollectionSelector {
    CollectionSelector { collection_id: place.collection(kind), all_descendants: false }
}

fn filter((field, test): &(Field, Test)) -> Filter {
    let is = |value: &Value| to_operand(&field.0, value);
    let (op, value) = match test {
        // Equality with null finds null only by this operator.
        Test::Equal(Value::Null) => {
            return Filter {
                filter_type: Some(FilterType::UnaryFilter(proto::structured_query::UnaryFilter {
                    op: unary_filter::Operator::IsNull.into(),
                    operand_type: Some(unary_filter::OperandType::Field(reference_to(field))),
                })),
            };
        }
        Test::Equal(value) => (Operator::Equal, is(value)),
        Test::Less(value) => (Operator::LessThan, is(value)),
        Test::AtMost(value) => (Operator::LessThanOrEqual, is(value)),
        Test::Greater(value) => (Operator::GreaterThan, is(value)),
        Test::AtLeast(value) => (Operator::GreaterThanOrEqual, is(value)),
        Test::OneOf(values) => {
            let values = values.iter().map(is).collect();
            (Operator::In, native(ValueType::ArrayValue(ArrayValue { values })))
        }
        Test::Contains(value) => (Operator::ArrayContains, to_operand(&[], value)),
    };
    Filter {
        filter_type: Some(FilterType::FieldFilter(FieldFilter {
            field: Some(reference_to(field)),
            op: op.into(),
            value: Some(value),
        })),
    }
}

fn reference_to(field: &Field) -> FieldReference {
    FieldReference { field_path: path(field) }
}

/// A path as Firestore spells it: what is no plain word stands in backticks.
fn path(Field(path): &Field) -> String {
    let segment = |segment: &String| {
        let plain = segment
            .chars()
            .enumerate()
            .all(|(at, c)| c == '_' || c.is_ascii_alphabetic() || (at > 0 && c.is_ascii_digit()));
        if plain {
            return segment.clone();
        }
        format!("`{}`", segment.replace('\\', "\\\\").replace('`', "\\`"))
    };
    path.iter().map(segment).collect::<Vec<_>>().join(".")
}

fn order(field_path: String, direction: Direction) -> Order {
    let way = match direction {
        Direction::Ascending => Way::Ascending,
        Direction::Descending => Way::Descending,
    };
    Order { field: Some(FieldReference { field_path }), direction: way.into() }
}

pub(super) fn reference(name: String) -> proto::Value {
    native(ValueType::ReferenceValue(name))
}

fn bounded(limit: usize) -> i32 {
    i32::try_from(limit).unwrap_or(i32::MAX)
}

/// The value in the field of the order, by which the next page continues.
pub(super) fn ordered_by(query: &Query, body: &str) -> Option<Value> {
    let (Field(path), _) = query.order.as_ref()?;
    let body: Value = serde_json::from_str(body).ok()?;
    path.iter().try_fold(&body, |value, name| value.get(name)).cloned()
}

/// Whether a key may stand in an answer to the query.
pub(super) fn is_of(query: &Query, key: &Key) -> bool {
    key.governor == query.governor && key.kind == query.kind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_by_table() {
        for (segments, wanted) in [
            (vec!["state", "count"], "state.count"),
            (vec!["a.b"], "`a.b`"),
            (vec!["0", "_x1"], "`0`._x1"),
            (vec!["a`b\\c"], "`a\\`b\\\\c`"),
            (vec!["é"], "`é`"),
        ] {
            let field = Field(segments.iter().map(ToString::to_string).collect());
            assert_eq!(path(&field), wanted);
        }
    }
}
