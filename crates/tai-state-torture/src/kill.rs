//! SIGKILL at random moments: what was acknowledged is there, and the store opens and proves.

mod unanswered;

use std::collections::{HashMap, HashSet};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tai_state::{ChangeMetadata, NewTransition, StateMachinePersister, StateStore};

use crate::random::Random;
use crate::run::{Run, Tally};
use crate::tool;

/// So many cycles are done on one file; each time the next run starts from what the kill left.
const CYCLES_ON_A_FILE: u64 = 4;
/// Every so many files it is several processes that write and are killed.
const SHARED: u64 = 4;
const PROCESSES: usize = 4;
/// Least acknowledgements a cycle, on average.
const LEAST_EACH: u64 = 20;

pub(crate) fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let files = run.size(200, 2_000).div_ceil(CYCLES_ON_A_FILE);
    for (n, random) in run.rounds(files) {
        file(n, random, &mut tally);
    }
    tally.at_least("acknowledged transitions", files * CYCLES_ON_A_FILE * LEAST_EACH);
    tally.at_least("kills before there was a file", files / 20);
    control(run, &mut tally);
    unanswered::asked_again(run, &mut tally);
    tally
}

/// One file, killed again and again.
fn file(n: u64, mut random: Random, tally: &mut Tally) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("store.tai");
    let url = file.display().to_string();
    let mut promised: HashMap<String, u64> = HashMap::new();
    let processes = if n % SHARED == SHARED - 1 { PROCESSES } else { 1 };
    for cycle in 0..CYCLES_ON_A_FILE {
        let what = format!("file {n}, cycle {cycle}");
        let most = if random.percent(33) { 10_000 } else { 400_000 };
        let after: Vec<_> =
            (0..processes).map(|_| Duration::from_micros(random.below(most))).collect();
        tally.count("kills", after.len() as u64);
        tally.count(
            "of them within 10 ms of the start",
            after.iter().filter(|after| after.as_millis() < 10).count() as u64,
        );
        let command = || tool::command(&url, &["demo-writer", "--tasks", "4", "--machines", "3"]);
        let acks = killed(command, &after);
        tally.count("acknowledged transitions", acks.len() as u64);
        let mut made = HashSet::new();
        for (state, version) in acks {
            tally.holds(promised.get(&state).is_none_or(|before| *before < version), || {
                format!("{what}: {state} v{version} was acknowledged before an earlier kill")
            });
            tally.holds(made.insert((state, version)), || {
                format!("{what}: two writers were told that they made one version")
            });
        }
        for (state, version) in made {
            let highest = promised.entry(state).or_default();
            *highest = version.max(*highest);
        }
        if file.exists() {
            match found(&url) {
                Ok(found) => {
                    tally.count("times opened and proved", 1);
                    for lost in lost(&promised, &found) {
                        tally.broken(format!("{what}: {lost}"));
                    }
                }
                Err(why) => tally.broken(format!("{what}: {why}")),
            }
        } else {
            tally.count("kills before there was a file", 1);
            tally.holds(promised.is_empty(), || format!("{what}: acknowledged without a file"));
        }
    }
    // Nothing is left of a creation that was cut off, but for files that say what they are.
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        tally.holds(name.starts_with("store.tai") || name.starts_with(".tai-state-"), || {
            format!("file {n}: {name} was left behind")
        });
    }
}

/// Starts a writer for each of these times, kills it when it is over, and returns what they had
/// acknowledged: states and versions.
fn killed(command: impl Fn() -> Command, after: &[Duration]) -> Vec<(String, u64)> {
    let started: Vec<_> = after.iter().map(|_| tool::started(command())).collect();
    let from = Instant::now();
    std::thread::scope(|scope| {
        let writers: Vec<_> = started
            .into_iter()
            .zip(after)
            .map(|((mut child, mut out), after)| {
                let acks = move || {
                    let acks = std::iter::from_fn(|| tool::acknowledgement(&mut out));
                    acks.collect::<Vec<Value>>()
                };
                let reader = scope.spawn(acks);
                scope.spawn(move || {
                    // The moment is the point of it; there is nothing to wait for.
                    std::thread::sleep(after.saturating_sub(from.elapsed()));
                    child.kill().unwrap();
                    child.wait().unwrap();
                    reader.join().unwrap()
                })
            })
            .collect();
        let acks = writers.into_iter().flat_map(|writer| writer.join().unwrap());
        acks.map(|ack| {
            (ack["state"].as_str().unwrap().to_owned(), ack["version"].as_u64().unwrap())
        })
        .collect()
    })
}

/// The versions of all states, of a store that opens and proves.
fn found(url: &str) -> Result<HashMap<String, u64>, String> {
    let report = tool::json(url, &["verify"]);
    if report.exit != 0 || report.json()["ok"] != true {
        return Err(format!("verify says no: {report:?}"));
    }
    let listed = tool::ran(tool::command(url, &["-o", "jsonl", "ls", "orders"]), b"");
    if listed.exit != 0 && listed.exit != 3 {
        return Err(format!("refused: {listed:?}"));
    }
    let lines = listed.out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    Ok(lines
        .map(|line| {
            (line["state_id"].as_str().unwrap().to_owned(), line["version"].as_u64().unwrap())
        })
        .collect())
}

fn lost(promised: &HashMap<String, u64>, found: &HashMap<String, u64>) -> Vec<String> {
    let is_there = |state: &str| found.get(state).copied().unwrap_or(0);
    let lost = promised.iter().filter(|(state, version)| is_there(state) < **version);
    lost.map(|(state, version)| {
        format!("{state} v{version} was acknowledged, v{} is there", is_there(state))
    })
    .collect()
}

/// A writer that acknowledges what it has only taken in: its kills must be seen to lose something.
fn control(run: &Run, tally: &mut Tally) {
    let times = (run.size(200, 2_000) / 20).clamp(4, 50);
    let mut random = Random::new(run.seed);
    let (mut caught, mut of) = (0, 0);
    for _ in 0..times {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().join("store.tai").display().to_string();
        let after = Duration::from_micros(50_000 + random.below(100_000));
        let command = || {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.arg("hasty-writer").arg(&url);
            tool::apart(&mut command);
            command
        };
        let promised: HashMap<String, u64> = killed(command, &[after]).into_iter().collect();
        if promised.is_empty() {
            continue;
        }
        of += 1;
        caught += u64::from(found(&url).is_ok_and(|found| !lost(&promised, &found).is_empty()));
    }
    tally.control("a writer that acknowledges before the commit", caught, of, (times / 2).max(1));
}

/// The writer of the control.
pub(crate) async fn hasty_writer(file: &Path) {
    let store = StateStore::open(file).await.unwrap();
    let persister = StateMachinePersister::with_defaults(&store);
    let mut out = std::io::stdout();
    for version in 1.. {
        let ack = json!({"state": "order-000", "version": version});
        if writeln!(out, "{ack}").and_then(|()| out.flush()).is_err() {
            return;
        }
        let who = ChangeMetadata::new("hasty", "control", None);
        let to = NewTransition::to("orders", "order-000", "step", json!(version), who);
        // What was acknowledged is written when enough of it has come together.
        tokio::time::sleep(Duration::from_millis(5)).await;
        persister.append(to).await.unwrap();
    }
}
