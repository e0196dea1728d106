//! `history`: show the changes of a state, oldest first.

use crate::args::{Global, History};
use crate::failure::Outcome;
use crate::output::{Rows, event_json, time};
use crate::{address, connect};

/// How much of the data a table shows.
const SHOWN_CHARS: usize = 60;

pub(crate) async fn run(global: &Global, args: &History) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let store = connect(global, false).await?;
    let versions = match (args.from, args.to) {
        (None, None) => store.history(governor, state, ..).await?,
        (Some(from), None) => store.history(governor, state, from..).await?,
        (None, Some(to)) => store.history(governor, state, ..=to).await?,
        (Some(from), Some(to)) => store.history(governor, state, from..=to).await?,
    };
    let mut history = versions;
    let mut rows = Rows::new(global.output, &["VERSION", "WHEN", "ACTION", "BY", "WHY", "DATA"]);
    loop {
        let page = history.next_page().await?;
        if page.is_empty() {
            return rows.finish();
        }
        for event in &page {
            let mut data = event.to_state.data.to_string();
            if data.chars().count() > SHOWN_CHARS {
                data = data.chars().take(SHOWN_CHARS).chain(['…']).collect();
            }
            rows.push(
                &event_json(event),
                &[
                    format!("v{}", event.version()),
                    time(&event.timestamp),
                    event.action.clone(),
                    event.metadata.changed_by.clone(),
                    event.metadata.reason.clone(),
                    data,
                ],
            )?;
        }
    }
}
