# `just` lists what there is.
default:
    @just --list

# The newcomer's main job.
demo:
    cargo run --release -- demo

# Every test.
test:
    ./test

# All that must hold before a change lands.
ci:
    .ci/run

# The embedded engine beside its disk. Arguments: a folder, a number of events.
bench *ARGS:
    cargo bench -p tai-state --bench embedded -- {{ARGS}}

# Fuzzes every target; needs a nightly compiler and cargo-fuzz. Arguments: seconds for each, targets.
fuzz *ARGS:
    fuzz/run {{ARGS}}

# Longer runs of the tests that draw their cases.
torture ROUNDS="1000":
    TAI_STATE_ROUNDS={{ROUNDS}} cargo test --release -p tai-state --test damage -- --nocapture
    TAI_STATE_ROUNDS={{ROUNDS}} cargo test --release -p tai-state-cli --test kill -- --nocapture nothing_acknowledged
