//! A fault at the k-th commit, for each k and each fault: it is applied once, and the answer is what is
//! stored.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tai_state::testing::emulator::Emulator;
use tai_state::testing::proxy::{Code, Fault, Rule, When};
use tai_state::{
    DistributedLock, Error, NewTransition, StateMachinePersister, StateStore, StoreOptions,
    TransactionManager,
};
use tokio::task::JoinSet;

use super::{Behind, is_short, options, snapshot, why};
use crate::run::{Run, Tally};

const DEADLINE: Duration = Duration::from_secs(20);
/// A fault that takes time takes three times as long as the client asks for.
const ATTEMPT: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(3);
const LEASE: Duration = Duration::from_secs(3_600);
/// One state of each line of commits takes turns with the others.
const KINDS: u64 = 8;
const MET: &str = "commits that met a fault, each kind at each place";
const WRONG: &str = "changes of which a wrong thing was told";

fn quick() -> Vec<Fault> {
    let mut faults = vec![Fault::Reset, Fault::LoseReply, Fault::ResetAfter, Fault::Duplicate];
    for code in [Code::UNAVAILABLE, Code::DEADLINE_EXCEEDED, Code::UNKNOWN, Code::INTERNAL] {
        faults.push(Fault::AnswerAfter(code));
    }
    faults.push(Fault::Answer(Code::UNAVAILABLE));
    faults
}

fn slow() -> Vec<Fault> {
    vec![Fault::DropRequest, Fault::Stall(LATE), Fault::StallRequest(LATE)]
}

pub(super) async fn run(run: &Run, emulator: &Arc<Emulator>, tally: &mut Tally) {
    let (many, few) = if is_short(run) { (24, 4) } else { (200, 40) };
    let mut lines = JoinSet::new();
    for (fault, many) in
        quick().into_iter().map(|f| (f, many)).chain(slow().into_iter().map(|f| (f, few)))
    {
        let emulator = Arc::clone(emulator);
        lines.spawn(async move {
            // A project each: on the emulator a query costs as much as there are documents in one.
            let behind = Behind::new(&emulator).await;
            line(&behind, options(8, ATTEMPT, DEADLINE), Some(fault), many).await
        });
    }
    while let Some(line) = lines.join_next().await {
        match line {
            Ok(line) => tally.add(line),
            Err(error) => tally.broken(format!("k-th commit: {error}")),
        }
    }
    let faults = quick().len() as u64 * many + slow().len() as u64 * few;
    tally.at_least(MET, faults);
    let behind = Behind::new(emulator).await;
    let mut never = options(8, ATTEMPT, DEADLINE);
    never.never_settle = true;
    let blind = line(&behind, never, Some(Fault::LoseReply), KINDS * 2).await;
    let noticed = blind.counted(WRONG);
    tally.control("a refusal is believed without a look", noticed, KINDS * 2, KINDS);
}

/// What is told of the k-th change: the version that it made, and what is stored.
async fn change(k: u64, store: &StateStore, lock: &DistributedLock) -> Result<u64, Error> {
    let kind = k % KINDS;
    let (id, n) = (format!("s{kind}"), k / KINDS);
    let id = id.as_str();
    let data = json!({ "n": n });
    let manager = TransactionManager::new(store);
    match kind {
        0 => store.save_state("g", id, snapshot(id, data), why()).await,
        1 => store.update_state("g", id, snapshot(id, data), n, why()).await,
        2 => {
            let next = NewTransition::to("g", id, "step", data, why());
            let event = StateMachinePersister::with_defaults(store).append(next).await?;
            Ok(event.version())
        }
        3 => {
            let keyed = store.idempotency_key(format!("key-{k}"))?;
            keyed.save_state("g", id, snapshot(id, data), why()).await
        }
        4 => store.fenced_by(lock).save_state("g", id, snapshot(id, data), why()).await,
        5 => {
            let once = manager.execute_once("g", format!("once-{k}"), |tx| async move {
                let n = increment(&tx, id).await?;
                tx.save_state("g", id, snapshot(id, json!({ "n": n })), why()).await
            });
            once.await
        }
        6 => {
            let both = manager.execute_transaction("g", |tx| async move {
                let n = increment(&tx, id).await?;
                tx.save_state("g", "beside", snapshot("beside", json!({ "n": n })), why()).await?;
                tx.save_state("g", id, snapshot(id, json!({ "n": n })), why()).await
            });
            both.await
        }
        // A state that is made and deleted in turns.
        _ if n % 2 == 0 => store.save_state("g", id, snapshot(id, data), why()).await,
        _ => store.delete_state("g", id, Some(n), why()).await,
    }
}

async fn increment(tx: &tai_state::Transaction, id: &str) -> Result<u64, Error> {
    match tx.get_state("g", id).await {
        Ok((state, _)) => Ok(state.data["n"].as_u64().unwrap() + 1),
        Err(Error::StateNotFound { .. }) => Ok(0),
        Err(error) => Err(error),
    }
}

/// A line of changes; each meets the fault when it is first sent.
async fn line(behind: &Behind, options: StoreOptions, fault: Option<Fault>, many: u64) -> Tally {
    let mut tally = Tally::default();
    let is_control = options.never_settle;
    let store = behind.store(options).await;
    let lock =
        TransactionManager::new(&behind.direct).acquire_lock("r", "me", LEASE).await.unwrap();
    // The grant is seen before the first fault.
    for k in 0..many {
        behind.proxy.clear_rules();
        if let Some(fault) = &fault {
            behind.proxy.inject(Rule::new("Commit", When::Nth(1), fault.clone()));
        }
        let what = format!("{fault:?} at commit {k}");
        let told = change(k, &store, &lock).await;
        let met = behind.proxy.calls().iter().filter(|call| call.fault.is_some()).count() as u64;
        behind.proxy.reset_usage();
        tally.count(MET, met.min(1));
        let (id, version) = (format!("s{}", k % KINDS), k / KINDS + 1);
        let is_wrong = match told {
            Ok(told) if told == version => None,
            Ok(told) => Some(format!("v{told} instead of v{version}")),
            Err(error) => Some(error.to_string()),
        };
        if let Some(how) = is_wrong {
            tally.count(WRONG, 1);
            tally.holds(is_control, || format!("{what}: {how}"));
        }
        // What was answered is what is stored, under that version.
        let stored = behind.direct.record("g", &id).await;
        let is_deleted = k % KINDS == KINDS - 1 && version % 2 == 0;
        let holds = match &stored {
            Ok(Some(record)) => {
                let data = if is_deleted { Value::Null } else { json!({ "n": version - 1 }) };
                record.snapshot.version == version
                    && record.deleted == is_deleted
                    && record.snapshot.data == data
            }
            _ => false,
        };
        tally.holds(holds || is_control, || format!("{what}: stored is {stored:?}"));
    }
    behind.proxy.clear_rules();
    // What was held back has landed by now, if it ever does.
    if slow().iter().any(|slow| Some(slow) == fault.as_ref()) {
        tokio::time::sleep(LATE).await;
    }
    let report = behind.direct.verify(|_| {}).await.unwrap();
    tally.holds(report.ok, || format!("{fault:?}: {:?}", report.problems));
    // One event a change, and one beside each of the sixth kind.
    let beside = (0..many).filter(|k| k % KINDS == 6).count() as u64;
    tally.holds(report.events == many + beside || is_control, || {
        format!("{fault:?}: {} events for {many} changes", report.events)
    });
    lock.release().await.unwrap();
    tally
}
