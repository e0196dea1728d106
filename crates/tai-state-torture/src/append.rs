//! Whether transactions through `tai-state txn` are strictly serializable, by two checkers that know
//! nothing of one another.
//!
//! One is `adya`, which thinks up the transactions, records what came back, and looks for cycles; the
//! other is `versions`. They must agree on every history, on the sound and on the damaged.

mod client;
mod history;

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use adya::r#gen::{GenOpts, Kind, Rng, TxnOp, op_line};
use adya::run::{Client as _, Outcome, RunOpts, Stats};
use adya::sim::{Isolation, SimOpts};
use adya::{Report, Valid};
use tai_state::testing::emulator::Emulator;

use crate::args::Tier;
use crate::engine::{Engine, Store};
use crate::process::Process;
use crate::run::{Run, Tally};
use client::{Client, Manner, Seen};
use history::History;

/// The number of the client that has the last word.
const LAST: usize = 1_000_000;
const STRICT: &str = "strict-serializable";
/// With less than this a run shows nothing.
const LEAST_COMMITTED: f64 = 0.3;
const LEAST_A_SECOND: f64 = 100.0;
/// How often a run is done on a machine that is busy with something else.
const TRIES: u64 = 3;
const FAST: &str = "runs on a file with 100 commits a second";
const AGAIN: &str = "runs done again, since they were slow";
const SIMULATED: usize = 2_000;

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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clients {
    /// Each client is a process.
    Apart,
    /// The same, and now and then one is killed or stopped at its work.
    Harmed,
    /// All clients ask one process, which runs as many transactions at a time.
    Together,
}

/// A run on one store.
#[derive(Debug, Clone, Copy)]
struct Traffic {
    engine: Engine,
    seed: u64,
    /// How many clients there are.
    many: usize,
    clients: Clients,
    manner: Manner,
    transactions: usize,
}

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let emulator = Engine::emulator(&mut tally, "list-append on the emulator").await;
    let mut least = [0, 0];
    for (round, mut random) in run.rounds(run.size(3, 30)) {
        // The emulator keeps all that it was ever told in its memory, which eight seeds of a long run
        // have filled: then it answers in minutes.
        let own = match emulator {
            Some(_) if run.tier == Tier::Long => Emulator::own().await,
            _ => None,
        };
        let emulator = own.as_ref().map(Engine::of).or(emulator);
        let seed = random.next();
        let many = if round % 2 == 0 { 8 } else { 16 };
        let traffic = |engine, clients, transactions| Traffic {
            engine,
            seed,
            many,
            clients,
            manner: Manner::Whole,
            transactions,
        };
        let is_long = run.tier == Tier::Long;
        let of = |short, long| if is_long { long } else { short };
        let on_a_file = [
            traffic(Engine::Memory, Clients::Apart, of(600, 20_000)),
            traffic(Engine::File, Clients::Harmed, of(300, 2_000)),
            traffic(Engine::Memory, Clients::Together, of(400, 4_000)),
        ];
        let on_the_emulator = emulator.map(|engine| {
            [
                traffic(engine, Clients::Apart, of(120, 2_000)),
                traffic(engine, Clients::Harmed, of(80, 500)),
            ]
        });
        // What waits for the emulator runs beside what waits for the disk.
        let parts = tokio::task::block_in_place(|| {
            std::thread::scope(|scope| {
                let all = |these: &[Traffic]| {
                    these.iter().fold(Tally::default(), |mut tally, traffic| {
                        tally.add(strictly_serializable(*traffic));
                        tally
                    })
                };
                let file = scope.spawn(move || all(&on_a_file));
                let emulator =
                    scope.spawn(move || all(on_the_emulator.as_ref().map_or(&[], |t| t)));
                let mut parts = vec![simulations(seed, many)];
                for part in [file, emulator] {
                    parts
                        .push(part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
                }
                parts
            })
        });
        parts.into_iter().for_each(|part| tally.add(part));
        let runs = 3 + on_the_emulator.map_or(0, |runs| runs.len() as u64);
        least[0] += runs;
        least[1] += 2;
    }
    let again = tally.counted(AGAIN);
    tally.at_least("runs of which 30 % were committed", least[0] + again);
    tally.at_least(FAST, least[1]);
    tally
}

/// Once, or again while it is too slow to show anything. Whatever was done counts.
fn strictly_serializable(traffic: Traffic) -> Tally {
    let mut tally = is_strictly_serializable(traffic);
    for _ in 1..TRIES {
        if !traffic.needs_speed() || tally.counted(FAST) > 0 || tally.is_broken() {
            break;
        }
        tally.count(AGAIN, 1);
        tally.add(is_strictly_serializable(traffic));
    }
    tally
}

/// Strictly serializable, by checkers that have teeth, by which the same traffic without transactions is
/// caught too.
fn is_strictly_serializable(traffic: Traffic) -> Tally {
    let mut tally = Tally::default();
    let store = traffic.engine.place();
    let Some(history) = traffic.history(&store, &mut tally) else { return tally };
    sound(&traffic, &history, &mut tally);
    let mut random = Rng::new(traffic.seed);
    let late = history.late();
    caught("a last read that saw nothing", &late, &mut tally);
    let report = late.checked("serializable");
    tally.holds(report.valid == Valid::True, || {
        format!("a last read that saw nothing: {}", summary(&report))
    });
    drop((late, report));
    history.damaged(|end| random.below(end), |what, copy| caught(what, &copy, &mut tally));
    let nobodys = u64::from(history.invented().nobodys().len() == 1);
    let caught_too = u64::from(!history.invented().faults().is_empty());
    tally.control("a read of what nobody appended", nobodys.min(caught_too), 1, 1);
    let pieces = Traffic {
        manner: Manner::InPieces,
        transactions: (traffic.transactions / 10).clamp(200, 1_000),
        ..traffic
    };
    if let Some(history) = pieces.history(&traffic.engine.place(), &mut tally) {
        caught("each step a transaction of its own", &history, &mut tally);
    }
    tally
}

impl Traffic {
    fn name(&self) -> String {
        let Self { engine, many, clients, .. } = self;
        let how = match clients {
            Clients::Apart => format!("{many} processes"),
            Clients::Harmed => format!("{many} processes, some killed or stopped"),
            Clients::Together => format!("1 process for {many} clients"),
        };
        format!("{how} on {}", engine.name())
    }

    /// Whether it is to be dense enough to show something: none is killed, and the file is in memory.
    fn needs_speed(&self) -> bool {
        !matches!(self.engine, Engine::Emulator(_)) && self.clients != Clients::Harmed
    }

    /// Runs it and says how it went. Nothing but refusals may have gone wrong, and enough must have
    /// been committed to be worth a look.
    fn history(&self, store: &Store, tally: &mut Tally) -> Option<History> {
        let Self { seed, many, .. } = *self;
        let url = &store.url;
        store.run(&["init"]).ok();
        let seen = Arc::new(Seen::default());
        let start = |concurrency| Arc::new(Process::start(url, concurrency, &seen.asked));
        let together = (self.clients == Clients::Together).then(|| start(many));
        let started = AtomicU64::new(1);
        let connect = || -> Result<Box<dyn adya::run::Client>, adya::Error> {
            let process = together.clone().unwrap_or_else(|| start(1));
            let number = started.fetch_add(1, Ordering::Relaxed);
            let harm =
                (self.clients == Clients::Harmed).then(|| Rng::new(seed.wrapping_add(number)));
            Ok(Box::new(Client { process, seen: Arc::clone(&seen), manner: self.manner, harm }))
        };
        let options = RunOpts {
            processes: many,
            txns: self.transactions,
            r#gen: transactions(),
            seed,
            ..RunOpts::default()
        };
        let from = Instant::now();
        let (mut lines, stats) = adya::run::run(&connect, &options).unwrap();
        drop(together);
        let took = from.elapsed().as_secs_f64();
        let keys = History::parse(&lines).keys();
        let last = Client {
            process: start(1),
            seen: Arc::clone(&seen),
            manner: Manner::Whole,
            harm: None,
        };
        let keys: Vec<TxnOp> = keys.into_iter().map(TxnOp::Read).collect();
        if let Err(refused) = last_word(last, &keys, from, &mut lines) {
            tally.broken(format!("{}, the last reads: {refused}", self.name()));
            return None;
        }
        self.judge(&seen, stats, took, tally);
        store.verified();
        Some(History::parse(&lines))
    }

    fn judge(&self, seen: &Seen, stats: Stats, took: f64, tally: &mut Tally) {
        let committed = stats.ok as f64 / self.transactions as f64;
        let a_second = stats.ok as f64 / took;
        println!(
            "  {}, {:?}: {} transactions, {} committed ({:.1} %, {a_second:.0} a second), {} not \
             applied, {} unknown, {} attempts, {} stops, in {took:.1} s; why not: {:?}",
            self.name(),
            self.manner,
            self.transactions,
            stats.ok,
            committed * 100.0,
            stats.fail,
            stats.info,
            seen.attempts.load(Ordering::Relaxed),
            seen.stops.load(Ordering::Relaxed),
            seen.refusals.lock().unwrap(),
        );
        for wrong in seen.asked.wrong.lock().unwrap().iter() {
            tally.broken(format!("{}: {wrong}", self.name()));
        }
        tally.holds(stats.ok + stats.fail + stats.info == self.transactions, || {
            format!("{}: a client stopped", self.name())
        });
        if self.manner == Manner::InPieces {
            return;
        }
        tally.count("transactions", self.transactions as u64);
        tally.count("of them committed", stats.ok as u64);
        tally.count("of unknown outcome", stats.info as u64);
        tally.count("processes stopped for a while", seen.stops.load(Ordering::Relaxed));
        let is_enough = committed >= LEAST_COMMITTED;
        tally.count("runs of which 30 % were committed", u64::from(is_enough));
        if self.needs_speed() {
            let is_fast = a_second >= LEAST_A_SECOND;
            tally.count(FAST, u64::from(is_fast));
        }
    }
}

/// One more process, after all others have ended, reads everything: what was acknowledged and lost cannot
/// hide behind the last read of its key. At the very end it reads one key alone, the one with most to it: of one
/// that is empty, since whoever appended to it was killed, a read that saw nothing would be right.
fn last_word(
    mut last: Client,
    keys: &[TxnOp],
    from: Instant,
    lines: &mut String,
) -> Result<(), String> {
    let mut read = |ops: &[TxnOp]| {
        let mut record = |kind: &str, reads: &[Option<Vec<i64>>]| {
            let (index, time) = (lines.lines().count(), from.elapsed().as_nanos() as u64);
            lines.push_str(&op_line(index, kind, LAST, time, ops, reads, true));
        };
        record("invoke", &[]);
        match last.txn(ops) {
            Outcome::Ok(reads) => {
                record("ok", &reads);
                Ok(reads)
            }
            refused => Err(format!("{refused:?}")),
        }
    };
    let mut lengths = Vec::new();
    for ops in keys.chunks(transactions().max_txn_len) {
        lengths.extend(read(ops)?.iter().map(|list| list.as_ref().map_or(0, Vec::len)));
    }
    let longest = (0..keys.len()).max_by_key(|at| lengths.get(*at)).unwrap_or(0);
    read(&keys[longest..=longest]).map(drop)
}

fn summary(report: &Report) -> String {
    let mut text = format!("valid: {:?}, ", report.valid);
    let found: usize = report.anomalies.values().map(Vec::len).sum();
    let _ = write!(text, "{found} anomalies {:?}", report.anomaly_types);
    text
}

/// Nothing is found in it. Otherwise it is kept, with the proofs of what was found.
fn sound(traffic: &Traffic, history: &History, tally: &mut Tally) {
    let from = Instant::now();
    let report = history.checked(STRICT);
    let nobodys = history.nobodys();
    let outside = from.elapsed();
    let faults = history.faults();
    println!(
        "  {}: {STRICT}: {}, {} elements that nobody appended, in {:.1} s; {} faults by versions, in \
         {:.1} s",
        traffic.name(),
        summary(&report),
        nobodys.len(),
        outside.as_secs_f64(),
        faults.len(),
        (from.elapsed() - outside).as_secs_f64(),
    );
    tally.count("histories judged by both checkers", 1);
    if report.valid == Valid::True && nobodys.is_empty() && faults.is_empty() {
        return;
    }
    let kept = std::env::temp_dir().join(format!("tai-state-history-{}.jsonl", traffic.seed));
    std::fs::write(&kept, history.text()).unwrap();
    let proofs = report.anomalies.values().filter_map(|found| found.first());
    let proofs: Vec<&str> = proofs.map(|found| found.explanation.as_str()).collect();
    tally.broken(format!(
        "{}: {}\nnobody appended: {nobodys:?}\nby versions: {faults:#?}\nkept: {}\n{}",
        traffic.name(),
        summary(&report),
        kept.display(),
        proofs.join("\n")
    ));
}

/// Something is found in it, for sure, by both.
fn caught(what: &str, history: &History, tally: &mut Tally) {
    let outside = history.checked(STRICT).valid == Valid::False;
    let own = !history.faults().is_empty();
    if outside != own {
        println!("  the checkers do not agree on {what}: adya {outside}, versions {own}");
    }
    tally.control(what, u64::from(outside && own), 1, 1);
}

/// The checkers notice what is broken: `adya`'s own simulated databases, at all the levels below
/// serializable that it has. What is not broken passes.
fn simulations(seed: u64, many: usize) -> Tally {
    let mut tally = Tally::default();
    let simulated = |isolation| {
        History::parse(&adya::sim::run(&SimOpts {
            isolation,
            processes: many,
            txns: SIMULATED,
            r#gen: transactions(),
            seed,
            ..SimOpts::default()
        }))
    };
    let serializable = simulated(Isolation::Serializable);
    let (report, faults) = (serializable.checked(STRICT), serializable.faults());
    tally.holds(report.valid == Valid::True && faults.is_empty(), || {
        format!("a false alarm: {}, {faults:?}", summary(&report))
    });
    for (name, isolation) in [
        ("snapshot isolation", Isolation::SnapshotIsolation),
        ("read committed", Isolation::ReadCommitted),
        ("read uncommitted", Isolation::ReadUncommitted),
        ("lost update", Isolation::LostUpdate),
    ] {
        caught(&format!("adya's database at {name}"), &simulated(isolation), &mut tally);
    }
    tally
}
