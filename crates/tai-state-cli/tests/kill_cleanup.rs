//! SIGKILL in the middle of `cleanup`, `purge` and `snapshots prune`: the store proves in between, the
//! next run finishes the work, and nothing of what is kept is lost.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)]

mod common;

use std::time::{Duration, Instant};

use common::{Engine, Random, Store, started};
use serde_json::{Value, json};
use tai_state::{
    ChangeMetadata, NewTransition, PersistenceConfig, StateMachinePersister, StateStore,
};

const STATES: [&str; 3] = ["a", "b", "c"];

/// Three states with so many versions each, a saved snapshot at each, all of them kept.
fn filled(engine: Engine, versions: u64) -> Store {
    let store = engine.store();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let config = PersistenceConfig {
            snapshot_interval: 1,
            snapshot_retention: 100_000,
            ..PersistenceConfig::default()
        };
        let opened = StateStore::connect(&store.url).await.unwrap();
        let persister = StateMachinePersister::new(opened, config);
        let mut tasks = tokio::task::JoinSet::new();
        for id in STATES {
            for n in 1..=versions {
                let persister = persister.clone();
                tasks.spawn(async move {
                    let why = ChangeMetadata::new("test", "", None);
                    let data = json!({ "secret": format!("data-{id}-{n}") });
                    persister.append(NewTransition::to("g", id, "step", data, why)).await.unwrap();
                });
            }
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
    store
}

/// The store's own copy, or the same again.
fn copied(engine: Engine, original: &Store, versions: u64) -> Store {
    if engine != Engine::File {
        return filled(engine, versions);
    }
    let copy = engine.place();
    std::fs::copy(&original.file, &copy.file).unwrap();
    copy
}

/// How long a whole run takes.
fn whole(store: &Store, args: &[&str]) -> Duration {
    let begun = Instant::now();
    store.run(args).ok();
    begun.elapsed()
}

fn killed(store: &Store, args: &[&str], after: Duration) {
    let mut child = started(store.command(args));
    let until = Instant::now() + after;
    while Instant::now() < until {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The events of a state as lines, from a version on.
fn history(store: &Store, id: &str, from: u64) -> Vec<Value> {
    let from = from.to_string();
    let args = ["-o", "jsonl", "history", &format!("g/{id}"), "--from", &from];
    store.run(&args).ok().lines()
}

fn killed_and_finished(engine: Engine, versions: u64, rounds: u64) {
    let mut random = Random::announced("killed_and_finished");
    let keep = 20;
    let batch = if engine == Engine::File { "9" } else { "1" };
    let keep_text = keep.to_string();
    let cleanup =
        ["cleanup", "g", "--older-than", "0s", "--keep-last", &keep_text, "--batch", batch];
    let purge = ["purge", "g/a", "--yes"];
    let prune = ["snapshots", "prune", "g/b", "--keep", "2"];
    let commands: [&[&str]; 3] = [&cleanup, &purge, &prune];
    let original = filled(engine, versions);
    let times: Vec<Duration> =
        commands.iter().map(|args| whole(&copied(engine, &original, versions), args)).collect();
    let enough = if engine == Engine::File { 2 * rounds / 10 } else { 1 };
    let (part_way, mut kills) = (std::cell::Cell::new(0), 0);
    // A kill hits when chance has it: it goes on until enough of them did.
    for round in (0..10 * rounds).take_while(|round| *round < rounds || part_way.get() < enough) {
        let which = (round % 3) as usize;
        let (args, most) = (commands[which], times[which]);
        let store = copied(engine, &original, versions);
        let kept = || -> Vec<Vec<Value>> {
            STATES.iter().map(|id| bare(&history(&store, id, versions - keep + 1))).collect()
        };
        let before = kept();
        // Twice, so that the second starts from what the first left.
        for _ in 0..2 {
            // The start of the program takes a part of it, and the first run was a slow one.
            let share = 0.15 + 0.65 * random.below(1_000) as f64 / 1_000.0;
            killed(&store, args, most.mul_f64(share));
            kills += 1;
            let report = store.verified();
            let saved = report["snapshots"].as_u64().unwrap();
            let pruned = which == 2 && saved < 3 * versions && saved > 2 * versions + 2;
            let is_hit = report["leftovers"] != 0 || pruned;
            part_way.set(part_way.get() + u64::from(is_hit));
            if which != 1 {
                // Whatever has come of it, what is kept is whole.
                assert!(kept() == before, "what is kept has changed");
            }
        }
        let last = store.json(args).ok().json();
        let report = store.verified();
        assert_eq!(report["leftovers"], 0, "{report}");
        match which {
            0 => {
                assert_eq!(report["events"], keep * STATES.len() as u64);
                assert!(kept() == before, "what is kept has changed");
                for id in STATES {
                    assert_eq!(store.run(&["get", &format!("g/{id}"), "--at", "v1"]).exit, 3);
                }
            }
            1 => {
                assert_eq!(report["events"], 2 * versions + 1);
                assert_eq!(last["version"], versions + 1);
                assert_eq!(store.run(&["get", "g/a"]).exit, 3);
                assert!(!store.run(&["export"]).ok().out.contains("data-a-"));
                if engine == Engine::File {
                    let bytes = std::fs::read(&store.file).unwrap();
                    let found = |text: &[u8]| bytes.windows(text.len()).any(|part| part == text);
                    assert!(
                        found(b"data-b-") && !found(b"data-a-"),
                        "the data are still in the file"
                    );
                }
            }
            _ => {
                let saved = store.json(&["snapshots", "ls", "g/b"]).ok().json();
                assert_eq!(saved.as_array().unwrap().len(), 2);
                assert_eq!(report["events"], 3 * versions);
            }
        }
    }
    let part_way = part_way.get();
    println!("{kills} kills, {part_way} of them with work half done; all was finished");
    assert!(part_way >= enough, "hardly any kill hit: the test shows nothing");
}

/// Without what a first event does not know: the state before it may be gone.
fn bare(events: &[Value]) -> Vec<Value> {
    let mut events = events.to_vec();
    if let Some(first) = events.first_mut().and_then(Value::as_object_mut) {
        first.remove("from_state");
    }
    events
}

#[test]
fn on_a_file() {
    killed_and_finished(Engine::File, 900, 27);
}

#[test]
fn on_the_emulator() {
    let Some(emulator) = Engine::emulator() else { return };
    killed_and_finished(emulator, 90, 6);
}
