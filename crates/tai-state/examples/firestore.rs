//! Save, read, and update with a version check, on Firestore or its emulator:
//! `FIRESTORE_EMULATOR_HOST=127.0.0.1:8080 cargo run -p tai-state --example firestore -- demo-project`

#![allow(clippy::indexing_slicing)] // of JSON: what is not there is null

use serde_json::json;
use tai_state::{ChangeMetadata, Error, FirestoreStore, StateId, StateSnapshot};

#[tokio::main]
async fn main() -> tai_state::Result<()> {
    let project = std::env::args().nth(1).unwrap_or_else(|| "demo-project".into());
    let store = FirestoreStore::new(project).await?;

    // Save a state, and read it.
    let first = StateSnapshot::new(
        StateId::new("counter".into()),
        json!({"count": 0}),
        ChangeMetadata::new("system", "initialization", None),
    );
    let why = ChangeMetadata::new("system", "init", None);
    store.save_state("governor1", "counter", first, why).await?;
    let (state, version) = store.get_state("governor1", "counter").await?;
    println!("State: {}, Version: {version}", state.data);

    // Change it, if nobody else has in between.
    loop {
        let (state, version) = store.get_state("governor1", "counter").await?;
        let mut next = state.clone();
        next.data["count"] = json!(state.data["count"].as_i64().unwrap_or(0) + 1);
        let why = ChangeMetadata::new("user", "increment", Some(version));
        match store.update_state("governor1", "counter", next, version, why).await {
            Ok(version) => break println!("Updated to version {version}"),
            Err(Error::VersionConflict { .. }) => println!("Somebody was faster: read again"),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
