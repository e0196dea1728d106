//! Fuzz targets: functions that take any bytes, and panic only where a promise is broken.
//!
//! The folder `fuzz/` at the root of the repository gives them to `cargo fuzz`; [`corpus`] runs the
//! inputs that are kept there, and mutations of them, in plain tests. What a target takes is either
//! text or bytes as they come from outside, or a recipe: bytes that [`Input`] turns into well-formed
//! values, so that the fuzzer gets past a hash or a length.

// A broken promise ends the target: that is its whole answer.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod chain;
pub mod corpus;
mod input;
mod json;
mod names;
#[cfg(feature = "embedded")]
mod operations;
mod records;
mod url;

pub use input::Input;
#[cfg(feature = "firestore")]
pub(crate) use json::same;
#[cfg(feature = "firestore")]
pub(crate) use records::BODIES;

/// A function that takes any bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, which is that of its corpus.
    pub name: &'static str,
    /// Panics when a promise is broken.
    pub run: fn(&[u8]),
    /// How many mutations of its corpus a plain test runs: fewer of what costs more.
    pub mutations: usize,
}

/// All targets of the library.
pub const TARGETS: &[Target] = &[
    Target { name: "record", run: records::record, mutations: 3_000 },
    Target { name: "chain", run: chain::chain, mutations: 1_500 },
    Target { name: "json", run: json::json, mutations: 5_000 },
    Target { name: "names", run: names::names, mutations: 5_000 },
    Target { name: "url", run: url::url, mutations: 5_000 },
    #[cfg(feature = "embedded")]
    Target { name: "operations", run: operations::operations, mutations: 25 },
    #[cfg(feature = "firestore")]
    Target {
        name: "firestore_values",
        run: crate::backend::firestore::fuzz::values,
        mutations: 3_000,
    },
    #[cfg(feature = "firestore")]
    Target {
        name: "firestore_answers",
        run: crate::backend::firestore::fuzz::answers,
        mutations: 3_000,
    },
];

/// Runs a target of the library by its name.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of this name").run)(bytes);
}
