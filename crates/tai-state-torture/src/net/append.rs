//! Elements that are appended through faults under keys: those that were acknowledged are there once,
//! those that failed are not there, the others at most once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tai_state::testing::proxy::{Fault, Rule, When};
use tai_state::{
    Error, NewTransition, StateMachinePersister, StateStore, StoreOptions, TransactionManager,
};
use tokio::task::JoinSet;

use super::field::{APPEND, Field};
use super::{snapshot, why};
use crate::random::Random;
use crate::run::Tally;

/// Of each handle.
const TASKS: u64 = 2;
/// Elements of one task in one list, so that no list grows without end.
const IN_ONE: u64 = 50;

/// What its writer was told of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    Done,
    Failed,
    Unknown,
}

/// Elements are numbered: the task in the upper half.
#[derive(Debug, Default)]
pub(super) struct Append {
    told: Mutex<BTreeMap<u64, Told>>,
}

fn list(element: u64) -> String {
    let kind = if element.is_multiple_of(2) { "list" } else { "log" };
    format!("{kind}-{}", (element & 0xffff_ffff) / IN_ONE)
}

impl Append {
    pub(super) fn start(
        self: &Arc<Self>,
        field: &Arc<Field>,
        handles: &[StateStore],
        random: &mut Random,
        tasks: &mut JoinSet<()>,
    ) {
        let mut number = 0;
        for handle in handles {
            for _ in 0..TASKS {
                let (append, field) = (Arc::clone(self), Arc::clone(field));
                let (handle, mut random) = (handle.clone(), Random::new(random.next()));
                let first = number << 32;
                number += 1;
                tasks.spawn(async move {
                    for element in first.. {
                        if field.is_over() {
                            return;
                        }
                        let told = one(&field, &handle, element, &mut random).await;
                        append.told.lock().unwrap().insert(element, told);
                        if told == Told::Done {
                            field.did(APPEND);
                        }
                    }
                });
            }
        }
    }

    pub(super) async fn judge(&self, direct: &StateStore, tally: &mut Tally) {
        let told = self.told.lock().unwrap().clone();
        let found = found(direct, told.keys().copied()).await;
        let of = |wanted: Told| told.values().filter(|told| **told == wanted).count() as u64;
        tally.count("elements appended", of(Told::Done));
        tally.count("elements of unknown outcome", of(Told::Unknown));
        tally.count("elements that failed", of(Told::Failed));
        for how in wrong(&told, &found) {
            tally.broken(how);
        }
        let report = direct.validate_consistency("append").await.unwrap();
        tally.holds(report.ok, || format!("the lists' log: {:?}", report.problems));
    }
}

/// Appends one element under a key of its own. What stays unknown is sent again in half of the cases:
/// it is answered, or done once.
async fn one(field: &Field, store: &StateStore, element: u64, random: &mut Random) -> Told {
    let mut may_be_there = false;
    loop {
        let answer = if element.is_multiple_of(2) {
            field.call("an append to a list", to_list(store, element)).await
        } else {
            field.call("an append to a log", to_log(store, element)).await
        };
        match answer {
            Some(Ok(())) => return Told::Done,
            Some(Err(error)) => {
                may_be_there |= matches!(error, Error::OutcomeUnknown { .. });
                field.failed("an append", &error).await;
            }
            None => may_be_there = true,
        }
        if field.is_over() || random.percent(50) {
            return if may_be_there { Told::Unknown } else { Told::Failed };
        }
    }
}

async fn to_list(store: &StateStore, element: u64) -> Result<(), Error> {
    let (id, key) = (list(element), format!("element-{element}"));
    let id = id.as_str();
    let manager = TransactionManager::new(store);
    let once = manager.execute_once("append", key, |tx| async move {
        let mut all = match tx.get_state("append", id).await {
            Ok((state, _)) => state.data,
            Err(Error::StateNotFound { .. }) => json!([]),
            Err(error) => return Err(error),
        };
        all.as_array_mut().unwrap().push(json!(element));
        tx.save_state("append", id, snapshot(id, all), why()).await.map(drop)
    });
    once.await
}

async fn to_log(store: &StateStore, element: u64) -> Result<(), Error> {
    let keyed = store.idempotency_key(format!("element-{element}"))?;
    let next = NewTransition::to("append", list(element), "append", json!(element), why());
    StateMachinePersister::with_defaults(keyed).append(next).await.map(drop)
}

/// How often each element is there.
async fn found(direct: &StateStore, elements: impl Iterator<Item = u64>) -> BTreeMap<u64, u64> {
    let mut lists: Vec<String> = elements.map(list).collect();
    lists.sort();
    lists.dedup();
    let mut found = BTreeMap::new();
    let mut count = |element: &Value| *found.entry(element.as_u64().unwrap()).or_default() += 1;
    for list in lists {
        if list.starts_with("list") {
            match direct.get_state("append", &list).await {
                Ok((state, _)) => state.data.as_array().unwrap().iter().for_each(&mut count),
                Err(Error::StateNotFound { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            continue;
        }
        let mut history = match direct.history("append", &list, ..).await {
            Ok(history) => history,
            Err(Error::StateNotFound { .. }) => continue,
            Err(error) => panic!("{error}"),
        };
        while let Some(event) = history.next().await.unwrap() {
            count(&event.to_state.data);
        }
    }
    found
}

/// What is not as it was told.
fn wrong(told: &BTreeMap<u64, Told>, found: &BTreeMap<u64, u64>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (element, told) in told {
        let times = found.get(element).copied().unwrap_or(0);
        let holds = match told {
            Told::Done => times == 1,
            Told::Failed => times == 0,
            Told::Unknown => times <= 1,
        };
        if !holds {
            wrong.push(format!("element {element}: {told:?}, and there {times} times"));
        }
    }
    for element in found.keys().filter(|element| !told.contains_key(element)) {
        wrong.push(format!("element {element} was never appended"));
    }
    wrong
}

/// A client that takes what it does not know for not done, and has no keys: how many elements are not
/// there once, as they are said to be.
pub(super) async fn blind(behind: &super::Behind, mut options: StoreOptions, many: u64) -> u64 {
    options.never_settle = true;
    let store = behind.store(options).await;
    let mut told = BTreeMap::new();
    for element in (1..).step_by(2).take(many as usize) {
        let persister = StateMachinePersister::with_defaults(store.clone());
        behind.proxy.clear_rules();
        behind.proxy.inject(Rule::new("Commit", When::Nth(1), Fault::LoseReply));
        for _ in 0..2 {
            let next = NewTransition::to("append", list(element), "append", json!(element), why());
            if persister.append(next).await.is_ok() {
                break;
            }
        }
        told.insert(element, Told::Done);
    }
    wrong(&told, &found(&behind.direct, told.keys().copied()).await).len() as u64
}
