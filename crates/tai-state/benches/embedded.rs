//! The embedded engine beside the disk it stands on, all in one run, printed as ratios.
//!
//! `cargo bench -p tai-state --bench embedded [-- FOLDER]` measures in FOLDER (default: the folder
//! for build artefacts). Every figure has its reference taken in the same run, right before it.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::indexing_slicing, missing_docs)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tai_state::backend::embedded::EmbeddedBackend;
use tai_state::{ChangeMetadata, NewTransition, StateMachinePersister, StateStore, StoreOptions};

const EACH: Duration = Duration::from_secs(3);
const ROUNDS: usize = 3;

fn why() -> ChangeMetadata {
    ChangeMetadata::new("bench", "", None)
}

/// About 500 bytes of JSON.
fn data(n: u64) -> serde_json::Value {
    json!({
        "status": "shipped", "n": n, "amount": n as f64 / 7.0, "tags": ["a", "b", "c"],
        "address": {"street": "Long Street", "number": n % 100, "city": "Somewhere"},
        "filler": "x".repeat(330),
    })
}

/// Appends of 2 KB, each followed by fdatasync: what the disk gives at best. Per second.
fn raw_syncs(folder: &Path) -> f64 {
    let path = folder.join("raw");
    let mut file = File::create(&path).unwrap();
    let block = vec![7u8; 2048];
    let started = Instant::now();
    let mut count = 0;
    while started.elapsed() < EACH {
        file.write_all(&block).unwrap();
        file.sync_data().unwrap();
        count += 1;
    }
    let rate = f64::from(count) / started.elapsed().as_secs_f64();
    std::fs::remove_file(&path).unwrap();
    rate
}

async fn open(path: &Path) -> (Arc<EmbeddedBackend>, StateStore) {
    let backend = Arc::new(EmbeddedBackend::open(path, true, true).await.unwrap());
    let store = StateStore::with_backend(Arc::clone(&backend) as _, StoreOptions::default());
    (backend, store)
}

/// Transitions per second, and per sync, of so many writers.
async fn writers(folder: &Path, count: usize, states: usize) -> (f64, f64) {
    let path = folder.join("bench.tai");
    let (backend, store) = open(&path).await;
    let before = backend.group_commits();
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..count {
        let persister = StateMachinePersister::with_defaults(store.clone());
        tasks.spawn(async move {
            let mut done = 0u64;
            while started.elapsed() < EACH {
                let state = format!("s{}", task % states);
                let to = NewTransition::to("bench", state, "step", data(done), why());
                persister.append(to).await.unwrap();
                done += 1;
            }
            done
        });
    }
    let done: u64 = tasks.join_all().await.into_iter().sum();
    let rate = done as f64 / started.elapsed().as_secs_f64();
    let syncs = backend.group_commits() - before;
    drop((store, backend));
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(folder.join(format!("bench.tai{suffix}")));
    }
    (rate, done as f64 / syncs as f64)
}

async fn fill(store: &StateStore, states: u64, each: u64) {
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..200 {
        let persister = StateMachinePersister::with_defaults(store.clone());
        tasks.spawn(async move {
            for state in (0..states).filter(|state| state % 200 == task) {
                for n in 0..each {
                    let to = NewTransition::to(
                        "g",
                        format!("s{state:05}"),
                        "step",
                        json!({"n": n, "filler": "x".repeat(100)}),
                        why(),
                    );
                    persister.append(to).await.unwrap();
                }
            }
        });
    }
    tasks.join_all().await;
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The median time of a point read, in microseconds.
async fn read_us(store: &StateStore, states: u64) -> f64 {
    let mut times = Vec::new();
    for n in 0..4_000u64 {
        let state = format!("s{:05}", n.wrapping_mul(7_919) % states);
        let started = Instant::now();
        store.get_state("g", &state).await.unwrap();
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    median(times)
}

#[tokio::main]
async fn main() {
    let mut folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut large = 1_000_000u64;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            // What cargo itself passes.
            "--bench" => {}
            number if number.parse::<u64>().is_ok() => large = number.parse().unwrap(),
            path => folder = path.into(),
        }
    }
    let inside = tempfile::tempdir_in(&folder).unwrap();
    let folder = inside.path().to_path_buf();
    println!("{ROUNDS} rounds of {} s each, interleaved; medians", EACH.as_secs());
    let (mut raw, mut one, mut many) = (Vec::new(), Vec::new(), Vec::new());
    let (mut per_sync, mut hot) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        raw.push(raw_syncs(&folder));
        one.push(writers(&folder, 1, 1).await.0);
        let (rate, grouped) = writers(&folder, 64, 64).await;
        many.push(rate);
        per_sync.push(grouped);
        hot.push(writers(&folder, 8, 8).await.0);
    }
    let ratio =
        |rates: &[f64]| median(rates.iter().zip(&raw).map(|(rate, raw)| rate / raw).collect());
    println!("raw: 2 KB append + fdatasync          {:>9.0}/s", median(raw.clone()));
    println!(
        "one writer                            {:>9.0}/s   {:.2} of raw",
        median(one.clone()),
        ratio(&one)
    );
    println!(
        "8 writers                             {:>9.0}/s   {:.2} of raw",
        median(hot.clone()),
        ratio(&hot)
    );
    println!(
        "64 writers                            {:>9.0}/s   {:.2} of raw",
        median(many.clone()),
        ratio(&many)
    );
    println!("transitions per sync, 64 writers      {:>9.1}", median(per_sync));

    let small_path = folder.join("small.tai");
    let large_path = folder.join("large.tai");
    let (backend, small) = open(&small_path).await;
    fill(&small, 10, 10).await;
    let (large_backend, large_store) = open(&large_path).await;
    let started = Instant::now();
    fill(&large_store, 10_000, large / 10_000).await;
    println!(
        "filled with {large} events                {:>9.0}/s",
        large as f64 / started.elapsed().as_secs_f64()
    );
    let (mut of_small, mut of_large) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        of_small.push(read_us(&small, 10).await);
        of_large.push(read_us(&large_store, 10).await);
    }
    let (of_small, of_large) = (median(of_small), median(of_large));
    println!("get_state, 100 events in the file     {of_small:>9.1} us");
    println!(
        "get_state, {large} events in the file {of_large:>9.1} us   {:.2} of the former",
        of_large / of_small
    );
    println!(
        "get_state, any of 10000 states        {:>9.1} us",
        read_us(&large_store, 10_000).await
    );
    drop((small, backend, large_store, large_backend));
    let started = Instant::now();
    let (backend, store) = open(&large_path).await;
    let opened = started.elapsed();
    let persister = StateMachinePersister::with_defaults(store.clone());
    persister.load_state("g", "s00042").await.unwrap();
    println!(
        "open with {large} events              {:>9.1} ms, first load_state after {:.1} ms",
        opened.as_secs_f64() * 1e3,
        started.elapsed().as_secs_f64() * 1e3
    );
    let started = Instant::now();
    let report = store.verify(|_| {}).await.unwrap();
    println!(
        "verify                                {:>9.0} events/s, ok: {}",
        report.events as f64 / started.elapsed().as_secs_f64(),
        report.ok
    );
    drop((persister, store, backend));
}
