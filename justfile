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

# Everything that is done to the store, at length (TIER=short: in minutes), and docs/torture.md made anew.
torture TIER="long":
    #!/usr/bin/env bash
    set -u
    cargo build --release -p tai-state-torture || exit
    failed=0
    for harm in $(cargo run --quiet --release -p tai-state-torture -- harms); do
        cargo run --quiet --release -p tai-state-torture -- "$harm" --tier {{TIER}} --record docs/torture/results.jsonl || failed=1
    done
    cargo run --quiet --release -p tai-state-torture -- page
    exit "$failed"

# Changes the code in small ways and counts what no test notices: `docs/mutation.md`. Arguments: groups of files.
mutants *GROUPS:
    .ci/mutants {{GROUPS}}
# Fuzzes every target; needs a nightly compiler and cargo-fuzz. Arguments: seconds for each, targets.
fuzz *ARGS:
    fuzz/run {{ARGS}}
