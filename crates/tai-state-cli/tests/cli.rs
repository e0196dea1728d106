//! The command line as a contract: output, exit codes, errors.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use common::{BINARY, Engine, Store, bash, run, tool};
use serde_json::{Value, json};

on_every_engine!(
    a_state_from_its_birth_to_its_end,
    lists,
    exit_codes,
    only_some_verbs_make_a_store,
    hostile_ids_pass_through_and_steer_no_terminal,
    transactions_line_by_line,
    concurrent_transactions_lose_nothing,
    a_reader_that_goes_away_is_no_failure,
    an_import_without_its_reader_is_no_success,
    raw_data_is_json,
    the_demo_runs,
);

fn a_state_from_its_birth_to_its_end(engine: Engine) {
    let store = engine.store();
    let put = store.json(&["put", "orders/o/1", "--data", r#"{"n":1}"#, "--actor", "ada"]).ok();
    assert_eq!(put.json()["version"], 1);
    store.feed(&["put", "orders/o/1", "--expect", "1", "--reason", "paid"], b"{\"n\":2}").ok();
    let got = store.json(&["get", "orders/o/1"]).ok().json();
    for key in
        ["governor_id", "state_id", "version", "timestamp", "data", "metadata", "causality", "hash"]
    {
        assert!(got.get(key).is_some(), "{key} is missing in {got}");
    }
    assert_eq!((&got["state_id"], &got["data"]), (&json!("o/1"), &json!({"n": 2})));
    assert_eq!(got["metadata"]["reason"], "paid");
    assert_eq!(store.run(&["get", "orders/o/1", "--raw", "-o", "json"]).ok().out, "{\"n\":2}\n");

    store.run(&["rm", "orders/o/1", "--expect", "2"]).ok();
    let gone = store.json(&["get", "orders/o/1"]);
    assert_eq!((gone.exit, gone.error()["code"].as_str()), (3, Some("state_not_found")));
    assert!(gone.error()["hint"].as_str().unwrap().contains("--at v2"), "{gone:?}");
    let past = store.json(&["get", "orders/o/1", "--at", "v2"]).ok().json();
    assert_eq!((&past["data"], &past["hash"]), (&json!({"n": 2}), &got["hash"]));
    assert_eq!(store.json(&["get", "orders/o/1", "--at", "-1h"]).exit, 3);
    assert_eq!(store.json(&["get", "orders/o/1", "--at", "2999-01-01T00:00:00Z"]).exit, 3);

    let history = store.run(&["-o", "jsonl", "history", "orders/o/1"]).ok().lines();
    assert_eq!(
        history.iter().map(|e| e["version"].as_u64().unwrap()).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    for key in [
        "id",
        "governor_id",
        "state_id",
        "version",
        "action",
        "timestamp",
        "from_state",
        "to_state",
        "metadata",
        "causality",
        "hash",
    ] {
        assert!(history[1].get(key).is_some(), "{key} is missing");
    }
    assert_eq!(
        (&history[1]["from_state"], &history[1]["to_state"]),
        (&json!({"n": 1}), &json!({"n": 2}))
    );
    assert_eq!((&history[2]["deleted"], &history[2]["to_state"]), (&json!(true), &Value::Null));
    let some =
        store.run(&["-o", "jsonl", "history", "orders/o/1", "--from", "v2", "--to", "2"]).ok();
    assert_eq!(some.lines(), history[1..2]);
    let array = store.json(&["history", "orders/o/1"]).ok().json();
    assert_eq!(array, Value::from(history));
    store.verified();
}

fn lists(engine: Engine) {
    let store = engine.store();
    assert_eq!(store.json(&["ls"]).ok().json(), json!([]));
    for n in 0..5 {
        store.run(&["put", &format!("g/s{n}"), "--data", "1"]).ok();
    }
    store.run(&["put", "h/x", "--data", "1"]).ok();
    store.run(&["rm", "g/s2"]).ok();
    let ids = |args: &[&str]| -> Vec<String> {
        let rows = store.json(args).ok().json();
        rows.as_array()
            .unwrap()
            .iter()
            .map(|row| row["state_id"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(ids(&["ls", "g"]), ["s0", "s1", "s3", "s4"]);
    assert_eq!(ids(&["ls", "g", "--deleted", "--limit", "3"]), ["s0", "s1", "s2"]);
    assert_eq!(ids(&["ls", "g", "--after", "s1", "--limit", "1"]), ["s3"]);
    assert_eq!(
        store.json(&["ls"]).ok().json(),
        json!([{"governor_id": "g"}, {"governor_id": "h"}])
    );
    let stats = store.json(&["stats"]).ok().json();
    for (key, value) in
        [("total_states", 5), ("total_events", 7), ("max_version", 2), ("cache_size_bytes", 0)]
    {
        assert_eq!(stats[key], value, "{key}");
    }
    let table = store.run(&["ls", "g"]).ok().out;
    assert!(table.starts_with("STATE") || table.trim_start().starts_with("STATE"), "{table}");
}

fn exit_codes(engine: Engine) {
    let store = engine.store();
    store.run(&["put", "g/s", "--data", "1"]).ok();
    for (args, exit) in [
        (vec!["get", "g/none"], 3),
        (vec!["get", "g/s", "--at", "v9"], 3),
        (vec!["get", "g/s", "--at", "yesterday"], 2),
        (vec!["get", "g"], 5),
        (vec!["get", "/s"], 5),
        (vec!["history", "g/none"], 3),
        (vec!["rm", "g/none"], 3),
        (vec!["rm", "g/s", "--expect", "7"], 4),
        (vec!["put", "g/s", "--data", "1", "--expect", "0"], 4),
        (vec!["put", "g/s", "--data", "{"], 5),
        (vec!["put", "g/s", "--data", r#"{"a":1,"a":2}"#], 5),
        (vec!["put", "g/s", "--data", "1e400"], 5),
        (vec!["put", "g/s", "--data", "18446744073709551616"], 5),
        (vec!["put", "g/s", "/no/such/file"], 3),
        (vec!["put", "g/s", "--data", "1", "--action", ""], 5),
        (vec!["init"], 4),
        (vec!["frobnicate"], 2),
        (vec!["ls", "g", "--limit", "0"], 2),
        (vec!["import", "/no/such/file"], 3),
    ] {
        let ran = store.json(&args);
        assert_eq!(ran.exit, exit, "{args:?}: {ran:?}");
        if exit != 2 || args[0] == "get" {
            let error = ran.error();
            for key in ["code", "retryable", "hint", "message"] {
                assert!(error.get(key).is_some(), "{args:?}: {key} is missing in {error}");
            }
        }
        assert!(ran.out.is_empty(), "{args:?}: {}", ran.out);
    }
    let conflict = store.json(&["put", "g/s", "--data", "1", "--expect", "9"]).error();
    assert_eq!(
        (&conflict["code"], &conflict["retryable"]),
        (&json!("version_conflict"), &json!(true))
    );
    assert_eq!((&conflict["expected"], &conflict["actual"]), (&json!(9), &json!(1)));
    let report = store.verified();
    assert_eq!((&report["states"], &report["events"]), (&json!(1), &json!(1)));
}

#[test]
fn a_store_must_be_named_and_exist() {
    let mut command = tool();
    command.args(["-o", "json", "stats"]);
    let none = run(command, b"");
    assert_eq!(none.exit, 2);
    assert_eq!(none.error()["hint"].as_str().unwrap().matches("-u ").count(), 3, "{none:?}");
    let store = Store::new();
    store.write("store.tai", b"some text");
    assert_eq!(store.json(&["stats"]).exit, 5);
    assert_eq!(std::fs::read(&store.file).unwrap(), b"some text");
    for url in ["http://x", "firestore://", "mem:x"] {
        let mut command = tool();
        command.args(["-u", url, "-o", "json", "stats"]);
        let ran = run(command, b"");
        assert_eq!(ran.exit, 5, "{url}: {ran:?}");
    }
    let mut by_environment = tool();
    by_environment.args(["stats"]);
    by_environment.env("TAI_STATE_URL", "mem:");
    run(by_environment, b"").ok();
}

fn only_some_verbs_make_a_store(engine: Engine) {
    let store = engine.place();
    for verb in [
        "stats",
        "verify",
        "export",
        "ls",
        "ls g",
        "get g/s",
        "history g/s",
        "rm g/s",
        "put g/s --data 1",
        "txn",
    ] {
        let args: Vec<&str> = verb.split(' ').collect();
        let missing = store.json(&args);
        let error = missing.error();
        assert_eq!((missing.exit, error["code"].as_str()), (3, Some("not_a_store")), "{verb}");
        assert!(error["hint"].as_str().unwrap().contains("tai-state init"), "{verb}: {error}");
    }
    assert!(!store.exists(), "a verb that makes none made a store");
    store.run(&["init"]).ok();
    assert_eq!(store.json(&["init"]).error()["code"], "exists");
    assert_eq!(store.json(&["get", "g/s"]).error()["code"], "state_not_found");
    let taken_in = engine.place();
    taken_in.feed(&["import", "-"], b"").ok();
    assert!(taken_in.exists());
}

fn hostile_ids_pass_through_and_steer_no_terminal(engine: Engine) {
    let store = engine.store();
    for id in ["..", "__x__", "a~b", "%2F", "\u{202e}rtl", "new\nline", "\u{1b}[31mred", " ", "é"]
    {
        let address = format!("{id}/{id}");
        store.run(&["put", &address, "--data", "1", "--reason", id]).ok();
        let got = store.json(&["get", &address]).ok().json();
        assert_eq!((got["state_id"].as_str(), got["governor_id"].as_str()), (Some(id), Some(id)));
        for args in [vec!["get", &address], vec!["ls", id], vec!["history", &address], vec!["ls"]] {
            let shown = store.run(&args).ok().out;
            assert!(!shown.contains(['\u{1b}', '\u{202e}']), "{args:?}: {shown:?}");
        }
        let missing = store.run(&["get", &format!("{id}/none")]);
        assert!(missing.exit == 3 && !missing.err.contains(['\u{1b}', '\u{202e}']), "{missing:?}");
    }
    assert_eq!(store.json(&["put", "/x", "--data", "1"]).exit, 5);
    let long = format!("g/{}", "x".repeat(10_000));
    assert_eq!(store.json(&["put", &long, "--data", "1"]).exit, 5);
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    assert_eq!(store.feed(&["put", "g/s"], deep.as_bytes()).exit, 5);
    let large = format!("\"{}\"", "x".repeat(2 << 20));
    assert_eq!(store.feed(&["put", "g/s"], large.as_bytes()).exit, 5);
    let endless = vec![b' '; 20 << 20];
    assert_eq!(store.feed(&["put", "g/s"], &endless).exit, 5);
    for exact in [
        "18446744073709551615",
        "0.30000000000000004",
        "-9223372036854775808",
        "1e308",
        "-0.0",
        "1.0",
    ] {
        store.run(&["put", "exact/n", "--data", exact]).ok();
        let back = store.run(&["get", "exact/n", "--raw", "-o", "json"]).ok().out;
        let as_number = |text: &str| text.trim().parse::<f64>().unwrap().to_bits();
        assert!(back.trim() == exact || as_number(&back) == as_number(exact), "{exact}: {back}");
    }
    store.verified();
}

fn transactions_line_by_line(engine: Engine) {
    let store = engine.store();
    let lines = [
        r#"{"id":"t1","ops":[{"op":"append","state":"g/a","value":1},{"op":"append","state":"g/a","value":5},{"op":"get","state":"g/a"},{"op":"put","state":"g/b","data":{"x":1}}]}"#,
        r#"{"id":"t2","ops":[{"op":"put","state":"g/b","data":{"x":2},"expect":7},{"op":"put","state":"g/c","data":1}]}"#,
        r#"not json"#,
        r#"{"id":"t3","ops":[{"op":"merge","state":"g/b","data":{"x":null,"y":[1]}},{"op":"add","state":"g/n","value":41},{"op":"add","state":"g/n","value":1,"expect":1}]}"#,
        r#"{"id":"t4","ops":[{"op":"put","state":"g/d","data":1},{"op":"append","state":"g/b","value":1}]}"#,
        r#"{"id":"t5","ops":[{"op":"get","state":"g/none"},{"op":"get","state":"g/n"},{"op":"delete","state":"g/b"},{"op":"get","state":"g/b"}]}"#,
        r#"{"id":"t6","ops":[{"op":"delete","state":"g/none"}]}"#,
        r#"{"id":"t7","ops":[{"op":"put","state":"nowhere","data":1}]}"#,
        r#"{"id":8,"ops":[]}"#,
    ];
    let ran = store.feed(&["txn"], lines.join("\n").as_bytes());
    assert_eq!(ran.exit, 5, "two lines were no transactions: {ran:?}");
    let answers = ran.lines();
    assert_eq!(answers.len(), lines.len());
    assert_eq!(
        answers[0],
        json!({"id": "t1", "ok": true, "attempts": 1,
               "results": [{"version": 1}, {"version": 2}, {"version": 2, "data": [1, 5]}, {"version": 1}]})
    );
    let refused = |n: usize, id: Value, code: &str| {
        let answer = &answers[n];
        assert_eq!(
            (&answer["id"], &answer["ok"], &answer["code"]),
            (&id, &json!(false), &json!(code)),
            "{answer}"
        );
        assert_eq!(answer["outcome"], "not_applied");
    };
    refused(1, json!("t2"), "version_conflict");
    refused(2, Value::Null, "serialization_error");
    assert_eq!(answers[3]["results"], json!([{"version": 2}, {"version": 1}, {"version": 2}]));
    refused(4, json!("t4"), "invalid_state");
    assert_eq!(
        answers[5]["results"],
        json!([{"version": 0, "data": null}, {"version": 2, "data": 42}, {"version": 3}, {"version": 0, "data": null}])
    );
    refused(6, json!("t6"), "state_not_found");
    refused(7, json!("t7"), "rejected");
    assert_eq!(answers[8], json!({"id": 8, "ok": true, "attempts": 1, "results": []}));
    for absent in ["g/c", "g/d"] {
        assert_eq!(
            store.json(&["get", absent]).exit,
            3,
            "{absent} was written by a refused transaction"
        );
    }
    store.verified();
}

fn concurrent_transactions_lose_nothing(engine: Engine) {
    let store = engine.store();
    let input: String = (0..300)
        .map(|n| {
            json!({"id": n, "ops": [{"op": "add", "state": format!("g/n{}", n % 3), "value": 1}]})
                .to_string()
                + "\n"
        })
        .collect();
    let ran = store.feed(&["txn", "--concurrency", "16"], input.as_bytes()).ok();
    let answers = ran.lines();
    let applied = answers.iter().filter(|answer| answer["ok"] == true).count() as u64;
    assert_eq!(answers.len(), 300);
    let sum: u64 = (0..3)
        .map(|n| store.json(&["get", &format!("g/n{n}"), "--raw"]).ok().json().as_u64().unwrap())
        .sum();
    assert_eq!(sum, applied);
    for answer in answers.iter().filter(|answer| answer["ok"] == false) {
        assert_eq!(answer["outcome"], "not_applied", "{answer}");
    }
    store.verified();
}

fn a_reader_that_goes_away_is_no_failure(engine: Engine) {
    let store = engine.store();
    let many: String = (0..2_000)
        .map(|n| json!({"governor_id": "g", "state_id": format!("s{n}"), "action": "a", "timestamp": "2026-01-01T00:00:00Z", "actor": "x", "data": n}).to_string() + "\n")
        .collect();
    store.feed(&["import", "-"], many.as_bytes()).ok();
    for verb in ["export", "ls g -o jsonl --limit 2000"] {
        let script = format!(
            "{BINARY} -u {} {verb} | head -n 1 | wc -l; exit ${{PIPESTATUS[0]}}",
            store.url
        );
        let ran = run(bash(&script), b"");
        assert_eq!((ran.exit, ran.out.trim()), (0, "1"), "{verb}: {ran:?}");
    }
}

/// A command that changes things and lost its reader has stopped part-way, and says so.
fn an_import_without_its_reader_is_no_success(engine: Engine) {
    let store = engine.store();
    let many = engine.about(20_000);
    let lines: String = (0..many)
        .map(|n| json!({"governor_id": "g", "state_id": format!("s{n}"), "action": "a", "timestamp": "2026-01-01T00:00:00Z", "actor": "x", "data": n}).to_string() + "\n")
        .collect();
    let file = store.write("log.jsonl", lines.as_bytes());
    let script = format!(
        "{BINARY} -u {} import --acks {file} | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}",
        store.url
    );
    assert_eq!(run(bash(&script), b"").exit, 9);
    let summary = store.json(&["import", &file]).ok().json();
    assert_eq!(summary["lines"], many);
    // Nor does a name decide how a command ends.
    let odd = store.json(&["get", "g/Broken pipe"]);
    assert_eq!(odd.exit, 3);
}

/// What is shown on a terminal steers nothing, and is the same JSON.
fn raw_data_is_json(engine: Engine) {
    let store = engine.store();
    let data = json!({"a\u{202e}": "b\u{7f}\u{1b}\n", "c": [1.5, null]});
    store.run(&["put", "g/s", "--data", &data.to_string()]).ok();
    let raw = store.run(&["get", "g/s", "--raw"]).ok();
    assert_eq!(raw.json(), data);
    assert!(!raw.out.contains(['\u{202e}', '\u{1b}', '\u{7f}']));
}

#[test]
fn verify_names_what_is_damaged() {
    let store = Store::made();
    for n in 0..20 {
        store
            .run(&["put", &format!("g/s{n}"), "--data", &format!("\"{}\"", "x".repeat(2_000))])
            .ok();
    }
    let mut bytes = std::fs::read(&store.file).unwrap();
    // In every long text, since some stand in pages that are free by now.
    let mut run = 0;
    for byte in &mut bytes {
        run = if *byte == b'x' { run + 1 } else { 0 };
        if run == 500 {
            *byte = b'y';
        }
    }
    std::fs::write(&store.file, &bytes).unwrap();
    let ran = store.json(&["verify"]);
    assert_eq!((ran.exit, ran.error()["code"].as_str()), (8, Some("corrupt")), "{ran:?}");
    let report = ran.json();
    assert_eq!(report["ok"], false);
    let problems = report["problems"].as_array().unwrap();
    for n in 0..20 {
        // Every one, not only the first.
        let named = problems.iter().any(|p| p.as_str().unwrap().contains(&format!("s{n}")));
        assert!(named, "s{n} is not named in {report}");
    }
}

fn the_demo_runs(engine: Engine) {
    let demo = |args: &[&str]| {
        let (place, args) = (engine.place(), [&["demo"], args].concat());
        // On a file it makes a place of its own, and the URL is let alone.
        let ran = place.run(&args).ok();
        assert_eq!(place.exists(), engine != Engine::File);
        (place, ran)
    };
    let (place, ran) = demo(&["-o", "json", "--kill-after", "300"]);
    let report = ran.json();
    assert_eq!((&report["lost"], &report["ok"]), (&json!(0), &json!(true)));
    assert!(report["acknowledged"].as_u64().unwrap() >= 300);
    if engine != Engine::File {
        assert_eq!(place.verified()["content_hash"], report["content_hash"]);
        assert_eq!(place.json(&["demo"]).error()["code"], "exists");
        assert_eq!(place.json(&["demo", "--keep", "x"]).exit, 2);
    }
    let (_, ran) = demo(&["--kill-after", "200"]);
    let told = ran.out;
    for step in ["1. ", "2. ", "3. ", "4. ", "5. ", "6. ", "kill -9", "content hash"] {
        assert!(told.contains(step), "{step} is missing: {told}");
    }
}
