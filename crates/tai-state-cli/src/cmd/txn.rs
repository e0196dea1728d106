//! `txn`: run transactions, one JSON object a line, one answer a line.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value, json};
use tai_state::{
    ChangeMetadata, Error, StateId, StateSnapshot, StateStore, Transaction, TransactionManager,
    json as strict,
};
use tokio::sync::{Semaphore, mpsc};

use crate::args::Txn;
use crate::cmd::lines::Lines;
use crate::failure::{Failure, Outcome, exit};
use crate::{address, output};

/// One line in.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    #[serde(default)]
    pub(crate) id: Value,
    pub(crate) ops: Vec<Op>,
    #[serde(default)]
    pub(crate) actor: Option<String>,
    #[serde(default)]
    pub(crate) reason: String,
}

/// One step of a transaction.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Op {
    Get { state: String, expect: Option<u64> },
    Put { state: String, data: Value, expect: Option<u64> },
    Merge { state: String, data: Value, expect: Option<u64> },
    Append { state: String, value: Value, expect: Option<u64> },
    Add { state: String, value: Number, expect: Option<u64> },
    Delete { state: String, expect: Option<u64> },
}

impl Op {
    pub(crate) fn target(&self) -> (&'static str, &str, Option<u64>) {
        match self {
            Self::Get { state, expect } => ("get", state, *expect),
            Self::Put { state, expect, .. } => ("put", state, *expect),
            Self::Merge { state, expect, .. } => ("merge", state, *expect),
            Self::Append { state, expect, .. } => ("append", state, *expect),
            Self::Add { state, expect, .. } => ("add", state, *expect),
            Self::Delete { state, expect } => ("delete", state, *expect),
        }
    }
}

pub(crate) async fn run(store: &StateStore, args: &Txn) -> Outcome {
    let mut lines = Lines::open(&args.file)?;
    let manager = TransactionManager::new(store);
    let permits = Arc::new(Semaphore::new(usize::from(args.concurrency)));
    let (sender, mut received) = mpsc::channel::<Outcome<(u64, String)>>(1);
    let reading = tokio::task::spawn_blocking(move || {
        loop {
            let line = match lines.next() {
                Ok(None) => return,
                Ok(Some(line)) => Ok((line.number, line.text.to_owned())),
                Err(failure) => Err(failure),
            };
            let is_last = line.is_err();
            if sender.blocking_send(line).is_err() || is_last {
                return;
            }
        }
    });
    let mut tasks = tokio::task::JoinSet::new();
    let mut malformed = 0u64;
    let mut broken = None;
    while let Some(line) = received.recv().await {
        let (number, text) = match line {
            Ok(line) => line,
            Err(failure) => {
                broken = Some(failure);
                break;
            }
        };
        // Before anything is answered, so that with one at a time the answers keep their order.
        let permit = Arc::clone(&permits).acquire_owned().await;
        let request = match parse(&text, number) {
            Ok(request) => request,
            Err(refusal) => {
                let (id, failure) = *refusal;
                malformed += 1;
                output::line(&output::compact(&refused(&id, failure, "not_applied")))?;
                continue;
            }
        };
        let (store, manager) = (store.clone(), manager.clone());
        let actor = request.actor.clone().unwrap_or_else(|| args.actor.clone());
        tasks.spawn(async move {
            let answer = answer(&store, &manager, &request, &actor).await;
            let written = output::line(&output::compact(&answer));
            drop(permit);
            written
        });
        while let Some(done) = tasks.try_join_next() {
            joined(done)?;
        }
    }
    while let Some(done) = tasks.join_next().await {
        joined(done)?;
    }
    drop(received);
    let _ = reading.await;
    match (broken, malformed) {
        (Some(failure), _) => Err(failure),
        (None, 0) => Ok(()),
        (None, count) => Err(Failure::rejected(format!("{count} lines were no transactions"))),
    }
}

fn joined(done: Result<Outcome, tokio::task::JoinError>) -> Outcome {
    done.unwrap_or_else(|error| Err(Failure::new(exit::OTHER, "other", error.to_string())))
}

/// One line, or why it is none, and the id that it has all the same.
pub(crate) fn parse(text: &str, number: u64) -> Result<Request, Box<(Value, Failure)>> {
    let place = format!("line {number}");
    let value =
        strict::parse(text, &place).map_err(|error| Box::new((Value::Null, error.into())))?;
    let id = value.get("id").cloned().unwrap_or(Value::Null);
    let request: Request =
        strict::from_value(value, &place).map_err(|error| Box::new((id.clone(), error.into())))?;
    for op in &request.ops {
        address(op.target().1)
            .map_err(|failure| Box::new((id.clone(), failure.context(&place))))?;
    }
    Ok(request)
}

async fn answer(
    store: &StateStore,
    manager: &TransactionManager,
    request: &Request,
    actor: &str,
) -> Value {
    let metadata = ChangeMetadata::new(actor, &request.reason, None);
    let asked = json!({ "ops": request.ops });
    let outcome = manager
        .run(|transaction| {
            let (metadata, asked) = (metadata.clone(), &asked);
            async move {
                if let Some(key) = key(&request.id)
                    && let Some(first) = transaction.idempotency_key_of(key, asked).await?
                {
                    return Ok((first, true));
                }
                let mut results = Vec::with_capacity(request.ops.len());
                for op in &request.ops {
                    results.push(step(&transaction, op, &metadata).await?);
                }
                if key(&request.id).is_some() {
                    transaction.answer(&kept(&results)).await?;
                }
                Ok((results, false))
            }
        })
        .await;
    let (was_answered, outcome) = match outcome {
        Ok(done) => {
            let (results, was_answered) = done.value;
            let results = match was_answered {
                true => filled(store, request, results).await,
                false => Ok(results),
            };
            (was_answered, results.map(|results| (results, done.attempts)))
        }
        Err(error) => (false, Err(error)),
    };
    said(&request.id, outcome, was_answered)
}

/// The line that says it. What was answered before was applied, also if its answer cannot be told again.
fn said(id: &Value, outcome: Result<(Vec<Value>, u32), Error>, was_answered: bool) -> Value {
    match outcome {
        Ok((results, attempts)) => {
            json!({ "id": id, "ok": true, "results": results, "attempts": attempts })
        }
        Err(error) => {
            let outcome = match error {
                _ if was_answered => "applied",
                Error::OutcomeUnknown { .. } => "unknown",
                _ => "not_applied",
            };
            refused(id, error.into(), outcome)
        }
    }
}

/// The idempotency key of a line: its id, if it has one.
fn key(id: &Value) -> Option<String> {
    match id {
        Value::Null => None,
        // As JSON: 5 and "5" are two ids.
        id => Some(format!("txn {}", strict::canonical(id))),
    }
}

/// More text than this is not kept in an answer; what was read can be read again at its version.
const MOST_KEPT: usize = 64 << 10;

/// The results as they are kept under the id.
fn kept(results: &[Value]) -> Vec<Value> {
    let mut bytes = 0;
    let shortened = |result: &Value| {
        bytes += result.to_string().len();
        match result {
            // What is absent cannot be read again, and is not large.
            Value::Object(fields) if bytes > MOST_KEPT => match fields.get("version") {
                Some(version) if *version != json!(0) => json!({ "version": version }),
                _ => result.clone(),
            },
            whole => whole.clone(),
        }
    };
    results.iter().map(shortened).collect()
}

/// The kept results, with what was too large to be kept read again.
async fn filled(
    store: &StateStore,
    request: &Request,
    mut results: Vec<Value>,
) -> Result<Vec<Value>, Error> {
    for (op, result) in request.ops.iter().zip(&mut results) {
        let (Op::Get { state: target, .. }, Value::Object(fields)) = (op, result) else { continue };
        if fields.contains_key("data") {
            continue;
        }
        let version = fields.get("version").and_then(Value::as_u64).unwrap_or(0);
        let (governor, state) = target.split_once('/').unwrap_or((target, ""));
        let data = store.state_at_version(governor, state, version).await?.data;
        fields.insert("data".into(), data);
    }
    Ok(results)
}

fn refused(id: &Value, failure: Failure, outcome: &str) -> Value {
    let mut answer = failure.to_json();
    if let Value::Object(fields) = &mut answer {
        fields.insert("id".into(), id.clone());
        fields.insert("ok".into(), false.into());
        fields.insert("outcome".into(), outcome.into());
    }
    answer
}

async fn step(
    transaction: &Transaction,
    op: &Op,
    metadata: &ChangeMetadata,
) -> Result<Value, Error> {
    let (action, target, expect) = op.target();
    // The address was checked when the line was read.
    let (governor, state) = target.split_once('/').unwrap_or((target, ""));
    let before = match transaction.get_state(governor, state).await {
        Ok((before, _)) => Some(before),
        Err(Error::StateNotFound { .. }) => None,
        Err(error) => return Err(error),
    };
    let actual = before.as_ref().map_or(0, |before| before.version);
    if let Some(expected) = expect.filter(|expected| *expected != actual) {
        let (governor, state) = (governor.to_owned(), state.to_owned());
        return Err(Error::VersionConflict { governor, state, expected, actual });
    }
    let refuse = |reason: &str| {
        Err(Error::InvalidState { subject: target.to_owned(), reason: reason.to_owned() })
    };
    let data = before.as_ref().map(|before| before.data.clone());
    let after = match op {
        Op::Get { .. } => {
            return Ok(json!({"version": actual, "data": data}));
        }
        Op::Delete { .. } => {
            let version = transaction.delete_state(governor, state, None, metadata.clone()).await?;
            return Ok(json!({"version": version}));
        }
        Op::Put { data, .. } => data.clone(),
        Op::Merge { data: patch, .. } => {
            let mut merged = data.unwrap_or(Value::Null);
            json_patch::merge(&mut merged, patch);
            merged
        }
        Op::Append { value, .. } => match data {
            None => json!([value]),
            Some(Value::Array(mut items)) => {
                items.push(value.clone());
                Value::Array(items)
            }
            Some(_) => return refuse("append: it is not an array"),
        },
        Op::Add { value, .. } => match data {
            None => Value::Number(value.clone()),
            Some(Value::Number(number)) => match sum(&number, value) {
                Some(sum) => Value::Number(sum),
                None => return refuse("add: the sum cannot be held"),
            },
            Some(_) => return refuse("add: it is not a number"),
        },
    };
    let mut to = StateSnapshot::new(StateId::from(state), after, metadata.clone());
    if let Some(before) = &before {
        to.causality = before.causality.clone();
    }
    let event = transaction
        .log_transition(governor, before.as_ref(), &to, action, metadata.clone())
        .await?;
    Ok(json!({"version": event.version()}))
}

/// The sum, exactly for integers; `None` when it overflows.
fn sum(a: &Number, b: &Number) -> Option<Number> {
    let integer = |n: &Number| n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from));
    match (integer(a), integer(b)) {
        (Some(a), Some(b)) => {
            let sum = a.checked_add(b)?;
            i64::try_from(sum)
                .map(Number::from)
                .or_else(|_| u64::try_from(sum).map(Number::from))
                .ok()
        }
        _ => Number::from_f64(a.as_f64()? + b.as_f64()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_say_whether_it_was_applied() {
        let lost = || Error::Timeout {
            operation: "reading".into(),
            after: std::time::Duration::from_secs(1),
        };
        let unknown = Error::OutcomeUnknown {
            governor: "g".into(),
            state: "s".into(),
            version: 1,
            event_id: "e".into(),
            source: None,
        };
        let id = json!("t");
        let done = said(&id, Ok((vec![json!({"version": 1})], 2)), false);
        assert_eq!(
            done,
            json!({"id": "t", "ok": true, "results": [{"version": 1}], "attempts": 2})
        );
        for (error, was_answered, outcome) in
            [(lost(), false, "not_applied"), (lost(), true, "applied"), (unknown, false, "unknown")]
        {
            let told = said(&id, Err(error), was_answered);
            assert_eq!((&told["ok"], &told["outcome"]), (&json!(false), &json!(outcome)), "{told}");
        }
    }

    #[test]
    fn sums_are_exact_or_refused() {
        let n = |value: Value| value.as_number().cloned().unwrap();
        for (a, b, expected) in [
            (json!(1), json!(2), Some(json!(3))),
            (json!(i64::MAX), json!(1), Some(json!(9_223_372_036_854_775_808_u64))),
            (json!(u64::MAX), json!(1), None),
            (json!(i64::MIN), json!(-1), None),
            (json!(0.1), json!(0.2), Some(json!(0.1 + 0.2))),
            (json!(1e308), json!(1e308), None),
            (json!(1), json!(0.5), Some(json!(1.5))),
        ] {
            assert_eq!(sum(&n(a), &n(b)).map(Value::Number), expected);
        }
    }
}
