//! The short tier of everything, with a fresh seed: a promise that does not hold, or a run that proves
//! nothing, is a failure.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write as _;
use std::process::Command;

fn held(harm: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tai-state-torture"));
    // A seed that is given makes a failure happen again.
    if let Ok(seed) = std::env::var("TAI_STATE_SEED") {
        command.args(["--seed", &seed]);
    }
    let ran = command.args([harm, "--tier", "short"]).output().unwrap();
    let out = String::from_utf8_lossy(&ran.stdout);
    println!("{out}{}", String::from_utf8_lossy(&ran.stderr));
    for line in out.lines().filter(|line| line.starts_with("SKIPPED")) {
        // Past the test runner, which keeps what a test prints as long as it passes.
        std::io::stderr().write_all(format!("\n{line}\n").as_bytes()).unwrap();
    }
    assert!(ran.status.success(), "{harm}: {}", out.lines().last().unwrap_or_default());
}

/// Each subcommand once; what waits for the network runs beside what waits for the disk.
macro_rules! short_tier {
    ($($harm:ident => $name:literal),* $(,)?) => {
        $(#[test]
        fn $harm() {
            held($name);
        })*
    };
}

short_tier! {
    kill => "kill",
    corrupt => "corrupt",
    bank => "bank",
    append => "append",
    locks => "locks",
    soak => "soak",
    net => "net",
    cancel => "cancel",
    powercut => "powercut",
    eio => "eio",
    full_disk => "full-disk",
    volume => "volume",
}

/// docs/torture.md says what was recorded.
#[test]
fn page_is_up_to_date() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tai-state-torture"));
    let ran = command.args(["page", "--check"]).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
