//! What only one may do at a time: a lock, writes that are worth something only under it, and a paused
//! holder whose write comes too late: `cargo run -p tai-state --example exclusive_section [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

use std::time::Duration;

use serde_json::json;
use tai_state::{ChangeMetadata, Error, StateSnapshot, StateStore, TransactionManager};

const LEASE: Duration = Duration::from_secs(30);

/// Notes how far the migration is, through a store that may be fenced by a lock.
async fn note(store: &StateStore, worker: &str, step: u64) -> tai_state::Result<u64> {
    let why = ChangeMetadata::new(worker, "one step of the migration", None);
    let progress = StateSnapshot::new("migration".into(), json!({"step": step}), why.clone());
    store.save_state("ops", "migration", progress, why).await
}

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    let manager = TransactionManager::new(&store);

    // The lease is renewed in the background for as long as the lock is held.
    let lock = manager.acquire_lock("migration", "worker-1", LEASE).await?;
    println!("worker-1 has the lock, with fencing token {}", lock.fencing_token);
    let refused = manager.try_acquire_lock("migration", "worker-2", LEASE).await;
    assert!(matches!(&refused, Err(Error::LockHeld { held_by, .. }) if held_by == "worker-1"));
    if let Err(held) = refused {
        println!("worker-2 must wait: {held}");
    }

    // Every commit of this handle checks that the lock is still worker-1's. Work beside the store should
    // end as soon as the lock is known to be lost.
    let fenced = store.fenced_by(&lock);
    let version = tokio::select! {
        version = note(&fenced, "worker-1", 1) => version?,
        lost = lock.lost() => return Err(lost),
    };
    println!("worker-1 wrote step 1 as version {version}");

    // Now worker-1 is paused: a machine that sleeps, a container that is frozen. Its lease ends, or as
    // here somebody takes the lock away, and worker-2 gets it with a higher token.
    manager.break_lock("migration").await?;
    let second = manager.acquire_lock("migration", "worker-2", LEASE).await?;
    println!("worker-2 has the lock, with fencing token {}", second.fencing_token);
    assert!(second.fencing_token > lock.fencing_token);
    note(&store.fenced_by(&second), "worker-2", 2).await?;

    // Then worker-1 wakes up and goes on where it was. Its write is refused in the commit itself.
    let late = note(&fenced, "worker-1", 1).await;
    assert!(matches!(late, Err(Error::LockLost { .. })));
    if let Err(lost) = late {
        println!("worker-1 is too late: {lost}");
    }
    let (migration, _) = store.get_state("ops", "migration").await?;
    println!("the migration is at {}", migration.data);
    assert_eq!(migration.data, json!({"step": 2}));

    // Dropping a lock gives it back too, but cannot say whether that has worked.
    second.release().await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("ops.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
