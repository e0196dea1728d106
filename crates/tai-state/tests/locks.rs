//! What locks promise, on every backend: one holder, tokens that only rise, leases that end, fenced
//! writes of a holder that is too late refused.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[macro_use]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Make, Random, counter, open, proved, snapshot, why};
use serde_json::json;
use tai_state::{
    DistributedLock, Error, Fence, LockStatus, StateMachinePersister, StateStore,
    TransactionManager,
};
use tokio::time::timeout;

on_every_backend![
    one_holds_and_others_wait,
    a_lock_is_released_when_it_is_dropped,
    fifty_waiters_all_get_it,
    several_locks_come_together_or_not_at_all,
    several_locks_never_deadlock,
    a_lease_is_renewed_while_it_is_held,
    a_dead_holder_s_lease_ends,
    what_a_late_holder_writes_is_refused,
    renewals_do_not_upset_fenced_writes,
    a_broken_lock_is_lost,
    expired_locks_are_cleaned_up,
    more_locks_than_are_read_in_one_go_are_listed,
    tokens_only_rise,
    what_no_lock_takes_is_refused,
    a_dropped_acquire_leaves_nothing_held,
    a_release_is_harmless_twice,
    fences_of_other_processes_and_stores,
];

const LONG: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(10);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A holder that dies without a word: its runtime ends, and with it the renewal; nothing is released.
async fn grant_of_a_dead_holder(
    store: &StateStore,
    resource: &str,
    lease: Duration,
) -> (StateStore, u64) {
    let (manager, resource) = (TransactionManager::new(store.clone()), resource.to_owned());
    let fenced = store.clone();
    let held = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let acquired = runtime.block_on(manager.try_acquire_lock(&resource, "dead", lease));
        let lock = acquired.unwrap();
        let held = (fenced.fenced_by(&lock), lock.fencing_token);
        runtime.shutdown_background();
        drop(lock);
        held
    });
    tokio::task::spawn_blocking(move || held.join().unwrap()).await.unwrap()
}

async fn one_holds_and_others_wait(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let inside = Arc::new(AtomicU64::new(0));
    let sum = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..8 {
        let (manager, inside, sum) = (manager.clone(), Arc::clone(&inside), Arc::clone(&sum));
        tasks.spawn(async move {
            for _ in 0..5 {
                let lock =
                    manager.acquire_lock("r", format!("client-{client}"), LONG).await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two are inside");
                let before = sum.load(Ordering::SeqCst);
                tokio::task::yield_now().await;
                sum.store(before + 1, Ordering::SeqCst);
                inside.fetch_sub(1, Ordering::SeqCst);
                lock.release().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(sum.load(Ordering::SeqCst), 40);
    assert_eq!(manager.lock_record("r").await.unwrap().unwrap().fencing_token, 40);
}

async fn a_lock_is_released_when_it_is_dropped(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    for n in 1..=5 {
        let lock = manager.acquire_lock("r", "a", LONG).await.unwrap();
        assert_eq!(lock.fencing_token, n);
        drop(lock);
    }
    // Long before a lease could end.
    timeout(SOON, manager.acquire_lock("r", "b", LONG)).await.unwrap().unwrap();
}

async fn fifty_waiters_all_get_it(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let first = manager.acquire_lock("r", "first", LONG).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..50 {
        let manager = manager.clone();
        tasks.spawn(async move {
            let lock = manager.acquire_lock("r", format!("w-{client}"), LONG).await.unwrap();
            let token = lock.fencing_token;
            lock.release().await.unwrap();
            token
        });
    }
    first.release().await.unwrap();
    let mut tokens = tasks.join_all().await;
    tokens.sort_unstable();
    assert_eq!(tokens, (2..=51).collect::<Vec<_>>());
}

async fn several_locks_come_together_or_not_at_all(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let b = manager.try_acquire_lock("b", "other", LONG).await.unwrap();
    let refused = manager.acquire_locks(&["a", "b", "c"], "me", ms(200)).await.unwrap_err();
    let Error::LockHeld { resource, held_by, .. } = refused else { panic!("{refused}") };
    assert_eq!((resource.as_str(), held_by.as_str()), ("b", "other"));
    for free in ["a", "c"] {
        assert!(manager.lock_record(free).await.unwrap().is_none(), "{free} was taken");
    }
    let waiting = manager.acquire_locks(&["a", "b", "c"], "me", LONG);
    let release = async {
        tokio::task::yield_now().await;
        b.release().await.unwrap();
    };
    let (locks, ()) = tokio::join!(waiting, release);
    let locks = locks.unwrap();
    let names: Vec<(&str, u64)> =
        locks.iter().map(|lock| (lock.resource.as_str(), lock.fencing_token)).collect();
    assert_eq!(names, [("a", 1), ("b", 2), ("c", 1)]);
    let twice = manager.acquire_locks(&["x", "x"], "me", LONG).await.unwrap_err();
    assert_eq!(twice.code(), "invalid_state");
    assert!(manager.acquire_locks::<&str>(&[], "me", LONG).await.unwrap().is_empty());
}

async fn several_locks_never_deadlock(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..6usize {
        let manager = manager.clone();
        tasks.spawn(async move {
            for step in 0..5usize {
                let names = ["a", "b", "c"];
                let pair = [names[(client + step) % 3], names[(client + step + 1) % 3]];
                let who = format!("c{client}");
                let locks = manager.acquire_locks(&pair, who, LONG).await.unwrap();
                for lock in locks {
                    lock.release().await.unwrap();
                }
            }
        });
    }
    timeout(LONG, tasks.join_all()).await.unwrap();
    let all = manager.list_locks().await.unwrap();
    assert_eq!(all.iter().map(|lock| lock.fencing_token).sum::<u64>(), 60);
}

async fn a_lease_is_renewed_while_it_is_held(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let lock = manager.acquire_lock("r", "a", ms(1_000)).await.unwrap();
    // Whoever waits for longer than the lease does not get it.
    let other = manager.acquire_lock_within("r", "b", ms(1_000), ms(3_000)).await;
    assert!(matches!(other, Err(Error::LockHeld { .. })), "{other:?}");
    assert!(!lock.is_lost());
    let record = manager.lock_record("r").await.unwrap().unwrap();
    assert_eq!((record.status, record.fencing_token), (LockStatus::Held, 1));
    lock.release().await.unwrap();
}

async fn a_dead_holder_s_lease_ends(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let lease = ms(1_000);
    let (_, token) = grant_of_a_dead_holder(&store, "r", lease).await;
    let dead_since = tokio::time::Instant::now();
    let early = manager.try_acquire_lock("r", "b", lease).await;
    assert!(matches!(early, Err(Error::LockHeld { .. })), "taken before the lease ended");
    let lock = manager.acquire_lock_within("r", "b", lease, SOON).await.unwrap();
    let waited = dead_since.elapsed();
    assert_eq!(lock.fencing_token, token + 1);
    // Not earlier than the lease, give or take what passed before the clock was started; and the wait
    // ends with the lease, not with the time for waiting.
    assert!(waited >= lease / 2 && waited < SOON / 2, "{waited:?}");
}

async fn what_a_late_holder_writes_is_refused(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let (late, token) = grant_of_a_dead_holder(&store, "r", ms(200)).await;
    // Nobody else has it: the token is still the newest.
    assert_eq!(late.save_state("g", "s", counter(1), why()).await.unwrap(), 1);
    let lock = manager.acquire_lock_within("r", "b", LONG, SOON).await.unwrap();
    let before = proved(&store).await;
    let lost = |error: Error| match error {
        Error::LockLost { resource, fencing_token, reason } => {
            assert_eq!((resource.as_str(), fencing_token), ("r", token));
            assert!(reason.contains('b'), "{reason}");
        }
        other => panic!("{other}"),
    };
    lost(late.save_state("g", "s", counter(2), why()).await.unwrap_err());
    lost(late.update_state("g", "s", counter(2), 1, why()).await.unwrap_err());
    lost(late.delete_state("g", "s", None, why()).await.unwrap_err());
    lost(late.save_state("g", "new", counter(2), why()).await.unwrap_err());
    let persister = StateMachinePersister::with_defaults(&late);
    let from = store.get_state("g", "s").await.unwrap().0;
    let logged =
        persister.log_transition("g", Some(&from), &snapshot("s", json!(2)), "a", why()).await;
    lost(logged.unwrap_err());
    let transactions = TransactionManager::new(&late);
    let run = transactions.execute_transaction("g", |tx| async move {
        tx.save_state("g", "s", counter(2), why()).await?;
        tx.save_state("g", "t", counter(2), why()).await
    });
    lost(run.await.unwrap_err());
    assert_eq!(proved(&store).await, before, "something was written");
    // The new holder writes.
    let current = store.fenced_by(&lock);
    assert_eq!(current.save_state("g", "s", counter(3), why()).await.unwrap(), 2);
    lock.release().await.unwrap();
    let released = current.save_state("g", "s", counter(4), why()).await.unwrap_err();
    assert!(matches!(released, Error::LockLost { .. }), "{released}");
}

async fn renewals_do_not_upset_fenced_writes(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    // Renewed every 50 ms, while eight tasks write under it.
    let lock = manager.acquire_lock("r", "a", ms(150)).await.unwrap();
    let fenced = store.fenced_by(&lock);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let fenced = fenced.clone();
        tasks.spawn(async move {
            let started = tokio::time::Instant::now();
            let mut done = 0;
            while started.elapsed() < ms(800) {
                fenced.save_state("g", format!("s{task}"), counter(done), why()).await?;
                done += 1;
            }
            Ok::<u64, Error>(done)
        });
    }
    let mut done = 0;
    for result in tasks.join_all().await {
        match result {
            Ok(count) => done += count,
            // A machine that stood still for longer than the lease.
            Err(error) => assert!(lock.is_lost(), "{error}"),
        }
    }
    assert!(done > 0);
    proved(&store).await;
}

async fn a_broken_lock_is_lost(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    assert!(manager.break_lock("r").await.unwrap().is_none());
    let lock = manager.acquire_lock("r", "a", ms(600)).await.unwrap();
    let fenced = store.fenced_by(&lock);
    let broken = manager.break_lock("r").await.unwrap().unwrap();
    assert_eq!((broken.client_id.as_str(), broken.fencing_token), ("a", 1));
    let refused = fenced.save_state("g", "s", counter(1), why()).await.unwrap_err();
    assert!(matches!(refused, Error::LockLost { .. }), "{refused}");
    // The holder is told, by its next renewal.
    let told = timeout(SOON, lock.lost()).await.unwrap();
    assert!(matches!(told, Error::LockLost { fencing_token: 1, .. }), "{told}");
    assert!(lock.is_lost());
    assert_eq!(manager.try_acquire_lock("r", "b", LONG).await.unwrap().fencing_token, 2);
}

async fn expired_locks_are_cleaned_up(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let held = manager.acquire_lock("held", "a", LONG).await.unwrap();
    grant_of_a_dead_holder(&store, "dead", ms(60)).await;
    let status = async |name| manager.lock_record(name).await.unwrap().map(|lock| lock.status);
    while status("dead").await == Some(LockStatus::Held) {
        tokio::task::yield_now().await;
    }
    assert_eq!(status("dead").await, Some(LockStatus::Expired));
    assert_eq!(manager.cleanup_expired_locks().await.unwrap(), 1);
    assert_eq!(manager.cleanup_expired_locks().await.unwrap(), 0);
    assert_eq!(status("dead").await, Some(LockStatus::Free));
    assert_eq!(status("held").await, Some(LockStatus::Held));
    // The token stays.
    assert_eq!(manager.try_acquire_lock("dead", "b", LONG).await.unwrap().fencing_token, 2);
    let names: Vec<String> =
        manager.list_locks().await.unwrap().into_iter().map(|lock| lock.resource).collect();
    assert_eq!(names, ["dead", "held"]);
    held.release().await.unwrap();
    // Locks are no states.
    assert_eq!(store.get_stats().await.unwrap().total_states, 0);
    assert!(store.list_governors(None, 10).await.unwrap().is_empty());
    proved(&store).await;
}

async fn more_locks_than_are_read_in_one_go_are_listed(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let names: Vec<String> = (0..405).map(|n| format!("r{n:03}")).collect();
    let mut held = Vec::new();
    for some in names.chunks(135) {
        held.extend(manager.acquire_locks(some, "a", LONG).await.unwrap());
    }
    let listed = manager.list_locks().await.unwrap();
    let listed: Vec<String> = listed.into_iter().map(|lock| lock.resource).collect();
    assert_eq!(listed, names);
    let mut tasks = tokio::task::JoinSet::new();
    held.into_iter().for_each(|lock| drop(tasks.spawn(lock.release())));
    tasks.join_all().await.into_iter().for_each(Result::unwrap);
}

/// Grants over several locks, with release, drop, break and expiry, in any order.
async fn tokens_only_rise(make: Make<'_>) {
    let mut random = Random::announced("grants");
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let mut newest = [0u64; 5];
    for _ in 0..100 {
        let number = usize::try_from(random.below(5)).unwrap();
        let name = format!("r{number}");
        let token = match random.below(8) {
            0 => {
                let (_, token) = grant_of_a_dead_holder(&store, &name, ms(50)).await;
                token
            }
            step => {
                let lock = manager.acquire_lock_within(&name, "a", LONG, SOON).await.unwrap();
                let token = lock.fencing_token;
                match step {
                    1 => drop(lock),
                    2 => drop((manager.break_lock(&name).await.unwrap(), lock)),
                    3 => manager.release_lock(&name, &lock.lock_token).await.unwrap(),
                    _ => lock.release().await.unwrap(),
                }
                token
            }
        };
        assert_eq!(token, newest[number] + 1, "{name}");
        newest[number] = token;
        // So that the next one finds it ended or released.
        while manager.lock_record(&name).await.unwrap().unwrap().status == LockStatus::Held {
            tokio::task::yield_now().await;
        }
    }
}

async fn what_no_lock_takes_is_refused(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let day = Duration::from_secs(86_400);
    for (resource, client, lease) in [
        ("", "a", LONG),
        ("r", "", LONG),
        ("r", "a", Duration::ZERO),
        ("r", "a", Duration::from_nanos(1)),
        ("r", "a", day * 36_500),
        ("r", "a", Duration::MAX),
    ] {
        let refused = manager.try_acquire_lock(resource, client, lease).await.unwrap_err();
        assert_eq!(refused.code(), "invalid_state", "{refused}");
    }
    let long = "x".repeat(1_401);
    assert_eq!(manager.try_acquire_lock(&long, "a", LONG).await.unwrap_err().code(), "too_large");
    for odd in ["a/b~c%", "..", "__x__", "\u{202e}x\n", "é"] {
        let lock = manager.acquire_lock_within(odd, "a", day, Duration::MAX).await.unwrap();
        assert_eq!((lock.resource.as_str(), lock.fencing_token), (odd, 1));
        lock.release().await.unwrap();
    }
    assert_eq!(manager.list_locks().await.unwrap().len(), 5);
}

/// Dropped at any point, an acquisition leaves a lock that is free, at the latest when its lease has
/// ended; and the next call works.
async fn a_dropped_acquire_leaves_nothing_held(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    for polls in 0..12 {
        let acquire = manager.acquire_lock("r", "gone", LONG);
        let mut acquire = Box::pin(acquire);
        let mut got = None;
        for _ in 0..polls {
            let poll = std::future::poll_fn(|context| {
                std::task::Poll::Ready(acquire.as_mut().poll(context))
            });
            if let std::task::Poll::Ready(done) = poll.await {
                got = Some(done.unwrap());
                break;
            }
            tokio::time::sleep(ms(1)).await;
        }
        drop((acquire, got));
        // Far sooner than the lease of the one that went away.
        let next = manager.acquire_lock_within("r", "next", LONG, SOON).await.unwrap();
        next.release().await.unwrap();
    }
}

async fn a_release_is_harmless_twice(make: Make<'_>) {
    let store = open(make);
    let manager = TransactionManager::new(store.clone());
    let lock: DistributedLock = manager.acquire_lock("r", "a", LONG).await.unwrap();
    let token = lock.lock_token.clone();
    manager.release_lock("r", &token).await.unwrap();
    manager.release_lock("r", &token).await.unwrap();
    lock.release().await.unwrap();
    // Another manager, which did not grant it.
    let elsewhere = TransactionManager::new(store.clone());
    elsewhere.release_lock("r", &token).await.unwrap();
    let next = manager.acquire_lock("r", "b", LONG).await.unwrap();
    for (resource, token) in [("r", token.as_str()), ("r", "no token"), ("none", token.as_str())] {
        let refused = elsewhere.release_lock(resource, token).await.unwrap_err();
        assert!(matches!(refused, Error::LockLost { .. }), "{refused}");
    }
    assert!(!next.is_lost());
    assert_eq!(manager.lock_record("r").await.unwrap().unwrap().status, LockStatus::Held);
}

async fn fences_of_other_processes_and_stores(make: Make<'_>) {
    let store = open(make);
    let other = open(make);
    let manager = TransactionManager::new(store.clone());
    let lock = manager.acquire_lock("r", "a", LONG).await.unwrap();
    // The token alone, as another process is told it.
    let fence = Fence::new("r", lock.fencing_token).unwrap();
    assert_eq!((fence.resource().as_str(), fence.fencing_token()), ("r", 1));
    store.fenced_by(fence).save_state("g", "s", counter(1), why()).await.unwrap();
    for wrong in [Fence::new("r", 2).unwrap(), Fence::new("none", 1).unwrap()] {
        let refused = store.fenced_by(wrong).save_state("g", "s", counter(2), why()).await;
        assert!(matches!(refused, Err(Error::LockLost { .. })), "{refused:?}");
    }
    let of_another = other.fenced_by(&lock).save_state("g", "s", counter(1), why()).await;
    assert_eq!(of_another.unwrap_err().code(), "invalid_state");
    // Two grants of one lock never stand at once, whichever of them is current.
    for other in [0, 2] {
        let twice = store.fenced_by(&lock).fenced_by(Fence::new("r", other).unwrap());
        let refused = twice.save_state("g", "s", counter(2), why()).await;
        assert!(matches!(refused, Err(Error::LockLost { .. })), "{refused:?}");
    }
    // Two locks at once; when one is lost, nothing is written.
    let second = manager.acquire_lock("q", "a", LONG).await.unwrap();
    let both = store.fenced_by(&lock).fenced_by(&second).fenced_by(&lock);
    assert_eq!(both.save_state("g", "s", counter(2), why()).await.unwrap(), 2);
    second.release().await.unwrap();
    let refused = both.save_state("g", "s", counter(3), why()).await.unwrap_err();
    assert!(matches!(&refused, Error::LockLost { resource, .. } if resource == "q"), "{refused}");
    assert_eq!(store.get_state("g", "s").await.unwrap().1, 2);
}
