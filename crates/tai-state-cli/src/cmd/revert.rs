//! `revert`: make a state what it was, as a new version on top.

use tai_state::ChangeMetadata;

use crate::args::{Global, Revert};
use crate::failure::Outcome;
use crate::output::{self, event_json};
use crate::point::Point;
use crate::{address, connect, fenced};

pub(crate) async fn run(global: &Global, args: &Revert) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let to = Point::parse(&args.to)?;
    let store = fenced(connect(global, false).await?, &args.conditions)?;
    let why = ChangeMetadata::new(&args.why.actor, &args.why.reason, None);
    let event = store.revert(governor, state, to, why).await?;
    let repeated = event.metadata.context.get("reverted_to").cloned().unwrap_or_default();
    let text = format!("{governor}/{state} is v{}, as it was at v{repeated}", event.version());
    output::object(global.output, &event_json(&event), &text)
        .map_err(|failure| failure.though(&text))
}
