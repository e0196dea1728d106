//! A command and all that runs below it: what they say, their end, and nothing left behind.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

/// Nothing that a test waits for takes so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Ends the group when this test program ends without having ended it, however that was.
const KEEPER: &str = r#"read -r _ || kill -s KILL -- "-$1""#;

/// A command in a process group of its own, with all that it starts. Dropping it ends them all.
#[derive(Debug)]
pub(crate) struct Tree {
    child: Child,
    /// What they read; it ends when this is dropped.
    pub(crate) input: Option<ChildStdin>,
    lines: Receiver<String>,
    keeper: Child,
    has_ended: bool,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None` when a signal ended it.
    pub(crate) exit: Option<i32>,
    /// The lines that nobody had read until then.
    pub(crate) lines: Vec<String>,
}

impl Ended {
    /// The last line: an error as JSON.
    pub(crate) fn error(&self) -> Value {
        let last = self.lines.last().map_or("", String::as_str);
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Tree {
    pub(crate) fn start(command: Command) -> Self {
        Self::start_told(command, |_| {})
    }

    /// Starts it. All lines that anyone of the tree writes, to either output, are told as they come,
    /// and may be read here too; `None` when all who could write have ended.
    pub(crate) fn start_told(
        mut command: Command,
        mut tell: impl FnMut(Option<&str>) + Send + 'static,
    ) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        command.process_group(0).stdin(Stdio::piped());
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
        let mut child = command.spawn().unwrap();
        // It holds an end of the pipe.
        drop(command);
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "sh", &child.id().to_string()]);
        let keeper = keeper.process_group(0).stdin(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                tell(Some(&line));
                let _ = sender.send(line);
            }
            tell(None);
        });
        let input = child.stdin.take();
        Self { child, input, lines, keeper, has_ended: false }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The next line; `None` when all have ended.
    pub(crate) fn next(&self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("nothing was said for {PATIENCE:?}"),
        }
    }

    /// Signals the process that was started, alone.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Signals all.
    pub(crate) fn signal_all(&self, signal: Signal) {
        kill_process_group(self.pid(), signal).unwrap();
    }

    /// Waits until all have ended; they find the end of their input.
    pub(crate) fn ended(mut self) -> Ended {
        drop(self.input.take());
        let lines = std::iter::from_fn(|| self.next()).collect();
        let exit = self.child.wait().unwrap().code();
        self.has_ended = true;
        Ended { exit, lines }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // After the wait, the number may be another's.
        if !self.has_ended {
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
        if let Some(mut leash) = self.keeper.stdin.take() {
            let _ = leash.write_all(b"\n");
        }
        let _ = self.keeper.wait();
    }
}

/// Asks again and again until there is an answer.
pub(crate) fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let from = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(from.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// The process, when it catches this signal. Linux says so; elsewhere it is believed.
pub(crate) fn catches(process: Pid, signal: Signal) -> Option<()> {
    let path = format!("/proc/{}/status", process.as_raw_nonzero());
    let Ok(status) = std::fs::read_to_string(path) else {
        return (!cfg!(target_os = "linux")).then_some(());
    };
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
    (caught >> (signal.as_raw() - 1) & 1 == 1).then_some(())
}
