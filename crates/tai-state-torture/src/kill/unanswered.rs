//! A process that dies between its commit and its answer: whoever asks again under the same id is told what
//! is stored, and it was done once.

use std::io::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_setfl};
use serde_json::{Value, json};

use crate::engine::{Engine, Store};
use crate::random::Random;
use crate::run::{Run, Tally};
use crate::tool;

const COUNTER: &str = "g/counter";
/// Longer than a commit takes on any machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Asked again under an id of its own, what was done is refused: its own success is in its way.
const ANOTHER_ID: &str = "who asks again under another id is told of a conflict with himself";

pub(super) fn asked_again(run: &Run, tally: &mut Tally) {
    let rounds = run.size(200, 2_000) / 2;
    let mut random = Random::of_round(run.seed, 1 << 41);
    // What is killed is the process, which a file in memory survives like any other.
    let store = Engine::Memory.store();
    let mut counted = 0;
    for round in 0..rounds {
        let is_held_back = round % 2 == 0;
        let line = line(&format!("t{round}"), round);
        if is_held_back {
            let held = killed_before_its_answer(&store, &line, counted + 1);
            tally.holds(held, || format!("round {round}: nothing was committed"));
            tally.count("killed between the commit and the answer", u64::from(held));
        } else {
            killed_after(&store, &line, Duration::from_micros(random.below(15_000)));
        }
        // The control comes first, since nothing that is refused leaves anything behind.
        if is_held_back {
            let answer = answer(&store, &self::line(&format!("other-{round}"), round));
            let is_caught = answer["code"] == "version_conflict";
            tally.control(ANOTHER_ID, u64::from(is_caught), 1, 0);
        }
        counted += 1;
        let answer = answer(&store, &line);
        let said = json!([{"version": 1}, {"version": counted}]);
        tally.holds(answer["ok"] == true && versions(&answer) == said, || {
            format!("round {round}: asked again: {answer}, and not {said}")
        });
        tally.count("asked again under the same id", 1);
    }
    tally.control(ANOTHER_ID, 0, 0, rounds / 2);
    let value = store.json(&["get", "--raw", COUNTER]).ok().json();
    tally.holds(value == json!(rounds), || format!("{rounds} times one was added: {value}"));
    let events = store.run(&["-o", "jsonl", "history", COUNTER]).ok().lines().len() as u64;
    tally.holds(events == rounds, || format!("{rounds} times one was added: {events} events"));
    store.verified();
}

/// A state that is made, and one more on a counter: either of them tells whether it was done twice.
fn line(id: &str, round: u64) -> String {
    let made = json!({"op": "put", "state": format!("g/made-{round}"), "data": round, "expect": 0});
    let ops = [made, json!({"op": "add", "state": COUNTER, "value": 1})];
    format!("{}\n", json!({"id": id, "ops": ops}))
}

fn versions(answer: &Value) -> Value {
    let results = answer["results"].as_array();
    let each = |result: &Value| json!({"version": result["version"]});
    results.map_or(Value::Null, |results| results.iter().map(each).collect())
}

fn answer(store: &Store, line: &str) -> Value {
    let ran = tool::ran(store.command(&["-o", "json", "txn"]), line.as_bytes());
    serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

/// Its answer goes into a pipe that is full, so that it cannot be given; once what it did is there, the
/// process is killed. Whether it was there.
fn killed_before_its_answer(store: &Store, line: &str, counted: u64) -> bool {
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while writer.write(&[0; 4_096]).is_ok() {}
    // It is the process's own descriptor too, and that one waits.
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    let mut command = store.command(&["-o", "json", "txn"]);
    command.stdin(Stdio::piped()).stdout(writer).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    let end = Instant::now() + PATIENCE;
    let is_there = || {
        let got = store.json(&["get", "--raw", COUNTER]);
        got.exit == 0 && got.json() == json!(counted)
    };
    let mut held = is_there();
    while !held && Instant::now() < end {
        held = is_there();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    drop(reader);
    held
}

/// Killed when this time is over, wherever it is by then.
fn killed_after(store: &Store, line: &str, after: Duration) {
    let mut command = store.command(&["-o", "json", "txn"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    // The moment is the point of it; there is nothing to wait for.
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
}
