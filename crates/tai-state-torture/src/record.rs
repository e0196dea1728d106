//! Keeps the figures of a run as one line of JSON, of which the page is made.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tai_state::{Clock as _, SystemClock};

use crate::run::{Run, Tally, Verdict};

/// One run, as it is recorded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) harm: String,
    pub(crate) tier: String,
    pub(crate) seed: u64,
    pub(crate) commit: String,
    pub(crate) date: String,
    pub(crate) seconds: u64,
    pub(crate) verdict: String,
    pub(crate) counts: Vec<(String, u64)>,
    pub(crate) controls: Vec<(String, u64, u64)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) skipped: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) notes: Vec<String>,
    pub(crate) replay: String,
}

/// The commit of the sources at hand; a `+` says that they were changed since.
pub(crate) fn commit() -> String {
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        let ran = command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
        ran.ok()
            .filter(|ran| ran.status.success())
            .map(|ran| String::from_utf8_lossy(&ran.stdout).trim().to_owned())
    };
    let Some(hash) = git(&["rev-parse", "--short=10", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let changed =
        git(&["status", "--porcelain", "--", ":!docs"]).is_none_or(|text| !text.is_empty());
    format!("{hash}{}", if changed { "+" } else { "" })
}

pub(crate) fn append(file: &Path, run: &Run, tally: &Tally, verdict: Verdict, took: Duration) {
    let record = Record {
        harm: run.harm.name().to_owned(),
        tier: run.tier.name().to_owned(),
        seed: run.seed,
        commit: commit(),
        date: SystemClock.now().to_rfc3339().chars().take(10).collect(),
        seconds: took.as_secs(),
        verdict: verdict.name().to_owned(),
        counts: tally.counts().to_vec(),
        controls: tally.controls.iter().map(|c| (c.what.clone(), c.caught, c.of)).collect(),
        skipped: tally.skipped.clone(),
        notes: tally.notes.clone(),
        replay: run.replay(),
    };
    let mut file = OpenOptions::new().create(true).append(true).open(file).unwrap();
    writeln!(file, "{}", serde_json::to_string(&record).unwrap()).unwrap();
}

/// What was recorded, in the order in which it happened.
pub(crate) fn read(file: &Path) -> Vec<Record> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
