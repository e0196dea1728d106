//! Which service a Firestore URL leads to, and what is said when there is none.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)]

mod common;

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Engine, Ran, run, tool};
use tai_state::testing::emulator::fresh_project;

fn on(url: &str, args: &[&str]) -> Command {
    let mut command = tool();
    command.args(["-u", url]).args(args);
    command
}

fn json(url: &str, args: &[&str]) -> Ran {
    run(on(url, &[&["-o", "json"], args].concat()), b"")
}

/// Runs it with the emulator named by the environment alone.
fn led(address: &str, url: &str, args: &[&str]) -> Ran {
    let mut command = on(url, args);
    command.env("FIRESTORE_EMULATOR_HOST", address);
    run(command, b"")
}

#[test]
fn the_environment_leads_to_an_emulator_and_a_note_says_so() {
    let Some(Engine::Emulator(address)) = Engine::emulator() else { return };
    let project = fresh_project();
    let url = format!("firestore://{project}");
    let there = format!("firestore+emulator://{address}/{project}");
    led(address, &url, &["init"]).ok();
    let put = led(address, &url, &["put", "g/s", "--data", "1"]).ok();
    assert_eq!(put.err.lines().count(), 1, "{put:?}");
    assert!(put.err.starts_with("note: ") && put.err.contains(address), "{put:?}");
    // For programs the standard error is errors; where it is stands in what `init` answers.
    let got = led(address, &url, &["-o", "json", "get", "g/s"]).ok();
    assert_eq!((got.json()["data"].as_u64(), got.err.as_str()), (Some(1), ""));
    let missing = led(address, &url, &["-o", "jsonl", "get", "g/none"]);
    assert_eq!((missing.exit, missing.error()["code"].as_str()), (3, Some("state_not_found")));
    let other = format!("firestore://{}", fresh_project());
    let made = led(address, &other, &["-o", "json", "init"]).ok().json();
    assert!(made["location"].as_str().unwrap().starts_with("firestore+emulator://"), "{made}");
    // Who names the emulator knows it; and the store is the same one.
    let got = run(on(&there, &["get", "g/s", "--raw"]), b"").ok();
    assert_eq!((got.out.as_str(), got.err.as_str()), ("1\n", ""));
    // The demo says it once, though it opens the store three times in two processes.
    let new = format!("firestore://{}", fresh_project());
    let demo = led(address, &new, &["demo", "--kill-after", "50"]).ok();
    assert_eq!(demo.err.lines().count(), 1, "{demo:?}");
}

#[test]
fn databases_and_prefixes_are_stores_of_their_own() {
    let Some(Engine::Emulator(address)) = Engine::emulator() else { return };
    let project = format!("firestore+emulator://{address}/{}", fresh_project());
    let urls = ["", "?prefix=a_", "/other", "/other?prefix=a_"].map(|end| project.clone() + end);
    for (n, url) in urls.iter().enumerate() {
        assert_eq!(json(url, &["stats"]).exit, 3, "{url}");
        run(on(url, &["init"]), b"").ok();
        run(on(url, &["put", "g/s", "--data", &n.to_string()]), b"").ok();
    }
    for (n, url) in urls.iter().enumerate() {
        assert_eq!(json(url, &["get", "g/s", "--raw"]).ok().json(), n);
        assert_eq!(json(url, &["verify"]).ok().json()["events"], 1);
    }
}

/// A project is looked for at Google only with credentials, and one for emulators never.
#[test]
fn without_emulator_and_credentials_three_ways_out_are_named() {
    // Takes connections and never answers, as where packets to the metadata server are lost.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    for (project, metadata, args) in [
        ("demo-x", "127.0.0.1:1", ["init"]),
        ("some-project", "127.0.0.1:1", ["init"]),
        ("some-project", "127.0.0.1:1", ["stats"]),
        ("some-project", &silent, ["stats"]),
    ] {
        let mut command = on(&format!("firestore://{project}"), &["-o", "json"]);
        command.args(args).env("GCE_METADATA_HOST", metadata);
        // Set and empty is not set.
        command.env("FIRESTORE_EMULATOR_HOST", "");
        let started = Instant::now();
        let ran = run(command, b"");
        let took = started.elapsed();
        let error = ran.error();
        assert_eq!((ran.exit, error["code"].as_str()), (7, Some("permission_denied")));
        let message = error["message"].as_str().unwrap();
        for way in ["FIRESTORE_EMULATOR_HOST=", "gcloud auth application-default login", "a file"] {
            assert!(message.contains(way), "{way} is missing in {message}");
        }
        // Who waits longer believes that it hangs. The library gives up after 4.
        assert!(took < Duration::from_secs(5), "{project} {metadata}: {took:?}");
    }
    let refused = json("firestore://some-project", &["demo"]);
    assert_eq!((refused.exit, refused.error()["code"].as_str()), (5, Some("rejected")));
}

#[test]
fn nobody_listens() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("firestore+emulator://127.0.0.1:{port}/demo-x");
    for args in [&["stats"][..], &["init"], &["get", "g/s"], &["import", "-"], &["demo"]] {
        let ran = json(&url, args);
        let error = ran.error();
        assert_eq!((ran.exit, &error["retryable"]), (6, &true.into()), "{args:?}: {error}");
        assert!(error["message"].as_str().unwrap().contains(&port.to_string()), "{error}");
        assert!(ran.out.is_empty(), "{ran:?}");
    }
}

/// Before anything is sent: nobody listens there, and that is not what is said.
#[test]
fn names_that_cannot_be_are_refused() {
    for end in [
        "",
        "/",
        "/a b",
        "/a%20b",
        "/demo-x/",
        "/demo-x/d/e",
        "/demo-x/a b",
        "/demo-x?prefix=",
        "/demo-x?prefix=a/b",
        "/demo-x?prefix=a&b",
        "/demo-x?other=a",
        "/\u{e9}",
        "/../demo-x",
        "/demo-x/..",
    ] {
        for start in ["firestore+emulator://127.0.0.1:1", "firestore:/"] {
            let ran = json(&format!("{start}{end}"), &["stats"]);
            assert_eq!(
                (ran.exit, ran.error()["code"].as_str()),
                (5, Some("invalid_state")),
                "{start}{end}"
            );
        }
    }
    let long = "x".repeat(65);
    for url in [
        format!("firestore+emulator://127.0.0.1:1/demo-x?prefix={long}"),
        "firestore+emulator://127.0.0.1/demo-x".into(),
        "firestore+emulator://127.0.0.1:70000/demo-x".into(),
    ] {
        assert_eq!(json(&url, &["init"]).exit, 5, "{url}");
    }
    let bad_host = led("nonsense", "firestore://demo-x", &["-o", "json", "stats"]);
    assert_eq!(bad_host.exit, 5, "{bad_host:?}");
}

/// What goes to an emulator is not encrypted.
#[test]
fn an_emulator_elsewhere_needs_to_be_allowed() {
    let Some(Engine::Emulator(address)) = Engine::emulator() else { return };
    let port = address.rsplit_once(':').unwrap().1;
    let project = fresh_project();
    // "This machine, by any of its addresses" is not on the list of what is surely here.
    let url = format!("firestore+emulator://0.0.0.0:{port}/{project}");
    for url in [&url, "firestore+emulator://192.0.2.1:1/demo-x"] {
        let refused = json(url, &["init"]);
        assert_eq!((refused.exit, refused.error()["code"].as_str()), (5, Some("invalid_state")));
    }
    let by_environment = led("192.0.2.1:1", "firestore://demo-x", &["-o", "json", "init"]);
    assert_eq!(by_environment.exit, 5, "{by_environment:?}");
    if cfg!(target_os = "linux") {
        json(&url, &["--allow-remote-emulator", "demo", "--kill-after", "50"]).ok();
        let here = format!("firestore+emulator://{address}/{project}");
        assert!(json(&here, &["stats"]).ok().json()["total_events"].as_u64().unwrap() >= 50);
    }
}
