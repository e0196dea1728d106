//! The program at the top of the README: `cargo run -p tai-state --example readme`. It makes `app.tai` in the
//! folder where it runs, and can be run once on it: it begins an order that must not be there.

#![allow(clippy::indexing_slicing)] // of JSON: what is not there is null

use serde_json::json;
use tai_state::{ChangeMetadata, StateId, StateMachinePersister, StateSnapshot, StateStore};

#[tokio::main]
async fn main() -> tai_state::Result<()> {
    let store = StateStore::open("app.tai").await?; // one file; made when it is not there
    let persister = StateMachinePersister::with_defaults(store.clone());
    let why = |reason| ChangeMetadata::new("checkout", reason, None);
    let order =
        |status| StateSnapshot::new(StateId::from("order-1"), json!({"status": status}), why(""));

    let placed =
        persister.log_transition("orders", None, &order("placed"), "place", why("new")).await?;
    let paid = order("paid");
    persister.log_transition("orders", Some(&placed.to_state), &paid, "pay", why("card")).await?;

    assert_eq!(store.get_state("orders", "order-1").await?.0.data["status"], "paid");
    assert_eq!(store.state_at_version("orders", "order-1", 1).await?.data["status"], "placed");
    assert!(store.verify(|_| {}).await?.ok); // every hash, every chain, every head
    Ok(())
}
