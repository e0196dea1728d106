//! What is sent again, counted at the wire; and the storm on a service that has come back.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tai_state::testing::emulator::Emulator;
use tai_state::testing::proxy::{Code, Fault, Rule, When};
use tai_state::{
    CleanupOptions, Error, ListOptions, NewTransition, StateMachinePersister, StateStore,
    TransactionManager,
};
use tokio::task::JoinSet;

use super::field::Field;
use super::herd::MOST;
use super::{Behind, busiest, is_short, options, snapshot, why};
use crate::run::{Run, Tally};

const ATTEMPTS: u32 = 5;
const LEASE: Duration = Duration::from_secs(3_600);
/// Changes that expect nothing may first be tried as if the state were new: those are two commits, and
/// each is sent so often at most.
const BLIND: [&str; 3] = ["save", "save, new", "append"];
/// Steps of one call that reads: what it is about, what is below it, and a last look.
const STEPS: u64 = 3;

type Called = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// One of each kind of call, none of which waits for anybody.
fn calls(store: &StateStore) -> Vec<(&'static str, Called)> {
    macro_rules! call {
        ($what:literal, |$store:ident| $call:expr) => {{
            let $store = store.clone();
            let called: Called = Box::pin(async move { $call.map(drop) });
            ($what, called)
        }};
    }
    let new = || snapshot("s", json!(2));
    let manager = |s: &StateStore| TransactionManager::new(s);
    let persister = |s: &StateStore| StateMachinePersister::with_defaults(s);
    vec![
        call!("get", |s| s.get_state("g", "s").await),
        call!("batch get", |s| s.batch_get_states("g", &["s", "t"]).await),
        call!("list", |s| s.list_states("g", &ListOptions::default()).await),
        call!("at a version", |s| s.state_at_version("g", "s", 1).await),
        call!("load", |s| persister(&s).load_state("g", "s").await),
        call!("save", |s| s.save_state("g", "s", new(), why()).await),
        call!("save, new", |s| s.save_state("g", "new", new(), why()).await),
        call!("save, keyed", |s| {
            let keyed = s.idempotency_key("k").unwrap();
            keyed.save_state("g", "keyed", new(), why()).await
        }),
        call!("update", |s| s.update_state("g", "s", new(), 1, why()).await),
        call!("delete", |s| s.delete_state("g", "t", None, why()).await),
        call!("append", |s| {
            let next = NewTransition::to("g", "s", "step", json!(3), why());
            persister(&s).append(next).await
        }),
        call!("transaction", |s| {
            manager(&s)
                .run(|tx| async move {
                    let (state, version) = tx.get_state("g", "s").await?;
                    tx.save_state("g", "beside", snapshot("beside", json!(1)), why()).await?;
                    tx.update_state("g", "s", state, version, why()).await
                })
                .await
        }),
        call!("transaction, once", |s| {
            manager(&s)
                .execute_once("g", "once", |tx| async move {
                    tx.save_state("g", "once", snapshot("once", json!(1)), why()).await
                })
                .await
        }),
        call!("lock", |s| manager(&s).try_acquire_lock("r", "me", LEASE).await),
        call!("locks", |s| manager(&s).list_locks().await),
        call!("break a lock", |s| manager(&s).break_lock("held").await),
        call!("save a snapshot", |s| persister(&s).save_snapshot("g", "s").await),
        call!("clean up", |s| {
            let all = CleanupOptions::older_than(Duration::ZERO);
            persister(&s).cleanup("g", &all, |_| {}).await
        }),
    ]
}

/// Layers of retries must not multiply: five times five is more than three times five.
pub(super) async fn bounded(emulator: &Arc<Emulator>, tally: &mut Tally) {
    let behind = Behind::new(emulator).await;
    for id in ["s", "t"] {
        behind.direct.save_state("g", id, snapshot(id, json!(1)), why()).await.unwrap();
    }
    let held = TransactionManager::new(&behind.direct).acquire_lock("held", "me", LEASE).await;
    let mut options = options(ATTEMPTS, Duration::from_secs(2), Duration::from_secs(20));
    options.retry.base = Duration::from_millis(1);
    options.retry.cap = Duration::from_millis(10);
    let store = behind.store(options).await;
    let codes =
        [Code::UNAVAILABLE, Code::ABORTED, Code::INTERNAL, Code::RESOURCE_EXHAUSTED, Code::UNKNOWN];
    // Everything fails, or commits alone: then what is decided on reads is decided again and again.
    for method in ["*", "Commit"] {
        for code in codes {
            for (what, call) in calls(&store) {
                behind.proxy.inject(Rule::new(method, When::Each, Fault::Answer(code)));
                behind.proxy.reset_usage();
                let told = call.await;
                let used = behind.proxy.usage().calls;
                behind.proxy.clear_rules();
                let commits = used.get("Commit").copied().unwrap_or(0);
                let all: u64 = used.values().sum();
                tally.count("calls counted at the wire", 1);
                tally.highest("commits of one call, at most", commits);
                tally.highest("sendings of one call, at most", all);
                let most = u64::from(ATTEMPTS) * if BLIND.contains(&what) { 2 } else { 1 };
                tally.holds(commits <= most, || {
                    format!("{what}, {method} {code:?}: {commits} commits, {told:?}")
                });
                tally.holds(all <= u64::from(ATTEMPTS) * STEPS, || {
                    format!("{what}, {method} {code:?}: {used:?}, {told:?}")
                });
            }
        }
    }
    drop(held);
    // The control: another layer around it.
    behind.proxy.inject(Rule::new("*", When::Each, Fault::Answer(Code::UNAVAILABLE)));
    behind.proxy.reset_usage();
    for _ in 0..ATTEMPTS {
        let _ = store.save_state("g", "s", snapshot("s", json!(2)), why()).await;
    }
    let commits = behind.proxy.usage().calls.get("Commit").copied().unwrap_or(0);
    let noticed = u64::from(commits > u64::from(ATTEMPTS));
    tally.control("a second layer of retries", noticed, 1, 1);
}

/// So many tasks wait for a service that answers UNAVAILABLE, and are counted when it is back.
pub(super) async fn storm(run: &Run, emulator: &Arc<Emulator>, tally: &mut Tally) {
    let away = Duration::from_secs(if is_short(run) { 3 } else { 60 });
    let mut most = u64::MAX;
    // A machine that stood still has gathered them itself; a herd comes each time.
    for _ in 0..3 {
        if most > MOST {
            most = one_storm(away, emulator, tally).await;
        }
    }
    tally.highest("hundredths of the mean in the busiest 100 ms at the wire", most);
    tally.holds(most <= MOST, || format!("{TASKS} tasks at the wire: {most} % of the mean"));
}

const TASKS: u64 = 500;

async fn one_storm(away: Duration, emulator: &Arc<Emulator>, tally: &mut Tally) -> u64 {
    let behind = Behind::new(emulator).await;
    let options = options(u32::MAX, Duration::from_secs(5), away + Duration::from_secs(30));
    let window = options.retry.cap;
    let store = behind.store(options).await;
    behind.proxy.inject(Rule::new("*", When::Each, Fault::Answer(Code::UNAVAILABLE)));
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let store = store.clone();
        tasks.spawn(async move {
            let id = format!("s{task}");
            store.save_state("g", &id, snapshot(&id, json!(task)), why()).await
        });
    }
    tokio::time::sleep(away).await;
    behind.proxy.clear_rules();
    let healed = std::time::Instant::now();
    behind.proxy.reset_usage();
    while let Some(told) = tasks.join_next().await {
        tally.holds(matches!(told, Ok(Ok(1))), || format!("a task in the storm: {told:?}"));
    }
    let took = healed.elapsed();
    let times: Vec<Duration> = behind.proxy.calls().iter().map(|call| call.at).collect();
    let most = busiest(&times, window);
    println!("  {TASKS} tasks, {away:?} away: {most} % of the mean, done after {took:?}");
    let report = behind.direct.verify(|_| {}).await.unwrap();
    tally.holds(report.ok && report.events == TASKS, || format!("after the storm: {report:?}"));
    most
}

/// A line that swallows what commits, or everything: every call is back in time all the same. The control
/// is a client without a deadline.
pub(super) async fn swallowed(emulator: &Arc<Emulator>, tally: &mut Tally) {
    let (all, commits) =
        tokio::join!(one_swallowed("*", emulator), one_swallowed("Commit", emulator));
    tally.add(all);
    tally.add(commits);
}

async fn one_swallowed(method: &str, emulator: &Arc<Emulator>) -> Tally {
    let mut tally = Tally::default();
    let (attempt, deadline) = (Duration::from_millis(500), Duration::from_millis(1_500));
    let behind = Behind::new(emulator).await;
    for id in ["s", "t"] {
        behind.direct.save_state("g", id, snapshot(id, json!(1)), why()).await.unwrap();
    }
    let store = behind.store(options(8, attempt, deadline)).await;
    let patient = behind.store(options(8, Duration::MAX, Duration::MAX)).await;
    behind.proxy.inject(Rule::new(method, When::Each, Fault::DropRequest));
    let field = Arc::new(Field::new(deadline, attempt));
    field.now(&format!("{method} is swallowed"));
    let mut tasks = JoinSet::new();
    for (what, call) in calls(&store) {
        let field = Arc::clone(&field);
        let limit = if what == "lock" { attempt } else { deadline };
        tasks.spawn(async move {
            if let Some(Err(error)) = field.within(what, limit, call).await {
                field.failed(what, &error).await;
            }
        });
    }
    let without = Field::new(deadline, attempt);
    let save = patient.save_state("g", "s", snapshot("s", json!(2)), why());
    let (noticed, _) = tokio::join!(without.call("no deadline", save), tasks.join_all());
    tally.control("a client without a deadline", u64::from(noticed.is_none()), 1, 1);
    field.judge(&mut tally);
    tally
}
