//! Where the stores of a run are: in a file, or on the emulator.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tai_state::testing::emulator::{Emulator, fresh_project};
use tai_state::{ChangeMetadata, StateId, StateSnapshot, StateStore, StoreOptions};

use crate::run::Tally;
use crate::tool::{self, Ran};

/// Where the stores of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Each in a file of its own.
    File,
    /// Each in a file of its own that is memory, so that a sync costs nothing.
    Memory,
    /// Each in a project of its own, on the emulator at this address.
    Emulator(&'static str),
}

impl Engine {
    /// The one emulator of this run. Where there is none the run says what it leaves out.
    pub(crate) async fn emulator(tally: &mut Tally, what: &str) -> Option<Self> {
        let emulator = Emulator::shared().await;
        if emulator.is_none() {
            tally.skip(format!("{what}: there is no Firestore emulator"));
        }
        emulator.map(Self::of)
    }

    /// On this emulator, which must outlast its use.
    pub(crate) fn of(emulator: &Emulator) -> Self {
        Self::Emulator(emulator.address().to_owned().leak())
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File => "a file",
            Self::Memory => "a file in memory",
            Self::Emulator(_) => "the emulator",
        }
    }

    /// A place where no store is yet.
    pub(crate) fn place(self) -> Store {
        let memory = std::path::Path::new("/dev/shm");
        let folder = match self {
            Self::Memory if memory.is_dir() => tempfile::tempdir_in(memory).unwrap(),
            _ => tempfile::tempdir().unwrap(),
        };
        let file = folder.path().join("store.tai");
        let url = match self {
            Self::File | Self::Memory => file.display().to_string(),
            Self::Emulator(address) => {
                format!("firestore+emulator://{address}/{}", fresh_project())
            }
        };
        Store { folder, url }
    }

    /// An empty store.
    pub(crate) fn store(self) -> Store {
        let store = self.place();
        tool::json(&store.url, &["init"]).ok();
        store
    }
}

/// Where a store is, and a folder for the run's own files. Both go when this is dropped.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) url: String,
}

impl Store {
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        tool::ran(self.command(args), b"")
    }

    pub(crate) fn json(&self, args: &[&str]) -> Ran {
        tool::json(&self.url, args)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        tool::command(&self.url, args)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The report of a proof of all of it, which must hold.
    pub(crate) fn verified(&self) -> Value {
        let report = self.json(&["verify"]).ok().json();
        assert_eq!(report["ok"], true, "{report}");
        report
    }

    /// A handle of its own.
    pub(crate) async fn open(&self) -> StateStore {
        StateStore::connect(&self.url).await.unwrap()
    }

    pub(crate) async fn open_with(&self, options: StoreOptions) -> StateStore {
        StateStore::connect_with(&self.url, options).await.unwrap()
    }
}

impl Ran {
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.exit, 0, "{self:?}");
        self
    }

    /// The error object on standard error.
    pub(crate) fn error(&self) -> Value {
        serde_json::from_str(&self.err).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub(crate) fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub(crate) fn why() -> ChangeMetadata {
    ChangeMetadata::new("torture", "", None)
}

pub(crate) fn snapshot(id: &str, data: Value) -> StateSnapshot {
    StateSnapshot::new(StateId::from(id), data, why())
}

/// Proves all of it; what does not hold.
pub(crate) async fn problems(store: &StateStore) -> Vec<String> {
    match store.verify(|_| {}).await {
        Ok(report) if report.ok => Vec::new(),
        Ok(report) => report.problems,
        Err(error) => vec![error.to_string()],
    }
}
