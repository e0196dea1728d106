//! The fuzz targets on what is kept of them in `fuzz/`, and on mutations of it.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tai_state::testing::fuzz::{TARGETS, corpus};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().join("fuzz")
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        const HERE: &[&str] = &[$(stringify!($name)),*];

        $(#[test]
        fn $name() {
            let target = TARGETS.iter().find(|target| target.name == stringify!($name)).unwrap();
            corpus::replay(target, &root());
        })*
    };
}

targets![chain, firestore_answers, firestore_values, json, names, operations, record, url];

#[test]
fn no_target_is_left_out() {
    let ours: BTreeSet<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(ours, HERE.iter().copied().collect());
    // Those that `cargo fuzz` knows, each with its corpus; the others are the command line's.
    let names = |folder: &str| -> BTreeSet<String> {
        let entries = std::fs::read_dir(root().join(folder)).unwrap();
        let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        entries.map(|entry| stem(entry.unwrap().path())).collect()
    };
    let all = names("fuzz_targets");
    assert_eq!(names("corpus"), all);
    assert!(ours.iter().all(|name| all.contains(*name)), "{all:?}");
    assert!(names("regressions").is_subset(&all));
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for name in &all {
        assert!(manifest.contains(&format!("fuzz_targets/{name}.rs")), "{name}");
    }
}
