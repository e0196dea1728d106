//! Input that is far too large, too deep or endless is refused before memory is taken for it.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::Write;

use common::{BINARY, Ran, Store, bash, run};
use flate2::{Compression, write::GzEncoder};
use serde_json::json;

/// One gzip member. A file of many members is as good as one, and quickly made.
fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

/// Address space that a run may take: the program with its threads needs a good half of it.
const MOST_KIB: u64 = 1_200_000;

fn limited(store: &Store, args: &str) -> Ran {
    let url = &store.url;
    let script =
        format!("ulimit -v {MOST_KIB}; exec {BINARY} --no-progress -o json -u {url} {args}");
    run(bash(&script), b"")
}

fn line(n: usize, data: &str) -> String {
    format!(
        r#"{{"governor_id":"g","state_id":"s{n}","action":"a","actor":"me","timestamp":"2026-01-01T00:00:00Z","data":{data}}}"#
    )
}

#[test]
fn a_gzip_bomb_takes_no_memory() {
    const MIB: usize = 1 << 20;
    let store = Store::made();
    // One line of 1.5 GiB.
    let zeros = packed(&vec![b'0'; 32 * MIB]);
    let file = store.write("one-line.gz", &zeros.repeat(48));
    for verb in ["import", "import --strict", "txn"] {
        let ran = limited(&store, &format!("{verb} {file}"));
        assert_eq!(ran.exit, 5, "{verb}: {ran:?}");
        assert!(ran.err.contains("longer than"), "{ran:?}");
    }
    // 1.5 GiB of many lines, with one that can be taken at the end.
    let mut blank = vec![b' '; 32 * MIB];
    blank.iter_mut().step_by(MIB).for_each(|byte| *byte = b'\n');
    let mut many = packed(&blank).repeat(48);
    many.extend(packed(format!("\n{}\n", line(1, "1")).as_bytes()));
    let file = store.write("many-lines.gz", &many);
    let ran = limited(&store, &format!("import {file}")).ok();
    assert_eq!(ran.json()["applied"], 1);
    // The control: memory is limited. A program that takes 1.5 GiB dies of it.
    let greedy = format!("ulimit -v {MOST_KIB}; head -c 1500M /dev/zero | tail -c 1400M | wc -c");
    assert_ne!(run(bash(&greedy), b"").out.trim(), (1400u64 << 20).to_string());
}

#[test]
fn what_cannot_be_kept_is_refused_by_name_and_changes_nothing() {
    let store = Store::made();
    store.run(&["put", "g/s0", "--data", "1"]).ok();
    let before = store.verified()["content_hash"].clone();
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    let values: [(String, &[&str]); 15] = [
        ("1e400".to_owned(), &["number out of range"]),
        ("-1e400".to_owned(), &["number out of range"]),
        ("9".repeat(30), &["30 digits"]),
        ("18446744073709551616".to_owned(), &["20 digits"]),
        ("9".repeat(6 << 20), &["number out of range", "digits"]),
        ("NaN".to_owned(), &["expected"]),
        ("Infinity".to_owned(), &["expected"]),
        ("\"\\ud800\"".to_owned(), &["surrogate", "hex escape"]),
        ("{\"a\":1,\"a\":1}".to_owned(), &["stands twice"]),
        (deep(101), &["deeper than 100"]),
        (deep(127), &["deeper than 100", "recursion"]),
        (deep(1_000_000), &["recursion"]),
        (format!("\"{}\"", "x".repeat(1 << 20)), &["too large"]),
        (format!("[{}]", vec!["0"; 1_000_000].join(",")), &["too large"]),
        ("[1".to_owned(), &["EOF", "expected `,` or `]`"]),
    ];
    for (value, says) in &values {
        let file = store.write("value.json", value.as_bytes());
        let lines = store.write("lines.jsonl", line(1, value).as_bytes());
        let op = format!(r#"{{"ops":[{{"op":"put","state":"g/s1","data":{value}}}]}}"#);
        let ops = store.write("ops.jsonl", op.as_bytes());
        for args in [
            format!("put g/s0 {file}"),
            format!("import {lines}"),
            format!("import --strict {lines}"),
            format!("txn {ops}"),
        ] {
            let ran = limited(&store, &args);
            let what = format!("{args} of {value:.30}: {ran:.600?}");
            let said = format!("{}{}", ran.out, ran.err);
            // A line of `txn` that was refused by the store is an answer like another.
            let is_refused = ran.exit == 5 || ran.exit == 0 && said.contains("\"ok\":false");
            assert!(is_refused && says.iter().any(|says| said.contains(says)), "{what}");
            assert!(said.len() < 2_000, "{} bytes are said: {what}", said.len());
        }
    }
    // A decimal of very many digits is a double like another.
    let digits = store.write("digits.json", format!("0.{}", "1".repeat(6 << 20)).as_bytes());
    assert_eq!(store.verified()["content_hash"], before);
    limited(&store, &format!("put g/s0 {digits}")).ok();
}

#[test]
fn very_long_names_and_very_many_operations_are_refused() {
    let store = Store::made();
    let before = store.verified()["content_hash"].clone();
    let long = "x".repeat(1 << 20);
    let op = |op: &str, state: &str| json!({ "op": op, "state": state, "data": 1 });
    let many = |count: usize| (0..count).map(|n| op("put", &format!("g/s{n}"))).collect::<Vec<_>>();
    for (n, request) in [
        json!({ "ops": [op("put", &format!("g/{long}"))] }),
        json!({ "ops": [op("put", &format!("{long}/s"))] }),
        json!({ "ops": [op("put", "g/")] }),
        json!({ "ops": [op("put", "no-slash")] }),
        json!({ "id": long, "ops": [op("put", "g/s")] }),
        json!({ "actor": long, "ops": [op("put", "g/s")] }),
        json!({ "reason": long, "ops": [op("put", "g/s")] }),
        json!({ "ops": many(10_001) }),
        json!({ "ops": many(100_000) }),
        json!({ "ops": [{ "op": "put", "state": "g/s", "data": 1, "expect": -1 }] }),
        json!({ "ops": [{ "op": "get", "state": "g/s", "unknown": 1 }] }),
        json!({ "ops": 7 }),
        json!([]),
    ]
    .iter()
    .enumerate()
    {
        let file = store.write("request.jsonl", request.to_string().as_bytes());
        let ran = limited(&store, &format!("txn {file}"));
        let said = format!("{}{}", ran.out, ran.err);
        assert!(said.contains("\"ok\":false") && matches!(ran.exit, 0 | 5), "{n}: {ran:.300?}");
    }
    for args in [
        "get g/s --at v18446744073709551616".to_owned(),
        "get g/s --at v-1".to_owned(),
        "put g/s --data 1 --expect -1".to_owned(),
        "put g/s --data 1 --expect 18446744073709551616".to_owned(),
        "put g/s --data 1 --expect 18446744073709551615".to_owned(),
        "ls --limit 0".to_owned(),
        "ls --limit 99999999999999999999".to_owned(),
        "locks run l --ttl 0s -- true".to_owned(),
        "locks run l --ttl 1ns -- true".to_owned(),
        "locks run l --ttl 100years -- true".to_owned(),
        "cleanup g --older-than 0s --batch 0".to_owned(),
        "cleanup g --older-than 0s --keep-last 0".to_owned(),
        format!("put g/{} --data 1", "x".repeat(100_000)),
    ] {
        let ran = limited(&store, &args);
        assert!(matches!(ran.exit, 2..=5), "{args:.80}: {ran:.300?}");
        assert!(!ran.err.contains("panicked"), "{args:.80}: {ran:.300?}");
    }
    assert_eq!(store.verified()["content_hash"], before);
}
