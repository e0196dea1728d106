//! JSON as this crate keeps it: one canonical text for a value, a reader that loses nothing
//! silently, and a measure of what a value costs.
//!
//! **Canonical text**: no white space; the keys of an object in the order of their UTF-8 bytes;
//! strings with the escapes that JSON demands and no others (`\"`, `\\`, `\b`, `\t`, `\n`, `\f`,
//! `\r`, `\u00xx` in lower case for the other control characters); integers in decimal; doubles with
//! the fewest digits that read back as the same double: from 1e-5 up to 1e16 as a plain decimal with
//! a point (`0.1`, `1.0`), else with an exponent (`1e-7`, `1.5e300`). Equal values have equal texts, and different values different ones.

use std::fmt;
use std::io::{self, Write};
use std::sync::OnceLock;

use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// The deepest nesting of arrays and objects that a value may have.
pub const MAX_DEPTH: usize = 100;

/// The canonical text of `value`. The nesting must have been checked before (it is, for all that
/// went through [`measure`] or came out of the store): this writer recurses.
#[must_use]
pub fn canonical(value: &Value) -> String {
    let mut text = Vec::with_capacity(128);
    // Writing to memory does not fail, and what serde_json writes is UTF-8.
    let _ = write_canonical(value, &mut text);
    String::from_utf8(text).unwrap_or_default()
}

pub(crate) fn write_canonical(value: &Value, out: &mut impl Write) -> io::Result<()> {
    match value {
        Value::Null => out.write_all(b"null"),
        Value::Bool(true) => out.write_all(b"true"),
        Value::Bool(false) => out.write_all(b"false"),
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(double) => write_double(double, out),
            None => write!(out, "{number}"),
        },
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.write_all(b"[")?;
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.write_all(b",")?;
                }
                write_canonical(item, out)?;
            }
            out.write_all(b"]")
        }
        Value::Object(fields) => {
            // A map that keeps insertion order (a feature of serde_json that any crate in the
            // build may switch on) must not change the text.
            let mut sorted: Vec<_> = fields.iter().collect();
            sorted.sort_unstable_by(|(a, _), (b, _)| a.as_bytes().cmp(b.as_bytes()));
            out.write_all(b"{")?;
            for (index, (key, item)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    out.write_all(b",")?;
                }
                write_string(key, out)?;
                out.write_all(b":")?;
                write_canonical(item, out)?;
            }
            out.write_all(b"}")
        }
    }
}

/// A double in its canonical form. Written here and not left to a library, whose next version may
/// prefer another spelling: hashes depend on it. The digits are the shortest that read back as the
/// same double, which is a property of the number and not of who prints it.
fn write_double(double: f64, out: &mut impl Write) -> io::Result<()> {
    let scientific = format!("{double:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().map_err(io::Error::other)?;
    if !(-5..16).contains(&exponent) {
        return write!(out, "{mantissa}e{exponent}");
    }
    let (sign, mantissa) = match mantissa.strip_prefix('-') {
        Some(positive) => ("-", positive),
        None => ("", mantissa),
    };
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    let point = usize::try_from(exponent + 1).unwrap_or(0);
    if exponent < 0 {
        let zeros = "0".repeat(exponent.unsigned_abs() as usize - 1);
        return write!(out, "{sign}0.{zeros}{digits}");
    }
    match digits.split_at_checked(point) {
        Some((whole, "")) => write!(out, "{sign}{whole}.0"),
        Some((whole, part)) => write!(out, "{sign}{whole}.{part}"),
        None => write!(out, "{sign}{digits}{}.0", "0".repeat(point - digits.len())),
    }
}

pub(crate) fn write_string(text: &str, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer(out, text).map_err(io::Error::other)
}

/// What a value costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// Nested arrays and objects: 0 for a scalar, 1 for `[]`.
    pub depth: usize,
    /// Bytes of the canonical text.
    pub text: u64,
    /// Bytes of the value as Firestore counts its native fields
    /// (<https://firebase.google.com/docs/firestore/storage-size>), nested maps with 32 each.
    pub native: u64,
}

/// Measures `value` without recursion into what is too deep.
///
/// # Errors
/// [`Error::InvalidState`] naming `subject` when it is nested deeper than [`MAX_DEPTH`].
pub fn measure(value: &Value, subject: &str) -> Result<Measure> {
    let mut deepest = 0;
    let mut native = 0u64;
    let mut waiting = vec![(value, 0usize)];
    while let Some((value, depth)) = waiting.pop() {
        let inner = depth + 1;
        match value {
            Value::Null | Value::Bool(_) => native += 1,
            Value::Number(number) if is_kept(number) => native += 8,
            Value::Number(number) => {
                let digits = number.to_string().len();
                let reason = format!("a number of {digits} characters fits no 64 bits");
                return Err(Error::refused(subject, reason));
            }
            Value::String(text) => native += text.len() as u64 + 1,
            Value::Array(items) => {
                deepest = deepest.max(inner);
                waiting.extend(items.iter().map(|item| (item, inner)));
            }
            Value::Object(fields) => {
                deepest = deepest.max(inner);
                native += 32;
                for (key, item) in fields {
                    native += key.len() as u64 + 1;
                    waiting.push((item, inner));
                }
            }
        }
        if deepest > MAX_DEPTH {
            return Err(too_deep(subject));
        }
    }
    let mut counter = Counter(0);
    let _ = write_canonical(value, &mut counter);
    Ok(Measure { depth: deepest, text: counter.0, native })
}

/// Refuses what is nested too deep, without recursion, and takes it apart without recursion too:
/// even dropping or cloning such a value could overflow a thread's stack.
pub(crate) fn refuse_deep<'a>(
    values: impl IntoIterator<Item = &'a mut Value>,
    subject: &str,
) -> Result<()> {
    let mut refused = Ok(());
    for value in values {
        if depth_exceeds(value, MAX_DEPTH) {
            dismantle(value.take());
            refused = Err(too_deep(subject));
        }
    }
    refused
}

/// Whether arrays and objects are nested deeper than `most`.
pub(crate) fn depth_exceeds(value: &Value, most: usize) -> bool {
    let mut waiting = vec![(value, 0usize)];
    while let Some((value, depth)) = waiting.pop() {
        let inner = depth + 1;
        match value {
            Value::Array(_) | Value::Object(_) if inner > most => return true,
            Value::Array(items) => waiting.extend(items.iter().map(|item| (item, inner))),
            Value::Object(fields) => waiting.extend(fields.values().map(|item| (item, inner))),
            _ => {}
        }
    }
    false
}

pub(crate) fn too_deep(subject: &str) -> Error {
    Error::refused(subject, format!("it is nested deeper than {MAX_DEPTH} levels"))
}

fn dismantle(value: Value) {
    let mut waiting = vec![value];
    while let Some(value) = waiting.pop() {
        match value {
            Value::Array(items) => waiting.extend(items),
            Value::Object(fields) => waiting.extend(fields.into_iter().map(|(_, item)| item)),
            _ => {}
        }
    }
}

/// Whether a number is one that is kept exactly. Always so, unless a crate in the build has switched on
/// `arbitrary_precision` of serde_json, with which a number is the text that it was written with.
fn is_kept(number: &Number) -> bool {
    number.is_i64()
        || number.is_u64()
        || number.as_f64().is_some_and(f64::is_finite) && number.is_f64()
}

/// Counts bytes instead of keeping them.
struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads JSON text and refuses what an ordinary parser would change in silence: a key that stands
/// twice in one object, and an integer that fits no 64-bit type. Decimals are IEEE 754 doubles, as
/// RFC 8259 recommends; one out of range (`1e400`) is refused.
///
/// # Errors
/// [`Error::SerializationError`] naming `subject`, with line and column.
///
/// ```
/// use tai_state::json;
/// assert_eq!(json::parse(r#"{"n": 18446744073709551615}"#, "input")?["n"], 18446744073709551615u64);
/// assert!(json::parse(r#"{"n": 18446744073709551616}"#, "input").is_err());
/// assert!(json::parse(r#"{"a": 1, "a": 2}"#, "input").is_err());
/// # Ok::<(), tai_state::Error>(())
/// ```
pub fn parse(text: &str, subject: &str) -> Result<Value> {
    let failed = |source| Error::SerializationError { subject: subject.to_owned(), source };
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Strict.deserialize(&mut reader).map_err(failed)?;
    reader.end().map_err(failed)?;
    if let Some(digits) = lossy_integer(text) {
        let digits = digits.trim_start_matches('-').len();
        return Err(failed(de::Error::custom(format!(
            "an integer of {digits} digits does not fit 64 bits; store it as a string"
        ))));
    }
    Ok(value)
}

/// Reads a type from a value.
///
/// # Errors
/// [`Error::SerializationError`] naming `subject` and the field's name or what was expected, and not what
/// was found there: errors are written to logs, and what is stored is not.
pub fn from_value<T: DeserializeOwned>(value: Value, subject: &str) -> Result<T> {
    serde_json::from_value(value).map_err(|source| {
        let subject = subject.to_owned();
        Error::SerializationError { subject, source: without_values(source) }
    })
}

/// An error that quotes nothing of what was read. `serde` quotes the value that was met: ``invalid type:
/// string "…", expected u64``, ``unknown variant `…`, expected …``. Names of fields stay.
pub(crate) fn without_values(error: serde_json::Error) -> serde_json::Error {
    if !error.is_data() {
        return error;
    }
    let text = error.to_string();
    let quotes = [
        ("invalid type: ", ", expected "),
        ("invalid value: ", ", expected "),
        ("unknown variant ", ", expected "),
        ("unknown variant ", ", there are no variants"),
    ];
    for (before, behind) in quotes {
        let Some(met) = text.strip_prefix(before) else { continue };
        // What was met may say `, expected ` itself.
        let Some((met, expected)) = met.rsplit_once(behind) else { continue };
        let kind = met.split(['"', '`']).next().unwrap_or_default().trim();
        let before = before.trim_end();
        let space = if kind.is_empty() { "" } else { " " };
        return de::Error::custom(format!("{before}{space}{kind}{behind}{expected}"));
    }
    let is_ours = ["missing field ", "duplicate field ", "unknown field ", "invalid length "];
    if is_ours.iter().any(|known| text.starts_with(known)) {
        return error;
    }
    // A type's own words, such as those about a time, may quote what they were given.
    de::Error::custom(match text.rsplit_once(" at line ") {
        Some((_, place)) => format!("a value is not what was expected, at line {place}"),
        None => "a value is not what was expected".to_owned(),
    })
}

/// The first integer literal of valid JSON that neither an `i64` nor a `u64` can hold.
fn lossy_integer(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => {
                at += 1;
                while let Some(inner) = bytes.get(at) {
                    match inner {
                        b'\\' => at += 1,
                        b'"' => break,
                        _ => {}
                    }
                    at += 1;
                }
                at += 1;
            }
            b'-' | b'0'..=b'9' => {
                let rest = text.get(at..)?;
                let end = rest
                    .find(|c: char| !matches!(c, '0'..='9' | '-' | '+' | '.' | 'e' | 'E'))
                    .unwrap_or(rest.len());
                let number = rest.get(..end)?;
                let integer = !number.contains(['.', 'e', 'E']);
                if integer && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                    return Some(number);
                }
                at += end.max(1);
            }
            _ => at += 1,
        }
    }
    None
}

/// A value in which no key stands twice.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = fields.next_key::<String>()? {
            // With `arbitrary_precision` a number comes as such an object.
            if key == "$serde_json::private::Number" && numbers_are_texts() {
                let text: String = fields.next_value()?;
                return number(&text).ok_or_else(|| {
                    let digits = text.len();
                    de::Error::custom(format!("a number of {digits} characters fits no 64 bits"))
                });
            }
            let value = fields.next_value_seed(Strict)?;
            if object.contains_key(&key) {
                return Err(de::Error::custom(format!("the key {key:?} stands twice")));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// Whether some crate in the build has switched on `arbitrary_precision` of serde_json.
fn numbers_are_texts() -> bool {
    static TEXTS: OnceLock<bool> = OnceLock::new();
    *TEXTS.get_or_init(|| {
        serde_json::from_str::<Value>("1.50").is_ok_and(|number| number.to_string().ends_with('0'))
    })
}

/// A number from its text, if it can be kept.
fn number(text: &str) -> Option<Value> {
    if !text.contains(['.', 'e', 'E']) {
        let signed = text.parse::<i64>().map(Value::from);
        return signed.or_else(|_| text.parse::<u64>().map(Value::from)).ok();
    }
    Number::from_f64(text.parse().ok()?).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::arbitrary_json;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn canonical_text_by_table() {
        let cases = [
            (json!({"b": 1, "a": [true, null]}), r#"{"a":[true,null],"b":1}"#),
            (
                json!({"é": 1, "z": 2, "\u{10000}": 3, "\u{ffff}": 4}),
                "{\"z\":2,\"é\":1,\"\u{ffff}\":4,\"\u{10000}\":3}",
            ),
            (
                json!("\"\\\u{8}\t\n\u{c}\r\u{1}\u{7f}/"),
                "\"\\\"\\\\\\b\\t\\n\\f\\r\\u0001\u{7f}/\"",
            ),
            (json!(0.1 + 0.2), "0.30000000000000004"),
            (json!(-0.0), "-0.0"),
            (json!(1.0), "1.0"),
            (json!(1e15), "1000000000000000.0"),
            (json!(1e16), "1e16"),
            (json!(1.5e300), "1.5e300"),
            (json!(-123.456), "-123.456"),
            (json!(0.000_012_5), "0.0000125"),
            (json!(-0.000_001), "-1e-6"),
            (json!(5e-324), "5e-324"),
            (json!(f64::MAX), "1.7976931348623157e308"),
            (json!(12_345_678_901_234.5), "12345678901234.5"),
            (json!(u64::MAX), "18446744073709551615"),
        ];
        for (value, text) in cases {
            assert_eq!(canonical(&value), text);
        }
    }

    #[test]
    fn an_error_names_the_field_and_not_what_stands_in_it() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code)]
        struct Read {
            number: u8,
            #[serde(default)]
            kind: Option<Kind>,
            #[serde(default)]
            time: Option<chrono::DateTime<chrono::Utc>>,
            #[serde(default)]
            of: Vec<u8>,
        }
        #[derive(Debug, serde::Deserialize)]
        enum Kind {
            Known,
        }
        for (text, says) in [
            (r#"{"number":"CANARY, expected CANARY"}"#, "invalid type: string, expected u8"),
            (r#"{"number":424242}"#, "invalid value: integer, expected u8"),
            (r#"{"number":4242.42}"#, "invalid type: floating point, expected u8"),
            (r#"{"number":1,"kind":"CANARY"}"#, "unknown variant, expected `Known`"),
            (r#"{"number":1,"time":"CANARY"}"#, "not what was expected"),
            (r#"{"number":1,"of":[1,"CANARY"]}"#, "invalid type: string, expected u8"),
            (r#"{"number":1,"name":"CANARY"}"#, "unknown field `name`"),
            (r#"{"kind":"Known"}"#, "missing field `number`"),
        ] {
            let value = parse(text, "a line").unwrap();
            let read = from_value::<Read>(value, "a line").map(drop).unwrap_err();
            let body = crate::backend::Body::from_text(text.to_owned());
            let stored = body.parse::<Read>().map(drop).unwrap_err();
            for error in [format!("{read} {read:?}"), format!("{stored} {stored:?}")] {
                assert!(error.contains(says), "{error}");
                assert!(!error.contains("CANARY") && !error.contains("4242"), "{error}");
            }
        }
        let number = parse("[123456789012345678901234567890]", "a line").unwrap_err();
        assert!(number.to_string().contains("30 digits"), "{number}");
        assert!(!format!("{number:?}").contains("1234567"), "{number:?}");
    }

    #[test]
    fn refused_texts() {
        let huge = "9".repeat(30);
        let deep = "[".repeat(10_000);
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"[{"x":{"a":1,"b":2,"a":3}}]"#,
            "18446744073709551616",
            "-9223372036854775809",
            &huge,
            "1e400",
            "[1,]",
            "1 2",
            "",
            r#""\ud800""#,
            &deep,
        ] {
            let error = parse(text, "input").expect_err(text);
            assert_eq!(error.code(), "serialization_error", "{text}");
        }
    }

    #[test]
    fn numbers_from_their_texts() {
        assert!(!numbers_are_texts(), "some dependency has switched on arbitrary_precision");
        assert_eq!(number("-5"), Some(json!(-5)));
        assert_eq!(number("18446744073709551615"), Some(json!(u64::MAX)));
        assert_eq!(number("2.50"), Some(json!(2.5)));
        for bad in ["18446744073709551616", "1e400", "x", ""] {
            assert_eq!(number(bad), None, "{bad}");
        }
        let odd = json!({"$serde_json::private::Number": "1"});
        assert_eq!(parse(&odd.to_string(), "x").unwrap(), odd);
    }

    #[test]
    fn digits_in_strings_are_no_numbers() {
        let text = format!(r#"{{"{0}\"{0}":"\\{0}"}}"#, "9".repeat(30));
        assert!(parse(&text, "input").is_ok());
    }

    #[test]
    fn too_deep_is_refused_without_recursion() {
        let nest = |levels| (0..levels).fold(Value::Null, |inner, _| Value::Array(vec![inner]));
        assert_eq!(measure(&nest(MAX_DEPTH), "x").unwrap().depth, MAX_DEPTH);
        assert_eq!(measure(&nest(MAX_DEPTH + 1), "x").unwrap_err().code(), "invalid_state");
        let mut deepest = nest(10_000);
        assert!(measure(&deepest, "x").is_err());
        assert!(refuse_deep([&mut deepest], "x").is_err());
        assert!(refuse_deep([&mut nest(MAX_DEPTH)], "x").is_ok());
    }

    proptest! {
        #[test]
        fn canonical_text_reads_back_equal(value in arbitrary_json()) {
            let text = canonical(&value);
            prop_assert_eq!(parse(&text, "x").unwrap(), value.clone());
            prop_assert_eq!(measure(&value, "x").unwrap().text, text.len() as u64);
        }

        #[test]
        fn doubles_keep_every_bit(bits in any::<u64>()) {
            let double = f64::from_bits(bits);
            prop_assume!(double.is_finite());
            let mut text = Vec::new();
            write_double(double, &mut text).unwrap();
            let back: f64 = serde_json::from_slice(&text).unwrap();
            prop_assert_eq!(back.to_bits(), bits);
        }

        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = parse(&text, "x");
        }

        #[test]
        fn almost_json_does_not_panic(text in r#"[-+.eE0-9"\\{}\[\],:é ]{0,30}"#) {
            let _ = parse(&text, "x");
            let _ = lossy_integer(&text);
        }
    }
}
