//! What goes over the wire to Firestore, counted by a proxy: round trips, billed documents, retries;
//! and what comes of calls that are lost, delayed and repeated.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Random, counter, snapshot, why};
use serde_json::json;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::testing::proxy::{Code, Fault, Proxy, Rule, Usage, When};
use tai_state::{
    Error, FirestoreStore, NewTransition, PersistenceConfig, StateMachinePersister, StateStore,
    StoreOptions, TransactionManager,
};

/// A store behind a proxy, and one that speaks to the emulator itself.
struct Wire {
    proxy: Proxy,
    project: String,
    direct: StateStore,
}

impl Wire {
    async fn new() -> Option<Self> {
        let emulator = Emulator::shared().await?;
        let proxy = Proxy::start(emulator.address()).await.unwrap();
        let project = fresh_project();
        let builder = FirestoreStore::builder(&project).emulator(emulator.address());
        let direct = builder.connect().await.unwrap().into();
        Some(Self { proxy, project, direct })
    }

    async fn store(&self, options: StoreOptions) -> StateStore {
        let builder = FirestoreStore::builder(&self.project).emulator(self.proxy.address());
        builder.options(options).connect().await.unwrap().into()
    }

    /// What was used since the last time.
    fn used(&self) -> Usage {
        let used = self.proxy.usage();
        self.proxy.reset_usage();
        used
    }

    #[track_caller]
    fn assert_used(&self, what: &str, calls: &[(&str, u64)], billed: (u64, u64, u64)) {
        let used = self.used();
        let made: Vec<(&str, u64)> = used.calls.iter().map(|(m, n)| (m.as_str(), *n)).collect();
        assert_eq!(made, calls, "{what}: {used:?}");
        assert_eq!((used.reads, used.writes, used.deletes), billed, "{what}: {used:?}");
    }
}

const GET: &str = "BatchGetDocuments";
const COMMIT: &str = "Commit";
const QUERY: &str = "RunQuery";

/// The table of round trips and billed documents of docs/firestore.md.
#[tokio::test(flavor = "multi_thread")]
async fn round_trips_and_billed_documents() {
    let Some(wire) = Wire::new().await else { return };
    let every_third = PersistenceConfig {
        snapshot_interval: 3,
        snapshot_retention: 1,
        ..PersistenceConfig::default()
    };
    let store = wire.store(StoreOptions::default()).await;
    wire.used();

    store.save_state("g", "a", counter(1), why()).await.unwrap();
    wire.assert_used("save_state, new", &[(COMMIT, 1)], (0, 2, 0));

    let fresh = wire.store(StoreOptions::default()).await;
    wire.used();
    let (state, version) = fresh.get_state("g", "a").await.unwrap();
    wire.assert_used("get_state", &[(GET, 1)], (1, 0, 0));
    fresh.update_state("g", "a", state, version, why()).await.unwrap();
    wire.assert_used("update_state after get_state", &[(COMMIT, 1)], (0, 2, 0));

    // `store` remembers version 1.
    let refused = store.update_state("g", "a", counter(9), 1, why()).await.unwrap_err();
    assert!(matches!(refused, Error::VersionConflict { expected: 1, actual: 2, .. }), "{refused}");
    let used = wire.used();
    assert_eq!((used.calls[COMMIT], used.calls[GET]), (1, 1), "conflict: {used:?}");
    assert!(used.reads <= 2, "{used:?}");

    let persister = StateMachinePersister::new(fresh.clone(), every_third.clone());
    let log = async |persister: &StateMachinePersister, from: Option<&_>, n| {
        persister.log_transition("g", from, &snapshot("m", json!(n)), "step", why()).await.unwrap()
    };
    let first = log(&persister, None, 1).await.to_state;
    wire.assert_used(
        "log_transition, new, on a handle that never saw it",
        &[(GET, 1), (COMMIT, 1)],
        (1, 2, 0),
    );
    let second = log(&persister, Some(&first), 2).await.to_state;
    wire.assert_used("log_transition, steady", &[(COMMIT, 1)], (0, 2, 0));
    let third = log(&persister, Some(&second), 3).await.to_state;
    wire.assert_used("log_transition with a saved snapshot", &[(COMMIT, 1)], (0, 3, 0));
    let mut state = third;
    for n in 4..=6 {
        state = log(&persister, Some(&state), n).await.to_state;
        let (writes, deletes) = if n == 6 { (3, 1) } else { (2, 0) };
        wire.assert_used("log_transition, later", &[(COMMIT, 1)], (0, writes, deletes));
    }
    let cold = StateMachinePersister::with_defaults(wire.store(StoreOptions::default()).await);
    wire.used();
    let seventh = log(&cold, Some(&state), 7).await.to_state;
    wire.assert_used("log_transition, cold", &[(GET, 1), (COMMIT, 1)], (1, 2, 0));
    assert_eq!(seventh.version, 7);

    persister.load_state("g", "m").await.unwrap();
    // The head; then the saved snapshot and what follows it, at the same time.
    wire.assert_used("load_state", &[(GET, 2), (QUERY, 1)], (3, 0, 0));

    let (then, at) = (seventh.timestamp, seventh.version);
    fresh.state_at_version("g", "m", 4).await.unwrap();
    wire.assert_used("state at a version", &[(GET, 1)], (1, 0, 0));
    let found = fresh.state_at_time("g", "m", then).await.unwrap();
    assert_eq!(found.version, at);
    wire.assert_used("state at a time", &[(QUERY, 1)], (1, 0, 0));

    for id in ["t1", "t2", "t3", "t4"] {
        fresh.save_state("g", id, snapshot(id, json!(1)), why()).await.unwrap();
    }
    let manager = TransactionManager::new(wire.store(StoreOptions::default()).await);
    wire.used();
    manager
        .execute_transaction("g", |tx| async move {
            let read = tx.batch_get_states("g", &["t1", "t2", "t3", "t4"]).await?;
            for state in read.into_iter().take(3) {
                let (id, version) = (state.id.to_string(), state.version);
                tx.update_state("g", &id, state, version, why()).await?;
            }
            Ok(())
        })
        .await
        .unwrap();
    // Four read, three written: six writes and one check.
    wire.assert_used("a transaction", &[(GET, 1), (COMMIT, 1)], (4, 7, 0));
}

/// Recovery costs the same whatever the length of the log: three round trips, two of them at once, and
/// as many documents as stand behind the newest saved snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn loading_does_not_grow_with_the_log() {
    let Some(wire) = Wire::new().await else { return };
    let persister = StateMachinePersister::with_defaults(wire.direct.clone());
    let mut length = 0;
    for wanted in [130u64, 1_030] {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in length..wanted {
            let persister = persister.clone();
            tasks.spawn(async move {
                let change = NewTransition::to("g", "long", "step", json!(1), why());
                persister.append(change).await.unwrap();
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        length = wanted;
        let cold = StateMachinePersister::with_defaults(wire.store(StoreOptions::default()).await);
        wire.used();
        let (state, was_recovery) = cold.load_state("g", "long").await.unwrap();
        assert!(was_recovery && state.version == wanted);
        wire.assert_used("load_state", &[(GET, 2), (QUERY, 1)], (32, 0, 0));
    }
}

fn impatient() -> StoreOptions {
    let mut options = StoreOptions::default();
    options.retry.base = Duration::from_millis(1);
    options.retry.cap = Duration::from_millis(20);
    options.retry.attempt_timeout = Duration::from_millis(400);
    options.retry.deadline = Duration::from_secs(20);
    // A connection that is reset takes all calls of all writers with it.
    options.retry.max_attempts = 40;
    options
}

/// What may become of a commit. The deadline of one try is 400 ms.
fn faults() -> Vec<Fault> {
    let late = Duration::from_millis(600);
    let mut faults = vec![
        Fault::DropRequest,
        Fault::LoseReply,
        Fault::Stall(late),
        Fault::StallRequest(late),
        Fault::Delay(Duration::from_millis(5)),
        Fault::Duplicate,
        Fault::Reset,
        Fault::ResetAfter,
        Fault::GoAway,
    ];
    for code in [
        Code::UNAVAILABLE,
        Code::ABORTED,
        Code::DEADLINE_EXCEEDED,
        Code::INTERNAL,
        Code::UNKNOWN,
        Code::CANCELLED,
        Code::RESOURCE_EXHAUSTED,
    ] {
        faults.push(Fault::Answer(code));
    }
    for code in [Code::UNAVAILABLE, Code::DEADLINE_EXCEEDED, Code::INTERNAL, Code::UNKNOWN] {
        faults.push(Fault::AnswerAfter(code));
    }
    faults
}

/// How 200 creations and 200 updates went under a fault that meets the first sending of each.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    told: u64,
    unknown_applied: u64,
    unknown_not_applied: u64,
    conflicts_for_own_success: u64,
}

/// Each state is created, and updated once: each commit meets the fault when it is first sent.
async fn under(wire: &Wire, store: &StateStore, governor: &str, count: u64) -> Tally {
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..16u64 {
        let (store, direct) = (store.clone(), wire.direct.clone());
        let governor = governor.to_owned();
        tasks.spawn(async move {
            let mut tally = Tally::default();
            for n in (worker..count).step_by(16) {
                let id = format!("s{n}");
                for step in 1..=2u64 {
                    let data = snapshot(&id, json!({"step": step, "n": n}));
                    // The number of the version that the intention makes is the number of the step.
                    match store.update_state(&governor, &id, data, step - 1, why()).await {
                        Ok(version) => {
                            assert_eq!(version, step);
                            let stored = direct.state_at_version(&governor, &id, version).await;
                            assert_eq!(stored.unwrap().data, json!({"step": step, "n": n}));
                            tally.told += 1;
                        }
                        Err(Error::OutcomeUnknown { version, event_id, .. }) => {
                            let there = direct.event(&governor, &id, version).await;
                            match there {
                                Ok(event) if event.id == event_id => tally.unknown_applied += 1,
                                _ => {
                                    tally.unknown_not_applied += 1;
                                    break;
                                }
                            }
                        }
                        Err(Error::VersionConflict { .. }) => {
                            tally.conflicts_for_own_success += 1;
                            break;
                        }
                        Err(error) => panic!("{id}, step {step}: {error}"),
                    }
                }
            }
            tally
        });
    }
    let mut sum = Tally::default();
    for tally in tasks.join_all().await {
        sum.told += tally.told;
        sum.unknown_applied += tally.unknown_applied;
        sum.unknown_not_applied += tally.unknown_not_applied;
        sum.conflicts_for_own_success += tally.conflicts_for_own_success;
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn every_intention_is_applied_exactly_once() {
    let Some(_) = Emulator::shared().await else { return };
    for fault in faults() {
        // A project each: on the emulator a query costs as much as there are documents in one.
        let wire = Wire::new().await.unwrap();
        let store = wire.store(impatient()).await;
        wire.proxy.inject(Rule::new(COMMIT, When::First, fault.clone()));
        wire.used();
        let tally = under(&wire, &store, "g", 200).await;
        let sent = wire.used().calls[COMMIT];
        println!("{fault:?}: {tally:?}, {sent} commits sent");
        assert_eq!(tally.conflicts_for_own_success, 0, "{fault:?}");
        assert_eq!(tally.unknown_applied + tally.unknown_not_applied, 0, "{fault:?}");
        assert_eq!(tally.told, 400, "{fault:?}");
        let report = wire.direct.verify(|_| {}).await.unwrap();
        assert!(report.ok, "{fault:?}: {:?}", report.problems);
        assert_eq!((report.states, report.events), (200, 400), "{fault:?}");
    }
}

/// What cannot be settled before the deadline is said to be unknown, with its identity; looking for
/// that settles it.
#[tokio::test(flavor = "multi_thread")]
async fn what_stays_unknown_can_be_looked_up() {
    let Some(wire) = Wire::new().await else { return };
    let mut options = impatient();
    options.retry.max_attempts = 3;
    let store = wire.store(options).await;
    for (n, fault) in
        [Fault::AnswerAfter(Code::INTERNAL), Fault::Answer(Code::INTERNAL)].into_iter().enumerate()
    {
        let id = format!("s{n}");
        wire.proxy.inject(Rule::new(COMMIT, When::Each, fault.clone()));
        wire.proxy.inject(Rule::new(GET, When::Each, Fault::Answer(Code::UNAVAILABLE)));
        let unknown = store.save_state("g", &id, counter(7), why()).await.unwrap_err();
        let Error::OutcomeUnknown { version: 1, event_id, .. } = &unknown else {
            panic!("{fault:?}: {unknown}")
        };
        assert!(!unknown.is_transient() && unknown.hint().is_some());
        wire.proxy.clear_rules();
        match store.event("g", &id, 1).await {
            Ok(event) => assert!(n == 0 && event.id == *event_id),
            Err(error) => assert!(n == 1 && error.code() == "state_not_found", "{error}"),
        }
    }
}

/// Answers that are lost to the very end, in every way a line can lose them, and a commit that came
/// twice and whose refusal cannot be looked into: never an error that invites to do it again.
#[tokio::test(flavor = "multi_thread")]
async fn what_may_have_been_applied_is_never_called_transient() {
    let Some(wire) = Wire::new().await else { return };
    let mut options = impatient();
    options.retry.max_attempts = 2;
    let faults = [
        Fault::LoseReply,
        Fault::ResetAfter,
        Fault::Stall(Duration::from_secs(2)),
        Fault::AnswerAfter(Code::CANCELLED),
        Fault::Duplicate,
    ];
    for (n, fault) in faults.into_iter().enumerate() {
        let store = wire.store(options.clone()).await;
        let id = format!("s{n}");
        wire.proxy.inject(Rule::new(COMMIT, When::Each, fault.clone()));
        // The first read of a new connection looks which store it leads to.
        let of_heads =
            When::Matching(Arc::new(|body: &[u8]| body.windows(8).any(|part| part == b"/events/")));
        wire.proxy.inject(Rule::new(GET, of_heads, Fault::Answer(Code::UNAVAILABLE)));
        let told = store.save_state("g", &id, counter(7), why()).await.unwrap_err();
        let Error::OutcomeUnknown { version: 1, event_id, .. } = &told else {
            panic!("{fault:?}: {told}")
        };
        wire.proxy.clear_rules();
        assert_eq!(wire.direct.event("g", &id, 1).await.unwrap().id, *event_id, "{fault:?}");
    }
}

/// A stream that ends well before it has said anything is no answer.
#[tokio::test(flavor = "multi_thread")]
async fn empty_streams_are_not_answers() {
    let Some(wire) = Wire::new().await else { return };
    let store = wire.store(impatient()).await;
    for n in 0..3 {
        store.save_state("g", format!("s{n}"), counter(n), why()).await.unwrap();
    }
    let then = store.get_state("g", "s1").await.unwrap().0.timestamp;
    let nothing = Fault::AnswerPart { messages: 0, code: Code::OK };
    for method in [GET, QUERY, "RunAggregationQuery"] {
        // A handle that has no connection yet looks for its store first.
        for store in [store.clone(), wire.store(impatient()).await] {
            let inject = || wire.proxy.inject(Rule::new(method, When::Nth(1), nothing.clone()));
            inject();
            assert_eq!(store.get_state("g", "s1").await.unwrap().1, 1, "{method}");
            inject();
            let page = store.list_states("g", &tai_state::ListOptions::default()).await.unwrap();
            assert_eq!(page.states.len(), 3, "{method}");
            inject();
            assert_eq!(store.state_at_time("g", "s1", then).await.unwrap().version, 1, "{method}");
            inject();
            assert_eq!(store.get_stats().await.unwrap().total_events, 3, "{method}");
            wire.proxy.clear_rules();
            wire.proxy.inject(Rule::new(GET, When::Nth(1), nothing.clone()));
            wire.proxy.cut();
            let found = store.get_state("g", "s1").await;
            assert_eq!(found.unwrap().1, 1, "{method}, on a new connection");
            wire.proxy.clear_rules();
        }
    }
}

/// Settings at the edge of what can be said neither panic nor hang.
#[tokio::test(flavor = "multi_thread")]
async fn settings_at_the_edge() {
    let Some(wire) = Wire::new().await else { return };
    for (deadline, attempt_timeout, max_attempts) in [
        (Duration::MAX, Duration::MAX, u32::MAX),
        (Duration::from_secs(20), Duration::MAX, 1),
        (Duration::MAX, Duration::from_secs(20), 0),
    ] {
        let mut options = StoreOptions::default();
        options.retry.deadline = deadline;
        options.retry.attempt_timeout = attempt_timeout;
        options.retry.max_attempts = max_attempts;
        let store = wire.store(options).await;
        store.save_state("g", "s", counter(1), why()).await.unwrap();
        store.get_state("g", "s").await.unwrap();
    }
}

/// The control: without settling, a lost answer makes a conflict of one's own success.
#[tokio::test(flavor = "multi_thread")]
async fn without_settling_a_success_is_taken_for_a_conflict() {
    let Some(wire) = Wire::new().await else { return };
    let mut options = impatient();
    options.never_settle = true;
    let store = wire.store(options).await;
    wire.proxy.inject(Rule::new(COMMIT, When::First, Fault::LoseReply));
    let tally = under(&wire, &store, "g", 32).await;
    assert!(tally.conflicts_for_own_success > 0, "{tally:?}");
}

/// Faults at random, several writers of the same states: what they were told is what happened.
#[tokio::test(flavor = "multi_thread")]
async fn racing_writers_under_random_faults() {
    let Some(wire) = Wire::new().await else { return };
    let mut random = Random::announced("racing on the wire");
    for fault in faults() {
        let when = When::Chance { per_mille: 20, seed: random.next() };
        wire.proxy.inject(Rule::new(COMMIT, when, fault));
    }
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..8u64 {
        let store = wire.store(impatient()).await;
        tasks.spawn(async move {
            let (mut told, mut unknown) = (Vec::new(), Vec::new());
            for n in 0..40u64 {
                let id = format!("s{}", n % 5);
                let data = json!({"writer": writer, "n": n});
                match store.save_state("g", &id, snapshot(&id, data.clone()), why()).await {
                    Ok(version) => told.push((id, version, data)),
                    Err(Error::OutcomeUnknown { version, event_id, .. }) => {
                        unknown.push((id, version, event_id));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            (told, unknown)
        });
    }
    let (told, unknown): (Vec<_>, Vec<_>) = tasks.join_all().await.into_iter().unzip();
    wire.proxy.clear_rules();
    let mut found = 0;
    for (id, version, event_id) in unknown.iter().flatten() {
        let there = wire.direct.event("g", id, *version).await;
        found += u64::from(there.is_ok_and(|event| event.id == *event_id));
    }
    let told: Vec<_> = told.into_iter().flatten().collect();
    for (id, version, data) in &told {
        let stored = wire.direct.state_at_version("g", id, *version).await.unwrap();
        assert_eq!(&stored.data, data, "{id} v{version}");
    }
    let unknown = unknown.iter().flatten().count();
    println!("{} told, {unknown} unknown, {found} of them applied", told.len());
    let report = wire.direct.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!(report.events, told.len() as u64 + found);
}

/// Layers of retries must not multiply: so many sendings as the policy says, as counted at the wire.
#[tokio::test(flavor = "multi_thread")]
async fn retries_are_bounded() {
    let Some(wire) = Wire::new().await else { return };
    let mut options = impatient();
    options.retry.max_attempts = 5;
    let store = wire.store(options).await;
    for code in [Code::UNAVAILABLE, Code::ABORTED, Code::INTERNAL, Code::RESOURCE_EXHAUSTED] {
        wire.proxy.inject(Rule::new("*", When::Each, Fault::Answer(code)));
        wire.used();
        let refused = store.save_state("g", "s", counter(1), why()).await.unwrap_err();
        let used = wire.used();
        assert_eq!(used.calls[COMMIT], 5, "{code:?}: {used:?}");
        // A last look after an unclear end.
        assert!(used.calls.get(GET).copied().unwrap_or(0) <= 5, "{code:?}: {used:?}");
        let unclear = matches!(code, Code::UNAVAILABLE | Code::INTERNAL);
        assert_eq!(refused.code() == "outcome_unknown", unclear, "{code:?}: {refused}");
        assert!(unclear || refused.is_transient(), "{code:?}: {refused}");
        store.get_state("g", "s").await.unwrap_err();
        assert_eq!(wire.used().calls[GET], 5, "{code:?}");
        wire.proxy.clear_rules();
    }
    for code in [Code::PERMISSION_DENIED, Code::UNAUTHENTICATED, Code::INVALID_ARGUMENT] {
        wire.proxy.inject(Rule::new("*", When::Each, Fault::Answer(code)));
        wire.used();
        let refused = store.save_state("g", "s", counter(1), why()).await.unwrap_err();
        assert_eq!(wire.used().calls[COMMIT], 1, "{code:?}");
        assert!(refused.is_permanent(), "{code:?}: {refused}");
        wire.proxy.clear_rules();
    }
    assert_eq!(store.save_state("g", "s", counter(1), why()).await.unwrap(), 1);
}

/// Sixteen clients increment one number: none is lost, and every client comes to its end.
#[tokio::test(flavor = "multi_thread")]
async fn sixteen_clients_increment_one_state() {
    const CLIENTS: u64 = 16;
    const STEPS: u64 = 50;
    let Some(wire) = Wire::new().await else { return };
    let store = wire.store(StoreOptions::default()).await;
    store.save_state("g", "counter", counter(0), why()).await.unwrap();
    let attempts = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        // A handle each: they remember nothing of one another.
        let (store, attempts) = (wire.store(StoreOptions::default()).await, Arc::clone(&attempts));
        tasks.spawn(async move {
            let retry = tai_state::RetryPolicy::default();
            for _ in 0..STEPS {
                let mut lost = 0;
                loop {
                    attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let (state, version) = store.get_state("g", "counter").await.unwrap();
                    let n = state.data["count"].as_u64().unwrap();
                    match store.update_state("g", "counter", counter(n + 1), version, why()).await {
                        Ok(_) => break,
                        Err(Error::VersionConflict { .. }) => lost += 1,
                        Err(error) => panic!("{error}"),
                    }
                    tokio::time::sleep(retry.backoff(lost)).await;
                }
            }
        });
    }
    tasks.join_all().await;
    let (state, version) = wire.direct.get_state("g", "counter").await.unwrap();
    assert_eq!(state.data, json!({"count": CLIENTS * STEPS}));
    assert_eq!(version, CLIENTS * STEPS + 1);
    let attempts = attempts.load(std::sync::atomic::Ordering::Relaxed);
    println!("{:.2} attempts for each success", attempts as f64 / (CLIENTS * STEPS) as f64);
    assert!(wire.direct.verify(|_| {}).await.unwrap().ok);
}

/// What the service says about project, database, rights and indexes comes out as its own error.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_the_service_say_what_to_do() {
    let Some(wire) = Wire::new().await else { return };
    let store = wire.store(StoreOptions::default()).await;
    store.save_state("g", "s", counter(1), why()).await.unwrap();
    for (code, message, wanted) in [
        (Code::NOT_FOUND, "The database nope does not exist for project p", "not_a_store"),
        (
            Code::PERMISSION_DENIED,
            "Cloud Firestore API has not been used in project p before or it is disabled.",
            "not_a_store",
        ),
        (Code::PERMISSION_DENIED, "Missing or insufficient permissions.", "permission_denied"),
        (
            Code::UNAUTHENTICATED,
            "Request had invalid authentication credentials.",
            "permission_denied",
        ),
        (
            Code::FAILED_PRECONDITION,
            "The query requires an index. You can create it here: https://console.example/",
            "missing_index",
        ),
    ] {
        let answer = Fault::AnswerWith { code, message: message.into() };
        wire.proxy.inject(Rule::new("*", When::Each, answer));
        let asked = store.state_at_time("g", "s", chrono::DateTime::UNIX_EPOCH).await.unwrap_err();
        assert_eq!(asked.code(), wanted, "{asked}");
        assert!(asked.to_string().contains(message), "{asked}");
        assert!(asked.hint().is_some() && asked.is_permanent(), "{asked}");
        if wanted != "missing_index" {
            let opened = FirestoreStore::builder(&wire.project).emulator(wire.proxy.address());
            let refused = opened.connect().await.unwrap_err();
            assert_eq!(refused.code(), wanted, "{refused}");
        }
        wire.proxy.clear_rules();
    }
}

/// Locks, fenced writes and idempotency keys, counted; and writers of one state, who share commits.
#[tokio::test(flavor = "multi_thread")]
async fn round_trips_of_locks_and_keys() {
    let Some(wire) = Wire::new().await else { return };
    let store = wire.store(StoreOptions::default()).await;
    let manager = TransactionManager::new(&store);
    let hour = Duration::from_secs(3_600);
    wire.used();
    let lock = manager.acquire_lock("r", "me", hour).await.unwrap();
    wire.assert_used("acquire_lock, new", &[(GET, 1), (COMMIT, 1)], (1, 1, 0));
    store.fenced_by(&lock).save_state("g", "s", counter(1), why()).await.unwrap();
    wire.assert_used("a fenced write", &[(COMMIT, 1)], (0, 3, 0));
    let refused = manager.try_acquire_lock("r", "other", hour).await;
    assert!(matches!(refused, Err(Error::LockHeld { .. })));
    wire.assert_used("try_acquire_lock, held", &[(GET, 1)], (1, 0, 0));
    manager.release_lock("r", &lock.lock_token).await.unwrap();
    wire.assert_used("release_lock", &[(COMMIT, 1)], (0, 1, 0));
    drop(lock);
    let lock = manager.acquire_lock("r", "me", hour).await.unwrap();
    wire.assert_used("acquire_lock, free", &[(GET, 1), (COMMIT, 1)], (1, 1, 0));
    let locks = manager.acquire_locks(&["a", "b", "c"], "me", hour).await.unwrap();
    wire.assert_used("acquire_locks", &[(GET, 1), (COMMIT, 1)], (3, 3, 0));
    for lock in locks.into_iter().chain([lock]) {
        lock.release().await.unwrap();
    }
    wire.used();

    let once = store.idempotency_key("k").unwrap();
    once.save_state("g", "new", counter(1), why()).await.unwrap();
    wire.assert_used("a keyed write", &[(COMMIT, 1)], (0, 3, 0));
    once.save_state("g", "new", counter(1), why()).await.unwrap();
    let used = wire.used();
    // Tried on what is remembered, refused, and answered by what is there.
    assert!(used.calls[COMMIT] <= 1 && used.calls[GET] <= 3, "the same again: {used:?}");
    assert_eq!(store.get_state("g", "new").await.unwrap().1, 1);
    wire.used();

    // Eight tasks, one handle, one state.
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for n in 0..20 {
                store.save_state("g", "hot", counter(task * 100 + n), why()).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let used = wire.used();
    assert_eq!(store.get_state("g", "hot").await.unwrap().1, 160);
    println!("160 changes of one state by 8 tasks: {} commits", used.calls[COMMIT]);
    assert!(used.calls[COMMIT] <= 80, "{used:?}");
}
