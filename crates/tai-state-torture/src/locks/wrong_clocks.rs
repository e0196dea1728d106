//! Clients whose wall clocks are an hour late or early change nothing: no lock is taken from who holds
//! it, and none is kept for longer than its lease.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::tree::Tree;
use super::{fence, show};
use crate::engine::{Engine, Store};
use crate::run::Tally;
use crate::tool::{self, Ran};

/// The process that runs under the lock says who its parent is.
const HOLD: &str = r#"echo "$TAI_LOCK_TOKEN $PPID"; read -r _; exit 0"#;
const LEASE: Duration = Duration::from_secs(4);
/// It is renewed at a third of the lease, unless a busy machine is late.
const LEFT_AT_LEAST: Duration = Duration::from_millis(2_000);
/// Three of them with every change, all before a release.
pub(crate) const CLOCKS: [&str; 5] = ["-1h", "+0", "+1h", "-90s", "+90s"];

/// The library that stands before the clock. Its wrapper `faketime` is not used: it fails when a killed
/// one with the same process id has left something behind.
fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|path| path.exists())
}

/// A program with another time of day.
fn elsewhen(clock: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    tool::apart(&mut command);
    if let Some(library) = library() {
        command.env("LD_PRELOAD", library).env("FAKETIME", clock);
    }
    // Of the clocks only the one on the wall.
    command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    command
}

/// The binary with another time of day.
fn at(clock: &str, store: &Store, args: &[&str]) -> Command {
    let mut command = elsewhen(clock, tool::path());
    command.args(["-o", "json", "-u", &store.url]).args(args);
    command
}

/// Removes what killed processes have left of the library.
fn tidy() {
    for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| {
            let rest = name.strip_prefix("sem.faketime_sem_");
            rest.or_else(|| name.strip_prefix("faketime_shm_"))?.parse::<u32>().ok()
        });
        let is_left = number.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if is_left {
            // Another may tidy too.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn asked(clock: &str, store: &Store, args: &[&str]) -> Ran {
    tool::ran(at(clock, store, args), b"")
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
    let is = year(Command::new("date").arg("+%s"));
    let is_said = year(elsewhen("+1h", "date").arg("+%s"));
    is.zip(is_said).is_some_and(|(is, said)| said >= is + 3_000)
}

/// On each engine at the same time, one holder after the other with each of these clocks.
pub(crate) fn wrong(engines: &[Engine], clocks: &'static [&'static str]) -> Tally {
    let mut tally = Tally::default();
    if !can_be_faked() {
        tally.skip(
            "locks of clients with wrong clocks: faketime is not there (apt-get install faketime)",
        );
        return tally;
    }
    tidy();
    std::thread::scope(|scope| {
        let parts = engines.iter().map(|engine| scope.spawn(|| holders(*engine, clocks)));
        let parts: Vec<_> = parts.collect();
        parts.into_iter().for_each(|part| tally.add(part.join().unwrap()));
    });
    tidy();
    tally
}

fn holders(engine: Engine, clocks: &'static [&'static str]) -> Tally {
    let mut tally = Tally::default();
    let store = engine.store();
    let mut holder = wants(clocks[0], &store, "0s");
    let (mut token, mut renews) = granted(&holder);
    assert_eq!(token, 1);
    for (clock, next_clock) in clocks.iter().zip(clocks.iter().cycle().skip(1)) {
        let (clock, next_clock) = (*clock, *next_clock);
        // Its wall clock is another one, as far as people are told.
        let shown = show(&store, "r");
        assert_eq!((&shown["status"], &shown["client_id"]), (&json!("held"), &json!(clock)));
        let acquired = chrono::DateTime::parse_from_rfc3339(shown["acquired_at"].as_str().unwrap());
        let hours =
            (acquired.unwrap().to_utc() - chrono::Utc::now()).num_seconds() as f64 / 3_600.0;
        let is = match clock.strip_suffix('h') {
            Some(hours) => hours.parse::<f64>().unwrap(),
            None => clock.trim_end_matches('s').parse::<f64>().unwrap() / 3_600.0,
        };
        assert!((hours - is).abs() < 0.02, "{clock}: {hours}");
        // Whoever waits for longer than the lease does not get it, whatever his clock says.
        let others = clocks.iter().copied().filter(|other| *other != clock);
        let others: Vec<Tree> = others.map(|other| wants(other, &store, "5s")).collect();
        for other in clocks {
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
        println!(
            "  {}: {clock} was killed, {after:?} later {next_clock} had the lock",
            engine.name()
        );
        tally.count("holders with a wrong clock killed", 1);
        tally
            .highest("ms the longest from such a kill to the next grant", after.as_millis() as u64);
        assert_eq!(next_token, token + 1);
        assert!((LEFT_AT_LEAST..LEASE + Duration::from_secs(5)).contains(&after), "{after:?}");
        // What it ran is still there.
        std::mem::replace(&mut holder, next).ended();
        (token, renews) = (next_token, next_renews);
    }
    assert_eq!(holder.ended().exit, Some(0));
    store.verified();
    tally
}
