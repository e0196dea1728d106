//! The same program with the same clock gives the same log, byte for byte, and draws the same numbers.
//! (Event ids, node ids and lock tokens are drawn anew each time: nothing that an export says depends on
//! them.)

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use chrono::{TimeDelta, TimeZone, Utc};
use common::{Random, options, proved, snapshot, why};
use serde_json::json;
use tai_state::{
    Clock, Error, ManualClock, NewTransition, StateMachinePersister, StateStore, StoreOptions,
    TransactionManager,
};

/// What a run of the program has left.
#[derive(Debug, PartialEq)]
struct Left {
    log: String,
    content_hash: String,
    time: String,
    /// Where the generator stands.
    drawn: u64,
    answers: Vec<String>,
}

async fn run(seed: u64, open: impl AsyncFnOnce(StoreOptions) -> StateStore) -> Left {
    let mut random = Random::new(seed);
    let clock = ManualClock::at(Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).unwrap());
    let store = open(options(|o| o.clock = Arc::new(clock.clone()))).await;
    let persister = StateMachinePersister::with_defaults(&store);
    let manager = TransactionManager::new(&store);
    let mut answers = Vec::new();
    for step in 0..60 {
        // Now and then it goes back.
        clock.advance(TimeDelta::milliseconds(random.below(5_000) as i64 - 500));
        let (id, other) = (format!("s{}", random.below(4)), format!("s{}", random.below(4)));
        let data =
            json!({"step": step, "n": random.next(), "half": random.below(100) as f64 / 8.0});
        let state = snapshot(&id, data.clone());
        let answer: Result<u64, Error> = match random.below(6) {
            0 => store.save_state("g", id, state, why()).await,
            1 => store.update_state("g", id, state, random.below(6), why()).await,
            2 => store.delete_state("g", id, None, why()).await,
            3 => {
                let to = NewTransition::to("g", id, "step", data, why());
                persister.append(to).await.map(|event| event.version())
            }
            4 => {
                let from = store.get_state("g", id).await.ok().map(|(state, _)| state);
                let event = persister.log_transition("g", from.as_ref(), &state, "go", why()).await;
                event.map(|event| event.version())
            }
            _ => {
                let both = manager.execute_transaction("g", |tx| {
                    let (id, other, state) = (id.clone(), other.clone(), state.clone());
                    async move {
                        tx.save_state("g", other, state.clone(), why()).await?;
                        tx.save_state("h", id, state, why()).await
                    }
                });
                both.await
            }
        };
        answers.push(answer.map_or_else(|error| error.code().to_owned(), |v| v.to_string()));
    }
    let mut log = Vec::new();
    store.export(None, &mut log, |_| {}).await.unwrap();
    Left {
        log: String::from_utf8(log).unwrap(),
        content_hash: proved(&store).await,
        time: clock.now().to_rfc3339(),
        drawn: random.next(),
        answers,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_seeds_twice_in_memory_and_once_in_a_file() {
    let mut random = Random::announced("same again");
    let folder = tempfile::tempdir().unwrap();
    let mut different = BTreeSet::new();
    for n in 0..50 {
        let seed = random.next();
        let memory = async |options| StateStore::in_memory_with(options);
        let first = run(seed, memory).await;
        assert_eq!(first, run(seed, memory).await, "seed {seed}");
        let path = folder.path().join(format!("{n}.tai"));
        let in_a_file =
            run(seed, async |options| StateStore::open_with(path, options).await.unwrap()).await;
        assert_eq!(first, in_a_file, "seed {seed}");
        assert!(first.log.lines().count() > 30, "{first:?}");
        different.insert(first.content_hash);
    }
    // Other seeds are other programs, or the comparison sees nothing.
    assert_eq!(different.len(), 50);
}
