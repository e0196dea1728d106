//! `init`: make a new, empty store.

use serde_json::json;
use tai_state::StoreUrl;

use crate::args::Global;
use crate::failure::{Failure, Outcome, exit};
use crate::{connect, output, url};

pub(crate) async fn run(global: &Global) -> Outcome {
    let parsed: StoreUrl = url(global)?.parse()?;
    if let StoreUrl::File { path } = &parsed
        && path.symlink_metadata().is_ok()
    {
        let message = format!("{} exists already", path.display());
        return Err(Failure::new(exit::CONFLICT, "exists", message)
            .hint("an existing store needs no init; any other file is left alone"));
    }
    let store = connect(global, true).await?;
    let identity = store.identity();
    let object = json!({"url": parsed.to_string(), "store": identity.store});
    let text = format!("made {} (store {})", store.location(), identity.store);
    output::object(global.output, &object, &text)
}
