//! A client: it gives its transactions to a process `tai-state txn` and reads what became of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use adya::r#gen::{Rng, TxnOp};
use adya::run::Outcome;
use serde_json::{Value, json};

use crate::process::{ANSWER, Asked, Process};

/// How often a process is killed that may be, and how long it has had for its transaction at most.
const KILLED: f64 = 0.1;
const KILLED_WITHIN_MICROS: u64 = 5_000;
/// How often one is stopped in the middle of it, and for how long at most.
const STOPPED: f64 = 0.02;
const STOPPED_FOR_MILLIS: u64 = 300;

/// What the clients of a run have seen beside the outcomes.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) asked: Arc<Asked>,
    pub(crate) attempts: AtomicU64,
    pub(crate) stops: AtomicU64,
    /// Why transactions were not applied, or not known to be.
    pub(crate) refusals: Mutex<BTreeMap<String, u64>>,
}

impl Seen {
    fn wrong(&self, what: String) -> Outcome {
        self.asked.wrong(what.clone());
        Outcome::Info(what)
    }

    fn refused(&self, why: String) -> String {
        *self.refusals.lock().unwrap().entry(why.clone()).or_default() += 1;
        why
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
    pub(crate) seen: Arc<Seen>,
    pub(crate) manner: Manner,
    /// Draws in which transactions the process is killed or stopped while it is at them.
    pub(crate) harm: Option<Rng>,
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
        let seen = &self.seen;
        let mut within = ANSWER;
        let mut stopped = None;
        if let Some(random) = &mut self.harm {
            if random.chance(KILLED) {
                within = Duration::from_micros(random.below(KILLED_WITHIN_MICROS));
            } else if random.chance(STOPPED) {
                stopped = Some(Duration::from_millis(random.below(STOPPED_FOR_MILLIS)));
                seen.stops.fetch_add(1, Ordering::Relaxed);
            }
        }
        let answer = match stopped {
            Some(stopped) => self.process.ask_stopped(&asked, stopped),
            None => self.process.ask(&asked, within),
        };
        let Some(answer) = answer else {
            if within < ANSWER {
                return Outcome::Info(seen.refused("killed".into()));
            }
            return seen.wrong("tai-state txn ended or hung before it answered".into());
        };
        if answer["ok"] == true {
            seen.attempts.fetch_add(answer["attempts"].as_u64().unwrap_or(0), Ordering::Relaxed);
            return match read(ops, &answer) {
                Some(reads) => Outcome::Ok(reads),
                None => seen.wrong(format!("{asked:?} was answered by {answer}")),
            };
        }
        let text = |field: &str| answer[field].as_str().unwrap_or_default();
        let why = seen.refused(format!("{}, {}", text("outcome"), text("code")));
        match answer["outcome"].as_str() {
            Some("not_applied") => Outcome::Fail(why),
            Some("unknown") => Outcome::Info(why),
            _ => seen.wrong(format!("an outcome that there is not: {answer}")),
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
