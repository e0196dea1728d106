//! Eight tasks on one state beside eight tasks on eight states, in one run, printed as ratios.
//!
//! `cargo bench -p tai-state --bench hot [-- FOLDER]`. Each task does the same number of changes; besides
//! the ratio of the rates it says how long the slowest task took beside the median of all.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::indexing_slicing, missing_docs)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use tai_state::{ChangeMetadata, StateSnapshot, StateStore, TransactionManager};

const TASKS: usize = 8;
const ROUNDS: usize = 5;

fn why() -> ChangeMetadata {
    ChangeMetadata::new("bench", "", None)
}

fn counter(n: u64) -> StateSnapshot {
    let data = json!({"count": n, "filler": "x".repeat(300)});
    StateSnapshot::new("counter".into(), data, why())
}

/// How a task makes one change.
#[derive(Debug, Clone, Copy)]
enum How {
    /// `save_state`, which expects nothing.
    Save,
    /// `execute_transaction`: read, add one, write.
    Transaction,
}

/// Changes per second of all tasks, and the slowest task's time beside the median of all.
async fn run(folder: &Path, how: How, states: usize, each: u64) -> (f64, f64) {
    let path = folder.join("hot.tai");
    let store = StateStore::open(&path).await.unwrap();
    for n in 0..states {
        store.save_state("bench", format!("s{n}"), counter(0), why()).await.unwrap();
    }
    let manager = TransactionManager::new(&store);
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let (store, manager) = (store.clone(), manager.clone());
        tasks.spawn(async move {
            let state = format!("s{}", task % states);
            for n in 0..each {
                match how {
                    How::Save => {
                        store.save_state("bench", &state, counter(n), why()).await.unwrap();
                    }
                    How::Transaction => {
                        let state = state.as_str();
                        let add = manager.execute_transaction("bench", |tx| async move {
                            let (mut now, version) = tx.get_state("bench", state).await?;
                            now.data["count"] = json!(now.data["count"].as_u64().unwrap() + 1);
                            tx.update_state("bench", state, now, version, why()).await
                        });
                        add.await.unwrap();
                    }
                }
            }
            started.elapsed().as_secs_f64()
        });
    }
    let mut times = tasks.join_all().await;
    times.sort_by(f64::total_cmp);
    let all = started.elapsed().as_secs_f64();
    if let How::Transaction = how {
        let mut sum = 0;
        for n in 0..states {
            let (state, _) = store.get_state("bench", format!("s{n}")).await.unwrap();
            sum += state.data["count"].as_u64().unwrap();
        }
        assert_eq!(sum, each * TASKS as u64, "an update was lost");
    }
    drop((manager, store));
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(folder.join(format!("hot.tai{suffix}")));
    }
    ((each * TASKS as u64) as f64 / all, times[TASKS - 1] / times[TASKS / 2])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main]
async fn main() {
    let mut folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    for argument in std::env::args().skip(1).filter(|argument| argument != "--bench") {
        folder = argument.into();
    }
    let inside = tempfile::tempdir_in(&folder).unwrap();
    for (how, each) in [(How::Save, 1_000), (How::Transaction, 600)] {
        let (mut apart, mut together, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let mut slowest = Vec::new();
        for _ in 0..ROUNDS {
            let (of_eight, _) = run(inside.path(), how, TASKS, each).await;
            let (of_one, slow) = run(inside.path(), how, 1, each).await;
            apart.push(of_eight);
            together.push(of_one);
            ratios.push(of_one / of_eight);
            slowest.push(slow);
        }
        println!(
            "{how:?}: {TASKS} tasks on {TASKS} states {:.0}/s, on one state {:.0}/s: ratio {:.2}; \
             slowest task {:.2} of the median task",
            median(apart),
            median(together),
            median(ratios),
            slowest.into_iter().fold(0.0, f64::max)
        );
    }
}
