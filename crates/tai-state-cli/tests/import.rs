//! `import` and `export`: the same log in and out, hostile input, and running again.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::collections::HashMap;
use std::io::{Read, Write};

use common::{Engine, Random, Store, incidents};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

on_every_engine!(
    large_lines_take_little_memory,
    equal_lines_are_two_transitions_and_running_again_adds_none,
    importing_one_s_own_export_adds_nothing,
    strict_refuses_the_deletion_of_nothing,
    strict_takes_in_an_export_with_a_purge,
    gzip_from_a_slow_pipe,
    times_are_kept_and_never_go_back,
    deletions_go_through,
    a_purge_of_what_is_deleted_goes_through,
    a_bad_line_is_named_and_lines_before_it_stay,
    damaged_gzip_is_named_and_lines_before_it_stay,
    racing_imports_double_nothing,
);

fn line(state: &str, second: u32, data: impl Into<Value>) -> String {
    json!({
        "governor_id": "g", "state_id": state, "action": "step", "actor": "me",
        "timestamp": format!("2026-01-01T00:00:{second:02}Z"), "data": data.into(),
    })
    .to_string()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

#[test]
fn the_real_log_goes_in_and_comes_out() {
    let Some(path) = incidents() else { return };
    let store = Store::new();
    let summary = store.json(&["import", path.to_str().unwrap()]).ok().json();
    assert_eq!((&summary["applied"], &summary["states"]), (&json!(65_533), &json!(7_554)));
    let stats = store.json(&["stats"]).ok().json();
    assert_eq!((&stats["total_events"], &stats["max_version"]), (&json!(65_533), &json!(123)));
    let report = store.verified();

    // Again: nothing is doubled.
    let again = store.json(&["import", path.to_str().unwrap()]).ok().json();
    assert_eq!((&again["applied"], &again["already_there"]), (&json!(0), &json!(65_533)));
    assert_eq!(store.verified()["content_hash"], report["content_hash"]);

    // What came in is what goes out, state by state and in order.
    let exported = store.run(&["export"]).ok();
    let mut plain = String::new();
    GzDecoder::new(std::fs::File::open(&path).unwrap()).read_to_string(&mut plain).unwrap();
    let histories = |text: &str| {
        let mut histories: HashMap<String, Vec<Value>> = HashMap::new();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            histories.entry(line["state_id"].as_str().unwrap().to_owned()).or_default().push(line);
        }
        histories
    };
    assert_eq!(histories(&plain), histories(&exported.out));

    // And once more through a second store: byte for byte, and with the hash that verify computes.
    let copy = Store::new();
    copy.feed(&["import", "-"], exported.out.as_bytes()).ok();
    let out = copy.path("again.jsonl.gz");
    let summary = copy.json(&["export", "--out", out.to_str().unwrap()]).ok().json();
    let mut unpacked = String::new();
    GzDecoder::new(std::fs::File::open(&out).unwrap()).read_to_string(&mut unpacked).unwrap();
    assert!(unpacked == exported.out, "the export changed");
    assert_eq!(summary["content_hash"], report["content_hash"]);
}

/// Runs an import and returns its peak memory in KiB, as the system accounts it.
#[cfg(target_os = "linux")]
fn peak(store: &Store, file: &str) -> u64 {
    let mut child = std::process::Command::new(common::BINARY)
        .arg("-u")
        .arg(&store.url)
        .args(["import", file])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let found = std::fs::read_to_string(&status).unwrap_or_default();
        let high = found.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = high.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0));
        std::thread::yield_now();
    }
    assert!(child.wait().unwrap().success());
    println!("peak {peak} KiB");
    peak
}

#[cfg(target_os = "linux")]
#[test]
fn importing_takes_little_memory() {
    let Some(path) = incidents() else { return };
    let peak = peak(&Store::new(), path.to_str().unwrap());
    assert!(peak > 0 && peak <= 128 * 1024, "{peak} KiB");
}

/// Large lines do not pile up while they wait.
fn large_lines_take_little_memory(engine: Engine) {
    let store = engine.place();
    let lines: String =
        (0..200).map(|n| line(&format!("s{n}"), 1, "x".repeat(890_000)) + "\n").collect();
    let file = store.write("large.gz", &gzip(lines.as_bytes()));
    drop(lines);
    let peak = peak(&store, &file);
    assert!(peak > 0 && peak <= 256 * 1024, "{peak} KiB");
}

fn equal_lines_are_two_transitions_and_running_again_adds_none(engine: Engine) {
    let store = engine.place();
    let lines =
        [line("a", 1, 1), line("a", 1, 1), line("b", 1, 1), line("a", 1, 2), line("a", 1, 1)];
    let input = lines.join("\n");
    for (round, applied) in [(1, 5), (2, 0), (3, 0)] {
        let summary = store.feed(&["-o", "json", "import", "-"], input.as_bytes()).ok().json();
        assert_eq!(summary["applied"], applied, "round {round}");
    }
    // A longer log later: only what is new.
    let longer = format!("{input}\n{}\n{}", line("a", 1, 1), line("c", 2, 1));
    let summary = store.feed(&["-o", "json", "import", "-"], longer.as_bytes()).ok().json();
    assert_eq!((&summary["applied"], &summary["already_there"]), (&json!(2), &json!(5)));
    // And its tail alone.
    let tail = line("c", 2, 1);
    let summary = store.feed(&["-o", "json", "import", "-"], tail.as_bytes()).ok().json();
    assert_eq!(summary["applied"], 0);
    assert_eq!(store.json(&["stats"]).ok().json()["total_events"], 7);
}

/// A store knows its own export, whatever the identities of its events are.
fn importing_one_s_own_export_adds_nothing(engine: Engine) {
    let store = engine.store();
    for n in 0..3 {
        store.run(&["put", "g/a", "--data", &n.to_string()]).ok();
    }
    store.run(&["rm", "g/a"]).ok();
    // Times that were not kept as they were given.
    let late = [line("b", 5, 1), line("b", 3, 2), line("b", 3, 2)].join("\n");
    store.feed(&["import", "-"], late.as_bytes()).ok();
    let exported = store.run(&["export"]).ok().out;
    let summary = store.feed(&["-o", "json", "import", "-"], exported.as_bytes()).ok().json();
    assert_eq!((&summary["applied"], &summary["already_there"]), (&json!(0), &json!(7)));
    let summary = store.feed(&["-o", "json", "import", "-"], late.as_bytes()).ok().json();
    assert_eq!(summary["applied"], 0);
    assert_eq!(store.run(&["export"]).ok().out, exported);
}

fn strict_refuses_the_deletion_of_nothing(engine: Engine) {
    let delete = |state: &str| {
        json!({"governor_id": "g", "state_id": state, "action": "delete", "timestamp": "2026-01-01T00:00:00Z", "actor": "x", "data": null, "deleted": true}).to_string()
    };
    let bad = format!("{}\n{}", line("a", 1, 1), delete("b"));
    let good = format!("{}\n{}", line("a", 1, 1), delete("a"));
    let store = engine.place();
    let ran = store.feed(&["-o", "json", "import", "--strict", "-"], bad.as_bytes());
    assert_eq!((ran.exit, &ran.error()["line"]), (3, &json!(2)), "{ran:?}");
    assert!(!store.exists());
    for applied in [2, 0] {
        let summary =
            store.feed(&["-o", "json", "import", "--strict", "-"], good.as_bytes()).ok().json();
        assert_eq!(summary["applied"], applied);
    }
    assert_eq!(store.feed(&["import", "--strict", "-"], bad.as_bytes()).exit, 3);
    assert_eq!(store.json(&["stats"]).ok().json()["total_events"], 2);
    // What is deleted cannot be deleted again; nothing before such a line is taken in either.
    let again = format!("{}\n{}", line("c", 1, 1), delete("a").replace("\"x\"", "\"y\""));
    assert_eq!(store.feed(&["import", "--strict", "-"], again.as_bytes()).exit, 3);
    assert_eq!(store.run(&["get", "g/c"]).exit, 3);
}

/// A log that begins with what a purge has left is whole.
fn strict_takes_in_an_export_with_a_purge(engine: Engine) {
    let store = engine.store();
    store.run(&["put", "g/a", "--data", "1"]).ok();
    store.run(&["rm", "g/a"]).ok();
    store.run(&["purge", "g/a", "--yes"]).ok();
    store.run(&["put", "g/b", "--data", "2"]).ok();
    let exported = store.run(&["export"]).ok().out;
    let other = engine.place();
    for applied in [2, 0] {
        let ran = store_feed(&other, &exported);
        assert_eq!(ran["applied"], applied);
    }
    assert_eq!(other.run(&["get", "g/a"]).exit, 3);
}

fn store_feed(store: &common::Store, lines: &str) -> serde_json::Value {
    store.feed(&["-o", "json", "import", "--strict", "-"], lines.as_bytes()).ok().json()
}

/// A pipe that gives a byte at a time is gzip all the same.
fn gzip_from_a_slow_pipe(engine: Engine) {
    let store = engine.place();
    let file = store.write("log.gz", &gzip(line("a", 1, 1).as_bytes()));
    let script = format!(
        "{{ head -c 1 {file}; sleep 0.2; tail -c +2 {file}; }} | {} -u {} import -",
        common::BINARY,
        store.url
    );
    assert_eq!(common::run(common::bash(&script), b"").exit, 0);
    assert_eq!(store.verified()["events"], 1);
}

fn times_are_kept_and_never_go_back(engine: Engine) {
    let store = engine.place();
    let lines = [line("a", 5, 1), line("a", 3, 2), line("a", 9, 3)].join("\n");
    store.feed(&["import", "-"], lines.as_bytes()).ok();
    let history = store.run(&["-o", "jsonl", "history", "g/a"]).ok().lines();
    let times: Vec<&str> =
        history.iter().map(|event| event["timestamp"].as_str().unwrap()).collect();
    assert_eq!(times, ["2026-01-01T00:00:05Z", "2026-01-01T00:00:05Z", "2026-01-01T00:00:09Z"]);
    assert_eq!(store.json(&["get", "g/a", "--at", "2026-01-01T00:00:08Z"]).ok().json()["data"], 2);
    // Recognised by what the line said, not by the time that was kept.
    let again = store.feed(&["-o", "json", "import", "-"], lines.as_bytes()).ok().json();
    assert_eq!(again["applied"], 0);
}

fn deletions_go_through(engine: Engine) {
    let store = engine.place();
    store.feed(&["import", "-"], line("a", 1, 1).as_bytes()).ok();
    store.run(&["rm", "g/a"]).ok();
    store.run(&["put", "g/a", "--data", "null", "--expect", "0"]).ok();
    let exported = store.run(&["export"]).ok().out;
    assert_eq!(exported.matches("\"deleted\":true").count(), 1, "{exported}");
    let copy = engine.place();
    copy.feed(&["import", "-"], exported.as_bytes()).ok();
    assert_eq!(copy.run(&["export"]).ok().out, exported);
    assert_eq!(copy.json(&["get", "g/a"]).ok().json()["version"], 3);
    let nothing = json!({"governor_id": "g", "state_id": "z", "action": "delete", "timestamp": "2026-01-01T00:00:00Z", "actor": "x", "data": null, "deleted": true});
    // A log may begin so, whose beginning was cleaned up; but what is deleted is not deleted again.
    copy.feed(&["import", "-"], nothing.to_string().as_bytes()).ok();
    assert_eq!(copy.run(&["get", "g/z"]).exit, 3);
    let again = nothing.to_string().replace("00:00:00", "00:00:01");
    let ran = copy.feed(&["-o", "json", "import", "-"], again.as_bytes());
    assert_eq!((ran.exit, &ran.error()["line"]), (3, &json!(1)), "{ran:?}");
}

/// What one store tells of a purge another takes in, also of a state that was deleted in both.
fn a_purge_of_what_is_deleted_goes_through(engine: Engine) {
    let store = engine.place();
    store.feed(&["import", "-"], line("a", 1, 1).as_bytes()).ok();
    store.run(&["rm", "g/a"]).ok();
    let copy = engine.place();
    copy.feed(&["import", "-"], store.run(&["export"]).ok().out.as_bytes()).ok();
    store.run(&["purge", "g/a", "--yes"]).ok();
    store.run(&["put", "g/a", "--data", "2", "--expect", "0"]).ok();
    let exported = store.run(&["export"]).ok().out;
    for strict in [&["--strict"][..], &[]] {
        let arguments = [&["-o", "json", "import", "-"], strict].concat();
        let summary = copy.feed(&arguments, exported.as_bytes()).ok().json();
        assert_eq!(summary["applied"], if strict.is_empty() { 0 } else { 2 }, "{summary}");
    }
    let state = copy.json(&["get", "g/a"]).ok().json();
    assert_eq!((&state["data"], &state["version"]), (&json!(2), &json!(4)));
    copy.verified();
}

fn a_bad_line_is_named_and_lines_before_it_stay(engine: Engine) {
    let good = |n: u32| line(&format!("s{n}"), n, n);
    let long_id = line(&"x".repeat(10_000), 1, 1);
    let bad_lines = [
        "this is not JSON".to_owned(),
        "{}".to_owned(),
        r#"{"governor_id":"g"}"#.to_owned(),
        line("a", 1, 1).replace("\"actor\"", "\"author\""),
        line("a", 1, 1).replace("\"me\"", "\"me\",\"extra\":1"),
        line("a", 1, 1).replace("2026-01-01T00:00:01Z", "yesterday"),
        line("a", 1, 1).replace("\"data\":1", "\"data\":1,\"data\":2"),
        line("a", 1, 1).replace("\"data\":1", "\"data\":1e999"),
        line("a", 1, 1).replace("\"data\":1", "\"data\":123456789012345678901234567890"),
        line("", 1, 1),
        long_id,
        line("a", 1, "x".repeat(1_000_000)),
        line("a", 1, 1).replace("\"step\"", "\"\""),
        line("a", 1, 1).replace("\"data\":1", "\"data\":1,\"deleted\":true"),
        format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000)),
        "x".repeat(9 << 20),
    ];
    for bad in bad_lines {
        let short: String = bad.chars().take(60).collect();
        let input = format!("{}\n{}\n{bad}\n{}\n", good(1), good(2), good(3));
        let store = engine.place();
        let ran = store.feed(&["-o", "json", "import", "-"], input.as_bytes());
        assert_eq!(ran.exit, 5, "{short}: {ran:?}");
        let error = ran.error();
        assert_eq!((&error["line"], &error["applied"]), (&json!(3), &json!(2)), "{short}: {error}");
        assert!(error["message"].as_str().unwrap().contains("line 3"), "{error}");
        assert_eq!(store.json(&["stats"]).ok().json()["total_events"], 2, "{short}");

        // Strict: nothing at all, and no store.
        let store = engine.place();
        for (file, stdin) in
            [("-".to_owned(), input.as_bytes()), (store.write("in", input.as_bytes()), &b""[..])]
        {
            let ran = store.feed(&["-o", "json", "import", "--strict", &file], stdin);
            assert_eq!((ran.exit, &ran.error()["line"]), (5, &json!(3)), "{short}: {ran:?}");
            assert!(!store.exists(), "{short}: a store was made");
        }
    }
    let store = engine.place();
    let binary = store.feed(&["-o", "json", "import", "-"], b"\xff\xfe\x00\n");
    assert_eq!((binary.exit, &binary.error()["line"]), (5, &json!(1)));
    let fine = format!("{}\n\n{}", good(1), good(2));
    let ran = store.feed(&["-o", "json", "import", "--strict", "-"], fine.as_bytes()).ok();
    assert_eq!(ran.json()["applied"], 2);
}

fn damaged_gzip_is_named_and_lines_before_it_stay(engine: Engine) {
    let mut random = Random::announced("gzip");
    let many = engine.about(4_000);
    let lines: String =
        (0..many as u32).map(|n| line(&format!("s{}", n % 50), n % 60, n * 7_919) + "\n").collect();
    let packed = gzip(lines.as_bytes());
    let whole = engine.place();
    whole.feed(&["import", "-"], &packed).ok();
    let full = whole.verified();
    assert_eq!(full["events"], many);
    for round in 0..12 {
        let mut damaged = packed.clone();
        if round % 2 == 0 {
            damaged.truncate(20 + random.below(packed.len() as u64 - 21) as usize);
        } else {
            let at = 12 + random.below(packed.len() as u64 - 12) as usize;
            damaged[at] ^= 1 << random.below(8);
        }
        let store = engine.place();
        let ran = store.feed(&["-o", "json", "import", "-"], &damaged);
        assert_eq!(ran.exit, 5, "round {round}: {ran:?}");
        let error = ran.error();
        assert!(error["line"].as_u64().is_some(), "round {round}: {error}");
        let applied = error["applied"].as_u64().unwrap();
        assert_eq!(store.verified()["events"].as_u64().unwrap(), applied);
        // The whole input afterwards completes it.
        if applied > 0 && round % 2 == 0 {
            store.feed(&["import", "-"], &packed).ok();
            assert_eq!(store.verified()["content_hash"], full["content_hash"]);
        }
    }
    // Two members in one file are one log.
    let (a, b) = lines.split_at(lines.find("\n").unwrap() + 1);
    let two = [gzip(a.as_bytes()), gzip(b.as_bytes())].concat();
    let store = engine.place();
    store.feed(&["import", "-"], &two).ok();
    assert_eq!(store.verified()["content_hash"], full["content_hash"]);
}

/// Two imports of the same log at the same time: every line once.
fn racing_imports_double_nothing(engine: Engine) {
    let store = engine.store();
    let lines: String =
        (0..1_500).map(|n| line(&format!("s{}", n % 20), n / 30, n) + "\n").collect();
    let file = store.write("log.jsonl", lines.as_bytes());
    let applied: u64 = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    store.json(&["import", &file]).ok().json()["applied"].as_u64().unwrap()
                })
            })
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).sum()
    });
    // A line that two of them wrote at the same moment is one event, and both may say that it is there.
    assert!(applied >= 1_500);
    assert_eq!(store.verified()["events"], 1_500);
    let alone = engine.place();
    alone.run(&["import", &file]).ok();
    assert_eq!(alone.verified()["content_hash"], store.verified()["content_hash"]);
}

/// The beginning of the real log: as many of its lines as the emulator takes in a few seconds.
fn beginning_of_the_real_log() -> Option<String> {
    let mut plain = String::new();
    GzDecoder::new(std::fs::File::open(incidents()?).unwrap()).read_to_string(&mut plain).unwrap();
    Some(plain.split_inclusive('\n').take(5_000).collect())
}

/// One log, two engines: the same bytes out, and the same hash.
#[test]
fn a_file_and_the_emulator_hold_the_same() {
    let (Some(log), Some(emulator)) = (beginning_of_the_real_log(), Engine::emulator()) else {
        return;
    };
    let [in_file, on_emulator] = [Engine::File, emulator].map(|engine| {
        let store = engine.place();
        let summary = store.feed(&["-o", "json", "import", "-"], log.as_bytes()).ok().json();
        assert_eq!(summary["applied"], 5_000, "{engine:?}");
        let (report, stats) = (store.verified(), store.json(&["stats"]).ok().json());
        assert_eq!(report["events"], 5_000, "{engine:?}");
        let exported = store.run(&["export"]).ok().out;
        assert_eq!(exported.lines().count(), 5_000, "{engine:?}");
        (report, stats, exported)
    });
    assert_eq!(in_file.0, on_emulator.0);
    assert_eq!(in_file.1, on_emulator.1);
    assert!(in_file.2 == on_emulator.2, "the exports differ");
    // And the emulator's own export goes into a file.
    let copy = Store::new();
    copy.feed(&["import", "-"], on_emulator.2.as_bytes()).ok();
    assert_eq!(copy.verified()["content_hash"], in_file.0["content_hash"]);
}

/// Killed again and again, it ends with the same store as an import that was left alone.
#[test]
fn a_killed_import_goes_on_at_the_emulator() {
    let (Some(log), Some(emulator)) = (beginning_of_the_real_log(), Engine::emulator()) else {
        return;
    };
    let mut random = Random::announced("killed import");
    let store = emulator.place();
    let file = store.write("log.jsonl", log.as_bytes());
    let mut acknowledged = 0;
    for most in [1, 1_000, 2_000] {
        let acks = store.killed_after(&["import", "--acks", &file], 1 + random.below(most));
        acknowledged += acks.len() as u64;
        let events = store.verified()["events"].as_u64().unwrap();
        assert!(events >= acknowledged, "{acknowledged} acknowledged, {events} there");
        assert!(events < 5_000, "it was done before it was killed: the test shows nothing");
        for ack in acks.iter().rev().take(3) {
            let address = format!("incidents/{}", ack["state_id"].as_str().unwrap());
            store.run(&["get", &address, "--at", &format!("v{}", ack["version"])]).ok();
        }
    }
    let summary = store.json(&["import", &file]).ok().json();
    assert_eq!(summary["lines"], 5_000);
    assert!(summary["already_there"].as_u64().unwrap() >= acknowledged);
    let alone = Store::new();
    alone.run(&["import", &file]).ok();
    assert_eq!(store.verified()["content_hash"], alone.verified()["content_hash"]);
}
