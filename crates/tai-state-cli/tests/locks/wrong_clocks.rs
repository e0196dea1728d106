//! Clients whose wall clocks are an hour late or early change nothing: no lock is taken from who holds
//! it, and none is kept for longer than its lease.

use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::common::{BINARY, Engine, Ran, Store, program, run, skipped};
use crate::tree::Tree;
use crate::{fence, name, on_both_at_once, show};

/// The process that runs under the lock says who its parent is.
const HOLD: &str = r#"echo "$TAI_LOCK_TOKEN $PPID"; read -r _; exit 0"#;
const LEASE: Duration = Duration::from_secs(4);
/// It is renewed at a third of the lease, unless a busy machine is late.
const LEFT_AT_LEAST: Duration = Duration::from_millis(2_000);
const CLOCKS: [&str; 3] = ["-1h", "+0", "+1h"];

/// The binary with another time of day.
fn at(clock: &str, store: &Store, args: &[&str]) -> Command {
    let mut command = program("faketime");
    // Of the clocks only the one on the wall.
    command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    command.args(["-f", clock, BINARY, "-o", "json", "-u", &store.url]).args(args);
    command
}

fn asked(clock: &str, store: &Store, args: &[&str]) -> Ran {
    run(at(clock, store, args), b"")
}

/// One who wants the lock, and waits for so long.
fn wants(clock: &str, store: &Store, wait: &str) -> Tree {
    let (ttl, client) = (format!("{}ms", LEASE.as_millis()), format!("--client={clock}"));
    let args = ["locks", "run", "r", "--ttl", &ttl, "--wait", wait, &client];
    Tree::start(at(clock, store, &[&args[..], &["--", "bash", "-c", HOLD]].concat()))
}

/// Its token, and the process that renews it, once it has the lock.
fn granted(tree: &Tree) -> (u64, Pid) {
    let line = tree.next().unwrap();
    let (token, pid) = line.split_once(' ').unwrap_or_else(|| panic!("{line}"));
    let token = token.parse().unwrap_or_else(|_| panic!("{line}"));
    (token, Pid::from_raw(pid.parse().unwrap()).unwrap())
}

/// Whether `faketime` is there and does what it is for.
fn can_be_faked() -> bool {
    let year = |command: &mut Command| {
        let out = command.output().ok()?.stdout;
        String::from_utf8(out).ok()?.trim().parse::<u64>().ok()
    };
    let is = year(program("date").arg("+%s"));
    let is_said = year(program("faketime").args(["-f", "+1h", "date", "+%s"]));
    let works = is.zip(is_said).is_some_and(|(is, said)| said >= is + 3_000);
    if !works {
        skipped(
            "locks of clients with wrong clocks: faketime is not there (apt-get install faketime)",
        );
    }
    works
}

#[test]
fn they_take_nothing_and_keep_nothing() {
    if can_be_faked() {
        on_both_at_once(three_holders);
    }
}

fn three_holders(engine: Engine) {
    let store = engine.store();
    let mut holder = wants(CLOCKS[0], &store, "0s");
    let (mut token, mut renews) = granted(&holder);
    assert_eq!(token, 1);
    for (clock, next_clock) in CLOCKS.into_iter().zip(CLOCKS.into_iter().cycle().skip(1)) {
        // Its wall clock is another one, as far as people are told.
        let shown = show(&store, "r");
        assert_eq!((&shown["status"], &shown["client_id"]), (&json!("held"), &json!(clock)));
        let acquired = chrono::DateTime::parse_from_rfc3339(shown["acquired_at"].as_str().unwrap());
        let hours = (acquired.unwrap().to_utc() - chrono::Utc::now()).num_minutes() as f64 / 60.0;
        let is = clock.trim_end_matches('h').parse::<f64>().unwrap();
        assert!((hours - is).abs() < 0.5, "{clock}: {hours}");
        // Whoever waits for longer than the lease does not get it, whatever his clock says.
        let others = CLOCKS.into_iter().filter(|other| *other != clock);
        let others: Vec<Tree> = others.map(|other| wants(other, &store, "5s")).collect();
        for other in CLOCKS {
            let shown = asked(other, &store, &["locks", "show", "r"]).ok().json();
            assert_eq!(
                (&shown["status"], &shown["fencing_token"]),
                (&json!("held"), &json!(token))
            );
            let left = shown["left_ms"].as_u64().unwrap();
            assert!(u128::from(left) <= 2 * LEASE.as_millis(), "{left} ms are left");
            let freed = asked(other, &store, &["locks", "cleanup"]).ok().json();
            assert_eq!(freed, json!({"freed": 0}), "{other} thinks that it has ended");
            let put = ["put", "g/s", "--data", "1", "--fence", &fence("r", token)];
            asked(other, &store, &put).ok();
            for wrong in [token - 1, token + 1].into_iter().filter(|wrong| *wrong > 0) {
                let put = ["put", "g/s", "--data", "2", "--fence", &fence("r", wrong)];
                let refused = asked(other, &store, &put);
                assert_eq!((refused.exit, &refused.error()["code"]), (4, &json!("lock_lost")));
            }
        }
        for other in others {
            let ended = other.ended();
            assert_eq!(
                (ended.exit, &ended.error()["held_by"]),
                (Some(4), &json!(clock)),
                "{ended:?}"
            );
        }
        // It is killed while the next one waits, who has the lock when its lease has ended.
        let next = wants(next_clock, &store, "1m");
        kill_process(renews, Signal::KILL).unwrap();
        let from = Instant::now();
        let (next_token, next_renews) = granted(&next);
        let after = from.elapsed();
        println!("{}: {clock} was killed, {after:?} later {next_clock} had the lock", name(engine));
        assert_eq!(next_token, token + 1);
        assert!((LEFT_AT_LEAST..LEASE + Duration::from_secs(5)).contains(&after), "{after:?}");
        // What it ran is still there; and `faketime` tidies up when it is left the time.
        std::mem::replace(&mut holder, next).ended();
        (token, renews) = (next_token, next_renews);
    }
    assert_eq!(holder.ended().exit, Some(0));
    store.verified();
}
