//! The tests of the library and of the command line that draw their cases, run where their figures can be
//! seen and kept. They are part of every run of the tests; this only writes down what they say.

use std::process::Command;

use crate::args::Tier;
use crate::run::{Run, Tally};
use crate::tool;

/// A test program, and the tests in it, by the beginning of their names.
struct Program {
    package: &'static str,
    target: &'static [&'static str],
    tests: &'static [&'static str],
}

const fn program(
    package: &'static str,
    target: &'static [&'static str],
    tests: &'static [&'static str],
) -> Program {
    Program { package, target, tests }
}

const PROGRAMS: &[Program] = &[
    // Snapshots, heads and logs that lie.
    program("tai-state", &["--test", "lying"], &["one_damage"]),
    // Lost answers: the k-th commit, every fault.
    program("tai-state", &["--test", "wire"], &[]),
    program("tai-state", &["--test", "settling"], &[]),
    // Merges and resolvers, 10,000 cases each.
    program("tai-state", &["--lib"], &["conflict"]),
    // Clean-up and purge, killed.
    program("tai-state-cli", &["--test", "kill_cleanup"], &[]),
    // The real log: an import that is killed; the past as a fold says.
    program("tai-state-cli", &["--test", "kill"], &[]),
    program("tai-state-cli", &["--test", "past"], &[]),
    program("tai-state-cli", &["--test", "import"], &[]),
];

/// A million events: memory and rates.
const VOLUME: &[&str] = &["bench", "--quiet", "-p", "tai-state", "--bench", "volume"];

pub(crate) fn run(run: &Run) -> Tally {
    let mut tally = Tally::default();
    for Program { package, target, tests } in PROGRAMS {
        let mut args = vec!["test", "--quiet", "--release", "-p", package, "--all-features"];
        args.extend(*target);
        args.push("--");
        args.extend(*tests);
        args.extend(["--nocapture", "--test-threads", "1"]);
        let what = format!("{package} {}", target.join(" "));
        said(run, &what, &args, &mut tally);
    }
    if run.tier == Tier::Long {
        said(run, "a million events", VOLUME, &mut tally);
    }
    tally.at_least("tests passed", 30);
    tally
}

fn said(run: &Run, what: &str, args: &[&str], tally: &mut Tally) {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env("TAI_STATE_SEED", run.seed.to_string());
    let ran = tool::ran(command, b"");
    tally.holds(ran.exit == 0, || format!("{what}: exit {}: {}{}", ran.exit, ran.out, ran.err));
    for line in ran.out.lines() {
        let mut words = line.split_whitespace();
        if let Some(passed) = line.strip_prefix("test result: ok. ") {
            let passed = passed.split_whitespace().next().and_then(|n| n.parse().ok());
            tally.count("tests passed", passed.unwrap_or(0));
        } else if words.any(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            && !line.starts_with("running ")
        {
            tally.note(format!("{what}: {}", line.trim()));
        }
    }
}
