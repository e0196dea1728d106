//! What a long log costs: memory and rates of appending, replaying, exporting and proving a million events,
//! and how long a state takes to load whatever the length of its log.
//!
//! `cargo bench -p tai-state --bench volume [-- EVENTS]` (default: 1,000,000). Each step is a process of its
//! own, so that its peak of resident memory is its own.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::indexing_slicing, missing_docs)]

use std::collections::VecDeque;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tai_state::{ChangeMetadata, NewTransition, StateMachinePersister, StateStore};

fn why() -> ChangeMetadata {
    ChangeMetadata::new("bench", "", None)
}

/// 200 bytes of JSON.
fn data(n: u64) -> serde_json::Value {
    let mut data = json!({"n": n, "status": "open", "filler": ""});
    let missing = 200 - data.to_string().len();
    data["filler"] = "x".repeat(missing).into();
    assert_eq!(data.to_string().len(), 200);
    data
}

/// The highest that the resident memory of this process has been, in MiB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

async fn append(store: &StateStore, id: &str, count: u64) {
    let persister = StateMachinePersister::with_defaults(store.clone());
    let mut under_way = VecDeque::new();
    for n in 1..=count {
        if under_way.len() == 512 {
            let first: tokio::task::JoinHandle<()> = under_way.pop_front().unwrap();
            first.await.unwrap();
        }
        let (persister, id) = (persister.clone(), id.to_owned());
        under_way.push_back(tokio::spawn(async move {
            persister.append(NewTransition::to("g", id, "step", data(n), why())).await.unwrap();
        }));
    }
    for task in under_way {
        task.await.unwrap();
    }
}

/// One step, in a process of its own: prints its count, seconds and peak.
async fn step(name: &str, path: &Path, count: u64) {
    let started = Instant::now();
    let store = StateStore::open(path).await.unwrap();
    let done = match name {
        "append" => {
            append(&store, "long", count).await;
            count
        }
        "replay" => {
            let persister = StateMachinePersister::with_defaults(store);
            persister.replay("g", "long", |_| Ok(())).await.unwrap().events
        }
        "export" => store.export(None, &mut std::io::sink(), |_| {}).await.unwrap().transitions,
        "verify" => {
            let report = store.verify(|_| {}).await.unwrap();
            assert!(report.ok, "{:?}", report.problems);
            report.events
        }
        "first load" => {
            let persister = StateMachinePersister::with_defaults(store);
            persister.load_state("g", "long").await.unwrap().0.version
        }
        _ => unreachable!("{name}"),
    };
    println!("{done} {} {}", started.elapsed().as_secs_f64(), peak());
}

fn in_a_process(name: &str, path: &Path, count: u64) -> (u64, f64, f64) {
    let this = std::env::current_exe().unwrap();
    let out = Command::new(this).arg("step").arg(name).arg(path).arg(count.to_string()).output();
    let out = out.unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    let parts: Vec<f64> = text.split_whitespace().map(|part| part.parse().unwrap()).collect();
    (parts[0] as u64, parts[1], parts[2])
}

/// Bytes of the file and its log per second, read from front to back.
fn raw_read(path: &Path) -> f64 {
    let mut buffer = vec![0u8; 1 << 20];
    let started = Instant::now();
    let (mut file, mut bytes) = (std::fs::File::open(path).unwrap(), 0usize);
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return bytes as f64 / started.elapsed().as_secs_f64(),
            read => bytes += read,
        }
    }
}

/// The middle of many loads by one handle.
async fn loads(store: &StateStore, id: &str) -> Duration {
    let persister = StateMachinePersister::with_defaults(store.clone());
    let mut times = Vec::new();
    for _ in 0..201 {
        let started = Instant::now();
        persister.load_state("g", id).await.unwrap();
        times.push(started.elapsed());
    }
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if args.first().is_some_and(|arg| arg == "step") {
        let count = args[3].parse().unwrap();
        return runtime.block_on(step(&args[1], &PathBuf::from(&args[2]), count));
    }
    let most: u64 = args.first().map_or(1_000_000, |arg| arg.parse().unwrap());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut peaks = Vec::new();
    for count in [most / 10, most] {
        let path = folder.path().join(format!("{count}.tai"));
        for name in ["append", "replay", "export", "verify", "first load"] {
            let (done, seconds, peak) = in_a_process(name, &path, count);
            assert_eq!(done, count);
            let rate = done as f64 / seconds;
            if name == "first load" {
                println!(
                    "{count:>9} events: {name:<10} {:>9.1} ms, peak {peak:.0} MiB",
                    seconds * 1e3
                );
            } else {
                println!("{count:>9} events: {name:<10} {rate:>9.0} a second, peak {peak:.0} MiB");
                peaks.push((name, count, peak));
            }
        }
        let size = std::fs::metadata(&path).unwrap().len();
        let raw = raw_read(&path);
        println!(
            "{count:>9} events: {} MiB of file, {:.0} bytes an event; read raw from the page cache at \
             {:.0} MiB/s = {:.0} events/s",
            size >> 20,
            size as f64 / count as f64,
            raw / 1048576.0,
            raw / (size as f64 / count as f64),
        );
    }
    for (name, count, peak) in &peaks {
        let small = peaks.iter().find(|(other, _, _)| other == name).unwrap().2;
        if *count == most {
            println!("{name:<10} peak at {most} / at {}: {:.2}", most / 10, peak / small);
        }
    }

    // Loading, whatever the length.
    let path = folder.path().join("lengths.tai");
    let lengths = [1_000u64, 10_000, 100_000];
    let medians: Vec<Duration> = runtime.block_on(async {
        let store = StateStore::open(&path).await.unwrap();
        let mut medians = Vec::new();
        for length in lengths {
            let id = format!("of-{length}");
            // 50 events after the newest saved snapshot, the middle of what there can be.
            append(&store, &id, length + 50).await;
            medians.push(loads(&store, &id).await);
        }
        medians
    });
    for (length, median) in lengths.iter().zip(&medians) {
        let ratio = median.as_secs_f64() / medians[0].as_secs_f64();
        println!("load_state of {length:>7} events: {median:?}, {ratio:.2} of the shortest");
    }
}
