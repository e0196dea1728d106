//! What `TransactionManager` promises, on every backend.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::atomic::Ordering;

use common::{Make, balance, counter, open, options, proved, snapshot, why};
use serde_json::json;
use tai_state::{
    Error, PersistenceConfig, RetryPolicy, StateStore, TransactionManager, TransactionStatus,
};

on_every_backend![
    transactions_are_all_or_nothing,
    transactions_see_their_own_writes,
    a_transaction_guards_what_it_only_read,
    a_transaction_s_own_error_writes_nothing,
    read_write_transactions,
    a_handle_outlives_its_transaction_harmlessly,
    several_changes_of_one_state_in_one_transaction,
    more_than_a_commit_takes_is_refused_while_it_is_gathered,
    transactions_are_logged,
    what_is_given_up_is_logged_too,
    several_governors_in_one_transaction,
];

async fn bank(store: &StateStore, accounts: u64) {
    for n in 0..accounts {
        let id = format!("account-{n}");
        let money = snapshot(&id, json!({"balance": 100}));
        store.save_state("bank", &id, money, why()).await.unwrap();
    }
}

async fn transactions_are_all_or_nothing(make: Make<'_>) {
    let store = open(make);
    bank(&store, 4).await;
    let manager = TransactionManager::new(store.clone());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6u64 {
        let manager = manager.clone();
        tasks.spawn(async move {
            for step in 0..15u64 {
                let from = format!("account-{}", (task + step) % 4);
                let to = format!("account-{}", (task + step * 3 + 1) % 4);
                if from == to {
                    continue;
                }
                let moved = manager.execute_transaction("bank", |tx| {
                    let (from, to) = (from.clone(), to.clone());
                    Box::pin(async move {
                        let (mut a, version_a) = tx.get_state("bank", &from).await?;
                        let (mut b, version_b) = tx.get_state("bank", &to).await?;
                        a.data["balance"] = json!(balance(&a) - 1);
                        b.data["balance"] = json!(balance(&b) + 1);
                        tx.update_state("bank", &from, a, version_a, why()).await?;
                        tx.update_state("bank", &to, b, version_b, why()).await?;
                        Ok(())
                    })
                });
                match moved.await {
                    Ok(()) | Err(Error::TransactionFailed { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
    }
    let auditor = manager.clone();
    let audits = tokio::spawn(async move {
        for _ in 0..30 {
            let ids = ["account-0", "account-1", "account-2", "account-3"];
            let all = auditor
                .execute_transaction(
                    "bank",
                    |tx| async move { tx.batch_get_states("bank", &ids).await },
                )
                .await
                .unwrap();
            assert_eq!(all.iter().map(balance).sum::<i64>(), 400);
        }
    });
    tasks.join_all().await;
    audits.await.unwrap();
    proved(&store).await;
}

async fn transactions_see_their_own_writes(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(&store);
    let outside = store.clone();
    manager
        .execute_transaction("gov", |tx| {
            let outside = outside.clone();
            async move {
                assert!(!tx.exists("gov", "new").await?);
                assert_eq!(tx.save_state("gov", "new", counter(1), why()).await?, 1);
                assert_eq!(tx.get_state("gov", "new").await?.0.data, json!({"count": 1}));
                assert!(!outside.exists("gov", "new").await?, "seen before the commit");
                tx.delete_state("gov", "new", Some(1), why()).await?;
                assert!(!tx.exists("gov", "new").await?);
                tx.save_state("gov", "new", counter(3), why()).await?;
                Ok(())
            }
        })
        .await
        .unwrap();
    assert_eq!(store.get_state("gov", "new").await.unwrap().1, 3);
    proved(&store).await;
}

async fn a_transaction_guards_what_it_only_read(make: Make<'_>) {
    let store = open(make);
    bank(&store, 2).await;
    let manager = TransactionManager::new(store.clone());
    let outside = store.clone();
    let completed = manager
        .run(|tx| {
            let outside = outside.clone();
            async move {
                let (read, version) = tx.get_state("bank", "account-0").await?;
                let absent = tx.exists("bank", "account-9").await?;
                if version == 1 {
                    // Somebody changes it after it was read: the first attempt must not count.
                    outside
                        .save_state(
                            "bank",
                            "account-0",
                            snapshot("x", json!({"balance": 7})),
                            why(),
                        )
                        .await?;
                } else if !absent {
                    let created = snapshot("x", json!({"balance": 1}));
                    outside.save_state("bank", "account-9", created, why()).await?;
                }
                let sum = json!({"balance": balance(&read), "nine": absent});
                tx.save_state("bank", "account-1", snapshot("y", sum), why()).await?;
                Ok(())
            }
        })
        .await
        .unwrap();
    assert_eq!(completed.attempts, 3);
    let (written, version) = store.get_state("bank", "account-1").await.unwrap();
    assert_eq!((written.data, version), (json!({"balance": 7, "nine": true}), 2));
}

async fn a_transaction_s_own_error_writes_nothing(make: Make<'_>) {
    let store = open(make);
    bank(&store, 1).await;
    let before = proved(&store).await;
    let manager = TransactionManager::new(store.clone());
    let refused = manager
        .execute_transaction("bank", |tx| async move {
            tx.save_state("bank", "account-0", counter(1), why()).await?;
            tx.save_state("bank", "new", counter(1), why()).await?;
            tx.get_state("bank", "none").await?;
            Ok(())
        })
        .await;
    assert!(matches!(refused, Err(Error::StateNotFound { .. })));
    assert_eq!(proved(&store).await, before);
    // With one attempt a conflict ends it, and says why.
    let store = make(options(|o| o.retry = RetryPolicy::none()));
    bank(&store, 1).await;
    let manager = TransactionManager::new(store.clone());
    let failed = manager
        .execute_transaction("bank", |tx| {
            let store = store.clone();
            async move {
                let (state, version) = tx.get_state("bank", "account-0").await?;
                store.save_state("bank", "account-0", counter(1), why()).await?;
                tx.update_state("bank", "account-0", state, version, why()).await
            }
        })
        .await
        .unwrap_err();
    let Error::TransactionFailed { attempts: 1, source } = failed else { panic!("{failed}") };
    assert!(matches!(*source, Error::VersionConflict { expected: 1, actual: 2, .. }), "{source}");
}

async fn read_write_transactions(make: Make<'_>) {
    let store = open(make);
    bank(&store, 3).await;
    let manager = TransactionManager::new(store.clone());
    let (mut a, _) = store.get_state("bank", "account-0").await.unwrap();
    a.data["balance"] = json!(1);
    let read = manager
        .read_write_transaction(
            "bank",
            &["account-1", "none"],
            &[("account-0", a.clone(), why()), ("new", counter(1), why())],
        )
        .await
        .unwrap();
    assert_eq!(read.len(), 1);
    assert_eq!(store.get_state("bank", "account-0").await.unwrap().1, 2);
    // The same again: `a` is now old.
    let old =
        manager.read_write_transaction("bank", &["account-1"], &[("account-0", a, why())]).await;
    assert!(matches!(old, Err(Error::VersionConflict { expected: 1, actual: 2, .. })));
    let events = [
        store.event("bank", "account-0", 2).await.unwrap(),
        store.event("bank", "new", 1).await.unwrap(),
    ];
    let ids = events.each_ref().map(|e| e.metadata.context[tai_state::TRANSACTION_CONTEXT].clone());
    assert_eq!(ids[0], ids[1], "one transaction, one id");
}

async fn a_handle_outlives_its_transaction_harmlessly(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let kept = manager
        .execute_transaction("gov", |tx| async move {
            tx.save_state("gov", "a", counter(1), why()).await?;
            Ok(tx)
        })
        .await
        .unwrap();
    let late = kept.save_state("gov", "a", counter(2), why()).await.unwrap_err();
    assert!(matches!(late, Error::InvalidState { .. }), "{late}");
    assert_eq!(store.get_state("gov", "a").await.unwrap().1, 1);
}

async fn several_changes_of_one_state_in_one_transaction(make: Make<'_>) {
    let config = PersistenceConfig {
        snapshot_interval: 2,
        snapshot_retention: 1,
        ..PersistenceConfig::default()
    };
    let store = make(options(|o| o.persistence = config));
    let manager = TransactionManager::new(store.clone());
    for round in 0..3 {
        manager
            .execute_transaction("gov", |tx| async move {
                for n in 0..5 {
                    tx.save_state("gov", "a", counter(round * 10 + n), why()).await?;
                }
                Ok(())
            })
            .await
            .unwrap();
    }
    let report = store.verify(|_| {}).await.unwrap();
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!((report.events, report.snapshots), (15, 1));
}

/// A commit takes 500 documents: 250 new states with an event each, or 499 events of one. What would be one too
/// many is refused at the next change, long before the commit.
async fn more_than_a_commit_takes_is_refused_while_it_is_gathered(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    for (states, expected) in [(1_000, 251), (1, 500)] {
        let made = std::sync::atomic::AtomicU64::new(0);
        let made = &made;
        let gathered = manager.execute_transaction("g", |tx| async move {
            made.store(0, Ordering::SeqCst);
            for n in 0..1_000 {
                let id = format!("s{}", n % states);
                tx.save_state("g", &id, snapshot(&id, json!(n)), why()).await?;
                made.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        assert_eq!(gathered.await.unwrap_err().code(), "too_large");
        assert_eq!(made.load(Ordering::SeqCst), expected, "{states} states");
    }
    assert_eq!(store.verify(|_| {}).await.unwrap().events, 0);
}

async fn what_is_given_up_is_logged_too(make: Make<'_>) {
    let store = open(make);
    bank(&store, 1).await;
    let manager = TransactionManager::new(&store);
    let (inside, mut reached) = tokio::sync::mpsc::unbounded_channel();
    let running = manager.clone();
    let run = tokio::spawn(async move {
        let waits = running.execute_transaction("bank", |tx| {
            let inside = inside.clone();
            async move {
                tx.get_state("bank", "account-0").await?;
                inside.send(()).unwrap();
                std::future::pending::<tai_state::Result<()>>().await
            }
        });
        waits.await
    });
    reached.recv().await.unwrap();
    run.abort();
    assert!(run.await.unwrap_err().is_cancelled());
    let log = manager.transaction_log();
    let said: Vec<_> = log.iter().map(|record| (record.status, record.attempts)).collect();
    assert_eq!(said, [(TransactionStatus::Abandoned, 1)]);
}

async fn transactions_are_logged(make: Make<'_>) {
    let store = open(make);
    bank(&store, 2).await;
    let manager = TransactionManager::new(&store).with_log_of(4);
    let ran = tokio::spawn({
        let manager = manager.clone();
        async move {
            manager
                .run(|tx| async move {
                    tx.get_state("bank", "account-0").await?;
                    tx.save_state("bank", "account-1", counter(1), why()).await
                })
                .await
        }
    });
    let ran = ran.await.unwrap().unwrap();
    assert_eq!((ran.attempts, ran.reads, ran.writes), (1, 2, 1));
    assert_eq!(ran.status, TransactionStatus::Committed);
    let read = manager.execute_transaction("audit", |tx| async move {
        tx.batch_get_states("bank", &["account-0", "none"]).await
    });
    read.await.unwrap();
    let failed = manager.execute_transaction("bank", |tx| async move {
        tx.save_state("bank", "account-0", counter(1), why()).await?;
        tx.get_state("bank", "none").await
    });
    failed.await.unwrap_err();
    let log = manager.transaction_log();
    let statuses: Vec<_> = log.iter().map(|record| record.status).collect();
    use TransactionStatus::{Committed, Failed, ReadOnly};
    assert_eq!(statuses, [Committed, ReadOnly, Failed]);
    assert_eq!(log[0].id, ran.transaction_id);
    let touched = |states: &[tai_state::TouchedState]| {
        states.iter().map(|s| (s.state_id.clone(), s.version)).collect::<Vec<_>>()
    };
    let both = [("account-0".to_owned(), 1), ("account-1".to_owned(), 1)];
    assert_eq!(touched(&log[0].reads), both);
    assert_eq!(touched(&log[0].writes), [("account-1".to_owned(), 2)]);
    assert_eq!(touched(&log[1].reads), [("account-0".to_owned(), 1), ("none".to_owned(), 0)]);
    assert_eq!(log[1].governor, "audit");
    assert!(log[2].reason.as_ref().unwrap().contains("none"), "{:?}", log[2].reason);
    let event = store.event("bank", "account-1", 2).await.unwrap();
    assert_eq!(event.metadata.context[tai_state::TRANSACTION_CONTEXT], json!(log[0].id));
    for _ in 0..5 {
        manager.run(|_| async { Ok(()) }).await.unwrap();
    }
    assert_eq!(manager.transaction_log().len(), 4, "the log is bounded");
}

async fn several_governors_in_one_transaction(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(&store);
    let run = manager.execute_transaction("a", |tx| async move {
        tx.save_state("a", "x", counter(1), why()).await?;
        tx.save_state("b", "x", counter(2), why()).await?;
        let from = tx.get_state("b", "x").await?.0;
        tx.log_transition("b", Some(&from), &snapshot("x", json!(3)), "act", why()).await
    });
    let event = run.await.unwrap();
    assert_eq!((event.action.as_str(), event.version()), ("act", 2));
    assert_eq!(store.get_state("a", "x").await.unwrap().1, 1);
    assert_eq!(store.get_state("b", "x").await.unwrap().1, 2);
    proved(&store).await;
}
