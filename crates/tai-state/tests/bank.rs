//! Money that is moved under contention and faults is neither made nor lost, and two who must not both
//! leave do not.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{Random, balance, options, proved, snapshot, why};
use serde_json::json;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::testing::proxy::{Code, Fault, Proxy, Rule, When};
use tai_state::{
    Error, FirestoreStore, StateMachinePersister, StateStore, StoreOptions, TransactionManager,
};
use tokio::sync::Barrier;

const ACCOUNTS: u64 = 32;
const EACH: i64 = 10_000;
const CLIENTS: u64 = 6;
const AUDITORS: u64 = 2;

fn account(n: u64) -> String {
    format!("account-{n:02}")
}

/// How long the money is moved. `TAI_STATE_SECONDS` says otherwise.
fn duration() -> Duration {
    let seconds = std::env::var("TAI_STATE_SECONDS").map_or(60, |text| text.parse().unwrap());
    Duration::from_secs(seconds)
}

/// What the clients and auditors did.
#[derive(Debug, Default)]
struct Counts {
    moved: AtomicU64,
    declined: AtomicU64,
    given_up: AtomicU64,
    unknown: AtomicU64,
    audits: AtomicU64,
    audits_given_up: AtomicU64,
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// Moves an amount, if there is enough; an error of its own when there is not.
async fn transfer(
    manager: &TransactionManager,
    from: &str,
    to: &str,
    amount: i64,
) -> Result<bool, Error> {
    let moved = manager.execute_transaction("bank", |tx| async move {
        let (mut a, version_a) = tx.get_state("bank", from).await?;
        let (mut b, version_b) = tx.get_state("bank", to).await?;
        if balance(&a) < amount {
            return Ok(false);
        }
        let (balance_a, balance_b) = (balance(&a), balance(&b));
        a.data["balance"] = json!(balance_a - amount);
        b.data["balance"] = json!(balance_b + amount);
        tx.update_state("bank", from, a, version_a, why()).await?;
        tx.update_state("bank", to, b, version_b, why()).await?;
        Ok(true)
    });
    moved.await
}

async fn audit(manager: &TransactionManager) -> Result<(), Error> {
    let ids: Vec<String> = (0..ACCOUNTS).map(account).collect();
    let all = manager
        .execute_transaction("bank", |tx| {
            let ids = &ids;
            async move { tx.batch_get_states("bank", ids).await }
        })
        .await?;
    let balances: Vec<i64> = all.iter().map(balance).collect();
    assert_eq!(balances.len() as u64, ACCOUNTS);
    assert_eq!(balances.iter().sum::<i64>(), EACH * ACCOUNTS as i64, "{balances:?}");
    assert!(balances.iter().all(|balance| *balance >= 0), "{balances:?}");
    Ok(())
}

/// `handles` are of one store, like those of several processes; the last proves it in the end.
async fn run(what: &str, handles: Vec<StateStore>, mut random: Random) -> Arc<Counts> {
    for n in 0..ACCOUNTS {
        let money = snapshot(&account(n), json!({"balance": EACH}));
        handles[0].save_state("bank", account(n), money, why()).await.unwrap();
    }
    let managers: Vec<_> = handles.iter().map(TransactionManager::new).collect();
    let counts = Arc::new(Counts::default());
    let is_over = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..CLIENTS + AUDITORS {
        let manager = managers[client as usize % (managers.len() - 1)].clone();
        let (counts, is_over) = (Arc::clone(&counts), Arc::clone(&is_over));
        let mut random = Random::new(random.next());
        tasks.spawn(async move {
            while !is_over.load(Ordering::Relaxed) {
                if client >= CLIENTS {
                    match audit(&manager).await {
                        Ok(()) => add(&counts.audits),
                        Err(error) if error.is_transient() => add(&counts.audits_given_up),
                        Err(error) => panic!("an audit: {error}"),
                    }
                    continue;
                }
                // Half of the traffic meets on four accounts.
                let most = if random.below(2) == 0 { 4 } else { ACCOUNTS };
                let from = random.below(most);
                let to = (from + 1 + random.below(most - 1)) % most;
                let amount = 1 + random.below(100) as i64;
                match transfer(&manager, &account(from), &account(to), amount).await {
                    Ok(true) => add(&counts.moved),
                    Ok(false) => add(&counts.declined),
                    Err(Error::OutcomeUnknown { .. }) => add(&counts.unknown),
                    Err(error) if error.is_transient() => add(&counts.given_up),
                    Err(error) => panic!("a transfer: {error}"),
                }
            }
        });
    }
    tokio::time::sleep(duration()).await;
    is_over.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    println!("{what}: {counts:?}");

    // What the heads say, what their logs say, and the proof of both.
    let last = handles.last().unwrap();
    audit(managers.last().unwrap()).await.unwrap();
    let persister = StateMachinePersister::with_defaults(last);
    let mut replayed = 0;
    for n in 0..ACCOUNTS {
        let (state, from_the_log) = persister.load_state("bank", account(n)).await.unwrap();
        assert!(from_the_log);
        replayed += balance(&state);
    }
    assert_eq!(replayed, EACH * ACCOUNTS as i64);
    proved(last).await;
    let events = last.get_stats().await.unwrap().total_events - ACCOUNTS;
    let (moved, unknown) =
        (counts.moved.load(Ordering::Relaxed), counts.unknown.load(Ordering::Relaxed));
    assert_eq!(events % 2, 0, "half a transfer");
    assert!((moved..=moved + unknown).contains(&(events / 2)), "{events} events, {counts:?}");
    counts
}

#[tokio::test(flavor = "multi_thread")]
async fn no_money_is_lost_in_a_file() {
    let random = Random::announced("bank in a file");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bank.tai");
    let mut handles = Vec::new();
    for _ in 0..3 {
        handles.push(StateStore::open(&path).await.unwrap());
    }
    let counts = run("bank in a file", handles, random).await;
    let (audits, moved) =
        (counts.audits.load(Ordering::Relaxed), counts.moved.load(Ordering::Relaxed));
    let least = 1_000 * duration().as_secs() / 60;
    assert!(audits >= least && moved >= least, "too little traffic to prove anything: {counts:?}");
}

/// Through a proxy that loses, delays and repeats calls.
#[tokio::test(flavor = "multi_thread")]
async fn no_money_is_lost_on_the_emulator_through_faults() {
    let Some(emulator) = Emulator::shared().await else { return };
    let mut random = Random::announced("bank on the emulator");
    let proxy = Proxy::start(emulator.address()).await.unwrap();
    let project = fresh_project();
    let options = options(|o| {
        o.retry.attempt_timeout = Duration::from_millis(800);
        o.retry.max_attempts = 12;
    });
    let mut handles = Vec::new();
    for _ in 0..2 {
        let builder = FirestoreStore::builder(&project).emulator(proxy.address());
        handles.push(builder.options(options.clone()).connect().await.unwrap().into());
    }
    let direct = FirestoreStore::builder(&project).emulator(emulator.address());
    handles.push(direct.connect().await.unwrap().into());
    let mut rule = |method: &str, per_mille, fault| {
        proxy.inject(Rule::new(method, When::Chance { per_mille, seed: random.next() }, fault));
    };
    for (per_mille, fault) in [
        (10, Fault::LoseReply),
        (4, Fault::DropRequest),
        (10, Fault::Duplicate),
        (10, Fault::Answer(Code::UNAVAILABLE)),
        (10, Fault::Answer(Code::ABORTED)),
        (10, Fault::AnswerAfter(Code::UNAVAILABLE)),
        (5, Fault::AnswerAfter(Code::DEADLINE_EXCEEDED)),
        (5, Fault::StallRequest(Duration::from_millis(1_200))),
        (10, Fault::Delay(Duration::from_millis(100))),
        (2, Fault::ResetAfter),
        (2, Fault::GoAway),
    ] {
        rule("Commit", per_mille, fault);
    }
    for (per_mille, fault) in [
        (10, Fault::Answer(Code::UNAVAILABLE)),
        (5, Fault::LoseReply),
        (10, Fault::Delay(Duration::from_millis(100))),
    ] {
        rule("BatchGetDocuments", per_mille, fault);
    }
    let counts = run("bank on the emulator", handles, random.clone()).await;
    let (audits, moved) =
        (counts.audits.load(Ordering::Relaxed), counts.moved.load(Ordering::Relaxed));
    let least = 60 * duration().as_secs() / 60;
    assert!(audits >= least && moved >= least, "too little traffic to prove anything: {counts:?}");
}

/// Rounds of two doctors on call who both want to leave, each if the other stays. Returns in how many
/// rounds both left.
async fn on_call(a: StateStore, b: StateStore, rounds: u64) -> u64 {
    let managers = [TransactionManager::new(&a), TransactionManager::new(&b)];
    let mut broken = 0;
    for _ in 0..rounds {
        for id in ["alice", "bob"] {
            a.save_state("ward", id, snapshot(id, json!({"on_call": true})), why()).await.unwrap();
        }
        // Both read before either writes.
        let both_have_read = Arc::new(Barrier::new(2));
        let leave = |manager: TransactionManager, me: &'static str| {
            let barrier = Arc::clone(&both_have_read);
            tokio::spawn(async move {
                let first = AtomicBool::new(true);
                let left = manager.execute_transaction("ward", |tx| {
                    let meet = first.swap(false, Ordering::SeqCst).then(|| Arc::clone(&barrier));
                    async move {
                        let all = tx.batch_get_states("ward", &["alice", "bob"]).await?;
                        if let Some(barrier) = meet {
                            barrier.wait().await;
                        }
                        if all.iter().filter(|state| state.data["on_call"] == true).count() == 2 {
                            let off = snapshot(me, json!({"on_call": false}));
                            tx.save_state("ward", me, off, why()).await?;
                        }
                        Ok(())
                    }
                });
                left.await.unwrap();
            })
        };
        let (one, other) = (leave(managers[0].clone(), "alice"), leave(managers[1].clone(), "bob"));
        one.await.unwrap();
        other.await.unwrap();
        let all = a.batch_get_states("ward", &["alice", "bob"]).await.unwrap();
        let on_call = all.iter().filter(|state| state.data["on_call"] == true).count();
        assert!(on_call < 2, "nobody left");
        broken += u64::from(on_call == 0);
    }
    broken
}

fn unchecked() -> StoreOptions {
    options(|o| o.never_check_reads = true)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stays_on_call_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, options: StoreOptions| {
        StateStore::open_with(folder.path().join(name), options)
    };
    let default = StoreOptions::default;
    let (a, b) = (open("s", default()).await.unwrap(), open("s", default()).await.unwrap());
    // By two handles, like two processes, and by one.
    assert_eq!(on_call(a.clone(), b, 1_000).await, 0);
    assert_eq!(on_call(a.clone(), a.clone(), 1_000).await, 0);
    proved(&a).await;
    // The control: without the checks of what was only read both leave.
    let (a, b) = (open("c", unchecked()).await.unwrap(), open("c", unchecked()).await.unwrap());
    assert!(on_call(a, b, 20).await > 0, "the test does not notice a missing check");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stays_on_call_on_the_emulator() {
    let Some(emulator) = Emulator::shared().await else { return };
    let connect = async |project: &str, options: StoreOptions| {
        let builder = FirestoreStore::builder(project).emulator(emulator.address());
        StateStore::from(builder.options(options).connect().await.unwrap())
    };
    let project = fresh_project();
    let a = connect(&project, StoreOptions::default()).await;
    let b = connect(&project, StoreOptions::default()).await;
    assert_eq!(on_call(a.clone(), b, 150).await, 0);
    assert_eq!(on_call(a.clone(), a.clone(), 50).await, 0);
    proved(&a).await;
    let project = fresh_project();
    let a = connect(&project, unchecked()).await;
    let b = connect(&project, unchecked()).await;
    assert!(on_call(a, b, 20).await > 0, "the test does not notice a missing check");
}
