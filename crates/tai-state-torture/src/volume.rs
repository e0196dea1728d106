//! Long logs: however long they are, appending, paging, replaying, exporting, proving and loading take the
//! same memory.

use std::collections::VecDeque;
use std::process::Command;

use serde_json::json;
use tai_state::{Event, NewTransition, StateMachinePersister, StateStore};

use crate::args::Tier;
use crate::engine::{Engine, why};
use crate::run::{Run, Tally};
use crate::tool;

/// Each is a process of its own, so that its peak is its own.
const STEPS: [&str; 6] = ["append", "pages", "replay", "export", "prove", "load"];
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
    let mut of = |step: &str| {
        let (few, many) = (taken(step, &short.url, most / 10), taken(step, &long.url, most));
        tally.highest(&format!("MiB at most for {step} on {name}"), many.div_ceil(1_024));
        println!("  {step} on {name}: {few} KiB for {}, {many} KiB for {most}", most / 10);
        (few, many)
    };
    let is_more = |few: u64, many: u64| many as f64 > few as f64 * GROWTH + NOISE_KIB;
    let peaks: Vec<_> = STEPS.iter().map(|step| (step, of(step))).collect();
    let (few, many) = of(HOARD);
    tally.control(CONTROL, u64::from(is_more(few, many)), 1, 1);
    let kept = many.saturating_sub(few);
    for (step, (few, many)) in peaks {
        let grew = match engine {
            Engine::Emulator(_) => many.saturating_sub(few) > kept / OF_WHAT_IS_KEPT,
            _ => is_more(few, many),
        };
        tally.holds(!grew, || {
            format!("{step} on {name}: {few} KiB for {} events, {many} for {most}", most / 10)
        });
        tally.holds(many <= MOST << 10, || format!("{step} on {name}: {many} KiB"));
        tally.count(&format!("steps over {most} events on {name}"), 1);
    }
}

/// The peak of a process that does this, in KiB.
fn taken(step: &str, url: &str, events: u64) -> u64 {
    let mut command = Command::new(std::env::current_exe().unwrap());
    tool::apart(&mut command);
    command.args(["volume-step", step, url, &events.to_string()]);
    let ran = tool::ran(command, b"");
    let parts: Vec<u64> = ran.out.split_whitespace().filter_map(|part| part.parse().ok()).collect();
    let [done, peak] = parts[..] else { panic!("{step} on {url}: {ran:?}") };
    assert_eq!(done, events, "{step} on {url}");
    peak
}

/// The most that this process has taken, in KiB.
fn peak() -> Option<u64> {
    tool::memory("self", "VmHWM")
}

/// The process that does it: prints how many events it met, and its peak.
pub(crate) async fn step(name: &str, url: &str, events: u64) {
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
        _ => {
            let mut kept = Vec::new();
            pages(&store, |page| kept.extend(page)).await;
            kept.len() as u64
        }
    };
    println!("{met} {}", peak().unwrap());
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
