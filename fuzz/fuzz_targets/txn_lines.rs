//! txn_lines: see `tai_state_cli::fuzz`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tai_state_cli::fuzz::run("txn_lines", bytes));
