//! The fuzz targets of the command line on what is kept of them in `fuzz/`, and on mutations of it.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use tai_state::testing::fuzz::corpus;
use tai_state_cli::fuzz::TARGETS;

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        const HERE: &[&str] = &[$(stringify!($name)),*];

        $(#[test]
        fn $name() {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
            let target = TARGETS.iter().find(|target| target.name == stringify!($name)).unwrap();
            corpus::replay(target, &root.join("fuzz"));
        })*
    };
}

targets![import_lines, txn_lines, points];

#[test]
fn no_target_is_left_out() {
    assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), HERE);
}
