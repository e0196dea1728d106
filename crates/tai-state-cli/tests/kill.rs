//! The real import, killed at random moments; and several processes on one state.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Random, Store, acknowledgement, incidents, started};
use serde_json::{Value, json};

/// Runs the binary, kills it after `after`, and returns what it had acknowledged.
fn killed(store: &Store, args: &[&str], after: Duration) -> Vec<Value> {
    let mut child = started(store.command(args));
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let read = move || std::iter::from_fn(|| acknowledgement(&mut out)).collect();
    let reader = std::thread::spawn(read);
    // The moment is the point of the test; there is nothing to wait for.
    let until = Instant::now() + after;
    while Instant::now() < until {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

/// The real import, killed again and again, ends with the same store as one that was left alone.
#[test]
fn a_killed_import_goes_on() {
    let Some(path) = incidents() else { return };
    let path = path.to_str().unwrap();
    let mut random = Random::announced("killed import");
    let store = Store::new();
    let mut acknowledged = 0u64;
    for _ in 0..4 {
        let after = Duration::from_millis(random.below(700));
        let acks = killed(&store, &["import", "--acks", path], after);
        acknowledged += acks.len() as u64;
        if store.file.exists() {
            let events = store.verified()["events"].as_u64().unwrap();
            assert!(events >= acknowledged, "{acknowledged} acknowledged, {events} there");
            for ack in acks.iter().rev().take(3) {
                let address = format!("incidents/{}", ack["state_id"].as_str().unwrap());
                let at = format!("v{}", ack["version"]);
                store.run(&["get", &address, "--at", &at]).ok();
            }
        }
    }
    let summary = store.json(&["import", path]).ok().json();
    assert_eq!(summary["lines"], 65_533);
    assert!(summary["already_there"].as_u64().unwrap() >= acknowledged);
    let alone = Store::new();
    alone.run(&["import", path]).ok();
    let (report, other) = (store.verified(), alone.verified());
    assert_eq!(report["events"], 65_533);
    assert_eq!(report["content_hash"], other["content_hash"]);
}

/// Four processes read, add one and write with the version they read, on one state of one file.
#[test]
fn four_processes_lose_no_update() {
    use std::io::Write;
    const PROCESSES: usize = 4;
    const STEPS: u64 = 200;
    let store = Store::made();
    store.run(&["put", "g/counter", "--data", "0"]).ok();
    let (done, conflicts): (u64, u64) = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..PROCESSES)
            .map(|_| {
                scope.spawn(|| {
                    let mut child = store
                        .command(&["txn"])
                        .stdin(Stdio::piped())
                        .stdout(Stdio::piped())
                        .spawn()
                        .unwrap();
                    let mut input = child.stdin.take().unwrap();
                    let mut output = BufReader::new(child.stdout.take().unwrap());
                    let mut ask = |ops: Value| -> Value {
                        writeln!(input, "{}", json!({"ops": [ops]})).unwrap();
                        let mut line = String::new();
                        output.read_line(&mut line).unwrap();
                        serde_json::from_str(&line).unwrap()
                    };
                    let (mut done, mut conflicts) = (0, 0);
                    for _ in 0..STEPS {
                        let read = ask(json!({"op": "get", "state": "g/counter"}));
                        let read = &read["results"][0];
                        let next = read["data"].as_u64().unwrap() + 1;
                        let version = read["version"].as_u64().unwrap();
                        let put = json!({"op": "put", "state": "g/counter", "data": next, "expect": version});
                        let answer = ask(put);
                        if answer["ok"] == true {
                            assert_eq!(answer["results"][0]["version"], version + 1);
                            done += 1;
                        } else {
                            assert_eq!(answer["code"], "version_conflict", "{answer}");
                            assert_eq!(answer["expected"], version, "{answer}");
                            assert!(answer["actual"].as_u64().unwrap() > version, "{answer}");
                            conflicts += 1;
                        }
                    }
                    drop(input);
                    assert!(child.wait().unwrap().success());
                    (done, conflicts)
                })
            })
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    });
    println!("{done} done, {conflicts} conflicts");
    assert_eq!(done + conflicts, PROCESSES as u64 * STEPS);
    let found = store.json(&["get", "g/counter"]).ok().json();
    assert_eq!((&found["data"], &found["version"]), (&json!(done), &json!(done + 1)));
    store.verified();
}
