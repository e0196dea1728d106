//! firestore_answers: see `tai_state::testing::fuzz`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tai_state::testing::fuzz::run("firestore_answers", bytes));
