//! `purge`: erase a state with everything that it ever was.

use serde_json::json;
use tai_state::{ChangeMetadata, StateMachinePersister, StateStore};

use crate::args::{Global, Purge};
use crate::failure::{Failure, Outcome, exit};
use crate::{address, connect, fenced, output};

pub(crate) async fn run(global: &Global, args: &Purge) -> Outcome {
    let (governor, state) = address(&args.address)?;
    if !args.yes {
        return Err(Failure::usage(format!("{governor}/{state} and its history would be erased"))
            .hint("it cannot be undone: say --yes"));
    }
    let store = fenced(connect(global, false).await?, &args.conditions)?;
    let persister = StateMachinePersister::with_defaults(store.clone());
    let why = ChangeMetadata::new(&args.why.actor, &args.why.reason, None);
    let bar = output::progress(global, "purging", None);
    let purged = persister.purge(governor, state, why, |events| bar.set_position(events)).await;
    let report = match purged {
        Ok(report) => report,
        Err(error) => return Err(part_way(&store, governor, state, error.into()).await),
    };
    bar.finish_and_clear();
    // Only what was looked at again is reported as gone.
    persister.verify_purge(&report).await?;
    let text = format!(
        "{governor}/{state} is erased: {} events and {} saved snapshots, {} bytes; its tombstone is v{}",
        report.events, report.snapshots, report.recovered_bytes, report.version
    );
    output::object(global.output, &json!(report), &text).map_err(|failure| failure.though(&text))
}

/// A purge counts from its first commit on; what fails after that leaves only something to remove.
async fn part_way(store: &StateStore, governor: &str, state: &str, failure: Failure) -> Failure {
    match store.record(governor, state).await {
        Ok(Some(record)) if record.deleted && record.action == "purge" => failure
            .context(&format!("{governor}/{state} is erased, but not all of its past is removed"))
            .with_exit(exit::PART_WAY)
            .hint("run it again: it removes what is left"),
        _ => failure,
    }
}
