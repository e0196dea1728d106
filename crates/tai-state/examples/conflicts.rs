//! Two copies of a state that were changed apart from one another: what resolvers make of them, and the
//! repair of the store: `cargo run -p tai-state --example conflicts [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

#![allow(clippy::indexing_slicing)] // of JSON: what is not there is null

use serde_json::json;
use tai_state::{
    ChangeMetadata, Clock, Error, EventualConsistency, FieldMergeResolver, HighestVersionResolver,
    LastWriteWinsResolver, RepairOutcome, StateSnapshot, StateStore, SystemClock,
};

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    let why = |who: &str, reason: &str| ChangeMetadata::new(who, reason, None);
    let parcel = |data| StateSnapshot::new("parcel-7".into(), data, why("office", "a parcel"));
    let packed = parcel(json!({"status": "packed", "note": "", "boxes": 1}));
    store.save_state("depot", "parcel-7", packed, why("office", "a new parcel")).await?;

    // The driver takes a copy along, and meanwhile the office changes the parcel.
    let (base, _) = store.get_state("depot", "parcel-7").await?;
    let two = parcel(json!({"status": "packed", "note": "", "boxes": 2}));
    store.save_state("depot", "parcel-7", two, why("office", "it did not fit")).await?;
    let (office, _) = store.get_state("depot", "parcel-7").await?;

    // Without a connection the driver changes the copy, and its clock says so.
    let mut driver = base.clone();
    driver.data["status"] = json!("delivered");
    driver.data["note"] = json!("next door");
    driver.metadata = why("driver", "at the door");
    driver.timestamp = SystemClock.now();
    driver.causality.increment("driver");
    assert!(driver.causality.concurrent_with(&office.causality));

    // Resolvers that choose, and one that merges what each side has changed of what both started from.
    let last = EventualConsistency::with_resolver(Box::new(LastWriteWinsResolver));
    println!("last write wins: {}", last.resolve_conflict(&office, &driver)?.data);
    let highest = EventualConsistency::with_resolver(Box::new(HighestVersionResolver));
    println!("highest version: {}", highest.resolve_conflict(&office, &driver)?.data);
    let merge = FieldMergeResolver::new(base.data.clone());
    let merging = EventualConsistency::with_resolver(Box::new(merge));
    println!("merged by field: {}", merging.resolve_conflict(&office, &driver)?.data);

    // Where both have changed the same field, it does not guess.
    let mut other = driver.clone();
    other.data["boxes"] = json!(3);
    let undecided = merging.resolve_conflict(&office, &other);
    assert!(matches!(undecided, Err(Error::MergeConflict { .. })));
    if let Err(conflict) = undecided {
        println!("not merged: {conflict}");
    }

    // The driver is back: the store learns what the copy knows. It finds the base in its log itself.
    let repair = merging.repair(&store, "depot", &driver, why("depot", "back again")).await?;
    println!("repaired to v{}: {}", repair.newest.version, repair.newest.data);
    assert_eq!(repair.outcome, RepairOutcome::Merged);
    let merged = json!({"status": "delivered", "note": "next door", "boxes": 2});
    assert_eq!(repair.newest.data, merged);
    // What the driver had said stays on record, and once more changes nothing.
    if let Some(lost) = repair.lost_version {
        let said = store.state_at_version("depot", "parcel-7", lost).await?.data;
        println!("v{lost} keeps what the driver had: {said}");
        assert_eq!(said, driver.data);
    }
    let again = merging.repair(&store, "depot", &driver, why("depot", "once more")).await?;
    assert_eq!(again.outcome, RepairOutcome::Stale);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("depot.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
