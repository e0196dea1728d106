//! The verbs of the past, and the real log: what is asked of it equals a plain fold over the file.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::collections::HashMap;
use std::io::Read;

use chrono::{DateTime, TimeDelta, Utc};
use common::{Engine, Random, incidents};
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tai_state::{Error, StateStore};

on_every_engine!(
    what_changed_and_back,
    since_and_until,
    all_states_at_one_time,
    saved_snapshots_by_hand,
    cleaning_up_says_what_it_would_do,
    a_purge_wants_a_yes,
    a_lost_head_is_recovered,
    a_shortened_log_goes_out_and_in,
    the_real_log_answers_as_a_plain_fold,
);

fn put(store: &common::Store, address: &str, data: &Value) {
    store.run(&["put", address, "--data", &data.to_string()]).ok();
}

fn what_changed_and_back(engine: Engine) {
    let store = engine.store();
    for n in 1..=3 {
        put(&store, "g/s", &json!({"n": n, "same": true}));
    }
    let patch = store.json(&["diff", "g/s", "v1..v3"]).ok().json();
    assert_eq!(patch, json!([{"op": "replace", "path": "/n", "value": 3}]));
    assert_eq!(store.json(&["diff", "g/s", "v1.."]).ok().json(), patch);
    let lines = store.run(&["-o", "jsonl", "diff", "g/s", "v0..v1"]).ok().lines();
    assert_eq!(lines.len(), 1);
    for (range, exit) in [("v1", 2), ("1..2", 2), ("v1..v9", 3), ("v3..x", 2)] {
        assert_eq!(store.run(&["diff", "g/s", range]).exit, exit, "{range}");
    }
    let event = store.json(&["revert", "g/s", "--to", "v1", "--reason", "oops"]).ok().json();
    assert_eq!((&event["version"], &event["to_state"]["n"]), (&json!(4), &json!(1)));
    assert_eq!(event["metadata"]["context"]["reverted_to"], 1);
    assert_eq!(store.run(&["revert", "g/s", "--to", "v9"]).exit, 3);
    let replayed = store.json(&["replay", "g/s"]).ok().json();
    assert_eq!((&replayed["version"], &replayed["events_replayed"]), (&json!(4), &json!(4)));
    assert_eq!(store.json(&["replay", "g/s", "--to", "v2"]).ok().json()["to_state"]["n"], 2);
    let proof = store.json(&["replay", "g/s", "--verify"]).ok().json();
    assert_eq!((&proof["ok"], &proof["events"]), (&json!(true), &json!(4)));
    assert_eq!(store.run(&["replay", "g/x"]).exit, 3);
    assert_eq!(store.run(&["replay", "g/x", "--verify"]).exit, 3);
}

fn line(state: &str, minute: u32, n: u64) -> String {
    let time = format!("2026-01-01T00:{minute:02}:00Z");
    json!({"governor_id": "g", "state_id": state, "action": "step", "actor": "me", "timestamp": time, "data": n})
        .to_string()
}

fn since_and_until(engine: Engine) {
    let store = engine.place();
    let lines: Vec<String> =
        (1..=9).map(|n| line(["a", "b"][n as usize % 2], n, n.into())).collect();
    store.feed(&["import", "-"], lines.join("\n").as_bytes()).ok();
    let shown = |args: &[&str]| -> Vec<Value> {
        let args: Vec<&str> = ["-o", "jsonl"].iter().chain(args).copied().collect();
        store.run(&args).ok().lines().iter().map(|event| event["to_state"].clone()).collect()
    };
    let (from, to) = ("2026-01-01T00:03:00Z", "2026-01-01T00:06:30Z");
    assert_eq!(shown(&["history", "g/b", "--since", from, "--until", to]), [3, 5]);
    assert_eq!(shown(&["history", "g/b", "--since", "v2", "--until", to]), [3, 5]);
    assert_eq!(shown(&["history", "g/b", "--since", from]), [3, 5, 7, 9]);
    assert_eq!(shown(&["history", "g/b", "--until", "v1"]), [1]);
    assert_eq!(shown(&["timeline", "g", "--since", from, "--until", to]), [3, 4, 5, 6]);
    assert_eq!(shown(&["timeline", "g"]), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(store.run(&["timeline", "g", "--since", "v2"]).exit, 2);
    assert_eq!(store.run(&["history", "g/b", "--since", from, "--from", "1"]).exit, 2);
    assert!(store.run(&["timeline", "g"]).ok().out.trim_start().starts_with("WHEN"));
}

fn all_states_at_one_time(engine: Engine) {
    let store = engine.place();
    let lines: Vec<String> =
        (1..=9).map(|n| line(["a", "b"][n as usize % 2], n, n.into())).collect();
    store.feed(&["import", "-"], lines.join("\n").as_bytes()).ok();
    let then = |at: &str| -> Vec<Value> {
        let states = store.json(&["ls", "g", "--at", at]).ok().json();
        states.as_array().unwrap().iter().map(|state| state["data"].clone()).collect()
    };
    assert_eq!(then("2026-01-01T00:06:30Z"), [6, 5]);
    assert_eq!(then("2026-01-01T00:01:00Z"), [1]);
    assert!(then("2025-01-01T00:00:00Z").is_empty());
    assert_eq!(then("-1s"), [8, 9]);
    assert_eq!(store.run(&["ls", "g", "--at", "2999-01-01T00:00:00Z"]).exit, 5);
    assert_eq!(store.run(&["ls", "g", "--at", "v3"]).exit, 2);
    assert_eq!(store.run(&["ls", "--at", "-1s"]).exit, 2);
}

fn saved_snapshots_by_hand(engine: Engine) {
    let store = engine.store();
    for n in 1..=3 {
        put(&store, "g/s", &json!(n));
        assert_eq!(store.json(&["snapshots", "create", "g/s"]).ok().json()["version"], n);
    }
    let versions = || -> Vec<Value> {
        let saved = store.json(&["snapshots", "ls", "g/s"]).ok().json();
        saved.as_array().unwrap().iter().map(|saved| saved["version"].clone()).collect()
    };
    assert_eq!(versions(), [1, 2, 3]);
    let pruned = store.json(&["snapshots", "prune", "g/s", "--keep", "1"]).ok().json();
    assert_eq!((&pruned["snapshots"], versions()), (&json!(2), vec![json!(3)]));
    assert!(pruned["recovered_bytes"].as_u64().unwrap() > 100);
    assert_eq!(store.run(&["snapshots", "ls", "g/x"]).exit, 3);
    store.verified();
}

fn cleaning_up_says_what_it_would_do(engine: Engine) {
    let store = engine.store();
    for governor in ["g", "h"] {
        for n in 1..=5 {
            put(&store, &format!("{governor}/s"), &json!(n));
        }
    }
    assert_eq!(store.run(&["cleanup", "g"]).exit, 2);
    assert_eq!(store.run(&["cleanup", "g", "--older-than", "1d", "--before", "-1d"]).exit, 2);
    let nothing = store.json(&["cleanup", "--older-than", "30d"]).ok().json();
    assert_eq!((&nothing["events"], &nothing["states"]), (&json!(0), &json!(2)));
    let args = ["cleanup", "--older-than", "0s", "--keep-last", "2"];
    let dry = store.json(&[&args[..], &["--dry-run"]].concat()).ok().json();
    assert_eq!((&dry["events"], &dry["dry_run"]), (&json!(6), &json!(true)));
    assert_eq!(store.verified()["events"], 10);
    let done = store.json(&args).ok().json();
    assert_eq!((&done["events"], &done["recovered_bytes"]), (&json!(6), &dry["recovered_bytes"]));
    assert_eq!(store.verified()["events"], 4);
    let error = store.json(&["get", "g/s", "--at", "v1"]);
    assert_eq!((error.exit, &error.error()["code"]), (3, &json!("history_trimmed")));
    assert!(error.error()["message"].as_str().unwrap().contains("since version 4"));
    let report = store.json(&["verify", "--governor", "h"]).ok().json();
    assert_eq!((&report["ok"], &report["events"]), (&json!(true), &json!(2)));
}

fn a_purge_wants_a_yes(engine: Engine) {
    let store = engine.store();
    put(&store, "g/s", &json!({"name": "Ada"}));
    let refused = store.run(&["purge", "g/s"]);
    assert!(refused.exit == 2 && refused.err.contains("--yes"), "{refused:?}");
    store.run(&["get", "g/s"]).ok();
    let report = store.json(&["purge", "g/s", "--yes", "--reason", "asked to"]).ok().json();
    assert_eq!((&report["version"], &report["events"]), (&json!(2), &json!(1)));
    assert_eq!(store.run(&["get", "g/s"]).exit, 3);
    assert!(!store.run(&["export"]).ok().out.contains("Ada"));
    put(&store, "g/s", &json!(1));
    assert_eq!(store.json(&["get", "g/s"]).ok().json()["version"], 3);
    assert_eq!(store.run(&["purge", "g/x", "--yes"]).exit, 3);
}

fn a_lost_head_is_recovered(engine: Engine) {
    use tai_state::backend::embedded::EmbeddedBackend;
    use tai_state::backend::firestore::{FirestoreBackend, FirestoreConfig};
    use tai_state::backend::{Backend, Key, Kind, Name, Precondition, Write};
    let store = engine.store();
    for n in 1..=4 {
        put(&store, "g/s", &json!(n));
    }
    let name = |id| Name::escape(id, "id").unwrap();
    let key = Key { governor: name("g"), kind: Kind::States, name: name("s"), version: 0 };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let backend: Box<dyn Backend> = match engine {
            Engine::File => {
                Box::new(EmbeddedBackend::open(&store.file, false, false).await.unwrap())
            }
            Engine::Emulator(address) => {
                let project = store.url.rsplit('/').next().unwrap();
                let mut config = FirestoreConfig::new(project);
                config.emulator = Some(address.to_owned());
                Box::new(FirestoreBackend::open(config).await.unwrap())
            }
        };
        backend.commit(vec![Write::delete(key, Precondition::Any)]).await.unwrap();
    });
    let verified = store.json(&["verify"]);
    assert_eq!((verified.exit, &verified.json()["ok"]), (8, &json!(false)));
    let report = store.json(&["recover", "g/s"]).ok().json();
    assert_eq!((&report["head"], &report["repaired"]), (&json!("missing"), &json!(true)));
    assert_eq!((&report["version"], &report["data"]), (&json!(4), &json!(4)));
    assert!(report["elapsed_seconds"].as_f64().unwrap() > 0.0);
    store.verified();
    assert_eq!(store.json(&["recover", "g/s"]).ok().json()["head"], "sound");
    assert!(store.run(&["recover", "g/s"]).ok().out.contains("nothing to repair"));
}

/// What begins with a deletion, because what was before is gone, can be taken in elsewhere.
fn a_shortened_log_goes_out_and_in(engine: Engine) {
    let store = engine.store();
    for id in ["a", "b"] {
        put(&store, &format!("g/{id}"), &json!(1));
        put(&store, &format!("g/{id}"), &json!(2));
    }
    store.run(&["rm", "g/a"]).ok();
    store.run(&["cleanup", "g", "--older-than", "0s"]).ok();
    store.run(&["purge", "g/b", "--yes"]).ok();
    let out = store.run(&["export"]).ok().out;
    assert_eq!(out.lines().count(), 2);
    let copy = engine.place();
    copy.feed(&["import", "-"], out.as_bytes()).ok();
    assert_eq!(copy.run(&["export"]).ok().out, out);
    assert_eq!(copy.verified()["content_hash"], store.verified()["content_hash"]);
    assert_eq!(copy.json(&["ls", "g", "--deleted"]).ok().json().as_array().unwrap().len(), 2);
}

/// Five hundred random versions and five hundred random times.
fn the_real_log_answers_as_a_plain_fold(engine: Engine) {
    let Some(path) = incidents() else { return };
    let mut plain = String::new();
    GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut plain).unwrap();
    let wanted = match engine {
        Engine::File => usize::MAX,
        Engine::Emulator(_) => 5_000,
    };
    let lines: Vec<&str> = plain.lines().take(wanted).collect();
    let store = engine.place();
    store.feed(&["import", "-"], lines.join("\n").as_bytes()).ok();

    // The fold: for each state its values with their times, which never fall.
    let mut fold: HashMap<String, Vec<(DateTime<Utc>, Value)>> = HashMap::new();
    for line in &lines {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let states = fold.entry(line["state_id"].as_str().unwrap().to_owned()).or_default();
        let time: DateTime<Utc> = line["timestamp"].as_str().unwrap().parse().unwrap();
        let time = states.last().map_or(time, |last| time.max(last.0));
        states.push((time, line["data"].take()));
    }
    let mut ids: Vec<&String> = fold.keys().collect();
    ids.sort_unstable();
    let (first, last) = (
        fold.values().map(|states| states[0].0).min().unwrap(),
        fold.values().map(|states| states.last().unwrap().0).max().unwrap(),
    );
    let mut random = Random::announced("the_real_log_answers_as_a_plain_fold");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut found, mut before) = (0, 0);
    runtime.block_on(async {
        let opened = StateStore::connect(&store.url).await.unwrap();
        for _ in 0..500 {
            let id = ids[random.below(ids.len() as u64) as usize];
            let states = &fold[id];
            let version = 1 + random.below(states.len() as u64);
            let answer = opened.state_at_version("incidents", id, version).await.unwrap();
            let (time, data) = &states[version as usize - 1];
            assert_eq!((&answer.data, &answer.timestamp), (data, time), "{id} v{version}");

            // Any time; and one of the state's own, exactly, just before or just after it.
            let id = ids[random.below(ids.len() as u64) as usize];
            let states = &fold[id];
            let time = match random.below(2) {
                0 => {
                    first
                        + TimeDelta::seconds(
                            random.below((last - first).num_seconds() as u64) as i64
                        )
                }
                _ => {
                    let own = states[random.below(states.len() as u64) as usize].0;
                    own + TimeDelta::microseconds(random.below(3) as i64 - 1)
                }
            };
            let expected = states.iter().rposition(|(at, _)| *at <= time);
            match (opened.state_at_time("incidents", id, time).await, expected) {
                (Ok(answer), Some(at)) => {
                    assert_eq!(
                        (&answer.data, answer.version),
                        (&states[at].1, at as u64 + 1),
                        "{id} {time}"
                    );
                    found += 1;
                }
                (Err(Error::StateNotFound { .. }), None) => before += 1,
                (other, expected) => panic!("{id} at {time}: {other:?} instead of {expected:?}"),
            }
        }
    });
    println!("500 versions, {found} times with a state and {before} before it: all as folded");
    assert!(found > 100 && before > 20, "the times hit one side only");
    // And through the program.
    for _ in 0..5 {
        let id = ids[random.below(ids.len() as u64) as usize];
        let (at, (time, data)) = (fold[id].len() - 1, fold[id].last().unwrap());
        let time = time.to_rfc3339();
        let answer = store.json(&["get", &format!("incidents/{id}"), "--at", &time]).ok().json();
        assert_eq!((&answer["data"], &answer["version"]), (data, &json!(at + 1)));
    }
}
