//! The examples run, on every backend, and are short enough to be read.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::path::Path;
use std::process::Command;

use common::{Make, built_example, open, proved};
use tai_state::StateStore;
use tai_state::testing::emulator::{Emulator, fresh_project};

/// Includes examples that work on a store, and runs each twice on one: what a reader has tried, a reader
/// tries again.
macro_rules! examples {
    ($($name:ident in $path:literal),* $(,)?) => {
        $(#[allow(dead_code, unreachable_pub)]
        #[path = $path]
        mod $name;
        async fn $name(make: Make<'_>) {
            let store = open(make);
            for _ in 0..2 {
                $name::run(store.clone()).await.unwrap();
            }
            proved(&store).await;
        })*
        on_every_backend![$($name),*];
        const RUN_ON_A_STORE: &[&str] = &[$(stringify!($name)),*];
    };
}

examples![
    simple_state in "../examples/simple_state.rs",
    optimistic_update in "../examples/optimistic_update.rs",
    transfer in "../examples/transfer.rs",
    event_sourcing in "../examples/event_sourcing.rs",
    conflicts in "../examples/conflicts.rs",
    exclusive_section in "../examples/exclusive_section.rs",
    time_travel in "../examples/time_travel.rs",
];
/// Run as a process below, and by `readme.rs`.
const RUN_AS_A_PROCESS: &[&str] = &["crash_recovery", "firestore", "readme"];

/// What stands behind these words, as a number.
fn number(out: &str, words: &str) -> u64 {
    let said = out.split(words).nth(1).unwrap_or_else(|| panic!("no {words:?} in:\n{out}"));
    said.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// Runs the example twice: it kills its own child each time, and goes on where that one ended.
async fn killed_twice_on(url: &str) {
    let mut before = 0;
    for _ in 0..2 {
        let ran = Command::new(built_example("crash_recovery")).arg(url).output().unwrap();
        let out = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{out}{}", String::from_utf8_lossy(&ran.stderr));
        let acknowledged = number(&out, "the last acknowledged version was ");
        let found = number(&out, "the store has v");
        assert!(acknowledged >= before + 250, "{out}");
        assert!(found == acknowledged || found == acknowledged + 1, "{out}");
        let store = StateStore::connect(url).await.unwrap();
        assert!(store.get_state("museum", "door").await.unwrap().1 >= found);
        before = found;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_recovery_on_a_file() {
    let folder = tempfile::tempdir().unwrap();
    killed_twice_on(folder.path().join("museum.tai").to_str().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_recovery_on_the_emulator() {
    let Some(emulator) = Emulator::shared().await else { return };
    let url = format!("firestore+emulator://{}/{}", emulator.address(), fresh_project());
    killed_twice_on(&url).await;
}

#[test]
fn every_example_is_short_and_run_and_in_the_readme() {
    let readme = include_str!("../README.md");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        assert!(lines < 80, "{name} has {lines} lines: an example must be read at a glance");
        let doc: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let how = format!("cargo run -p tai-state --example {name}");
        assert!(doc.contains(&how), "{name} does not say how to run it");
        assert!(readme.contains(&format!("`{name}`")), "the README does not list {name}");
        found.push(name);
    }
    let mut run = [RUN_ON_A_STORE, RUN_AS_A_PROCESS].concat();
    found.sort_unstable();
    run.sort_unstable();
    assert_eq!(found, run, "not every example is run by a test");
    assert!(include_str!("readme.rs").contains("built_example(\"firestore\")"));
}
