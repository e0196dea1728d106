//! Save a state and read it: `cargo run -p tai-state --example simple_state [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

use serde_json::json;
use tai_state::{ChangeMetadata, Error, StateId, StateSnapshot, StateStore};

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    // A state is any JSON. Its address is a governor (whose state it is) and an id.
    let order = StateSnapshot::new(
        StateId::from("order-1"),
        json!({"status": "placed", "lines": [{"article": "green tea", "count": 2}]}),
        ChangeMetadata::new("checkout", "a customer ordered", None),
    );
    // Who changed it, and why, is kept with the change.
    let why = ChangeMetadata::new("checkout", "a customer ordered", None);
    let saved = store.save_state("shop", "order-1", order, why).await?;
    println!("saved as version {saved}: it is durable now");

    // What is read has its version, its time, and who made it.
    let (order, version) = store.get_state("shop", "order-1").await?;
    println!("read version {version}: {}", order.data);
    println!("made by {} at {}", order.metadata.changed_by, order.timestamp);
    assert_eq!((version, order.version), (saved, saved));
    assert_eq!(order.data.pointer("/lines/0/count"), Some(&json!(2)));

    // What is not there is an error that names it.
    match store.get_state("shop", "order-2").await {
        Err(error @ Error::StateNotFound { .. }) => println!("{error}"),
        Err(error) => return Err(error),
        Ok((order, _)) => println!("somebody has saved it: {}", order.data),
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("shop.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
