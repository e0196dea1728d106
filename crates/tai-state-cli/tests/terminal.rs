//! Nothing that a store, a file or an argument says steers the terminal of whoever looks at it; programs get
//! the exact values.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::os::unix::ffi::OsStrExt;

use common::{Ran, Store, run, tool};
use serde_json::{Value, json};

/// C0 and C1 controls, DEL, escape sequences, and the marks that turn the direction of writing, take no room or
/// end lines.
const HOSTILE: &str = "a\u{1b}]0;owned\u{7}\u{1b}[2J\u{8}\r\u{1}\u{7f}\u{85}\u{9b}31m\u{9d}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\
    \u{2066}\u{2067}\u{2068}\u{2069}\u{200b}\u{200f}\u{2028}\u{2029}\u{2060}\u{61c}\u{feff}\u{ad}\u{34f}\u{115f}\u{180b}\u{3164}\u{ffa0}\u{1d173}\u{e0041}\tb\nerror: forged";

fn steers(c: char) -> bool {
    (c.is_control() && !matches!(c, '\n' | '\t'))
        || matches!(
            c,
            '\u{ad}'
                | '\u{34f}'
                | '\u{115f}'
                | '\u{180b}'
                | '\u{3164}'
                | '\u{ffa0}'
                | '\u{1d173}'
                | '\u{e0041}'
        )
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

fn harmless(ran: &Ran, what: &str) {
    for text in [&ran.out, &ran.err] {
        assert!(!text.contains(steers), "{what}: {text:?}");
    }
}

/// A store whose ids, actions, actors, reasons, data, locks and keys are all hostile.
fn store() -> (Store, String) {
    let store = Store::made();
    let address = format!("{HOSTILE}/{HOSTILE}");
    let why = ["--actor", HOSTILE, "--reason", HOSTILE];
    for n in 0..4 {
        let data = json!({ HOSTILE: [HOSTILE, n] }).to_string();
        let put = ["put", &address, "--data", &data, "--action", HOSTILE, "--idempotency-key"];
        let key = format!("{HOSTILE}{n}");
        let args: Vec<&str> = put.into_iter().chain([key.as_str()]).chain(why).collect();
        store.run(&args).ok();
    }
    (store, address)
}

/// Every verb, when it goes well and when it does not; what changes the store comes last.
fn verbs<'a>(address: &'a str, folder: &'a str) -> Vec<Vec<&'a str>> {
    let locks = |verb: &'a str| vec!["locks", "--governor", HOSTILE, verb, HOSTILE];
    vec![
        vec!["init"],
        vec!["stats"],
        vec!["ls"],
        vec!["ls", HOSTILE],
        vec!["ls", HOSTILE, "--at", "-1ms"],
        vec!["ls", HOSTILE, "--deleted", "--after", HOSTILE],
        vec!["get", address],
        vec!["get", address, "--raw"],
        vec!["get", address, "--at", "v2"],
        vec!["get", address, "--at", "v9"],
        vec!["get", address, "--at", HOSTILE],
        vec!["get", HOSTILE],
        vec!["get", "no/such\u{1b}[31m\nerror: forged"],
        vec!["history", address],
        vec!["history", "no/such\u{9b}1m"],
        vec!["diff", address, "v1..v2"],
        vec!["diff", address, HOSTILE],
        vec!["timeline", HOSTILE],
        vec!["timeline", HOSTILE, "--since", HOSTILE],
        vec!["replay", address],
        vec!["replay", address, "--verify"],
        vec!["recover", address],
        vec!["snapshots", "create", address],
        vec!["snapshots", "ls", address],
        vec!["snapshots", "prune", address],
        vec!["verify"],
        vec!["verify", "--governor", HOSTILE],
        vec!["import", HOSTILE],
        vec!["export", "--out", folder],
        vec!["put", address, "--data", "{\"a\u{1b}[31m\":1,\"a\u{1b}[31m\":2}"],
        vec!["put", address, "--data", "1", "--expect", "99"],
        vec!["put", address, HOSTILE],
        vec!["put", address, "--data", "1", "--fence", "lock\u{1b}[31m=7"],
        vec!["put", address, "--data", "1", "--fence", HOSTILE],
        vec!["put", address, "--data", "2", "--idempotency-key", HOSTILE],
        vec!["put", address, "--data", "3", "--idempotency-key", HOSTILE],
        vec!["locks", "--governor", HOSTILE, "run", HOSTILE, "--client", HOSTILE, "--", "true"],
        vec!["locks", "--governor", HOSTILE, "run", HOSTILE, "--", HOSTILE],
        vec!["locks", "--governor", HOSTILE, "ls"],
        locks("show"),
        locks("break"),
        vec!["locks", "show", "none\u{1b}[31m"],
        vec!["locks", "--governor", HOSTILE, "cleanup"],
        vec!["firestore", "indexes", "--prefix", HOSTILE],
        vec!["no-such-verb\u{1b}[31m"],
        vec!["get", address, "--no-such\u{1b}[31m"],
        vec!["cleanup", HOSTILE, "--older-than", HOSTILE],
        vec!["revert", address, "--to", "v1", "--reason", HOSTILE],
        vec!["cleanup", HOSTILE, "--older-than", "0s", "--dry-run"],
        vec!["cleanup", HOSTILE, "--older-than", "0s"],
        vec!["history", address, "--from", "1"],
        vec!["rm", address, "--expect", "1"],
        vec!["rm", address],
        vec!["purge", address],
        vec!["purge", address, "--yes"],
        vec!["export"],
    ]
}

#[test]
fn no_verb_lets_anything_steer_a_terminal() {
    for format in ["table", "json", "jsonl"] {
        let (store, address) = store();
        let folder = store.folder.path().display().to_string();
        let (mut good, mut bad) = (0, 0);
        for args in verbs(&address, &folder) {
            let all: Vec<&str> = ["-o", format].into_iter().chain(args.iter().copied()).collect();
            let ran = store.run(&all);
            // The log as canonical bytes for a pipe; a unit test holds what a terminal gets.
            let shown = match args[..] {
                ["export"] => Ran { out: String::new(), ..ran.clone() },
                _ => ran.clone(),
            };
            harmless(&shown, &format!("{format} {args:?}"));
            *(if ran.exit == 0 { &mut good } else { &mut bad }) += 1;
            // What is quoted cannot look like a message of its own; usage errors quote what was typed.
            let forged = |line: &str| line.starts_with("error: forged");
            assert!(ran.exit == 2 || !ran.err.lines().any(forged), "{args:?}: {:?}", ran.err);
            if format != "table" && ran.exit != 2 {
                for line in ran.out.lines().filter(|_| format == "jsonl").chain(ran.err.lines()) {
                    let read = serde_json::from_str::<Value>(line);
                    assert!(read.is_ok(), "{args:?}: {line:?}");
                }
            }
        }
        // The controls: they did run, and they did fail.
        assert!(good > 30 && bad > 15, "{good} went well, {bad} did not");
    }
}

/// What a program reads is what was written, whatever it is.
#[test]
fn programs_get_the_exact_values() {
    let (store, address) = store();
    let state = store.json(&["get", &address]).ok().json();
    assert_eq!(state["data"], json!({ HOSTILE: [HOSTILE, 3] }));
    assert_eq!(
        [&state["governor_id"], &state["state_id"], &state["metadata"]["changed_by"]],
        [HOSTILE; 3]
    );
    let raw = store.run(&["get", &address, "--raw"]).ok();
    assert_eq!(serde_json::from_str::<Value>(&raw.out).unwrap(), state["data"]);
    let events = store.json(&["history", &address]).ok().json();
    assert_eq!(
        (&events[0]["action"], &events[0]["metadata"]["reason"]),
        (&json!(HOSTILE), &json!(HOSTILE))
    );
    let missing = store.json(&["get", &format!("none/{HOSTILE}")]);
    assert!(missing.error()["message"].as_str().unwrap().contains(HOSTILE), "{missing:?}");
    let line = json!({ "id": HOSTILE, "ops": [{ "op": "get", "state": address }] });
    let answer = store.feed(&["txn"], line.to_string().as_bytes()).ok();
    harmless(&answer, "txn");
    assert_eq!(
        (&answer.lines()[0]["id"], &answer.lines()[0]["results"][0]["data"]),
        (&json!(HOSTILE), &state["data"])
    );
}

/// Lines of input, names of files and the address of a store are shown in errors.
#[test]
fn what_is_quoted_from_outside_is_escaped() {
    let store = Store::made();
    let lines = [
        format!("{{\"governor_id\":{HOSTILE}}}"),
        json!({ HOSTILE: 1 }).to_string(),
        json!({"governor_id": "g", "state_id": "", "action": HOSTILE, "actor": HOSTILE,
               "timestamp": "2026-01-01T00:00:00Z", "data": 1})
        .to_string(),
        json!({"id": HOSTILE, "ops": [{"op": HOSTILE}]}).to_string(),
        json!({"id": HOSTILE, "ops": [{"op": "get", "state": HOSTILE}]}).to_string(),
    ];
    for (n, line) in lines.iter().enumerate() {
        let name = std::ffi::OsStr::from_bytes(b"in\x1b[31m\n\xc2\x9b.jsonl");
        let file = store.folder.path().join(name);
        std::fs::write(&file, line).unwrap();
        for verb in ["import", "txn"] {
            for format in ["table", "json"] {
                let mut command = store.command(&["-o", format, verb]);
                command.arg(&file);
                let ran = run(command, b"");
                harmless(&ran, &format!("{verb} {n}"));
            }
        }
    }
    for url in [
        "no-such\u{1b}[31m\u{9b}.tai".to_owned(),
        format!("redis://{HOSTILE}"),
        format!("firestore://{HOSTILE}"),
        "firestore+emulator://h\u{1b}[31m:1/p".to_owned(),
        "firestore+emulator://127.0.0.1:1/p\u{202e}".to_owned(),
    ] {
        for format in ["table", "json"] {
            let mut command = tool();
            command.args(["-u", &url, "-o", format, "get", "g/s"]);
            let ran = run(command, b"");
            assert_ne!(ran.exit, 0);
            harmless(&ran, &url);
        }
    }
    // What a damaged or foreign file says of itself.
    std::fs::write(&store.file, b"SQLite format 3\0\x1b[31m").unwrap();
    harmless(&store.run(&["verify"]), "a damaged file");
    let mut command = tool();
    command.env("FIRESTORE_EMULATOR_HOST", "user:CANARY@127.0.0.1:1\u{1b}[31m");
    command.args(["-u", "firestore://demo-p", "get", "g/s"]);
    let ran = run(command, b"");
    harmless(&ran, "the environment");
    assert!(!ran.err.contains("CANARY"), "{ran:?}");
}
