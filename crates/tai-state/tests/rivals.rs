//! What went wrong once, or nearly did, between writers who get in each other's way: each is a case that
//! a review of lines, keys and locks has found.

// A thread that does something else is what one of the cases is about.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use common::{counter, options, snapshot, why};
use serde_json::json;
use tai_state::backend::Backend;
use tai_state::backend::memory::MemoryBackend;
use tai_state::testing::faults::{CommitFault, FaultyBackend};
use tai_state::{Error, StateStore, StoreOptions, TransactionManager};

/// A store whose commits take a while, as over a network.
fn slow(ms: u64, options: StoreOptions) -> StateStore {
    let backend = FaultyBackend::new(Arc::new(MemoryBackend::new()), []);
    let backend = backend.slowed(Duration::from_millis(ms));
    StateStore::with_backend(Arc::new(backend), options)
}

/// The second attempt touches one state only: its change goes to the line of that state.
#[tokio::test]
async fn an_entry_goes_to_the_line_of_its_own_state() {
    let store = StateStore::in_memory();
    let manager = TransactionManager::new(&store);
    let both = |n: u64| {
        let manager = manager.clone();
        async move {
            manager
                .execute_transaction("g", |tx| async move {
                    tx.save_state("g", "a", counter(n), why()).await?;
                    tx.save_state("g", "b", counter(n), why()).await
                })
                .await
                .unwrap();
        }
    };
    both(1).await;
    let attempts = AtomicU32::new(0);
    let other = std::sync::Mutex::new(None);
    let told = manager
        .execute_transaction("g", |tx| {
            let n = attempts.fetch_add(1, Ordering::SeqCst);
            let (both, store, other) = (&both, store.clone(), &other);
            async move {
                if n == 0 {
                    tx.save_state("g", "a", counter(10), why()).await?;
                    tx.save_state("g", "b", counter(10), why()).await?;
                    both(2).await; // somebody is faster
                    return Ok(0);
                }
                // On the newer data it decides to change `a` alone.
                let version = tx.save_state("g", "a", counter(100), why()).await?;
                let task =
                    tokio::spawn(
                        async move { store.save_state("g", "b", counter(200), why()).await },
                    );
                *other.lock().unwrap() = Some(task);
                Ok(version)
            }
        })
        .await
        .unwrap();
    let task = other.lock().unwrap().take().unwrap();
    let told_b = task.await.unwrap().unwrap();
    println!("told: a is at {told}, b is at {told_b}");
    let (a, va) = store.get_state("g", "a").await.unwrap();
    let (b, vb) = store.get_state("g", "b").await.unwrap();
    println!("stored: a = {} at {va}, b = {} at {vb}", a.data, b.data);
    let report = store.verify(|_| {}).await.unwrap();
    println!("verify: {:?}", report.problems);
    assert_eq!((va, a.data["count"].as_u64()), (told, Some(100)), "an acknowledged write is lost");
    assert!(report.ok, "the store is damaged");
}

/// Workers claim jobs, another one at each attempt.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn workers_that_claim_jobs() {
    let folder = tempfile::tempdir().unwrap();
    let mut damaged = 0;
    for round in 0..10 {
        let store = StateStore::open(folder.path().join(format!("{round}.tai"))).await.unwrap();
        let manager = TransactionManager::new(&store);
        manager
            .execute_transaction("g", |tx| async move {
                for job in 0..4 {
                    tx.save_state("g", format!("job{job}"), counter(0), why()).await?;
                }
                Ok(())
            })
            .await
            .unwrap();
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for worker in 0..8u64 {
            let (manager, store, next) = (manager.clone(), store.clone(), Arc::clone(&next));
            tasks.spawn(async move {
                for _ in 0..20 {
                    let claim = manager.execute_transaction("g", |tx| {
                        let job = format!("job{}", next.fetch_add(1, Ordering::SeqCst) % 4);
                        async move {
                            let (mut state, version) = tx.get_state("g", &job).await?;
                            state.data["count"] = json!(worker);
                            tx.update_state("g", &job, state, version, why()).await
                        }
                    });
                    if let Err(error) = claim.await {
                        println!("claim: {error} {:?}", std::error::Error::source(&error));
                    }
                    let job = format!("job{}", next.load(Ordering::SeqCst) % 4);
                    if let Err(error) = store.save_state("g", &job, counter(worker), why()).await {
                        println!("save: {error}");
                    }
                }
            });
        }
        tasks.join_all().await;
        let report = store.verify(|_| {}).await.unwrap();
        if !report.ok || report.events != 4 + 8 * 40 {
            damaged += 1;
            println!(
                "round {round}: {} events of {}, {:?}",
                report.events,
                4 + 8 * 40,
                report.problems
            );
        }
    }
    assert_eq!(damaged, 0);
}

/// The same key, twice at the same time: whoever sees the first's write sees its answer.
#[tokio::test]
async fn the_second_sender_of_a_key_gets_the_first_answer() {
    let store = slow(30, StoreOptions::default());
    store.save_state("g", "order", snapshot("order", json!({"paid": false})), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let pay = || {
        manager.execute_once("g", "payment-1", |tx| async move {
            let (mut order, version) = tx.get_state("g", "order").await?;
            if order.data["paid"] == json!(true) {
                return Err(Error::InvalidState {
                    subject: "order".into(),
                    reason: "it is paid already".into(),
                });
            }
            order.data["paid"] = json!(true);
            tx.update_state("g", "order", order, version, why()).await
        })
    };
    let (one, two) = tokio::join!(pay(), pay());
    println!("{one:?} / {two:?}");
    assert_eq!(one.unwrap(), 2);
    assert_eq!(two.unwrap(), 2, "the key was answered");
}

/// The lock token is a secret.
#[tokio::test]
async fn debug_shows_no_lock_token() {
    let store = StateStore::in_memory();
    let manager = TransactionManager::new(&store);
    let lock = manager.acquire_lock("r", "me", Duration::from_secs(5)).await.unwrap();
    let shown = format!("{store:?} {manager:?}");
    assert!(!shown.contains(&lock.lock_token), "the lock token is shown");
}

/// Writers that cannot succeed must not starve those that can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doomed_writers_starve_nobody() {
    // A commit takes 10 ms, as over a network.
    let store = slow(10, options(|o| o.retry.deadline = Duration::from_secs(10)));
    store.save_state("g", "s", counter(0), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let mut doomed = tokio::task::JoinSet::new();
    let mut locks = Vec::new();
    for n in 0..12 {
        // A holder that has lost its lock and does not look at the errors of its writes.
        let lock =
            manager.acquire_lock(format!("r{n}"), "paused", Duration::from_secs(60)).await.unwrap();
        let fenced = store.fenced_by(&lock);
        manager.break_lock(format!("r{n}")).await.unwrap();
        locks.push(lock);
        doomed.spawn(async move {
            loop {
                let refused = fenced.save_state("g", "s", counter(1), why()).await;
                assert!(refused.is_err());
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (mut failed, mut slowest) = (0, Duration::ZERO);
    for _ in 0..5 {
        let started = tokio::time::Instant::now();
        let done =
            manager.run(|tx| async move { tx.save_state("g", "s", counter(5), why()).await }).await;
        match done {
            Ok(done) => {
                println!("transaction: attempts {}, {:?}", done.attempts, started.elapsed());
            }
            Err(error) => {
                failed += 1;
                println!("transaction: {error}: {:?}", std::error::Error::source(&error));
            }
        }
        let started = tokio::time::Instant::now();
        if let Err(error) = store.save_state("g", "s", counter(6), why()).await {
            failed += 1;
            println!("save: {error}");
        }
        println!("save: {:?}", started.elapsed());
        slowest = slowest.max(started.elapsed());
    }
    assert!(failed == 0, "{failed} of 10 failed, slowest {slowest:?}");
}

/// One try means one try, but a conflict must be one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_conflict_without_a_change() {
    let store = slow(5, options(|o| o.retry.max_attempts = 1));
    for s in ["x", "y"] {
        store.save_state("g", s, counter(0), why()).await.unwrap();
    }
    let manager = TransactionManager::new(&store);
    // Always refused: it changes nothing, ever.
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let store = store.clone();
        tasks.spawn(async move {
            loop {
                let refused = store.update_state("g", "x", counter(1), 99, why()).await;
                assert!(matches!(refused, Err(Error::VersionConflict { .. })));
                tokio::task::yield_now().await;
            }
        });
    }
    let mut spurious = 0;
    for _ in 0..20 {
        let both = manager
            .execute_transaction("g", |tx| async move {
                tx.save_state("g", "x", counter(1), why()).await?;
                tx.save_state("g", "y", counter(1), why()).await
            })
            .await;
        if let Err(error) = both {
            spurious += 1;
            println!("{error}: {:?}", std::error::Error::source(&error));
        }
    }
    assert_eq!(spurious, 0, "conflicts although nobody else has changed anything");
}

/// A store that is used from two runtimes, of which one is not driven for a while.
#[test]
fn two_runtimes() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (a, b) = (runtime(), runtime());
    let store = a
        .block_on(StateStore::open_with(
            folder.path().join("a.tai"),
            options(|o| o.retry.deadline = Duration::from_secs(2)),
        ))
        .unwrap();
    a.block_on(store.save_state("g", "s", counter(0), why())).unwrap();
    let (mut slowest, mut failed) = (Duration::ZERO, 0);
    std::thread::scope(|scope| {
        let (stop, other) = (Arc::new(std::sync::atomic::AtomicBool::new(false)), store.clone());
        let stopped = Arc::clone(&stop);
        // A synchronous caller, which does other things between its calls.
        scope.spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                for _ in 0..50 {
                    a.block_on(other.save_state("g", "s", counter(1), why())).unwrap();
                }
                std::thread::sleep(Duration::from_secs(3));
            }
        });
        std::thread::sleep(Duration::from_millis(1));
        let end = tokio::time::Instant::now() + Duration::from_secs(5);
        while tokio::time::Instant::now() < end {
            let started = tokio::time::Instant::now();
            if let Err(error) = b.block_on(store.save_state("g", "s", counter(2), why())) {
                failed += 1;
                println!("{error} after {:?}", started.elapsed());
            }
            slowest = slowest.max(started.elapsed());
        }
        stop.store(true, Ordering::SeqCst);
    });
    println!("slowest {slowest:?}");
    assert_eq!(failed, 0);
}

/// The renewals of the own lock do not upset fenced writes, also when a commit is sent once only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewals_and_one_try() {
    let store = slow(15, options(|o| o.retry.max_attempts = 1));
    let manager = TransactionManager::new(&store);
    store.save_state("g", "x", counter(0), why()).await.unwrap();
    store.save_state("g", "y", counter(0), why()).await.unwrap();
    let lock = manager.acquire_lock("r", "me", Duration::from_millis(150)).await.unwrap();
    let fenced = TransactionManager::new(store.fenced_by(&lock));
    let mut failed = 0;
    for n in 0..30 {
        let write = fenced
            .execute_transaction("g", |tx| async move {
                tx.save_state("g", "x", counter(n), why()).await?;
                tx.save_state("g", "y", counter(n), why()).await
            })
            .await;
        if let Err(error) = write {
            failed += 1;
            println!("{error}: {:?}", std::error::Error::source(&error));
        }
    }
    assert_eq!(failed, 0);
}

/// Nobody waits for ever for a runtime that is not driven.
#[test]
fn a_runtime_that_stands_still() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (a, b) = (runtime(), runtime());
    let store = slow(50, options(|o| o.retry.deadline = Duration::from_millis(500)));
    a.block_on(store.save_state("g", "s", counter(0), why())).unwrap();
    a.block_on(async {
        // A caller that gives up after 5 ms; then `a` has nothing to do any more.
        let save = store.save_state("g", "s", counter(1), why());
        let _ = tokio::time::timeout(Duration::from_millis(5), save).await;
    });
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..2 {
            let started = tokio::time::Instant::now();
            let saved = b.block_on(store.save_state("g", "s", counter(2), why()));
            println!("save: {saved:?} after {:?}", started.elapsed());
        }
        let started = tokio::time::Instant::now();
        let updated = b.block_on(store.update_state("g", "s", counter(2), 99, why()));
        println!("update: {updated:?} after {:?}", started.elapsed());
        sender.send(()).unwrap();
    });
    let ended = receiver.recv_timeout(Duration::from_secs(8));
    assert!(ended.is_ok(), "a call with a deadline of 500 ms hangs for ever");
}

/// A read that is given up must not move the cut.
#[tokio::test]
async fn a_read_that_is_given_up_leaves_the_cut_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let store = StateStore::open(folder.path().join("a.tai")).await.unwrap();
    let manager = TransactionManager::new(&store);
    for s in ["a", "b", "c"] {
        store.save_state("g", s, counter(0), why()).await.unwrap();
    }
    let given_up = AtomicU64::new(0);
    for n in 1..=20 {
        let (a, b) = manager
            .execute_transaction("g", |tx| {
                let (manager, given_up) = (manager.clone(), &given_up);
                async move {
                    let a = tx.get_state("g", "a").await?.0;
                    {
                        // Begun, and dropped before its answer is there.
                        let mut c = Box::pin(tx.get_state("g", "c"));
                        let begun = std::future::poll_fn(|context| {
                            std::task::Poll::Ready(c.as_mut().poll(context).is_pending())
                        });
                        given_up.fetch_add(u64::from(begun.await), Ordering::SeqCst);
                    }
                    manager
                        .execute_transaction("g", |tx| async move {
                            tx.save_state("g", "a", counter(n), why()).await?;
                            tx.save_state("g", "b", counter(n), why()).await
                        })
                        .await?;
                    let b = tx.get_state("g", "b").await?.0;
                    Ok((a.data["count"].clone(), b.data["count"].clone()))
                }
            })
            .await
            .unwrap();
        assert_eq!(a, b, "the two are always written together");
    }
    assert!(given_up.into_inner() > 0, "no read was given up");
}

/// What is not sent before the deadline is surely not applied.
#[tokio::test]
async fn a_closure_that_takes_too_long() {
    let store = slow(30, options(|o| o.retry.deadline = Duration::from_millis(100)));
    store.save_state("g", "x", counter(0), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let late = manager
        .execute_transaction("g", |tx| async move {
            tx.save_state("g", "x", counter(1), why()).await?;
            tx.save_state("g", "y", counter(1), why()).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok(())
        })
        .await;
    println!("{late:?}");
    assert!(
        !matches!(late, Err(Error::OutcomeUnknown { .. })),
        "nothing was sent in time: {late:?}"
    );
}

/// Two processes, ten tasks each, one hot state: nobody gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_on_a_hot_state() {
    let inner: Arc<dyn Backend> = Arc::new(MemoryBackend::new());
    let handle = || {
        let slow = FaultyBackend::new(Arc::clone(&inner), []).slowed(Duration::from_millis(10));
        StateStore::with_backend(Arc::new(slow), options(|o| o.retry.max_attempts = 12))
    };
    let stores = [handle(), handle()];
    stores[0].save_state("g", "s", counter(0), why()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..20 {
        let manager = TransactionManager::new(&stores[task % 2]);
        tasks.spawn(async move {
            let (mut failed, mut most) = (0, 0);
            for _ in 0..15 {
                let add = manager.run(|tx| async move {
                    let (mut state, version) = tx.get_state("g", "s").await?;
                    state.data["count"] = json!(state.data["count"].as_u64().unwrap() + 1);
                    tx.update_state("g", "s", state, version, why()).await
                });
                match add.await {
                    Ok(done) => most = most.max(done.attempts),
                    Err(error) => {
                        failed += 1;
                        println!("{error}: {:?}", std::error::Error::source(&error));
                    }
                }
            }
            (failed, most)
        });
    }
    let ended = tasks.join_all().await;
    println!("most attempts {:?}", ended.iter().map(|(_, most)| most).max());
    let failed: u32 = ended.iter().map(|(failed, _)| failed).sum();
    assert_eq!(failed, 0, "of 300");
}

/// Who renews or releases while commits fail does not hammer.
#[tokio::test]
async fn renewals_and_releases_do_not_hammer() {
    let backend = FaultyBackend::new(Arc::new(MemoryBackend::new()), []);
    let store = StateStore::with_backend(Arc::new(backend.clone()), StoreOptions::default());
    let manager = TransactionManager::new(&store);
    let lock = manager.acquire_lock("r", "me", Duration::from_secs(3)).await.unwrap();
    backend.inject(vec![CommitFault::LostRequest; 100_000]);
    let before = backend.commits();
    tokio::time::sleep(Duration::from_millis(2_000)).await;
    let renewals = backend.commits() - before;
    drop(lock);
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let releases = backend.commits() - before - renewals;
    let waiting =
        manager.acquire_lock_within("q", "me", Duration::from_secs(3), Duration::from_secs(1));
    waiting.await.unwrap_err();
    let acquisitions = backend.commits() - before - renewals - releases;
    println!(
        "{renewals} commits to renew in 1 s, {releases} to release and {acquisitions} to acquire in 1 s"
    );
    assert!((1..50).contains(&renewals) && releases < 50 && acquisitions < 50);
}

/// Looking and writing again share one budget of tries: whatever the mix of failures, a release is sent
/// as often as the policy says.
#[tokio::test]
async fn tries_of_a_release_do_not_multiply() {
    let backend = FaultyBackend::new(Arc::new(MemoryBackend::new()), []);
    let options = options(|o| o.retry.base = Duration::from_millis(1));
    let most = u64::from(options.retry.max_attempts);
    let store = StateStore::with_backend(Arc::new(backend.clone()), options);
    let manager = TransactionManager::new(&store);
    let lock = manager.acquire_lock("r", "me", Duration::from_secs(60)).await.unwrap();
    let mix = [CommitFault::Unavailable, CommitFault::Unavailable, CommitFault::LostRequest];
    backend.inject(mix.into_iter().cycle().take(200));
    let before = backend.commits();
    manager.release_lock("r", &lock.lock_token).await.unwrap_err();
    assert_eq!(backend.commits() - before, most);
    std::mem::forget(lock);
}

/// A holder whose lease has ended, and whose lock was cleaned up and given to another, is told so.
#[tokio::test]
async fn what_was_cleaned_up_was_not_released() {
    let store = StateStore::in_memory();
    let manager = TransactionManager::new(&store);
    let lease = Duration::from_millis(60);
    let lock = {
        // Its renewal ends with its runtime.
        let manager = manager.clone();
        let held = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let lock = runtime.block_on(manager.try_acquire_lock("r", "late", lease)).unwrap();
            runtime.shutdown_background();
            lock
        });
        held.join().unwrap()
    };
    while manager.cleanup_expired_locks().await.unwrap() == 0 {
        tokio::task::yield_now().await;
    }
    let next = manager.acquire_lock("r", "next", Duration::from_secs(60)).await.unwrap();
    let late = lock.release().await.unwrap_err();
    assert!(matches!(late, Error::LockLost { fencing_token: 1, .. }), "{late}");
    next.release().await.unwrap();
}

/// What an engine refuses is refused by itself, however often its transaction shares a commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_engine_refuses_spoils_no_other() {
    let backend = FaultyBackend::new(Arc::new(MemoryBackend::new()), []).refusing("poison");
    let backend = backend.slowed(Duration::from_millis(5));
    let store = StateStore::with_backend(Arc::new(backend), StoreOptions::default());
    let save = |text: &str| snapshot("s", json!({ "text": text }));
    store.save_state("g", "s", save("first"), why()).await.unwrap();
    let manager = TransactionManager::new(&store);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..12u64 {
        let (manager, text) = (manager.clone(), if task % 4 == 0 { "poison" } else { "good" });
        let new = save(text);
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            for _ in 0..3 {
                let write = manager.execute_transaction("g", |tx| {
                    let new = new.clone();
                    async move {
                        let (_, version) = tx.get_state("g", "s").await?;
                        tx.update_state("g", "s", new, version, why()).await
                    }
                });
                outcomes.push(write.await);
            }
            (text, outcomes)
        });
    }
    for (text, outcomes) in tasks.join_all().await {
        for outcome in outcomes {
            match (text, outcome) {
                ("good", Ok(_)) => {}
                ("poison", Err(error)) => assert_eq!(error.code(), "invalid_state", "{error}"),
                (text, outcome) => panic!("{text}: {outcome:?}"),
            }
        }
    }
    assert_eq!(store.get_state("g", "s").await.unwrap().1, 1 + 9 * 3);
}

/// No clock makes a lock panic, or a lock that cannot be read.
#[tokio::test]
async fn clocks_at_the_end_of_time() {
    use chrono::{DateTime, TimeZone, Utc};
    for at in [Utc.with_ymd_and_hms(9999, 12, 31, 23, 59, 59).unwrap(), DateTime::<Utc>::MAX_UTC] {
        let clock = Arc::new(tai_state::ManualClock::at(at));
        let store = StateStore::in_memory_with(options(|o| o.clock = clock));
        let tried = tokio::spawn(async move {
            let manager = TransactionManager::new(&store);
            let lock = manager.acquire_lock("r", "me", Duration::from_secs(5)).await?;
            let listed = manager.list_locks().await?;
            lock.release().await?;
            Ok::<_, Error>(listed.len())
        });
        assert_eq!(tried.await.unwrap().unwrap(), 1, "{at}");
    }
}

/// The same on a file, by two handles.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_handles_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tai");
    let open = || StateStore::open_with(&path, options(|o| o.retry.max_attempts = 12));
    let one = open().await.unwrap();
    one.save_state("g", "s", counter(0), why()).await.unwrap();
    let two = open().await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..20usize {
        let manager = TransactionManager::new(if task % 2 == 0 { &one } else { &two });
        tasks.spawn(async move {
            let (mut failed, mut most) = (0u32, 0);
            for _ in 0..40 {
                let add = manager.run(|tx| async move {
                    let (mut state, version) = tx.get_state("g", "s").await?;
                    state.data["count"] = json!(state.data["count"].as_u64().unwrap() + 1);
                    tx.update_state("g", "s", state, version, why()).await
                });
                match add.await {
                    Ok(done) => most = most.max(done.attempts),
                    Err(_) => failed += 1,
                }
            }
            (task % 2, failed, most)
        });
    }
    let ended = tasks.join_all().await;
    let failed = |side| ended.iter().filter(|t| t.0 == side).map(|t| t.1).sum::<u32>();
    println!("failed of 400: {} here, {} there", failed(0), failed(1));
    assert_eq!((failed(0), failed(1)), (0, 0));
}
