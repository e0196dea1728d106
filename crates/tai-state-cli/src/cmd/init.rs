//! `init`: make a new, empty store.

use serde_json::json;
use tai_state::StoreUrl;

use crate::args::Global;
use crate::failure::{Failure, Outcome, exit};
use crate::{connect, output, url};

pub(crate) async fn run(global: &Global) -> Outcome {
    let parsed: StoreUrl = url(global)?.parse()?;
    let exists = |what: &dyn std::fmt::Display, hint: &str| {
        Err(Failure::new(exit::CONFLICT, "exists", format!("{what} exists already")).hint(hint))
    };
    match &parsed {
        StoreUrl::File { path } if path.symlink_metadata().is_ok() => {
            let hint = "an existing store needs no init; any other file is left alone";
            return exists(&path.display(), hint);
        }
        StoreUrl::Firestore { .. } | StoreUrl::FirestoreEmulator { .. } => {
            match connect(global, false).await {
                Ok(store) => return exists(&store.location(), "an existing store needs no init"),
                Err(failure) if failure.exit == exit::NOT_FOUND => {}
                Err(failure) => return Err(failure),
            }
        }
        _ => {}
    }
    let store = connect(global, true).await?;
    let identity = store.identity();
    let object = json!({
        "url": parsed.to_string(), "store": identity.store, "location": store.location(),
    });
    let text = format!("made {} (store {})", store.location(), identity.store);
    output::object(global.output, &object, &text)
}
