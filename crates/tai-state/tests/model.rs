//! One random program on every engine: equal answers, equal error codes, equal exports, and all as the
//! model says; the file is also closed and opened, and copied as a crash leaves it.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use common::Random;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest};
use tai_state::testing::emulator::Emulator;
use tai_state::testing::fuzz::Input;
use tai_state::testing::program::{Model, Runner, Step, beginning, folder, options};
use tai_state::{ManualClock, StateStore};
use tokio::runtime::Runtime;

/// A step, or what happens to the file.
#[derive(Debug, Clone)]
enum Transition {
    Step(Step),
    Reopen,
    Crash,
}

struct Program;

impl ReferenceStateMachine for Program {
    type State = Model;
    type Transition = Transition;

    fn init_state() -> BoxedStrategy<Model> {
        Just(Model::default()).boxed()
    }

    fn transitions(_: &Model) -> BoxedStrategy<Transition> {
        let step = prop::collection::vec(any::<u8>(), 48)
            .prop_map(|recipe| Transition::Step(Step::drawn(&mut Input::new(&recipe))));
        prop_oneof![40 => step, 1 => Just(Transition::Reopen), 1 => Just(Transition::Crash)].boxed()
    }

    fn apply(mut model: Model, transition: &Transition) -> Model {
        if let Transition::Step(step) = transition {
            let _ = model.step(step);
        }
        model
    }
}

/// The stores under test, with one clock, and the model as it was before the step at hand.
struct Engines {
    runtime: Runtime,
    folder: tempfile::TempDir,
    number: usize,
    clock: Arc<ManualClock>,
    memory: Runner,
    file: Runner,
    emulator: Option<Runner>,
    model: Model,
}

impl Engines {
    fn new(emulator: Option<&str>) -> Self {
        let runtime = Runtime::new().unwrap();
        let folder = folder().unwrap();
        let clock = Arc::new(ManualClock::at(beginning()));
        let memory = Runner::new(StateStore::in_memory_with(options(clock.clone())));
        let file = runtime.block_on(open(&folder.path().join("0.tai"), &clock));
        let emulator = emulator.map(|address| {
            let store = common::on_emulator(address, options(clock.clone()));
            Runner::new(runtime.block_on(store))
        });
        let model = Model::default();
        Self { runtime, folder, number: 0, clock, memory, file, emulator, model }
    }

    fn engines(&self) -> Vec<(&'static str, &Runner)> {
        let mut engines = vec![("memory", &self.memory), ("file", &self.file)];
        engines.extend(self.emulator.as_ref().map(|runner| ("emulator", runner)));
        engines
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(format!("{}.tai", self.number))
    }

    fn step(&mut self, step: &Step) {
        let foretold = self.model.step(step);
        self.clock.set(self.model.now());
        let kind = match &foretold {
            Ok(_) => "ok",
            Err(code) => code.split(' ').next().unwrap_or_default(),
        };
        ANSWERS.with_borrow_mut(|answers| *answers.entry(kind.to_owned()).or_default() += 1);
        for (name, runner) in self.engines() {
            let answer = self.runtime.block_on(runner.step(step));
            assert_eq!(answer, foretold, "{name} says something else to {step:?}");
        }
    }

    /// The file as it is left: by an orderly end, or, as a copy, by a crash.
    fn leave(&mut self, crash: bool) {
        let left = self.path();
        if crash {
            self.number += 1;
            std::fs::copy(&left, self.path()).unwrap();
            let log = left.with_extension("tai-wal");
            if log.exists() {
                std::fs::copy(log, self.path().with_extension("tai-wal")).unwrap();
            }
        }
        self.file = Runner::new(StateStore::in_memory());
        self.file = self.runtime.block_on(open(&self.path(), &self.clock));
    }

    /// Everything that can be asked, and one export and one hash for all.
    fn agree(&self) {
        let questions = Model::questions();
        let mut exports = Vec::new();
        for (name, runner) in self.engines() {
            for question in &questions {
                let answer = self.runtime.block_on(runner.step(question));
                assert_eq!(answer, self.model.clone().step(question), "{name}: {question:?}");
            }
            let hash = self.runtime.block_on(common::proved(runner.store()));
            let mut lines = Vec::new();
            let exported = runner.store().export(None, &mut lines, |_| {});
            let summary = self.runtime.block_on(exported).unwrap();
            assert_eq!(summary.content_hash.to_string(), hash);
            exports.push((name, hash, String::from_utf8(lines).unwrap()));
        }
        let (_, hash, lines) = &exports[0];
        for (name, other, theirs) in &exports[1..] {
            assert_eq!((other, theirs), (hash, lines), "{name} exports something else");
        }
    }
}

async fn open(path: &std::path::Path, clock: &Arc<ManualClock>) -> Runner {
    Runner::new(StateStore::open_with(path, options(clock.clone())).await.unwrap())
}

impl StateMachineTest for Engines {
    type SystemUnderTest = Self;
    type Reference = Program;

    fn init_test(_: &Model) -> Self {
        Self::new(EMULATOR.with_borrow(Clone::clone).as_deref())
    }

    fn apply(mut engines: Self, model: &Model, transition: Transition) -> Self {
        match transition {
            Transition::Step(step) => engines.step(&step),
            Transition::Reopen => engines.leave(false),
            Transition::Crash => engines.leave(true),
        }
        assert_eq!(engines.model, *model);
        engines
    }

    fn teardown(engines: Self, _: Model) {
        engines.agree();
    }
}

thread_local! {
    /// How often each kind of answer was given.
    static ANSWERS: RefCell<BTreeMap<String, u64>> = RefCell::default();
    /// The emulator that the cases of this thread use.
    static EMULATOR: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// `TAI_STATE_ROUNDS`, or so many.
fn rounds(usual: u32) -> u32 {
    std::env::var("TAI_STATE_ROUNDS").map_or(usual, |rounds| rounds.parse().unwrap())
}

/// Runs so many programs of so many steps.
fn programs(what: &str, cases: u32, steps: Range<usize>, emulator: Option<String>) {
    let mut seed = Random::announced(what);
    EMULATOR.set(emulator);
    let config =
        Config { cases, max_shrink_iters: 400, failure_persistence: None, ..Config::default() };
    let bytes: Vec<u8> = (0..4).flat_map(|_| seed.next().to_le_bytes()).collect();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let count = Cell::new((0u64, 0u64));
    let strategy = Program::sequential_strategy(steps);
    let outcome = runner.run(&strategy, |(model, transitions, seen)| {
        let (programs, all) = count.get();
        count.set((programs + 1, all + transitions.len() as u64));
        Engines::test_sequential(Config::default(), model, transitions, seen);
        Ok(())
    });
    let (programs, steps) = count.get();
    let answers = ANSWERS.take();
    println!("{what}: {programs} programs of {steps} steps: {answers:?}");
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    let answered: u64 = answers.values().sum();
    let done = answers.get("ok").copied().unwrap_or_default();
    assert!(programs >= u64::from(cases), "too few to say anything");
    assert!(done * 3 > answered, "mostly refusals say little");
}

#[test]
fn memory_and_file_are_what_the_model_says() {
    programs("model on memory and a file", rounds(30), 20..140, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_emulator_is_what_the_model_says_too() {
    let Some(emulator) = Emulator::shared().await else { return };
    let address = emulator.address().to_owned();
    // There each query costs as much as there are documents.
    let cases = rounds(30).div_ceil(10);
    let run = move || programs("model on the emulator too", cases, 10..40, Some(address));
    tokio::task::spawn_blocking(run).await.unwrap();
}
