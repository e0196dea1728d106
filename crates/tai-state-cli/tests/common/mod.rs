//! Runs the binary and reads what it says.

#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_tai-state");

/// What a run of the binary gave.
#[derive(Debug)]
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

/// A store in a folder of its own.
pub(crate) struct Store {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) file: PathBuf,
}

impl Store {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("store.tai");
        Self { folder, file }
    }

    pub(crate) fn made() -> Self {
        let store = Self::new();
        store.run(&["init"]).ok();
        store
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.feed(args, b"")
    }

    pub(crate) fn json(&self, args: &[&str]) -> Ran {
        let args: Vec<&str> = ["-o", "json"].iter().chain(args).copied().collect();
        self.run(&args)
    }

    pub(crate) fn feed(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut command = Command::new(BINARY);
        command.arg("-u").arg(&self.file).args(args);
        run(command, input)
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

pub(crate) fn run(mut command: Command, input: &[u8]) -> Ran {
    for name in ["TAI_STATE_URL", "TAI_STATE_OUTPUT", "K_SERVICE", "TAI_STATE_ACTOR"] {
        command.env_remove(name);
    }
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

/// The real log, or `None` with a line that says why.
pub(crate) fn incidents() -> Option<PathBuf> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/incidents.jsonl.gz");
    if path.exists() {
        return Some(path);
    }
    println!("SKIPPED: {} is not there", path.display());
    None
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
