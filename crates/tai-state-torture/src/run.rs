//! What a run is given, what it counts, and the verdict on it.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::args::{Args, Harm, Tier};
use crate::random::Random;
use crate::{record, tool};

/// What a run is given.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) harm: Harm,
    pub(crate) seed: u64,
    pub(crate) tier: Tier,
    size: Option<u64>,
    only: Option<u64>,
    record: Option<PathBuf>,
}

impl Run {
    pub(crate) fn new(args: &Args, harm: Harm) -> Self {
        if let Some(binary) = &args.binary {
            tool::use_binary(binary);
        }
        let seed = args.seed.unwrap_or_else(Random::fresh_seed);
        let Args { tier, size, only, record, .. } = args;
        Self { harm, seed, tier: *tier, size: *size, only: *only, record: record.clone() }
    }

    /// How much is done: what the tier says, unless the command line says otherwise.
    pub(crate) fn size(&self, short: u64, long: u64) -> u64 {
        self.size.unwrap_or(match self.tier {
            Tier::Short => short,
            Tier::Long => long,
        })
    }

    /// The numbers of the rounds, and a generator for each, whatever the others drew.
    pub(crate) fn rounds(&self, many: u64) -> impl Iterator<Item = (u64, Random)> {
        let seed = self.seed;
        let chosen = self.only;
        (0..many)
            .filter(move |n| chosen.is_none_or(|only| only == *n))
            .map(move |n| (n, Random::of_round(seed, n)))
    }

    /// The line that does the same again.
    pub(crate) fn replay(&self) -> String {
        let size = self.size.map(|size| format!(" --size {size}")).unwrap_or_default();
        let (name, seed, tier) = (self.harm.name(), self.seed, self.tier.name());
        format!(
            "cargo run --release -p tai-state-torture -- {name} --seed {seed} --tier {tier}{size}"
        )
    }

    /// Runs it, prints the verdict, records it if asked.
    pub(crate) fn judge(&self, deed: impl FnOnce(&Self) -> Tally) -> ExitCode {
        println!("{}: {} tier, seed {}", self.harm.name(), self.tier.name(), self.seed);
        let started = Instant::now();
        // A panic anywhere is a failure of the run, and the seed must come out all the same.
        let tally = catch_unwind(AssertUnwindSafe(|| deed(self))).unwrap_or_else(|panic| {
            let mut tally = Tally::default();
            tally.broken(format!("a panic: {}", text_of(&*panic)));
            tally
        });
        let took = started.elapsed();
        let verdict = tally.verdict(self.only.is_some());
        println!("{}", tally.summary(self, verdict, took));
        if verdict != Verdict::Held {
            println!("replay: {}", self.replay());
            println!("commit: {}", record::commit());
        }
        if let Some(file) = &self.record {
            record::append(file, self, &tally, verdict, took);
        }
        match verdict {
            Verdict::Held | Verdict::Skipped => ExitCode::SUCCESS,
            Verdict::Broken => ExitCode::from(1),
            Verdict::Invalid => ExitCode::from(3),
        }
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "without words".to_owned())
}

/// What a run was worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Held,
    Broken,
    /// It proves nothing: a control was not caught, or there was too little traffic.
    Invalid,
    /// What it needs is not on this machine.
    Skipped,
}

impl Verdict {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Broken => "BROKEN",
            Self::Invalid => "INVALID",
            Self::Skipped => "SKIPPED",
        }
    }
}

/// A variant that is broken on purpose, and how often that was noticed.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    pub(crate) what: String,
    pub(crate) caught: u64,
    pub(crate) of: u64,
    pub(crate) least: u64,
}

/// What a run has counted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    counts: Vec<(String, u64)>,
    /// Counts of which the highest is kept.
    maxima: BTreeSet<String>,
    least: BTreeMap<String, u64>,
    pub(crate) controls: Vec<Control>,
    broken: Vec<String>,
    pub(crate) skipped: Vec<String>,
    pub(crate) notes: Vec<String>,
}

impl Tally {
    /// Adds to a count; counts are printed in the order in which they first came.
    pub(crate) fn count(&mut self, what: &str, n: u64) {
        match self.counts.iter_mut().find(|(name, _)| name == what) {
            Some((_, count)) => *count += n,
            None => self.counts.push((what.to_owned(), n)),
        }
    }

    /// Keeps the highest: a longest time, a largest size.
    pub(crate) fn highest(&mut self, what: &str, n: u64) {
        self.maxima.insert(what.to_owned());
        match self.counts.iter_mut().find(|(name, _)| name == what) {
            Some((_, count)) => *count = n.max(*count),
            None => self.counts.push((what.to_owned(), n)),
        }
    }

    pub(crate) fn counted(&self, what: &str) -> u64 {
        self.counts.iter().find(|(name, _)| name == what).map_or(0, |(_, count)| *count)
    }

    pub(crate) fn counts(&self) -> &[(String, u64)] {
        &self.counts
    }

    /// With less than this of it the run proves nothing.
    pub(crate) fn at_least(&mut self, what: &str, least: u64) {
        self.count(what, 0);
        self.least.insert(what.to_owned(), least);
    }

    /// A promise was broken, and how.
    pub(crate) fn broken(&mut self, how: impl Into<String>) {
        let how = how.into();
        // The first few say what it is; all of a long run would bury them.
        if self.broken.len() < 20 {
            println!("  BROKEN: {how}");
        }
        self.broken.push(how);
    }

    /// Broken unless it holds.
    pub(crate) fn holds(&mut self, holds: bool, how: impl FnOnce() -> String) {
        if !holds {
            self.broken(how());
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        !self.broken.is_empty()
    }

    /// A line of figures that is kept as it is.
    pub(crate) fn note(&mut self, line: impl Into<String>) {
        let line = line.into();
        println!("  {line}");
        self.notes.push(line);
    }

    /// A part of the run that needs what this machine has not.
    pub(crate) fn skip(&mut self, why: impl Into<String>) {
        let why = why.into();
        println!("SKIPPED: {why}");
        self.skipped.push(why);
    }

    /// A variant broken on purpose was run `of` times and caught so often; fewer than `least`, and
    /// the harness has no teeth.
    pub(crate) fn control(&mut self, what: &str, caught: u64, of: u64, least: u64) {
        match self.controls.iter_mut().find(|control| control.what == what) {
            Some(control) => {
                control.caught += caught;
                control.of += of;
                control.least += least;
            }
            None => self.controls.push(Control { what: what.to_owned(), caught, of, least }),
        }
    }

    /// Takes in what another part of the run has counted.
    pub(crate) fn add(&mut self, other: Self) {
        for (what, n) in &other.counts {
            match other.maxima.contains(what) {
                true => self.highest(what, *n),
                false => self.count(what, *n),
            }
        }
        self.least.extend(other.least);
        for Control { what, caught, of, least } in other.controls {
            self.control(&what, caught, of, least);
        }
        self.broken.extend(other.broken);
        self.skipped.extend(other.skipped);
        self.notes.extend(other.notes);
    }

    fn too_little(&self) -> Vec<String> {
        let few = self.least.iter().filter(|(what, least)| self.counted(what) < **least);
        let few = few.map(|(what, least)| {
            format!("{} {what}, at least {least} are needed", self.counted(what))
        });
        let blind = self.controls.iter().filter(|control| control.caught < control.least);
        let blind = blind.map(|control| {
            let Control { what, caught, of, least } = control;
            format!("control `{what}`: caught {caught} of {of}, at least {least} are needed")
        });
        few.chain(blind).collect()
    }

    /// A single round that is looked at again has its own traffic.
    fn verdict(&self, is_single: bool) -> Verdict {
        if self.is_broken() {
            Verdict::Broken
        } else if self.counts.is_empty() && !self.skipped.is_empty() {
            Verdict::Skipped
        } else if !is_single && !self.too_little().is_empty() {
            Verdict::Invalid
        } else {
            Verdict::Held
        }
    }

    /// One line: the verdict, the counts, the controls, the seed.
    fn summary(&self, run: &Run, verdict: Verdict, took: Duration) -> String {
        let mut parts: Vec<String> =
            self.counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        parts.push(format!("{} promises broken", self.broken.len()));
        for Control { what, caught, of, .. } in &self.controls {
            parts.push(format!("control `{what}` caught {caught} of {of}"));
        }
        if verdict == Verdict::Invalid {
            parts.extend(self.too_little());
        }
        format!(
            "{}: {}: {} (seed {}, {:.1} s)",
            run.harm.name(),
            verdict.name(),
            parts.join(", "),
            run.seed,
            took.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proves_nothing_is_not_green() {
        let mut tally = Tally::default();
        tally.count("cycles", 3);
        assert_eq!(tally.verdict(false), Verdict::Held);
        tally.at_least("cycles", 4);
        assert_eq!(tally.verdict(false), Verdict::Invalid);
        assert_eq!(tally.verdict(true), Verdict::Held);
        tally.count("cycles", 1);
        assert_eq!(tally.verdict(false), Verdict::Held);
        tally.control("syncs ignored", 8, 10, 9);
        assert_eq!(tally.verdict(false), Verdict::Invalid);
        tally.broken("lost one");
        assert_eq!(tally.verdict(false), Verdict::Broken);
    }

    #[test]
    fn parts_add_up() {
        let (mut a, mut b) = (Tally::default(), Tally::default());
        a.count("images", 2);
        b.count("images", 3);
        b.at_least("images", 6);
        b.broken("no");
        a.highest("ms", 7);
        b.highest("ms", 5);
        a.add(b);
        assert_eq!(a.counted("ms"), 7);
        assert_eq!((a.counted("images"), a.is_broken()), (5, true));
        assert_eq!(a.too_little(), ["5 images, at least 6 are needed"]);
    }
}
