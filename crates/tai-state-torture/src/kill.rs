//! SIGKILL at random moments: what was acknowledged is there, and the store opens and proves.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::random::Random;
use crate::run::{Run, Tally};
use crate::tool;

/// Of these many cycles one begins on a new file, so that its creation is hit too.
const CYCLES_ON_A_FILE: u64 = 4;
/// Least acknowledgements a cycle, on average.
const LEAST_EACH: u64 = 5;

/// What one file has promised, cycle after cycle.
struct Promised {
    folder: tempfile::TempDir,
    highest: HashMap<String, u64>,
}

pub(crate) fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let files = run.size(200, 2_000).div_ceil(CYCLES_ON_A_FILE);
    let mut rounds = 0;
    for (n, random) in run.rounds(files) {
        file(n, random, &mut tally);
        rounds += CYCLES_ON_A_FILE;
    }
    tally.at_least("acknowledged transitions", rounds * LEAST_EACH);
    tally
}

/// One file, killed again and again; each time the next run starts from what the kill left.
fn file(n: u64, mut random: Random, tally: &mut Tally) {
    let mut promised = Promised { folder: tempfile::tempdir().unwrap(), highest: HashMap::new() };
    let file = promised.folder.path().join("store.tai");
    let url = file.display().to_string();
    for cycle in 0..CYCLES_ON_A_FILE {
        let most = if random.percent(33) { 10_000 } else { 400_000 };
        let after = Duration::from_micros(random.below(most));
        tally.count("kills", 1);
        tally.count("of them within 10 ms of the start", u64::from(after.as_millis() < 10));
        let acks = killed(&url, after);
        tally.count("acknowledged transitions", acks.len() as u64);
        for ack in acks {
            let state = ack["state"].as_str().unwrap().to_owned();
            let version = ack["version"].as_u64().unwrap();
            let before = promised.highest.insert(state, version);
            tally.holds(before.is_none_or(|before| before < version), || {
                format!("file {n}, cycle {cycle}: versions of one state fall")
            });
        }
        if file.exists() {
            judge(&format!("file {n}, cycle {cycle}"), &url, &promised, tally);
        } else {
            tally.count("kills before there was a file", 1);
            tally.holds(promised.highest.is_empty(), || {
                format!("file {n}, cycle {cycle}: acknowledged without a file")
            });
        }
    }
    control(&mut random, &promised, &url, tally);
    // Nothing is left of a creation that was cut off, but for files that say what they are.
    for entry in std::fs::read_dir(promised.folder.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        tally.holds(name.starts_with("store.tai") || name.starts_with(".tai-state-"), || {
            format!("file {n}: {name} was left behind")
        });
    }
}

/// Runs the writer, kills it after this time, and returns what it had acknowledged.
fn killed(url: &str, after: Duration) -> Vec<Value> {
    let args = ["demo-writer", "--tasks", "4", "--machines", "3"];
    let (mut child, mut out) = tool::started(tool::command(url, &args));
    let acks = move || std::iter::from_fn(|| tool::acknowledgement(&mut out)).collect();
    let reader = std::thread::spawn(acks);
    // The moment is the point of it; there is nothing to wait for.
    let until = Instant::now() + after;
    while Instant::now() < until {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

/// The versions of all states, of a store that opens and proves.
fn versions(url: &str) -> Result<HashMap<String, u64>, String> {
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

fn judge(what: &str, url: &str, promised: &Promised, tally: &mut Tally) {
    match versions(url) {
        Ok(found) => {
            tally.count("times opened and proved", 1);
            for lost in lost(&promised.highest, &found) {
                tally.broken(format!("{what}: {lost}"));
            }
        }
        Err(why) => tally.broken(format!("{what}: {why}")),
    }
}

/// A promise of one version more than was given must be noticed as lost.
fn control(random: &mut Random, promised: &Promised, url: &str, tally: &mut Tally) {
    const WHAT: &str = "one transition more is said to be acknowledged than was made";
    let mut states: Vec<&String> = promised.highest.keys().collect();
    states.sort();
    if states.is_empty() {
        return;
    }
    let state = states[random.below(states.len() as u64) as usize];
    let Ok(found) = versions(url) else { return };
    let mut more = promised.highest.clone();
    more.insert(state.clone(), found.get(state).copied().unwrap_or(0) + 1);
    let caught = u64::from(!lost(&more, &found).is_empty());
    tally.control(WHAT, caught, 1, 1);
}
