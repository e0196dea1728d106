//! The bank: money that is moved, and auditors who count it while it moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tai_state::testing::emulator::fresh_project;
use tai_state::testing::proxy::{Code, Fault, Proxy, Rule, When};
use tai_state::{
    Error, FirestoreStore, StateMachinePersister, StateSnapshot, StateStore, StoreOptions,
    TransactionManager,
};

use crate::engine::{Engine, problems, snapshot, why};
use crate::random::Random;
use crate::run::Tally;

pub(crate) const ACCOUNTS: u64 = 32;
pub(crate) const EACH: i64 = 10_000;
const CLIENTS: u64 = 6;
/// The governor of all accounts.
pub(crate) const BANK: &str = "bank";

pub(crate) fn account(n: u64) -> String {
    format!("account-{n:02}")
}

fn accounts() -> Vec<String> {
    (0..ACCOUNTS).map(account).collect()
}

fn balance(state: &StateSnapshot) -> i64 {
    state.data["balance"].as_i64().unwrap()
}

/// What is wrong with the money, if it is.
fn counted(balances: &[i64]) -> Result<(), String> {
    let total: i64 = balances.iter().sum();
    if balances.len() as u64 == ACCOUNTS
        && total == EACH * ACCOUNTS as i64
        && balances.iter().all(|balance| *balance >= 0)
    {
        return Ok(());
    }
    Err(format!("{} accounts hold {total}: {balances:?}", balances.len()))
}

/// Opens all accounts.
pub(crate) async fn founded(store: &StateStore) {
    for n in 0..ACCOUNTS {
        let money = snapshot(&account(n), json!({"balance": EACH}));
        store.save_state(BANK, account(n), money, why()).await.unwrap();
    }
}

/// Moves an amount, if there is enough.
async fn transfer(
    manager: &TransactionManager,
    from: &str,
    to: &str,
    amount: i64,
) -> Result<bool, Error> {
    let moved = manager.execute_transaction(BANK, |tx| async move {
        let (mut a, version_a) = tx.get_state(BANK, from).await?;
        let (mut b, version_b) = tx.get_state(BANK, to).await?;
        if balance(&a) < amount {
            return Ok(false);
        }
        let (balance_a, balance_b) = (balance(&a), balance(&b));
        a.data["balance"] = json!(balance_a - amount);
        b.data["balance"] = json!(balance_b + amount);
        tx.update_state(BANK, from, a, version_a, why()).await?;
        tx.update_state(BANK, to, b, version_b, why()).await?;
        Ok(true)
    });
    moved.await
}

/// By a transaction that reads all accounts.
pub(crate) async fn by_transaction(manager: &TransactionManager) -> Result<(), Error> {
    let all = manager
        .execute_transaction(BANK, |tx| async move { tx.batch_get_states(BANK, &accounts()).await })
        .await?;
    judged(&all.iter().map(balance).collect::<Vec<_>>())
}

/// By a snapshot of all accounts, each of whose logs is replayed up to there.
pub(crate) async fn by_replay(store: &StateStore) -> Result<(), Error> {
    let persister = StateMachinePersister::with_defaults(store);
    let cut = store.batch_get_states(BANK, &accounts()).await?;
    let mut balances = Vec::new();
    for state in &cut {
        let mut there = None;
        let each = |event: tai_state::LoggedEvent| {
            if event.to_state.version == state.version {
                there = Some(balance(&event.to_state));
            }
            Ok(())
        };
        persister.replay(BANK, state.id.as_str(), each).await?;
        // What its log does not have is no money.
        balances.push(there.filter(|there| *there == balance(state)).unwrap_or(i64::MIN / 64));
    }
    judged(&balances)
}

/// One account after the other, which is wrong while money moves.
async fn one_by_one(store: &StateStore) -> Result<(), Error> {
    let mut balances = Vec::new();
    for id in accounts() {
        balances.push(balance(&store.get_state(BANK, id).await?.0));
    }
    judged(&balances)
}

/// Of a slow auditor beside a clean-up that keeps a few versions.
const TRIMMED: &str = "audits whose log was cleaned up under them";
const MISCOUNTED: &str = "the audit: ";

fn judged(balances: &[i64]) -> Result<(), Error> {
    counted(balances).map_err(|why| Error::Corrupt { location: MISCOUNTED.to_owned(), reason: why })
}

fn is_miscounted(error: &Error) -> bool {
    error.to_string().contains(MISCOUNTED)
}

/// What the clients and auditors did.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) moved: AtomicU64,
    declined: AtomicU64,
    given_up: AtomicU64,
    unknown: AtomicU64,
    pub(crate) audits: AtomicU64,
    replays: AtomicU64,
    /// Audits of which a clean-up has taken the events before they were read.
    trimmed: AtomicU64,
    one_by_one: AtomicU64,
    one_by_one_wrong: AtomicU64,
    wrong: std::sync::Mutex<Vec<String>>,
    is_over: AtomicBool,
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Counts {
    fn audited(&self, outcome: Result<(), Error>, kind: &AtomicU64) {
        match outcome {
            Ok(()) => {
                add(&self.audits);
                add(kind);
            }
            Err(error) if error.is_transient() => add(&self.given_up),
            Err(Error::HistoryTrimmed { .. }) => add(&self.trimmed),
            Err(error) => self.wrong.lock().unwrap().push(error.to_string()),
        }
    }
}

/// What one of the bank does until it is over.
async fn works(client: u64, store: StateStore, counts: Arc<Counts>, mut random: Random) {
    let manager = TransactionManager::new(&store);
    let by_transactions = AtomicU64::new(0);
    while !counts.is_over.load(Ordering::Relaxed) {
        match client.checked_sub(CLIENTS) {
            Some(0) => counts.audited(by_transaction(&manager).await, &by_transactions),
            Some(1) => counts.audited(by_replay(&store).await, &counts.replays),
            Some(_) => {
                match one_by_one(&store).await {
                    Err(error) if is_miscounted(&error) => add(&counts.one_by_one_wrong),
                    _ => {}
                }
                add(&counts.one_by_one);
                // It is only the control, and must not take the disk from the others.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            None => {
                // Half of the traffic meets on four accounts.
                let most = if random.percent(50) { 4 } else { ACCOUNTS };
                let from = random.below(most);
                let to = (from + 1 + random.below(most - 1)) % most;
                let amount = 1 + random.below(100) as i64;
                match transfer(&manager, &account(from), &account(to), amount).await {
                    Ok(true) => add(&counts.moved),
                    Ok(false) => add(&counts.declined),
                    Err(Error::OutcomeUnknown { .. }) => add(&counts.unknown),
                    Err(error) if error.is_transient() => add(&counts.given_up),
                    Err(error) => counts.wrong.lock().unwrap().push(format!("transfer: {error}")),
                }
            }
        }
    }
}

/// A bank that is open: it moves money until it is told to end.
#[derive(Debug)]
pub(crate) struct Open {
    counts: Arc<Counts>,
    tasks: tokio::task::JoinSet<()>,
    /// Of one that nobody works with.
    last: StateStore,
}

/// `handles` are of one store, like those of several processes; the last proves it in the end.
pub(crate) fn opened(handles: &[StateStore], random: &mut Random) -> Open {
    let counts = Arc::new(Counts::default());
    let mut tasks = tokio::task::JoinSet::new();
    // Two auditors, and a third who does it wrong.
    for client in 0..CLIENTS + 3 {
        let store = handles[client as usize % (handles.len() - 1)].clone();
        tasks.spawn(works(client, store, Arc::clone(&counts), random.split()));
    }
    Open { counts, tasks, last: handles[handles.len() - 1].clone() }
}

/// For so many seconds, and on a machine that is slow up to four times as long, until it has shown enough.
async fn moved(
    what: &str,
    seconds: u64,
    least: Least,
    handles: Vec<StateStore>,
    mut random: Random,
) -> Tally {
    founded(handles.last().unwrap()).await;
    let open = opened(&handles, &mut random);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    for _ in 0..30 * seconds {
        if open.has_shown(&least) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    open.is_over();
    let mut tally = open.ended(what).await;
    let trimmed = tally.counted(&format!("{TRIMMED} on {what}"));
    tally.holds(trimmed == 0, || format!("{what}: history is gone, and nobody cleans up"));
    tally.at_least(&format!("transfers on {what}"), least.transfers);
    tally.at_least(&format!("audits on {what}"), least.audits);
    tally.at_least(&format!("audits by snapshot and replay on {what}"), least.replays);
    tally
}

/// With less than this the run says nothing.
struct Least {
    transfers: u64,
    audits: u64,
    replays: u64,
}

impl Open {
    fn has_shown(&self, least: &Least) -> bool {
        let is = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts { moved, audits, replays, .. } = &*self.counts;
        is(moved) >= least.transfers && is(audits) >= least.audits && is(replays) >= least.replays
    }

    pub(crate) fn is_over(&self) {
        self.counts.is_over.store(true, Ordering::Relaxed);
    }

    /// What it did, and whether all of the money is there.
    pub(crate) async fn ended(self, what: &str) -> Tally {
        let mut tally = Tally::default();
        let Self { counts, tasks, last } = self;
        let last = &last;
        tasks.join_all().await;
        for wrong in counts.wrong.lock().unwrap().iter() {
            tally.broken(format!("{what}: {wrong}"));
        }
        // What the heads say, what their logs say, and the proof of both.
        for outcome in [by_transaction(&TransactionManager::new(last)).await, by_replay(last).await]
        {
            tally.holds(outcome.is_ok(), || format!("{what}, in the end: {outcome:?}"));
        }
        let persister = StateMachinePersister::with_defaults(last);
        let mut loaded = Vec::new();
        for id in accounts() {
            let (state, from_the_log) = persister.load_state(BANK, id).await.unwrap();
            tally.holds(from_the_log, || format!("{what}: a state was not loaded from its log"));
            loaded.push(balance(&state));
        }
        let outcome = counted(&loaded);
        tally.holds(outcome.is_ok(), || format!("{what}, loaded: {outcome:?}"));
        for problem in problems(last).await {
            tally.broken(format!("{what}: {problem}"));
        }
        let is = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let heads = last.batch_get_states(BANK, &accounts()).await.unwrap();
        let events = heads.iter().map(|head| head.version).sum::<u64>() - ACCOUNTS;
        tally.holds(events.is_multiple_of(2), || format!("{what}: half a transfer"));
        let most = is(&counts.moved) + is(&counts.unknown);
        tally.holds((is(&counts.moved)..=most).contains(&(events / 2)), || {
            format!("{what}: {events} events, {} to {most} transfers", is(&counts.moved))
        });
        for (name, count) in [
            ("transfers", &counts.moved),
            ("transfers of unknown outcome", &counts.unknown),
            ("given up", &counts.given_up),
            ("audits", &counts.audits),
            ("audits by snapshot and replay", &counts.replays),
            (TRIMMED, &counts.trimmed),
        ] {
            tally.count(&format!("{name} on {what}"), is(count));
        }
        let (caught, of) = (is(&counts.one_by_one_wrong), is(&counts.one_by_one));
        let control = format!("an auditor on {what} reads one account after the other");
        tally.control(&control, caught, of, 1);
        tally
    }
}

pub(crate) async fn in_a_file(seconds: u64, seed: u64) -> Tally {
    const WHAT: &str = "a file";
    let store = Engine::File.store();
    let mut handles = Vec::new();
    for _ in 0..3 {
        handles.push(store.open().await);
    }
    let least = 1_000 * seconds / 60;
    let least = Least { transfers: least, audits: least, replays: least / 20 };
    moved(WHAT, seconds, least, handles, Random::new(seed)).await
}

/// What comes of it when it is tried again for as long as that may help.
async fn patiently<T, F: Future<Output = tai_state::Result<T>>>(mut call: impl FnMut() -> F) -> T {
    for _ in 0..20 {
        match call().await {
            Err(error) if error.is_transient() => {
                tokio::time::sleep(error.backoff_duration()).await;
            }
            outcome => return outcome.unwrap(),
        }
    }
    call().await.unwrap()
}

/// Through a proxy that loses, delays and repeats calls.
pub(crate) async fn through_faults(engine: Option<Engine>, seconds: u64, seed: u64) -> Tally {
    const WHAT: &str = "the emulator through faults";
    let Some(Engine::Emulator(address)) = engine else { return Tally::default() };
    let mut random = Random::new(seed);
    let proxy = Proxy::start(address).await.unwrap();
    let project = fresh_project();
    let mut options = StoreOptions::default();
    options.retry.attempt_timeout = Duration::from_millis(800);
    options.retry.max_attempts = 12;
    let mut handles = Vec::new();
    // The first makes the store. Opening is one attempt, and an emulator that was just started is slow.
    let direct = FirestoreStore::builder(&project).emulator(address).connect().await.unwrap();
    for _ in 0..2 {
        let connect = || {
            let builder = FirestoreStore::builder(&project).emulator(proxy.address());
            builder.options(options.clone()).connect()
        };
        handles.push(patiently(connect).await.into());
    }
    handles.push(direct.into());
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
    let least = Least { transfers: seconds, audits: seconds, replays: 1 };
    moved(WHAT, seconds, least, handles, random.clone()).await
}
