//! Locks of the command line as a contract: output, exit codes, what becomes of the command that runs
//! under one. What they keep when holders are stopped is what `tai-state-torture locks` asks.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)]

#[macro_use]
mod common;
// The harness uses all of it.
#[allow(dead_code)]
#[path = "locks/tree.rs"]
mod tree;

use std::time::{Duration, Instant};

use common::{Engine, Ran, Store};
use rustix::process::{Pid, Signal, test_kill_process};
use serde_json::{Value, json};
use tree::{Tree, catches, until};

on_every_engine!(
    a_lock_as_others_see_it,
    the_exit_code_is_that_of_the_command,
    who_waits_gets_it,
    a_broken_lock_ends_its_command,
    who_is_asked_to_end_asks_the_command,
    a_fence_is_of_its_governor,
    writes_are_fenced,
    writes_sent_again_are_answered_again,
    transactions_sent_again_are_answered_again,
);

/// A command that says its token and ends with its input.
const HOLD: &str = r#"echo "$TAI_LOCK_TOKEN"; read -r _; exit 0"#;

/// A lock that is held by now, and its token.
fn held(store: &Store, name: &str, options: &[&str]) -> (Tree, u64) {
    let holder = running(store, name, options, HOLD);
    let token = holder.next().unwrap();
    let token = token.parse().unwrap_or_else(|_| panic!("{token}"));
    (holder, token)
}

/// A script of the shell `bash` that runs, or waits to run, under a lock.
fn running(store: &Store, name: &str, options: &[&str], script: &str) -> Tree {
    let args = [&["-o", "json", "locks", "run", name], options, &["--", "bash", "-c", script]];
    Tree::start(store.command(&args.concat()))
}

/// Runs a script under a lock, without waiting for it.
fn run(store: &Store, name: &str, script: &str) -> Ran {
    store.json(&["locks", "run", name, "--wait", "0s", "--", "bash", "-c", script])
}

/// The next grant, which says that nobody holds the lock.
fn next_token(store: &Store, name: &str) -> u64 {
    let next = run(store, name, r#"echo "$TAI_LOCK_TOKEN""#).ok();
    next.out.trim().parse().unwrap()
}

fn show(store: &Store, name: &str) -> Value {
    store.json(&["locks", "show", name]).ok().json()
}

fn fence(name: &str, token: u64) -> String {
    format!("{name}={token}")
}

/// Refused for this reason, with nothing on the standard output.
fn refused(ran: &Ran, exit: i32, code: &str) -> Value {
    let error = ran.error();
    assert_eq!((ran.exit, error["code"].as_str()), (exit, Some(code)), "{ran:?}");
    assert!(ran.out.is_empty(), "{ran:?}");
    error
}

fn a_lock_as_others_see_it(engine: Engine) {
    let store = engine.store();
    assert_eq!(store.run(&["locks", "ls"]).ok().out, "");
    assert_eq!(store.run(&["-o", "jsonl", "locks", "ls"]).ok().out, "");
    assert_eq!(store.json(&["locks", "ls"]).ok().json(), json!([]));
    refused(&store.json(&["locks", "show", "a"]), 3, "not_found");
    let broken = store.json(&["locks", "break", "a"]).ok().json();
    assert_eq!(broken, json!({"lock": "a", "broken": false}));
    assert_eq!(store.json(&["locks", "cleanup"]).ok().json(), json!({"freed": 0}));

    let (mut ada, token) = held(&store, "a", &["--client", "ada", "--ttl", "900ms"]);
    assert_eq!(token, 1);
    let shown = show(&store, "a");
    let is = json!({"lock": "a", "status": "held", "client_id": "ada", "fencing_token": 1,
        "lease_ms": 900, "left_ms": shown["left_ms"], "acquired_at": shown["acquired_at"],
        "expires_at": shown["expires_at"]});
    assert_eq!(shown, is);
    assert!((1..=1_800).contains(&shown["left_ms"].as_u64().unwrap()), "{shown}");
    let time = |key: &str| chrono::DateTime::parse_from_rfc3339(shown[key].as_str().unwrap());
    let lasts = time("expires_at").unwrap() - time("acquired_at").unwrap();
    assert!(lasts.num_milliseconds() >= 900, "{shown}");
    assert_eq!(store.json(&["locks", "cleanup"]).ok().json(), json!({"freed": 0}));
    // It is renewed: it ends later and later.
    until("a renewal", || (show(&store, "a")["expires_at"] != shown["expires_at"]).then_some(()));
    let listed = store.json(&["locks", "ls"]).ok().json();
    let lines = store.run(&["-o", "jsonl", "locks", "ls"]).ok().lines();
    for list in [listed.as_array().unwrap(), &lines] {
        assert_eq!(list.len(), 1);
        for key in ["lock", "status", "client_id", "fencing_token", "lease_ms", "acquired_at"] {
            assert_eq!(list[0][key], shown[key], "{key}");
        }
    }
    let table = store.run(&["locks", "ls"]).ok().out;
    let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let headings = ["LOCK", "STATUS", "CLIENT", "TOKEN", "LEASE", "ACQUIRED"];
    assert_eq!(rows.next().unwrap(), headings);
    let acquired = shown["acquired_at"].as_str().unwrap();
    assert_eq!(rows.next().unwrap(), ["a", "held", "ada", "1", "900ms", acquired]);
    let line = store.run(&["locks", "show", "a"]).ok().out;
    assert!(line.starts_with("a is held: ada, fencing token 1, lease 900ms"), "{line}");

    for wait in ["0s", "1300ms"] {
        let args = ["locks", "run", "a", "--wait", wait, "--", "echo", "never"];
        let error = refused(&store.json(&args), 4, "lock_held");
        let said = (&error["held_by"], &error["lock"], &error["fencing_token"]);
        assert_eq!(said, (&json!("ada"), &json!("a"), &json!(1)));
        assert_eq!(error["retryable"], true);
        let text = store.run(&args);
        assert!(text.exit == 4 && text.err.contains("ada"), "{text:?}");
    }

    let broken = store.json(&["locks", "break", "a"]).ok().json();
    let is = json!({"lock": "a", "broken": true, "held_by": "ada", "fencing_token": 1});
    assert_eq!(broken, is);
    let shown = show(&store, "a");
    assert_eq!((&shown["status"], &shown["left_ms"]), (&json!("free"), &Value::Null));
    let text = store.run(&["locks", "break", "a"]).ok().out;
    assert_eq!(text, "a is held by nobody\n");
    let input = ada.input.take();
    assert_eq!(ada.ended().exit, Some(4));
    drop(input);

    // A holder that is killed: its lease ends, and the lock stays as it is until somebody comes.
    let (killed, token) = held(&store, "a", &["--client", "eve", "--ttl", "300ms"]);
    assert_eq!(token, 2);
    killed.signal(Signal::KILL);
    until("the end of a lease", || (show(&store, "a")["status"] == "expired").then_some(()));
    assert_eq!(show(&store, "a")["left_ms"], Value::Null);
    assert_eq!(store.json(&["locks", "cleanup"]).ok().json(), json!({"freed": 1}));
    let text = store.run(&["locks", "cleanup"]).ok().out;
    assert!(text.starts_with("0 locks"), "{text}");
    assert_eq!(show(&store, "a")["status"], "free");
    drop(killed);

    // Governors have locks of their own; nothing steers a terminal; a lock is no state.
    let odd = "\u{1b}[31m a/b";
    store.run(&["locks", "--governor", "other", "run", odd, "--client", odd, "--", "true"]).ok();
    assert_eq!(store.json(&["locks", "ls"]).ok().json().as_array().unwrap().len(), 1);
    let other = ["locks", "--governor", "other"];
    let shown = store.json(&[&other[..], &["show", odd]].concat()).ok().json();
    assert_eq!((shown["lock"].as_str(), shown["client_id"].as_str()), (Some(odd), Some(odd)));
    for verb in [&["ls"][..], &["show", odd], &["break", odd]] {
        let text = store.run(&[&other[..], verb].concat()).ok().out;
        assert!(text.contains("[31m") && !text.contains('\u{1b}'), "{text:?}");
    }
    assert_eq!(store.verified()["states"], 0);
}

fn the_exit_code_is_that_of_the_command(engine: Engine) {
    let store = engine.store();
    let name = "x y=z";
    let environment = run(&store, name, r#"echo "$TAI_LOCK_NAME|$TAI_LOCK_TOKEN"; echo oh >&2"#);
    assert_eq!((environment.out.as_str(), environment.err.as_str()), ("x y=z|1\n", "oh\n"));
    let mut granted = 1;
    for (script, exit) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
    ] {
        let ran = run(&store, name, script);
        // The command has said all that there is to say.
        assert_eq!((ran.exit, ran.out.as_str(), ran.err.as_str()), (exit, "", ""), "{script}");
        assert_eq!(show(&store, name)["status"], "free", "after {script}");
        granted += 2;
        assert_eq!(next_token(&store, name), granted, "after {script}");
    }
    let folder = store.folder.path().to_str().unwrap();
    for (command, exit) in [("no-such-command", 3), ("/no/such/command", 3), (folder, 7)] {
        let ran = store.json(&["locks", "run", name, "--", command]);
        let error = refused(&ran, exit, "io");
        assert!(error["message"].as_str().unwrap().contains(command), "{error}");
        granted += 2;
        assert_eq!(next_token(&store, name), granted, "after {command}");
    }
    // Arguments as they are; what the command reads is what `run` was given to read.
    let args =
        ["locks", "run", name, "--", "bash", "-c", "echo \"$1|$2\"; cat", "sh", "a  b", "-x"];
    assert_eq!(store.feed(&args, b"input").ok().out, "a  b|-x\ninput");
    granted += 1;
    for (args, exit) in [
        (&["locks", "run", name][..], 2),
        (&["locks", "run", name, "true"], 2),
        (&["locks", "run", name, "--ttl", "soon", "--", "true"], 2),
        (&["locks", "run", name, "--ttl", "49ms", "--", "true"], 5),
        (&["locks", "run", name, "--ttl", "2days", "--", "true"], 5),
        (&["locks", "run", name, "--client", "", "--", "true"], 5),
        (&["locks", "run", "", "--", "true"], 5),
        (&["locks", "show", ""], 5),
        (&["locks", "break", ""], 5),
        (&["locks"], 2),
    ] {
        let ran = store.json(args);
        assert!(ran.exit == exit && ran.out.is_empty(), "{args:?}: {ran:?}");
    }
    assert_eq!(next_token(&store, name), granted + 1, "a refused call was granted the lock");
    let place = engine.place();
    for verb in [&["ls"][..], &["cleanup"], &["run", "x", "--", "true"]] {
        refused(&place.json(&[&["locks"], verb].concat()), 3, "not_a_store");
    }
    assert!(!place.exists(), "a lock made a store");
}

fn who_waits_gets_it(engine: Engine) {
    let store = engine.store();
    let (first, token) = held(&store, "x", &["--ttl", "20s"]);
    assert_eq!(token, 1);
    let waiting: Vec<Tree> = (0..3)
        .map(|_| {
            running(&store, "x", &["--ttl", "20s", "--wait", "1m"], r#"echo "$TAI_LOCK_TOKEN""#)
        })
        .collect();
    let from = Instant::now();
    assert_eq!(first.ended().exit, Some(0));
    let mut tokens: Vec<String> = waiting
        .into_iter()
        .map(|waiting| {
            let ended = waiting.ended();
            assert_eq!((ended.exit, ended.lines.len()), (Some(0), 1), "{ended:?}");
            ended.lines[0].clone()
        })
        .collect();
    // By the release, and not by the end of a lease.
    assert!(from.elapsed() < Duration::from_secs(15), "{:?}", from.elapsed());
    tokens.sort_unstable();
    assert_eq!(tokens, ["2", "3", "4"]);
}

/// Whether a process has ended and is off the process table.
fn is_gone(pid: &str) -> bool {
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    test_kill_process(pid).is_err_and(|error| error == rustix::io::Errno::SRCH)
}

/// A script that says when it is asked to end, and ends. In a `wait` the shell hears it for sure; what
/// comes just before a `read` waits for the end of that.
fn heeds(exit: i32) -> String {
    format!("trap 'echo asked; kill $!; exit {exit}' TERM; sleep 1000 & echo $$; wait; echo never")
}

fn a_broken_lock_ends_its_command(engine: Engine) {
    let store = engine.store();
    let by_force = Duration::from_secs(2);
    let ways = [
        ("echo $$; read -r _; echo never".to_owned(), &[][..], Duration::ZERO),
        (heeds(9), &["asked"], Duration::ZERO),
        ("trap '' TERM; echo $$; read -r _; echo never".to_owned(), &[], by_force),
    ];
    for (n, (script, says, at_least)) in ways.into_iter().enumerate() {
        let name = format!("x{n}");
        let mut runner = running(&store, &name, &["--ttl", "600ms", "--client", "ada"], &script);
        let pid = runner.next().unwrap();
        assert!(!is_gone(&pid));
        let from = Instant::now();
        assert_eq!(store.json(&["locks", "break", &name]).ok().json()["broken"], true);
        // It ends with its input still open.
        let input = runner.input.take();
        let ended = runner.ended();
        assert!(from.elapsed() >= at_least, "{script}: killed after {:?}", from.elapsed());
        drop(input);
        assert_eq!(ended.exit, Some(4), "{script}: {ended:?}");
        assert!(is_gone(&pid), "{script}: it runs on");
        let (said, error) = (&ended.lines[..ended.lines.len() - 1], ended.error());
        assert_eq!(said, says, "{script}");
        let told = (&error["code"], &error["lock"], &error["fencing_token"]);
        assert_eq!(told, (&json!("lock_lost"), &json!(name), &json!(1)));
        assert_eq!(next_token(&store, &name), 2);
    }
    // A command that ends before it is told: somebody else has had the lock meanwhile.
    let (unaware, _) = held(&store, "y", &["--ttl", "20s"]);
    store.run(&["locks", "break", "y"]).ok();
    assert_eq!(next_token(&store, "y"), 2);
    let ended = unaware.ended();
    assert_eq!((ended.exit, &ended.error()["code"]), (Some(4), &json!("lock_lost")), "{ended:?}");
}

fn who_is_asked_to_end_asks_the_command(engine: Engine) {
    let store = engine.store();
    let ways = [
        (heeds(5), Signal::TERM, Some(5), &["asked"][..]),
        (heeds(5), Signal::HUP, Some(5), &["asked"]),
        ("echo $$; read -r _; echo never".to_owned(), Signal::TERM, Some(128 + 15), &[]),
    ];
    for (n, (script, signal, exit, says)) in ways.into_iter().enumerate() {
        let name = format!("x{n}");
        let mut runner = running(&store, &name, &["--ttl", "20s"], &script);
        let pid = runner.next().unwrap();
        until("that it catches the signal", || catches(runner.pid(), signal));
        runner.signal(signal);
        let input = runner.input.take();
        let ended = runner.ended();
        drop(input);
        assert_eq!(ended.exit, exit, "{script}: {ended:?}");
        assert_eq!(ended.lines, says, "{script}");
        assert!(is_gone(&pid));
        // Released, long before the lease would have ended.
        assert_eq!(next_token(&store, &name), 2);
    }
    // Asked at once, by the command itself: it is never too early.
    for n in 0..20 {
        let name = format!("early{n}");
        let mut runner = running(&store, &name, &["--ttl", "20s"], "kill -TERM $PPID; read -r _");
        let input = runner.input.take();
        let ended = runner.ended();
        drop(input);
        assert_eq!(ended.exit, Some(128 + 15), "{ended:?}");
        assert_eq!(next_token(&store, &name), 2);
    }
    // Ctrl-C reaches the command by itself; it is for the command to end.
    let (runner, _) = held(&store, "y", &["--ttl", "20s"]);
    until("that it catches the signal", || catches(runner.pid(), Signal::INT));
    runner.signal(Signal::INT);
    runner.signal(Signal::INT);
    assert_eq!(show(&store, "y")["status"], "held");
    assert_eq!(runner.ended().exit, Some(0));
}

/// The same name and number under another governor is another lock.
fn a_fence_is_of_its_governor(engine: Engine) {
    let store = engine.store();
    let (global, _) = held(&store, "m", &["--ttl", "20s"]);
    let put = r#""$TAI_STATE" -u "$STORE" put g/of-another --data 1 --fence "$TAI_LOCK_NAME=$TAI_LOCK_TOKEN""#;
    let locks = ["locks", "--governor", "other", "run", "m", "--", "bash", "-c", put];
    let mut command = store.command(&locks);
    command.env("TAI_STATE", common::BINARY).env("STORE", &store.url);
    assert_eq!(common::run(command, b"").exit, 0);
    store.json(&["locks", "--governor", "other", "break", "m"]).ok();
    let elsewhere =
        ["put", "g/of-another", "--data", "2", "--fence", "m=1", "--fence-governor", "other"];
    refused(&store.json(&elsewhere), 4, "lock_lost");
    store.run(&["put", "g/of-another", "--data", "2", "--fence", "m=1"]).ok();
    assert_eq!(global.ended().exit, Some(0));
}

fn writes_are_fenced(engine: Engine) {
    let store = engine.store();
    let put = |data: &str, fences: &[String]| {
        let mut args = vec!["put", "g/s", "--data", data];
        fences.iter().for_each(|fence| args.extend(["--fence", fence]));
        store.json(&args)
    };
    let lost = |ran: &Ran, name: &str, token: u64| {
        let error = refused(ran, 4, "lock_lost");
        assert_eq!((&error["lock"], &error["fencing_token"]), (&json!(name), &json!(token)));
    };
    // With an equals sign, so that the last one divides.
    let (name, other) = ("a=b", "other");
    let (holder, token) = held(&store, name, &["--ttl", "30s"]);
    let (second, _) = held(&store, other, &["--ttl", "30s"]);
    assert_eq!(put("1", &[fence(name, token)]).ok().json()["version"], 1);
    assert_eq!(put("2", &[fence(name, token), fence(other, 1)]).ok().json()["version"], 2);
    // From within, in the words of the help.
    let binary = common::BINARY;
    let inner = format!(
        r#"{binary} -u '{}' put g/s --data 3 --fence "$TAI_LOCK_NAME=$TAI_LOCK_TOKEN""#,
        store.url
    );
    run(&store, "in", &inner).ok();
    let before = store.verified();
    let nothing_was_written = || {
        let now = store.verified();
        for key in ["content_hash", "events", "states"] {
            assert_eq!(now[key], before[key], "{key}");
        }
    };
    lost(&put("9", &[fence("in", 1)]), "in", 1);
    lost(&put("9", &[fence(name, 2)]), name, 2);
    lost(&put("9", &[fence("never", 1)]), "never", 1);
    lost(&put("9", &[fence(name, 1), fence(other, 2)]), other, 2);
    for odd in ["a", "a=", "=1", "a=0", "a=-1", "a=x", "a=18446744073709551616"] {
        assert_eq!(put("9", &[odd.to_owned()]).exit, 2, "{odd}");
    }
    assert_eq!(holder.ended().exit, Some(0));
    lost(&put("9", &[fence(name, 1)]), name, 1);
    let (newer, token) = held(&store, name, &["--ttl", "30s"]);
    assert_eq!(token, 2);
    let old = fence(name, 1);
    // Alone, and with the current one.
    for fences in
        [vec![old.clone()], vec![old.clone(), fence(name, 2)], vec![fence(name, 2), old.clone()]]
    {
        lost(&put("9", &fences), name, 1);
    }
    lost(&store.json(&["put", "g/new", "--data", "9", "--fence", &old]), name, 1);
    lost(&store.json(&["put", "g/s", "--data", "9", "--expect", "3", "--fence", &old]), name, 1);
    lost(&store.json(&["rm", "g/s", "--fence", &old]), name, 1);
    let line = json!({"id": "t", "ops": [{"op": "add", "state": "g/n", "value": 1}]}).to_string();
    let answer = store.feed(&["txn", "--fence", &old], line.as_bytes()).ok().json();
    assert_eq!((&answer["code"], &answer["outcome"]), (&json!("lock_lost"), &json!("not_applied")));
    nothing_was_written();
    // What was refused left no answer under its id: by the holder of the lock it is done.
    let current = fence(name, 2);
    let answer = store.feed(&["txn", "--fence", &current], line.as_bytes()).ok().json();
    assert_eq!((&answer["ok"], &answer["results"]), (&json!(true), &json!([{"version": 1}])));
    assert_eq!(store.json(&["rm", "g/s", "--fence", &current]).ok().json()["version"], 4);
    assert_eq!(put("5", &[current.clone(), fence(other, 1)]).ok().json()["version"], 5);
    // Broken is lost; and a lease that ended without anybody coming leaves the newest token.
    store.run(&["locks", "break", name]).ok();
    lost(&put("9", &[current]), name, 2);
    drop((newer, second));
    let (killed, token) = held(&store, "k", &["--ttl", "200ms"]);
    killed.signal(Signal::KILL);
    until("the end of a lease", || (show(&store, "k")["status"] == "expired").then_some(()));
    assert_eq!(put("6", &[fence("k", token)]).ok().json()["version"], 6);
    assert_eq!(next_token(&store, "k"), 2);
    lost(&put("9", &[fence("k", token)]), "k", token);
    assert_eq!(store.verified()["events"], 7);
}

fn writes_sent_again_are_answered_again(engine: Engine) {
    let store = engine.store();
    let put = ["put", "g/s", "--data", "1", "--expect", "0", "--idempotency-key", "k 1"];
    let first = store.json(&put).ok().json();
    store.run(&["put", "g/s", "--data", "2"]).ok();
    // The answer of then, though the state has gone on, and though it would be a conflict now.
    assert_eq!(store.json(&put).ok().json(), first);
    let text = store.run(&put).ok().out;
    assert_eq!(text, "g/s is at v1\n");
    let rm = ["rm", "g/s", "--expect", "2", "--idempotency-key", "k 2"];
    let removed = store.json(&rm).ok().json();
    store.run(&["put", "g/s", "--data", "3"]).ok();
    assert_eq!(store.json(&rm).ok().json(), removed);
    assert_eq!((&first["version"], &removed["version"]), (&json!(1), &json!(3)));
    // Who and why may differ; what, where and upon what may not.
    let again = [&put[..], &["--actor", "bob", "--reason", "again"]].concat();
    assert_eq!(store.json(&again).ok().json(), first);
    let key = ["--idempotency-key", "k 1"];
    for other in [
        &["put", "g/s", "--data", "2", "--expect", "0"][..],
        &["put", "g/t", "--data", "1", "--expect", "0"],
        &["put", "g/s", "--data", "1"],
        &["put", "g/s", "--data", "1", "--expect", "0", "--action", "other"],
        &["rm", "g/s"],
    ] {
        refused(&store.json(&[other, &key].concat()), 5, "invalid_state");
    }
    assert_eq!(store.json(&["put", "g/s", "--data", "1", "--idempotency-key", ""]).exit, 5);
    // One that failed leaves no answer; and who has lost his lock is still told what was done.
    let (holder, token) = held(&store, "l", &["--ttl", "30s"]);
    let (now, later) = (fence("l", token), fence("l", token + 1));
    let put = ["put", "g/l", "--data", "1", "--idempotency-key", "k 3", "--fence"];
    refused(&store.json(&[&put[..], &[&later]].concat()), 4, "lock_lost");
    let first = store.json(&[&put[..], &[&now]].concat()).ok().json();
    assert_eq!(first["version"], 1);
    assert_eq!(holder.ended().exit, Some(0));
    assert_eq!(store.json(&[&put[..], &[&now]].concat()).ok().json(), first);
    assert_eq!(store.verified()["events"], 5);
}

fn transactions_sent_again_are_answered_again(engine: Engine) {
    let store = engine.store();
    let large = "x".repeat(100_000);
    for state in ["g/large", "g/larger", "g/gone"] {
        store.feed(&["put", state], json!(large).to_string().as_bytes()).ok();
    }
    store.run(&["rm", "g/gone"]).ok();
    let txn = |lines: &[Value]| {
        let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
        store.feed(&["txn"], lines.as_bytes()).ok().lines()
    };
    let get = |state: &str| json!({"op": "get", "state": state});
    let add = json!({"op": "add", "state": "g/n", "value": 1});
    let requests = [
        json!({"id": "small", "ops": [add, get("g/n"), add, get("g/none")]}),
        // What was read is too much to be kept.
        json!({"id": "large", "ops": [get("g/large"), get("g/larger"), add, get("g/n")]}),
        json!({"id": "only read", "ops": [get("g/large"), get("g/larger")]}),
        // So that all behind it is read again: also what is not there, and what was written here.
        json!({"id": "behind", "ops": [
            get("g/large"), get("g/none"), get("g/gone"), add, get("g/n"),
            {"op": "put", "state": "g/p", "data": [1]}, get("g/p"),
            {"op": "delete", "state": "g/p"}, get("g/p"),
        ]}),
        json!({"id": {"any": ["json", 1.5]}, "ops": [add]}),
        json!({"id": 7, "ops": [add]}),
        json!({"id": true, "ops": []}),
    ];
    let first = txn(&requests);
    assert!(first.iter().all(|answer| answer["ok"] == true), "{first:#?}");
    assert_eq!(first[0]["results"][1], json!({"version": 1, "data": 1}));
    assert_eq!(first[1]["results"][1], json!({"version": 1, "data": large}));
    assert_eq!(first[3]["results"][1], json!({"version": 0, "data": null}));
    let before = store.verified();
    // The states go on; the answers stay: in another process, and twice in one.
    for state in ["g/large", "g/none", "g/gone", "g/p"] {
        store.run(&["put", state, "--data", "0"]).ok();
    }
    let twice = txn(&[&requests[..], &requests[..]].concat());
    for (n, answer) in twice.iter().enumerate() {
        let was = &first[n % requests.len()];
        // Not shown: they are long.
        let is_the_same = answer["results"] == was["results"];
        assert!(is_the_same, "{}: another answer: {}", was["id"], answer["message"]);
        assert_eq!((&answer["ok"], &answer["id"]), (&json!(true), &was["id"]));
    }
    assert_eq!(store.json(&["get", "g/n", "--raw"]).ok().json(), first[5]["results"][0]["version"]);
    // Who and why may differ, the rest may not.
    let mut again = requests[0].clone();
    again["actor"] = json!("bob");
    again["reason"] = json!("again");
    assert_eq!(txn(&[again])[0]["results"], first[0]["results"]);
    for ops in [json!([]), json!([add]), json!([add, get("g/n"), add, get("g/other")])] {
        let other = &txn(&[json!({"id": "small", "ops": ops})])[0];
        assert_eq!((&other["code"], &other["ok"]), (&json!("invalid_state"), &json!(false)));
        assert_eq!((&other["outcome"], &other["id"]), (&json!("not_applied"), &json!("small")));
    }
    // Without an id, and with null for one, nothing is kept.
    let twice = txn(&[json!({"ops": [add]}), json!({"id": null, "ops": [add]})]);
    let versions = twice.iter().map(|answer| answer["results"][0]["version"].as_u64().unwrap());
    let n = first[5]["results"][0]["version"].as_u64().unwrap();
    assert!(versions.eq([n + 1, n + 2]), "{twice:?}");
    // What was refused is no answer: once it can be done it is.
    let late =
        json!({"id": "late", "ops": [{"op": "put", "state": "g/q", "data": 1, "expect": 1}]});
    assert_eq!(txn(std::slice::from_ref(&late))[0]["code"], "version_conflict");
    store.run(&["put", "g/q", "--data", "0"]).ok();
    for _ in 0..2 {
        assert_eq!(txn(std::slice::from_ref(&late))[0]["results"], json!([{"version": 2}]));
    }
    let events = before["events"].as_u64().unwrap();
    assert_eq!(store.verified()["events"], events + 4 + 2 + 2);
}
