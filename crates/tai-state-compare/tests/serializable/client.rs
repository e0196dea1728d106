//! A client: it gives its transactions to a process `tai-state txn` and reads what became of them.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use adya::r#gen::{Rng, TxnOp};
use adya::run::Outcome;
use serde_json::{Value, json};

use crate::binary;

/// Longer than any call may take; then the process is given up.
const ANSWER: Duration = Duration::from_secs(120);
/// How often a process is killed that may be, and how long it has had for its transaction at most.
const KILLED: f64 = 0.1;
const KILLED_WITHIN_MICROS: u64 = 5_000;

/// What the clients of a run have seen beside the outcomes.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// So that each transaction has an id of its own.
    asked: AtomicU64,
    pub(crate) attempts: AtomicU64,
    /// Why transactions were not applied, or not known to be.
    pub(crate) refusals: Mutex<BTreeMap<String, u64>>,
    /// What must not happen at all: answers that make no sense, processes that end.
    pub(crate) wrong: Mutex<Vec<String>>,
}

impl Tally {
    fn wrong(&self, what: String) -> Outcome {
        self.wrong.lock().unwrap().push(what.clone());
        Outcome::Info(what)
    }

    fn refused(&self, why: String) -> String {
        *self.refusals.lock().unwrap().entry(why.clone()).or_default() += 1;
        why
    }
}

/// One process `tai-state txn`, asked by one client or by several.
#[derive(Debug)]
pub(crate) struct Process {
    child: Mutex<Child>,
    /// By us: that it ended is no wonder.
    killed: AtomicBool,
    stdin: Mutex<Option<ChildStdin>>,
    waiting: Arc<Mutex<HashMap<String, Sender<Value>>>>,
    reader: Option<JoinHandle<()>>,
    tally: Arc<Tally>,
}

impl Process {
    pub(crate) fn start(url: &str, concurrency: usize, tally: &Arc<Tally>) -> Self {
        let mut command = binary::command(url, &["txn", "--concurrency", &concurrency.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let waiting = Arc::new(Mutex::new(HashMap::<String, Sender<Value>>::new()));
        let (waiters, tell) = (Arc::clone(&waiting), Arc::clone(tally));
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            // A line that a kill cut off is no answer.
            while stdout.read_line(&mut line).is_ok() && line.ends_with('\n') {
                let answer: Option<Value> = serde_json::from_str(&line).ok();
                let waiter = answer.as_ref().and_then(|answer| answer["id"].as_str());
                let waiter = waiter.and_then(|id| waiters.lock().unwrap().remove(id));
                match (answer, waiter) {
                    // Whoever has given up waiting has said so.
                    (Some(answer), Some(waiter)) => drop(waiter.send(answer)),
                    _ => drop(tell.wrong(format!("nobody asked for: {line}"))),
                }
                line.clear();
            }
            // The senders go, so that nobody waits for a process that has ended.
            waiters.lock().unwrap().clear();
        });
        Self {
            child: Mutex::new(child),
            killed: AtomicBool::new(false),
            stdin: Mutex::new(stdin),
            waiting,
            reader: Some(reader),
            tally: Arc::clone(tally),
        }
    }

    /// The answer to one transaction; none if the process ended before it or did not give it within
    /// this time, after which it is killed.
    fn ask(&self, ops: &[Value], within: Duration) -> Option<Value> {
        let id = format!("t{}", self.tally.asked.fetch_add(1, Ordering::Relaxed));
        let answer = self.send(&id, ops).recv_timeout(within).ok();
        if answer.is_none() {
            self.killed.store(within < ANSWER, Ordering::Relaxed);
            let _ = self.child.lock().unwrap().kill();
        }
        answer
    }

    fn send(&self, id: &str, ops: &[Value]) -> Receiver<Value> {
        let (sender, receiver) = channel();
        self.waiting.lock().unwrap().insert(id.to_owned(), sender);
        let line = format!("{}\n", json!({"id": id, "ops": ops}));
        let written = match self.stdin.lock().unwrap().as_mut() {
            Some(stdin) => stdin.write_all(line.as_bytes()).is_ok(),
            None => false,
        };
        if !written {
            self.waiting.lock().unwrap().remove(id);
        }
        receiver
    }
}

impl Drop for Process {
    /// The end of its input is its end.
    fn drop(&mut self) {
        drop(self.stdin.get_mut().unwrap().take());
        let status = self.child.get_mut().unwrap().wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        if !status.success() && !*self.killed.get_mut() {
            self.tally.wrong(format!("tai-state txn ended: {status}"));
        }
    }
}

/// How a client gives a transaction to its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// As one transaction.
    Whole,
    /// Each step as a transaction of its own, which is wrong and must be noticed.
    InPieces,
}

/// What runs the transactions that the checker thinks up.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) process: Arc<Process>,
    pub(crate) manner: Manner,
    /// Draws which transactions are not waited for: their process is killed while it is at them.
    pub(crate) kills: Option<Rng>,
}

impl adya::run::Client for Client {
    fn txn(&mut self, ops: &[TxnOp]) -> Outcome {
        match self.manner {
            Manner::Whole => self.transaction(ops),
            Manner::InPieces => {
                let mut reads = Vec::new();
                for op in ops {
                    match self.transaction(std::slice::from_ref(op)) {
                        Outcome::Ok(read) => reads.extend(read),
                        // The steps before it stay.
                        Outcome::Fail(why) | Outcome::Info(why) => return Outcome::Info(why),
                    }
                }
                Outcome::Ok(reads)
            }
        }
    }
}

impl Client {
    fn transaction(&mut self, ops: &[TxnOp]) -> Outcome {
        let asked: Vec<Value> = ops.iter().map(step).collect();
        let tally = &self.process.tally;
        let drawn = self
            .kills
            .as_mut()
            .and_then(|random| random.chance(KILLED).then(|| random.below(KILLED_WITHIN_MICROS)));
        let within = drawn.map_or(ANSWER, Duration::from_micros);
        let Some(answer) = self.process.ask(&asked, within) else {
            if within < ANSWER {
                return Outcome::Info(tally.refused("killed".into()));
            }
            return tally.wrong("tai-state txn ended or hung before it answered".into());
        };
        if answer["ok"] == true {
            tally.attempts.fetch_add(answer["attempts"].as_u64().unwrap_or(0), Ordering::Relaxed);
            return match read(ops, &answer) {
                Some(reads) => Outcome::Ok(reads),
                None => tally.wrong(format!("{asked:?} was answered by {answer}")),
            };
        }
        let text = |field: &str| answer[field].as_str().unwrap_or_default();
        let why = tally.refused(format!("{}, {}", text("outcome"), text("code")));
        match answer["outcome"].as_str() {
            Some("not_applied") => Outcome::Fail(why),
            Some("unknown") => Outcome::Info(why),
            _ => tally.wrong(format!("an outcome that there is not: {answer}")),
        }
    }
}

fn step(op: &TxnOp) -> Value {
    match op {
        TxnOp::Append(key, value) | TxnOp::Write(key, value) => {
            json!({"op": "append", "state": format!("hot/{key}"), "value": value})
        }
        TxnOp::Read(key) => json!({"op": "get", "state": format!("hot/{key}")}),
    }
}

/// What the reads gave; none if the answer is not one to these steps. As a list grows by one at a
/// time, its length is its version.
fn read(ops: &[TxnOp], answer: &Value) -> Option<Vec<Option<Vec<i64>>>> {
    let results = answer["results"].as_array().filter(|results| results.len() == ops.len())?;
    let read = |(op, result): (&TxnOp, &Value)| {
        let version = result["version"].as_u64()?;
        if !matches!(op, TxnOp::Read(_)) {
            return Some(None);
        }
        let list: Vec<i64> = match &result["data"] {
            Value::Null => Vec::new(),
            data => data.as_array()?.iter().map(Value::as_i64).collect::<Option<_>>()?,
        };
        (list.len() as u64 == version).then_some(Some(list))
    };
    ops.iter().zip(results).map(read).collect()
}
