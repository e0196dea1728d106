//! The fuzz targets of the command line on what is kept of them in `fuzz/`, and on mutations of it.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use tai_state::testing::fuzz::corpus;
use tai_state_cli::fuzz::TARGETS;

#[test]
fn every_target_holds_on_what_is_kept_of_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().join("fuzz");
    assert_eq!(TARGETS.len(), 3);
    TARGETS.iter().for_each(|target| corpus::replay(target, &root));
}
