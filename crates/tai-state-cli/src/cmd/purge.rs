//! `purge`: erase a state with everything that it ever was.

use serde_json::json;
use tai_state::{ChangeMetadata, StateMachinePersister};

use crate::args::{Global, Purge};
use crate::failure::{Failure, Outcome};
use crate::{address, connect, fenced, output};

pub(crate) async fn run(global: &Global, args: &Purge) -> Outcome {
    let (governor, state) = address(&args.address)?;
    if !args.yes {
        return Err(Failure::usage(format!("{governor}/{state} and its history would be erased"))
            .hint("it cannot be undone: say --yes"));
    }
    let store = fenced(connect(global, false).await?, &args.conditions)?;
    let persister = StateMachinePersister::with_defaults(store);
    let why = ChangeMetadata::new(&args.why.actor, &args.why.reason, None);
    let bar = output::progress(global, "purging", None);
    let report = persister.purge(governor, state, why, |events| bar.set_position(events)).await?;
    bar.finish_and_clear();
    // Only what was looked at again is reported as gone.
    persister.verify_purge(&report).await?;
    let text = format!(
        "{governor}/{state} is erased: {} events and {} saved snapshots, {} bytes; its tombstone is v{}",
        report.events, report.snapshots, report.recovered_bytes, report.version
    );
    output::object(global.output, &json!(report), &text)
}
