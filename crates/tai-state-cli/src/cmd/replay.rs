//! `replay`: fold the log of a state and show what comes out; or prove it.

use serde_json::json;
use tai_state::{ConsistencyReport, PointInTime, StateStore};

use super::verify::findings;
use crate::args::{Global, Replay};
use crate::failure::{Failure, Outcome, exit};
use crate::output::{self, event_json, pretty};
use crate::point::Point;
use crate::{address, connect};

pub(crate) async fn run(global: &Global, args: &Replay) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let to = args.to.as_deref().map(Point::parse).transpose()?.map(PointInTime::from);
    let store = connect(global, false).await?;
    if args.verify {
        let report = store.validate_state(governor, state).await?;
        return say(global, &store, &report);
    }
    let mut history = store.history_between(governor, state, None, to).await?;
    let (mut events, mut first, mut last) = (0u64, None, None);
    while let Some(event) = history.next().await? {
        first.get_or_insert(event.version());
        events += 1;
        last = Some(event);
    }
    let Some(last) = last else {
        let message = format!("{governor}/{state} had no version then");
        return Err(Failure::new(exit::NOT_FOUND, "state_not_found", message));
    };
    let (version, first) = (last.version(), first.unwrap_or_default());
    let mut object = event_json(&last);
    if let Some(fields) = object.as_object_mut() {
        fields.insert("events_replayed".into(), events.into());
        fields.insert("first_version".into(), first.into());
    }
    let text = format!(
        "{governor}/{state}  v{version}  from {events} events since v{first}\n{}",
        pretty(&last.to_state.data)
    );
    output::object(global.output, &object, &text)
}

/// Shows what a proof found; an error when something does not hold.
pub(crate) fn say(global: &Global, store: &StateStore, report: &ConsistencyReport) -> Outcome {
    let counts = [report.states, report.events, report.snapshots];
    let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    let text = findings(counts, report.leftovers, &problems);
    // The exit code says what was found, whether or not anybody read the rest.
    let shown = output::object(global.output, &json!(report), &text);
    if report.ok {
        return shown;
    }
    let message = format!("{} problems in {}", report.problems.len(), store.location());
    Err(Failure::new(exit::INTEGRITY, "corrupt", message)
        .hint("`tai-state recover` makes heads and saved snapshots anew from the log"))
}
