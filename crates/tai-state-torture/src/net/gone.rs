//! SIGKILL of the service while everything goes on, and its return without its documents on the same port.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::{
    Error, FirestoreStore, ListOptions, NewTransition, StateMachinePersister, StateStore,
    TransactionManager,
};
use tokio::task::JoinSet;

use super::append::Append;
use super::bank::Bank;
use super::field::Field;
use super::locks::Locks;
use super::{BACK, open, options, snapshot, why};
use crate::random::Random;
use crate::run::{Run, Tally};

const ATTEMPT: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_millis(1_500);
const LEASE: Duration = Duration::from_secs(2);

/// One of each kind of call, against the clock.
async fn calls(field: &Field, store: &StateStore) -> Vec<(&'static str, Result<(), Error>)> {
    let manager = TransactionManager::new(store);
    let persister = StateMachinePersister::with_defaults(store);
    let mut told = Vec::new();
    macro_rules! call {
        ($what:literal, $limit:expr, $call:expr) => {
            if let Some(answer) = field.within($what, $limit, $call).await {
                told.push(($what, answer.map(drop)));
            }
        };
    }
    let new = || snapshot("s", json!(2));
    call!("get", DEADLINE, store.get_state("g", "s"));
    call!("save", DEADLINE, store.save_state("g", "s", new(), why()));
    call!("save, new", DEADLINE, store.save_state("g", "new", new(), why()));
    call!("update", DEADLINE, store.update_state("g", "s", new(), 1, why()));
    call!("list", DEADLINE, store.list_states("g", &ListOptions::default()));
    let next = NewTransition::to("g", "s", "step", json!(3), why());
    call!("append", DEADLINE, persister.append(next));
    let keyed = store.idempotency_key("k").unwrap();
    call!("save, keyed", DEADLINE, keyed.save_state("g", "keyed", new(), why()));
    call!("load", DEADLINE, persister.load_state("g", "s"));
    call!(
        "transaction",
        DEADLINE,
        manager.run(|tx| async move {
            let (state, version) = tx.get_state("g", "s").await?;
            tx.update_state("g", "s", state, version, why()).await
        })
    );
    call!("lock", ATTEMPT, manager.try_acquire_lock("r", "me", LEASE));
    call!("locks", DEADLINE, manager.list_locks());
    told
}

pub(super) async fn run(run: &Run, emulator: &Arc<Emulator>, tally: &mut Tally) {
    let project = fresh_project();
    let options = options(8, ATTEMPT, DEADLINE);
    let store = open(emulator.address(), &project, options.clone()).await;
    store.save_state("g", "s", snapshot("s", json!(1)), why()).await.unwrap();
    let field = Arc::new(Field::new(DEADLINE, ATTEMPT));
    // Money, lists and locks, in the midst of which it dies.
    let mut handles = Vec::new();
    for _ in 0..2 {
        handles.push(open(emulator.address(), &project, options.clone()).await);
    }
    let (mut random, mut tasks) = (Random::new(run.seed), JoinSet::new());
    Bank::open(&store).await.start(&field, &handles, &mut random, &mut tasks);
    Arc::<Append>::default().start(&field, &handles, &mut random, &mut tasks);
    Arc::<Locks>::default().start(&field, &handles, &mut random, &mut tasks);
    field.back_again().await;

    field.now("the service is dead");
    emulator.kill().unwrap();
    for (what, told) in calls(&field, &store).await {
        tally.count("calls of a dead service", 1);
        let is_fair = |e: &Error| e.is_transient() || matches!(e, Error::OutcomeUnknown { .. });
        tally.holds(told.as_ref().is_err_and(is_fair), || format!("dead: {what}: {told:?}"));
    }

    // What was on its way has been answered by now.
    let done = field.done();
    field.now("the service came back empty");
    field.replaced();
    emulator.restart().await.unwrap();
    let started = Instant::now();
    for (what, told) in calls(&field, &store).await {
        tally.count("calls of an emptied service", 1);
        tally.holds(matches!(told, Err(Error::StoreReplaced { .. })), || {
            format!("emptied: {what}: {told:?}")
        });
    }
    tally.holds(started.elapsed() < BACK, || "emptied: not noticed in time".to_owned());
    // Nothing was made there: who may not create finds no store.
    let mut never = options.clone();
    never.create = false;
    let found = FirestoreStore::builder(&project)
        .emulator(emulator.address())
        .options(never)
        .connect()
        .await;
    tally.holds(matches!(found, Err(Error::NotAStore { .. })), || {
        format!("an emptied service was made a store again: {found:?}")
    });
    // Nor does anything that went on all the while get through, whatever it tries next.
    tokio::time::sleep(2 * DEADLINE).await;
    field.end();
    while let Some(ended) = tasks.join_next().await {
        tally.holds(ended.is_ok(), || "gone: a task panicked".to_owned());
    }
    tally.holds(field.done() == done, || {
        format!("an emptied service did as it was told: {done:?}, then {:?}", field.done())
    });
    tally.count("calls of money, lists and locks told that it was emptied", field.told_so());
    tally.at_least("calls of money, lists and locks told that it was emptied", 20);
    field.judge(tally);
    // A client that opens anew whatever it finds, and is told of nothing.
    let anew = open(emulator.address(), &project, options).await;
    let told = calls(&Field::new(DEADLINE, ATTEMPT), &anew).await;
    let missed = told.iter().filter(|(_, told)| !matches!(told, Err(Error::StoreReplaced { .. })));
    let (of, missed) = (told.len() as u64, missed.count() as u64);
    tally.control("a client opens anew what came back empty", missed, of, of);
}
