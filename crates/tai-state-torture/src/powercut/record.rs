//! Records the real binary: what it did to its folder, what it told its user, and what was true then.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::disk::{Disk, Event, Image, Naming, Node};
use super::truth::{self, Told, Truth};
use crate::random::Random;
use crate::strace::{self, Call};
use crate::tool;

/// The store's name in its folder.
pub(super) const STORE: &str = "store.tai";

/// So many transactions fill the log until a checkpoint empties it and it begins anew.
const ENOUGH: u64 = 160;

/// So few that a log comes to the version at which a snapshot of it is saved.
const ACCOUNTS: u64 = 4;

/// What is written beside the traces, so that they can be read again.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Notes {
    /// What each process was there for.
    sessions: Vec<String>,
    /// The store's folder, as the traces name it.
    place: PathBuf,
    truth: Truth,
}

/// All that happened, over several processes one after the other.
#[derive(Debug)]
pub(super) struct Recording {
    pub(super) folder: PathBuf,
    pub(super) events: Vec<Event>,
    pub(super) told: Vec<Told>,
    pub(super) truth: Truth,
    /// Files that were rebuilt from the trace and are equal to the real ones, byte for byte.
    pub(super) rebuilt: u64,
}

impl Recording {
    /// Runs the binary into this folder.
    pub(super) fn made(folder: &Path, random: &mut Random) -> Self {
        fs::create_dir(folder.join("store")).unwrap();
        let place = folder.join("store").canonicalize().unwrap();
        let mut notes = Notes { place, ..Notes::default() };
        let url = folder.join("store").join(STORE).display().to_string();
        let mut session = |name: &str, args: &[&str], input: &str, killed_after: Option<u64>| {
            let n = notes.sessions.len();
            let trace = folder.join(format!("{n}.trace"));
            let args: Vec<&str> = ["-o", "json"].iter().chain(args).copied().collect();
            let command = tool::command(&url, &args);
            let options = ["--seccomp-bpf", "-e", strace::CHANGES];
            run(name, strace::under(&trace, &options, &command), input, killed_after, &trace);
            notes.sessions.push(name.to_owned());
            let after = folder.join(format!("{n}.after"));
            copied(&folder.join("store"), &after);
            // What is true is read from a copy of a copy: reading folds the log in.
            let read = tempfile::tempdir_in(folder).unwrap();
            copied(&after, read.path());
            notes.truth.learn(read.path());
        };
        let mut writes = BTreeMap::new();
        let mut transfers = |many: u64, random: &mut Random| {
            let mut lines = String::new();
            for _ in 0..many {
                let id = format!("t{}", writes.len());
                let (line, states) = transfer(&id, random);
                lines.push_str(&line);
                writes.insert(id, states);
            }
            lines
        };
        let imported: String = (0..60).map(|n| import_line(n, random)).collect();
        let input = folder.join("imported.jsonl");
        fs::write(&input, imported).unwrap();
        session("create", &["init"], "", None);
        session("import", &["import", "--acks", "--jobs", "8", input.to_str().unwrap()], "", None);
        session("one by one", &["txn"], &transfers(40, random), None);
        let many = transfers(ENOUGH, random);
        session("killed", &["txn"], &many, Some(ENOUGH));
        session("after the kill", &["txn", "--concurrency", "6"], &transfers(40, random), None);
        session("clean-up", &["cleanup", "--older-than", "0s", "--keep-last", "2"], "", None);
        session("purge imported/s2", &["purge", "imported/s2", "--yes"], "", None);
        session("last", &["txn"], &transfers(20, random), None);
        notes.truth.writes = writes;
        fs::write(folder.join("notes.json"), serde_json::to_string(&notes).unwrap()).unwrap();
        Self::read(folder)
    }

    /// Reads what was recorded before.
    pub(super) fn read(folder: &Path) -> Self {
        let notes = fs::read_to_string(folder.join("notes.json")).unwrap();
        let notes: Notes = serde_json::from_str(&notes).unwrap();
        let mut reader = Reader::new(&notes.place, Disk::default());
        let mut rebuilt = 0;
        for (n, name) in notes.sessions.iter().enumerate() {
            reader.session(&folder.join(format!("{n}.trace")), name, &notes.truth);
            rebuilt += reader.compare(&folder.join(format!("{n}.after")));
        }
        let Reader { events, told, .. } = reader;
        Self { folder: folder.to_owned(), events, told, truth: notes.truth, rebuilt }
    }
}

/// What a process did to a folder that held this image before.
pub(super) fn replayed(place: &Path, image: &Image, trace: &Path) -> Vec<Event> {
    let mut reader = Reader::new(&place.canonicalize().unwrap(), Disk::of(image));
    reader.session(trace, "recovery", &Truth::default());
    reader.events
}

/// Two accounts change by the same amount, and a third state of its own is made: all or nothing.
fn transfer(id: &str, random: &mut Random) -> (String, Vec<String>) {
    let from = random.below(ACCOUNTS);
    let to = (from + 1 + random.below(ACCOUNTS - 1)) % ACCOUNTS;
    let amount = 1 + random.below(100);
    let states = vec![format!("bank/a{from}"), format!("bank/a{to}"), format!("transfer/{id}")];
    let text = "x".repeat(random.below(400) as usize);
    let line = json!({"id": id, "ops": [
        {"op": "add", "state": states[0], "value": -(amount as i64)},
        {"op": "add", "state": states[1], "value": amount},
        {"op": "put", "state": states[2], "data": {"amount": amount, "text": text}, "expect": 0},
    ]});
    (format!("{line}\n"), states)
}

fn import_line(n: u64, random: &mut Random) -> String {
    let state = format!("s{}", n % 6);
    let at = format!("2026-01-02T03:{:02}:{:02}Z", n / 60, n % 60);
    let data = json!({"n": n, "text": "y".repeat(random.below(3_000) as usize)});
    let line = json!({"governor_id": "imported", "state_id": state, "action": "step",
        "timestamp": at, "actor": "recorder", "data": data});
    format!("{line}\n")
}

/// Runs a session to its end, or kills it when it has answered so often and has nothing more to do.
fn run(name: &str, mut traced: Command, input: &str, killed_after: Option<u64>, trace: &Path) {
    traced.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = traced.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let feeder = std::thread::spawn(move || {
        let _ = stdin.write_all(input.as_bytes());
        // Open, the process waits for more; closed, it comes to its end.
        killed_after.map(|_| stdin)
    });
    let out = BufReader::new(child.stdout.take().unwrap());
    let wanted = killed_after.map_or(usize::MAX, |lines| lines as usize);
    let lines = out.lines().take(wanted).map(|line| line.unwrap());
    let refused = lines.filter(|line| line.contains("\"ok\":false")).collect::<Vec<_>>();
    assert!(refused.is_empty(), "{name}: {refused:?}");
    let is_idle = feeder.join().unwrap();
    if is_idle.is_none() {
        assert!(child.wait().unwrap().success(), "{name} failed");
        return;
    }
    let text = fs::read_to_string(trace).unwrap();
    let pid = text.split(' ').next().unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    child.wait().unwrap();
}

/// A folder with the store's files in it.
fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if is_modelled(entry.file_name().to_str().unwrap()) {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// The shared-memory file is mapped, so its changes are no calls. The first to open a store after a
/// cut empties it, whatever it holds.
fn is_modelled(name: &str) -> bool {
    !name.ends_with("-shm")
}

/// What a descriptor means.
#[derive(Debug, Clone, Copy)]
enum Open {
    File(Node),
    Folder,
    /// A file of the folder that is not modelled.
    Aside,
}

/// Turns traces into events.
struct Reader {
    place: String,
    events: Vec<Event>,
    /// When each event took place, within its session.
    times: Vec<usize>,
    told: Vec<Told>,
    live: BTreeMap<String, Node>,
    nodes: usize,
    open: HashMap<i64, Open>,
    out: Vec<u8>,
    disk: Disk,
    taken: usize,
}

impl Reader {
    fn new(place: &Path, disk: Disk) -> Self {
        let live = disk.names().clone();
        Self {
            place: place.display().to_string(),
            events: Vec::new(),
            times: Vec::new(),
            told: Vec::new(),
            nodes: live.len(),
            live,
            open: HashMap::new(),
            out: Vec::new(),
            disk,
            taken: 0,
        }
    }

    fn session(&mut self, trace: &Path, name: &str, truth: &Truth) {
        self.open = HashMap::new();
        self.out.clear();
        self.times = vec![0; self.events.len()];
        self.push(0, Event::Start);
        let mut calls: Vec<(usize, Call)> =
            strace::read(trace).into_iter().map(|call| (time_of(&call), call)).collect();
        calls.sort_by_key(|(time, _)| *time);
        for (time, call) in calls {
            self.call(time, &call, name, truth);
        }
    }

    fn push(&mut self, time: usize, event: Event) {
        self.events.push(event);
        self.times.push(time);
    }

    /// The name in the folder that a path has, if it is there.
    fn name(&self, path: &str) -> Option<String> {
        let name = path.strip_prefix(&self.place)?.strip_prefix('/')?;
        assert!(!name.contains('/'), "a folder in the folder is not modelled: {path}");
        Some(name.to_owned())
    }

    fn call(&mut self, time: usize, call: &Call, session: &str, truth: &Truth) {
        let Some(result) = call.result else {
            let is_ours = matches!(self.descriptor(call), Some(Open::File(_) | Open::Folder));
            assert!(!is_ours, "killed inside of a call on the store: {call:?}");
            return;
        };
        if result < 0 {
            return;
        }
        match call.name.as_str() {
            "open" | "openat" => self.opened(time, call, result),
            "close" => {
                self.open.remove(&call.number(0));
            }
            "fcntl" if !call.args[1].starts_with("F_DUPFD") => {}
            "dup" | "dup2" | "dup3" | "fcntl" => {
                if let Some(open) = self.descriptor(call) {
                    self.open.insert(result, open);
                }
            }
            "write" if call.args[0] == "1" => self.output(time, &call.bytes(1), session, truth),
            "pwrite64" => {
                if let Some(Open::File(node)) = self.descriptor(call) {
                    let mut data = call.bytes(1);
                    data.truncate(result as usize);
                    let at = call.number(3) as u64;
                    self.push(time, Event::Write { node, at, data: Arc::from(data) });
                }
            }
            "ftruncate" => {
                if let Some(Open::File(node)) = self.descriptor(call) {
                    self.push(time, Event::Truncate { node, len: call.number(1) as u64 });
                }
            }
            "fsync" | "fdatasync" => {
                let begun = self.times.partition_point(|time| *time < call.begun);
                match self.descriptor(call) {
                    Some(Open::File(node)) => self.push(time, Event::Sync { node, begun }),
                    Some(Open::Folder) => self.push(time, Event::SyncFolder { begun }),
                    _ => {}
                }
            }
            "rename" | "link" => self.renamed(time, call, 0, 1),
            "renameat" | "renameat2" | "linkat" => self.renamed(time, call, 1, 3),
            "unlink" => self.unlinked(time, &call.text(0)),
            "unlinkat" => self.unlinked(time, &call.text(1)),
            "mmap" => {
                let is_ours = call.args[4]
                    .parse()
                    .is_ok_and(|fd: i64| matches!(self.open.get(&fd), Some(Open::File(_))));
                let writes = call.args[2].contains("PROT_WRITE");
                assert!(
                    !(is_ours && writes && call.args[3].contains("MAP_SHARED")),
                    "a file of the store is mapped for writing: {call:?}"
                );
            }
            _ => {
                let is_ours = matches!(self.descriptor(call), Some(Open::File(_) | Open::Folder));
                let is_new = matches!(call.name.as_str(), "creat" | "openat2" | "io_uring_setup");
                assert!(!is_ours && !is_new, "a call that is not modelled: {call:?}");
            }
        }
    }

    fn descriptor(&self, call: &Call) -> Option<Open> {
        let fd = call.args.first()?.parse().ok()?;
        self.open.get(&fd).copied()
    }

    fn opened(&mut self, time: usize, call: &Call, fd: i64) {
        let first = usize::from(call.name == "openat");
        let path = call.text(first);
        let flags = &call.args[first + 1];
        if path == self.place {
            assert!(!flags.contains("O_TMPFILE"), "files without a name are not modelled");
            self.open.insert(fd, Open::Folder);
            return;
        }
        let Some(name) = self.name(&path) else {
            self.open.remove(&fd);
            return;
        };
        if !is_modelled(&name) {
            self.open.insert(fd, Open::Aside);
            return;
        }
        assert!(!flags.contains("O_APPEND"), "appending is not modelled");
        let node = match self.live.get(&name) {
            Some(node) => *node,
            None => {
                let node = self.nodes;
                self.nodes += 1;
                self.live.insert(name.clone(), node);
                // It is there with no bytes, also when none is ever written.
                self.push(time, Event::Name(Naming::Given { name, node }));
                node
            }
        };
        if flags.contains("O_TRUNC") {
            self.push(time, Event::Truncate { node, len: 0 });
        }
        self.open.insert(fd, Open::File(node));
    }

    fn renamed(&mut self, time: usize, call: &Call, from: usize, to: usize) {
        let (from, to) = (self.name(&call.text(from)), self.name(&call.text(to)));
        let (from, to) = match (from, to) {
            (Some(from), Some(to)) => (from, to),
            (None, None) => return,
            other => panic!("a file goes in or out of the folder: {other:?}"),
        };
        let node = self.live[&from];
        self.live.insert(to.clone(), node);
        let naming = if call.name.starts_with("link") {
            Naming::Given { name: to, node }
        } else {
            self.live.remove(&from);
            Naming::Renamed { from, to, node }
        };
        self.push(time, Event::Name(naming));
    }

    fn unlinked(&mut self, time: usize, path: &str) {
        let Some(name) = self.name(path).filter(|name| is_modelled(name)) else { return };
        let node = self.live.remove(&name).expect("what is removed was there");
        self.push(time, Event::Name(Naming::Taken { name, node }));
    }

    /// A line is told when its end is written.
    fn output(&mut self, time: usize, bytes: &[u8], session: &str, truth: &Truth) {
        self.out.extend_from_slice(bytes);
        while let Some(end) = self.out.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.out.drain(..=end).collect();
            let line: Value = serde_json::from_slice(&line).unwrap_or_default();
            if let Some(told) = truth::told(&line, session, truth) {
                self.told.push(told);
                self.push(time, Event::Told);
            }
        }
    }

    /// Everything that was modelled, on a disk that lost nothing, is what really stands there.
    fn compare(&mut self, real: &Path) -> u64 {
        for at in self.taken..self.events.len() {
            self.disk.take(&self.events, at);
        }
        self.taken = self.events.len();
        let mut whole = self.disk.clone();
        whole.sync_all(&self.events);
        let rebuilt = whole.image(&self.events, &[]);
        let names: Vec<String> = fs::read_dir(real)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), rebuilt.len(), "{names:?} stand in {}", real.display());
        for name in &names {
            let is = fs::read(real.join(name)).unwrap();
            assert!(rebuilt[name] == is, "{name} in {} is not as traced", real.display());
        }
        names.len() as u64
    }
}

/// A change happens by the time it ends; what a user is told may be known to them as soon as it begins.
fn time_of(call: &Call) -> usize {
    match call.name.as_str() {
        "write" => call.begun,
        _ => call.ended,
    }
}
