//! Two doctors on call who both want to leave, each if the other stays: a write skew, if nobody looks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tai_state::{StateStore, StoreOptions, TransactionManager};
use tokio::sync::Barrier;

use crate::engine::{Engine, problems, snapshot, why};
use crate::run::Tally;

const BOTH: [&str; 2] = ["alice", "bob"];

/// So many rounds by two handles, like two processes, and as many by one.
pub(crate) async fn on_call(engine: Option<Engine>, rounds: u64) -> Tally {
    let mut tally = Tally::default();
    let Some(engine) = engine else { return tally };
    let store = engine.store();
    let (a, b) = (store.open().await, store.open().await);
    for (who, both) in [("two handles", [a.clone(), b]), ("one handle", [a.clone(), a.clone()])] {
        let alone = nobody_is_left(both, rounds, &mut tally).await;
        tally.count("rounds of two doctors", rounds);
        tally.holds(alone == 0, || {
            format!("{who} on {}: nobody was on call in {alone} of {rounds} rounds", engine.name())
        });
    }
    for problem in problems(&a).await {
        tally.broken(format!("doctors on {}: {problem}", engine.name()));
    }
    // Without the checks of what was only read both leave.
    let mut unchecked = StoreOptions::default();
    unchecked.never_check_reads = true;
    let store = engine.store();
    let both = [store.open_with(unchecked.clone()).await, store.open_with(unchecked).await];
    let alone = nobody_is_left(both, 20, &mut Tally::default()).await;
    tally.control("what was only read is not checked: both doctors leave", alone, 20, 1);
    tally
}

/// In how many rounds both left.
async fn nobody_is_left(stores: [StateStore; 2], rounds: u64, tally: &mut Tally) -> u64 {
    let mut broken = 0;
    for round in 0..rounds {
        for id in BOTH {
            let on_call = snapshot(id, json!({"on_call": true}));
            stores[0].save_state("ward", id, on_call, why()).await.unwrap();
        }
        // Both read before either writes.
        let both_have_read = Arc::new(Barrier::new(2));
        let leave = |n: usize| {
            let (manager, me) = (TransactionManager::new(&stores[n]), BOTH[n]);
            tokio::spawn(leave(manager, me, Arc::clone(&both_have_read)))
        };
        let (one, other) = (leave(0), leave(1));
        one.await.unwrap();
        other.await.unwrap();
        let all = stores[0].batch_get_states("ward", &BOTH).await.unwrap();
        let on_call = all.iter().filter(|state| state.data["on_call"] == true).count();
        tally.holds(on_call < 2, || format!("round {round}: nobody left"));
        broken += u64::from(on_call == 0);
    }
    broken
}

async fn leave(manager: TransactionManager, me: &'static str, barrier: Arc<Barrier>) {
    let first = AtomicBool::new(true);
    let left = manager.execute_transaction("ward", |tx| {
        let meet = first.swap(false, Ordering::SeqCst).then(|| Arc::clone(&barrier));
        async move {
            let all = tx.batch_get_states("ward", &BOTH).await?;
            if let Some(barrier) = meet {
                barrier.wait().await;
            }
            if all.iter().filter(|state| state.data["on_call"] == true).count() == 2 {
                let off = snapshot(me, json!({"on_call": false}));
                tx.save_state("ward", me, off, why()).await?;
            }
            Ok(())
        }
    });
    left.await.unwrap();
}
