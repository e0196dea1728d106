//! The past: what was it at 3 pm yesterday, what has changed since, how to go back, and how much of it is
//! kept: `cargo run -p tai-state --example time_travel [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

use chrono::{NaiveTime, TimeDelta};
use serde_json::json;
use tai_state::{
    ChangeMetadata, Clock, Error, NewTransition, StateMachinePersister, StateStore, SystemClock,
};

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    let persister = StateMachinePersister::with_defaults(&store);
    let why = |reason: &str| ChangeMetadata::new("deployer", reason, None);
    let today = SystemClock.now();
    let yesterday = today.date_naive().and_time(NaiveTime::MIN).and_utc() - TimeDelta::days(1);
    let clock = |hour| yesterday + TimeDelta::hours(hour);
    let site = format!("site-{}", today.timestamp_micros()); // a new one each time

    // A log from elsewhere: each transition comes with its own time.
    for (service, image, replicas, at) in [
        ("basket", "1.0", 2, clock(9) - TimeDelta::days(60)),
        ("basket", "1.1", 2, clock(9) - TimeDelta::days(40)),
        ("search", "2.0", 1, clock(9)),
        ("basket", "1.2", 2, clock(14)),
        ("basket", "1.3", 4, clock(16)),
        ("search", "2.1", 1, clock(17)),
    ] {
        let data = json!({"image": image, "replicas": replicas});
        let deployed = NewTransition::to(&site, service, "deploy", data, why("a release"));
        persister.append(deployed.at(at)).await?;
    }

    // One state, and all states, as they were at 3 pm.
    let then = store.state_at_time(&site, "basket", clock(15)).await?;
    println!("basket at 3 pm yesterday: v{} {}", then.version, then.data);
    assert_eq!(then.data, json!({"image": "1.2", "replicas": 2}));
    let mut cut = store.consistent_cut(&site, clock(15))?;
    for record in cut.next_page().await? {
        // A site with more services than fit on a page has more pages.
        println!("the whole site then: {} {}", record.snapshot.id, record.snapshot.data);
    }

    // What happened after that, and what came of it.
    let mut afternoon = store.events_between(&site, "basket", clock(15), today).await?;
    while let Some(event) = afternoon.next().await? {
        println!("at {}: {} {}", event.timestamp, event.action, event.to_state.data);
    }
    let patch = store.diff(&site, "basket", clock(15), today).await?;
    println!("the difference, as a JSON Patch: {patch}");

    // Back to 3 pm, as a new version on top: nothing is undone.
    let back = store.revert(&site, "basket", clock(15), why("1.3 is slow")).await?;
    println!("reverted: v{} is what v{} was", back.version(), then.version);
    assert_eq!((back.to_state.data, back.to_state.version), (then.data, 5));

    // Thirty days are kept; what is asked of before is an error that says since when there is history.
    let gone = persister.cleanup_old_data(&site, 30).await?;
    println!("events removed: {}, bytes: {}", gone.events, gone.recovered_bytes);
    let long_ago = store.state_at_time(&site, "basket", clock(12) - TimeDelta::days(60)).await;
    assert!(matches!(long_ago, Err(Error::HistoryTrimmed { first_version: 2, .. })));
    if let Err(trimmed) = long_ago {
        println!("{trimmed}");
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("site.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
