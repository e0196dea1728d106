//! Operations on a file against the model, with orderly ends, crashes, and crashes that take the end of
//! the log with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Input;
use crate::clock::ManualClock;
use crate::error::Error;
use crate::id::GovernorId;
use crate::store::StateStore;
use crate::testing::program::{Model, Runner, Step, beginning, folder, options};

/// Steps of one run.
const MOST_STEPS: usize = 60;

/// A recipe for steps; what it must come to after each is what [`Model`] says.
pub(super) fn operations(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(run(Input::new(bytes)));
}

/// The store, where it stands, and what it must be.
struct Run {
    folder: tempfile::TempDir,
    number: usize,
    clock: Arc<ManualClock>,
    runner: Runner,
    model: Model,
    /// What it was since the file was opened: a log that is cut off ends at one of these.
    since: Vec<Model>,
}

async fn run(mut input: Input<'_>) {
    let folder = folder().expect("a folder");
    let clock = Arc::new(ManualClock::at(beginning()));
    let runner = open(&folder.path().join("0.tai"), &clock).await.expect("a new store");
    let model = Model::default();
    let since = vec![model.clone()];
    let mut run = Run { folder, number: 0, clock, runner, model, since };
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(24) {
            0 => run.reopen().await,
            1 => run.crash(0).await,
            2 => {
                let cut = 1 + u64::from(input.byte()) * 97;
                run.crash(cut).await;
            }
            _ => run.step(&Step::drawn(&mut input)).await,
        }
    }
    run.reopen().await;
}

async fn open(path: &Path, clock: &Arc<ManualClock>) -> Result<Runner, Error> {
    let store = StateStore::open_with(path, options(clock.clone())).await?;
    Ok(Runner::new(store))
}

impl Run {
    fn path(&self) -> PathBuf {
        self.folder.path().join(format!("{}.tai", self.number))
    }

    async fn step(&mut self, step: &Step) {
        self.since.extend(self.model.within(step));
        let foretold = self.model.step(step);
        self.clock.set(self.model.now());
        let answer = self.runner.step(step).await;
        assert_eq!(answer, foretold, "{step:?}");
        self.since.push(self.model.clone());
    }

    /// Ends as a program does, and opens the file again.
    async fn reopen(&mut self) {
        // Another store in its place, since the handle must be gone before the file is opened.
        self.runner = Runner::new(StateStore::in_memory());
        self.runner = open(&self.path(), &self.clock).await.expect("an orderly file");
        self.proved(&self.model).await;
        self.since = vec![self.model.clone()];
    }

    /// Goes on with a copy of the files as they are now, the log without its last so many bytes.
    async fn crash(&mut self, cut: u64) {
        let left = self.path();
        self.number += 1;
        let path = self.path();
        std::fs::copy(&left, &path).expect("a copy");
        let log = |path: &Path| path.with_extension("tai-wal");
        if log(&left).exists() {
            std::fs::copy(log(&left), log(&path)).expect("a copy of the log");
            let file = std::fs::File::options().write(true).open(log(&path)).expect("the log");
            let length = file.metadata().expect("its length").len();
            file.set_len(length.saturating_sub(cut)).expect("a shorter log");
        }
        self.runner = open(&path, &self.clock).await.expect("what a crash leaves");
        if cut > 0 {
            // The end of the log is what was not yet written: the file is one of those that it was.
            let mut was = None;
            for model in self.since.iter().rev() {
                if self.is(model).await {
                    was = Some(model.clone());
                    break;
                }
            }
            let now = self.model.now();
            self.model = was.expect("the file is nothing that it ever was");
            self.model.set(now);
            // What a clean-up or a purge had given up and not yet removed, the next one removes.
            for step in Step::finishing() {
                self.runner.step(&step).await.expect("a clean-up");
            }
            let report = self.runner.store().verify(|_| {}).await.expect("a sound file");
            assert_eq!(report.leftovers, 0, "{report:?}");
        }
        self.proved(&self.model).await;
        self.since = vec![self.model.clone()];
    }

    async fn is(&self, model: &Model) -> bool {
        for question in Model::questions() {
            if self.runner.step(&question).await != model.clone().step(&question) {
                return false;
            }
        }
        true
    }

    /// That the store proves itself, and is what the model is.
    async fn proved(&self, model: &Model) {
        for question in Model::questions() {
            let answer = self.runner.step(&question).await;
            assert_eq!(answer, model.clone().step(&question), "{question:?}");
        }
        let store = self.runner.store();
        let report = store.verify(|_| {}).await.expect("a sound file");
        assert!(report.ok, "{:?}", report.problems);
        let governors = store.list_governors(None, 10).await.expect("a sound file");
        let governors: Vec<&str> = governors.iter().map(GovernorId::as_str).collect();
        assert_eq!(governors, model.governors());
    }
}
