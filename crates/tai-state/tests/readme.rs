//! What the README shows for Firestore is the example, and the example runs.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::process::Command;

use tai_state::testing::emulator::{Emulator, fresh_project};

#[tokio::test(flavor = "multi_thread")]
async fn the_example_runs_as_the_readme_says() {
    let example = include_str!("../examples/firestore.rs");
    let readme = include_str!("../README.md");
    let body = example.split("FirestoreStore::new(project).await?;\n\n").nth(1).unwrap();
    let body = body.split("    Ok(())\n}").next().unwrap();
    let shown: String = body
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line)))
        .collect();
    assert!(readme.contains(&shown), "the README shows something else than the example");

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
