//! Every call dropped at every point, and a runtime that ends in the middle of one: all of it has
//! happened or nothing, locks are free, and the next call works.

mod cases;
mod ended;
mod whole;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use serde_json::{Value, json};
use tai_state::backend::Backend;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::{
    Error, Event, FirestoreStore, ListOptions, StateStore, StoreOptions, TransactionManager,
};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::args::Tier;
use crate::net::{snapshot, why};
use crate::random::Random;
use crate::run::{Run, Tally};
use cases::{Case, Check, Place};

/// What hangs shall be a failure.
const SOON: Duration = Duration::from_secs(10);
/// A future that is not woken for so long is not polled a second time for nothing.
const WOKEN: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_secs(60);
/// No call needs more polls.
const MOST_POLLS: u64 = 2_000;
const CONTROL: &str = "two writes that are no transaction";

/// Where stores are.
#[derive(Debug, Clone)]
enum Engine {
    Memory(Arc<MemoryBackend>),
    File(std::path::PathBuf),
    Emulator { address: String, project: String },
}

impl Engine {
    fn name(&self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::File(_) => "file",
            Self::Emulator { .. } => "emulator",
        }
    }

    /// One of the same kind that nothing else is in.
    fn another(&self) -> Self {
        match self {
            Self::Memory(_) => Self::Memory(Arc::new(MemoryBackend::new())),
            Self::File(path) => Self::File(path.with_file_name("another.tai")),
            Self::Emulator { address, .. } => {
                Self::Emulator { address: address.clone(), project: fresh_project() }
            }
        }
    }

    async fn open(&self) -> Result<StateStore, Error> {
        match self {
            Self::Memory(backend) => {
                let backend = Arc::clone(backend) as Arc<dyn Backend>;
                Ok(StateStore::with_backend(backend, StoreOptions::default()))
            }
            Self::File(path) => StateStore::open(path).await,
            Self::Emulator { address, project } => {
                let builder = FirestoreStore::builder(project).emulator(address);
                builder.connect().await.map(StateStore::from)
            }
        }
    }
}

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let before = panics();
    let emulator = Emulator::shared().await;
    if emulator.is_none() {
        tally.skip("cancel: without a Firestore emulator only memory and files were tested");
    }
    let rounds = run.size(1, 12);
    for (n, mut random) in run.rounds(rounds) {
        let folder = tempfile::tempdir().unwrap();
        let mut engines = vec![
            Engine::Memory(Arc::new(MemoryBackend::new())),
            Engine::File(folder.path().join("store.tai")),
        ];
        engines.extend(emulator.map(|emulator| Engine::Emulator {
            address: emulator.address().to_owned(),
            project: fresh_project(),
        }));
        let mut parts = JoinSet::new();
        for engine in engines.clone() {
            let mut random = Random::new(random.next());
            // There each call takes its time; with every change some of its points are passed over.
            let is_slow = matches!(engine, Engine::Emulator { .. });
            let every = if is_slow && run.tier == Tier::Short { 10 } else { 1 };
            parts.spawn(async move {
                let mut tally = Tally::default();
                round(n, &engine, every, &mut random, &mut tally).await;
                whole::run(n, &engine, every, &mut random, &mut tally).await;
                ended::run(n, &engine, &mut random, &mut tally).await;
                tally
            });
        }
        while let Some(part) = parts.join_next().await {
            match part {
                Ok(part) => tally.add(part),
                Err(error) => tally.broken(format!("round {n}: {error}")),
            }
        }
        openings(n, &engines, &mut tally).await;
    }
    tally.at_least("calls dropped", 250 * rounds);
    tally.at_least("of them after their first poll", 120 * rounds);
    tally.at_least("calls over a whole store", 6 * rounds);
    tally.at_least("runtimes ended in the middle", 20 * rounds);
    let panics = panics() - before;
    tally.count("panics", panics);
    tally.holds(panics == 0, || format!("{panics} panics"));
    tally
}

/// How many threads and tasks have panicked since this was called first.
fn panics() -> u64 {
    static HOOKED: Once = Once::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    HOOKED.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            COUNT.fetch_add(1, Ordering::SeqCst);
            usual(panic);
        }));
    });
    COUNT.load(Ordering::SeqCst)
}

async fn round(n: u64, engine: &Engine, every: u64, random: &mut Random, tally: &mut Tally) {
    let store = engine.open().await.unwrap();
    let mut cases = JoinSet::new();
    for case in cases::all() {
        let place = Place::new(&store, case.name);
        let what = format!("round {n}, {}, {}", engine.name(), case.name);
        let random = Random::new(random.next());
        cases.spawn(async move {
            let mut tally = Tally::default();
            dropped(&what, &case, &place, random, every, &mut tally).await;
            tally
        });
    }
    while let Some(case) = cases.join_next().await {
        match case {
            Ok(case) => tally.add(case),
            Err(error) => tally.broken(format!("round {n}, {}: {error}", engine.name())),
        }
    }
    feeds(&format!("round {n}, {}", engine.name()), &store, tally).await;
    let wrong = broken_variant(&store, random).await;
    tally.control(CONTROL, u64::from(wrong > 0), 1, 1);
    let report = store.verify(|_| {}).await.unwrap();
    tally.holds(report.ok, || format!("round {n}, {}: {:?}", engine.name(), report.problems));
    tally.count("events proved", report.events);
}

/// What all states of a place are, their past included as far as it begins.
type Picture = Vec<(String, u64, Value, bool, u64)>;

async fn picture(place: &Place) -> Result<Picture, Error> {
    let options = ListOptions::default().with_deleted();
    let page = place.store.list_states(&place.governor, &options).await?;
    let of = |record: tai_state::StateRecord| {
        let (version, first) = (record.snapshot.version, record.first_version);
        (record.snapshot.id.to_string(), version, record.snapshot.data, record.deleted, first)
    };
    Ok(page.states.into_iter().map(of).collect())
}

/// One call, dropped after each number of polls until it comes to its end.
async fn dropped(
    what: &str,
    case: &Case,
    place: &Place,
    mut random: Random,
    every: u64,
    tally: &mut Tally,
) {
    // What it makes when it is not dropped.
    let whole = place.at("whole");
    (case.prepare)(whole.clone()).await.unwrap();
    let most = if case.is_endless { WOKEN } else { SOON };
    let called = timeout(most, (case.call)(whole.clone())).await;
    if !case.is_endless {
        tally.holds(matches!(called, Ok(Ok(()))), || format!("{what}: {called:?}"));
    }
    drop(whole.take());
    let new = picture(&whole).await.unwrap();
    let mut next = 0;
    while next < MOST_POLLS {
        let polls = next;
        // Of the first few none is passed over.
        next += if polls < 3 { 1 } else { 1 + random.below(every * 2 - 1) };
        let place = place.at(&polls.to_string());
        (case.prepare)(place.clone()).await.unwrap();
        let old = picture(&place).await.unwrap();
        let has_ended = match polled((case.call)(place.clone()), polls, random.percent(50)).await {
            Polled::Ended(told) => {
                tally.holds(told.is_ok(), || format!("{what}, {polls} polls: {told:?}"));
                true
            }
            Polled::Dropped => false,
            Polled::Asleep => {
                if !case.is_endless {
                    tally.broken(format!("{what}: not woken after {polls} polls"));
                }
                return;
            }
        };
        tally.count("calls dropped", u64::from(!has_ended));
        tally.count("of them after their first poll", u64::from(!has_ended && polls > 0));
        let what = format!("{what}, {polls} polls");
        if let Some(wrong) = wrong(case, &place, &old, &new, has_ended).await {
            tally.broken(format!("{what}: {wrong}"));
        }
        next_works(&what, case, &place, &new, tally).await;
        if has_ended || (case.is_endless && polls > 12) {
            return;
        }
    }
    tally.broken(format!("{what}: no end after {MOST_POLLS} polls"));
}

/// What is neither old nor new.
async fn wrong(
    case: &Case,
    place: &Place,
    old: &Picture,
    new: &Picture,
    has_ended: bool,
) -> Option<String> {
    let now = match picture(place).await {
        Ok(now) => now,
        Err(error) => return Some(format!("it cannot be read: {error}")),
    };
    let holds = match case.check {
        Check::Whole => now == *new || (!has_ended && now == *old),
        // Each step is whole; between two of them the past may begin anywhere in between.
        Check::Steps => !has_ended || now == *new,
    };
    if !holds {
        return Some(format!("it is {now:?}, and was {old:?}, and should be {new:?}"));
    }
    let report = place.store.validate_consistency(&place.governor).await;
    match report {
        Ok(report) if report.ok => None,
        Ok(report) => Some(format!("{:?}", report.problems)),
        Err(error) => Some(format!("it cannot be proved: {error}")),
    }
}

/// The next calls work: the same to its end where it has steps, a lock, a write.
async fn next_works(what: &str, case: &Case, place: &Place, new: &Picture, tally: &mut Tally) {
    drop(place.take());
    let manager = place.manager();
    match timeout(SOON, manager.acquire_lock_within("r", "next", LEASE, SOON)).await {
        Ok(Ok(lock)) => {
            let released = timeout(SOON, lock.release()).await;
            tally.holds(matches!(released, Ok(Ok(()))), || format!("{what}: {released:?}"));
        }
        other => tally.broken(format!("{what}: the lock is not free: {other:?}")),
    }
    if case.check == Check::Steps {
        let again = timeout(SOON, (case.call)(place.clone())).await;
        tally.holds(matches!(again, Ok(Ok(()))), || format!("{what}: once more: {again:?}"));
        let now = picture(place).await;
        tally.holds(now.as_ref().is_ok_and(|now| now == new), || {
            format!("{what}: once more makes {now:?}, and should make {new:?}")
        });
    }
    let save = place.store.save_state(&place.governor, "a", snapshot("a", json!("next")), why());
    let saved = timeout(SOON, save).await;
    tally.holds(matches!(saved, Ok(Ok(_))), || format!("{what}: the next write: {saved:?}"));
    let report = place.store.validate_consistency(&place.governor).await;
    tally.holds(report.as_ref().is_ok_and(|report| report.ok), || format!("{what}: {report:?}"));
}

/// Tells that a future was woken.
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

enum Polled<T> {
    Ended(T),
    Dropped,
    /// Nobody has woken it.
    Asleep,
}

/// Polls a future so often, each time when it was woken, and drops it: at once, or when it would have been
/// polled again.
async fn polled<T>(
    mut future: Pin<Box<dyn Future<Output = T> + Send + '_>>,
    times: u64,
    at_once: bool,
) -> Polled<T> {
    let bell = Arc::new(Bell(Notify::new()));
    let waker = Waker::from(Arc::clone(&bell));
    for _ in 0..times {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Polled::Ended(value);
        }
        // What was not woken after its last poll would hang.
        if !at_once && timeout(WOKEN, bell.0.notified()).await.is_err() {
            return Polled::Asleep;
        }
        if at_once {
            tokio::select! {
                () = bell.0.notified() => {}
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
    }
    Polled::Dropped
}

/// A feed that is asked again and again and given up tells every event once, in order.
async fn feeds(what: &str, store: &StateStore, tally: &mut Tally) {
    const EVENTS: u64 = 12;
    for n in 0..EVENTS {
        store.save_state("feed", "a", snapshot("a", json!(n)), why()).await.unwrap();
    }
    let mut feed = store.watch("feed", "a").unwrap();
    let (mut told, mut polls) = (Vec::new(), 1);
    while told.len() < EVENTS as usize {
        let next: Pin<Box<dyn Future<Output = Result<Event, Error>> + Send + '_>> =
            Box::pin(feed.next());
        let got = match polled(next, polls, false).await {
            Polled::Ended(event) => Some(event),
            Polled::Dropped => None,
            Polled::Asleep => {
                return tally.broken(format!("{what}, a feed: silent after {told:?}"));
            }
        };
        match got {
            Some(Ok(event)) => {
                told.push(event.version());
                // From the beginning: the next one is given up first.
                polls = 1;
            }
            Some(Err(error)) => return tally.broken(format!("{what}, a feed: {error}")),
            None => {
                tally.count("calls dropped", 1);
                tally.count("of them after their first poll", 1);
                polls += 1;
            }
        }
    }
    let all: Vec<u64> = (1..=EVENTS).collect();
    tally.holds(told == all, || format!("{what}, a feed told {told:?}"));
}

/// Opening a store, given up at each point, leaves one that can be opened.
async fn openings(n: u64, engines: &[Engine], tally: &mut Tally) {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines {
        for polls in 0..MOST_POLLS {
            let fresh = match engine {
                Engine::Memory(_) => break,
                Engine::File(_) => Engine::File(folder.path().join(format!("{polls}.tai"))),
                Engine::Emulator { address, .. } => {
                    Engine::Emulator { address: address.clone(), project: fresh_project() }
                }
            };
            let what = format!("round {n}, {}, opening, {polls} polls", engine.name());
            let opening = fresh.clone();
            let opened = polled(Box::pin(async move { opening.open().await }), polls, true).await;
            let has_ended = matches!(opened, Polled::Ended(_));
            tally.count("calls dropped", u64::from(!has_ended));
            drop(opened);
            match timeout(SOON, fresh.open()).await {
                Ok(Ok(store)) => {
                    let saved = store.save_state("g", "a", snapshot("a", json!(1)), why()).await;
                    tally.holds(matches!(saved, Ok(1)), || format!("{what}: {saved:?}"));
                    let report = store.verify(|_| {}).await;
                    tally.holds(report.as_ref().is_ok_and(|report| report.ok), || {
                        format!("{what}: {report:?}")
                    });
                }
                other => tally.broken(format!("{what}: {other:?}")),
            }
            if has_ended {
                break;
            }
        }
    }
}

/// A change of two states by two calls, dropped at each point; at how many it is half.
async fn broken_variant(store: &StateStore, random: &mut Random) -> u64 {
    let case = cases::two_writes();
    let place = Place::new(store, "control").at(&random.next().to_string());
    let whole = place.at("whole");
    (case.prepare)(whole.clone()).await.unwrap();
    (case.call)(whole.clone()).await.unwrap();
    let new = picture(&whole).await.unwrap();
    let mut noticed = 0;
    for polls in 0..MOST_POLLS {
        let place = place.at(&polls.to_string());
        (case.prepare)(place.clone()).await.unwrap();
        let old = picture(&place).await.unwrap();
        let has_ended =
            matches!(polled((case.call)(place.clone()), polls, false).await, Polled::Ended(_));
        noticed += u64::from(wrong(&case, &place, &old, &new, has_ended).await.is_some());
        if has_ended {
            break;
        }
    }
    noticed
}

/// The manager of a place, whose locks are its own.
fn manager(store: &StateStore, governor: &str) -> TransactionManager {
    TransactionManager::new(store).with_lock_governor(governor)
}
