//! What people and scripts do by mistake loses nothing, and says what it did: an export onto a store, an old
//! file taken in again, an answer that nobody can read.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::fs::File;
use std::process::Stdio;

use common::{Engine, Store, bash, run, tool};
use serde_json::{Value, json};

on_every_engine!(
    an_old_file_taken_in_again_after_a_clean_up_changes_nothing,
    what_was_not_taken_in_yet_goes_in_after_a_clean_up,
    old_lines_behind_newer_ones_do_not_become_the_newest_version,
    an_own_export_taken_in_again_after_a_clean_up_changes_nothing,
    a_purged_state_is_not_brought_back_by_an_old_file,
);

fn line(second: u32, data: impl Into<Value>) -> String {
    let line = json!({
        "governor_id": "g", "state_id": "s", "action": "step", "actor": "me",
        "timestamp": format!("2026-01-01T00:00:{second:02}Z"), "data": data.into(),
    });
    format!("{line}\n")
}

fn is(store: &Store, data: impl Into<Value>) {
    assert_eq!(store.json(&["get", "--raw", "g/s"]).ok().json(), data.into());
    store.verified();
}

/// `applied`, `already_there` and `older_than_history` of an import.
fn taken_in(store: &Store, file: &str) -> [u64; 3] {
    let summary = store.json(&["import", file]).ok().json();
    ["applied", "already_there", "older_than_history"].map(|field| summary[field].as_u64().unwrap())
}

fn an_old_file_taken_in_again_after_a_clean_up_changes_nothing(engine: Engine) {
    for kept in 1..=3 {
        let store = engine.store();
        // Equal lines among them, and two of the same time.
        let lines =
            [line(1, 1), line(2, 2), line(2, 3), line(3, 4), line(3, 4), line(3, 4)].concat();
        let old = store.write("old.jsonl", lines.as_bytes());
        assert_eq!(taken_in(&store, &old), [6, 0, 0]);
        let cleanup = ["cleanup", "--older-than", "1s", "--keep-last", &kept.to_string()];
        assert_eq!(store.json(&cleanup).ok().json()["events"], 6 - kept);
        let hash = store.verified()["content_hash"].clone();
        let [applied, known, older] = taken_in(&store, &old);
        assert_eq!((applied, known + older), (0, 6), "{kept} kept: {known} known, {older} older");
        assert_eq!(store.verified()["content_hash"], hash);
        // What is new at its end goes in.
        let new = store.write("new.jsonl", (lines + &line(4, 5)).as_bytes());
        assert_eq!(taken_in(&store, &new)[0], 1, "{kept} kept");
        assert_eq!(taken_in(&store, &new)[0], 0, "{kept} kept");
        is(&store, 5);
    }
}

/// Only what stands before the line of the first event that is kept may have been removed, whatever the times are.
fn what_was_not_taken_in_yet_goes_in_after_a_clean_up(engine: Engine) {
    let equal: Vec<String> = (1..=6).map(|n| line(1, n)).collect();
    let falling = vec![line(10, 1), line(5, 2), line(6, 3), line(7, 4), line(7, 4), line(7, 4)];
    for (lines, first, falls) in [(&equal, 3, false), (&falling, 2, true), (&falling, 5, true)] {
        let store = engine.store();
        let begun = store.write("begun.jsonl", lines[..first].concat().as_bytes());
        assert_eq!(taken_in(&store, &begun)[0], first as u64);
        store.run(&["cleanup", "--older-than", "1s"]).ok();
        let whole = store.write("whole.jsonl", lines.concat().as_bytes());
        if falls {
            // Nobody can tell whether these are new, or old ones in another order.
            for strict in [&["--strict"][..], &[]] {
                let refused = store.json(&[&["import", &whole], strict].concat());
                let error = refused.error();
                let told = (&error["code"], &error["line"]);
                let line = json!(first + 1);
                assert_eq!((refused.exit, told), (5, (&json!("older_than_history"), &line)));
                let last: Value = serde_json::from_str(&lines[first - 1]).unwrap();
                is(&store, last["data"].clone());
            }
        }
        let take = ["import", &whole, "--take-older"];
        let take = if falls { &take[..] } else { &take[..2] };
        let summary = store.json(take).ok().json();
        let [applied, known, older] = ["applied", "already_there", "older_than_history"]
            .map(|field| summary[field].as_u64().unwrap());
        assert_eq!(
            (applied, known + older),
            ((lines.len() - first) as u64, first as u64),
            "{first}"
        );
        assert_eq!(taken_in(&store, &whole)[0], 0, "{first}");
        let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
        is(&store, last["data"].clone());
        assert_eq!(store.json(&["get", "g/s"]).ok().json()["version"], lines.len(), "{first}");
    }
}

/// Days whose files a shell puts in another order than they came: 10 before 8 and 9.
fn old_lines_behind_newer_ones_do_not_become_the_newest_version(engine: Engine) {
    let store = engine.store();
    let day = |day: u32| (0..3).map(|n| line(day + n, day + n)).collect::<String>();
    for first in [10, 20, 30] {
        let file = store.write("day.jsonl", day(first).as_bytes());
        assert_eq!(taken_in(&store, &file), [3, 0, 0]);
    }
    store.run(&["cleanup", "g", "--before", "2026-01-01T00:00:30Z"]).ok();
    let hash = store.verified()["content_hash"].clone();
    let mixed = store.write("mixed.jsonl", [day(30), day(10), day(20)].concat().as_bytes());
    let refused = store.json(&["import", &mixed]);
    assert_eq!((refused.exit, &refused.error()["line"]), (5, &json!(4)), "{refused:?}");
    let sorted = store.write("sorted.jsonl", [day(10), day(20), day(30)].concat().as_bytes());
    assert_eq!(taken_in(&store, &sorted), [0, 3, 6]);
    assert_eq!(store.verified()["content_hash"], hash);
    is(&store, 32);
}

fn an_own_export_taken_in_again_after_a_clean_up_changes_nothing(engine: Engine) {
    let store = engine.store();
    for n in 1..=4 {
        store.run(&["put", "g/s", "--data", &n.to_string()]).ok();
    }
    let out = store.path("all.jsonl").display().to_string();
    store.run(&["export", "--out", &out]).ok();
    store.run(&["cleanup", "--older-than", "0s"]).ok();
    assert_eq!(taken_in(&store, &out), [0, 1, 3]);
    is(&store, 4);
}

fn a_purged_state_is_not_brought_back_by_an_old_file(engine: Engine) {
    let store = engine.store();
    let old = store.write("old.jsonl", [line(1, 1), line(2, 2)].concat().as_bytes());
    assert_eq!(taken_in(&store, &old), [2, 0, 0]);
    store.run(&["purge", "g/s", "--yes"]).ok();
    assert_eq!(taken_in(&store, &old), [0, 0, 2]);
    let gone = store.json(&["get", "g/s"]);
    // And nobody is sent to a past that is gone.
    assert_eq!((gone.exit, &gone.error()["hint"]), (3, &Value::Null));
}

#[test]
fn an_export_onto_a_store_is_refused() {
    let store = Store::made();
    store.run(&["put", "g/s", "--data", "1"]).ok();
    let other = Store::made();
    let link = other.path("link.jsonl");
    std::os::unix::fs::symlink(&store.file, &link).unwrap();
    // While it is open its log is there too.
    let mut holder =
        store.command(&["txn"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let put = json!({"ops": [{"op": "put", "state": "g/other", "data": 1}]});
    std::io::Write::write_all(holder.stdin.as_mut().unwrap(), format!("{put}\n").as_bytes())
        .unwrap();
    let mut answers = std::io::BufReader::new(holder.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut answers, &mut line).unwrap();
    let part = |end: &str| format!("{}{end}", store.file.display());
    for name in [part(""), part("-wal"), part("-shm"), link.display().to_string()] {
        for from in [&store, &other] {
            let refused = from.json(&["export", "--out", &name]);
            assert_eq!((refused.exit, &refused.error()["code"]), (4, &json!("exists")), "{name}");
        }
    }
    drop(holder.stdin.take());
    assert!(holder.wait().unwrap().success());
    is(&store, 1);
    // Closed, it has no log, and one that is no log would be taken for a damaged one.
    for name in [part("-wal"), part("-shm"), part("-journal")] {
        assert_eq!(store.json(&["export", "--out", &name]).exit, 4, "{name}");
        assert!(!std::path::Path::new(&name).exists(), "{name}");
    }
    is(&store, 1);
}

#[test]
fn an_export_goes_into_what_is_no_file() {
    let store = Store::made();
    store.run(&["put", "g/s", "--data", "1"]).ok();
    let whole = store.run(&["export"]).ok().out;
    // A pipe with a name.
    let fifo = store.path("fifo").display().to_string();
    let mut script = bash(r#"mkfifo "$1" && cat "$1""#);
    let reader = script.args(["bash", &fifo]).stdout(Stdio::piped()).spawn().unwrap();
    while !std::path::Path::new(&fifo).exists() {
        std::thread::yield_now();
    }
    store.run(&["export", "--out", &fifo]).ok();
    assert_eq!(String::from_utf8(reader.wait_with_output().unwrap().stdout).unwrap(), whole);
}

#[test]
fn a_strict_import_reads_a_pipe_too() {
    let store = Store::made();
    let command = r#""$1" -u "$2" -o json import --strict <(printf %s "$3")"#;
    let binary = tool().get_program().to_owned();
    let mut script = bash(command);
    script.arg("bash").arg(binary).args([&store.url, &line(1, 1)]);
    let ran = run(script, b"");
    assert_eq!((ran.exit, &ran.json()["applied"]), (0, &json!(1)), "{ran:?}");
    is(&store, 1);
}

#[test]
fn a_strict_import_takes_in_nothing_before_a_time_that_nobody_keeps() {
    for time in ["0000-12-31T23:59:59Z", "+10000-01-01T00:00:00Z"] {
        let store = Store::new();
        let wrong = line(1, 2).replace("2026-01-01T00:00:01Z", time);
        let lines = store.write("lines.jsonl", [line(1, 1), wrong].concat().as_bytes());
        let refused = store.json(&["import", "--strict", &lines]);
        assert_eq!((refused.exit, store.exists()), (5, false), "{refused:?}");
    }
}

#[test]
fn damage_is_told_by_the_exit_code_though_nobody_reads_the_rest() {
    let store = Store::made();
    store.run(&["put", "g/s", "--data", "1"]).ok();
    let file = rusqlite::Connection::open(&store.file).unwrap();
    assert_eq!(file.execute("UPDATE event SET crc = crc + 1", ()).unwrap(), 1);
    drop(file);
    for args in [&["verify"][..], &["verify", "--governor", "g"], &["replay", "--verify", "g/s"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = store.command(args).stdout(writer).stderr(Stdio::null()).status().unwrap();
        assert_eq!(ran.code(), Some(8), "{args:?}");
    }
}

#[test]
fn a_change_whose_answer_cannot_be_written_is_told_to_stand() {
    let store = Store::made();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let put = ["-o", "json", "put", "g/s", "--data", "1"];
    let ran = store.command(&put).stdout(full()).output().unwrap();
    let error: Value = serde_json::from_slice(&ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(9), "{error}");
    assert!(error["message"].as_str().unwrap().starts_with("g/s is at v1: "), "{error}");
    is(&store, 1);
}

#[test]
fn a_reader_that_is_slow_and_a_pipe_that_does_not_wait_lose_no_answer() {
    let store = Store::made();
    let lines: String = (0..300)
        .map(|n| {
            format!("{}\n", json!({"id": format!("t{n}"), "ops": [{"op": "get", "state": "g/s"}]}))
        })
        .collect();
    // Python fills the pipe, which does not wait, and reads once the first answer must have met it: a process
    // that gives up ends within this time.
    let script = r#"import os, subprocess, sys
r, w = os.pipe()
os.set_blocking(w, False)
filled = 0
try:
    while True:
        filled += os.write(w, b"x" * 4096)
except BlockingIOError:
    pass
child = subprocess.Popen(sys.argv[1:], stdin=sys.stdin, stdout=w)
os.close(w)
try:
    child.wait(1)
except subprocess.TimeoutExpired:
    pass
answers = b""
while part := os.read(r, 4096):
    answers += part
print(child.wait(), answers[filled:].count(b"\n"))
"#;
    let mut python = common::program("python3");
    if python.arg("--version").output().is_err() {
        return common::skipped("an output that does not block: there is no python3");
    }
    let mut python = common::program("python3");
    python.args(["-c", script]).arg(tool().get_program()).args(["-u", &store.url, "txn"]);
    let ran = run(python, lines.as_bytes());
    assert_eq!(ran.out.trim(), "0 300", "{ran:?}");
}

#[test]
fn a_misused_command_says_so_as_json_where_json_was_asked_for() {
    let asked: [&[&str]; 5] = [
        &["-o", "json", "get"],
        &["-ojson", "bogus"],
        &["--output=jsonl", "put", "g/s", "--data", "1", "--expect", "x"],
        &["put", "--output", "json"],
        &["-o=json", "get", "--nothing"],
    ];
    for args in asked {
        let mut command = tool();
        command.args(args);
        let ran = run(command, b"");
        assert_eq!((ran.exit, &ran.error()["code"]), (2, &json!("usage")), "{args:?}: {ran:?}");
    }
    let mut told = tool();
    told.env("TAI_STATE_OUTPUT", "json").arg("get");
    assert_eq!(run(told, b"").error()["code"], "usage");
    // What runs under a lock has options of its own; for people it stays a text.
    for args in [&["get"][..], &["locks", "run", "--nothing", "--", "x", "-o", "json"]] {
        let mut command = tool();
        command.args(args);
        let ran = run(command, b"");
        assert!(ran.exit == 2 && ran.err.starts_with("error: "), "{args:?}: {ran:?}");
    }
}
