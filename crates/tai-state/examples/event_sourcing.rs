//! Log the transitions of a state machine, and get its state and a read model back from the log:
//! `cargo run -p tai-state --example event_sourcing [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

use serde_json::json;
use tai_state::{
    ChangeMetadata, Clock, Error, PersistenceConfig, StateId, StateMachinePersister, StateSnapshot,
    StateStore, SystemClock,
};

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    // A snapshot is saved with every second change here; 100 is the default.
    let config = PersistenceConfig { snapshot_interval: 2, ..PersistenceConfig::default() };
    let persister = StateMachinePersister::new(&store, config);
    let id = StateId::from(format!("order-{}", SystemClock.now().timestamp_micros()));
    let order = |status: &str| {
        let who = ChangeMetadata::new("shop", "as the customer wished", None);
        StateSnapshot::new(id.clone(), json!({"status": status, "total": 42}), who)
    };
    let why = |reason: &str| ChangeMetadata::new("shop", reason, None);

    // Each transition says where it starts from: nothing, or the state that the one before has made.
    let placed = order("placed");
    let placed = persister.log_transition("shop", None, &placed, "place", why("web")).await?;
    let (from, paid) = (Some(&placed.to_state), order("paid"));
    let paid = persister.log_transition("shop", from, &paid, "pay", why("card")).await?;
    let (from, shipped) = (Some(&paid.to_state), order("shipped"));
    persister.log_transition("shop", from, &shipped, "ship", why("parcel 7")).await?;

    // Whoever still believes that the order is only placed cannot cancel it.
    let (from, cancelled) = (Some(&placed.to_state), order("cancelled"));
    let late = persister.log_transition("shop", from, &cancelled, "cancel", why("regret")).await;
    assert!(matches!(&late, Err(Error::VersionConflict { expected: 1, actual: 3, .. })));
    if let Err(conflict) = late {
        println!("not cancelled: {conflict}");
    }

    // The whole history, page by page or one by one; each event is proved to follow from the one before.
    let mut history = store.history("shop", &id, ..).await?;
    while let Some(event) = history.next().await? {
        let from = event.from_state.map_or(json!(null), |state| state.data);
        let (version, to, reason) =
            (event.to_state.version, event.to_state.data, event.metadata.reason);
        println!("v{version} {:<5} {from} -> {to} ({reason})", event.action);
    }

    // The newest state, established from the newest saved snapshot and the events after it.
    let (order, from_the_log) = persister.load_state("shop", &id).await?;
    println!("loaded v{}: {} (from the log: {from_the_log})", order.version, order.data);
    assert!(from_the_log && order.version == 3);
    assert_eq!(order.data.pointer("/status"), Some(&json!("shipped")));

    // A read model of one's own: a fold of all events, the oldest first.
    let mut actions = Vec::new();
    let replayed = persister.replay("shop", &id, |event| {
        actions.push(event.action);
        Ok(())
    });
    println!("{} events were replayed", replayed.await?.events);
    println!("what was done: {}", actions.join(", "));
    assert_eq!(actions, ["place", "pay", "ship"]);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("orders.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
