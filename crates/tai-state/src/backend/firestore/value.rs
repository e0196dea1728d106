//! JSON bodies to Firestore's native fields and back, total both ways.
//!
//! What Firestore can hold natively is held natively, so that its console, its queries and other
//! clients see ordinary fields. What it cannot is *wrapped*: a map with the one field `tai:json` whose
//! value is the JSON text. These are wrapped, each as small as possible:
//!
//! - an array directly within an array; an integer beyond a signed 64-bit one;
//! - an object with a field name that is empty, reserved (`__…__`), too long, or `tai:json` itself;
//! - what is nested deeper than Firestore takes;
//! - and every array and object at the top of a document that would otherwise be larger than a
//!   document may be, or have more index entries.
//!
//! Times stand at the top of a body as text; they are kept as native timestamps where that gives the
//! same text back. The limits are Firestore's own:
//! <https://firebase.google.com/docs/firestore/quotas>, and its storage-size page for the formula.

use std::collections::BTreeMap;

use chrono::{DateTime, Datelike, Utc};
use googleapis_tonic_google_firestore_v1::google::firestore::v1::value::ValueType;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::{
    ArrayValue, MapValue, Value as Native,
};
use prost_types::Timestamp;
use serde_json::{Map, Number, Value};

use crate::chain::format_time;
use crate::schema::is_time;

/// The one field of a wrapped value.
pub(super) const WRAPPED: &str = "tai:json";
/// Maps and arrays within one another that a field may hold.
const MAX_LEVELS: usize = 20;
/// Bytes of the path to a field. Firestore takes 1,500, and how it counts quotes is not documented.
const MAX_PATH_BYTES: usize = 1_200;
/// Bytes of a document: "1 MiB − 4 bytes" by the API's own description.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 1_048_572;
/// Index entries of a document; Firestore takes 40,000.
const MAX_INDEX_ENTRIES: u64 = 30_000;
/// What Firestore counts for a document, and maybe for each map, beside its fields.
const MAP_BYTES: u64 = 32;

pub(super) type Fields = BTreeMap<String, Native>;

/// The fields for the text of a body; `name_bytes` is what the document's name takes of its limit.
///
/// # Errors
/// What `serde_json` says when the text is no JSON object.
pub(super) fn to_fields(text: &str, name_bytes: u64) -> Result<Fields, serde_json::Error> {
    let parse = || serde_json::from_str::<Map<String, Value>>(text);
    let body = parse()?;
    if !body.iter().all(|(key, _)| can_be_a_field(key, 0)) {
        return Ok(wrap(text.to_owned()));
    }
    let fields = encode(body, false);
    if document_bytes(&fields, name_bytes) <= MAX_DOCUMENT_BYTES
        && fields.values().map(index_entries).sum::<u64>() <= MAX_INDEX_ENTRIES
    {
        return Ok(fields);
    }
    Ok(encode(parse()?, true))
}

/// All fields of a body; `flat` wraps every array and object.
fn encode(body: Map<String, Value>, flat: bool) -> Fields {
    let field = |(key, value): (String, Value)| {
        let native = match &value {
            Value::String(text) if is_time(&key) => native_time(text),
            Value::Array(_) | Value::Object(_) if flat => Some(wrapped(&value)),
            _ => None,
        };
        let native = native.unwrap_or_else(|| to_native(value, 1, key.len(), false));
        (key, native)
    };
    body.into_iter().map(field).collect()
}

/// The text of the body that a document's fields are.
///
/// # Errors
/// Naming the field that no store of this crate would have written.
pub(super) fn to_text(fields: Fields) -> Result<String, String> {
    if let Some(text) = unwrap(&fields) {
        // Checked to be JSON here, so that a body is always JSON.
        serde_json::from_str::<Map<String, Value>>(text).map_err(|error| error.to_string())?;
        return Ok(text.to_owned());
    }
    let mut body = Map::new();
    for (key, native) in fields {
        let value = match native.value_type {
            Some(ValueType::TimestampValue(time)) => time_text(&time).map(Value::String),
            other => to_json(other),
        };
        let value = value.map_err(|reason| format!("the field {key}: {reason}"))?;
        body.insert(key, value);
    }
    serde_json::to_string(&body).map_err(|error| error.to_string())
}

/// The native value that a query compares with, for a field at this path.
pub(super) fn to_operand(path: &[String], value: &Value) -> Native {
    let time = match (path, value) {
        ([field], Value::String(text)) if is_time(field) => native_time(text),
        _ => None,
    };
    time.unwrap_or_else(|| to_native(value.clone(), 1, 0, false))
}

pub(super) fn native(value_type: ValueType) -> Native {
    Native { value_type: Some(value_type) }
}

/// `level` is the one that an array or object here would have.
fn to_native(value: Value, level: usize, path: usize, in_array: bool) -> Native {
    native(match value {
        Value::Null => ValueType::NullValue(0),
        Value::Bool(value) => ValueType::BooleanValue(value),
        Value::String(text) => ValueType::StringValue(text),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => ValueType::IntegerValue(integer),
            (None, Some(double)) if number.is_f64() => ValueType::DoubleValue(double),
            _ => return wrapped(&Value::Number(number)),
        },
        // A wrapped value is a map itself: the last level is left to it.
        Value::Array(_) | Value::Object(_) if level >= MAX_LEVELS => return wrapped(&value),
        Value::Array(_) if in_array => return wrapped(&value),
        Value::Array(items) => {
            let item = |item| to_native(item, level + 1, path, true);
            ValueType::ArrayValue(ArrayValue { values: items.into_iter().map(item).collect() })
        }
        Value::Object(fields) => {
            if !fields.keys().all(|key| can_be_a_field(key, path)) {
                return wrapped(&Value::Object(fields));
            }
            let field = |(key, value): (String, Value)| {
                let native = to_native(value, level + 1, path + 1 + key.len(), false);
                (key, native)
            };
            ValueType::MapValue(MapValue { fields: fields.into_iter().map(field).collect() })
        }
    })
}

fn to_json(value: Option<ValueType>) -> Result<Value, String> {
    Ok(match value {
        Some(ValueType::NullValue(_)) => Value::Null,
        Some(ValueType::BooleanValue(value)) => Value::Bool(value),
        Some(ValueType::IntegerValue(value)) => Value::from(value),
        Some(ValueType::DoubleValue(value)) => Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| format!("the number {value} has no form in JSON"))?,
        Some(ValueType::StringValue(text)) => Value::String(text),
        Some(ValueType::ArrayValue(array)) => {
            let items = array.values.into_iter().map(|item| to_json(item.value_type));
            Value::Array(items.collect::<Result<_, _>>()?)
        }
        Some(ValueType::MapValue(MapValue { fields })) => match unwrap(&fields) {
            Some(text) => serde_json::from_str(text)
                .map_err(|error| format!("its wrapped value is not JSON: {error}"))?,
            None => {
                let field = |(key, item): (String, Native)| {
                    to_json(item.value_type).map(|value| (key, value))
                };
                Value::Object(fields.into_iter().map(field).collect::<Result<_, String>>()?)
            }
        },
        _ => return Err("it has a type that JSON does not have".into()),
    })
}

fn wrap(text: String) -> Fields {
    Fields::from([(WRAPPED.to_owned(), native(ValueType::StringValue(text)))])
}

fn wrapped(value: &Value) -> Native {
    native(ValueType::MapValue(MapValue { fields: wrap(value.to_string()) }))
}

fn unwrap(fields: &Fields) -> Option<&str> {
    match (fields.len(), fields.get(WRAPPED)?.value_type.as_ref()?) {
        (1, ValueType::StringValue(text)) => Some(text),
        _ => None,
    }
}

/// Whether a field may have this name below a path of so many bytes.
fn can_be_a_field(key: &str, path: usize) -> bool {
    let reserved = key.len() >= 4 && key.starts_with("__") && key.ends_with("__");
    !key.is_empty() && !reserved && key != WRAPPED && path + 1 + key.len() <= MAX_PATH_BYTES
}

fn native_time(text: &str) -> Option<Native> {
    let time = DateTime::parse_from_rfc3339(text).ok()?.with_timezone(&Utc);
    let exact = (1..=9999).contains(&time.year())
        && time.timestamp_subsec_nanos().is_multiple_of(1_000)
        && time.timestamp_subsec_nanos() < 1_000_000_000
        && format_time(&time) == text;
    let nanos = i32::try_from(time.timestamp_subsec_nanos()).ok()?;
    let seconds = time.timestamp();
    exact.then(|| native(ValueType::TimestampValue(Timestamp { seconds, nanos })))
}

fn time_text(time: &Timestamp) -> Result<String, String> {
    u32::try_from(time.nanos)
        .ok()
        .and_then(|nanos| DateTime::from_timestamp(time.seconds, nanos))
        .map(|time| format_time(&time))
        .ok_or_else(|| "its time is out of range".into())
}

/// What Firestore counts for a document.
pub(super) fn document_bytes(fields: &Fields, name_bytes: u64) -> u64 {
    name_bytes + map_bytes(fields)
}

fn map_bytes(fields: &Fields) -> u64 {
    let fields = fields.iter().map(|(key, value)| key.len() as u64 + 1 + value_bytes(value));
    MAP_BYTES + fields.sum::<u64>()
}

fn value_bytes(value: &Native) -> u64 {
    match &value.value_type {
        Some(ValueType::StringValue(text)) => text.len() as u64 + 1,
        Some(
            ValueType::IntegerValue(_) | ValueType::DoubleValue(_) | ValueType::TimestampValue(_),
        ) => 8,
        Some(ValueType::ArrayValue(array)) => array.values.iter().map(value_bytes).sum(),
        Some(ValueType::MapValue(map)) => map_bytes(&map.fields),
        _ => 1,
    }
}

/// What a value costs where every field is indexed: two entries a field, a map's own among them, and
/// one for each item of an array
/// (<https://firebase.google.com/docs/firestore/query-data/index-overview>).
fn index_entries(value: &Native) -> u64 {
    match &value.value_type {
        Some(ValueType::MapValue(map)) => 2 + map.fields.values().map(index_entries).sum::<u64>(),
        Some(ValueType::ArrayValue(array)) => 2 + array.values.len() as u64,
        _ => 2,
    }
}

#[cfg(test)]
mod edges;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::arbitrary_json;
    use proptest::prelude::*;
    use serde_json::json;

    fn there_and_back(body: &Value) -> Value {
        let fields = to_fields(&body.to_string(), 100).unwrap();
        assert!(check(&fields, 0).is_ok(), "{body}: {:?}", check(&fields, 0));
        serde_json::from_str(&to_text(fields).unwrap()).unwrap()
    }

    /// What Firestore refuses.
    fn check(fields: &Fields, level: usize) -> Result<(), String> {
        if level > MAX_LEVELS {
            return Err("too deep".into());
        }
        fields.iter().try_for_each(|(key, value)| {
            if key.is_empty()
                || key.len() > 1500
                || (key.starts_with("__") && key.ends_with("__") && key.len() >= 4)
            {
                return Err(format!("the name {key:?}"));
            }
            check_value(value, level)
        })
    }

    fn check_value(value: &Native, level: usize) -> Result<(), String> {
        match value.value_type.as_ref().unwrap() {
            ValueType::MapValue(map) => check(&map.fields, level + 1),
            ValueType::ArrayValue(array) => array.values.iter().try_for_each(|item| {
                if matches!(item.value_type, Some(ValueType::ArrayValue(_))) {
                    return Err("an array in an array".into());
                }
                if level + 1 > MAX_LEVELS {
                    return Err("too deep".into());
                }
                check_value(item, level + 1)
            }),
            _ => Ok(()),
        }
    }

    fn nest(levels: usize, array: bool) -> Value {
        (0..levels).fold(json!(1), |inner, n| {
            if array && n % 2 == 0 { json!([inner]) } else { json!({"a": inner}) }
        })
    }

    #[test]
    fn what_firestore_cannot_hold_comes_back() {
        for value in [
            json!([[1, 2], [], [[3]], {"a": [[4]]}]),
            json!(u64::MAX),
            json!([u64::MAX, i64::MIN, -0.0, 1.0, 1, 5e-324]),
            json!({"": 1, "a": {"__x__": 2, "____": 3, "___": 4, "__": 5}}),
            json!({"tai:json": "[1]"}),
            json!({"a": {"tai:json": {"tai:json": "1"}}}),
            json!({"x".repeat(1_501): 1, "a": {"y".repeat(1_190): {"z".repeat(20): 1}}}),
            json!("2026-01-01T00:00:00Z"),
            nest(19, false),
            nest(20, false),
            nest(21, true),
            nest(100, true),
            nest(100, false),
            json!({"nul\0": "\0", "é": "\u{10ffff}", "a.b": 1, "`": 2}),
        ] {
            let body = json!({"value": value, "n": 1});
            assert_eq!(there_and_back(&body), body);
            if value.is_object() {
                assert_eq!(there_and_back(&value), value);
            }
        }
    }

    #[test]
    fn what_firestore_can_hold_is_native() {
        let body = json!({"a": {"b": [1, {"c": 2.5}], "d": null}, "s": "x"});
        let text = format!("{:?}", to_fields(&body.to_string(), 0).unwrap());
        assert!(!text.contains(WRAPPED), "{text}");
        let deep = json!({"v": nest(MAX_LEVELS - 1, false)});
        let text = format!("{:?}", to_fields(&deep.to_string(), 0).unwrap());
        assert!(!text.contains(WRAPPED), "{text}");
    }

    #[test]
    fn times_are_native_where_that_is_exact() {
        let native = |text: &str| {
            let fields = to_fields(&json!({"timestamp": text, "n": text}).to_string(), 0).unwrap();
            assert_eq!(
                to_text(fields.clone()).unwrap(),
                json!({"timestamp": text, "n": text}).to_string()
            );
            matches!(fields["timestamp"].value_type, Some(ValueType::TimestampValue(_)))
        };
        for exact in
            ["2026-01-01T00:00:00Z", "0001-01-01T00:00:00.000001Z", "9999-12-31T23:59:59.999999Z"]
        {
            assert!(native(exact), "{exact}");
        }
        for other in [
            "",
            "x",
            "2026-01-01T00:00:00+00:00",
            "2026-01-01T00:00:00.1Z",
            "2026-01-01T00:00:00.000000001Z",
            "2016-12-31T23:59:60Z",
            "+10000-01-01T00:00:00Z",
            "0000-01-01T00:00:00Z",
        ] {
            assert!(!native(other), "{other}");
        }
    }

    #[test]
    fn a_large_document_is_flattened_until_it_fits() {
        // Small in text, large in fields: each inner array would be a map of its own.
        let arrays = Value::Array(vec![json!([]); 300_000]);
        let numbers = Value::Array(vec![json!(1); 200_000]);
        let fields: Map<String, Value> = (0..20_000).map(|n| (n.to_string(), json!(n))).collect();
        for value in [arrays, numbers, Value::Object(fields)] {
            let body = json!({"state": value, "version": 1});
            let fields = to_fields(&body.to_string(), 1_000).unwrap();
            assert!(document_bytes(&fields, 1_000) <= MAX_DOCUMENT_BYTES);
            assert!(fields.values().map(index_entries).sum::<u64>() <= MAX_INDEX_ENTRIES);
            assert!(matches!(fields["version"].value_type, Some(ValueType::IntegerValue(1))));
            assert_eq!(serde_json::from_str::<Value>(&to_text(fields).unwrap()).unwrap(), body);
        }
    }

    #[test]
    fn what_is_not_ours_is_named() {
        let foreign = [
            native(ValueType::BytesValue(vec![1].into())),
            native(ValueType::DoubleValue(f64::NAN)),
            native(ValueType::ReferenceValue("x".into())),
            native(ValueType::MapValue(MapValue { fields: wrap("{".into()) })),
            native(ValueType::TimestampValue(Timestamp { seconds: i64::MAX, nanos: -1 })),
            Native { value_type: None },
        ];
        for value in foreign {
            let error = to_text(Fields::from([("odd".to_owned(), value)])).unwrap_err();
            assert!(error.contains("the field odd"), "{error}");
        }
        assert!(to_text(wrap("[1]".into())).is_err());
    }

    proptest! {
        #[test]
        fn any_body_comes_back(value in arbitrary_json()) {
            let body = json!({"state": value, "timestamp": "2026-01-01T00:00:00Z"});
            prop_assert_eq!(there_and_back(&body), body);
            if value.is_object() {
                prop_assert_eq!(there_and_back(&value), value);
            }
        }
    }
}
