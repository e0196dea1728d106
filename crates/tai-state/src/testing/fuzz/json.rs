//! JSON text to a value, to the one canonical text, and back.

use serde_json::Value;

use super::Input;
use crate::json::{MAX_DEPTH, canonical, measure, parse};

/// Text, or with a first byte of 0 a recipe for a value.
pub(super) fn json(bytes: &[u8]) {
    if let Some((0, recipe)) = bytes.split_first() {
        let value = Input::new(recipe).json(MAX_DEPTH + 10);
        let text = canonical(&value);
        let read = parse(&text, "it").unwrap_or_else(|error| panic!("{text}: {error}"));
        same(&value, &read);
        kept(&value);
        return;
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let lenient = serde_json::from_str::<Value>(text);
    match parse(text, "it") {
        Ok(value) => {
            same(&value, &lenient.expect("what the strict reader takes is JSON"));
            kept(&value);
        }
        Err(error) => assert_eq!(error.code(), "serialization_error", "{error}"),
    }
}

/// That a value and its canonical text are one to one, and that its measure is right.
fn kept(value: &Value) {
    let text = canonical(value);
    same(value, &parse(&text, "it").unwrap_or_else(|error| panic!("{text}: {error}")));
    same(value, &serde_json::from_str(&text).expect("the canonical text is JSON"));
    assert_eq!(canonical(&parse(&value.to_string(), "it").expect("JSON")), text);
    let depth = depth(value);
    match measure(value, "it") {
        Ok(measured) => {
            assert_eq!((measured.text, measured.depth), (text.len() as u64, depth), "{text}");
        }
        Err(error) => assert!(depth > MAX_DEPTH, "{error}: {text}"),
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Equal, and not only by number: `1` is not `1.0`, nor `0.0` `-0.0`.
pub(crate) fn same(a: &Value, b: &Value) {
    let is_same = match (a, b) {
        (Value::Number(a), Value::Number(b)) => match (a.as_f64(), b.as_f64()) {
            (Some(x), Some(y)) if a.is_f64() && b.is_f64() => x.to_bits() == y.to_bits(),
            _ => a == b,
        },
        (Value::Array(a), Value::Array(b)) => {
            a.iter().zip(b).for_each(|(a, b)| same(a, b));
            a.len() == b.len()
        }
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                same(value, b.get(key).unwrap_or_else(|| panic!("the field {key:?} is lost")));
            }
            a.len() == b.len()
        }
        _ => a == b,
    };
    assert!(is_same, "{a} became {b}");
}
