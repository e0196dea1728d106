//! What tests of a backend need: the contract as a list of behaviours, and backends that are broken
//! on purpose, to show that the list notices; a backend whose answers are lost; and, for the
//! Firestore backend, Google's emulator and a proxy before it that loses, delays and repeats. And fuzz
//! targets: what must hold for any input.

pub mod broken;
pub mod conformance;
#[cfg(all(unix, feature = "testing", feature = "firestore"))]
pub mod emulator;
pub mod faults;
#[cfg(feature = "testing")]
pub mod fuzz;
#[cfg(feature = "testing")]
pub mod program;
#[cfg(all(feature = "testing", feature = "firestore"))]
pub mod proxy;

#[cfg(test)]
pub(crate) use arbitrary::arbitrary_json;

#[cfg(test)]
mod arbitrary {
    use proptest::prelude::*;
    use serde_json::Value;

    /// Any JSON value that can be written as JSON text.
    pub(crate) fn arbitrary_json() -> impl Strategy<Value = Value> {
        let number = prop_oneof![
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>()
                .prop_filter_map("finite", |n| serde_json::Number::from_f64(n).map(Value::Number)),
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            number,
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }
}
