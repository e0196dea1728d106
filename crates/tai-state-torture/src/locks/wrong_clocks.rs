//! Clients whose wall clocks are an hour late or early, or jump, change nothing, nor does a service whose
//! clock is wrong: no lock is taken from who holds it, and none is kept for longer than its lease.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tai_state::testing::emulator::{Emulator, Place};
use tokio::runtime::Handle;

use super::tree::{PATIENCE, Tree};
use super::{fence, show};
use crate::engine::{Engine, Store};
use crate::run::Tally;
use crate::tool::{self, Ran};

/// The process that runs under the lock says who its parent is.
const HOLD: &str = r#"echo "$TAI_LOCK_TOKEN $PPID"; read -r _; exit 0"#;
const LEASE: Duration = Duration::from_secs(4);
/// The next grant comes so long after the end of a lease at most: a look by turns, and a second.
const LATE: Duration = Duration::from_millis(250 + 1_000);
/// Three of them with every change, all before a release.
pub(crate) const CLOCKS: [&str; 5] = ["-1h", "+0", "+1h", "-90s", "+90s"];

pub(crate) const JUMPED: &str = "jumps of ten or twenty minutes";
pub(crate) const SEEN: &str = "of them seen in the times of a log";

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

/// A program whose time of day is what a file says, from the moment on at which it says so.
fn jumping(clock: &Path, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = elsewhen("+0", program);
    command.env_remove("FAKETIME");
    command.env("FAKETIME_TIMESTAMP_FILE", clock).env("FAKETIME_NO_CACHE", "1");
    command
}

/// Whole, so that nobody reads half of it.
fn set(clock: &Path, to: &str) {
    let new = clock.with_extension("new");
    std::fs::write(&new, to).unwrap();
    std::fs::rename(new, clock).unwrap();
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
    asks(elsewhen(clock, tool::path()), clock, store, wait)
}

fn asks(mut binary: Command, client: &str, store: &Store, wait: &str) -> Tree {
    let (ttl, client) = (format!("{}ms", LEASE.as_millis()), format!("--client={client}"));
    binary.args(["-o", "json", "-u", &store.url, "locks", "run", "r", "--ttl", &ttl]);
    binary.args(["--wait", wait, &client, "--", "bash", "-c", HOLD]);
    Tree::start(binary)
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
pub(crate) fn wrong(
    engines: &[Engine],
    clocks: &'static [&'static str],
    runtime: &Handle,
    is_long: bool,
) -> Tally {
    let mut tally = Tally::default();
    if !can_be_faked() {
        tally.skip(
            "locks of clients with wrong clocks: faketime is not there (apt-get install faketime)",
        );
        return tally;
    }
    tidy();
    std::thread::scope(|scope| {
        let mut parts = Vec::new();
        for engine in engines {
            parts.push(scope.spawn(|| holders(*engine, clocks)));
            parts.push(scope.spawn(|| while_clocks_jump(*engine)));
        }
        if is_long && engines.iter().any(|engine| matches!(engine, Engine::Emulator(_))) {
            parts.push(scope.spawn(|| service_ahead(runtime)));
        }
        parts.into_iter().for_each(|part| tally.add(part.join().unwrap()));
    });
    tidy();
    tally
}

/// Its holder is killed, and the next one has it when the lease has ended: not before what was left of it when
/// it was looked at last, and not late.
fn inherited(
    what: &str,
    store: &Store,
    killed: impl FnOnce(),
    next: &Tree,
    tally: &mut Tally,
) -> (u64, Pid) {
    let looked = Instant::now();
    let left = Duration::from_millis(show(store, "r")["left_ms"].as_u64().unwrap());
    killed();
    let from = Instant::now();
    let granted = granted(next);
    let (since, after) = (looked.elapsed(), from.elapsed());
    println!("  {what}: {left:?} were left, granted after {since:?}, {after:?} after the kill");
    tally.highest("ms the longest from such a kill to the next grant", after.as_millis() as u64);
    tally.count("leases that ended before the next grant", u64::from(since >= left));
    tally.holds(since >= left, || format!("{what}: granted after {since:?}, {left:?} were left"));
    tally.holds(after <= LEASE + LATE, || format!("{what}: granted {after:?} after the kill"));
    granted
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
        let what = format!("{}: {clock} was killed and {next_clock} waits", engine.name());
        let killed = || kill_process(renews, Signal::KILL).unwrap();
        let (next_token, next_renews) = inherited(&what, &store, killed, &next, &mut tally);
        tally.count("holders with a wrong clock killed", 1);
        assert_eq!(next_token, token + 1);
        // What it ran is still there.
        std::mem::replace(&mut holder, next).ended();
        (token, renews) = (next_token, next_renews);
    }
    assert_eq!(holder.ended().exit, Some(0));
    store.verified();
    tally
}

/// The clocks of the holder and of who waits jump by ten minutes, each the other way, for three leases and
/// when the holder is killed.
fn while_clocks_jump(engine: Engine) -> Tally {
    const JUMPS: u32 = 6;
    let mut tally = Tally::default();
    let store = engine.store();
    let (mine, theirs) = (store.path("mine"), store.path("theirs"));
    let jump = |n: u32| {
        let both = if n.is_multiple_of(2) { ["+600", "-600"] } else { ["-600", "+600"] };
        set(&mine, both[0]);
        set(&theirs, both[1]);
    };
    set(&mine, "+0");
    set(&theirs, "+0");
    let holder = asks(jumping(&mine, tool::path()), "mine", &store, "0s");
    let (token, renews) = granted(&holder);
    let next = asks(jumping(&theirs, tool::path()), "theirs", &store, "1m");
    let mut writer = store.command(&["-o", "json", "txn"]);
    // With a clock that jumps too: what it writes says so.
    writer.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    for (name, value) in jumping(&mine, "true").get_envs() {
        if let Some(value) = value {
            writer.env(name, value);
        }
    }
    let mut writer = Tree::start(writer);
    let mut writes = |n: u32| {
        let line = json!({"ops": [{"op": "put", "state": "g/jumps", "data": n}]});
        let input = writer.input.as_mut().unwrap();
        std::io::Write::write_all(input, format!("{line}\n").as_bytes()).unwrap();
        assert!(writer.next().is_some_and(|answer| answer.contains("\"ok\":true")));
    };
    writes(JUMPS);
    for n in 0..JUMPS {
        jump(n);
        // Half of a lease goes by: that is the point of it.
        std::thread::sleep(LEASE / 2);
        writes(n);
        let shown = show(&store, "r");
        tally.holds(shown["status"] == "held" && shown["fencing_token"] == token, || {
            format!("{}: after jump {n}: {shown}", engine.name())
        });
        let put = ["put", "g/s", "--data", "1", "--fence", &fence("r", token)];
        let put = store.json(&put);
        tally.holds(put.exit == 0, || format!("{}: after jump {n}: {put:?}", engine.name()));
        tally.count(JUMPED, 1);
    }
    assert_eq!(writer.ended().exit, Some(0));
    // The clock of a process that runs did jump, or nothing was shown.
    let history = store.run(&["-o", "jsonl", "history", "g/jumps"]).ok().lines();
    let time = |event: &serde_json::Value| {
        chrono::DateTime::parse_from_rfc3339(event["timestamp"].as_str().unwrap()).unwrap()
    };
    let steps = history.windows(2).map(|pair| (time(&pair[1]) - time(&pair[0])).num_minutes());
    // Times never fall in a log, so of jumps to and fro it shows those that reach farther than any before.
    tally.count(SEEN, steps.filter(|minutes| *minutes >= 9).count() as u64);
    let what = format!("{}: killed while clocks jump", engine.name());
    let killed = || {
        kill_process(renews, Signal::KILL).unwrap();
        jump(JUMPS);
    };
    let (next_token, _) = inherited(&what, &store, killed, &next, &mut tally);
    assert_eq!(next_token, token + 1);
    holder.ended();
    assert_eq!(next.ended().exit, Some(0));
    store.verified();
    tally
}

/// An emulator whose clock is ten minutes ahead of everybody's.
fn service_ahead(runtime: &Handle) -> Tally {
    let mut tally = Tally::default();
    let Some(jar) = Emulator::find_jar() else {
        tally.skip("a service whose clock is wrong: there is no emulator that can be started");
        return tally;
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    let port = free.unwrap().port();
    let mut java = elsewhen("+600", "java");
    java.arg("-Duser.language=en").args(["-Xmx1g", "-cp"]).arg(jar);
    java.arg("com.google.cloud.datastore.emulator.firestore.CloudFirestore");
    java.args(["start", "--host=127.0.0.1", &format!("--port={port}")]);
    let _service = Tree::start(java);
    let address: &'static str = format!("127.0.0.1:{port}").leak();
    let started = Instant::now();
    // Its start is slow behind such a clock.
    while let Err(error) = runtime.block_on(Emulator::start(Place::Running(address.to_owned()))) {
        assert!(started.elapsed() < 3 * PATIENCE, "the emulator does not start: {error}");
    }
    tally.count("services ten minutes ahead", 1);
    tally.add(holders(Engine::Emulator(address), &["+0", "-1h"]));
    tally
}
