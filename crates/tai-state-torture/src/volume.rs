//! Long logs: however long they are, appending, paging, following, replaying, exporting, proving, loading,
//! saving a snapshot and cleaning up take the same memory.

use std::collections::VecDeque;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tai_state::{CleanupOptions, Event, NewTransition, StateMachinePersister, StateStore};

use crate::args::Tier;
use crate::engine::{Engine, why};
use crate::run::{Run, Tally};
use crate::tool;

/// Each is a process of its own, so that its peak is its own.
const STEPS: [&str; 8] =
    ["append", "pages", "follow", "replay", "export", "prove", "load", "snapshot"];
/// Those that can be done again.
const READS: [&str; 7] = ["pages", "follow", "replay", "export", "prove", "load", "snapshot"];
/// How often such a step is looked at before it is said to grow. How far a reader is ahead of what is done with
/// its pages changes from one process to the next, by up to 12 MiB, whatever the length of the log (`prove`
/// took 20 to 32 MiB seven times each on 100,000 and on 1,000,000 events); what grows with the log does so
/// each time. The least of each length counts.
const LOOKS: u64 = 3;
/// Comes last, since it leaves little.
const CLEAN_UP: &str = "clean up";
const KEPT: u64 = 10;
/// Reads all events and keeps them: what the others must not do.
const HOARD: &str = "hoard";
/// MiB that a process may take, whatever it does.
const MOST: u64 = 128;
/// From a log to one that is ten times as long a peak may grow by a tenth, and by what a process of a few
/// MiB varies by from one start to the next.
const GROWTH: f64 = 1.1;
const NOISE_KIB: f64 = 4_096.0;
/// A tenth of them is some pages still.
const ON_THE_EMULATOR: u64 = 20_000;
/// A connection's buffers grow once, sooner or later, by some 10 MiB whatever the length of the log; so on the
/// emulator a peak may grow by this part of what keeping all events takes in the same run.
const OF_WHAT_IS_KEPT: u64 = 4;
const IN_FLIGHT: usize = 512;
/// What a million events must be replayed at, and how soon a state is there that has a saved snapshot.
const REPLAYED_A_SECOND: f64 = 200_000.0;
const LOADED_WITHIN: Duration = Duration::from_secs(1);
const STATE: (&str, &str) = ("g", "long");
const CONTROL: &str = "a reader that keeps what it has read takes more memory";

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    if peak().is_none() {
        tally.skip("memory of long logs: this system does not tell what a process took");
        return tally;
    }
    let file = if run.tier == Tier::Long { Engine::File } else { Engine::Memory };
    grows(file, run.size(40_000, 1_000_000), &mut tally);
    if let Some(emulator) = Engine::emulator(&mut tally, "long logs on the emulator").await {
        grows(emulator, ON_THE_EMULATOR, &mut tally);
    }
    tally
}

/// A log, and one that is ten times as long.
fn grows(engine: Engine, most: u64, tally: &mut Tally) {
    let name = engine.name();
    let (short, long) = (engine.store(), engine.store());
    let of = |step: &str, tally: &mut Tally| {
        let (few, _) = taken(step, &short.url, most / 10);
        let (many, took) = taken(step, &long.url, most);
        tally.highest(&format!("MiB at most for {step} on {name}"), many.div_ceil(1_024));
        println!(
            "  {step} on {name}: {few} KiB for {}, {many} KiB for {most} in {took:?}",
            most / 10
        );
        tally
            .holds(many <= MOST << 10 || step == HOARD, || format!("{step} on {name}: {many} KiB"));
        if engine == Engine::File {
            soon_enough(step, most, took, tally);
        }
        (few, many)
    };
    let is_more = |few: u64, many: u64| many as f64 > few as f64 * GROWTH + NOISE_KIB;
    let mut peaks: Vec<_> = STEPS.iter().map(|step| (*step, of(step, tally))).collect();
    let (few, many) = of(HOARD, tally);
    tally.control(CONTROL, u64::from(is_more(few, many)), 1, 1);
    let kept = many.saturating_sub(few);
    let grew = |(few, many): (u64, u64)| match engine {
        Engine::Emulator(_) => many.saturating_sub(few) > kept / OF_WHAT_IS_KEPT,
        _ => is_more(few, many),
    };
    for (step, peak) in &mut peaks {
        for _ in 1..if READS.contains(step) { LOOKS } else { 1 } {
            if grew(*peak) {
                tally.count("looks again at a peak", 1);
                let (few, many) = of(step, tally);
                *peak = (peak.0.min(few), peak.1.min(many));
            }
        }
    }
    peaks.push((CLEAN_UP, of(CLEAN_UP, tally)));
    for (step, (few, many)) in peaks {
        tally.holds(!grew((few, many)), || {
            format!("{step} on {name}: {few} KiB for {} events, {many} for {most}", most / 10)
        });
        tally.count(&format!("steps over {most} events on {name}"), 1);
    }
}

/// How fast it has to be in a file, the opening included.
fn soon_enough(step: &str, events: u64, took: Duration, tally: &mut Tally) {
    let rate = events as f64 / took.as_secs_f64();
    match step {
        "replay" => {
            tally.count("events replayed a second", rate as u64);
            tally
                .holds(rate >= REPLAYED_A_SECOND, || format!("{rate:.0} events replayed a second"));
        }
        "load" => {
            tally.highest("ms at most to load a state", took.as_millis() as u64);
            tally.holds(took <= LOADED_WITHIN, || format!("a state was loaded in {took:?}"));
        }
        _ => {}
    }
}

/// The peak of a process that does this, in KiB, and how long it took.
fn taken(step: &str, url: &str, events: u64) -> (u64, Duration) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    tool::apart(&mut command);
    command.args(["volume-step", step, url, &events.to_string()]);
    let ran = tool::ran(command, b"");
    let parts: Vec<u64> = ran.out.split_whitespace().filter_map(|part| part.parse().ok()).collect();
    let [done, peak, took] = parts[..] else { panic!("{step} on {url}: {ran:?}") };
    assert_eq!(done, events, "{step} on {url}");
    (peak, Duration::from_micros(took))
}

/// The most that this process has taken, in KiB.
fn peak() -> Option<u64> {
    tool::memory("self", "VmHWM")
}

/// The process that does it: prints how many events it met, its peak and how many microseconds it took.
pub(crate) async fn step(name: &str, url: &str, events: u64) {
    let started = Instant::now();
    let store = StateStore::connect(url).await.unwrap();
    let persister = StateMachinePersister::with_defaults(&store);
    let (governor, state) = STATE;
    let met = match name {
        "append" => append(&persister, events).await,
        "pages" => pages(&store, |_| {}).await,
        "replay" => persister.replay(governor, state, |_| Ok(())).await.unwrap().events,
        "export" => store.export(None, &mut std::io::sink(), |_| {}).await.unwrap().transitions,
        "prove" => {
            let report = store.verify(|_| {}).await.unwrap();
            assert!(report.ok, "{:?}", report.problems);
            report.events
        }
        "load" => persister.load_state(governor, state).await.unwrap().0.version,
        "snapshot" => persister.save_snapshot(governor, state).await.unwrap(),
        "follow" => {
            let mut feed = store.watch(governor, state).unwrap();
            let mut last = 0;
            while last < events {
                last = feed.next().await.unwrap().version();
            }
            last
        }
        CLEAN_UP => {
            let options = CleanupOptions::older_than(Duration::ZERO).keep_versions(KEPT);
            persister.cleanup(governor, &options, |_| {}).await.unwrap().events + KEPT
        }
        _ => {
            let mut kept = Vec::new();
            pages(&store, |page| kept.extend(page)).await;
            kept.len() as u64
        }
    };
    println!("{met} {} {}", peak().unwrap(), started.elapsed().as_micros());
}

async fn pages(store: &StateStore, mut each: impl FnMut(Vec<Event>)) -> u64 {
    let mut history = store.history(STATE.0, STATE.1, ..).await.unwrap();
    let mut met = 0;
    loop {
        let page = history.next_page().await.unwrap();
        if page.is_empty() {
            return met;
        }
        met += page.len() as u64;
        each(page);
    }
}

/// 200 bytes of data each.
async fn append(persister: &StateMachinePersister, events: u64) -> u64 {
    let mut under_way: VecDeque<tokio::task::JoinHandle<()>> = VecDeque::new();
    for n in 0..events {
        if under_way.len() == IN_FLIGHT {
            under_way.pop_front().unwrap().await.unwrap();
        }
        let persister = persister.clone();
        let data = json!({"n": n, "status": "open", "filler": "x".repeat(160)});
        under_way.push_back(tokio::spawn(async move {
            let to = NewTransition::to(STATE.0, STATE.1, "step", data, why());
            persister.append(to).await.unwrap();
        }));
    }
    for task in under_way {
        task.await.unwrap();
    }
    events
}
