//! `cleanup`: remove events and saved snapshots that are older than is wanted.

use serde_json::json;
use tai_state::{CleanupOptions, CleanupReport, StateMachinePersister};

use crate::args::{Cleanup, Global};
use crate::failure::{Failure, Outcome, exit};
use crate::output::{self, time};
use crate::point::Point;
use crate::{connect, fenced};

/// Governors that are asked for in one go.
const PAGE: usize = 100;

pub(crate) async fn run(global: &Global, args: &Cleanup) -> Outcome {
    let options = match (args.older_than, &args.before) {
        (Some(age), _) => CleanupOptions::older_than(age),
        (None, Some(before)) => CleanupOptions::before(Point::time(before)?),
        (None, None) => return Err(Failure::usage("give --older-than or --before")),
    };
    let mut options = options.keep_versions(args.keep_last).batch(usize::from(args.batch));
    if args.dry_run {
        options = options.dry_run();
    }
    let store = fenced(connect(global, false).await?, &args.conditions)?;
    let persister = StateMachinePersister::with_defaults(store.clone());
    let bar = output::progress(global, "cleaning up", None);
    let mut total: Option<CleanupReport> = None;
    let (mut governors, mut after) = (args.governor.clone().into_iter().collect::<Vec<_>>(), None);
    loop {
        if args.governor.is_none() {
            let found = store.list_governors(after.as_ref(), PAGE).await?;
            after = found.last().cloned();
            governors = found.iter().map(ToString::to_string).collect();
        }
        if governors.is_empty() {
            break;
        }
        for governor in governors.drain(..) {
            let before = total.as_ref().map_or(0, |total| total.events);
            let told = |report: &CleanupReport| bar.set_position(before + report.events);
            let report = persister.cleanup(&governor, &options, told).await?;
            total = Some(match total {
                Some(total) => total.and(report),
                None => report,
            });
        }
    }
    bar.finish_and_clear();
    let Some(report) = total else {
        return output::object(global.output, &json!({"states": 0}), "there is nothing here");
    };
    let removed = if report.dry_run { "would be removed" } else { "removed" };
    let mut text = format!(
        "{} of {} states: {} events and {} saved snapshots {removed}, {} bytes; history is kept since {}",
        report.states_trimmed,
        report.states,
        report.events,
        report.snapshots,
        report.recovered_bytes,
        time(&report.cutoff),
    );
    for problem in &report.problems {
        text.push_str(&format!("\nnot cleaned up: {problem}"));
    }
    // The exit code says what was found, whether or not anybody read the rest.
    let shown = output::object(global.output, &json!(report), &text);
    if report.problems.is_empty() {
        return shown;
    }
    let message = format!("{} states are damaged and were passed over", report.problems.len());
    Err(Failure::new(exit::INTEGRITY, "corrupt", message)
        .hint("`tai-state recover` makes heads anew from the log"))
}
