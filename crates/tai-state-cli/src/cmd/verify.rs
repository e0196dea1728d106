//! `verify`: prove the whole store.

use serde_json::json;
use tai_state::StateStore;

use crate::args::Global;
use crate::failure::{Failure, Outcome, exit};
use crate::output;

pub(crate) async fn run(global: &Global, store: &StateStore) -> Outcome {
    let total = store.get_stats().await.ok().map(|stats| stats.total_events);
    let bar = output::progress(global, "verifying", total);
    let report = store.verify(|events| bar.set_position(events)).await?;
    bar.finish_and_clear();
    let mut text = format!(
        "{} states, {} events, {} saved snapshots\ncontent hash {}",
        report.states, report.events, report.snapshots, report.content_hash
    );
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
        .hint("restore from a backup or an export; what is listed can not be trusted"))
}
