//! `rm`: delete a state; its history stays.

use serde_json::json;
use tai_state::ChangeMetadata;

use crate::args::{Global, Rm};
use crate::failure::Outcome;
use crate::{address, connect, fenced, once, output};

pub(crate) async fn run(global: &Global, args: &Rm) -> Outcome {
    let (governor, state) = address(&args.address)?;
    let store = fenced(connect(global, false).await?, &args.conditions)?;
    let store = once(store, &args.once)?;
    let why = ChangeMetadata::new(&args.why.actor, &args.why.reason, args.expect);
    let version = store.delete_state(governor, state, args.expect, why).await?;
    let object =
        json!({"governor_id": governor, "state_id": state, "version": version, "deleted": true});
    let text = format!("{governor}/{state} was deleted with v{version}");
    output::object(global.output, &object, &text).map_err(|failure| failure.though(&text))
}
