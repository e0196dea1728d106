//! Read and write several states as one: money moves between accounts, all of it or nothing:
//! `cargo run -p tai-state --example transfer [-- URL]`.
//!
//! URL is a file, `mem:`, or `firestore+emulator://127.0.0.1:8080/demo-app`; without one a temporary file.

#![allow(clippy::indexing_slicing)] // of JSON: what is not there is null

use serde_json::json;
use tai_state::{ChangeMetadata, StateSnapshot, StateStore, TransactionManager};

fn balance(account: &StateSnapshot) -> i64 {
    account.data["balance"].as_i64().unwrap_or(0)
}

/// Moves an amount if it is there, and says whether it was.
async fn transfer(
    manager: &TransactionManager,
    [from, to]: [&str; 2],
    amount: i64,
) -> tai_state::Result<bool> {
    // The closure runs again when somebody changed what it has read: it must only work on `tx`.
    let moved = manager.execute_transaction("bank", |tx| async move {
        let (mut payer, payer_version) = tx.get_state("bank", from).await?;
        let (mut payee, payee_version) = tx.get_state("bank", to).await?;
        if balance(&payer) < amount {
            return Ok(false); // nothing was written
        }
        payer.data["balance"] = json!(balance(&payer) - amount);
        payee.data["balance"] = json!(balance(&payee) + amount);
        let why = ChangeMetadata::new("bank", format!("{amount} from {from} to {to}"), None);
        tx.update_state("bank", from, payer, payer_version, why.clone()).await?;
        tx.update_state("bank", to, payee, payee_version, why).await?;
        Ok(true)
    });
    let moved = moved.await?;
    println!("{amount:>3} from {from} to {to}: {}", if moved { "moved" } else { "not enough" });
    Ok(moved)
}

pub(crate) async fn run(store: StateStore) -> tai_state::Result<()> {
    for (name, balance) in [("alice", 100), ("bob", 50)] {
        let why = ChangeMetadata::new("bank", "a new account", None);
        let account = StateSnapshot::new(name.into(), json!({"balance": balance}), why.clone());
        store.save_state("bank", name, account, why).await?;
    }
    let manager = TransactionManager::new(&store);
    assert!(transfer(&manager, ["alice", "bob"], 30).await?);
    assert!(!transfer(&manager, ["alice", "bob"], 71).await?);

    // At the same time, and in both directions: no locks are taken, so there is no deadlock.
    let both = [["alice", "bob"], ["bob", "alice"], ["alice", "bob"]];
    let [one, two, three] = both.map(|way| transfer(&manager, way, 20));
    let (one, two, three) = tokio::try_join!(one, two, three)?;
    assert!(one && two && three);

    // Both are read as of one moment.
    let accounts = store.batch_get_states("bank", &["alice", "bob"]).await?;
    let balances: Vec<i64> = accounts.iter().map(balance).collect();
    println!("alice and bob have {balances:?}, in sum {}", balances.iter().sum::<i64>());
    assert_eq!(balances, [50, 100]);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?; // for a store in a file, gone at the end
    let file = folder.path().join("bank.tai").display().to_string();
    let given = std::env::args().nth(1).or_else(|| std::env::var("TAI_STATE_URL").ok());
    run(StateStore::connect(&given.unwrap_or(file)).await?).await?;
    Ok(())
}
