//! Read, add one, write if nobody was faster: by tasks and by processes, and everyone is counted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tai_state::{Error, StateStore};

use crate::engine::{Engine, Store, snapshot, why};
use crate::process::{ANSWER, Asked, Process};
use crate::run::Tally;
use crate::versions::{self, Deed, Log, Step, Told};

/// Nobody waits longer for a success while others have theirs.
const STARVED: Duration = Duration::from_secs(30);
const G: &str = "counters";

/// One who counts: what it does, and what it was told.
#[derive(Debug, Clone, Copy)]
struct Plan {
    client: u64,
    keys: u64,
    each: u64,
    /// Whether a write says which version it builds on.
    is_guarded: bool,
    from: Instant,
}

/// What a counter saw, and what came of its write.
#[derive(Debug)]
enum Answer {
    Made(u64),
    /// The version that was expected, and the one that was there.
    Conflict(u64, u64),
    Unknown,
    Wrong(String),
}

#[derive(Debug, Default)]
struct Heard {
    deeds: Vec<Deed>,
    done: u64,
    conflicts: u64,
    unknown: u64,
    given_up: u64,
    longest: Duration,
    wrong: Vec<String>,
}

impl Plan {
    fn now(&self) -> u64 {
        u64::try_from(self.from.elapsed().as_nanos()).unwrap()
    }

    fn key(&self, attempt: u64) -> u64 {
        (self.client + attempt) % self.keys
    }

    /// Of its own, among all of a run.
    fn value(&self, attempt: u64) -> u64 {
        self.client * 1_000_000 + attempt + 1
    }
}

impl Heard {
    /// What it read, and then what became of what it wrote.
    fn read(&mut self, plan: &Plan, key: u64, asked: u64, seen: (u64, &Value)) {
        let (version, data) = seen;
        let steps = vec![Step::Read { key, version, value: data["by"].as_u64() }];
        self.deeds.push(Deed { asked, ended: plan.now(), told: Told::Done, steps });
    }

    fn wrote(
        &mut self,
        plan: &Plan,
        attempt: u64,
        asked: u64,
        seen: (u64, &Value),
        answer: Answer,
    ) {
        let (key, value) = (plan.key(attempt), plan.value(attempt));
        let (version, data) = seen;
        let mut steps = vec![Step::Read { key, version, value: data["by"].as_u64() }];
        let mut write = |version| steps.push(Step::Write { key, version, value });
        let told = match answer {
            Answer::Made(version) => {
                write(Some(version));
                self.done += 1;
                Told::Done
            }
            Answer::Conflict(expected, actual) => {
                write(None);
                self.conflicts += 1;
                if expected != version || actual <= expected {
                    let what = format!("v{version} was expected: {expected}, not {actual}");
                    self.wrong.push(what);
                }
                Told::Refused
            }
            Answer::Unknown => {
                write(None);
                self.unknown += 1;
                Told::Unknown
            }
            Answer::Wrong(what) => return self.wrong.push(what),
        };
        self.deeds.push(Deed { asked, ended: plan.now(), told, steps });
    }
}

/// The value with one more, and whose it is.
fn next(data: &Value, by: u64) -> Value {
    json!({"n": data["n"].as_u64().unwrap_or(0) + 1, "by": by})
}

/// A task of this process.
async fn task(plan: Plan, store: StateStore) -> Heard {
    let mut heard = Heard::default();
    let mut last = Instant::now();
    for attempt in 0..plan.each {
        let key = plan.key(attempt);
        let name = format!("k{key}");
        let asked = plan.now();
        let (version, data) = match store.get_state(G, &name).await {
            Ok((state, version)) => (version, state.data),
            Err(Error::StateNotFound { .. }) => (0, Value::Null),
            Err(error) => {
                heard.wrong.push(format!("a read: {error}"));
                continue;
            }
        };
        heard.read(&plan, key, asked, (version, &data));
        let new = snapshot(&name, next(&data, plan.value(attempt)));
        let asked = plan.now();
        let made = match plan.is_guarded {
            true => store.update_state(G, &name, new, version, why()).await,
            false => store.save_state(G, &name, new, why()).await,
        };
        let answer = match made {
            Ok(version) => Answer::Made(version),
            Err(Error::VersionConflict { expected, actual, .. }) => {
                Answer::Conflict(expected, actual)
            }
            Err(Error::OutcomeUnknown { .. }) => Answer::Unknown,
            Err(error) => Answer::Wrong(format!("a write: {error}")),
        };
        if matches!(answer, Answer::Made(_)) {
            heard.longest = heard.longest.max(last.elapsed());
            last = Instant::now();
        }
        heard.wrote(&plan, attempt, asked, (version, &data), answer);
    }
    heard.longest = heard.longest.max(last.elapsed());
    heard
}

/// One that asks a process `tai-state txn`.
fn process(plan: Plan, process: &Process) -> Heard {
    let mut heard = Heard::default();
    let mut last = Instant::now();
    for attempt in 0..plan.each {
        let key = plan.key(attempt);
        let state = format!("{G}/k{key}");
        let asked = plan.now();
        let Some(seen) = process.ask(&[json!({"op": "get", "state": state})], ANSWER) else {
            heard.wrong.push("a process has ended".into());
            return heard;
        };
        let result = &seen["results"][0];
        let Some(version) = result["version"].as_u64() else {
            // A transaction with an id leaves an answer, so that it is a commit that can lose.
            match seen["code"] == "transaction_failed" && seen["outcome"] == "not_applied" {
                true => heard.given_up += 1,
                false => heard.wrong.push(format!("a read: {seen}")),
            }
            continue;
        };
        let data = result["data"].clone();
        heard.read(&plan, key, asked, (version, &data));
        let mut put =
            json!({"op": "put", "state": state, "data": next(&data, plan.value(attempt))});
        if plan.is_guarded {
            put["expect"] = version.into();
        }
        let asked = plan.now();
        let Some(answer) = process.ask(&[put], ANSWER) else {
            heard.wrong.push("a process has ended".into());
            return heard;
        };
        let number = |field: &str| answer[field].as_u64();
        let made = answer["results"][0]["version"].as_u64();
        let conflict = (answer["code"] == "version_conflict").then_some(());
        let answer = match (made, conflict.and(number("expected").zip(number("actual")))) {
            (Some(version), _) => Answer::Made(version),
            (_, Some((expected, actual))) => Answer::Conflict(expected, actual),
            _ if answer["outcome"] == "unknown" => Answer::Unknown,
            _ => Answer::Wrong(format!("a write: {answer}")),
        };
        if matches!(answer, Answer::Made(_)) {
            heard.longest = heard.longest.max(last.elapsed());
            last = Instant::now();
        }
        heard.wrote(&plan, attempt, asked, (version, &data), answer);
    }
    heard.longest = heard.longest.max(last.elapsed());
    heard
}

/// All clients of one store, to their end: every other one is a process.
async fn counted(
    store: &Store,
    clients: u64,
    keys: u64,
    each: u64,
    is_guarded: bool,
) -> Vec<Heard> {
    let asked = Arc::new(Asked::default());
    let handles = [store.open().await, store.open().await];
    let from = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..clients {
        let plan = Plan { client, keys, each, is_guarded, from };
        if client % 2 == 0 {
            tasks.spawn(task(plan, handles[client as usize / 2 % 2].clone()));
        } else {
            let (url, asked) = (store.url.clone(), Arc::clone(&asked));
            tasks.spawn_blocking(move || process(plan, &Process::start(&url, 1, &asked)));
        }
    }
    let mut heard = tasks.join_all().await;
    let wrong = std::mem::take(&mut *asked.wrong.lock().unwrap());
    heard[0].wrong.extend(wrong);
    heard
}

/// What came of a run: the counters' sums, their logs, and the fault of the whole.
async fn outcome(store: &Store, heard: &[Heard], keys: u64) -> (u64, u64, Vec<String>) {
    let opened = store.open().await;
    let mut log = Log::new();
    let (mut counter, mut events) = (0, 0);
    for key in 0..keys {
        let name = format!("k{key}");
        let Ok((state, version)) = opened.get_state(G, &name).await else { continue };
        counter += state.data["n"].as_u64().unwrap();
        events += version;
        let mut history = opened.history(G, &name, ..).await.unwrap();
        let values = log.entry(key).or_default();
        while let Some(event) = history.next().await.unwrap() {
            values.push(event.to_state.data["by"].as_u64().unwrap());
        }
    }
    let deeds: Vec<Deed> = heard.iter().flat_map(|heard| heard.deeds.iter().cloned()).collect();
    (counter, events, versions::faults(&deeds, &log))
}

/// So many clients at a time, so often each, on one key and on ten.
pub(crate) async fn on(engine: Option<Engine>, clients: &[u64], each: u64) -> Tally {
    let mut tally = Tally::default();
    let Some(engine) = engine else { return tally };
    let what = engine.name();
    for (clients, keys) in clients.iter().flat_map(|n| [(*n, 1), (*n, 10)]) {
        let store = engine.store();
        let heard = counted(&store, clients, keys, each, true).await;
        let (counter, events, faults) = outcome(&store, &heard, keys).await;
        let sum = |of: fn(&Heard) -> u64| heard.iter().map(of).sum::<u64>();
        let (done, unknown) = (sum(|h| h.done), sum(|h| h.unknown));
        let longest = heard.iter().map(|h| h.longest).max().unwrap();
        let name = format!("{clients} counters on {keys} keys on {what}");
        println!("  {name}: {done} of {} done, longest wait {longest:?}", clients * each);
        tally.count(&format!("read-modify-writes on {what}"), clients * each);
        tally.count("of them done", done);
        tally.count("of them typed conflicts", sum(|h| h.conflicts));
        tally.count("of them unknown", unknown);
        tally.count("reads that gave up, having lost 8 times", sum(|h| h.given_up));
        tally.highest("ms the longest wait for a success", longest.as_millis() as u64);
        tally.holds(counter == events && (done..=done + unknown).contains(&counter), || {
            format!("{name}: {done} done, {counter} counted, {events} in the log")
        });
        tally.holds(longest < STARVED, || format!("{name}: one waited {longest:?}"));
        for wrong in heard.iter().flat_map(|heard| &heard.wrong).chain(&faults) {
            tally.broken(format!("{name}: {wrong}"));
        }
        store.verified();
    }
    // The same without a version that is expected.
    let store = engine.store();
    let heard = counted(&store, 8, 1, 30, false).await;
    let (counter, _, faults) = outcome(&store, &heard, 1).await;
    let done: u64 = heard.iter().map(|heard| heard.done).sum();
    let lost = u64::from(counter < done && !faults.is_empty());
    tally.control(&format!("no version is expected, on {what}: updates are lost"), lost, 1, 1);
    tally
}
