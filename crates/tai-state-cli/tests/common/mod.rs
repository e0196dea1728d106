//! Runs the binary, on a file or on the emulator, and reads what it says.

#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tai_state::testing::emulator::{Emulator, fresh_project};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_tai-state");

/// What a run of the binary gave.
#[derive(Debug, Clone)]
pub(crate) struct Ran {
    pub(crate) exit: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The error object on standard error.
    pub(crate) fn error(&self) -> Value {
        serde_json::from_str(&self.err).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub(crate) fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.exit, 0, "{self:?}");
        self
    }
}

/// Runs each test on each engine, under the name `engine::test`.
#[allow(unused_macros)]
macro_rules! on_every_engine {
    ($($test:ident),* $(,)?) => {
        mod file {
            $(#[test]
            fn $test() {
                super::$test(crate::common::Engine::File);
            })*
        }
        mod emulator {
            $(#[test]
            fn $test() {
                let Some(emulator) = crate::common::Engine::emulator() else { return };
                super::$test(emulator);
            })*
        }
    };
}

/// Where the stores of a test are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Each in a file of its own.
    File,
    /// Each in a project of its own, on the emulator at this address.
    Emulator(&'static str),
}

impl Engine {
    /// The one emulator of this test program. `None` where there is none: one line has said so.
    pub(crate) fn emulator() -> Option<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Emulator::shared()).map(|emulator| Self::Emulator(emulator.address()))
    }

    /// A place where no store is yet.
    pub(crate) fn place(self) -> Store {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("store.tai");
        let url = match self {
            Self::File => file.display().to_string(),
            Self::Emulator(address) => {
                format!("firestore+emulator://{address}/{}", fresh_project())
            }
        };
        Store { folder, file, url }
    }

    /// An empty store.
    pub(crate) fn store(self) -> Store {
        let store = self.place();
        store.run(&["init"]).ok();
        store
    }

    /// So many of something on a file; a tenth on the emulator, where a commit takes ten times as
    /// long.
    pub(crate) fn about(self, many: usize) -> usize {
        match self {
            Self::File => many,
            Self::Emulator(_) => many / 10,
        }
    }
}

/// Where a store is or may be, and a folder for the test's own files.
pub(crate) struct Store {
    pub(crate) folder: tempfile::TempDir,
    /// The store, where it is a file.
    pub(crate) file: PathBuf,
    pub(crate) url: String,
}

impl Store {
    /// A place in a file, where no store is yet.
    pub(crate) fn new() -> Self {
        Engine::File.place()
    }

    /// An empty store in a file.
    pub(crate) fn made() -> Self {
        Engine::File.store()
    }

    /// Whether there is a store. What is no store counts as none on the emulator only: a file that
    /// was left behind is one too many.
    pub(crate) fn exists(&self) -> bool {
        match self.url.starts_with("firestore") {
            true => self.run(&["stats"]).exit != 3,
            false => self.file.exists(),
        }
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.feed(args, b"")
    }

    pub(crate) fn json(&self, args: &[&str]) -> Ran {
        let args: Vec<&str> = ["-o", "json"].iter().chain(args).copied().collect();
        self.run(&args)
    }

    pub(crate) fn feed(&self, args: &[&str], input: &[u8]) -> Ran {
        run(self.command(args), input)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = tool();
        command.arg("-u").arg(&self.url).args(args);
        command
    }

    /// Starts the binary, kills it when it has acknowledged so many lines, and returns all that it
    /// had acknowledged by then.
    pub(crate) fn killed_after(&self, args: &[&str], lines: u64) -> Vec<Value> {
        let mut child = started(self.command(args));
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        let mut acks = Vec::new();
        while let Some(ack) = acknowledgement(&mut reader) {
            acks.push(ack);
            if acks.len() as u64 == lines {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        acks
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    pub(crate) fn verified(&self) -> Value {
        let report = self.json(&["verify"]).ok().json();
        assert_eq!(report["ok"], true, "{report}");
        report
    }
}

/// A command in an environment that names no store and no emulator, and from which nothing gets off
/// this machine: no credentials, and nobody to ask for any.
pub(crate) fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    for name in [
        "TAI_STATE_URL",
        "TAI_STATE_OUTPUT",
        "TAI_STATE_ACTOR",
        "TAI_STATE_ALLOW_EPHEMERAL_DISK",
        "TAI_LOCK_GOVERNOR",
        "K_SERVICE",
        "FIRESTORE_EMULATOR_HOST",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ] {
        command.env_remove(name);
    }
    command.env("GCE_METADATA_HOST", "127.0.0.1:1");
    command.env("HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-home"));
    command
}

/// The binary.
pub(crate) fn tool() -> Command {
    program(BINARY)
}

/// A script of the shell `bash`.
pub(crate) fn bash(script: &str) -> Command {
    let mut command = program("bash");
    command.args(["-c", script]);
    command
}

/// One line of acknowledgement. A line that a kill cut off was not acknowledged.
pub(crate) fn acknowledgement(reader: &mut impl BufRead) -> Option<Value> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line.ends_with('\n').then(|| serde_json::from_str(&line).unwrap())
}

/// Starts it with a pipe from its standard output.
pub(crate) fn started(mut command: Command) -> Child {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().unwrap()
}

pub(crate) fn run(mut command: Command, input: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // A command that refuses its input early closes the pipe.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Ran {
        exit: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Where the real log is looked for if nothing names it: beside the repository.
const BESIDE: &str = "../../../shared/data/incidents.jsonl.gz";

/// The real log, which `TAI_REAL_LOG` names, or `None` with a line that says why.
pub(crate) fn incidents() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(BESIDE);
    let path = std::env::var_os("TAI_REAL_LOG").map_or(beside, PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    skipped(&format!("tests with the real log (TAI_REAL_LOG): {} is not there", path.display()));
    None
}

/// Says it past the test runner, which keeps what a test prints as long as it passes.
pub(crate) fn skipped(what: &str) {
    let line = format!("\nSKIPPED: {what}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// SplitMix64, and its seed on the screen.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn announced(what: &str) -> Self {
        let seed = match std::env::var("TAI_STATE_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => {
                use std::hash::{BuildHasher, Hasher};
                std::collections::hash_map::RandomState::new().build_hasher().finish()
            }
        };
        println!("{what}: TAI_STATE_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
