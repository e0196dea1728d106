//! One process `tai-state txn`: asked, answered, stopped and killed.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::tool;

/// Longer than any call may take; then the process is given up.
pub(crate) const ANSWER: Duration = Duration::from_secs(120);

/// What all processes of a run share.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// So that each transaction has an id of its own.
    ids: AtomicU64,
    /// What must not happen at all: answers that make no sense, processes that end.
    pub(crate) wrong: Mutex<Vec<String>>,
}

impl Asked {
    pub(crate) fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }
}

/// One process `tai-state txn`, asked by one client or by several.
#[derive(Debug)]
pub(crate) struct Process {
    child: Mutex<Child>,
    /// By us: that it ended is no wonder.
    killed: AtomicBool,
    stdin: Mutex<Option<ChildStdin>>,
    waiting: Arc<Mutex<HashMap<String, Sender<Value>>>>,
    reader: Option<JoinHandle<()>>,
    asked: Arc<Asked>,
}

impl Process {
    pub(crate) fn start(url: &str, concurrency: usize, asked: &Arc<Asked>) -> Self {
        let mut command = tool::command(url, &["txn", "--concurrency", &concurrency.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let waiting = Arc::new(Mutex::new(HashMap::<String, Sender<Value>>::new()));
        let (waiters, tell) = (Arc::clone(&waiting), Arc::clone(asked));
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            // A line that a kill cut off is no answer.
            while stdout.read_line(&mut line).is_ok() && line.ends_with('\n') {
                let answer: Option<Value> = serde_json::from_str(&line).ok();
                let waiter = answer.as_ref().and_then(|answer| answer["id"].as_str());
                let waiter = waiter.and_then(|id| waiters.lock().unwrap().remove(id));
                match (answer, waiter) {
                    // Whoever has given up waiting has said so.
                    (Some(answer), Some(waiter)) => drop(waiter.send(answer)),
                    _ => tell.wrong(format!("nobody asked for: {line}")),
                }
                line.clear();
            }
            // The senders go, so that nobody waits for a process that has ended.
            waiters.lock().unwrap().clear();
        });
        Self {
            child: Mutex::new(child),
            killed: AtomicBool::new(false),
            stdin: Mutex::new(stdin),
            waiting,
            reader: Some(reader),
            asked: Arc::clone(asked),
        }
    }

    /// The answer to one transaction; none if the process ended before it or did not give it within
    /// this time, after which it is killed.
    pub(crate) fn ask(&self, ops: &[Value], within: Duration) -> Option<Value> {
        let answer = self.send(ops).recv_timeout(within).ok();
        if answer.is_none() {
            if within < ANSWER {
                self.killed.store(true, Ordering::Relaxed);
            }
            let _ = self.child.lock().unwrap().kill();
        }
        answer
    }

    /// The same, of a process that is stopped for so long when it has been asked.
    pub(crate) fn ask_stopped(&self, ops: &[Value], stopped: Duration) -> Option<Value> {
        let receiver = self.send(ops);
        let pid = Pid::from_child(&self.child.lock().unwrap());
        kill_process(pid, Signal::STOP).unwrap();
        // It says nothing while it is stopped, unless it had answered before.
        let early = receiver.recv_timeout(stopped).ok();
        kill_process(pid, Signal::CONT).unwrap();
        early.or_else(|| receiver.recv_timeout(ANSWER).ok())
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    fn send(&self, ops: &[Value]) -> Receiver<Value> {
        let id = format!("t{}", self.asked.ids.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = channel();
        self.waiting.lock().unwrap().insert(id.clone(), sender);
        let line = format!("{}\n", json!({"id": id, "ops": ops}));
        let written = match self.stdin.lock().unwrap().as_mut() {
            Some(stdin) => stdin.write_all(line.as_bytes()).is_ok(),
            None => false,
        };
        if !written {
            self.waiting.lock().unwrap().remove(&id);
        }
        receiver
    }
}

impl Drop for Process {
    /// The end of its input is its end.
    fn drop(&mut self) {
        drop(self.stdin.get_mut().unwrap().take());
        let status = self.child.get_mut().unwrap().wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        if !status.success() && !*self.killed.get_mut() {
            self.asked.wrong(format!("tai-state txn ended: {status}"));
        }
    }
}
