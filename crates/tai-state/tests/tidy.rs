//! The rules of the house (ARCHITECTURE.md), held by reading the tree.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};

/// All Rust files below a folder, with their text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

/// What is compiled into the product: no tests, no comments.
fn product(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\n").next().unwrap();
    let code = |line: &&str| !line.trim_start().starts_with("//");
    text.lines().filter(code).collect::<Vec<_>>().join("\n")
}

fn library() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let name = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
    sources(&root).into_iter().map(|(path, text)| (name(&path), text)).collect()
}

#[test]
fn every_file_has_one_job_and_says_so_first() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let all = sources(crates);
    assert!(all.len() > 40);
    for (path, text) in all {
        let name = path.display();
        assert!(
            text.starts_with("//! ") || text.starts_with("#![doc = include_str!"),
            "{name} does not begin with what it is for"
        );
        let code = product(&text).lines().count();
        assert!(code <= 600, "{name} has {code} lines of code: does it still have one job?");
    }
}

#[test]
fn the_words_of_the_domain_know_no_backend_and_do_not_wait() {
    let words = [
        "id.rs",
        "state.rs",
        "event.rs",
        "clock_vector.rs",
        "chain.rs",
        "json.rs",
        "transition.rs",
        "trim.rs",
        "replay.rs",
        "error.rs",
        "config.rs",
        "lease.rs",
        "conflict.rs",
        "conflict/merge.rs",
    ];
    let library = library();
    for word in words {
        let (_, text) = library.iter().find(|(name, _)| name == word).unwrap();
        let code = product(text);
        for forbidden in ["async ", ".await", "crate::backend", "tokio", "rusqlite"] {
            assert!(!code.contains(forbidden), "{word} says {forbidden:?}");
        }
    }
}

#[test]
fn only_an_engine_names_its_client() {
    for (name, text) in library() {
        let code = product(&text);
        if !name.starts_with("backend/embedded/") {
            assert!(!code.contains("rusqlite"), "{name} names rusqlite");
        }
        if !name.starts_with("backend/firestore/") {
            assert!(!code.contains("tonic"), "{name} names tonic");
        }
    }
}

/// The rooms may make a backend and hand it over; they never call one.
#[test]
fn only_the_floor_calls_the_port() {
    // `patience` and `proposal` know its errors and its writes, `schema` makes these.
    let floor = [
        "command.rs",
        "leases.rs",
        "patience.rs",
        "proposal.rs",
        "reader.rs",
        "records.rs",
        "revise.rs",
        "schema.rs",
        "settle.rs",
    ];
    let speaks = |text: &str| {
        ["BackendError", "Read;", "dyn Read", "Write::", ".view().await?.get"]
            .into_iter()
            .find(|word| product(text).contains(word))
    };
    let (mut rooms, mut speakers) = (0, Vec::new());
    for (name, text) in library() {
        let is_inside = ["backend/", "testing/"].iter().any(|folder| name.starts_with(folder));
        let is_test = name.ends_with("/tests.rs") || name.ends_with("/edges.rs");
        if is_inside || is_test {
            continue;
        }
        match speaks(&text) {
            Some(_) if floor.contains(&name.as_str()) => speakers.push(name),
            Some(word) => panic!("{name} says {word:?}"),
            None => rooms += 1,
        }
    }
    assert!(rooms > 40, "{rooms}");
    speakers.sort();
    assert_eq!(speakers, floor, "whoever does not call it any more is no floor");
}

#[test]
fn fields_are_spelled_in_one_place() {
    for (name, text) in library() {
        let is_test = name.starts_with("testing/")
            || name.ends_with("/tests.rs")
            || name.ends_with("/edges.rs");
        if name == "schema.rs" || name == "chain.rs" || is_test {
            continue;
        }
        let code = product(&text);
        for field in [
            "\"prev_hash\"",
            "\"to_state\"",
            "\"snapshot_versions\"",
            "\"event_id\"",
            "\"lease_ms\"",
        ] {
            assert!(!code.contains(field), "{name} spells the field {field}");
        }
    }
}
