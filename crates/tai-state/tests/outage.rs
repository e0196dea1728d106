//! The service is silent, unreachable, dead, or back without its documents.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::pin::Pin;
use std::time::Duration;

use common::{counter, why};
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::testing::proxy::{Fault, Proxy, Rule, When};
use tai_state::{
    Error, FirestoreStore, ListOptions, NewTransition, StateMachinePersister, StateQuery,
    StateStore, StoreOptions, TransactionManager,
};

const DEADLINE: Duration = Duration::from_millis(1_500);
/// What a call may take beyond its deadline, and what may pass until the first success after an
/// outage.
const GRACE: Duration = Duration::from_secs(1);
const BACK: Duration = Duration::from_secs(5);

async fn open(address: &str, project: &str) -> StateStore {
    let mut options = StoreOptions::default();
    options.retry.deadline = DEADLINE;
    options.retry.attempt_timeout = Duration::from_millis(600);
    let builder = FirestoreStore::builder(project).emulator(address).options(options);
    builder.connect().await.unwrap().into()
}

type Calling = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// One of every kind of call.
fn calls(store: &StateStore) -> Vec<(&'static str, Calling)> {
    macro_rules! call {
        ($name:literal, |$store:ident| $call:expr) => {{
            let $store = store.clone();
            let calling: Calling = Box::pin(async move {
                $call?;
                Ok(())
            });
            ($name, calling)
        }};
    }
    vec![
        call!("get", |s| s.get_state("g", "s").await),
        call!("batch get", |s| s.batch_get_states("g", &["s", "t"]).await),
        call!("save", |s| s.save_state("g", "s", counter(2), why()).await),
        call!("save, new", |s| s.save_state("g", "new", counter(2), why()).await),
        call!("update", |s| s.update_state("g", "s", counter(2), 1, why()).await),
        call!("delete", |s| s.delete_state("g", "t", None, why()).await),
        call!("list", |s| s.list_states("g", &ListOptions::default()).await),
        call!("query", |s| s.query_states("g", &StateQuery::new()).await),
        call!("stats", |s| s.get_stats().await),
        call!("verify", |s| s.verify(|_| {}).await),
        call!("at a version", |s| s.state_at_version("g", "s", 1).await),
        call!("at a time", |s| s.state_at_time("g", "s", chrono::DateTime::UNIX_EPOCH).await),
        call!("load", |s| StateMachinePersister::with_defaults(s).load_state("g", "s").await),
        call!("append", |s| {
            let to = NewTransition::to("g", "s", "step", serde_json::json!(3), why());
            StateMachinePersister::with_defaults(s).append(to).await
        }),
        call!("transaction", |s| {
            TransactionManager::new(s)
                .run(|tx| async move {
                    let (state, version) = tx.get_state("g", "s").await?;
                    tx.update_state("g", "s", state, version, why()).await
                })
                .await
        }),
    ]
}

/// All calls at once; each must be back in time and without success.
async fn all_fail_in_time(what: &str, store: &StateStore, expected: impl Fn(&Error) -> bool) {
    let mut tasks = tokio::task::JoinSet::new();
    for (name, calling) in calls(store) {
        tasks.spawn(async move { (name, tokio::time::timeout(DEADLINE + GRACE, calling).await) });
    }
    for (name, outcome) in tasks.join_all().await {
        match outcome {
            Ok(Err(error)) => assert!(expected(&error), "{what}: {name}: {error}"),
            Ok(Ok(())) => panic!("{what}: {name} succeeded"),
            Err(_) => panic!("{what}: {name} was not back {GRACE:?} after its deadline"),
        }
    }
}

/// Tries until it works.
async fn works_again(what: &str, store: &StateStore) {
    let working = async {
        loop {
            match store.get_state("g", "s").await {
                Ok(_) => return,
                Err(error) => assert!(error.is_transient(), "{what}: {error}"),
            }
        }
    };
    assert!(tokio::time::timeout(BACK, working).await.is_ok(), "{what}: not back in {BACK:?}");
}

fn may_pass(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::OutcomeUnknown { .. })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_ends_by_its_deadline() {
    let Some(emulator) = Emulator::own().await else { return };
    let proxy = Proxy::start(emulator.address()).await.unwrap();
    let project = fresh_project();
    let store = open(proxy.address(), &project).await;
    let direct = open(emulator.address(), &project).await;
    for id in ["s", "t"] {
        store.save_state("g", id, counter(1), why()).await.unwrap();
    }

    emulator.pause().unwrap();
    all_fail_in_time("silent", &direct, may_pass).await;
    emulator.resume().unwrap();
    works_again("silent", &direct).await;

    proxy.refuse(true);
    proxy.cut();
    all_fail_in_time("unreachable", &store, may_pass).await;
    proxy.refuse(false);
    works_again("unreachable", &store).await;

    // What is said to have failed may have landed; what is there is whole.
    let report = direct.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);

    emulator.kill().unwrap();
    all_fail_in_time("dead", &direct, may_pass).await;
    emulator.restart().await.unwrap();
    // It came back empty: that is never taken for a fresh store, and nothing is written to it.
    let replaced = |error: &Error| matches!(error, Error::StoreReplaced { .. });
    all_fail_in_time("empty", &direct, replaced).await;
    all_fail_in_time("empty, through the proxy", &store, replaced).await;
    let mut options = StoreOptions::default();
    options.create = false;
    let builder = FirestoreStore::builder(&project).emulator(emulator.address()).options(options);
    let nothing = builder.connect().await.unwrap_err();
    assert!(matches!(nothing, Error::NotAStore { .. }), "{nothing}");

    // Another store in its place is not taken for it either.
    let another = open(emulator.address(), &project).await;
    another.save_state("g", "s", counter(9), why()).await.unwrap();
    all_fail_in_time("another", &direct, replaced).await;
    let report = another.verify(|_| {}).await.unwrap();
    assert!(report.ok && report.events == 1, "{report:?}");
}

/// A stream of changes that breaks is opened again, and what happened meanwhile is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_feed_has_no_gap_when_its_stream_breaks() {
    let Some(emulator) = Emulator::shared().await else { return };
    let proxy = Proxy::start(emulator.address()).await.unwrap();
    let project = fresh_project();
    let watching = FirestoreStore::builder(&project).emulator(proxy.address());
    let watching: StateStore = watching.connect().await.unwrap().into();
    let writing = FirestoreStore::builder(&project).emulator(emulator.address());
    let writing: StateStore = writing.connect().await.unwrap().into();
    let mut feed = watching.watch("g", "s").unwrap();
    let mut version = 0;
    for round in 0..4 {
        for _ in 0..5 {
            version = writing.save_state("g", "s", counter(version), why()).await.unwrap();
            let woken = tokio::time::timeout(Duration::from_secs(1), feed.next()).await;
            let event = woken.unwrap_or_else(|_| panic!("round {round}: not woken in a second"));
            assert_eq!(event.unwrap().version(), version);
        }
        // The line is cut; changes go on.
        proxy.refuse(true);
        proxy.cut();
        for _ in 0..5 {
            version = writing.save_state("g", "s", counter(version), why()).await.unwrap();
        }
        proxy.refuse(false);
        for missed in version - 4..=version {
            let told = tokio::time::timeout(Duration::from_secs(10), feed.next()).await;
            let event = told.unwrap_or_else(|_| panic!("round {round}: v{missed} was not told"));
            assert_eq!(event.unwrap().version(), missed);
        }
    }
}

/// A stream that is opened again and never answered is given up, and the feed goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_feed_survives_a_stream_that_says_nothing() {
    let Some(emulator) = Emulator::shared().await else { return };
    let proxy = Proxy::start(emulator.address()).await.unwrap();
    let project = fresh_project();
    let watching = open(proxy.address(), &project).await;
    let writing = open(emulator.address(), &project).await;
    let mut feed = watching.watch("g", "s").unwrap();
    writing.save_state("g", "s", counter(1), why()).await.unwrap();
    assert_eq!(feed.next().await.unwrap().version(), 1);
    proxy.inject(Rule::new("Listen", When::Nth(1), Fault::DropRequest));
    proxy.cut();
    writing.save_state("g", "s", counter(2), why()).await.unwrap();
    let told = tokio::time::timeout(Duration::from_secs(20), feed.next()).await;
    assert_eq!(told.expect("the feed stands still").unwrap().version(), 2);
}
