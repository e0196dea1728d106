//! `get`: show a state, as it is or as it was.

use tai_state::{StateRecord, StateStore};

use crate::args::{Format, Get, Global};
use crate::failure::{Failure, Outcome, exit};
use crate::output::{compact, object, pretty, state_json, time};
use crate::point::Point;
use crate::{address, connect, output};

pub(crate) async fn run(global: &Global, args: &Get) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let point = args.at.as_deref().map(Point::parse).transpose()?;
    let store = connect(global, false).await?;
    let record = match point {
        None => newest(&store, governor, state).await?,
        Some(point) => store.record_at(governor, state, point).await?,
    };
    let snapshot = &record.snapshot;
    if args.raw {
        return output::line(&match global.output {
            Format::Table => pretty(&snapshot.data),
            Format::Json | Format::Jsonl => compact(&snapshot.data),
        });
    }
    let why = match snapshot.metadata.reason.as_str() {
        "" => String::new(),
        reason => format!("  ({reason})"),
    };
    let text = format!(
        "{governor}/{state}  v{}  {}  {} by {}{why}\n{}",
        snapshot.version,
        time(&snapshot.timestamp),
        record.action,
        snapshot.metadata.changed_by,
        pretty(&snapshot.data)
    );
    object(global.output, &state_json(&record), &text)
}

async fn newest(store: &StateStore, governor: &str, state: &str) -> Outcome<StateRecord> {
    let not_found = |message| Failure::new(exit::NOT_FOUND, "state_not_found", message);
    match store.record(governor, state).await? {
        Some(record) if !record.deleted => Ok(record),
        Some(record) => {
            let (version, when) = (record.snapshot.version, time(&record.snapshot.timestamp));
            let message = format!("{governor}/{state} was deleted with v{version} at {when}");
            let failure = not_found(message);
            // Unless it was purged, or cleaned up, or a log that began elsewhere begins with this.
            let before = version.saturating_sub(1);
            Err(match store.record_at_version(governor, state, before).await {
                Ok(_) => failure.hint(format!("its past is still there: --at v{before}")),
                Err(_) => failure,
            })
        }
        None => Err(not_found(format!("no state {governor}/{state}"))
            .hint("list what exists with `tai-state ls`")),
    }
}
