//! Makes docs/torture.md of what was recorded and of what is written by hand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::record::{self, Record};

fn docs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Writes the page, or says whether it is what would be written.
pub(crate) fn write(only_check: bool) -> ExitCode {
    let page = docs().join("torture.md");
    let text = text();
    if !only_check {
        std::fs::write(&page, text).unwrap();
        return ExitCode::SUCCESS;
    }
    if std::fs::read_to_string(&page).is_ok_and(|is| is == text) {
        return ExitCode::SUCCESS;
    }
    eprintln!("docs/torture.md is not what `tai-state-torture page` makes: run it");
    ExitCode::from(1)
}

/// What is written by hand, with marks where the runs stand.
fn text() -> String {
    let read = |name: &str| std::fs::read_to_string(docs().join("torture").join(name)).unwrap();
    let records = record::read(&docs().join("torture/results.jsonl"));
    let newest = newest(&records);
    read("words.md")
        .replace("{{overview}}", &overview(&newest))
        .replace("{{fuzzing}}", read("fuzzing.txt").trim_end())
        .replace("{{figures}}", &figures(&newest))
}

/// The newest run of each subcommand and tier, the long ones first.
type Newest<'a> = BTreeMap<(&'a str, &'a str), &'a Record>;

fn newest(records: &[Record]) -> Newest<'_> {
    records.iter().map(|record| ((record.tier.as_str(), record.harm.as_str()), record)).collect()
}

/// A line for each of them.
fn overview(newest: &Newest<'_>) -> String {
    let mut text =
        "| tier | kind | verdict | seconds | date | commit |\n|---|---|---|--:|---|---|".to_owned();
    for ((tier, harm), Record { verdict, seconds, date, commit, .. }) in newest {
        let _ = write!(text, "\n| {tier} | `{harm}` | {verdict} | {seconds} | {date} | {commit} |");
    }
    text
}

/// What each of them said.
fn figures(newest: &Newest<'_>) -> String {
    let mut text = String::new();
    for ((tier, harm), record) in newest {
        let counts: Vec<String> =
            record.counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        let _ = writeln!(text, "### `{harm}`, {tier} tier: {}\n", record.verdict);
        let _ = writeln!(text, "{}.\n", counts.join(", "));
        for (what, caught, of) in &record.controls {
            let _ = writeln!(text, "Control, which must be noticed: {what}: {caught} of {of}.\n");
        }
        if !record.notes.is_empty() {
            let _ = writeln!(text, "```text\n{}\n```\n", record.notes.join("\n"));
        }
        for why in &record.skipped {
            let _ = writeln!(text, "Skipped: {why}\n");
        }
        let (date, commit, seconds) = (&record.date, &record.commit, record.seconds);
        let _ = writeln!(text, "{date}, commit {commit}, {seconds} s: `{}`\n", record.replay);
    }
    text.trim_end().to_owned()
}
