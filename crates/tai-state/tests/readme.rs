//! What the README shows is in the examples, word for word, and the examples run.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::process::Command;

use tai_state::testing::emulator::{Emulator, fresh_project};

const README: &str = include_str!("../README.md");

#[test]
fn the_first_program_runs_as_it_is_shown() {
    let example = include_str!("../examples/readme.rs");
    let shown = &example[example.find("use ").unwrap()..];
    let block = format!("```rust,no_run\n{shown}```\n");
    assert!(README.contains(&block), "the README shows something else than the example");

    let folder = tempfile::tempdir().unwrap();
    let ran = Command::new(common::built_example("readme")).current_dir(&folder).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(folder.path().join("app.tai").is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_for_firestore_runs_as_it_is_shown() {
    let example = include_str!("../examples/firestore.rs");
    let shown = example.split("FirestoreStore::new(project).await?;\n").nth(1).unwrap();
    let block = format!("FirestoreStore::new(\"my-project\").await?;\n{shown}```\n");
    assert!(README.contains(&block), "the README shows something else than the example");

    let Some(emulator) = Emulator::shared().await else { return };
    let program = common::built_example("firestore");
    let project = fresh_project();
    for (first, second) in [(1, 2), (3, 4)] {
        let ran = Command::new(&program)
            .arg(&project)
            .env("FIRESTORE_EMULATOR_HOST", emulator.address())
            .output()
            .unwrap();
        let out = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{out}{}", String::from_utf8_lossy(&ran.stderr));
        let wanted =
            format!("State: {{\"count\":0}}, Version: {first}\nUpdated to version {second}\n");
        assert_eq!(out, wanted);
    }
}
