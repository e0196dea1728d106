//! The n-th write, sync, truncation, opening or removal fails, for every n until a run is clean: nobody
//! is told "done" after a failed sync, and nothing that anybody was told is lost.
//!
//! The real binary runs transactions, one a line, on one handle, under strace's fault injector; it goes on
//! with the next line after an error, so what the handle says then is seen too. strace counts calls by
//! thread: the n-th of each thread fails.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::found::{self, Found};
use crate::run::{Run, Tally};
use crate::strace::{self, Call};
use crate::tool;

const STORE: &str = "store.tai";
const WORKERS: usize = 3;
/// The calls that give a file a name.
const NAMING: &str = "rename,renameat,renameat2,link,linkat";
/// A made-up acknowledgement instead of the error.
const SWALLOWED: &str = "an error that is swallowed and answered with \"done\"";

/// What is made to fail, by which calls. Opening and reading are also done by whatever starts a program,
/// so those fail only on the store's files.
const KINDS: [(&str, &str, bool); 7] = [
    ("writes", "pwrite64", false),
    ("syncs", "fsync,fdatasync", false),
    ("truncations", "ftruncate", false),
    ("removals", "unlink,unlinkat", false),
    ("names", NAMING, false),
    ("openings", "openat", true),
    ("readings", "pread64", true),
];

/// What the binary is started on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// Nothing: it makes the store.
    Nothing,
    /// A store that was closed.
    Closed,
    /// A store with a log that a kill has left, which is folded in when it is opened.
    Killed,
}

/// One run with a fault.
#[derive(Debug, Clone)]
struct Case {
    start: Start,
    kind: usize,
    nth: usize,
    error: &'static str,
    /// From then on all of them fail, not only that one.
    for_good: bool,
}

/// What a run gave.
struct Outcome {
    exit: i32,
    err: String,
    lines: Vec<Value>,
    /// Empty where only the store's files were traced.
    calls: Vec<Call>,
    injected: usize,
}

/// What all runs start from.
struct Base {
    folder: tempfile::TempDir,
    commits: u64,
}

pub(crate) fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    if !strace::is_there() {
        tally.skip("eio needs strace, and to be allowed to trace: apt-get install strace");
        return tally;
    }
    let commits = run.size(10, 120);
    let base = Base::made(commits);
    let mut cases = Vec::new();
    for start in [Start::Nothing, Start::Closed, Start::Killed] {
        for kind in 0..KINDS.len() {
            all_of(&base, start, kind, commits > 20, &mut cases, &mut tally);
        }
    }
    let chosen: Vec<(u64, Case)> = {
        let all = cases.len() as u64;
        run.rounds(all).map(|(n, _)| (n, cases[n as usize].clone())).collect()
    };
    let next = AtomicUsize::new(0);
    let tallies = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut tally = Tally::default();
                while let Some((n, case)) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    one(&base, *n, case, &mut tally);
                }
                tallies.lock().unwrap().push(tally);
            });
        }
    });
    for part in tallies.into_inner().unwrap() {
        tally.add(part);
    }
    tally.at_least("runs in which a call failed", cases.len() as u64 * 3 / 4);
    tally.at_least("failed syncs", 10);
    tally.at_least("answers that say to open the store again", 10);
    tally.at_least("runs that went on after the error", 5);
    tally
}

/// Every n of one kind of call, until a run is clean.
fn all_of(
    base: &Base,
    start: Start,
    kind: usize,
    is_long: bool,
    cases: &mut Vec<Case>,
    tally: &mut Tally,
) {
    let never = Case { start, kind, nth: 60_000, error: "EIO", for_good: false };
    let place = Place::new(base, start);
    let outcome = attempt(base, &never, &place);
    tally.holds(outcome.exit == 0, || format!("without a fault: {}", outcome.err));
    let mut by_thread: HashMap<&str, usize> = HashMap::new();
    for call in outcome.calls.iter().filter(|call| KINDS[kind].1.split(',').any(|n| n == call.name))
    {
        *by_thread.entry(&call.thread).or_default() += 1;
    }
    let most = by_thread.into_values().max().unwrap_or(0);
    tally.count(&format!("{} in a thread at most", KINDS[kind].0), 0);
    tally.highest(&format!("{} in a thread at most", KINDS[kind].0), most as u64);
    // One more than there are: that run is clean.
    for nth in 1..=most + usize::from(most > 0) {
        for (error, for_good) in ways(start, kind, nth, most, is_long) {
            cases.push(Case { start, kind, nth, error, for_good });
        }
    }
}

/// In which ways the n-th call fails: in all four where calls are few, else in two for what is written or synced
/// (only a failure that does not come again can be passed over), and in one of the four, in turns, for what is
/// read.
fn ways(
    start: Start,
    kind: usize,
    nth: usize,
    most: usize,
    is_long: bool,
) -> Vec<(&'static str, bool)> {
    let all = [("EIO", false), ("ENOSPC", true), ("EIO", true), ("ENOSPC", false)];
    let (few, every) = if is_long { (150, 1) } else { (15, 3) };
    let is_writing = match KINDS[kind].0 {
        "syncs" => true,
        "writes" => is_long || start == Start::Closed,
        _ => false,
    };
    if most <= few {
        all.to_vec()
    } else if is_writing {
        // Both errors, one of them once and the other for good.
        all[nth % 2 * 2..][..2].to_vec()
    } else if nth <= 40 || nth.is_multiple_of(every) {
        vec![all[nth % 4]]
    } else {
        Vec::new()
    }
}

impl Base {
    fn made(commits: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["closed", "killed"] {
            let place = folder.path().join(name);
            fs::create_dir(&place).unwrap();
            let url = place.join(STORE).display().to_string();
            assert_eq!(tool::json(&url, &["init"]).exit, 0);
            let mut command = tool::command(&url, &["txn"]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            for n in 0..5 {
                stdin.write_all(line(1_000_000 + n).as_bytes()).unwrap();
            }
            let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
            for _ in 0..5 {
                assert_eq!(tool::acknowledgement(&mut out).unwrap()["ok"], true);
            }
            if name == "killed" {
                child.kill().unwrap();
            }
            drop(stdin);
            child.wait().unwrap();
            assert_eq!(place.join(format!("{STORE}-wal")).exists(), name == "killed");
        }
        Self { folder, commits }
    }

    /// How many transactions there are. What a kill has left is over when the store is open: what comes
    /// after that is the same as on a closed store.
    fn commits(&self, start: Start) -> u64 {
        if start == Start::Killed { self.commits.min(20) } else { self.commits }
    }
}

/// The n-th transaction.
fn line(n: u64) -> String {
    let id = format!("t{n}");
    let put = |governor: &str| json!({"op": "put", "state": format!("{governor}/{id}"), "data": n});
    format!("{}\n", json!({"id": id, "ops": [put("a"), put("b")]}))
}

/// A folder of its own for one run.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(base: &Base, start: Start) -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = tempfile::tempdir_in(parent).unwrap();
        let store = folder.path().join("store");
        fs::create_dir(&store).unwrap();
        let from = match start {
            Start::Nothing => None,
            Start::Closed => Some("closed"),
            Start::Killed => Some("killed"),
        };
        for entry in
            from.iter().flat_map(|from| fs::read_dir(base.folder.path().join(from)).unwrap())
        {
            let entry = entry.unwrap();
            fs::copy(entry.path(), store.join(entry.file_name())).unwrap();
        }
        Self { folder }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("store").join(STORE)
    }
}

/// Runs it with the fault.
fn attempt(base: &Base, case: &Case, place: &Place) -> Outcome {
    let trace = place.folder.path().join("trace");
    let (_, calls, only_ours) = KINDS[case.kind];
    let when = if case.for_good { "+" } else { "" };
    let traced = format!("trace=write,pwrite64,fsync,fdatasync,{NAMING},{calls}");
    let inject = format!("inject={calls}:error={}:when={}{when}", case.error, case.nth);
    // Only what is traced stops the process, and of what is written only the answers are read: the
    // longest is far shorter than this.
    let mut options = vec!["--seccomp-bpf", "-s", "1500", "-y", "-e", &traced, "-e", &inject];
    let file = place.file();
    let ours = ["", "-wal", "-shm", "-journal"].map(|end| format!("{}{end}", file.display()));
    let folder = file.parent().unwrap().display().to_string();
    if only_ours {
        options.extend(ours.iter().chain([&folder]).flat_map(|path| ["-P", path]));
    }
    let verb = if case.start == Start::Nothing { "init" } else { "txn" };
    let command = tool::command(&file.display().to_string(), &["-o", "json", verb]);
    let input: String = (0..base.commits(case.start)).map(line).collect();
    let ran = tool::ran(strace::under(&trace, &options, &command), input.as_bytes());
    let calls = strace::read(&trace);
    let answers = ran.out.lines().filter(|_| verb == "txn");
    Outcome {
        exit: ran.exit,
        lines: answers.map(|line| serde_json::from_str(line).unwrap()).collect(),
        injected: calls.iter().filter(|call| call.injected).count(),
        err: ran.err,
        calls,
    }
}

fn one(base: &Base, n: u64, case: &Case, tally: &mut Tally) {
    let place = Place::new(base, case.start);
    let outcome = attempt(base, case, &place);
    tally.count("runs", 1);
    tally.count("runs in which a call failed", u64::from(outcome.injected > 0));
    tally.count("calls that failed", outcome.injected as u64);
    let syncs = outcome.calls.iter().filter(|call| call.injected && is_sync(call)).count();
    tally.count("failed syncs", syncs as u64);
    let done = outcome.lines.iter().filter(|line| line["ok"] == true).count();
    tally.count("acknowledged transactions", done as u64);
    let refused = outcome.lines.iter().filter(|line| line["ok"] != true);
    tally.count("answers that an operation failed", refused.clone().count() as u64);
    tally.count(
        "answers that the outcome is not known",
        refused.clone().filter(|line| line["outcome"] == "unknown").count() as u64,
    );
    tally.count(
        "answers that say to open the store again",
        refused.clone().filter(|line| says_to_reopen(line)).count() as u64,
    );
    let first = outcome.lines.iter().position(|line| line["ok"] != true);
    let goes_on =
        first.is_some_and(|first| outcome.lines[first..].iter().any(|line| line["ok"] == true));
    tally.count("runs that went on after the error", u64::from(goes_on));
    let what = format!("case {n}, {case:?}");
    let folder = place.folder.path().join("store").display().to_string();
    let again = reopened(case, &outcome, &place);
    let verdict = again
        .as_ref()
        .map_err(Clone::clone)
        .and_then(|found| judge(base, case, &folder, &outcome, found));
    if let Err(why) = verdict {
        let kept = std::env::temp_dir().join(format!("tai-torture-eio-{}-{n}", std::process::id()));
        let _ = fs::rename(place.folder.path(), &kept);
        tally.broken(format!("{what}: {why}; exit {}, {}", outcome.exit, outcome.err.trim()));
    }
    let Ok(found) = &again else { return };
    // The same run, of a program that says "done" where this one said that it failed.
    if case.start == Start::Nothing && failed_syncs(&outcome, &folder).next().is_some() {
        let made = Outcome { exit: 0, ..outcome };
        let is_noticed = judge(base, case, &folder, &made, found).is_err();
        tally.control(SWALLOWED, u64::from(is_noticed), 1, 1);
    } else if let Some(first) = first {
        let mut swallowed = outcome;
        let said = swallowed.lines[first].take();
        swallowed.lines[first] = json!({"id": said["id"], "ok": true});
        let is_noticed = judge(base, case, &folder, &swallowed, found).is_err();
        if !is_noticed {
            println!("  not noticed: {what}: {said}, as if it were done");
        }
        tally.control(SWALLOWED, u64::from(is_noticed), 1, 1);
    }
}

fn is_sync(call: &Call) -> bool {
    matches!(call.name.as_str(), "fsync" | "fdatasync")
}

fn says_to_reopen(line: &Value) -> bool {
    line["code"] == "storage_failed"
        && line["hint"].as_str().is_some_and(|hint| hint.contains("open the store again"))
}

/// What is there when the disk works again.
fn reopened(case: &Case, outcome: &Outcome, place: &Place) -> Result<Found, String> {
    let file = place.file();
    if case.start == Start::Nothing {
        if outcome.exit == 0 && !file.exists() {
            return Err("it said that the store was made, and there is none".to_owned());
        }
        if !file.exists() {
            let made = tool::json(&file.display().to_string(), &["init"]);
            if made.exit != 0 {
                return Err(format!("after a creation that failed: {made:?}"));
            }
        }
    }
    let found = found::alone(|| found::read(&file))?;
    found::alone(|| found::goes_on(&file))?;
    Ok(found)
}

fn judge(
    base: &Base,
    case: &Case,
    folder: &str,
    outcome: &Outcome,
    found: &Found,
) -> Result<(), String> {
    // What the documentation lists; 101 is a panic and 134 an abort.
    if !(0..=9).contains(&outcome.exit) || outcome.err.contains("panicked") {
        return Err("it did not end as it must".to_owned());
    }
    if outcome.exit != 0 {
        let error: Value = serde_json::from_str(outcome.err.lines().last().unwrap_or_default())
            .map_err(|_| "its error is not typed".to_owned())?;
        if !error["code"].is_string() {
            return Err(format!("its error has no code: {error}"));
        }
    }
    if case.start == Start::Nothing {
        let of_store = |call: &&Call| call.name == "pwrite64" && call.file(0).starts_with(folder);
        let writes = outcome.calls.iter().filter(of_store).filter(|call| call.failed());
        return match failed_syncs(outcome, folder).chain(writes).next() {
            Some(call) if outcome.exit == 0 => Err(format!("made, after a failure: {call:?}")),
            _ => Ok(()),
        };
    }
    let mut is_poisoned = false;
    for line in &outcome.lines {
        if line["ok"] == true && is_poisoned {
            return Err(format!("after a sync or commit that failed: {line}"));
        }
        if line["ok"] == true {
            continue;
        }
        // A sector that cannot be read is damage to SQLite, and to whoever needs what stood there.
        let may_be_damage = KINDS[case.kind].0 == "readings";
        if line["code"].as_str().is_none_or(|code| code == "corrupt" && !may_be_damage) {
            return Err(format!("an answer that is not typed, or the wrong one: {line}"));
        }
        if is_poisoned && !says_to_reopen(line) {
            return Err(format!("the handle has failed and does not say so: {line}"));
        }
        is_poisoned |= line["outcome"] == "unknown" || says_to_reopen(line);
    }
    told_after_failed_sync(outcome, folder)?;
    let has = |governor: &str, id: &str| found.heads.contains_key(&format!("{governor}/{id}"));
    for n in (0..base.commits(case.start)).chain(1_000_000..1_000_005) {
        let id = format!("t{n}");
        let (a, b) = (has("a", &id), has("b", &id));
        if a != b {
            return Err(format!("half of {id}"));
        }
        let answer = outcome.lines.iter().find(|line| line["id"] == *id);
        let was_told = n >= 1_000_000 || answer.is_some_and(|line| line["ok"] == true);
        if was_told && !a {
            return Err(format!("{id} was acknowledged and is lost"));
        }
        if a && answer.is_some_and(|line| line["outcome"] == "not_applied") {
            return Err(format!("{id} is there, and was said not to be applied"));
        }
    }
    Ok(())
}

/// The syncs that failed.
///
/// SQLite syncs the folder once more when a journal or a log is first synced, and passes over a failure. That is
/// harmless before a new store has its name, and where the folder had been synced since its log was made,
/// which the store does when it is opened.
fn failed_syncs<'a>(outcome: &'a Outcome, folder: &'a str) -> impl Iterator<Item = &'a Call> {
    let of_folder = move |call: &&Call| is_sync(call) && call.file(0) == folder;
    // What existed before had its name from the beginning.
    let naming =
        outcome.calls.iter().filter(|call| NAMING.split(',').any(|name| name == call.name));
    let named = naming.filter(|call| !call.failed()).map(|call| call.ended).min().unwrap_or(0);
    let synced = outcome.calls.iter().filter(of_folder).filter(|call| !call.failed());
    let synced = synced.map(|call| call.ended).filter(|at| *at > named).min().unwrap_or(usize::MAX);
    let failed = outcome.calls.iter().filter(|call| is_sync(call) && call.failed());
    failed.filter(move |call| !of_folder(call) || (named..synced).contains(&call.begun))
}

/// By the trace: no acknowledgement begins after a sync has failed.
///
/// The log is folded into the file by the thread that has just committed, while another tells of that commit.
/// So one acknowledgement may come after a sync that failed, if something was committed since the answer before
/// it, and by then all of the log had been synced.
fn told_after_failed_sync(outcome: &Outcome, folder: &str) -> Result<(), String> {
    // The answers one by one, as they went out.
    let answers =
        outcome.calls.iter().filter(|call| call.name == "write" && call.args[0].starts_with("1<"));
    let mut told: Vec<(usize, Vec<u8>)> = answers.map(|call| (call.begun, call.bytes(1))).collect();
    told.sort_by_key(|(begun, _)| *begun);
    for failed in failed_syncs(outcome, folder) {
        let before = told.iter().filter(|(begun, _)| *begun < failed.ended);
        let since = before.clone().map(|(begun, _)| *begun).max().unwrap_or(0);
        let text: Vec<u8> = before.flat_map(|(_, text)| text.clone()).collect();
        let may_be_told =
            text.lines().count() + usize::from(is_committed(outcome, folder, since, failed));
        let later = outcome.lines.get(may_be_told..).unwrap_or_default();
        if let Some(line) = later.iter().find(|line| line["ok"] == true) {
            return Err(format!("told after a failed sync: {line}"));
        }
    }
    Ok(())
}

/// Whether the log was written to since then, and all of it had been synced when this call began.
fn is_committed(outcome: &Outcome, folder: &str, since: usize, before: &Call) -> bool {
    let log = format!("{folder}/{STORE}-wal");
    let on_the_log = outcome.calls.iter().filter(|call| {
        call.begun < before.begun
            && (is_sync(call) || call.name == "pwrite64")
            && call.file(0) == log
    });
    let is_written = on_the_log.clone().any(|call| !is_sync(call) && call.begun > since);
    let latest = on_the_log.max_by_key(|call| call.ended);
    is_written && latest.is_some_and(|call| is_sync(call) && !call.failed())
}
