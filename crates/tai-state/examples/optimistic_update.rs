//! Change a state that others change too, without losing an update: read, decide, write if nobody was
//! faster, else again: `cargo run -p tai-state --example optimistic_update [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

#![allow(clippy::indexing_slicing)] // of JSON: what is not there is null

use std::time::Duration;

use serde_json::json;
use tai_state::{ChangeMetadata, Error, RetryPolicy, StateSnapshot, StateStore};

const SEATS: u64 = 30;

/// Sells one seat, unless all are sold; says so, and how often somebody else was faster.
async fn sell_one(store: &StateStore, clerk: &str) -> tai_state::Result<(bool, u32)> {
    let mut conflicts = 0;
    loop {
        // What is decided below is decided on this version…
        let (mut concert, version) = store.get_state("tickets", "concert").await?;
        let sold = concert.data["sold"].as_u64().unwrap_or(0);
        if sold >= SEATS {
            return Ok((false, conflicts));
        }
        concert.data["sold"] = json!(sold + 1);
        let why = ChangeMetadata::new(clerk, "one seat", Some(version));
        // …and written only if it is still the newest.
        match store.update_state("tickets", "concert", concert, version, why).await {
            Ok(_) => return Ok((true, conflicts)),
            Err(Error::VersionConflict { .. }) => conflicts += 1,
            Err(error) => return Err(error),
        }
        // Nothing was written. Wait a little, each for another time, so that not all meet again.
        tokio::time::sleep(RetryPolicy::default().backoff(conflicts)).await;
    }
}

/// Sells until nothing is left, and says how many.
async fn clerk(store: &StateStore, name: &str) -> tai_state::Result<u64> {
    let (mut sold, mut conflicts) = (0, 0);
    loop {
        let (one_more, faster_others) = sell_one(store, name).await?;
        conflicts += faster_others;
        if !one_more {
            println!("{name} sold {sold} seats; {conflicts} times somebody else was faster");
            return Ok(sold);
        }
        sold += 1;
        tokio::time::sleep(Duration::from_millis(3)).await; // until the next customer comes
    }
}

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    let why = ChangeMetadata::new("office", "the sale begins", None);
    let concert = StateSnapshot::new("concert".into(), json!({"sold": 0}), why.clone());
    let begin = store.save_state("tickets", "concert", concert, why).await?;

    let (ada, ben, cem) =
        tokio::try_join!(clerk(&store, "ada"), clerk(&store, "ben"), clerk(&store, "cem"))?;

    // No seat was sold twice and none was lost: one version for each.
    let (concert, version) = store.get_state("tickets", "concert").await?;
    println!("{} of {SEATS} seats are sold, in {} versions", concert.data["sold"], version - begin);
    assert_eq!(ada + ben + cem, SEATS);
    assert_eq!((concert.data["sold"].as_u64(), version - begin), (Some(SEATS), SEATS));
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("tickets.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
