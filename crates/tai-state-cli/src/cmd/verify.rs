//! `verify`: prove the whole store.

use serde_json::json;
use tai_state::StateStore;

use crate::args::{Global, Verify};
use crate::failure::{Failure, Outcome, exit};
use crate::output;

pub(crate) async fn run(global: &Global, store: &StateStore, args: &Verify) -> Outcome {
    if let Some(governor) = &args.governor {
        return super::replay::say(global, store, &store.validate_consistency(governor).await?);
    }
    let total = store.get_stats().await.ok().map(|stats| stats.total_events);
    let bar = output::progress(global, "verifying", total);
    let report = store.verify(|events| bar.set_position(events)).await?;
    bar.finish_and_clear();
    let counts = [report.states, report.events, report.snapshots];
    let hash = format!("content hash {}\n", report.content_hash);
    let text = hash + &findings(counts, report.leftovers, &report.problems);
    // The exit code says what was found, whether or not anybody read the rest.
    let shown = output::object(global.output, &json!(report), &text);
    if report.ok {
        return shown;
    }
    let message = format!("{} problems in {}", report.problems.len(), store.location());
    Err(Failure::new(exit::INTEGRITY, "corrupt", message)
        .hint("`tai-state recover` makes heads and saved snapshots anew from the log; for the log itself there are backups and exports"))
}

/// What a proof found, for people.
pub(crate) fn findings(counts: [u64; 3], leftovers: u64, problems: &[String]) -> String {
    let [states, events, snapshots] = counts;
    let mut text = format!("{states} states, {events} events, {snapshots} saved snapshots");
    if leftovers > 0 {
        text.push_str(&format!(
            "\n{leftovers} events were given up and still stand: the next clean-up removes them"
        ));
    }
    for problem in problems {
        text.push_str(&format!("\nproblem: {problem}"));
    }
    text.push_str(if problems.is_empty() { "\nok" } else { "\nNOT ok" });
    text
}
