//! `history`: show the changes of a state, oldest first.

use tai_state::PointInTime;

use crate::args::{Global, History};
use crate::failure::Outcome;
use crate::output::{Rows, event_json, short, time};
use crate::point::Point;
use crate::{address, connect};

pub(crate) async fn run(global: &Global, args: &History) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let point = |text: &Option<String>, version: Option<u64>| match text {
        Some(text) => Point::parse(text).map(|point| Some(PointInTime::from(point))),
        None => Ok(version.map(PointInTime::Version)),
    };
    let (from, to) = (point(&args.since, args.from)?, point(&args.until, args.to)?);
    let store = connect(global, false).await?;
    let mut history = store.history_between(governor, state, from, to).await?;
    let mut rows = Rows::new(global.output, &["VERSION", "WHEN", "ACTION", "BY", "WHY", "DATA"]);
    loop {
        let page = history.next_page().await?;
        if page.is_empty() {
            return rows.finish();
        }
        for event in &page {
            rows.push(
                &event_json(event),
                &[
                    format!("v{}", event.version()),
                    time(&event.timestamp),
                    event.action.clone(),
                    event.metadata.changed_by.clone(),
                    event.metadata.reason.clone(),
                    short(&event.to_state.data),
                ],
            )?;
        }
    }
}
