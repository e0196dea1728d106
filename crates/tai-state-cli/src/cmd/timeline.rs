//! `timeline`: the changes of all states of a governor, in the order of their times.

use crate::args::{Global, Timeline};
use crate::connect;
use crate::failure::Outcome;
use crate::output::{Rows, event_json, short, time};
use crate::point::Point;

pub(crate) async fn run(global: &Global, args: &Timeline) -> Outcome {
    let since = args.since.as_deref().map(Point::time).transpose()?;
    let until = args.until.as_deref().map(Point::time).transpose()?;
    let store = connect(global, false).await?;
    let mut timeline = store.timeline(&args.governor, since, until).await?;
    let headings = ["WHEN", "STATE", "VERSION", "ACTION", "BY", "WHY", "DATA"];
    let mut rows = Rows::new(global.output, &headings);
    loop {
        let page = timeline.next_page().await?;
        if page.is_empty() {
            return rows.finish();
        }
        for event in &page {
            rows.push(
                &event_json(event),
                &[
                    time(&event.timestamp),
                    event.to_state.id.to_string(),
                    format!("v{}", event.version()),
                    event.action.clone(),
                    event.metadata.changed_by.clone(),
                    event.metadata.reason.clone(),
                    short(&event.to_state.data),
                ],
            )?;
        }
    }
}
