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

/// What is written by hand, with `{{figures}}` where the runs stand.
fn text() -> String {
    let words = std::fs::read_to_string(docs().join("torture/words.md")).unwrap();
    words.replace("{{figures}}", &figures(&record::read(&docs().join("torture/results.jsonl"))))
}

/// The newest run of each subcommand and tier, the long ones first.
fn figures(records: &[Record]) -> String {
    let mut newest: BTreeMap<(&str, &str), &Record> = BTreeMap::new();
    for record in records {
        newest.insert((&record.tier, &record.harm), record);
    }
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
