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
    let mut text = format!(
        "{} states, {} events, {} saved snapshots\ncontent hash {}",
        report.states, report.events, report.snapshots, report.content_hash
    );
    if report.leftovers > 0 {
        text.push_str(&format!(
            "\n{} events were given up and still stand: the next clean-up removes them",
            report.leftovers
        ));
    }
    for problem in &report.problems {
        text.push_str(&format!("\nproblem: {problem}"));
    }
    text.push_str(if report.ok { "\nok" } else { "\nNOT ok" });
    output::object(global.output, &json!(report), &text)?;
    if report.ok {
        return Ok(());
    }
    let message = format!("{} problems in {}", report.problems.len(), store.location());
    Err(Failure::new(exit::INTEGRITY, "corrupt", message)
        .hint("`tai-state recover` makes heads and saved snapshots anew from the log; for the log itself there are backups and exports"))
}
