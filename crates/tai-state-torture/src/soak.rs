//! All of it at once, for as long as is wanted: money, lists, locks, clean-up, snapshots, followers and
//! killed writers on one store, which is looked at all the while.

mod tail;
mod writers;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tai_state::Error;
use tai_state::testing::emulator::Emulator;

use crate::args::Tier;
use crate::bank::money;
use crate::engine::{Engine, Store, problems};
use crate::process::Asked;
use crate::random::Random;
use crate::run::{Run, Tally};
use crate::tool;

/// The governor of the lists, and how many there are.
const LISTS: &str = "lists";
const KEYS: u64 = 3;
/// Processes that append; the first is never killed, so that its memory can be watched.
const APPENDERS: u64 = 3;
/// The emulator keeps all that it was ever told in its memory and is slower and slower; so a long run goes on
/// with a new one after so many seconds.
const AN_EMULATOR_LASTS: u64 = 5 * 60;
/// How often all of it is proved. A proof reads everything, so each tenth of a second it would be all that is
/// done; in between the log of one state after the other is replayed and compared.
const PROVED_EVERY: Duration = Duration::from_secs(10);
/// The memory of a process may grow by so much from the middle of a run to its end.
const GROWTH: f64 = 1.25;
const GROWTH_KIB: u64 = 16 << 10;

/// What all parts of a run on one store share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    over: AtomicBool,
    written: AtomicBool,
    wrong: Mutex<Vec<String>>,
    matching: Mutex<tail::Matching>,
    /// All fencing tokens that were granted to anybody.
    tokens: Mutex<BTreeSet<u64>>,
    appended: AtomicU64,
    kills: AtomicU64,
    fenced: AtomicU64,
    fenced_unknown: AtomicU64,
    holders_killed: AtomicU64,
    snapshots: AtomicU64,
    cleanups: AtomicU64,
    cleaned: AtomicU64,
    replays: AtomicU64,
    /// Not now, as a call may answer.
    given_up: AtomicU64,
    processes: Mutex<HashMap<u64, u32>>,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn is_written(&self) -> bool {
        self.written.load(Ordering::SeqCst)
    }

    /// To be asked before a lock is: what is granted then is above it.
    fn newest_token(&self) -> u64 {
        self.tokens.lock().unwrap().last().copied().unwrap_or_default()
    }

    /// A token is above all that were known when its lock was asked for, and was granted to nobody else.
    /// When it becomes known says nothing: its holder may have been late, and its lease over.
    fn granted(&self, token: u64, newest: u64) {
        if token <= newest {
            self.wrong(format!("token {token} of a lock that was asked for after {newest}"));
        }
        if !self.tokens.lock().unwrap().insert(token) {
            self.wrong(format!("token {token} was granted twice"));
        }
    }

    fn wrong(&self, what: String) {
        println!("  wrong: {what}");
        self.wrong.lock().unwrap().push(what);
    }

    /// It may have to be tried again later, and nothing else.
    fn allowed(&self, what: &str, outcome: Result<(), Error>) {
        match outcome {
            Ok(()) => {}
            Err(Error::StateNotFound { .. }) => {}
            Err(error) if error.is_transient() => {
                self.given_up.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => self.wrong(format!("{what}: {error}")),
        }
    }

    fn note_process(&self, client: u64, pid: u32) {
        self.processes.lock().unwrap().insert(client, pid);
    }

    /// Waits, unless it is over before.
    fn waits(&self, how_long: Duration) {
        let until = Instant::now() + how_long;
        while !self.is_over() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What one process had, sample after sample.
#[derive(Debug, Default)]
struct Memory(Vec<u64>);

impl Memory {
    fn look(&mut self, pid: &str) {
        self.0.extend(tool::memory(pid, "VmRSS"));
    }

    fn highest(&self) -> u64 {
        self.0.iter().copied().max().unwrap_or(0)
    }

    /// The highest of the second quarter, in which everything has been seen once, and of the last.
    fn middle_and_end(&self) -> (u64, u64) {
        let quarter = self.0.len() / 4;
        let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
        (most(&self.0[quarter..quarter * 2]), most(&self.0[quarter * 3..]))
    }

    fn grows(&self) -> bool {
        let (middle, end) = self.middle_and_end();
        end as f64 > middle as f64 * GROWTH && end > middle + GROWTH_KIB
    }
}

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let emulator = Engine::emulator(&mut tally, "the soak on the emulator").await;
    let seconds = run.size(20, 30 * 60);
    let is_long = run.tier == Tier::Long;
    for (_, mut random) in run.rounds(1) {
        let (one, two) = (random.split(), random.split());
        let parts = tokio::join!(
            soaked(Engine::File, seconds, one, is_long),
            on_the_emulator(emulator, seconds, two, is_long),
        );
        tally.add(parts.0);
        tally.add(parts.1);
    }
    for engine in [Some(Engine::File), emulator].into_iter().flatten() {
        enough(engine, seconds, is_long, &mut tally);
    }
    tally
}

/// One emulator after the other in a long run.
async fn on_the_emulator(
    shared: Option<Engine>,
    seconds: u64,
    mut random: Random,
    is_long: bool,
) -> Tally {
    let mut tally = Tally::default();
    let Some(shared) = shared else { return tally };
    let mut left = seconds;
    while left > 0 {
        let own = if is_long { Emulator::own().await } else { None };
        let engine = own.as_ref().map_or(shared, Engine::of);
        let part = left.min(AN_EMULATOR_LASTS);
        tally.add(soaked(engine, part, random.split(), is_long).await);
        left -= part;
    }
    tally
}

/// With less than this the run says nothing. A long run has more to show.
fn enough(engine: Engine, seconds: u64, is_long: bool, tally: &mut Tally) {
    let of = |short, long| if is_long { long } else { short };
    let (events, snapshots) = match engine {
        Engine::Emulator(_) => (of(500, 5_000), of(20, 500)),
        _ => (of(500, 100_000), of(20, 1_000)),
    };
    for (what, least) in [
        ("events followed", events),
        ("appends acknowledged", 5 * seconds),
        ("fenced writes", seconds),
        ("writers killed", seconds / 20),
        ("logs replayed and compared", seconds),
        ("snapshots saved", snapshots),
        ("clean-ups", seconds / 20),
        ("events cleaned up", seconds),
    ] {
        tally.at_least(&format!("{what} on {}", engine.name()), least);
    }
}

async fn soaked(engine: Engine, seconds: u64, mut random: Random, watches_memory: bool) -> Tally {
    let mut tally = Tally::default();
    let store = Arc::new(engine.store());
    let shared = Arc::new(Shared::default());
    let asked = Arc::new(Asked::default());
    let [here, there] = [store.open().await, store.open().await];

    // The followers come first, on a handle of their own.
    let mut tails = tokio::task::JoinSet::new();
    for governor in [LISTS, money::BANK] {
        let (follower, shared) = (store.open().await, Arc::clone(&shared));
        let feed = follower.watch_governor(governor).unwrap();
        tails.spawn(
            async move { (governor, tail::followed(follower, governor, feed, &shared).await) },
        );
    }
    money::founded(&here).await;
    let bank = money::opened(&[here.clone(), there.clone()], &mut random);
    let mut tasks = tokio::task::JoinSet::new();
    for handle in [&here, &there] {
        tasks.spawn(writers::holds(handle.clone(), random.split(), Arc::clone(&shared)));
    }
    tasks.spawn(writers::tidies(there.clone(), random.split(), Arc::clone(&shared)));
    tasks.spawn(writers::replays(here.clone(), random.split(), Arc::clone(&shared)));
    for client in 0..APPENDERS {
        let (url, asked, shared) = (store.url.clone(), Arc::clone(&asked), Arc::clone(&shared));
        let (random, kills) = (random.split(), if client == 0 { 0 } else { 1 });
        tasks.spawn_blocking(move || {
            writers::appends(&url, client, kills, random, &asked, &shared);
        });
    }
    let (holder, watched) = ((Arc::clone(&store), Arc::clone(&shared)), random.split());
    tasks.spawn_blocking(move || writers::holders_die(&holder.0, watched, &holder.1));

    let memory = watched_until(&store, seconds, &shared, &mut tally).await;
    shared.over.store(true, Ordering::SeqCst);
    bank.is_over();
    tasks.join_all().await;
    tally.add(bank.ended(engine.name()).await);
    shared.written.store(true, Ordering::SeqCst);
    for (governor, seen) in tails.join_all().await {
        if governor == LISTS {
            let (caught, of) = tail::teeth(&seen);
            tally.control(
                "a follower is shown a gap, an event twice, another list",
                caught,
                of,
                of,
            );
        }
        tally.count(&format!("events followed on {}", engine.name()), seen.events);
    }
    judged(engine, &store, &shared, &asked, &mut tally).await;
    remembered(engine, &memory, watches_memory, &mut tally);
    tally
}

/// Looks at memory all the time and proves everything now and then, until the time is over.
async fn watched_until(
    store: &Arc<Store>,
    seconds: u64,
    shared: &Shared,
    tally: &mut Tally,
) -> [Memory; 2] {
    let mut memory = [Memory::default(), Memory::default()];
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut proof = Instant::now() + PROVED_EVERY.min(Duration::from_secs(seconds / 3));
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(200)).await;
        memory[0].look("self");
        let first = shared.processes.lock().unwrap().get(&0).copied();
        if let Some(first) = first {
            memory[1].look(&first.to_string());
        }
        if Instant::now() >= proof {
            // Another process proves it, beside everything else.
            let proved = Arc::clone(store);
            let report = tokio::task::spawn_blocking(move || proved.json(&["verify"]));
            let report = report.await.unwrap();
            tally.count("proofs while everything went on", 1);
            tally.holds(report.exit == 0, || format!("verify says no: {report:?}"));
            proof = Instant::now() + PROVED_EVERY;
        }
    }
    memory
}

/// What stands in the store in the end, and what everyone was told.
async fn judged(engine: Engine, store: &Store, shared: &Shared, asked: &Asked, tally: &mut Tally) {
    let what = engine.name();
    let is = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let opened = store.open().await;
    let counter = match opened.get_state("held", "n").await {
        Ok((state, _)) => state.data.as_u64().unwrap(),
        Err(_) => 0,
    };
    let most = is(&shared.fenced) + is(&shared.fenced_unknown);
    tally.holds((is(&shared.fenced)..=most).contains(&counter), || {
        format!("{what}: {} to {most} fenced writes, {counter} counted", is(&shared.fenced))
    });
    let (unseen, untold, matched) = {
        let matching = shared.matching.lock().unwrap();
        (matching.unseen(), matching.untold() as u64, matching.matched)
    };
    tally.holds(unseen == 0, || format!("{what}: {unseen} acknowledged appends were never seen"));
    tally.holds(untold <= is(&shared.kills) + is(&shared.given_up), || {
        format!("{what}: {untold} appends of nobody")
    });
    for problem in problems(&opened).await {
        tally.broken(format!("{what}: {problem}"));
    }
    for wrong in shared.wrong.lock().unwrap().iter().chain(asked.wrong.lock().unwrap().iter()) {
        tally.broken(format!("{what}: {wrong}"));
    }
    for (name, count) in [
        ("appends acknowledged", is(&shared.appended)),
        ("of them seen as told", matched),
        ("writers killed", is(&shared.kills)),
        ("fenced writes", is(&shared.fenced)),
        ("holders killed", is(&shared.holders_killed)),
        ("snapshots saved", is(&shared.snapshots)),
        ("clean-ups", is(&shared.cleanups)),
        ("events cleaned up", is(&shared.cleaned)),
        ("logs replayed and compared", is(&shared.replays)),
    ] {
        tally.count(&format!("{name} on {what}"), count);
    }
}

/// Whether memory stays what it was; too short a run cannot say.
fn remembered(engine: Engine, memory: &[Memory; 2], is_watched: bool, tally: &mut Tally) {
    for (name, memory) in ["the harness", "a writer"].into_iter().zip(memory) {
        let what = format!("{name} on {}", engine.name());
        let (middle, end) = memory.middle_and_end();
        println!("  {what}: {middle} KiB in the second quarter, {end} KiB in the last");
        tally.highest(&format!("KiB of memory at most, of {name}"), memory.highest());
        tally.holds(!is_watched || !memory.grows(), || {
            format!("the memory of {what} grows: {middle} KiB, then {end} KiB")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_noticed() {
        let flat = Memory((0..100).map(|n| 40_000 + n % 7).collect());
        assert!(!flat.grows());
        let leak = Memory((0..100).map(|n| 40_000 + n * 1_000).collect());
        assert!(leak.grows());
    }
}
