//! What locks keep when their holders are stopped, killed, or have a wrong clock, and what they do not.

mod counter;
mod grants;
// What the tests of the command line drive their locks with.
#[allow(dead_code)]
#[path = "../../tai-state-cli/tests/locks/tree.rs"]
mod tree;
mod wrong_clocks;

use std::panic::resume_unwind;
use std::process::Command;

use serde_json::Value;

use crate::args::Tier;
use crate::engine::{Engine, Store};
use crate::run::{Run, Tally};
use crate::tool;
use tree::Tree;

/// A command that says its token and ends with its input.
pub(crate) const HOLD: &str = r#"echo "$TAI_LOCK_TOKEN"; read -r _; exit 0"#;

/// A script of the shell `bash`.
fn bash(script: &str) -> Command {
    let mut command = Command::new("bash");
    tool::apart(&mut command);
    command.args(["-c", script]);
    command
}

/// A script of the shell that runs, or waits to run, under a lock.
pub(crate) fn running(store: &Store, name: &str, options: &[&str], script: &str) -> Tree {
    let args = [&["-o", "json", "locks", "run", name], options, &["--", "bash", "-c", script]];
    Tree::start(store.command(&args.concat()))
}

fn show(store: &Store, name: &str) -> Value {
    store.json(&["locks", "show", name]).ok().json()
}

fn fence(name: &str, token: u64) -> String {
    format!("{name}={token}")
}

pub(crate) async fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    let emulator = Engine::emulator(&mut tally, "locks on the emulator").await;
    let runtime = tokio::runtime::Handle::current();
    let is_long = run.tier == Tier::Long;
    let engines: Vec<Engine> = [Some(Engine::File), emulator].into_iter().flatten().collect();
    // The size is how many seeds the stopped clients have.
    let rounds = run.size(1, 5);
    for (round, mut random) in run.rounds(rounds) {
        let parts = tokio::task::block_in_place(|| {
            std::thread::scope(|scope| {
                let mut threads = Vec::new();
                // Most of it is waiting, so that all of it goes on at the same time.
                for engine in engines.iter().copied() {
                    let is_file = engine == Engine::File;
                    let (one, two, three) = (random.split(), random.split(), random.split());
                    let seconds = match (is_long, is_file) {
                        (false, _) => 22,
                        (true, true) => 60,
                        (true, false) => 40,
                    };
                    threads
                        .push(scope.spawn(move || counter::behind_a_fence(engine, seconds, one)));
                    threads.push(scope.spawn(move || counter::late(engine, two)));
                    if round > 0 {
                        continue;
                    }
                    let many = match (is_long, is_file) {
                        (false, true) => 500,
                        (false, false) => 100,
                        (true, true) => 10_000,
                        (true, false) => 1_000,
                    };
                    let runtime = &runtime;
                    threads.push(
                        scope.spawn(move || {
                            grants::tokens_rise_by_one(engine, many, three, runtime)
                        }),
                    );
                }
                if round == 0 {
                    let clocks = &wrong_clocks::CLOCKS[..if is_long { 5 } else { 3 }];
                    let engines = &engines;
                    let runtime = &runtime;
                    threads.push(
                        scope.spawn(move || wrong_clocks::wrong(engines, clocks, runtime, is_long)),
                    );
                }
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
                    .collect::<Vec<_>>()
            })
        });
        parts.into_iter().for_each(|part| tally.add(part));
    }
    tally.at_least("of older tokens refused outside", engines.len() as u64);
    if tally.counted(wrong_clocks::JUMPED) > 0 {
        tally.at_least(wrong_clocks::SEEN, engines.len() as u64);
    }
    let runs = rounds * engines.len() as u64;
    tally.at_least("runs with enough writes and somebody late", runs);
    tally.at_least("runs of late writers of whom one was refused", runs);
    tally
}
