//! Both sides of what Firestore can hold, and its storage-size formula by hand.

use serde_json::json;

use super::*;

fn fields(body: &Value) -> Fields {
    to_fields(&body.to_string(), 0).unwrap()
}

fn is_wrapped(native: &Native) -> bool {
    match &native.value_type {
        Some(ValueType::MapValue(map)) => unwrap(&map.fields).is_some(),
        _ => false,
    }
}

fn is_time_value(native: &Native) -> bool {
    matches!(native.value_type, Some(ValueType::TimestampValue(_)))
}

#[test]
fn a_document_is_as_large_as_firestore_says() {
    let body = json!({
        "a": [1, "x"], "ab": "xyz", "b": true, "d": 1.5, "m": {"k": 1}, "n": 7,
        "timestamp": "2026-01-01T00:00:00Z", "z": null,
    });
    let fields = fields(&body);
    assert!(is_time_value(&fields["timestamp"]));
    let by_hand = 32
        + (2 + 8 + 2)
        + (3 + 4)
        + (2 + 1)
        + (2 + 8)
        + (2 + 32 + 2 + 8)
        + (2 + 8)
        + (10 + 8)
        + (2 + 1);
    assert_eq!(document_bytes(&fields, 10), 10 + by_hand);
    let entries = |value| index_entries(&to_operand(&[], &value));
    assert_eq!((entries(json!(1)), entries(json!([1, 2, 3]))), (2, 5));
    assert_eq!(entries(json!({"a": 1, "b": [1]})), 2 + 2 + 3);
}

#[test]
fn the_largest_document_is_native_and_the_next_is_flat() {
    let of = |bytes: usize| json!({"state": {"t": "x".repeat(bytes)}, "version": 1});
    let most = usize::try_from(MAX_DOCUMENT_BYTES - document_bytes(&fields(&of(0)), 99)).unwrap();
    for (bytes, is_flat) in [(most, false), (most + 1, true)] {
        let fields = to_fields(&of(bytes).to_string(), 99).unwrap();
        assert_eq!(is_wrapped(&fields["state"]), is_flat, "{bytes}");
    }
    let of = |items: usize| json!({"state": vec![1; items], "version": 1});
    // Two for the field, two for the version.
    let most = usize::try_from(MAX_INDEX_ENTRIES).unwrap() - 4;
    for (items, is_flat) in [(most, false), (most + 1, true)] {
        assert_eq!(is_wrapped(&fields(&of(items))["state"]), is_flat, "{items}");
    }
    // What is no array and no object stays as it is.
    let flat =
        encode(serde_json::from_value(json!({"s": "x", "n": 1, "a": [], "o": {}})).unwrap(), true);
    let wrapped: Vec<_> = flat.iter().filter(|(_, value)| is_wrapped(value)).collect();
    assert_eq!(wrapped.into_iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["a", "o"]);
}

#[test]
fn names_of_fields_by_table() {
    for (key, path, can) in [
        ("", 0, false),
        ("__x__", 0, false),
        ("____", 0, false),
        ("___", 0, true),
        ("__", 0, true),
        ("__x", 0, true),
        ("x__", 0, true),
        ("__xy", 0, true),
        ("tai:json", 0, false),
        ("tai:jsonx", 0, true),
        (&"x".repeat(1_199), 0, true),
        (&"x".repeat(1_200), 0, false),
        (&"x".repeat(1_099), 100, true),
        (&"x".repeat(1_100), 100, false),
    ] {
        assert_eq!(can_be_a_field(key, path), can, "{key} {path}");
    }
}

#[test]
fn the_whole_path_to_a_field_counts() {
    // 5 for "value", 1 and 600, 1 and the rest.
    for (rest, is_whole) in [(593, true), (594, false)] {
        let inner = json!({ "b".repeat(rest): 1 });
        let fields = fields(&json!({"value": {"a".repeat(600): inner}}));
        let Some(ValueType::MapValue(outer)) = &fields["value"].value_type else { panic!() };
        assert_eq!(is_wrapped(&outer.fields[&"a".repeat(600)]), !is_whole, "{rest}");
    }
    // Items of an array have no names of their own.
    for (rest, is_whole) in [(1_194, true), (1_195, false)] {
        let fields = fields(&json!({"value": [{ "b".repeat(rest): 1 }]}));
        let Some(ValueType::ArrayValue(array)) = &fields["value"].value_type else { panic!() };
        assert_eq!(is_wrapped(&array.values[0]), !is_whole, "{rest}");
    }
}

#[test]
fn only_what_is_a_time_is_one() {
    let text = json!("2026-01-01T00:00:00Z");
    let fields = fields(&json!({"timestamp": text, "n": text, "state": {"timestamp": text}}));
    assert!(is_time_value(&fields["timestamp"]) && !is_time_value(&fields["n"]));
    let path = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert!(is_time_value(&to_operand(&path(&["timestamp"]), &text)));
    for other in [&["n"][..], &["state", "timestamp"], &[]] {
        assert_eq!(
            to_operand(&path(other), &text).value_type,
            Some(ValueType::StringValue("2026-01-01T00:00:00Z".into()))
        );
    }
    let number = |value| to_operand(&path(&["timestamp"]), &value);
    assert_eq!(number(json!(i64::MAX)).value_type, Some(ValueType::IntegerValue(i64::MAX)));
    assert!(is_wrapped(&number(json!(u64::MAX))));
}

/// Only a map of one text is a wrapped value.
#[test]
fn what_only_looks_wrapped_is_read_as_it_is() {
    let text = || native(ValueType::StringValue("[1]".into()));
    let two = Fields::from([(WRAPPED.to_owned(), text()), ("x".to_owned(), text())]);
    let number = Fields::from([(WRAPPED.to_owned(), native(ValueType::IntegerValue(1)))]);
    for (map, read) in
        [(two, json!({"tai:json": "[1]", "x": "[1]"})), (number, json!({"tai:json": 1}))]
    {
        let value = native(ValueType::MapValue(MapValue { fields: map }));
        let body = to_text(Fields::from([("a".to_owned(), value)])).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), json!({ "a": read }));
    }
}
