//! `firestore`: what a Firestore database must be told before a store works well in it.

use serde_json::Value;
use tai_state::StoreUrl;

use crate::args::{Firestore, FirestoreCommand, Global};
use crate::failure::{Failure, Outcome, exit};
use crate::output;

/// `deploy/firestore.indexes.json`, which a link brings into this crate.
const INDEXES: &str = include_str!("../../firestore.indexes.json");

pub(crate) fn run(global: &Global, args: &Firestore) -> Outcome {
    match &args.command {
        FirestoreCommand::Indexes { prefix } => {
            let text = indexes(&prefix_of(global, prefix.as_deref())?);
            let value: Value = serde_json::from_str(&text).map_err(|error| {
                Failure::new(exit::OTHER, "bug", format!("the built-in index file: {error}"))
            })?;
            output::object(global.output, &value, text.trim_end())
        }
    }
}

/// The file with the prefix before the name of every collection, and otherwise as it was laid out.
fn indexes(prefix: &str) -> String {
    const NAME: &str = "\"collectionGroup\": \"";
    INDEXES.replace(NAME, &format!("{NAME}{prefix}"))
}

/// What was asked for, else that of the store that was named, if that is on Firestore.
fn prefix_of(global: &Global, asked: Option<&str>) -> Outcome<String> {
    match (asked, global.url.as_deref()) {
        (Some(""), _) => Ok(String::new()),
        (Some(asked), _) => match format!("firestore://any?prefix={asked}").parse() {
            // The URL decides what a prefix may be.
            Ok(StoreUrl::Firestore { prefix, .. }) if prefix == asked => Ok(prefix),
            _ => Err(Failure::rejected(format!("{asked:?} cannot be a prefix"))
                .hint("a prefix has ASCII letters, digits, _ and -")),
        },
        (None, None | Some("")) => Ok(String::new()),
        (None, Some(url)) => match url.parse()? {
            StoreUrl::Firestore { prefix, .. } | StoreUrl::FirestoreEmulator { prefix, .. } => {
                Ok(prefix)
            }
            _ => Ok(String::new()),
        },
    }
}
