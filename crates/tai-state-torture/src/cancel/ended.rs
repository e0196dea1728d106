//! A runtime that ends in the middle of calls: what they made is whole, and another handle goes on.

use std::time::Duration;

use serde_json::json;
use tai_state::{Error, TransactionManager};
use tokio::time::timeout;

use super::{Engine, SOON};
use crate::net::{snapshot, why};
use crate::random::Random;
use crate::run::Tally;

/// Of each engine and round.
const TIMES: u64 = 10;
/// What is not given back ends with it.
const LEASE: Duration = Duration::from_millis(400);

pub(super) async fn run(round: u64, engine: &Engine, random: &mut Random, tally: &mut Tally) {
    let store = engine.open().await.unwrap();
    for n in 0..TIMES {
        let governor = format!("ended {n}");
        for id in ["a", "b"] {
            store.save_state(&governor, id, snapshot(id, json!(0)), why()).await.unwrap();
        }
        let after = Duration::from_micros(random.below(12_000));
        let (there, name) = (engine.clone(), governor.clone());
        let worked = std::thread::spawn(move || in_a_runtime(&there, &name, after)).join();
        let what = format!("round {round}, {}, a runtime ended after {after:?}", engine.name());
        tally.count("runtimes ended in the middle", 1);
        tally.holds(worked.is_ok(), || format!("{what}: a panic"));
        match store.batch_get_states(&governor, &["a", "b"]).await {
            Ok(both) => tally.holds(both[0].data == both[1].data, || format!("{what}: {both:?}")),
            Err(error) => tally.broken(format!("{what}: {error}")),
        }
        let manager = TransactionManager::new(&store).with_lock_governor(&governor);
        match timeout(SOON, manager.acquire_lock_within("r", "next", LEASE, SOON)).await {
            Ok(Ok(lock)) => {
                let released = lock.release().await;
                tally.holds(released.is_ok(), || format!("{what}: {released:?}"));
            }
            other => tally.broken(format!("{what}: the lock is not free: {other:?}")),
        }
        let saved = timeout(SOON, change(&manager, &governor)).await;
        tally.holds(matches!(saved, Ok(Ok(()))), || format!("{what}: the next: {saved:?}"));
        let report = store.validate_consistency(&governor).await;
        tally
            .holds(report.as_ref().is_ok_and(|report| report.ok), || format!("{what}: {report:?}"));
    }
}

/// Adds one to both.
async fn change(manager: &TransactionManager, governor: &str) -> Result<(), Error> {
    let both = manager.execute_transaction(governor, |tx| async move {
        for id in ["a", "b"] {
            let (mut state, version) = tx.get_state(governor, id).await?;
            state.data = json!(state.data.as_u64().unwrap() + 1);
            tx.update_state(governor, id, state, version, why()).await?;
        }
        Ok(())
    });
    both.await
}

/// Works in a runtime of its own, which ends after this time.
fn in_a_runtime(engine: &Engine, governor: &str, after: Duration) {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    let store = runtime.block_on(engine.open()).unwrap();
    for task in 0..3 {
        let manager = TransactionManager::new(&store).with_lock_governor(governor);
        let (store, governor) = (store.clone(), governor.to_owned());
        runtime.spawn(async move {
            loop {
                let _ = match task {
                    0 => change(&manager, &governor).await,
                    1 => manager.acquire_lock("r", "gone", LEASE).await.map(drop),
                    _ => store
                        .save_state(&governor, "c", snapshot("c", json!(0)), why())
                        .await
                        .map(drop),
                };
            }
        });
    }
    runtime.block_on(async { tokio::time::sleep(after).await });
    // Whatever is under way is dropped where it stands.
    runtime.shutdown_background();
}
