//! Whether transactions through `tai-state txn` are strictly serializable, by an outside checker.
//!
//! It is `adya`, which thinks up the transactions, records what came back, and looks for cycles.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod binary;
mod client;
mod history;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use adya::r#gen::{GenOpts, Kind, Rng, TxnOp, op_line};
use adya::run::{Client as _, Outcome, RunOpts};
use adya::sim::{Isolation, SimOpts};
use adya::{Report, Valid};
use tai_state::testing::emulator::{Emulator, fresh_project};

use client::{Client, Manner, Process, Tally};
use history::History;

const CLIENTS: usize = 8;
/// The number of the client that has the last word.
const LAST: usize = 1_000_000;
const STRICT: &str = "strict-serializable";

/// Six hot keys at a time. One that has been appended to so often makes way for a fresh one, as in
/// Jepsen's runs, so that lists stay short enough to be read by every other step.
fn transactions() -> GenOpts {
    GenOpts {
        kind: Kind::ListAppend,
        key_count: 6,
        min_txn_len: 1,
        max_txn_len: 8,
        max_writes_per_key: 64,
    }
}

#[derive(Debug, Clone, Copy)]
enum Clients {
    /// Each client is a process.
    Apart,
    /// The same, and now and then one is killed at its work: whether that was done is unknown.
    Killed,
    /// All clients ask one process, which runs as many transactions at a time.
    Together,
}

/// A run on one store.
#[derive(Debug)]
struct Run<'a> {
    what: &'a str,
    url: &'a str,
    seed: u64,
    clients: Clients,
    manner: Manner,
    transactions: usize,
}

impl Run<'_> {
    /// Runs it and says how it went. Nothing but refusals may have gone wrong, and enough must have
    /// been committed to be worth a look.
    fn history(&self) -> History {
        let Self { what, url, seed, .. } = *self;
        binary::done(url, &["init"]);
        let tally = Arc::new(Tally::default());
        let start = |concurrency| Arc::new(Process::start(url, concurrency, &tally));
        let together = match self.clients {
            Clients::Apart | Clients::Killed => None,
            Clients::Together => Some(start(CLIENTS)),
        };
        let started = AtomicU64::new(1);
        let connect = || -> Result<Box<dyn adya::run::Client>, adya::Error> {
            let process = together.clone().unwrap_or_else(|| start(1));
            let number = started.fetch_add(1, Ordering::Relaxed);
            let kills = matches!(self.clients, Clients::Killed)
                .then(|| Rng::new(seed.wrapping_add(number)));
            Ok(Box::new(Client { process, manner: self.manner, kills }))
        };
        let options = RunOpts {
            processes: CLIENTS,
            txns: self.transactions,
            r#gen: transactions(),
            seed,
            ..RunOpts::default()
        };
        let from = Instant::now();
        let (mut lines, stats) = adya::run::run(&connect, &options).unwrap();
        drop(together);
        let took = from.elapsed();
        let keys = History::parse(&lines).keys();
        // One more process, after all others have ended, reads everything: what was acknowledged and
        // lost cannot hide behind the last read of its key. At the very end it reads one key alone.
        let mut last = Client { process: start(1), manner: Manner::Whole, kills: None };
        let keys: Vec<TxnOp> = keys.into_iter().map(TxnOp::Read).collect();
        for ops in keys.chunks(transactions().max_txn_len).chain([&keys[..1]]) {
            let mut record = |kind: &str, reads: &[Option<Vec<i64>>]| {
                let (index, time) = (lines.lines().count(), from.elapsed().as_nanos() as u64);
                lines.push_str(&op_line(index, kind, LAST, time, ops, reads, true));
            };
            record("invoke", &[]);
            match last.txn(ops) {
                Outcome::Ok(reads) => record("ok", &reads),
                refused => panic!("{what}: the last reads: {refused:?}"),
            }
        }
        drop(last);
        let committed = stats.ok as f64 / self.transactions as f64;
        println!(
            "{what}: {} transactions of {CLIENTS} clients on {} keys: {} committed ({:.1} %), {} not \
             applied, {} unknown, {} attempts, in {:.1} s; why not: {:?}",
            self.transactions,
            keys.len(),
            stats.ok,
            committed * 100.0,
            stats.fail,
            stats.info,
            tally.attempts.load(Ordering::Relaxed),
            took.as_secs_f64(),
            tally.refusals.lock().unwrap(),
        );
        let wrong = tally.wrong.lock().unwrap();
        assert!(wrong.is_empty(), "{what}: {:#?}", &wrong[..wrong.len().min(5)]);
        assert_eq!(
            stats.ok + stats.fail + stats.info,
            self.transactions,
            "{what}: a client stopped"
        );
        assert!(committed >= 0.3, "{what}: too little was committed for the run to be valid");
        binary::done(url, &["verify"]);
        History::parse(&lines)
    }
}

fn summary(report: &Report) -> String {
    let mut text = format!("valid: {:?}, ", report.valid);
    let found: usize = report.anomalies.values().map(Vec::len).sum();
    let _ = write!(text, "{found} anomalies {:?}", report.anomaly_types);
    text
}

/// Nothing is found in it. Otherwise it is kept, with the proofs of what was found.
fn sound(what: &str, seed: u64, history: &History) {
    let from = Instant::now();
    let report = history.checked(STRICT);
    let nobodys = history.nobodys();
    println!(
        "{what}: {STRICT}: {}, {} elements that nobody appended; checked in {:.1} s",
        summary(&report),
        nobodys.len(),
        from.elapsed().as_secs_f64()
    );
    if report.valid != Valid::True || !nobodys.is_empty() {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("history-{seed}.jsonl"));
        std::fs::write(&kept, history.text()).unwrap();
        let proofs = report.anomalies.values().filter_map(|found| found.first());
        let proofs: Vec<&str> = proofs.map(|found| found.explanation.as_str()).collect();
        panic!(
            "{what}, TAI_STATE_SEED={seed}: {}\nnobody appended: {nobodys:?}\nkept: {}\n{}",
            summary(&report),
            kept.display(),
            proofs.join("\n")
        );
    }
}

/// Something is found in it, for sure.
fn caught(what: &str, history: &History) {
    let report = history.checked(STRICT);
    println!("  must be caught: {what}: {}", summary(&report));
    assert_eq!(report.valid, Valid::False, "not caught: {what}");
}

/// The checker notices what is broken: `adya`'s own simulated databases, at all the levels below
/// serializable that it has; and damaged copies of this history.
fn has_teeth(seed: u64, history: &History) {
    let simulated = |isolation| {
        History::parse(&adya::sim::run(&SimOpts {
            isolation,
            processes: CLIENTS,
            txns: 2000,
            r#gen: transactions(),
            seed,
            ..SimOpts::default()
        }))
    };
    let report = simulated(Isolation::Serializable).checked(STRICT);
    println!("  must pass: adya's database at serializable: {}", summary(&report));
    assert_eq!(report.valid, Valid::True, "a false alarm");
    for (name, isolation) in [
        ("snapshot isolation", Isolation::SnapshotIsolation),
        ("read committed", Isolation::ReadCommitted),
        ("read uncommitted", Isolation::ReadUncommitted),
        ("lost update", Isolation::LostUpdate),
    ] {
        caught(&format!("adya's database at {name}"), &simulated(isolation));
    }
    let mut random = Rng::new(seed);
    let copies = history.damaged(|end| random.below(end));
    for (what, copy) in &copies {
        caught(what, copy);
    }
    // Only the real-time order speaks against the first: without it that read came before all else.
    let report = copies[0].1.checked("serializable");
    assert_eq!(report.valid, Valid::True, "{}: {}", copies[0].0, summary(&report));
    assert_eq!(history.invented().nobodys().len(), 1);
}

/// Strictly serializable, by a checker that has teeth, in which the same traffic without
/// transactions is caught too.
fn strictly_serializable(name: &str, stores: [&str; 2], clients: Clients, transactions: usize) {
    // One at a time: the figures are of a machine that does nothing else.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = match std::env::var("TAI_STATE_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => {
            use std::hash::{BuildHasher, Hasher};
            std::collections::hash_map::RandomState::new().build_hasher().finish()
        }
    };
    println!("{name}: TAI_STATE_SEED={seed}");
    binary::path();
    let [whole, pieces] = stores;
    let run = Run { what: name, url: whole, seed, clients, manner: Manner::Whole, transactions };
    let history = run.history();
    sound(name, seed, &history);
    has_teeth(seed, &history);
    let what = format!("{name}, each step a transaction of its own");
    let transactions = (transactions / 10).max(200);
    let run = Run { what: &what, url: pieces, manner: Manner::InPieces, transactions, ..run };
    caught(&what, &run.history());
}

fn on_a_file(name: &str, clients: Clients, transactions: usize) {
    let folder = tempfile::tempdir().unwrap();
    let path = |file: &str| folder.path().join(file).display().to_string();
    let stores = [path("whole.tai"), path("pieces.tai")];
    strictly_serializable(name, stores.each_ref().map(String::as_str), clients, transactions);
}

#[test]
fn eight_processes_on_a_file() {
    on_a_file("8 processes on a file", Clients::Apart, 10_000);
}

#[test]
fn killed_processes_on_a_file() {
    on_a_file("8 processes on a file, some killed", Clients::Killed, 2_000);
}

#[test]
fn one_process_on_a_file() {
    on_a_file("1 process on a file", Clients::Together, 2_000);
}

fn on_the_emulator(name: &str, clients: Clients, transactions: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let Some(emulator) = runtime.block_on(Emulator::shared()) else { return };
    let store = || format!("firestore+emulator://{}/{}", emulator.address(), fresh_project());
    let stores = [store(), store()];
    strictly_serializable(name, stores.each_ref().map(String::as_str), clients, transactions);
}

#[test]
fn eight_processes_on_the_emulator() {
    on_the_emulator("8 processes on the emulator", Clients::Apart, 1_000);
}

#[test]
fn killed_processes_on_the_emulator() {
    on_the_emulator("8 processes on the emulator, some killed", Clients::Killed, 500);
}
