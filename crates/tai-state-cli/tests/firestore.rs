//! `tai-state firestore`: what it prints can be deployed as it is.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;

use common::{Ran, run, tool};
use serde_json::Value;

/// The one source, beside the crates.
const FILE: &str = include_str!("../../../deploy/firestore.indexes.json");

fn indexes(args: &[&str]) -> Ran {
    let mut command = tool();
    command.args(["firestore", "indexes"]).args(args);
    run(command, b"")
}

/// All collections that the settings name.
fn collections(settings: &Value) -> BTreeSet<String> {
    ["indexes", "fieldOverrides"]
        .iter()
        .flat_map(|list| settings[list].as_array().unwrap())
        .map(|entry| entry["collectionGroup"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn it_prints_the_file_without_a_store() {
    assert_eq!(indexes(&[]).ok().out, FILE);
    assert_eq!(indexes(&["--prefix", ""]).ok().out, FILE);
    assert_eq!(indexes(&["-u", "app.tai"]).ok().out, FILE);
    assert!(!std::path::Path::new("app.tai").exists());
    let settings: Value = serde_json::from_str(FILE).unwrap();
    for format in ["json", "jsonl"] {
        let ran = indexes(&["-o", format]).ok();
        assert_eq!((ran.out.lines().count(), ran.json()), (1, settings.clone()));
    }
}

#[test]
fn a_prefix_stands_before_every_collection_and_changes_nothing_else() {
    let mut expected: Value = serde_json::from_str(FILE).unwrap();
    for list in ["indexes", "fieldOverrides"] {
        for entry in expected[list].as_array_mut().unwrap() {
            let name = format!("prod-1_{}", entry["collectionGroup"].as_str().unwrap());
            entry["collectionGroup"] = name.into();
        }
    }
    assert_eq!(
        collections(&expected).iter().map(String::as_str).collect::<Vec<_>>(),
        ["prod-1_commands", "prod-1_events", "prod-1_locks", "prod-1_snapshots", "prod-1_states"]
    );
    assert_eq!(indexes(&["--prefix", "prod-1_"]).ok().json(), expected);
    // The prefix of the store that is named, unless another is asked for.
    for url in [
        "firestore://p?prefix=prod-1_",
        "firestore://p/d?prefix=prod-1_",
        "firestore+emulator://127.0.0.1:1/demo-p?prefix=prod-1_",
    ] {
        assert_eq!(indexes(&["-u", url]).ok().json(), expected, "{url}");
    }
    let url = "firestore://p?prefix=test_";
    assert_eq!(indexes(&["-u", url, "--prefix", "prod-1_"]).ok().json(), expected);
    assert_eq!(indexes(&["-u", url, "--prefix", ""]).ok().out, FILE);
}

#[test]
fn a_prefix_that_the_url_would_refuse_is_refused() {
    for prefix in ["a/b", "a b", "é", "\"", "a&b=c", "a?b", "a#b", ".", "a\n"] {
        let ran = indexes(&["-o", "json", "--prefix", prefix]);
        assert_eq!((ran.exit, ran.error()["code"].as_str()), (5, Some("rejected")), "{prefix:?}");
        assert_eq!(ran.out, "");
    }
    assert_eq!(indexes(&["--prefix"]).exit, 2);
    assert_eq!(indexes(&["-u", "firestore://"]).exit, 5);
    let mut bare = tool();
    bare.arg("firestore");
    assert_eq!(run(bare, b"").exit, 2);
}

/// What Firebase's command line and the Terraform module both take, and within the limit of
/// settings of single fields that a database without billing has.
#[test]
fn the_file_keeps_to_what_its_readers_take() {
    let settings: Value = serde_json::from_str(FILE).unwrap();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let known = |value: &Value, allowed: &[&str]| {
        let unknown: Vec<_> =
            keys(value).into_iter().filter(|key| !allowed.contains(&key.as_str())).collect();
        assert_eq!(unknown, [""; 0], "{value}");
    };
    known(&settings, &["indexes", "fieldOverrides"]);
    for index in settings["indexes"].as_array().unwrap() {
        known(index, &["collectionGroup", "queryScope", "fields"]);
        assert_eq!(index["queryScope"], "COLLECTION");
        let fields = index["fields"].as_array().unwrap();
        assert!(fields.len() > 1, "{index}: one field alone has its index by itself");
        for field in fields {
            known(field, &["fieldPath", "order"]);
            assert!(["ASCENDING", "DESCENDING"].contains(&field["order"].as_str().unwrap()));
        }
    }
    let overrides = settings["fieldOverrides"].as_array().unwrap();
    let mut seen = BTreeSet::new();
    for field in overrides {
        known(field, &["collectionGroup", "fieldPath", "ttl", "indexes"]);
        let path = field["fieldPath"].as_str().unwrap();
        let is_plain = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(!path.is_empty() && path.chars().all(is_plain), "{path}: list fields, no `*`");
        assert!(seen.insert((field["collectionGroup"].to_string(), path)), "{field} stands twice");
        for index in field["indexes"].as_array().unwrap() {
            known(index, &["order", "queryScope"]);
        }
        if let Some(ttl) = field.get("ttl") {
            // Only answers to commands may be forgotten: never states, events, snapshots, locks.
            assert_eq!((ttl, field["collectionGroup"].as_str()), (&true.into(), Some("commands")));
        }
    }
    assert!(overrides.len() <= 200 / 4, "four prefixes should fit into one database");
}
