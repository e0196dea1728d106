//! Idempotency keys, on every backend: what was answered is answered again, and done once.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use chrono::{TimeDelta, TimeZone, Utc};
use common::{Make, counter, open, options, proved, snapshot, why};
use serde_json::{Value, json};
use tai_state::{
    Error, ManualClock, NewTransition, StateMachinePersister, StateStore, StoreOptions,
    TransactionManager, TransactionStatus,
};
use tokio::task::JoinSet;

on_every_backend![
    single_writes_are_answered_again,
    another_request_under_a_key_is_refused,
    a_key_is_for_one_of_many_senders,
    transactions_are_answered_again,
    a_failed_transaction_leaves_no_answer,
    a_transaction_that_writes_nothing_is_answered_too,
    a_key_and_its_transaction_fit_together,
    answers_are_forgotten_when_their_time_is_over,
    more_answers_than_are_read_in_one_go_are_forgotten,
    what_no_key_takes_is_refused,
];

async fn events(store: &StateStore) -> u64 {
    store.get_stats().await.unwrap().total_events
}

async fn single_writes_are_answered_again(make: Make<'_>) {
    let store = open(make);
    let once = |key: &str| store.idempotency_key(key).unwrap();
    for _ in 0..3 {
        assert_eq!(once("save").save_state("g", "s", counter(1), why()).await.unwrap(), 1);
    }
    store.save_state("g", "s", counter(2), why()).await.unwrap();
    for _ in 0..3 {
        // The answer of then, though the state has gone on.
        assert_eq!(once("save").save_state("g", "s", counter(1), why()).await.unwrap(), 1);
        assert_eq!(once("update").update_state("g", "s", counter(3), 2, why()).await.unwrap(), 3);
        assert_eq!(once("delete").delete_state("g", "s", Some(3), why()).await.unwrap(), 4);
    }
    let to = || NewTransition::to("g", "s", "reopen", json!({"n": 1}), why()).expecting(0);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let persister = StateMachinePersister::with_defaults(once("append"));
        let event = persister.append(to()).await.unwrap();
        assert_eq!((event.version(), event.action.as_str()), (5, "reopen"));
        assert!(event.from_state.is_none(), "it was deleted before");
        let next = snapshot("s", json!({"n": 2}));
        let persister = StateMachinePersister::with_defaults(once("log"));
        let logged = persister.log_transition("g", Some(&event.to_state), &next, "a", why()).await;
        let logged = logged.unwrap();
        assert_eq!(logged.from_state.as_ref().unwrap().data, json!({"n": 1}));
        ids.push((event.id, logged.id));
    }
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "other events: {ids:?}");
    assert_eq!(events(&store).await, 6);
    proved(&store).await;
}

async fn another_request_under_a_key_is_refused(make: Make<'_>) {
    let store = open(make);
    let once = store.idempotency_key("k").unwrap();
    once.save_state("g", "s", counter(1), why()).await.unwrap();
    let before = proved(&store).await;
    let refused = |error: Error| assert_eq!(error.code(), "invalid_state", "{error}");
    refused(once.save_state("g", "s", counter(2), why()).await.unwrap_err());
    refused(once.save_state("g", "t", counter(1), why()).await.unwrap_err());
    refused(once.update_state("g", "s", counter(1), 1, why()).await.unwrap_err());
    refused(once.delete_state("g", "s", None, why()).await.unwrap_err());
    let manager = TransactionManager::new(&store);
    let as_transaction = manager.execute_once("g", "k", |_| async { Ok(1) });
    refused(as_transaction.await.unwrap_err());
    refused(TransactionManager::new(&once).run(|_| async { Ok(1) }).await.unwrap_err());
    // Who and why may differ: it is the same request.
    let other = tai_state::ChangeMetadata::new("another", "again", None);
    assert_eq!(once.save_state("g", "s", counter(1), other).await.unwrap(), 1);
    assert_eq!(proved(&store).await, before);
}

async fn a_key_is_for_one_of_many_senders(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(&store);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (store, manager) = (store.clone(), manager.clone());
        tasks.spawn(async move {
            let once = store.idempotency_key("single").unwrap();
            let version = once.save_state("g", "s", counter(1), why()).await.unwrap();
            let answer = manager
                .execute_once("g", "transaction", |tx| async move {
                    let a = tx.save_state("g", "a", counter(1), why()).await?;
                    let b = tx.save_state("g", "b", counter(1), why()).await?;
                    Ok((a, b, tx.id().to_owned()))
                })
                .await;
            (version, answer.unwrap())
        });
    }
    let answers = tasks.join_all().await;
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(events(&store).await, 3);
    proved(&store).await;
}

async fn transactions_are_answered_again(make: Make<'_>) {
    let store = open(make);
    store.save_state("g", "sum", snapshot("sum", json!(0)), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let runs = Arc::new(AtomicU32::new(0));
    for _ in 0..4 {
        let runs = Arc::clone(&runs);
        let add = manager.execute_once("g", "add-17", move |tx| {
            let runs = Arc::clone(&runs);
            Box::pin(async move {
                runs.fetch_add(1, Ordering::SeqCst);
                let (mut sum, version) = tx.get_state("g", "sum").await?;
                sum.data = json!(sum.data.as_u64().unwrap() + 5);
                let answer = json!({"sum": sum.data.clone(), "nested": [[1], {"x": null}]});
                tx.update_state("g", "sum", sum, version, why()).await?;
                Ok(answer)
            })
        });
        let answer: Value = add.await.unwrap();
        assert_eq!(answer, json!({"sum": 5, "nested": [[1], {"x": null}]}));
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1, "the work was done again");
    assert_eq!(events(&store).await, 2);
    let statuses: Vec<_> =
        manager.transaction_log().iter().map(|transaction| transaction.status).collect();
    use TransactionStatus::{Answered, Committed};
    assert_eq!(statuses, [Committed, Answered, Answered, Answered]);
    // Asked for as something that it is not.
    let odd = manager.execute_once("g", "add-17", |_| async { Ok(vec![1u8]) }).await.unwrap_err();
    assert_eq!(odd.code(), "serialization_error");
}

async fn a_failed_transaction_leaves_no_answer(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(&store);
    let attempt = async |fails: bool| {
        manager
            .execute_once("g", "k", |tx| async move {
                let version = tx.save_state("g", "s", counter(1), why()).await?;
                if fails {
                    tx.get_state("g", "none").await?;
                }
                Ok(version)
            })
            .await
    };
    assert_eq!(attempt(true).await.unwrap_err().code(), "state_not_found");
    assert_eq!(attempt(false).await.unwrap(), 1);
    assert_eq!(attempt(true).await.unwrap(), 1);
    // A single write that was refused leaves none either.
    let once = store.idempotency_key("single").unwrap();
    assert!(once.update_state("g", "s", counter(2), 7, why()).await.is_err());
    assert_eq!(once.update_state("g", "s", counter(2), 1, why()).await.unwrap(), 2);
}

async fn a_transaction_that_writes_nothing_is_answered_too(make: Make<'_>) {
    let store = open(make);
    store.save_state("g", "s", counter(1), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let read = async || {
        manager
            .execute_once("g", "look", |tx| async move { Ok(tx.get_state("g", "s").await?.1) })
            .await
            .unwrap()
    };
    assert_eq!(read().await, 1);
    store.save_state("g", "s", counter(2), why()).await.unwrap();
    assert_eq!(read().await, 1);
}

async fn a_key_and_its_transaction_fit_together(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(&store);
    let refused = |error: Error| assert_eq!(error.code(), "invalid_state", "{error}");
    let two = manager.run(|tx| async move {
        tx.idempotency_key::<u64>("a").await?;
        tx.idempotency_key::<u64>("b").await
    });
    refused(two.await.unwrap_err());
    refused(manager.run(|tx| async move { tx.answer(&1).await }).await.unwrap_err());
    let asked = json!({"amount": 5});
    let pay = async |asked: &Value, version: u64| {
        manager
            .run(|tx| async move {
                if let Some(first) = tx.idempotency_key_of::<u64>("pay", asked).await? {
                    return Ok(first);
                }
                tx.save_state("g", "s", counter(version), why()).await?;
                tx.answer(&version).await?;
                Ok(version)
            })
            .await
    };
    assert_eq!(pay(&asked, 1).await.unwrap().value, 1);
    assert_eq!(pay(&asked, 2).await.unwrap().value, 1);
    refused(pay(&json!({"amount": 6}), 3).await.unwrap_err());
    // Whoever has the answer must not write.
    let both = manager.run(|tx| async move {
        tx.idempotency_key_of::<u64>("pay", &json!({"amount": 5})).await?;
        tx.save_state("g", "s", counter(9), why()).await
    });
    refused(both.await.unwrap_err());
    assert_eq!(events(&store).await, 1);
}

fn kept_for_an_hour(clock: &ManualClock) -> StoreOptions {
    options(|o| {
        o.clock = Arc::new(clock.clone());
        o.idempotency_ttl = Duration::from_secs(3_600);
    })
}

async fn answers_are_forgotten_when_their_time_is_over(make: Make<'_>) {
    let clock = ManualClock::at(Utc.with_ymd_and_hms(2026, 1, 1, 12, 0, 0).unwrap());
    let store = make(kept_for_an_hour(&clock));
    let manager = TransactionManager::new(&store);
    for n in 0..5 {
        let once = store.idempotency_key(format!("k{n}")).unwrap();
        once.save_state("g", "s", counter(n), why()).await.unwrap();
        clock.advance(TimeDelta::minutes(20));
    }
    // 100 minutes have passed: the first two are older than an hour, by 40 and by 20 minutes.
    let first = store.idempotency_key("k0").unwrap();
    assert_eq!(first.save_state("g", "s", counter(0), why()).await.unwrap(), 1);
    assert_eq!(manager.forget_expired_commands().await.unwrap(), 2);
    assert_eq!(manager.forget_expired_commands().await.unwrap(), 0);
    assert_eq!(first.save_state("g", "s", counter(0), why()).await.unwrap(), 6);
    let third = store.idempotency_key("k2").unwrap();
    assert_eq!(third.save_state("g", "s", counter(2), why()).await.unwrap(), 3);
    proved(&store).await;
}

/// More than the backends and the crate read in one go, at both ends of a page also such that stay.
async fn more_answers_than_are_read_in_one_go_are_forgotten(make: Make<'_>) {
    let clock = ManualClock::at(Utc.with_ymd_and_hms(2026, 1, 1, 12, 0, 0).unwrap());
    let store = make(kept_for_an_hour(&clock));
    let manager = TransactionManager::new(&store);
    let save = async |keys: Vec<usize>| {
        let mut tasks = JoinSet::new();
        for n in keys {
            let once = store.idempotency_key(format!("k{n:03}")).unwrap();
            tasks.spawn(async move {
                once.save_state("g", &format!("s{n}"), counter(1), why()).await.unwrap();
            });
        }
        tasks.join_all().await;
    };
    let (stay, go): (Vec<usize>, Vec<usize>) = (0..450).partition(|n| n % 50 == 0);
    let (staying, going) = (stay.len() as u64, go.len() as u64);
    save(go).await;
    clock.advance(TimeDelta::minutes(40));
    save(stay).await;
    clock.advance(TimeDelta::minutes(40));
    assert_eq!(manager.forget_expired_commands().await.unwrap(), going);
    clock.advance(TimeDelta::minutes(40));
    assert_eq!(manager.forget_expired_commands().await.unwrap(), staying);
    assert_eq!(manager.forget_expired_commands().await.unwrap(), 0);
    proved(&store).await;
}

async fn what_no_key_takes_is_refused(make: Make<'_>) {
    let store = open(make);
    assert_eq!(store.idempotency_key("").unwrap_err().code(), "invalid_state");
    assert_eq!(store.idempotency_key("x".repeat(1_401)).unwrap_err().code(), "too_large");
    for odd in ["a/b~c%", "..", "__x__", "\n\0", "é", "{\"id\":1}"] {
        for _ in 0..2 {
            let once = store.idempotency_key(odd).unwrap();
            once.save_state("g", odd, counter(1), why()).await.unwrap();
        }
    }
    assert_eq!(events(&store).await, 6);
    let manager = TransactionManager::new(&store);
    let large = manager.execute_once("g", "large", |tx| async move {
        tx.save_state("g", "s", counter(1), why()).await?;
        Ok("x".repeat(600_000))
    });
    assert_eq!(large.await.unwrap_err().code(), "too_large");
    assert_eq!(events(&store).await, 6, "it was written without its answer");
}
